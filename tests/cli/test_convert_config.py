"""mergekit's merge files in our form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from outliermerge.cli import main as cli
from outliermerge.cli.mergekit_files import _DEFAULTS, convert
from outliermerge.methods.table import METHODS
from outliermerge.spec.check import load_spec, parse_spec

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "org/base",
    "models": [{"model": "org/a", "parameters": {"weight": 0.5}}],
    "parameters": {"normalize": False},
    "dtype": "float32",
}
LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "org/a"}, {"model": "org/b"}],
    "parameters": {"weight": 1},
    "dtype": "float32",
}


def slice_of(names: str, **more: Any) -> dict[str, Any]:
    return {"sources": [{"model": f"org/{n}", "layer_range": [0, 32]} | more for n in names]}


SLICED: dict[str, Any] = {
    "merge_method": "slerp",
    "base_model": "org/a",
    "slices": [slice_of("ab") | {"parameters": {"t": 0.5}}],
    "dtype": "float32",
}


def test_what_is_already_in_our_form_stays_as_it_is():
    for document in (TIES, LINEAR, SLICED, TIES | {"seed": 3, "vocabulary": "base"}):
        found = convert(document)
        assert found.document == document
        assert (found.left_out, found.differences, found.obstacles) == ([], [], [])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (TIES | {"name": "mine"}, TIES),
        (
            SLICED | {"slices": [SLICED["slices"][0] | {"merge_method": "slerp", "u": 1}]},
            SLICED,
        ),
        (
            SLICED | {"slices": [slice_of("ab", w=1) | {"parameters": {"t": 0.5, "x": 2}}]},
            SLICED,
        ),
        (TIES | {"parameters": {"int8_mask": True, "normalize": 0.0}}, TIES),
        (TIES | {"parameters": {"nomalize": True, "normalize": False}}, TIES),
        (TIES | {"dype": "float16"}, TIES),
        (TIES | {"models": [*TIES["models"], {"model": "org/base", "parameters": {"weight": 1}}]},
         TIES | {"models": [*TIES["models"], {"model": "org/base"}]}),
        (TIES | {"models": [TIES["models"][0] | {"density": 0.1}]}, TIES),
        (TIES | {"merge_method": "task_arithmetic",
                 "parameters": {"normalize": False, "rescale": False, "density": 1}},
         TIES | {"merge_method": "task_arithmetic"}),
        (LINEAR | {"parameters": {"weight": 1, "t": 1}}, LINEAR),
        (LINEAR | {"tokenizer_source": None, "base_model": None}, LINEAR),
        (LINEAR | {"tokenizer": {"pad": 8, "tokens": {"<a>": {"fource": True}}}},
         LINEAR | {"tokenizer": {"tokens": {"<a>": {}}}}),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_left_out(given, expected):
    found = convert(given)
    assert found.document == expected
    assert (found.differences, found.obstacles) == ([], [])
    load_spec(found.document)


@pytest.mark.parametrize(
    ("given", "expected", "said"),
    [
        (LINEAR | {"base_model": "org/c"},
         LINEAR | {"base_model": "org/c", "models": [*LINEAR["models"], {"model": "org/c"}]},
         "mergekit averages the base model in"),
        (LINEAR | {"dtype": "bfloat16"}, LINEAR | {"dtype": "bfloat16"}, "here it is float32"),
        ({key: LINEAR[key] for key in LINEAR if key != "dtype"},
         {key: LINEAR[key] for key in LINEAR if key != "dtype"}, "here it is float32"),
        (TIES | {"models": [{"model": "org/a"}]}, TIES | {"models": [{"model": "org/a"}]},
         "weight: none is given, which mergekit refuses"),
    ],
)  # fmt: skip
def test_what_behaves_differently_is_told(given, expected, said):
    found = convert(given)
    assert found.document == expected
    [difference] = found.differences
    assert said in difference
    assert found.obstacles == []
    load_spec(found.document)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (TIES | {"tokenizer": {"source": {"model": {"path": "org/base"}}}},
         TIES | {"tokenizer": {"source": "org/base"}}),
        (LINEAR | {"tokenizer": {"tokens": {"<a>": {"source": {"model": {"path": "org/a"}}}}}},
         LINEAR | {"tokenizer": {"tokens": {"<a>": {"source": "org/a"}}}}),
        (LINEAR | {"tokenizer": {"tokens": {"<a>": {"source": {
            "kind": "model_token", "model": {"model": {"path": "org/a"}}, "token_id": 3}}}}},
         LINEAR | {"tokenizer": {"tokens": {"<a>": {"source": {
             "kind": "model_token", "model": "org/a", "token_id": 3}}}}}),
        (TIES | {"base_model": {"model": {"path": "org/base", "revision": "v1"}}},
         TIES | {"base_model": "org/base@v1"}),
        (LINEAR | {"models": [{"model": {"model": {"path": "org/a"}, "lora": {"path": "org/l"}}},
                              {"model": "org/b"}]},
         LINEAR | {"models": [{"model": "org/a+org/l"}, {"model": "org/b"}]}),
        ({key: value for key, value in SLICED.items() if key != "base_model"}
         | {"slices": [SLICED["slices"][0] | {"base_model": "org/a"}]}, SLICED),
    ],
)  # fmt: skip
def test_what_is_only_written_otherwise_is_rewritten(given, expected):
    found = convert(given)
    assert found.document == expected
    assert (found.differences, found.obstacles) == ([], [])
    load_spec(found.document)


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer": {"source": "union"}},
        {"tokenizer": {"source": "base", "pad_to_multiple_of": 8}},
        {"tokenizer": {}},
        {"tokenizer": {"tokens": {"<a>": {"source": {"kind": "zero"}, "force": True}}}},
        {"tokenizer_source": "union"},
        {"tokenizer_source": "model:org/base"},
        {"tokenizer_source": "base", "chat_template": "auto"},
        {"chat_template": "{{ messages }}"},
    ],
)
def test_the_keys_of_tokenizer_and_chat_template_stay_as_they_are(keys):
    found = convert(TIES | keys)
    assert found.document == TIES | keys
    assert (found.left_out, found.differences, found.obstacles) == ([], [], [])
    load_spec(found.document)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {
                "merge_method": "slerp",
                "slices": [
                    slice_of("ab") | {"base_model": "org/a"},
                    slice_of("ab") | {"base_model": "org/b"},
                ],
            },
            "slices[1].base_model: found 'org/b', but another base model is 'org/a'",
        ),
        (LINEAR | {"modules": {}}, "modules"),
        (LINEAR | {"merge_method": "frobnicate"}, "unknown merge method 'frobnicate'"),
        ({"experts": [], "base_model": "x"}, "a file for mergekit-moe"),
        ({"models": []}, "merge_method is missing"),
        (
            TIES | {"merge_method": "task_arithmetic", "parameters": {"rescale": True}},
            "parameters.rescale: task_arithmetic has no such parameter",
        ),
        (LINEAR | {"tokenizer": {"source": "base"}, "tokenizer_source": "base"}, "refuses it"),
    ],
)
def test_what_cannot_be_run_is_told(given, said):
    assert any(said in obstacle for obstacle in convert(given).obstacles)


@pytest.mark.parametrize("name", _DEFAULTS)
def test_every_method_of_mergekit_is_here_or_the_nearest_is_named(name):
    found = convert(TIES | {"merge_method": name, "parameters": {}})
    if name in METHODS:
        assert not any(text.startswith("merge_method") for text in found.obstacles)
    else:
        [said] = [text for text in found.obstacles if text.startswith("merge_method")]
        assert f"mergekit's {name} is not here; the nearest is " in said


def test_defaults_that_differ_are_written_out(monkeypatch):
    monkeypatch.setitem(_DEFAULTS, "linear", {"normalize": False})
    found = convert(LINEAR)
    assert found.document["parameters"] == {"weight": 1, "normalize": False}
    assert found.differences == ["normalize: mergekit's default, false, is written out"]


TEXT = """\
# My merge.
# It is good.

merge_method: ties  # as in the paper
base_model: org/base
# the tuned one
models:
  - model: org/a  # first
    parameters:
      weight: 0.5
# for the mask
parameters:
  int8_mask: true
  normalize: true
name: mine
dtype: float32
"""


class TestCommand:
    def test_comments_are_kept_where_nothing_changes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "theirs.yml"
        file.write_text(TEXT)
        assert cli.main(["convert-config", str(file)]) == 0
        printed = capsys.readouterr()
        kept = TEXT.replace("  int8_mask: true\n", "").replace("name: mine\n", "")
        assert printed.out == kept
        assert printed.err == (
            "left out: name: a label\n"
            "left out: parameters.int8_mask: no effect, it sets how mergekit stores masks in "
            "memory\n"
        )
        parse_spec(printed.out)

    @pytest.mark.parametrize(
        "text",
        [
            "{merge_method: linear, models: [{model: a}], parameters: {int8_mask: 1}}",
            "merge_method: linear\nmodels: &m\n- model: a\nparameters: {weight: 1, int8_mask: 1}\n",
            "x: &w 0.5\nmerge_method: linear\nmodels: [{model: a}]\nparameters: {weight: *w}",
            "parameters:\n  int8_mask: 1\nmerge_method: linear\nmodels: [{model: a}]",
            '"merge_method": linear\nmodels:\n- {model: a}\nname: "x"\n',
        ],
    )
    def test_any_layout_gives_the_same_document(
        self, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "theirs.yml").write_text(text)
        assert cli.main(["convert-config", str(tmp_path / "theirs.yml")]) == 0
        printed = capsys.readouterr().out
        assert yaml.safe_load(printed) == convert(yaml.safe_load(text)).document
        parse_spec(printed)

    def test_json_has_all_of_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "theirs.yml").write_text(TEXT + "modules: {}\n")
        assert cli.main(["convert-config", str(tmp_path / "theirs.yml"), "--json"]) == 1
        printed = capsys.readouterr()
        found = json.loads(printed.out)
        assert printed.err == ""
        assert found["can_be_run"] is False
        (obstacle,) = found["obstacles"]
        assert "modules: is empty" in obstacle
        assert found["spec"] == yaml.safe_load(found["yaml"])
        assert len(found["left_out"]) == 1
        assert found["differences"] == []

    def test_what_the_spec_s_own_check_finds_is_an_obstacle(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        wrong = LINEAR | {"models": [{"model": "org/a"}, {"model": "org/a"}]}
        (tmp_path / "theirs.yml").write_text(yaml.safe_dump(wrong))
        assert cli.main(["convert-config", str(tmp_path / "theirs.yml")]) == 1
        assert "cannot be run: models[1].model: 'org/a' stands twice" in capsys.readouterr().err

    @pytest.mark.parametrize(("text", "code"), [("- a", 2), ("a: [", 2), ("a: 1\n---\nb: 1", 2)])
    def test_what_is_no_merge_file_is_2(
        self, text: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "theirs.yml").write_text(text)
        assert cli.main(["convert-config", str(tmp_path / "theirs.yml")]) == code
        assert capsys.readouterr().err.startswith(f"error: {tmp_path}/theirs.yml:1:1: ") or text
        assert cli.main(["convert-config", str(tmp_path / "absent.yml")]) == 2


@pytest.mark.parametrize("noted", ["name: mine", "parameters: {int8_mask: true}"])
def test_a_run_takes_them_with_a_note(noted):
    text = "merge_method: linear\nmodels:\n- model: a\n- model: b\n" + noted
    spec = parse_spec(text)
    [note] = spec.notes
    assert note.startswith("without effect: ")
    assert load_spec(spec.as_dict()).notes == ()


def test_parameters_of_the_base_model_have_no_effect_and_a_note():
    base = {"model": "org/base", "parameters": {"weight": 1}}
    spec = load_spec(TIES | {"models": [*TIES["models"], base]})
    (note,) = spec.notes
    assert note == "without effect: parameters of the base model (the method has none for it)"
    assert [model.reference for model in spec.models] == ["org/a"]
    spec = load_spec(LINEAR | {"base_model": "org/a"})
    assert len(spec.models) == 2


def test_a_file_with_new_keys_is_written_in_the_order_of_a_reader(tmp_path, capsys):
    path = tmp_path / "merge.yaml"
    path.write_text(
        "# mine\ndtype: float32\nslices:\n- base_model: org/a\n  sources:\n"
        "  - {model: org/a, layer_range: [0, 2]}\n  - {model: org/b, layer_range: [0, 2]}\n"
        "# how\nmerge_method: slerp\nparameters: {t: 0.5}\n"
    )
    assert cli.main(["convert-config", str(path)]) == 0
    written = capsys.readouterr().out
    assert list(yaml.safe_load(written)) == [
        "base_model", "slices", "merge_method", "parameters", "dtype"
    ]  # fmt: skip
    assert written.startswith("# mine\nbase_model: org/a\nslices:\n")
    assert "# how\nmerge_method: slerp\n" in written


@pytest.mark.parametrize(
    ("method", "parameters", "is_told"),
    [
        ("dare_ties", {}, True),
        ("dare_linear", {"rescale": True}, True),
        ("dare_linear", {"rescale": False}, False),
        ("dare_ties", {"rescale_by": "l1"}, False),
        ("della", {}, False),
    ],
)
def test_what_dare_rescales_by_is_told(method, parameters, is_told):
    found = convert(TIES | {"merge_method": method, "parameters": parameters})
    assert any("`rescale_by: l1`" in line for line in found.differences) == is_told
