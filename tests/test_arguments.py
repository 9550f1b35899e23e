"""Arguments of the library: one object of options, and errors that speak of them."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_tensors

import outliermerge
from outliermerge import ArgumentError, OutlierMergeError, RunOptions, SpecError
from outliermerge.analysis.models import open_subject
from outliermerge.cli.main import main
from outliermerge.errors import argument
from outliermerge.search.sweeps import plan_sweep

SOURCES = sorted(Path(outliermerge.__file__).parent.rglob("*.py"))
# Flags of other programs, in the advice of messages.
OF_OTHERS = {"--revision", "--include", "--local-dir", "--model", "--adapter-path", "--save-path",
             "--dequantize", "--index-url", "--force-reinstall", "--no-deps",
             "--random-seed", "--mmproj", "--outfile", "--outtype", "--metadata", "--tags",
             "--always", "--dirty"}  # fmt: skip
# What writes a command line into the output.
COMMAND_LINES = ("recipe.py",)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("base", "one", "two")):
        save_tensors(Path(name), {"w": torch.arange(3000.0).view(30, 100) ** 0.5 * (1 + number)})
    file = tmp_path / "spec.yaml"
    file.write_text(
        "merge_method: min_sigma\nbase_model: base\nmodels: [{model: one}, {model: two}]\n"
    )
    return file


CALLS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "device": (lambda: outliermerge.run("spec.yaml", output="out", device="tpu"), ["--device=tpu"]),
    "memory": (
        lambda: outliermerge.run("spec.yaml", output="out", memory=100),
        ["--memory=100"],
    ),
    "shard_size": (
        lambda: outliermerge.run("spec.yaml", output="out", shard_size="much"),
        ["--shard-size=much"],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_named_as_where_it_was_given(
    spec: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call, flags = CALLS[name]
    with pytest.raises(ArgumentError, match=rf"^{name}: ") as raised:
        call()
    assert "--" not in str(raised.value)
    assert not isinstance(raised.value, SpecError)
    assert main(["run", "spec.yaml", "--output", "out", *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: --{name.replace('_', '-')}: ")
    assert printed.partition(": ")[2].partition(": ")[2].strip() == str(raised.value).partition(
        ": "
    )[2].replace("memory='47KiB'", "--memory 47KiB")


@pytest.mark.parametrize("points", [1, -5])
def test_wrong_arguments_of_the_analysis_are_no_mistakes_of_a_spec(spec: Path, points: int) -> None:
    models = [open_subject(n, base="base") for n in ("one", "two")]
    for name, call in {
        "t": lambda: outliermerge.compare_weights(models, t=-1),
        "filter": lambda: outliermerge.weight_stats("one", filter=-1.0),
        "small": lambda: outliermerge.weight_stats("one", small=-1.0),
        "num_points": lambda: outliermerge.simulate(num_points=points),
        "seed": lambda: outliermerge.simulate(seed=-1),
        "num_values": lambda: outliermerge.layer_spectra("one", num_values=1),
    }.items():
        with pytest.raises(ArgumentError, match=rf"^{name}: found ") as raised:
            call()
        assert "--" not in str(raised.value)


def test_advice_names_arguments_in_the_library_and_flags_on_the_command_line(
    spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outliermerge.run("spec.yaml", output="out")
    with pytest.raises(OutlierMergeError, match=r"Use overwrite=True to .* choose another output"):
        outliermerge.run("spec.yaml", output="out")
    assert main(["run", "spec.yaml", "--output", "out"]) == 1
    assert re.search("Use --overwrite to .* choose another --output", capsys.readouterr().err)


def test_run_and_sweep_share_their_options(spec: Path) -> None:
    seen: list[int] = []
    options = RunOptions(memory="64MiB", threads=1, kernels=False, on_progress=seen.append)
    result = outliermerge.run("spec.yaml", output="out", options=options)
    assert result.manifest["kernels"] is False
    assert seen
    results = outliermerge.sweep(
        "spec.yaml", {"t": [1.0, 2.0]}, output="many", options=options, kernels=True
    )
    assert [result.manifest["kernels"] for result in results] == [True, True]
    with pytest.raises(OutlierMergeError, match="exists already"):
        outliermerge.run("spec.yaml", output="out", options=options)
    outliermerge.run("spec.yaml", output="out", options=options, overwrite=True)


@pytest.mark.parametrize("call", [outliermerge.run, outliermerge.sweep])
def test_an_unknown_argument_is_answered_with_the_nearest(spec: Path, call: Callable) -> None:
    settings = [] if call is outliermerge.run else [{"t": [1]}]
    with pytest.raises(
        TypeError, match=r"unexpected keyword argument 'memroy'. Did you mean 'memory'"
    ):
        call("spec.yaml", *settings, output="out", memroy="2GiB")


ANALYSIS = {"device": "tpu", "threads": -1, "on_total": 5, "on_progress": 5}
RUN = {
    "device": "tpu", "memory": "lots", "threads": "2", "kernels": "no", "overwrite": 1,
    "fresh": "yes", "allow_non_finite": None, "load_check": "no", "on_progress": 5,
    "on_waiting": "x", "executor": 5,
}  # fmt: skip
OF_SPEC = {"spec": 5, "shard_size": "huge"}
# By function a wrong value for each of its arguments.
WRONG: dict[str, dict[str, Any]] = {
    "build_report": {"models": 5, "output": None, "png": 5, "t": "x", "filter": "x"} | ANALYSIS,
    "compare_weights": {"models": "one", "t": "2", "rename": 5} | ANALYSIS,
    "find_method": {"name": 5},
    "fingerprint_distance": {"a": 1},
    "layer_spectra": {"model": 5, "num_values": "many", "rename": 5} | ANALYSIS,
    "load_spec": {"spec": 5},
    "merge_state_dicts": {"models": "one", "base": 5, "method": 5, "seed": "x"},
    "merge_tensors": {"models": 5, "method": 5, "seed": 0.5},
    "plan": OF_SPEC,
    "read_manifest": {"folder": 5},
    "run": OF_SPEC | RUN | {"output": 5, "options": {"threads": 2}},
    "simulate": {"seed": "x", "num_points": "many", "noises": [None], "on_total": 5,
                 "on_progress": 5},
    "stats_of_tensor": {"values": [1.0], "name": 5, "filter": "x", "small": None},
    "sweep": OF_SPEC | RUN | {"output": 5, "settings": {"t": 2}},
    "verify": {"folder": 5, "threads": 0.5, "load": "yes"},
    "weight_stats": {"model": 5, "base": 5, "rename": 5, "filter": "x", "small": True,
                     "kernels": 1} | ANALYSIS,
}  # fmt: skip
CASES = [(function, name) for function, values in WRONG.items() for name in values]


def _right(function: str) -> dict[str, Any]:
    """Return what a function must be given, all of it right."""
    tensor = torch.ones(2)
    return {
        "build_report": {"models": ["one"], "output": "page.html"},
        "compare_weights": {"models": ["one", "two"]},
        "find_method": {"name": "linear"},
        "fingerprint_distance": {"a": 1, "b": 1},
        "layer_spectra": {"model": "one"},
        "load_spec": {"spec": "spec.yaml"},
        "merge_state_dicts": {"models": [{"w": tensor}] * 2, "method": "linear"},
        "merge_tensors": {"models": [tensor] * 2, "method": "linear"},
        "plan": {"spec": "spec.yaml"},
        "read_manifest": {"folder": "one"},
        "run": {"spec": "spec.yaml", "output": "out"},
        "simulate": {"num_points": 1000},
        "stats_of_tensor": {"values": tensor},
        "sweep": {"spec": "spec.yaml", "settings": {"t": [2]}, "output": "out"},
        "verify": {"folder": "one"},
        "weight_stats": {"model": "one"},
    }[function]


@pytest.mark.parametrize(("function", "name"), CASES)
def test_an_argument_of_a_wrong_kind_is_refused_by_its_name(
    spec: Path, function: str, name: str
) -> None:
    before = sorted(spec.parent.rglob("*"))
    with pytest.raises(ArgumentError, match=rf"^(t=2: )?{name}: ") as raised:
        getattr(outliermerge, function)(**_right(function) | {name: WRONG[function][name]})
    assert not isinstance(raised.value, SpecError)
    assert sorted(spec.parent.rglob("*")) == before


@pytest.mark.parametrize("name", RUN)
def test_options_of_a_wrong_kind_are_refused_when_they_are_made(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: "):
        RunOptions(**{name: RUN[name]})


# Public classes that the package makes: nobody calls them, but to see what they hold.
MADE = {"Comparison", "Context", "Estimate", "Extraction", "LayerSpectra", "Manifest",
        "MergeMethod", "MergeSpec", "MoeResult", "PerModel", "Plan", "RunResult", "Simulation",
        "TensorStats", "TransplantResult", "Variant", "WeightStats"}  # fmt: skip
WITH_A_METHODS = {"merge_state_dicts", "merge_tensors"}  # other keywords are its parameters
CALLED = [
    name
    for name in outliermerge.__all__
    if name not in {*MADE, *WITH_A_METHODS, "METHODS"} and not name.endswith("Error")
]


@pytest.mark.parametrize("name", CALLED)
def test_an_unknown_keyword_of_any_function_or_class_is_answered_with_all_and_the_nearest(
    name: str,
) -> None:
    called = getattr(outliermerge, name)
    signature = inspect.signature(called)
    known = list(signature.parameters)
    near = max(known, key=len)
    wrong = near + near[-1]
    said = rf"^{name}\(\) got an unexpected keyword argument '{wrong}'\. Did you mean '{near}'\?"
    with pytest.raises(TypeError, match=rf"{said} It takes {', '.join(known)}\.$"):
        called(**{wrong: 1})


def test_the_options_of_a_run_are_answered_for_the_function_that_was_called(spec: Path) -> None:
    with pytest.raises(TypeError, match=r"^RunOptions\(\) .*'overwite'\. Did you mean 'overwrite'"):
        RunOptions(overwite=True)  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match=r"^moe\(\) .*Did you mean 'routing'\? .* shard_size, .*fresh"
    ):
        outliermerge.moe("spec.yaml", routin=False)
    with pytest.raises(ArgumentError, match=r"unknown parameter 'bsae'\. Did you mean 'base'\?"):
        outliermerge.merge_state_dicts([{}], method="linear", bsae={})


@pytest.mark.parametrize("name", [name for name in outliermerge.__all__ if name != "METHODS"])
def test_no_signature_shows_an_address(name: str) -> None:
    shown = getattr(outliermerge, name)
    called = [shown, *(member for _, member in inspect.getmembers(shown, callable))]
    for each in called:
        try:
            assert not re.search(r"0x[0-9a-f]{4}|<object|<function", str(inspect.signature(each)))
        except (TypeError, ValueError):  # of a type in C, or no function
            continue


def test_options_show_no_address_and_travel() -> None:
    options = RunOptions(threads=2)
    assert "executor=execute" in repr(options) and "on_progress=nothing" in repr(options)
    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ([torch.nn.Linear(2, 2)], "models: found 'Linear', expected tensors by name: give its st"),
        ([{"w": [1.0]}], r"tensor 'w': models\[0\]: found list, expected a tensor"),
    ],
)
def test_what_is_no_tensor_is_named(models: list, said: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{said}"):
        outliermerge.merge_state_dicts(models, method="linear")


@pytest.mark.parametrize("given", [{"space": "task"}, {"space": "delta", "cut": "column"}])
def test_a_method_of_no_known_space_or_cut_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"rule: found '(task|column)', expected (delta|element), "):

        @outliermerge.merge_method(**given)
        def rule(deltas_ME: torch.Tensor) -> torch.Tensor:
            return deltas_ME.sum(0)


def test_settings_are_given_once(spec: Path) -> None:
    variants = plan_sweep("spec.yaml", {"t": [1, 2]})
    with pytest.raises(ArgumentError, match="settings: the variants have theirs"):
        outliermerge.sweep(variants, {"t": [3]}, output="out")
    with pytest.raises(ArgumentError, match="settings t: has no values"):
        outliermerge.sweep("spec.yaml", {"t": []}, output="out")


def test_an_error_keeps_its_arguments_when_it_is_wrapped_and_when_it_travels() -> None:
    error = ArgumentError(f"{argument('shard_size')}: {{x}} %s: use {argument('fresh', True)}")
    wrapped = SpecError(f"t=2: {error.marked}")
    for found in (wrapped, pickle.loads(pickle.dumps(wrapped))):
        assert str(found) == "t=2: shard_size: {x} %s: use fresh=True"
        assert found.text(lambda name, value: f"<{name} {value}>") == (
            "t=2: <shard_size None>: {x} %s: use <fresh True>"
        )


def test_what_a_file_says_is_no_argument(tmp_path: Path) -> None:
    assert "\0" not in str(OutlierMergeError("a\0b"))
    assert str(OutlierMergeError("tensor 'a\0 b\0'")) == r"tensor 'a\x00 b\x00'"


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.parent.name != "cli" and path.name not in COMMAND_LINES],
    ids=lambda path: path.name,
)
def test_no_message_of_the_library_names_a_flag(path: Path) -> None:
    for node in ast.walk(tree := ast.parse(path.read_text())):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        found = set(re.findall(r"(?<![\w-])(?<!var\()--[a-z][a-z-]+", node.value)) - OF_OTHERS
        assert not found or node.value in _docstrings(tree), (path, node.lineno, found)


def _docstrings(tree: ast.AST) -> set[str]:
    """Return the strings that stand as statements of their own."""
    return {
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }


def test_models_without_a_list_are_answered_with_one(spec: Path) -> None:
    with pytest.raises(TypeError, match=r"takes a list of models: write \[a, b\]"):
        outliermerge.compare_weights("one", "two")  # type: ignore[call-arg,arg-type]
    with pytest.raises(ArgumentError, match="models: found 'one', expected a list"):
        outliermerge.compare_weights("one")  # type: ignore[arg-type]


def test_a_report_takes_one_model_as_it_is(spec: Path) -> None:
    pages = [
        outliermerge.build_report(given, output=f"{number}.html").read_bytes()
        for number, given in enumerate(("one", Path("one"), ["one"]))
    ]
    assert pages[0] == pages[1] == pages[2]
    with pytest.raises(ArgumentError, match="models: found 1, expected a list"):
        outliermerge.build_report(1, output="page.html")  # type: ignore[arg-type]
