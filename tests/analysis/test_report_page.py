"""How a report's page opens, reads and can be used: in both themes, on a phone, by keys alone."""

from __future__ import annotations

import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from checkpoints import load_folder, save_tensors
from report_pages import choose, column, go_to, number, plotted

import outliermerge
from outliermerge.analysis.report.build import build_report
from outliermerge.analysis.report.page import plotly_script
from outliermerge.analysis.report.recorded import merge_payload
from outliermerge.analysis.stats import weight_stats
from outliermerge.methods.table import METHODS
from outliermerge.output.card import with_error
from outliermerge.output.manifest_file import read_manifest

pytest_plugins = ("report_fixtures",)

WIDTHS = (1280, 375)


def cards(page):
    """Return what stands on each card of the lead: its title, and values by name."""
    found = {}
    for card in page.locator("#numbers > div").all():
        values = card.locator("dd:not(.note)").all()
        names = [value.locator("span").all_inner_texts() for value in values]
        texts = [value.evaluate("node => node.firstChild.textContent") for value in values]
        found[card.locator("dt").inner_text()] = {
            (name or [""])[0]: text for name, text in zip(names, texts, strict=True)
        }
    return found


def draw_all(page):
    sections = [each.get_attribute("id") for each in page.locator("section:visible").all()]
    for section in sections:
        go_to(page, section)
    return sections


def made_model(folder, *, layers, modules=1, seed=0, like=None):
    """Save a model of small matrices; `like` is a model that it is a fine-tune of."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"layers.{n}.m{m}.weight" for n in range(layers) for m in range(modules)]
    tensors = {
        name: torch.randn(8, 8, generator=generator) * (0.01 if like else 1)
        + (load_folder(like)[name] if like else 0)
        for name in (names or ["w"])
    }
    return save_tensors(folder, tensors)


def made_merge(folder, method, *, layers=2, num=2, modules=1, same=False):
    """Return the output of a merge of small models by any method of the table."""
    base = made_model(folder / "base", layers=layers, modules=modules)
    num = 1 if METHODS[method].max_models == 1 else max(num, METHODS[method].min_models)
    num = min(num, METHODS[method].max_models or num)
    models = [
        made_model(folder / f"task{n}", layers=layers, modules=modules, seed=0 if same else n + 1,
                   like=None if same else base)
        for n in range(num)
    ]  # fmt: skip
    if METHODS[method].base_as == "first":  # the base is one of the models
        models = models[1:]
    spec = {"merge_method": method, "models": [{"model": str(model)} for model in models]}
    if "density" in METHODS[method].parameters:
        spec["parameters"] = {"density": 0.5}
    # Some methods that work on weights need a base, too.
    if METHODS[method].needs_base:
        spec["base_model"] = str(base)
    return outliermerge.run(spec, output=folder / "merged", threads=1).output


def report(folder, models, **options):
    return build_report([str(each) for each in models], output=folder / "p.html", threads=1,
                        **options)  # fmt: skip


# They differ in what they merge, need of a base, and record of each tensor. `make faults` opens the
# pages of the others.
SHOWN = ("min_sigma", "ties", "ramplus_tl", "slerp", "model_stock", "passthrough")


@pytest.mark.parametrize(
    ("method", "layers", "same"),
    [
        pytest.param(name, 3, False, marks=() if name in SHOWN else pytest.mark.faults)
        for name, method in METHODS.items()
        if not method.auxiliary
    ]
    + [("min_sigma", 0, False), ("ties", 1, False), ("min_sigma", 3, True), ("linear", 3, True)],
)
@pytest.mark.sampled(4)
def test_page_of_any_merge_has_three_numbers_and_nothing_empty(
    visit, tmp_path, method, layers, same
):
    with visit(report(tmp_path, [made_merge(tmp_path, method, layers=layers, same=same)])) as page:
        assert page.inner_text("h1") == "The merge merged"
        assert page.inner_text("#sentence").startswith(f"A merge by {method}")
        assert len(cards(page)) == 3 and all(cards(page).values())
        sections = draw_all(page)
        assert sections[0] == "merge" and ("depth" in sections) == (layers > 1)
        assert page.locator(".plot.empty:visible").count() == 0
        for chooser in page.locator("select:visible").all():
            assert chooser.locator("option").count() > 1, chooser.get_attribute("id")
        for table in page.locator("table:visible").all():
            assert table.locator("tbody tr").count() > 0, table.get_attribute("id")


def test_merge_opens_on_what_was_kept_and_how_far_it_moved(made, visit):
    output, base = made.deltas(made.output), load_folder(made.base)

    def size(tensors):
        return np.sqrt(sum((np.asarray(each, np.float64) ** 2).sum() for each in tensors))

    with visit(made.merge) as page:
        shown = cards(page)
        assert list(shown) == ["Kept of each change", "Moved from the base",
                               "Distance from each model"]  # fmt: skip
        kept = []
        for folder in made.models:
            task = made.deltas(folder)
            product = sum((output[key] * task[key]).sum() for key in base)
            kept.append(100 * product / size(task.values()) ** 2)
            assert number(shown["Kept of each change"][folder.name]) == pytest.approx(
                kept[-1], abs=0.06
            )
            apart = size([output[key] - task[key] for key in base]) / size(task.values())
            assert number(shown["Distance from each model"][folder.name]) == pytest.approx(
                100 * apart, abs=0.06 if apart < 0.999 else 0.6
            )
        moved = size(output.values()) / size([each.double().numpy() for each in base.values()])
        assert number(shown["Moved from the base"][""]) == pytest.approx(100 * moved, abs=0.06)
        # The same, beside what was asked of each model.
        table = page.locator("#merge-table tbody tr").all_inner_texts()
        assert [number(row.split()[-1]) for row in table] == pytest.approx(kept, abs=0.06)
        page.locator("summary", has_text="Recipe").click()
        assert page.locator("#recipe").is_visible()


def test_models_open_on_their_change_from_the_base(made, visit):
    with visit(made.pair) as page:
        shown = cards(page)
        assert list(shown) == ["Change from the base", "Outliers", "Unchanged"]
        for place, folder in enumerate(made.models):
            change, base = made.stats(place, base=True), weight_stats(str(made.base), threads=1)
            sizes = [np.linalg.norm([t.l2_norm for t in s.tensors]) for s in (change, base)]
            assert number(shown["Change from the base"][folder.name]) == pytest.approx(
                100 * sizes[0] / sizes[1], abs=0.06
            )
            assert number(shown["Outliers"][folder.name]) == pytest.approx(
                100 * change.whole.spreads["outside_3_ratio"].mean, abs=0.06
            )


def scaled_merge(folder, weights):
    """Return a merge of which each model's change has a part of its own size."""
    base = made_model(folder / "base", layers=3)
    names = [f"task{place}" for place in range(len(weights))]
    models = [
        made_model(folder / name, layers=3, seed=place + 1, like=base)
        for place, name in enumerate(names)
    ]
    spec = {"merge_method": "task_arithmetic", "base_model": str(base),
            "models": [{"model": str(model), "parameters": {"weight": weight}}
                       for model, weight in zip(models, weights, strict=True)]}  # fmt: skip
    return outliermerge.run(spec, output=folder / "merged", threads=1).output


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((0.4, 0.3), r"It kept 4[\d.]+% of the change of task0, and 3[\d.]+% of that of task1\."),
        ((0.3, 0.4, 0.1), r"kept from [\d.]+% \(task2\) to [\d.]+% \(task1\)\."),
        ((1,), r"of task0 on base\.$"),
    ],
)
def test_the_sentence_of_a_merge_tells_shares_and_not_most_of_a_model(
    visit, tmp_path, weights, said
):
    with visit(report(tmp_path, [scaled_merge(tmp_path, weights)])) as page:
        sentence = page.inner_text("#sentence")
        assert re.search(said, sentence), sentence
        assert "most of" not in sentence and "least of" not in sentence


def test_a_difference_is_told_only_where_there_is_one(made, visit):
    with visit(made.merge) as page:
        kept = sorted(map(number, cards(page)["Kept of each change"].values()))
        assert kept[1] - kept[0] < 0.1 * kept[1]
        said = f"It kept {kept[0]}% of each model’s change."
        if kept[0] != kept[1]:
            said = f"It kept about as much of each model’s change, {kept[0]}% to {kept[1]}%."
        assert page.inner_text("#sentence").endswith(said)
    with visit(made.pair) as page:
        assert "both models changed about as much" in page.inner_text("#sentence")


@pytest.mark.parametrize(("weight", "kept"), [(0.5, "50.0%"), (1.25, "125%")])
def test_equal_shares_are_told_once_and_in_three_digits(visit, tmp_path, weight, kept):
    base = save_tensors(tmp_path / "base", {"w": torch.ones(2, 2)})
    models = []
    for row in range(2):
        values = torch.ones(2, 2)
        values[row] += torch.tensor([1.0, -1.0])
        models.append({"model": str(save_tensors(tmp_path / f"task{row}", {"w": values}))})
    spec = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    spec |= {"parameters": {"weight": weight}}
    output = outliermerge.run(spec, output=tmp_path / "merged", threads=1).output
    with visit(report(tmp_path, [output])) as page:
        assert page.inner_text("#sentence").endswith(f"It kept {kept} of each model’s change.")
        assert set(cards(page)["Kept of each change"].values()) == {kept}
        for values in cards(page).values():
            assert all(re.fullmatch(r"[\d.]+%", text) for text in values.values())


def test_products_of_models_are_named_after_them(tmp_path):
    manifest = read_manifest(made_merge(tmp_path, "slerp"))
    titles = {each["model"]: Path(each["model"]).name for each in manifest["inputs"]}
    found = merge_payload(manifest, titles)
    assert len(titles) == 2
    assert list(found["series"])[:2] == [f"gram: {title}" for title in titles.values()]
    lines = found["tensors"][0]["numbers"]["gram: " + next(iter(titles.values()))]
    assert set(lines) == set(titles.values())


def test_a_page_opens_on_changes_where_a_base_is_known(made, visit, tmp_path):
    def title(page):
        return page.evaluate("subjectTitle(SUBJECTS[state.subject])")

    for path, wanted in ((made.pair, "ΔW of task0"), (made.merge, "ΔW of merged")):
        with visit(path) as page:
            assert title(page) == wanted
            assert page.locator("#subject option:checked").inner_text() == wanted
    plain = report(tmp_path, made.names[:1])
    same = build_report(made.names[:1], base=str(shutil.copytree(made.names[0], tmp_path / "same")),
                        output=tmp_path / "same.html", threads=1)  # fmt: skip
    for path in (plain, same):  # nothing changed from a copy of it
        with visit(path) as page:
            assert title(page) == "W of task0"


@pytest.mark.parametrize("num", [1, 2, 7])
def test_models_without_a_base_open_on_their_weights(visit, tmp_path, num):
    models = [made_model(tmp_path / f"model{n}", layers=2, seed=n) for n in range(num)]
    with visit(report(tmp_path, models)) as page:
        shown = cards(page)
        assert list(shown) == ["Parameters", "Within 3σ", "σ"]
        assert number(shown["Parameters"][""]) == 128
        assert len(shown["σ"]) == min(num, 2)  # of many, the least and the most
        assert page.inner_text("h1").count("model") == min(num, 4)
        assert ("3 more" in page.inner_text("h1")) == (num == 7)


@pytest.mark.parametrize("modules", [7, 8, 12])
def test_a_plot_has_seven_lines_and_the_others_on_demand(visit, tmp_path, modules):
    model = made_model(tmp_path / "model", layers=2, modules=modules)
    lines = "document.querySelector('#depth-plots .plot').data.length"
    with visit(report(tmp_path, [model])) as page:
        go_to(page, "depth")
        assert page.evaluate(lines) == 7
        more = page.locator("#depth-plots .more-lines")
        assert more.is_visible() == (modules > 7)
        if modules == 7:
            return
        more.focus()
        for shown in (modules, 7, modules):
            page.keyboard.press("Enter")
            assert page.evaluate(lines) == shown
            assert str(7 if shown == modules else modules) in more.inner_text()
        # What is then drawn anew keeps them.
        page.check("input[name=depth-scale][value=log]")
        go_to(page, "depth")
        assert page.evaluate(lines) == modules


def test_many_models_are_seven_lines_in_every_plot(visit, tmp_path):
    output = made_merge(tmp_path, "min_sigma", num=9)
    with visit(report(tmp_path, [output])) as page:
        draw_all(page)
        choose(page, "depth", "depth-module", "m0")
        for plot in page.locator(".plot.js-plotly-plot:visible").all():
            assert plot.evaluate("plot => plot.data.length") <= 7
        choose(page, "merge", "series", "sigma")
        assert len(plotted(page, "merge-plot", "y")) == 7
        page.locator("#merge-plot + .more-lines").click()
        assert len(plotted(page, "merge-plot", "y")) == 9


def test_axes_start_at_0_and_show_noise_only_to_who_looks_closer(visit, tmp_path):
    model = made_model(tmp_path / "model", layers=4)
    axis = "document.querySelector('#depth-plots .plot')._fullLayout.yaxis.range"
    with visit(report(tmp_path, [model])) as page:
        go_to(page, "depth")
        sigmas = page.evaluate("document.querySelector('#depth-plots .plot').data[0].y")
        assert max(sigmas) / min(sigmas) < 2
        assert page.evaluate(axis)[0] == 0
        page.check("input[name=depth-scale][value=close]")
        assert 0 < page.evaluate(axis)[0] < min(sigmas)
        page.check("input[name=depth-scale][value=log]")
        low, high = page.evaluate(axis)
        assert high - low >= 1 and low < np.log10(min(sigmas)) < np.log10(max(sigmas)) < high


def test_every_plot_of_lines_starts_at_0(made, visit):
    with visit(made.merge) as page:
        draw_all(page)
        for plot in page.locator("#merge-plot, #drift-depth-plot, #outlier-plot").all():
            low, high = plot.evaluate("plot => plot._fullLayout.yaxis.range")
            assert low <= 0 <= high


def test_colours_of_a_heat_map_do_not_make_small_differences_large(made, visit):
    with visit(made.pair) as page:
        for statistic, least in (("std", None), ("skewness", 1.0), ("kept_ratio", None)):
            choose(page, "heat", "statistic", statistic)
            low, high, values = page.evaluate(
                "(({zmin, zmax, z}) => [zmin, zmax, z.flat()])"
                "(document.getElementById('heat-plot')._fullData[0])"
            )
            assert low <= min(values) and max(values) <= high
            wanted = least or 0.25 * max(map(abs, values))
            assert high - low >= wanted * (1 - 1e-9)


@pytest.mark.parametrize("width", WIDTHS)
def test_links_lead_to_their_sections_and_stay_in_sight(made, visit, width):
    def top(section):
        return page.evaluate(
            "name => document.getElementById(name).getBoundingClientRect().top", section
        )

    with visit(made.merge, width=width) as page:
        links = [link.get_attribute("href") for link in page.locator("nav a:visible").all()]
        assert links[0] == "#merge" and len(links) == 8
        for href in reversed(links):
            page.click(f"nav a[href='{href}']")
            page.locator(f"section{href}[aria-busy=false]").wait_for()
            page.locator(f"nav a[href='{href}'][aria-current=true]").wait_for()
            bar = page.evaluate(
                "document.querySelector(innerWidth < 704 ? 'nav' : '#top').offsetHeight"
            )
            is_at_the_end = page.evaluate(
                "innerHeight + scrollY >= document.documentElement.scrollHeight - 2"
            )
            # The bar's rule covers the section's, which is the section's top.
            assert bar - 3 <= top(href[1:]) and (top(href[1:]) <= bar + 30 or is_at_the_end)
            assert page.locator("nav a[aria-current]").count() == 1
            assert page.locator("nav").bounding_box()["y"] == 0
            link = page.locator(f"nav a[href='{href}']").bounding_box()
            assert 0 <= link["x"] and link["x"] + link["width"] <= width


def test_address_of_a_section_opens_there(made, visit):
    with visit(made.merge) as page:
        page.evaluate("location.hash = '#heat'")
        page.locator("nav a[href='#heat'][aria-current=true]").wait_for()
        assert page.locator("#heat[aria-busy=false]").count() == 1


def contrast(first, second):
    """Return the contrast of two colours by WCAG 2.2."""
    lights = []
    for colour in (first, second):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05)
    return max(lights) / min(lights)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_can_be_told_from_the_paper_and_from_each_other(made, visit, scheme):
    with visit(made.pair, scheme=scheme) as page:
        names = [*(f"line-{place}" for place in range(1, 8)), "fit", "limit", "accent"]
        colours = {name: page.evaluate("name => colour(name)", name) for name in names}
        for paper in ("paper", "card"):
            behind = page.evaluate("name => colour(name)", paper)
            for name, own in colours.items():
                assert contrast(own, behind) >= 3 + (name.startswith("line")), name
        assert len(set(colours[name] for name in names[:7])) == 7
        go_to(page, "depth")
        look = "document.querySelector('#depth-plots .plot').data.map(t => t.marker.symbol)"
        assert len(set(page.evaluate(look))) == 7


def test_wide_tables_say_on_a_phone_that_they_go_on(made, visit):
    with visit(made.merge, width=375) as page:
        go_to(page, "tables")
        box = page.locator(".scroll.tall")
        cue = page.locator(".cue", has=page.locator("xpath=following-sibling::*[1]")).last
        assert "more" in box.get_attribute("class") and cue.is_visible()
        names = page.locator("#statistics tbody td:first-child").first
        before = names.bounding_box()["x"]
        box.focus()
        page.keyboard.press("End")
        box.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
        page.locator(".scroll.tall:not(.more)").wait_for()
        assert cue.is_hidden()
        assert names.bounding_box()["x"] == pytest.approx(before, abs=20)  # its name stays


@pytest.mark.parametrize(
    ("which", "width", "scheme"),
    [
        ("merge", 1280, "light"),
        ("merge", 375, "dark"),
        ("pair", 1280, "dark"),
        pytest.param("merge", 1280, "dark", marks=pytest.mark.faults),
        pytest.param("merge", 375, "light", marks=pytest.mark.faults),
        pytest.param("pair", 375, "light", marks=pytest.mark.faults),
    ],
)
@pytest.mark.sampled(2)
def test_no_rule_of_accessibility_is_broken(made, visit, which, width, scheme):
    with visit(getattr(made, which), width=width, scheme=scheme) as page:
        draw_all(page)
        found = Axe().run(page).response
        assert len(found["passes"]) > 30
        assert [(each["id"], [node["html"] for node in each["nodes"]])
                for each in found["violations"]] == []  # fmt: skip


@pytest.mark.parametrize("which", ["pair", "merge"])
def test_no_rule_is_drawn_again_below_that_of_the_controls(made, visit, which):
    rule = "node => parseFloat(getComputedStyle(node).borderTopWidth)"
    with visit(getattr(made, which)) as page:
        widths = [each.evaluate(rule) for each in page.locator("section:visible").all()]
        assert widths[0] == 0 and min(widths[1:]) > 0
        go_to(page, "depth")
        page.evaluate("document.querySelector('nav a[href=\"#depth\"]').click()")
        bottom = "node => node.getBoundingClientRect().bottom"
        rule = page.locator("#depth").bounding_box()["y"]
        assert rule + 1 <= page.locator("#top").evaluate(bottom)


def test_headings_of_the_drift_are_words_and_its_formulas_unfold_below(made, visit):
    with visit(made.merge, width=375) as page:
        go_to(page, "drift")
        table = page.locator("#drift-table")
        assert not re.search("[‖⟨ΔW]", table.locator("thead").inner_text())
        page.locator("summary", has_text="The formulas").click()
        formulas = page.locator("#drift-formulas")
        assert "⟨ΔW*, ΔWᵢ⟩ / ‖ΔWᵢ‖²" in formulas.inner_text()
        box = formulas.bounding_box()
        assert box["x"] + box["width"] <= 375
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_all_controls_are_reached_and_named_without_a_mouse(made, visit):
    wanted = "a[href], button, select, input, summary, [tabindex='0']"
    with visit(made.merge) as page:
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        draw_all(page)
        page.evaluate("scrollTo(0, 0)")
        usable = page.evaluate(
            "wanted => [...document.querySelectorAll(wanted)].filter(each => each.offsetParent"
            " && !(each.type === 'radio' && !each.checked)).length",
            wanted,
        )
        page.locator("#theme").focus()
        reached = 1
        while reached < usable:
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement === document.body"):
                break
            assert page.evaluate(
                "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
                " || document.activeElement.matches('.modebar *')"
            )
            reached += 1
        assert reached == usable


def test_what_a_picture_shows_is_said_in_words(made, visit):
    with visit(made.merge) as page:
        draw_all(page)
        labels = [plot.get_attribute("aria-label") for plot in page.locator(".plot:visible").all()]
        assert len(labels) > 6 and all(labels)
        lines = page.locator("#drift-depth-plot").get_attribute("aria-label")
        assert re.search(r"task0: [\d.]+ to [\d.]+, from [\d.]+ up to [\d.]+; task1: ", lines)
        assert column(page, "statistics", 1)


def test_page_and_card_say_the_same_of_the_move_from_the_base(made, visit):
    drift = read_manifest(made.output)["drift"]
    with visit(made.merge) as page:
        moved = number(cards(page)["Moved from the base"][""]) / 100
        assert "W₀ is the base" in page.locator("#numbers").text_content()
    assert moved == pytest.approx(
        drift["relative_size"], abs=6e-4 + 4 * drift["standard_errors"]["relative_size"]
    )


def test_a_page_is_not_much_larger_than_packed_plotly_and_its_data(made):
    page = made.merge.read_text("utf-8")
    packed = len(gzip.compress(plotly_script().encode(), 6)) * 4 / 3
    data = len(re.search('id="data">(.*?)</script>', page)[1])
    assert packed < len(page) - data < packed + 100_000


def test_a_mean_has_the_digits_that_its_deviation_leaves(made, visit):
    wanted = {
        (0.02007, 0.0001179): "0.0201 ± 0.0001",
        (0.4137, 0.023): "0.41 ± 0.02",
        (12.34, 0.0012): "12.3",
        (0.4137, 0.0): "0.414",
        (0.0, 0.0): "0.00",
    }
    with visit(made.pair) as page:
        found = page.evaluate("all => all.map(([a, b]) => withDeviation(a, b))", [*wanted])
    assert found == [*wanted.values()]
    assert [with_error(*pair) for pair in wanted] == found


def test_it_is_said_why_min_sigma_is_shown_and_what_became_of_all_tensors(visit, tmp_path):
    with visit(report(tmp_path, [made_merge(tmp_path, "task_arithmetic")])) as page:
        page.evaluate("goTo('minsigma')")
        assert page.inner_text("#minsigma-text").startswith("This merge is by task_arithmetic. ")
        assert page.inner_text("#merge-text").startswith("All 2 tensors were merged. ")


def test_a_merge_by_min_sigma_needs_no_reason_and_copies_are_counted(visit, tmp_path):
    base = made_model(tmp_path / "base", layers=2, modules=2)
    tuned = {name: tensor + ("m0" in name) for name, tensor in load_folder(base).items()}
    models = [{"model": str(save_tensors(tmp_path / name, tuned))} for name in "ab"]
    spec = {"merge_method": "min_sigma", "base_model": str(base), "models": models}
    with visit(report(tmp_path, [outliermerge.run(spec, output=tmp_path / "out").output])) as page:
        go_to(page, "minsigma")
        assert page.inner_text("#minsigma-text").startswith("Changes beyond tσ are kept whole")
        assert page.inner_text("#merge-text").startswith("Of 4 tensors 2 were merged and 2 were ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_histogram_with_teeth_is_explained(visit, tmp_path, dtype):
    torch.manual_seed(0)
    base = (torch.randn(200, 300) * 0.05).to(dtype)
    tuned = (base.float() + 0.0005 * torch.randn(200, 300)).to(dtype)
    for name, tensor in (("base", base), ("tuned", tuned)):
        save_tensors(tmp_path / name, {"layers.0.w.weight": tensor})
    with visit(report(tmp_path, [tmp_path / "tuned"], base=str(tmp_path / "base"))) as page:
        go_to(page, "distribution")
        assert page.is_visible("#comb") == (dtype == torch.bfloat16)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_ends_with_its_tables(made, visit, width):
    with visit(made.merge, width=width) as page:
        draw_all(page)
        room = page.evaluate(
            "document.documentElement.scrollHeight - scrollY - "
            "document.getElementById('statistics').getBoundingClientRect().bottom"
        )
        assert room < 120


def test_the_table_of_models_is_not_wider_than_a_page(made, visit):
    with visit(made.merge) as page:
        draw_all(page)
        assert page.evaluate(
            "(box => box.scrollWidth <= box.clientWidth)(document.querySelector('#tables .scroll'))"
        )


def test_a_browser_that_cannot_unpack_says_so(made, tab):
    tab.add_init_script("delete window.DecompressionStream")
    tab.goto(made.pair.as_uri())
    tab.locator("#notes li", has_text="cannot draw the figures").wait_for()
    assert tab.inner_text("#sentence")
