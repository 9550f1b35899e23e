"""Quantised outputs: as their owners write them, the same on all ways, read by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import fine_tune, load_folder
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from quantizing import fp8_quantized, quantise, read

import outliermerge
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.quantized.opened import dequantize
from outliermerge.output.manifest import verify_folder
from outliermerge.output.parts import join, run_part

KINDS: dict[str, Any] = {
    "channel": "fp8",
    "tensor": {"to": "fp8", "per": "tensor"},
    "block": {"to": "fp8", "per": "block", "ignore": ["o_proj"]},
    "int8": {"to": "int8", "per": "channel"},
    "deepseek": {"to": "fp8", "quant_method": "fp8"},
    "mxfp4": "mxfp4",
}
LINEAR = "_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=96, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "base")
    for seed in (1, 2):
        fine_tune(folder / "base", folder / f"task{seed}", seed=seed)
    return folder


def spec_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"task{n}")} for n in (1, 2)],
        "parameters": {"weight": 0.5},
    } | more


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, torch.Tensor]:
    outliermerge.run(spec_of(folder, out_dtype="float32"), output=folder / "plain")
    return load_folder(folder / "plain")


@pytest.fixture(scope="module", params=KINDS)
def output(request: pytest.FixtureRequest, folder: Path) -> Path:
    kind = request.param
    spec = spec_of(folder, quantize=KINDS[kind])
    planned = outliermerge.plan(spec)
    done = outliermerge.run(spec, output=folder / kind)
    size = sum(path.stat().st_size for path in (folder / kind).glob("*.safetensors"))
    assert planned.num_written_bytes == size
    assert planned.num_parameters == done.manifest["num_parameters"]
    plain = outliermerge.plan(spec_of(folder))
    assert planned.num_parameters == plain.num_parameters
    assert [job.name for job, _ in planned.weight_jobs] == [job.name for job in plain.jobs]
    assert verify_folder(folder / kind, threads=1) == []
    return folder / kind


def _codes(kind: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and scales as compressed-tensors makes them of float32 values."""
    rows, columns = values.shape
    per = "channel" if kind == "int8" else kind
    args = QuantizationArgs(
        num_bits=8,
        type="int" if kind == "int8" else "float",
        strategy=per,
        block_structure=[128, 128] if per == "block" else None,
    )
    if per == "block":
        blocks = values.view(rows // 128, 128, columns // 128, 128)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    elif per == "channel":
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    else:
        low, high = values.amin()[None], values.amax()[None]
    scale = calculate_qparams(low, high, args)[0].bfloat16()
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    return quantize(values, scale.float(), None, args, dtype=dtype), scale


def _mxfp4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the packed codes and the scales as compressed-tensors makes them."""
    scheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
    args = scheme.weights
    assert args is not None
    groups = values.view(len(values), -1, 32)
    scale = calculate_qparams(groups.amin(2), groups.amax(2), args)[0]
    made = MXFP4PackedCompressor.compress({"weight": values, "weight_scale": scale}, scheme)
    return made["weight_packed"], made["weight_scale"]


def test_codes_and_scales_are_those_of_the_owner(
    output: Path, plain: dict[str, torch.Tensor]
) -> None:
    kind, written = output.name, load_folder(output)
    for name, values in plain.items():
        if LINEAR not in name or ("o_proj" in name and kind == "block"):
            assert written[name].equal(values.bfloat16())
            continue
        if kind == "deepseek":
            made = fp8_quantized(name, values, [128, 128])
            scale = written[f"{name}_scale_inv"]
            assert torch.allclose(scale, made[f"{name}_scale_inv"], rtol=1e-6)
            off = (written[name].float() - made[name].float()).abs()
            assert (off > 0).double().mean() < 1e-3  # their scale is a quotient of a quotient
            continue
        if kind == "mxfp4":
            stem = name.removesuffix("weight")
            packed, scale = _mxfp4(values)
            assert written[f"{stem}weight_packed"].equal(packed)
            assert written[f"{stem}weight_scale"].equal(scale)
            continue
        codes, scale = _codes(kind, values)
        assert written[f"{name}_scale"].view(torch.int16).equal(scale.view(torch.int16))
        assert written[name].view(torch.int8).equal(codes.view(torch.int8))


def _values(output: Path) -> dict[str, torch.Tensor]:
    """Return what an output's weights stand for, by our reader or by the owner's."""
    if output.name != "mxfp4":
        return {n: read(s).float() for n, s in dequantize(open_checkpoint(output)).tensors.items()}
    written, values = load_folder(output), {}
    scheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
    for name, tensor in written.items():
        stem = name.removesuffix("_packed")
        if stem != name:
            parts = {"weight_packed": tensor, "weight_scale": written[f"{stem}_scale"]}
            tensor = MXFP4PackedCompressor.decompress(parts, scheme)["weight"]
        if not name.endswith("_scale"):
            values[stem] = tensor.float()
    return values


@pytest.mark.usefixtures("plain")
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_answers_as_the_dequantised_merge_does(output: Path, folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "plain")
    plain = model(torch.arange(32)[None]).logits
    model.load_state_dict(_values(output))
    config: Any = transformers.CompressedTensorsConfig(dequantize=True)
    if output.name == "deepseek":
        config = transformers.FineGrainedFP8Config(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output, quantization_config=config)
    with torch.no_grad():
        ours, theirs = (m.float()(torch.arange(32)[None]).logits for m in (model, loaded))
    assert (ours - theirs).norm() < 0.02 * ours.norm()  # they dequantise to bfloat16
    assert (ours - plain).norm() < (0.3 if output.name == "mxfp4" else 0.1) * plain.norm()


def test_the_manifest_says_how_far_codes_are_off(
    output: Path, plain: dict[str, torch.Tensor]
) -> None:
    values = {name.removesuffix("_packed"): tensor for name, tensor in _values(output).items()}
    manifest = json.loads((output / "outliermerge.json").read_text())
    some = 0
    for name, entry in manifest["tensors"].items():
        if said := entry.get("statistics", {}).get("quantization_error"):
            wanted = plain[name.removesuffix("_packed")].double()
            off = values[name.removesuffix("_packed")].double() - wanted
            assert said == pytest.approx(float(off.norm() / wanted.norm()), rel=1e-3)
            assert entry["action"] == "merge" and len(entry["sources"]) == 3
            some += 1
    assert some == (12 if output.name == "block" else 14)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "more",
    [
        {"merge_method": "ties", "parameters": {"density": 0.4, "trim": "model"}},
        {"merge_method": "della", "parameters": {"density": 0.6}, "seed": 3},
        {"merge_method": "iso_c", "parameters": {}},
        {"out_dtype": "float16", "rounding": "stochastic"},
    ],
    ids=["statistics of the model", "by rows, at random", "whole tensors", "rounded"],
)
def test_any_method_is_quantised_as_its_plain_output_would_be(
    folder: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    spec = spec_of(folder, **more)
    outliermerge.run(spec, output=tmp_path / "rounded")
    outliermerge.run(spec | {"out_dtype": "float32"}, output=tmp_path / "plain")
    outliermerge.run(spec | {"quantize": "fp8"}, output=tmp_path / "out")
    written, rounded = load_folder(tmp_path / "out"), load_folder(tmp_path / "rounded")
    for name, values in load_folder(tmp_path / "plain").items():
        if LINEAR in name:
            dtype = written[f"{name}_scale"].dtype
            scale = (values.abs().amax(1, keepdim=True) / 448).to(dtype).float()
            codes = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert written[name].view(torch.int8).equal(codes.view(torch.int8))
        else:
            assert written[name].equal(rounded[name])


@pytest.mark.sampled(6)
def test_the_bytes_are_the_same_on_all_ways(output: Path, folder: Path, tmp_path: Path) -> None:
    spec = spec_of(folder, quantize=KINDS[output.name])
    options = outliermerge.RunOptions(threads=3, memory="32MiB")
    outliermerge.run(spec, output=tmp_path / "threads", options=options)
    for part in (2, 1, 3):
        run_part(outliermerge.plan(spec), tmp_path / "parts", part, 3)
    join(outliermerge.plan(spec), tmp_path / "parts")
    run_part(outliermerge.plan(spec), tmp_path / "goes_on", 2, 3)
    outliermerge.run(spec, output=tmp_path / "goes_on")
    for way in ("threads", "parts", "goes_on"):
        for path in output.glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / way / path.name).read_bytes()


def _with_settings(source: Path, target: Path, kind: str) -> Path:
    """Quantise a model as tools do: by bitsandbytes, transformers, or this package."""
    if kind in ("int8", "fp8"):
        return quantise(source, target, kind)
    spec = {"merge_method": "passthrough", "models": [{"model": str(source)}]}
    outliermerge.run(spec | {"quantize": KINDS[kind]}, output=target)
    return target


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", ["int8", "fp8", "channel", "block"])
def test_as_base_gives_back_what_came_in(folder: Path, tmp_path: Path, kind: str) -> None:
    base = _with_settings(folder / "base", tmp_path / "base", kind)
    again = _with_settings(folder / "base", tmp_path / "again", kind)
    stored = load_folder(base)
    more = {"parameters": {"weight": 0.5}, "quantize": "as-base"}
    for name, method, models in (("copy", "linear", [base]), ("equal", "linear", [base, again])):
        entries = [{"model": str(model)} for model in models]
        spec: dict[str, Any] = {"merge_method": method, "models": entries, **more}
        outliermerge.run(spec, output=tmp_path / name)
        same = load_folder(tmp_path / name)
        assert same.keys() == stored.keys()
        for each in stored:
            assert _bits(same[each]).equal(_bits(stored[each])), each
    spec = spec_of(folder, base_model=str(base), quantize="as-base")
    outliermerge.run(spec, output=tmp_path / "out")
    written = load_folder(tmp_path / "out")
    form = {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in written.items()} == form
    outliermerge.run(
        spec_of(folder, base_model=str(base), out_dtype="float32"), output=tmp_path / "plain"
    )
    opened = dequantize(open_checkpoint(tmp_path / "out")).tensors
    for name, values in load_folder(tmp_path / "plain").items():
        off = float((read(opened[name]).double() - values.double()).norm() / values.norm())
        assert off < (0.05 if LINEAR in name else 0.005), name
    settings = [json.loads((f / "config.json").read_text())["quantization_config"]
                for f in (base, tmp_path / "out")]  # fmt: skip
    assert settings[0] == settings[1]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


BAD = {
    "quantize: int4": r":6:11: quantize\.to: found 'int4', expected .*fp8.*int8.*as-base",
    "quantize: {to: int8, per: block}": r":6:27: quantize\.per: found 'block', expected channel",
    "quantize: {to: fp8, per: tensor, quant_method: fp8}": r":6:26: .*expected block, which",
    "quantize: {to: as-base, ignore: [a]}": r":6:33: quantize\.ignore: .*leave this out",
    "quantize: {to: fp8, blocks: 2}": r":6:21: quantize\.blocks: unknown key 'blocks'",
    "quantize: as-base": r":6:11: quantize: .*base.* is not quantised: leave this out",
    "quantize: {to: fp8, ignore: [weight]}": r":6:11: quantize: no tensor .* can be quantised",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_spec_is_refused_with_its_line(folder: Path, tmp_path: Path, line: str) -> None:
    base, task = folder / "base", folder / "task1"
    head = f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n- model: {task}\n"
    (tmp_path / "spec.yaml").write_text(f"{head}parameters: {{weight: 1}}\n{line}\n")
    with pytest.raises(outliermerge.OutlierMergeError, match=BAD[line]):
        outliermerge.plan(tmp_path / "spec.yaml")


def test_small_weights_keep_their_values_beside_scales_of_float16(
    folder: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float16)
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data = (torch.randn(weight.shape) * 2e-4).half()
    model.save_pretrained(tmp_path / "small")
    spec = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "small")}]}
    outliermerge.run(spec | {"quantize": "int8"}, output=tmp_path / "out")
    found = _values(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"]
    assert (found.float() - weight.float()).norm() < 0.02 * weight.float().norm()


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two mixtures, each with its experts packed and one by one."""
    folder = tmp_path_factory.mktemp("mixtures")
    config = transformers.Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, vocab_size=32, num_experts=3,
        num_experts_per_tok=2,
    )  # fmt: skip
    for number in (1, 2):
        torch.manual_seed(number)
        model = transformers.Qwen3MoeForCausalLM(config).bfloat16()
        for kind in ("packed", "apart"):
            model.save_pretrained(folder / f"{kind}{number}", save_original_format=kind == "apart")
    return folder


@pytest.mark.parametrize("to", ["fp8", "mxfp4"])
def test_packed_experts_are_quantised_one_by_one(mixtures: Path, tmp_path: Path, to: str) -> None:
    found = []
    for kind in ("packed", "apart"):
        spec = {
            "merge_method": "ties",
            "base_model": str(mixtures / f"{kind}1"),
            "models": [{"model": str(mixtures / f"{kind}2")}],
            "parameters": {"density": 1.0, "weight": 0.5},
            "quantize": to,
        }
        planned = outliermerge.plan(spec)
        outliermerge.run(spec, output=tmp_path / kind)
        found.append(load_folder(tmp_path / kind))
        assert any("written one by one" in note for note in planned.notes) == (kind == "packed")
        said = json.loads((tmp_path / kind / "outliermerge.json").read_text())
        assert said["num_parameters"] == sum(
            tensor.numel() for tensor in load_folder(mixtures / "packed1").values()
        )
    assert found[0].keys() == found[1].keys()
    assert any("experts.2.gate_proj.weight_scale" in name for name in found[0])
    for name, tensor in found[0].items():
        assert _bits(tensor).equal(_bits(found[1][name])), name


def test_packed_experts_that_do_not_fit_stay_as_they_are_with_a_note(mixtures: Path) -> None:
    spec = {"merge_method": "passthrough", "models": [{"model": str(mixtures / "packed1")}]}
    for more in ({"to": "fp8", "ignore": ["experts"]}, {"to": "fp8", "ignore": ["down_proj"]}):
        planned = outliermerge.plan(spec | {"quantize": more})
        assert any("2 packed experts among them: transformers" in note for note in planned.notes)
        assert any(job.name.endswith("experts.gate_up_proj") for job in planned.jobs)
