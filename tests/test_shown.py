"""What the library's objects show of themselves: in a terminal, and in a notebook."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from html.parser import HTMLParser

import pytest
import torch
from checkpoints import save_tensors

import outliermerge
from outliermerge.display import html_table, short_repr
from outliermerge.execution.routers import Routing
from outliermerge.notebook import NotebookBar, in_notebook

NUM_LAYERS = 40
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Objects of every kind that the library returns, of models with many tensors."""
    folder = tmp_path_factory.mktemp("shown") / EVIL.replace("/", "_")
    for number, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            f"layers.{layer}.{part}.weight": torch.randn(16, 12, generator=generator)
            for layer in range(NUM_LAYERS)
            for part in ("up", "down")
        }
        save_tensors(folder / name, tensors)
    base, a, b = (str(folder / name) for name in ("base", "a", "b"))
    spec = {
        "merge_method": "min_sigma",
        "base_model": base,
        "models": [{"model": a}, {"model": b}],
    }
    plan = outliermerge.plan(spec)
    result = outliermerge.run(plan, output=folder / "out")
    stats = outliermerge.weight_stats(a, base=base)
    comparison = outliermerge.compare_weights([a, b], base=base)
    return {
        "plan": plan,
        "job": plan.jobs[0],
        "input": plan.inputs[0],
        "checkpoint": plan.inputs[0].checkpoint,
        "spec": plan.spec,
        "result": result,
        "manifest": result.manifest,
        "read manifest": outliermerge.read_manifest(folder / "out"),
        "stats": stats,
        "tensor": stats.tensors[0],
        "histogram": stats.tensors[0].histogram,
        "group": stats.whole,
        "comparison": comparison,
        "pair": comparison.pairs[0],
        "spectra": outliermerge.layer_spectra(a, num_values=4),
        "module": outliermerge.layer_spectra(a, num_values=4).modules[0],
        "simulation": outliermerge.simulate(num_points=2000),
        "estimate": outliermerge.estimate(plan, output=folder / "out"),
        "variant": outliermerge.plan_sweep(spec, {"t": [1, 2]})[0],
        "options": outliermerge.RunOptions(),
        "method": outliermerge.METHODS["ties"],
    }


KINDS = (
    "plan", "job", "input", "checkpoint", "spec", "result", "manifest", "read manifest", "stats",
    "tensor", "histogram", "group", "comparison", "pair", "spectra", "module", "simulation",
    "estimate", "variant", "options", "method",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_repr_has_one_to_five_lines_whatever_the_model_has(made, kind):
    text = repr(made[kind])
    assert len(text.splitlines()) <= 5
    assert len(text) < 1200
    assert type(made[kind]).__name__ in text


def test_no_kind_is_forgotten(made):
    assert set(made) == set(KINDS)


def test_a_manifest_is_still_a_dict(made):
    manifest = made["manifest"]
    assert manifest == dict(manifest) == made["read manifest"]
    assert len(manifest["tensors"]) == 2 * NUM_LAYERS


class _Tags(HTMLParser):
    """Counts opened and closed tags, and collects the texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.texts, self.seen = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("plan", ["min_sigma", "merged", "float32", "merge_method: min_sigma"]),
        ("stats", ["up", "down", "all matrices", "kurtosis"]),
        ("comparison", ["cosine", "conflicts", "min-σ keeps whole"]),
    ],
)
def test_in_a_notebook_it_is_a_table_without_foreign_markup(made, kind, words):
    html = made[kind]._repr_html_()
    parsed = _Tags()
    parsed.feed(html)
    assert parsed.open == []
    assert "table" in parsed.seen and "script" not in parsed.seen
    text = "\n".join(parsed.texts)
    assert all(word in text for word in words)
    assert len(html) < 10_000


def test_tables_of_a_notebook_are_escaped_and_cut():
    html = html_table([EVIL], [[EVIL]] * 1000, title=EVIL)
    assert EVIL not in html
    assert html.count("<tr>") == 201 and "800 more" in html


def test_a_short_repr_controls_no_terminal():
    assert "\x1b" not in short_repr([], "a\x1b[2J", "b\nc")


@pytest.fixture
def notebook(monkeypatch):
    """A module that stands in for IPython's, and the messages that it was given."""
    messages = []

    class Handle:
        def update(self, value):
            messages.append(value)

    def display(value, *, display_id):
        assert display_id is True
        messages.append(value)
        return Handle()

    fake = types.ModuleType("IPython")
    fake.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    fake.display = types.SimpleNamespace(display=display)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    return messages


def test_a_run_shows_a_bar_in_a_notebook_and_does_not_flood_it(made, notebook, tmp_path):
    outliermerge.run(made["plan"], output=tmp_path / "out")
    assert in_notebook()
    assert len(notebook) >= 2
    assert re.fullmatch(r"the merge is done: ([\d.]+ kB) of \1, \d+ s", repr(notebook[-1]))
    assert "<progress" in notebook[-1]._repr_html_()


def test_updates_are_seldom_however_often_bytes_are_counted(notebook, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("outliermerge.notebook.time.monotonic", lambda: now[0])
    with NotebookBar("the merge", 10_000) as bar:
        for _ in range(10_000):
            now[0] += 0.001
            bar.advance(1)
    assert len(notebook) == 1 + 20 - 1 + 1  # the first, one each half second, the last


def test_a_bar_says_that_the_merge_stopped(notebook):
    with pytest.raises(KeyError), NotebookBar("the merge", 100):
        raise KeyError
    assert "the merge stopped" in repr(notebook[-1])


def test_where_bytes_are_counted_already_no_bar_is_shown(made, notebook, tmp_path):
    seen = []
    outliermerge.run(made["plan"], output=tmp_path / "out", on_progress=seen.append)
    assert seen and notebook == []


def _looks(made, tmp_path):
    models = [model.reference for model in made["plan"].spec.models]
    return {
        "weight_stats": lambda **more: outliermerge.weight_stats(models[0], **more),
        "compare_weights": lambda **more: outliermerge.compare_weights(models, **more),
        "layer_spectra": lambda **more: outliermerge.layer_spectra(models[0], num_values=4, **more),
        "simulate": lambda **more: outliermerge.simulate(num_points=1000, **more),
        "build_report": lambda **more: outliermerge.build_report(
            models[:1], output=tmp_path / "page.html", **more
        ),
    }


LOOKS = ("weight_stats", "compare_weights", "layer_spectra", "simulate", "build_report")


@pytest.mark.parametrize("name", LOOKS)
def test_what_reads_weights_shows_one_bar_in_a_notebook(made, notebook, tmp_path, name):
    _looks(made, tmp_path)[name]()
    done = repr(notebook[-1])
    found = re.fullmatch(r"the [\w ]+ is done: ([\d.]+ \w?B) of \1, \d+ s", done)
    assert found and found[1] != "0 B", done
    assert sum("is done" in repr(each) for each in notebook) == 1


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("given", ["on_total", "on_progress"])
def test_who_counts_bytes_gets_no_bar(made, notebook, tmp_path, name, given):
    seen = []
    _looks(made, tmp_path)[name](**{given: seen.append})
    assert seen and notebook == []


@pytest.mark.parametrize("shell", [None, types.SimpleNamespace()], ids=["none", "a terminal"])
def test_a_terminal_is_no_notebook(monkeypatch, shell):
    fake = types.ModuleType("IPython")
    fake.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", fake)
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert not in_notebook()


def test_the_version_and_all_names_are_listed():
    from importlib.metadata import version

    assert outliermerge.__version__ == version("outliermerge")
    assert {*outliermerge.__all__, "__version__"} <= {*dir(outliermerge)}


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean 'merge_tensors'"):
        outliermerge.mrege_tensors  # noqa: B018
    with pytest.raises(AttributeError, match=r"dir\(outliermerge\)"):
        outliermerge.zzz  # noqa: B018


@pytest.mark.parametrize("name", ["run", "sweep", "moe", "transplant", "estimate"])
def test_signatures_show_the_options(name):
    parameters = inspect.signature(getattr(outliermerge, name)).parameters
    for field in dataclasses.fields(outliermerge.RunOptions):
        assert field.name in parameters
    assert "changes" not in parameters


@pytest.mark.parametrize(
    "name",
    ["run", "weight_stats", "build_report", "compare_weights", "layer_spectra", "simulate",
     "sweep"],
)  # fmt: skip
def test_signatures_show_no_addresses(name):
    assert " at 0x" not in str(inspect.signature(getattr(outliermerge, name)))


def test_a_routing_says_what_is_in_it():
    rows = [[[0.5] * 8] * 8] * 40
    text = repr(Routing([7] * 8, rows, rows))
    assert "40 layers, 8 experts, 56 tokens" in text and "0.5" not in text
