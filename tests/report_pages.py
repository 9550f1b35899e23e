"""Pages of `outliermerge report` in headless Chromium: helpers of their tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from checkpoints import family, load_folder
from playwright.sync_api import Page, sync_playwright

import outliermerge
from outliermerge.analysis.report.build import build_report
from outliermerge.analysis.stats import weight_stats
from outliermerge.analysis.table import WeightStats

# Chromium calls home otherwise.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
           "--disable-component-update", "--disable-sync"]  # fmt: skip


class Made:
    """A family, its merge, and the pages of both."""

    def __init__(self, folder: Path) -> None:
        self.base, self.models = family("llava", folder)
        spec = {
            "merge_method": "min_sigma",
            "base_model": str(self.base),
            "models": [{"model": str(model)} for model in self.models],
        }
        self.output = outliermerge.run(spec, output=folder / "merged", threads=1).output
        self.names = [str(model) for model in self.models]
        self.pair = build_report(
            self.names, base=str(self.base), output=folder / "pair.html", threads=1
        )
        self.merge = build_report([str(self.output)], output=folder / "merge.html", threads=1)

    def stats(self, number: int, *, base: bool) -> WeightStats:
        return weight_stats(self.names[number], base=str(self.base) if base else None, threads=1)

    def deltas(self, folder: Path) -> dict[str, np.ndarray]:
        base = load_folder(self.base)
        return {
            name: tensor.double().numpy() - base[name].double().numpy()
            for name, tensor in load_folder(folder).items()
        }


@contextmanager
def open_tab(place: Path) -> Iterator[Page]:
    """Open one tab for many pages, which are all visited at one file's address, `place`.

    A browser compiles a script once for an address: plotly.js is most of what a page takes.
    """
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("Chromium is not on the PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(600_000)  # milliseconds
        page.heard, page.place = [], place
        page.on("console", lambda message: page.heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: page.heard.append(str(error)))
        page.on("dialog", lambda dialog: page.heard.append(dialog.message))
        page.on("request", lambda request: page.heard.append(request.url))
        yield page
        browser.close()


@contextmanager
def visited(tab, path, *, width=1280, scheme="light"):
    """Open a page, and afterwards refuse errors, messages and requests for anything else."""
    address = tab.place.as_uri()
    shutil.copyfile(path, tab.place)
    tab.heard.clear()
    tab.set_viewport_size({"width": width, "height": 800})
    tab.emulate_media(color_scheme=scheme)
    if tab.url == address:
        tab.evaluate("history.scrollRestoration = 'manual'")
        tab.reload()
    else:
        tab.goto(address)
    first = tab.locator("section:visible").first.get_attribute("id")
    wait_for(tab, first)
    yield tab
    assert tab.heard == [address], tab.heard


def go_to(page, section):
    """Scroll to a section and wait until it is drawn."""
    page.evaluate("name => document.getElementById(name).scrollIntoView()", section)
    wait_for(page, section)


def wait_for(page, section):
    # Not by a function: the page's policy refuses those that playwright makes from texts.
    page.locator(f"#{section}[aria-busy=false]").wait_for()


def choose(page, section, control, value):
    """Choose what a section shows, and wait until it does."""
    page.select_option(f"#{control}", value)
    go_to(page, section)


def plotted(page, plot, key):
    """Return a list for each trace of what a figure was drawn from."""
    return page.evaluate(
        "([plot, key]) => document.getElementById(plot)._fullData.map(trace => "
        "Array.from(trace[key], value => value && value.length ? Array.from(value) : value))",
        [plot, key],
    )


def facts(page):
    names, values = (page.locator(f"#facts {each}").all_inner_texts() for each in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def number(text):
    return float(text.replace(",", "").removesuffix("%"))


def column(page, table, index):
    return page.locator(f"#{table} tbody td:nth-child({index})").all_inner_texts()
