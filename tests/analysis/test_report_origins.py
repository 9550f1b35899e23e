"""Pages of merges whose output cannot be compared, name by name, with what it is made of."""

from __future__ import annotations

import json
import re

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from checkpoints import family, load_folder
from vocabularies import save_family

import outliermerge
from outliermerge.analysis.report.build import build_report

pytest_plugins = ("report_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of stages' configs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    family("llama", folder, num_models=3, dtype=torch.float32)
    return folder


@pytest.fixture
def data_of(models, tmp_path):
    """Merge, and return the data of the page of the output."""

    def make(spec, **options):
        output = outliermerge.run(spec, output=tmp_path / "out", threads=1).output
        page = build_report([str(output)], output=tmp_path / "p.html", threads=1, **options)
        found = re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
        return json.loads(found[1])

    return make


def sliced(models, *parts, method="passthrough", **keys):
    slices = [
        {"sources": [{"model": str(models / name), "layer_range": [a, b]} for name in names]}
        for names, a, b in parts
    ]
    return {"merge_method": method, "slices": slices, **keys}


def test_layers_with_other_numbers_are_compared_with_nothing(data_of, models):
    spec = sliced(models, (["task0"], 0, 2), (["task1"], 1, 2))
    data = data_of(spec, base=str(models / "base"))
    assert data["drift"] is None
    assert [(each["role"], each["base"]) for each in data["subjects"]] == [("output", None)]
    rows = [(row["layers"], row["sources"]) for row in data["merge"]["layer_map"]]
    assert rows == [
        ([0, 2], [{"model": "task0", "layer_range": [0, 2]}]),
        ([2, 3], [{"model": "task1", "layer_range": [1, 2]}]),
    ]
    assert any("left out" in note for note in data["notes"])


@pytest.mark.parametrize("has_base", [True, False])
def test_models_beside_a_merge_of_moved_layers_have_a_note(has_base, models, tmp_path):
    spec = sliced(models, (["task0"], 0, 1), (["task1"], 0, 1))
    output = outliermerge.run(spec, output=tmp_path / "out", threads=1).output
    base = str(models / "base") if has_base else None
    page = build_report(
        [str(output), str(models / "task0")], base=base, output=tmp_path / "p.html", threads=1
    )
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.S)[1])
    notes = [*data["notes"], *(note for each in data["subjects"] for note in each["notes"])]
    assert sum(f"{output} is a merge of slices" in note for note in notes) == 1


def test_rows_that_go_by_token_are_told(data_of, tmp_path):
    home = save_family(tmp_path / "family", "WordPiece")
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(home / "base"),
        "models": [{"model": str(home / name)} for name in ("chat", "other")],
        "tokenizer_source": "union",
    }
    assert any("go by the tokens of the output" in note for note in data_of(spec)["notes"])


def test_layers_with_the_same_numbers_are_compared(data_of, models, tmp_path):
    both, base = ["task0", "task1"], str(models / "base")
    spec = sliced(models, (both, 0, 1), (both, 1, 2), method="linear", parameters={"weight": 0.5})
    data = data_of(spec, base=base)
    assert data["drift"]["models"] == both
    assert len(data["drift"]["tensors"]) == len(load_folder(tmp_path / "out"))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
@pytest.mark.sampled(2)
def test_a_map_shows_which_layers_are_from_where(width, scheme, data_of, models, visit, tmp_path):
    one = sliced(models, (["task0"], 0, 2), (["task1"], 1, 2))
    two = sliced(models, (["task2"], 0, 2), (["task1"], 0, 1))
    mean = {"merge_method": "linear", "models": [{"model": "s"}, {"model": "s2"}]}
    stages = [{"name": "s", **one}, {"name": "s2", **two}]
    data_of({"stages": stages, **mean})
    with visit(tmp_path / "p.html", width=width, scheme=scheme) as page:
        strips = page.locator("#layers-map .strip")
        told = [strip.get_attribute("aria-label") for strip in strips.all()]
        assert told == [
            "the output, text: 0–2 from s 0–2 and s2 0–2",
            "stage s2, text: 0–1 from task2 0–1; 2 from task1 0",
            "stage s, text: 0–1 from task0 0–1; 2 from task1 1",
        ]
        shown = page.locator("#layers-models").inner_text().split()
        assert shown == ["s", "s2", "task2", "task1", "task0"]
        blocks = page.locator("#layers-map .strip div")
        whole, first, last = (blocks.nth(number).bounding_box() for number in (0, 1, 2))
        assert first["width"] == pytest.approx(2 * last["width"], abs=3)
        assert first["width"] + last["width"] == pytest.approx(whole["width"], abs=3)
        assert whole["x"] + whole["width"] <= width
        colours = page.evaluate(
            "() => [0, 1, 2, 3, 4].map(i => (getComputedStyle("
            "document.querySelectorAll('#layers-models li')[i], '::before').backgroundColor))"
        )
        assert len(set(colours)) == 5
        drawn = page.evaluate(
            "() => Array.from(document.querySelectorAll('#layers-map .strip div'), "
            "block => getComputedStyle(block).backgroundImage)"
        )
        assert all(colour in drawn[0] for colour in colours[:2]) and colours[2] in drawn[1]
        page.locator("#layers summary").click()
        cells = page.locator("#layers-table tbody tr").nth(1).inner_text().split()
        assert cells == ["stage", "s2", "text", "0–1", "passthrough", "task2", "0–1"]
        found = Axe().run(page, "#layers").response
        assert found["passes"] and not found["violations"], found["violations"]


def test_whole_models_have_no_map(data_of, models):
    entries = [{"model": str(models / name)} for name in ("task0", "task1")]
    data = data_of({"merge_method": "linear", "models": entries})
    assert data["merge"]["layer_map"] == []


def staged(models, **keys):
    def entries(*names):
        paths = [str(models / n) if (models / n).is_dir() else n for n in names]
        return [{"model": path, "parameters": {"weight": 0.5}} for path in paths]

    stage = {"name": "first", "merge_method": "linear", "models": entries("task1", "task2")}
    return {"stages": [stage], "models": entries(*keys.pop("of")), **keys}


def test_a_stage_as_base_is_no_model_to_measure_changes_from(data_of, models, visit, tmp_path):
    spec = staged(models, of=["task0"], merge_method="slerp", base_model="first")
    spec |= {"models": [{"model": str(models / "task0")}], "parameters": {"t": 0.5}}
    data = data_of(spec)
    assert not data["drift"]["has_base"] and data["drift"]["models"] == ["task0"]
    assert all(each["base"] is None for each in data["subjects"])
    output, task = load_folder(tmp_path / "out"), load_folder(models / "task0")
    for tensor in data["drift"]["tensors"]:
        name = tensor["name"]
        assert tensor["distance"] == [pytest.approx(float((output[name] - task[name]).norm()))]
    with visit(tmp_path / "p.html") as page:
        sentence = page.inner_text("#sentence")
        assert sentence.endswith("of task0 on first (itself a merge of task1 and task2).")
        assert "first is a stage" in page.inner_text("#notes")
        assert "task0" in page.inner_text("#numbers") and "Kept" not in page.inner_text("#numbers")


def test_a_stage_among_models_is_left_out_and_others_are_right(data_of, models, tmp_path):
    base = str(models / "base")
    data = data_of(
        staged(models, of=["first", "task0"], merge_method="task_arithmetic", base_model=base)
    )
    assert data["drift"]["has_base"] and data["drift"]["models"] == ["task0"]
    output, of_base = load_folder(tmp_path / "out"), load_folder(models / "base")
    for tensor in data["drift"]["tensors"]:
        change = float((output[tensor["name"]] - of_base[tensor["name"]]).norm())
        assert tensor["change_norm"] == pytest.approx(change, rel=1e-5)
    assert sum("is a stage" in note for note in data["notes"]) == 1


def test_a_mixture_says_which_models_it_is_of(models, visit, tmp_path):
    base, *experts = (str(models / name) for name in ("base", "task0", "task1"))
    spec = {
        "base_model": base,
        "gate_mode": "random",
        "experts": [{"source_model": model, "positive_prompts": ["a"]} for model in experts],
    }
    outliermerge.moe(spec, output=tmp_path / "mixed", routing=False)
    page = build_report([str(tmp_path / "mixed")], output=tmp_path / "p.html", threads=1)
    with visit(page) as page:
        assert page.inner_text("h1") == "The mixture mixed"
        notes = page.inner_text("#notes")
        assert f"A mixture of 2 experts from {', '.join(experts)}. " in notes
        assert notes.splitlines()[0].endswith(f"is from {base}.")


def test_modules_have_a_page_that_names_their_models(data_of, models, visit, tmp_path):
    entries = [
        {"model": str(models / name), "parameters": {"weight": 0.5}} for name in ("task0", "task1")
    ]
    module = {"merge_method": "linear", "models": entries}
    data = data_of({"base_model": str(models / "base"), "modules": {"text": module}})
    assert data["drift"] is None and data["merge"]["actions"] == {}
    assert [each["role"] for each in data["subjects"]] == ["output", "output"]
    with visit(tmp_path / "p.html") as page:
        assert page.inner_text("#sentence").startswith(
            "A merge of parts of base: text is a merge by linear of task0, task1."
        )
        assert "moved from the base" in page.inner_text("#numbers").lower()
        assert "modules are not stored" in page.inner_text("#notes")
