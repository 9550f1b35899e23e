"""What computes where torch, the kernels, or both are not installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import as_many_as, save_lora, save_tensors
from statistics_of import save_statistics

import outliermerge
from outliermerge import OutlierMergeError
from outliermerge.cli import main as cli
from outliermerge.engines.kernels import find_kernels
from outliermerge.methods.table import METHODS
from outliermerge.output.parts import run_part

KERNELS = "outliermerge.engines._kernels"
LINE = "pip install torch --index-url https://download.pytorch.org/whl/cpu"


@outliermerge.merge_method(space="delta")
def halved(deltas_ME: torch.Tensor) -> torch.Tensor:
    """Half of the sum of task vectors."""
    return deltas_ME.sum(0) / 2


@outliermerge.merge_method(space="merged")
def doubled(merged_E: torch.Tensor) -> torch.Tensor:
    """Twice the merged task vector."""
    return 2 * merged_E


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, models of several dtypes and formats, and an adapter; the present folder."""
    torch.manual_seed(0)
    values = {"layers.0.q_proj.weight": torch.randn(8, 8), "norm.weight": torch.randn(8)}
    whole = {"position_ids": torch.arange(8)}
    save_tensors(tmp_path / "base", values | whole)
    save_tensors(tmp_path / "a", {name: t + 0.1 for name, t in values.items()} | whole)
    save_tensors(tmp_path / "b", {name: t - 0.2 for name, t in values.items()} | whole)
    save_tensors(tmp_path / "double", {name: t.double() for name, t in values.items()} | whole)
    save_tensors(tmp_path / "ids", values | {"position_ids": torch.arange(8, dtype=torch.int32)})
    (tmp_path / "pickled").mkdir()
    torch.save(values | whole, tmp_path / "pickled" / "pytorch_model.bin")
    name = "layers.0.q_proj"
    for model in "ab":
        gram = {f"{name}.weight": torch.eye(8)}
        save_statistics(tmp_path / f"of_{model}", tmp_path / model, gram=gram)
    factors = {f"{name}.lora_A.weight": torch.ones(1, 8), f"{name}.lora_B.weight": torch.ones(8, 1)}
    save_lora(tmp_path / "lora", factors, target_modules=["q_proj"])
    dora = factors | {f"{name}.lora_magnitude_vector": torch.rand(8)}
    save_lora(tmp_path / "dora", dora, target_modules=["q_proj"], use_dora=True)
    vector = {f"{name}.ia3_l": torch.rand(8, 1)}
    save_lora(tmp_path / "ia3", vector)
    ia3 = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (tmp_path / "ia3" / "adapter_config.json").write_text(json.dumps(ia3))
    codes = {f"{name}.weight": values[f"{name}.weight"].to(torch.float8_e4m3fn)}
    codes[f"{name}.weight_scale_inv"] = torch.ones(1, 1)
    save_tensors(tmp_path / "fp8", values | whole | codes)
    (tmp_path / "fp8" / "config.json").write_text(
        '{"quantization_config": {"quant_method": "fp8"}}'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, KERNELS, None)
    find_kernels.cache_clear()
    yield
    find_kernels.cache_clear()


def spec(*models: str, method: str = "task_arithmetic", **more: Any) -> dict[str, Any]:
    named = [{"model": model} for model in models]
    return {"merge_method": method, "base_model": "base", "models": named, **more}


def save_spec(document: dict[str, Any]) -> str:
    Path("spec.json").write_text(json.dumps(document))
    return "spec.json"


BY_ROWS = {"nuslerp": {"nuslerp_flatten": False}, "model_stock": {"filter_wise": True}}


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        *((name, {"density": 0.5} if "density" in method.parameters else {})
          for name, method in METHODS.items() if method.kernel is not None),
        *BY_ROWS.items(),
    ],
)  # fmt: skip
def test_without_torch_kernels_merge_to_the_same_bytes(models, monkeypatch, method, parameters):
    document = spec(*as_many_as(method, ["a", "b"]), method=method, parameters=parameters)
    outliermerge.run(document, output="with")
    monkeypatch.setitem(sys.modules, "torch", None)
    result = outliermerge.run(document, output="without")
    assert outliermerge.verify("without") == []
    files = [models / folder / "model.safetensors" for folder in ("with", "without")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert result.manifest["kernels"]


@pytest.mark.parametrize("model", ["base+lora", "base+dora", "fp8"])
def test_without_torch_kernels_read_adapters_and_codes(models, monkeypatch, model):
    document = spec("a", model, method="min_sigma")
    outliermerge.run(document, output="by_torch", kernels=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    outliermerge.run(document, output="without")
    files = [models / folder / "model.safetensors" for folder in ("by_torch", "without")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("method", "parameters"), [("min_sigma", {}), ("della", {"density": 0.5}), ("ties", {})]
)
def test_rows_that_pieces_cut_are_computed_alike(tmp_path, monkeypatch, method, parameters):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    name, shape = "layers.0.q_proj", (140, 1000)
    base = torch.randn(shape).bfloat16()
    save_tensors(tmp_path / "base", {f"{name}.weight": base})
    codes = {"weight": (base + 0.1).to(torch.float8_e4m3fn), "weight_scale_inv": torch.rand(2, 8)}
    save_tensors(tmp_path / "fp8", {f"{name}.{part}": value for part, value in codes.items()})
    settings = {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(settings))
    factors = {"lora_A.weight": torch.randn(3, 1000), "lora_B.weight": torch.randn(140, 3)}
    factors["lora_magnitude_vector"] = torch.rand(140)
    named = {f"{name}.{part}": value for part, value in factors.items()}
    save_lora(tmp_path / "dora", named, target_modules=["q_proj"], use_dora=True, r=3)
    document = spec("fp8", "base+dora", method=method, parameters=parameters)
    for threads in (1, 2):
        outliermerge.run(document, output=f"kernels{threads}", threads=threads)
    outliermerge.run(document, output="torch", kernels=False)
    found = [(tmp_path / out / "model.safetensors").read_bytes()
             for out in ("kernels1", "kernels2", "torch")]  # fmt: skip
    assert found[0] == found[1] == found[2]


def test_the_manifest_says_that_torch_was_not_there(models, monkeypatch):
    monkeypatch.setattr("outliermerge.output.manifest.installed_version", lambda name: None)
    outliermerge.run(spec("a", "b"), output="out")
    assert json.loads(Path("out/outliermerge.json").read_text())["versions"]["torch"] is None


@pytest.mark.parametrize(
    ("document", "flags", "why"),
    [
        (spec("a", "base+ia3"), {}, "read from adapters"),
        (spec("a", "double"), {}, "kernels do not compute with float32, float64"),
        (spec("a", "ids"), {}, "compared as int32 and int64"),
        (spec("a", "b"), {"kernels": False}, "without kernels, as was asked for"),
        (spec("a", "b", method=f"{__name__}:halved"), {}, "has no kernel"),
        (
            spec("a", method="arcee_fusion", parameters={"compat": "mergekit"}),
            {},
            "arcee_fusion has no kernel, or none for these parameters",
        ),
        (spec("a", "b", modifiers=[{"modifier": f"{__name__}:doubled"}]), {}, "modifiers"),
        (
            {"merge_method": "regmean",
             "models": [{"model": name, "statistics": f"of_{name}"} for name in "ab"]},
            {},
            "regmean has no kernel",
        ),
    ],
)  # fmt: skip
def test_a_merge_that_needs_torch_is_refused_before_it_begins(
    models, no_torch, document, flags, why
):
    planned = outliermerge.plan(document)
    with pytest.raises(OutlierMergeError, match=r"this merge needs torch") as caught:
        outliermerge.run(planned, output="out", **flags)
    assert why in str(caught.value) and LINE in str(caught.value)
    assert [path.name for path in models.glob("out*")] == []


def test_a_part_that_needs_torch_is_refused_before_it_begins(models, no_torch):
    chosen = outliermerge.RunOptions(kernels=False)
    planned = outliermerge.plan(spec("a", "b"))
    with pytest.raises(OutlierMergeError, match=r"this merge needs torch"):
        run_part(planned, models / "out", 1, 2, chosen)
    assert [path.name for path in models.glob("out*")] == []


@pytest.mark.parametrize(
    "words",
    [
        "compare-weights a b",
        "layers a",
        "simulate",
        "stats pickled",
        "stats a --no-kernels",
        "stats double",
        "stats a --device cuda",
        "run spec.json out --device cuda",
        "plan pickled.json",
    ],
)
def test_what_needs_torch_says_so_with_the_line_that_installs_it(models, no_torch, capsys, words):
    save_spec(spec("a", "b"))
    Path("pickled.json").write_text(json.dumps(spec("a", "pickled")))
    assert cli.main(words.split()) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "needs torch" in said and LINE in said


@pytest.mark.parametrize(
    "words",
    ["stats a", "stats a --base base", "stats a --device auto", "methods", "plan spec.json"],
)
def test_what_needs_no_torch_runs_without_it(models, no_torch, capsys, words):
    save_spec(spec("a", "b"))
    assert cli.main(words.split()) == 0
    assert "torch" not in capsys.readouterr().err


def test_a_merge_in_memory_says_that_it_needs_torch(no_torch):
    with pytest.raises(OutlierMergeError, match="a merge of tensors in memory needs torch") as told:
        outliermerge.merge_tensors([1, 2], method="linear")
    assert LINE in str(told.value)
    with pytest.raises(OutlierMergeError, match="a merge of tensors in memory needs torch"):
        outliermerge.merge_state_dicts([{}], method="linear")


def test_a_method_of_one_s_own_that_imports_torch_is_told_how_to_have_it(
    models, no_torch, monkeypatch
):
    Path("with_torch.py").write_text("import torch\n")
    monkeypatch.syspath_prepend(models)
    with pytest.raises(OutlierMergeError, match=r"no module 'torch' can be imported") as caught:
        outliermerge.plan(spec("a", "b", method="with_torch:mine"))
    assert LINE in str(caught.value)


def test_torch_that_is_missed_anywhere_is_told_in_one_message(
    models, no_torch, monkeypatch, capsys
):
    def deep_inside(*given: object, **named: object) -> None:
        import torch  # noqa: F401

    monkeypatch.setattr("outliermerge.api.plan", deep_inside)
    assert cli.main(["plan", save_spec(spec("a", "b"))]) == 1
    assert LINE in capsys.readouterr().err


def test_plan_warns_of_a_run_that_would_fail_here(models, no_torch, capsys):
    assert cli.main(["plan", save_spec(spec("a", "base+ia3"))]) == 0
    assert "warning: a run here would fail: this merge needs torch" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "run"])
def test_without_kernels_a_note_says_what_it_costs(models, no_kernels, capsys, command):
    assert cli.main([command, save_spec(spec("a", "b")), "out"]) == 0
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "note: torch computes, which takes 5 to 8 times as long as the C kernels" in shown
    assert "apt install gcc" in shown


@pytest.mark.parametrize("flags", [["--no-kernels"], []], ids=["unwanted", "there"])
@pytest.mark.parametrize("command", ["plan", "run"])
def test_no_note_where_kernels_are_there_or_are_not_wanted(models, capsys, command, flags):
    assert cli.main([command, save_spec(spec("a", "b")), "out", *flags]) == 0
    assert "torch computes" not in "".join(capsys.readouterr())


def test_with_neither_kernels_nor_torch_one_error_says_both_ways_out(
    models, no_torch, no_kernels, capsys
):
    assert cli.main(["run", save_spec(spec("a", "b")), "out"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: nothing that is installed can compute a merge")
    assert "apt install gcc" in said and LINE in said
    assert [path.name for path in models.glob("out*")] == []
