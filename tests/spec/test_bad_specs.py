"""What a user is told of a spec or an option that is wrong: the whole message, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import save_tensors

from outliermerge import SpecError
from outliermerge.cli import main as cli
from outliermerge.methods.table import EVERY
from outliermerge.spec.check import load_spec

NAMES = ("embed.weight", "model.layers.0.mlp.weight", "model.layers.1.mlp.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models base, a and b of one small architecture."""
    root = tmp_path_factory.mktemp("specs")
    for number, model in enumerate(("base", "a", "b")):
        save_tensors(root / model, {name: torch.full((4, 2), float(number)) for name in NAMES})
    return root


def _plan(folder: Path, text: str | bytes, capsys, *options: str) -> tuple[int, str]:
    """Plan a spec; return the exit code and stderr with the folder's path written DIR."""
    path = folder / "spec.yaml"
    if isinstance(text, bytes):
        path.write_bytes(text)
    else:
        path.write_text(text.replace("DIR", str(folder)), "utf-8", newline="")
    code = cli.main(["plan", str(path), *options])
    return code, capsys.readouterr().err.replace(str(folder), "DIR")


HEAD = """\
merge_method: ties
base_model: DIR/base
models:
  - model: DIR/a
  - model: DIR/b
"""
NO_MODELS = "merge_method: ties\nbase_model: DIR/base\n"
OF_MODEL = NO_MODELS + "models:\n  - model: DIR/a\n    parameters:\n"
LINEAR = HEAD.replace("ties\nbase_model: DIR/base", "linear")
DTYPES = "'float16', 'bfloat16', 'float32' or 'float64'"
ALL_METHODS = ", ".join(sorted(EVERY))
YOUR_OWN = "A method of your own is named package.module:function."
A_VALUE = "expected a value, a list of values or filter entries"


def _with_method(method: str) -> str:
    return HEAD.replace("ties", method)


def _with_parameters(*lines: str) -> str:
    return HEAD + "parameters:\n" + "".join(f"  {line}\n" for line in lines)


BAD = {
    # Keys that are not known here.
    "unknown key": (
        HEAD + "dtpe: float32\n",
        "6:1: dtpe: unknown key 'dtpe'. Did you mean 'dtype'?",
    ),
    "two letters of a key changed places": (
        HEAD.replace("models:", "modles:"),
        "3:1: modles: unknown key 'modles'. Did you mean 'models'?",
    ),
    "unknown key like no other": (
        HEAD + "zzz: 1\n",
        "6:1: zzz: unknown key 'zzz'. Valid: base_model, chat_template, config_source, convert, "
        "dtype, extra, format, layout, merge_method, missing, models, modifiers, modules, "
        "other_files, out_dtype, output, parameters, processor_source, quantize, rename, rounding, "
        "seed, slices, stack, stages, tie_word_embeddings, tokenizer, tokenizer_source, unequal, "
        "vocabulary.",
    ),
    "unknown key of a model": (
        HEAD + "    paramters: {weight: 1}\n",
        "6:5: models[1].paramters: unknown key 'paramters'. Did you mean 'parameters'?",
    ),
    "unknown parameter": (
        _with_parameters("densty: 0.5"),
        "7:3: parameters.densty: ties has no parameter 'densty'. Did you mean 'density'?",
    ),
    "unknown parameter of a model": (
        OF_MODEL + "      wieght: 1\n",
        "6:7: models[0].parameters.wieght: ties has no parameter 'wieght'. Did you mean 'weight'?",
    ),
    "unknown parameter like no other, of a model": (
        OF_MODEL + "      zzz: 1\n",
        "6:7: models[0].parameters.zzz: ties has no parameter 'zzz'. Valid: density, weight.",
    ),
    "parameter of another method": (
        _with_parameters("t: 2"),
        "7:3: parameters.t: ties has no parameter 't'. "
        "Valid: density, lambda, normalize, rescale, trim, weight.",
    ),
    "parameter beside model": (
        HEAD + "    weight: 0.5\n",
        "6:5: models[1].weight: unknown key 'weight'. It is a parameter of ties: "
        "put it under `parameters`.",
    ),
    "parameter at the top": (
        HEAD + "density: 0.5\n",
        "6:1: density: unknown key 'density'. It is a parameter of ties: put it under "
        "`parameters`.",
    ),
    "shared parameter under a model": (
        OF_MODEL + "      lambda: 1\n",
        "6:7: models[0].parameters.lambda: 'lambda' is of the whole merge, not of one model: "
        "move it to the top-level `parameters`",
    ),
    "modules": (
        HEAD + "modules: {text: {models: [{model: DIR/a}]}}\n",
        "3:1: models: stands beside `modules`: write it in the modules that it is for",
    ),
    "tokenizer_source": (
        HEAD + "tokenizer_source: unoin\n",
        "6:19: tokenizer_source: 'unoin' is none of the models, no other folder and no hub id. "
        "Did you mean 'union'?",
    ),
    # Methods.
    "unknown method": (
        _with_method("tiez"),
        "1:15: merge_method: unknown merge method 'tiez'. Did you mean 'ties'?",
    ),
    "unknown method like no other": (
        _with_method("zzzz"),
        f"1:15: merge_method: unknown merge method 'zzzz'. Valid: {ALL_METHODS}. {YOUR_OWN}",
    ),
    "method that cannot be imported": (
        _with_method("no_such_package.module:rule"),
        "1:15: merge_method: method 'no_such_package.module:rule': no module 'no_such_package' "
        "can be imported",
    ),
    "method absent from its module": (
        _with_method("math:rule"),
        "1:15: merge_method: method 'math:rule': math has no 'rule'",
    ),
    "method that is none": (
        _with_method("math:sqrt"),
        "1:15: merge_method: method 'math:sqrt': sqrt is a builtin_function_or_method, expected "
        "a function decorated with @outliermerge.merge_method",
    ),
    "method without a module": (
        _with_method(":rule"),
        "1:15: merge_method: method ':rule': importing it failed: Empty module name",
    ),
    "too many models": (
        LINEAR.replace("linear", "passthrough"),
        "3:3: models: passthrough takes 1 model(s), found 2: leave 1 out",
    ),
    "only the base model": (
        NO_MODELS + "models:\n  - model: DIR/base\n",
        "4:3: models: ties takes at least 1 model(s) besides the base model, found 0: add 1",
    ),
    # What is missing.
    "no merge_method": (HEAD.split("\n", 1)[1], "1:1: `merge_method` is missing"),
    "no models": (NO_MODELS, "1:1: `models` is missing"),
    "no base_model": (
        LINEAR.replace("linear", "ties"),
        "1:1: `base_model` is missing: ties works on differences from a base model",
    ),
    "missing: base without base_model": (
        LINEAR + "missing: base\n",
        "5:1: missing: `missing: base` needs a `base_model`",
    ),
    "empty models": (NO_MODELS + "models: []\n", "3:9: models: must not be empty"),
    "model without model": (
        NO_MODELS + "models:\n  - parameters: {weight: 1}\n",
        "4:5: models[0]: `model` is missing",
    ),
    "empty model": (HEAD + "  - model: ''\n", "6:12: models[2].model: must not be empty"),
    "model of nothing": (
        HEAD + "  - model:\n",
        "6:11: models[2].model: found nothing, expected a text",
    ),
    # Types.
    "text for a number": (
        _with_parameters("lambda: high"),
        "7:11: parameters.lambda: found 'high', expected a number",
    ),
    "bool for a number": (
        _with_parameters("lambda: true"),
        "7:11: parameters.lambda: found True, expected a number",
    ),
    "bool in a gradient of numbers": (
        _with_parameters("density: [0.5, false]"),
        "7:18: parameters.density[1]: found False, expected a number",
    ),
    "number for a bool": (
        _with_parameters("normalize: 2"),
        "7:14: parameters.normalize: found 2, expected true or false",
    ),
    "text for a bool": (
        _with_parameters("normalize: 'true'"),
        "7:14: parameters.normalize: found 'true', expected true or false",
    ),
    "list for a text": (
        _with_method("[ties]"),
        "1:15: merge_method: found a list, expected a text",
    ),
    "number for a text": (
        HEAD.replace("DIR/base", "5"),
        "2:13: base_model: found 5, expected a text or a mapping",
    ),
    "mapping for a list": (
        NO_MODELS + "models:\n  model: DIR/a\n",
        "4:3: models: found a mapping, expected a list: write a dash before each, `- model: DIR/a`",
    ),
    "text for a model": (
        NO_MODELS + "models:\n  - DIR/a\n",
        "4:5: models[0]: found 'DIR/a', expected a mapping: write `- model: DIR/a`",
    ),
    "list for parameters": (
        HEAD + "parameters:\n  - weight: 1\n",
        "7:3: parameters: found a list, expected a mapping: write its keys without dashes and "
        "brackets",
    ),
    "unknown dtype": (HEAD + "dtype: fp8\n", f"6:8: dtype: found 'fp8', expected {DTYPES}"),
    "mistyped dtype": (
        HEAD + "dtype: bf17\n",
        f"6:8: dtype: found 'bf17', expected {DTYPES}. Did you mean 'bfloat16'?",
    ),
    "beginning of a dtype": (
        HEAD + "dtype: bfloat\n",
        f"6:8: dtype: found 'bfloat', expected {DTYPES}. Did you mean 'bfloat16'?",
    ),
    "integer dtype": (
        HEAD + "out_dtype: int8\n",
        f"6:12: out_dtype: found 'int8', expected {DTYPES}",
    ),
    "unknown policy": (
        HEAD + "missing: skip\n",
        "6:10: missing: found 'skip', expected 'error' or 'base'",
    ),
    # Values.
    "out of range": (
        _with_parameters("density: 1.5"),
        "7:12: parameters.density: found 1.5, expected a number ≥ 0, ≤ 1",
    ),
    "out of range in a gradient": (
        _with_parameters("density: [0.2, 1.5]"),
        "7:18: parameters.density[1]: found 1.5, expected a number ≥ 0, ≤ 1",
    ),
    "out of range in a filter entry": (
        _with_parameters("density:", "  - filter: embed", "    value: -0.1", "  - value: 1"),
        "9:14: parameters.density[0].value: found -0.1, expected a number ≥ 0, ≤ 1",
    ),
    "out of range in a gradient in a filter entry, of a model": (
        OF_MODEL + "      density:\n        - filter: embed\n          value: [1, 2]\n",
        "8:22: models[0].parameters.density[0].value[1]: found 2, expected a number ≥ 0, ≤ 1",
    ),
    "out of range, of another method": (
        _with_method("min_sigma") + "parameters:\n  t: -1\n",
        "7:6: parameters.t: found -1, expected a number ≥ 0",
    ),
    "infinite": (
        _with_parameters("lambda: .inf"),
        "7:11: parameters.lambda: found inf, expected a finite number",
    ),
    "not a number": (
        _with_parameters("weight: [.nan, 1]"),
        "7:12: parameters.weight[0]: found nan, expected a finite number",
    ),
    "number in a text that overflows": (
        _with_parameters("lambda: '1e999'"),
        "7:11: parameters.lambda: found '1e999', expected a finite number",
    ),
    "integer that overflows": (
        _with_parameters("lambda: 1" + "0" * 400),
        f"7:11: parameters.lambda: found 1{'0' * 400}, expected a finite number",
    ),
    "no value": (
        _with_parameters("density:"),
        f"7:11: parameters.density: found nothing, {A_VALUE}",
    ),
    "no value in a gradient": (
        _with_parameters("density: [1, ~]"),
        f"7:16: parameters.density[1]: found nothing, {A_VALUE}",
    ),
    "empty gradient": (
        _with_parameters("density: []"),
        "7:12: parameters.density: found an empty list, expected at least one value",
    ),
    "nested list": (
        _with_parameters("density: [[1]]"),
        f"7:13: parameters.density[0]: found [1], {A_VALUE}",
    ),
    "weights that add up to 0": (
        LINEAR.replace("b\n", "b\n    parameters: {weight: -1}\n"),
        " tensor 'embed.weight': linear: the weights [1.0, -1.0] add up to 0, so there is no "
        "mean. Set normalize: false for a plain sum.",
    ),
    # Filters.
    "unknown key in a filter entry": (
        _with_parameters("density:", "  - filtr: embed", "    value: 1"),
        "8:7: parameters.density[0].filtr: unknown key 'filtr'. Valid: filter, value.",
    ),
    "filter entry without a value": (
        _with_parameters("density:", "  - filter: embed"),
        "8:7: parameters.density[0]: an entry with a filter needs a `value`",
    ),
    "empty filter": (
        _with_parameters("density:", "  - filter: ''", "    value: 1"),
        "8:15: parameters.density[0].filter: found '', expected a part of a tensor's name",
    ),
    "number as a filter": (
        _with_parameters("density:", "  - filter: 3", "    value: 1"),
        "8:15: parameters.density[0].filter: found 3, expected a part of a tensor's name",
    ),
    "filter that no tensor matches": (
        _with_parameters("density:", "  - filter: emded", "    value: 0.3", "  - value: 1"),
        "8:15: parameters.density[0].filter: the filter 'emded' is in no merged tensor's name. "
        "Did you mean 'embed'?",
    ),
    "filter of another case": (
        _with_parameters("density:", "  - filter: Embed", "    value: 0.3", "  - value: 1"),
        "8:15: parameters.density[0].filter: the filter 'Embed' is in no merged tensor's name. "
        "Did you mean 'embed'?",
    ),
    "only filter, which no tensor matches": (
        _with_parameters("density:", "  - filter: emded", "    value: 0.3"),
        "8:15: parameters.density[0].filter: the filter 'emded' is in no merged tensor's name. "
        "Did you mean 'embed'?",
    ),
    "filter below one that takes all": (
        _with_parameters("density:", "  - value: 0.3", "  - filter: embed", "    value: 1"),
        "9:15: parameters.density[1].filter: the filter 'embed' is never reached: entries above "
        "take all of its tensors",
    ),
    "filter below one that takes its tensors": (
        _with_parameters(
            "density:",
            "  - filter: layers",
            "    value: 0.3",
            "  - filter: layers.0",
            "    value: 1",
        ),
        "10:15: parameters.density[1].filter: the filter 'layers.0' is never reached: entries "
        "above take all of its tensors",
    ),
    # Models.
    "model twice": (
        HEAD + "  - model: DIR/a\n",
        "6:12: models[2].model: 'DIR/a' stands twice, first as models[0]",
    ),
    "folder twice, written two ways": (
        HEAD + "  - model: DIR/b/../a/\n",
        "6:12: models[2].model: 'DIR/a' stands twice, first as models[0]",
    ),
    # YAML.
    "key twice": (
        HEAD + "dtype: float32\ndtype: float16\n",
        "7:1: the key 'dtype' stands twice, first in line 6. Remove one of them.",
    ),
    "parameter twice": (
        _with_parameters("weight: 1", "lambda: 1", "weight: 2"),
        "9:3: the key 'weight' stands twice, first in line 7. Remove one of them.",
    ),
    "not YAML": (
        "merge_method: [ties\nmodels: x\n",
        "1:15: not valid YAML: the [ of line 1 is not closed. Write ] where it ends.",
    ),
    "tab": (
        "merge_method: ties\n\tmodels: x\n",
        "2:1: not valid YAML: found a tab. Indent with spaces.",
    ),
    "unknown tag": (
        _with_parameters("lambda: !!python/object/apply:os.getpid []"),
        "7:11: not valid YAML: tags are not read here. Leave it out, or put a text that begins "
        "with ! in quotes.",
    ),
    "empty file": ("", " found nothing, expected a mapping with `merge_method`"),
    "only comments": ("# later\n", " found nothing, expected a mapping with `merge_method`"),
    "list at the top": (
        "- merge_method: ties\n",
        "1:1: found a list, expected a mapping with `merge_method`",
    ),
    "text at the top": ("ties\n", "1:1: found 'ties', expected a mapping with `merge_method`"),
    "list that contains itself": (
        NO_MODELS + "models: &all\n  - *all\n",
        "3:9: not valid YAML: it contains itself",
    ),
    "mapping that contains itself": (
        _with_parameters("density: &it {value: *it}"),
        "7:12: not valid YAML: it contains itself",
    ),
    "control character": (
        "merge_method: ties\x07\n",
        "1:19: not valid YAML: the character '\\x07'",
    ),
    "two documents": (
        HEAD + "---\n" + HEAD,
        "7:1: a second merge without a `name`: name each but that of the output",
    ),
    "windows line ends": (
        (HEAD + "dtpe: x\n").replace("\n", "\r\n"),
        "6:1: dtpe: unknown key 'dtpe'. Did you mean 'dtype'?",
    ),
    "byte order mark": (
        "\ufeff" + HEAD + "dtpe: x\n",
        "6:1: dtpe: unknown key 'dtpe'. Did you mean 'dtype'?",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_spec_is_refused_with_this_message(case, folder, capsys):
    text, message = BAD[case]

    assert _plan(folder, text, capsys) == (2, f"error: DIR/spec.yaml:{message}\n")


def test_the_spec_that_the_bad_ones_are_made_from_is_good(folder, capsys):
    for text in (HEAD, LINEAR, LINEAR.replace("  - model: DIR/b\n", ""), OF_MODEL + "      {}\n"):
        assert _plan(folder, text, capsys)[0] == 0


def test_every_mistake_that_does_not_hide_another_is_told_at_once(folder, capsys):
    code, message = _plan(folder, HEAD + "dtype: fp8\nvocabulary: skip\n", capsys)

    assert code == 2
    assert message == (
        f"error: DIR/spec.yaml:6:8: dtype: found 'fp8', expected {DTYPES}\n"
        "DIR/spec.yaml:7:13: vocabulary: found 'skip', "
        "expected 'error', 'base', 'common' or 'union'\n"
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (HEAD + "5: x\n", "6:1"),
        (HEAD + "~: x\n", "6:1"),
        (_with_parameters("weight: 1", "yes: 1"), "8:3"),
    ],
    ids=["number", "null", "bool"],
)
def test_a_key_that_is_no_text_is_told_with_its_place(text, place, folder, capsys):
    code, message = _plan(folder, text, capsys)

    assert code == 2
    assert message.startswith(f"error: DIR/spec.yaml:{place}: ")
    assert "[key]" not in message  # pydantic's word, not the user's


def test_a_value_among_filter_entries_is_what_is_pointed_at(folder, capsys):
    lines = ("density:", "  - filter: embed", "    value: 1", "  - 0.5")
    code, message = _plan(folder, _with_parameters(*lines), capsys)

    assert code == 2
    assert message.startswith("error: DIR/spec.yaml:10:7: parameters.density[1]: found 0.5, ")


@pytest.mark.parametrize("catch_all", ["value: 0.3", "{filter: '*', value: 0.3}"])
def test_a_second_entry_for_all_tensors_is_refused_as_never_reached(catch_all, folder, capsys):
    text = _with_parameters("density:", f"  - {catch_all}", "  - value: 1")
    code, message = _plan(folder, text, capsys)

    assert code == 2
    assert message.startswith("error: DIR/spec.yaml:9:14: parameters.density[1].value: ")
    assert "never reached" in message


@pytest.mark.parametrize(
    "value", ["2024-13-45", "!!int ''", "!!int x", "!!float x", "!!bool x", "!!timestamp x"]
)
def test_a_value_that_yaml_itself_refuses_is_told_with_its_line(value, folder, capsys):
    code, message = _plan(folder, _with_parameters(f"lambda: {value}"), capsys)

    assert code == 2
    assert message.startswith("error: DIR/spec.yaml:7:11: ")


def test_a_deeply_nested_spec_is_refused(folder, capsys):
    code, message = _plan(folder, "models: " + "[" * 5000 + "]" * 5000, capsys)

    assert code == 2
    assert message.startswith("error: DIR/spec.yaml")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"t: 2\nmerge_method: ti\xe9s\n", "is no UTF-8 text: found byte 0xe9 in line 2. Save it"),
        (
            "merge_method: ties\n".encode("utf-16"),
            "is UTF-16, as Windows programs save it: save it",
        ),
    ],
)
def test_bytes_that_are_not_utf8_are_refused(folder, data, said, capsys):
    code, message = _plan(folder, data, capsys)

    assert code == 2
    assert message == f"error: DIR/spec.yaml: {said} as UTF-8\n"


def test_no_control_character_of_a_spec_reaches_the_terminal(folder, capsys):
    code, message = _plan(folder, _with_parameters('"wei\\e[31mght": 1'), capsys)

    assert code == 2
    assert "wei\\x1b[31mght" in message
    assert "\x1b" not in message


@pytest.mark.parametrize(
    "model", ["x" * 5000, "~no_such_user_here/model", "nul\\0byte"], ids=["long", "home", "nul"]
)
def test_a_model_that_no_file_can_be_named_is_refused_with_its_place(model, folder, capsys):
    code, message = _plan(folder, HEAD + f'  - model: "{model}"\n', capsys)

    assert code in (1, 2)
    assert message.startswith("error: DIR/spec.yaml:6:12: models[2].model: ")


@pytest.mark.parametrize(
    "output",
    ["~no_such_user_here/out", "nul\0byte", "x" * 5000],
    ids=["home", "nul", "long"],
)
def test_an_output_that_no_file_can_be_named_is_refused(output, folder, capsys):
    _plan(folder, HEAD, capsys)
    code = cli.main(["run", str(folder / "spec.yaml"), "--output", output])

    assert code in (1, 2)
    assert capsys.readouterr().err.startswith("error: ")


OPTIONS = {
    "size that is none": (
        ("--memory", "lots"),
        "--memory: 'lots' is not a size. Write for example 5GB, 500MB or 1GiB.",
    ),
    "unknown unit": (
        ("--memory", "5GBit"),
        "--memory: '5GBit' is not a size. Write for example 5GB, 500MB or 1GiB.",
    ),
    "no memory": (
        ("--memory", "0"),
        "--memory: '0' is not a size. Write for example 5GB, 500MB or 1GiB.",
    ),
    "memory beyond all numbers": (
        ("--memory", "9" * 400),
        f"--memory: '{'9' * 400}' is not a size. Write for example 5GB, 500MB or 1GiB.",
    ),
    "memory too small": (
        ("--memory", "800", "--threads", "2", "--no-kernels"),
        # 8 elements a tensor; for each 3 sources and the output in float32, and 22 float32 to
        # compute with.
        "--memory: 800 B is too little for tensor 'embed.weight': ties needs 832 B to hold one "
        "block of it. Give --memory 1KiB or more",
    ),
    "memory too small for kernels": (
        ("--memory", "100", "--threads", "2"),
        "--memory: 100 B is too little for tensor 'embed.weight': ties needs 128 B to hold one "
        "block of it. Give --memory 1KiB or more",
    ),
    "shard size that is none": (
        ("--shard-size", "big"),
        "--shard-size: 'big' is not a size. Write for example 5GB, 500MB or 1GiB.",
    ),
    "negative shard size": (
        ("--shard-size", "-1"),
        "--shard-size: '-1' is not a size. Write for example 5GB, 500MB or 1GiB.",
    ),
    "unknown device": (
        ("--device", "tpu"),
        "--device: found 'tpu', expected cpu, cuda, cuda:N or auto",
    ),
    "device number that is none": (
        ("--device", "cuda:x"),
        "--device: found 'cuda:x', expected cpu, cuda, cuda:N or auto",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_is_refused_with_this_message(case, folder, capsys):
    options, message = OPTIONS[case]

    assert _plan(folder, HEAD, capsys, *options) == (2, f"error: {message}\n")


def test_a_device_that_is_not_on_this_machine_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert _plan(folder, HEAD, capsys, "--device", "cuda:1") == (
        2,
        "error: device cuda:1 is not on this machine: it has 0 CUDA device(s). Leave it "
        "out, and the CPU computes.\n",
    )


@pytest.mark.parametrize("threads", ["-2", "-1", "many", "1.5"])
def test_a_wrong_number_of_threads_is_refused(threads, folder, capsys):
    code, message = _plan(folder, HEAD, capsys, f"--threads={threads}")

    assert code == 2
    assert message.splitlines() == [
        "usage: outliermerge plan [option …] SPEC [DIR]",
        f"error: argument --threads: '{threads}' is not a number of at least 0",
    ]


def test_a_run_without_an_output_is_refused_before_any_work(folder, capsys, monkeypatch):
    _plan(folder, HEAD, capsys)
    before = sorted(folder.iterdir())
    code = cli.main(["run", str(folder / "spec.yaml")])

    assert code == 2
    assert (
        capsys.readouterr()
        .err.replace(str(folder), "DIR")
        .endswith("error: DIR/spec.yaml: no output: give --output or `output:` in the spec\n")
    )
    assert sorted(folder.iterdir()) == before


def test_a_run_with_too_little_memory_writes_nothing(folder, capsys):
    _plan(folder, HEAD, capsys)
    output = folder / "out"
    code = cli.main(["run", str(folder / "spec.yaml"), "--output", str(output), "--memory", "1B"])

    assert code == 2
    assert "error: --memory: '1B' is not a size." in capsys.readouterr().err
    code = cli.main(["run", str(folder / "spec.yaml"), "--output", str(output), "--memory", "100"])
    assert code == 2
    assert "error: --memory: 100 B is too little for tensor" in capsys.readouterr().err
    assert not output.exists()
    assert not (folder / "out.partial").exists()


def test_an_absent_spec_file_is_named(folder, capsys):
    code = cli.main(["plan", str(folder / "absent.yaml")])

    assert code == 2
    message = capsys.readouterr().err.replace(str(folder), "DIR")
    assert message == "error: DIR/absent.yaml: no such spec file\n"


def test_a_folder_in_place_of_a_spec_is_named_once(folder, capsys):
    code = cli.main(["plan", str(folder)])

    assert code == 2
    message = capsys.readouterr().err.replace(str(folder), "DIR")
    assert message == "error: DIR: is a folder, expected a YAML file\n"


def test_a_spec_from_a_dict_is_checked_alike_and_named_without_lines():
    spec = {"merge_method": "ties", "base_model": "b", "models": [{"model": "a", "weight": 1}]}
    with pytest.raises(SpecError) as caught:
        load_spec(spec)

    assert str(caught.value) == (
        "spec: models[0].weight: unknown key 'weight'. It is a parameter of ties: "
        "put it under `parameters`."
    )
