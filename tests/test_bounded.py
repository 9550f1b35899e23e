"""Limits on what others send: ordinary inputs pass them, and what they refuse is said clearly."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest
import yaml
from hostile.cases import NAMES, adapter, pair

import outliermerge
from outliermerge import ArgumentError, OutlierMergeError, SpecError
from outliermerge.checkpoint import patterns
from outliermerge.checkpoint.patterns import Budget, Pattern, TooSlowError
from outliermerge.cli.main import main as cli
from outliermerge.cli.parts import plain_json
from outliermerge.errors import MAX_MESSAGE, listing, quoted, readable, shown, suggest
from outliermerge.spec import text as spec_text
from outliermerge.spec.check import parse_spec
from outliermerge.spec.text import parse_yaml, plain_yaml
from outliermerge.storage import files, json_text
from outliermerge.storage.files import read_bytes
from outliermerge.storage.json_text import parse_json
from outliermerge.storage.machine import limited_code

LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"


# Messages.


@pytest.mark.parametrize("text", [*NAMES.values(), "\ud800", "x" * 10**6, "\x1b" * 10**6, ""])
def test_what_is_quoted_is_one_short_printable_line(text):
    for quote in (shown(text), quoted(text)):
        assert quote.isprintable()
        assert len(quote) <= 122
    for message in (readable(text), str(OutlierMergeError(text)), str(SpecError(text))):
        assert all(c.isprintable() or c == "\n" for c in message)
        assert len(message) <= 2 * MAX_MESSAGE
    assert len(readable(text)) <= MAX_MESSAGE
    rows = listing([text] * 100)
    assert all(c.isprintable() or c == "\n" for c in rows)
    assert len(readable(rows)) <= MAX_MESSAGE
    assert len(suggest(text, [text] * 5000)) < 5000


@pytest.mark.parametrize(
    "value", [[1] * 10**6, {"a": ["\x1b" * 10**6]}, 10**3000, None, b"\x1b" * 999]
)
def test_values_are_quoted_short(value):
    assert len(quoted(value)) <= 122
    assert quoted(value).isprintable()


def test_short_messages_and_names_stay_as_they_are():
    assert str(OutlierMergeError("a\n  é 'b'")) == "a\n  é 'b'"
    assert (shown("model.é"), quoted("it's"), quoted([1, "a"])) == (
        "model.é",
        '"it\'s"',
        "[1, 'a']",
    )


def test_a_long_message_keeps_its_start_and_its_advice():
    message = str(OutlierMergeError("x/config.json: " + "y" * 10**6 + ". Fetch it again."))

    assert message.startswith("x/config.json: y")
    assert message.endswith(". Fetch it again.")
    assert "characters left out" in message


def test_of_a_long_message_rows_of_listings_are_left_out_and_counted():
    rows = listing([f"{number}: " + "x" * 90 for number in range(100)])
    message = readable(f"two lists:\n{rows}\nand\n{rows}\nAdvice.")

    assert message.startswith("two lists:\n  0: x")
    assert message.count("\n  … and 95 more\n") == 2
    assert message.endswith("\nAdvice.")


@pytest.mark.parametrize("text", NAMES.values())
def test_printed_json_controls_no_terminal_and_means_the_same(text):
    printed = plain_json(json.dumps({text: [text]}, indent=2, ensure_ascii=False))

    assert all(c.isprintable() or c == "\n" for c in printed)
    assert json.loads(printed) == {text: [text]}


def test_the_model_card_holds_names_without_what_they_would_inject(tmp_path, monkeypatch):
    bad = "`x`\n\n# Injected\n\n```\n<script>"
    monkeypatch.chdir(tmp_path)
    pair(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "bad").rename(tmp_path / "a" / bad.replace("/", "_"))
    spec = {"merge_method": "linear", "models": [{"model": "good"}, {"model": f"a/{bad}"}]}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))

    assert cli(["run", "spec.yaml", "--output", "out"]) == 0
    card = (tmp_path / "out/README.md").read_text("utf-8")

    outside = re.sub(r"(?ms)^(```+)yaml\n.*?^\1$", "", card)
    assert "\n# Injected" not in outside
    recipe = re.search(r"(?ms)^(```+)yaml\n(.*?)^\1$", card)
    assert recipe
    assert yaml.safe_load(recipe[2])["models"][1]["model"] == f"a/{bad}"


def test_the_report_holds_names_without_what_they_would_inject(tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    pair(tmp_path, tensors={"a.weight": 40, NAMES["markdown"]: 30, NAMES["lines"]: 30})
    monkeypatch.chdir(tmp_path)

    assert cli(["report", "bad", "-o", "out.html"]) == 0
    page = (tmp_path / "out.html").read_text("utf-8")

    assert "<script>alert(1)" not in page
    assert "\n# Injected" not in page


# Small files.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: os.mkfifo(path), "is a pipe, socket or device"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe, socket or device"),
        (lambda path: path.mkdir(), "is a folder, expected a regular file"),
        (lambda path: path.write_bytes(bytes(1001)), "has 1,001 bytes, more than the 1,000"),
        (lambda path: path.symlink_to("gone"), "is a link to gone, which is not there"),
    ],
)
def test_what_is_no_small_file_is_refused_without_being_read(tmp_path, make, message):
    make(tmp_path / "x.json")

    with pytest.raises(OutlierMergeError, match=message):
        read_bytes(tmp_path / "x.json", max_bytes=1000)


def test_a_file_without_a_size_is_read_up_to_the_limit():
    path = Path("/proc/self/smaps")
    if not path.exists():
        pytest.skip("there is no /proc")
    with pytest.raises(OutlierMergeError, match="more than the 100 that"):
        read_bytes(path, max_bytes=100)


def test_a_file_at_the_limit_is_read(tmp_path):
    (tmp_path / "x").write_bytes(bytes(1000))

    assert read_bytes(tmp_path / "x", max_bytes=1000) == bytes(1000)
    assert read_bytes(tmp_path / "absent") is None


def test_json_is_read_up_to_its_limits():
    deep = b"[" * json_text.MAX_DEPTH + b"]" * json_text.MAX_DEPTH
    assert parse_json(deep)
    with pytest.raises(ValueError, match="too deep in one another, more than 100"):
        parse_json(b"[" + deep + b"]")
    assert parse_json(b"[1,2,3]", max_values=3) == [1, 2, 3]
    with pytest.raises(ValueError, match="some 4 values, more than the 3"):
        parse_json(b"[1,2,3,4]", max_values=3)


def test_the_largest_files_of_models_are_within_the_limits():
    """Gemma 3's tokenizer.json: 262,144 pieces, 514,906 merges as pairs, 6,242 added tokens."""
    num_values = 262_144 * 2 + 514_906 * 3 + 6_242 * 20
    assert num_values < json_text.MAX_VALUES
    assert files.MAX_LARGE_BYTES > 33_400_000


def test_files_that_are_carried_over_are_copied_and_not_held(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair(tmp_path)
    (tmp_path / "good/merges.txt").write_bytes(b"a b\n" * 5_000_000)

    assert cli(["run", "spec.yaml", "--output", "out"]) == 0
    merged = tmp_path / "out/merges.txt"
    assert merged.read_bytes() == (tmp_path / "good/merges.txt").read_bytes()
    assert stat.S_IMODE(merged.stat().st_mode) & 0o200


# YAML.


def test_anchors_and_merge_keys_of_ordinary_specs_are_taken():
    shared = (
        "merge_method: ties\nbase_model: base\n"
        "models:\n- {model: a, parameters: &p {weight: 0.5, density: [0.1, 0.9]}}\n"
        "- {model: b, parameters: *p}\n- {model: c, parameters: {<<: *p, weight: 1}}\n"
    )

    models = parse_spec(shared).models

    assert [len(model.settings) for model in models] == [2, 2, 2]
    assert models[2].settings["weight"].entries[0].values == (1.0,)


def test_yaml_counts_what_aliases_stand_for(monkeypatch):
    monkeypatch.setattr(spec_text, "MAX_VALUES", 20)
    text = "a: &a [1, 2, 3]\nb: [*a, *a]\n"  # 1 + 1 + 4 + 1 + 1 + (1 + 4) * 2

    assert parse_yaml(text, file="x")[0]["b"] == [[1, 2, 3], [1, 2, 3]]
    with pytest.raises(SpecError, match=r"x:3:4: not valid YAML: here it has more than 20 values"):
        parse_yaml(text + "c: *a\n", file="x")


def test_yaml_is_nested_up_to_its_limit():
    deep = spec_text.MAX_DEPTH - 1
    parse_yaml("[" * deep + "]" * deep, file="x")
    with pytest.raises(SpecError, match="more than 50 lists and mappings in one another"):
        parse_yaml("[" * 60 + "]" * 60, file="x")


@pytest.mark.parametrize(
    "text", ["1:1:1.5", "1" + ":59" * 600, "0x" + "f" * 2000, "1." + "9" * 2000]
)
def test_odd_numbers_are_numbers_or_refused(text):
    try:
        assert isinstance(plain_yaml(text), (int, float, str))
    except ValueError as error:
        assert len(str(error)) < 200


def test_a_gradient_of_more_values_than_layers_is_refused_where_it_stands():
    values = ", ".join(["0.5"] * 1001)
    with pytest.raises(SpecError, match=r"spec:4:\d+: parameters\.weight.*found 1,001 values"):
        parse_spec(LINEAR + f"parameters:\n  weight: [{values}]\n")
    parse_spec(LINEAR + f"parameters:\n  weight: [{', '.join(['0.5'] * 1000)}]\n")


def test_of_many_problems_in_a_spec_ten_are_told():
    with pytest.raises(SpecError, match="and 490 more") as caught:
        parse_spec(LINEAR + "".join(f"key{i}: 1\n" for i in range(500)))
    assert str(caught.value).count("\n") <= 11


def test_a_sweep_has_up_to_a_thousand_outputs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pair(tmp_path)
    values = ",".join(map(str, range(1, 41)))
    sets = ["--set", f"models.1.weight={values}", "--set", f"models.2.weight={values}"]

    assert cli(["sweep", "spec.yaml", "--output", "out", *sets]) == 2
    assert "1,600 combinations" in capsys.readouterr().err


# Patterns.
ORDINARY = [
    r"q_proj",
    r"model.layers.0.self_attn.q_proj",
    r"^model\.layers\.(\d+)\.",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj)",
    r"^(?:.*?(?:language|text).*?(?:self_attn|attention|attn).*?(?:q_proj|k_proj))$",
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
    r"(?<![^.])layers\.\d+\.mlp$",
    r"(\w+\.)*q_proj",
    r"(?P<a>layers)\.(\d+)\.(?P=a)?",
    r"(?i)Q_PROJ",
    r"(?m)^model",
]
LAYERS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.17.mlp.up_proj",
    "visual.blocks.3.attn.q_proj",
    "language_model.model.layers.4.self_attn.k_proj",
    "a\nmodel.é",
    "",
]


@pytest.mark.parametrize("text", ORDINARY)
@pytest.mark.parametrize("steps", [patterns._MAX_STEPS, 0], ids=["here", "in a process"])
def test_ordinary_patterns_match_as_python_says(text, steps):
    pattern = Pattern(text, Budget(steps=steps))
    for name in LAYERS:
        assert pattern.search(name) == (re.search(text, name) is not None)
        assert pattern.sub(r"<\g<0>>", name) == re.sub(text, r"<\g<0>>", name)


@pytest.mark.parametrize("text", [r"q_proj", r"^model\.layers\.(\d+)\.", r"(.*\.)?(q_proj)$"])
def test_simple_patterns_need_no_process(text):
    budget = Budget()
    pattern = Pattern(text, budget)
    for number in range(1000):
        pattern.search(f"model.layers.{number}.self_attn.q_proj")
    assert budget.process is None


def test_a_pattern_that_backtracks_is_stopped_and_its_process_gone():
    budget = Budget()
    pattern = Pattern("(a+)+$", budget)
    assert pattern.search("aaa")
    with pytest.raises(TooSlowError):
        pattern.search("a" * 60 + "b")
    assert budget.process is not None
    process = budget.process
    del budget, pattern
    assert process.returncode is not None


@pytest.fixture
def impatient(monkeypatch):
    """Give the process of foreign expressions a second."""
    worker, limits = patterns._WORKER, (patterns.MAX_SECONDS, patterns._MAX_BYTES)
    changed = worker.replace(limited_code(*limits), limited_code(1, limits[1]))
    assert changed != worker
    monkeypatch.setattr(patterns, "_WORKER", changed)


def test_an_adapter_whose_pattern_backtracks_is_refused_with_advice(
    tmp_path, impatient, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path, rank_pattern={"(a+)+$": 1})

    assert cli(["plan", "spec.yaml"]) == 1
    said = capsys.readouterr().err
    assert "bad/adapter_config.json: the pattern '(a+)+$' takes more than" in said
    assert "name the layers one by one" in said


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (
            "rank_pattern",
            ["q_proj"],
            "rank_pattern: found ['q_proj'], expected an object of counts",
        ),
        ("rank_pattern", {"q_proj": "8"}, "expected an object of counts"),
        ("alpha_pattern", {"q_proj": None}, "expected an object of numbers"),
        ("target_modules", 7, "target_modules: found 7, expected a text or a list of texts"),
        ("layers_pattern", {"a": 1}, "expected a text or a list of texts"),
        ("modules_to_save", "head", "modules_to_save: found 'head', expected a list of texts"),
        ("r", True, "r: found True, expected a count"),
        ("lora_alpha", 10**400, "expected a number"),
        ("peft_type", ["LORA"], "a PEFT adapter of type ['LORA']"),
        ("trainable_token_indices", {"a": 1}, "a list of counts, or an object of such lists"),
    ],
)
def test_settings_of_wrong_types_are_refused(
    tmp_path, monkeypatch, capsys, setting, value, message
):
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path, **{setting: value})

    assert cli(["plan", "spec.yaml"]) == 1
    assert message in capsys.readouterr().err


def test_a_rename_that_backtracks_is_refused_where_it_stands(
    tmp_path, impatient, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    spec = (
        "merge_method: linear\nmodels:\n- model: good\n"
        "- model: bad\n  rename:\n    from: '(a+)+$'\n    to: b\n"
    )
    pair(tmp_path, spec=spec, tensors={"a" * 60 + "!": 4})

    assert cli(["plan", "spec.yaml"]) == 2
    assert "spec.yaml:6:11: models[1].rename.from: '(a+)+$' takes more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", ['!!timestamp "x"', '!!int ""', "!!bool maybe", '!!float "a b"', "2001-99-99", "0x_"]
)
def test_a_value_that_its_kind_does_not_take_is_quoted_and_not_explained_by_python(value):
    with pytest.raises(SpecError, match=r"x.yaml:1:4: not valid YAML: '.*' is no \w+: put a text"):
        parse_yaml(f"a: {value}", file="x.yaml")


@pytest.mark.parametrize("output", ["a\0b", "a" * 300, "~nobody_of_this_name/x"])
def test_an_output_that_is_no_path_is_a_wrong_usage(output, tmp_path, monkeypatch):
    pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=r"output: .* cannot be a path"):
        outliermerge.run("spec.yaml", output=output)
