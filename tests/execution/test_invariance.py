"""What must not change an output: threads, memory, shards, and models that say the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import as_many_as, family, load_folder, save_tensors
from every_method import BY_ANGLES, NEEDS_BASE, OF_MATRICES, SEVERAL
from torch import Tensor

import outliermerge
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, StandardDeviation
from outliermerge.methods.statistics.trim import Trim
from outliermerge.methods.table import METHODS as TABLE
from outliermerge.planning.blocks import block_elements
from outliermerge.planning.plan import Options

SHAPES = {
    "wide.weight": (613, 521),
    "long.bias": (400_001,),
    "kernel.weight": (7, 3, 5, 5),
    "chunk.weight": (CHUNK_ELEMENTS,),
    "one": (1,),
    "scalar": (),
    "empty": (0, 4),
}


@outliermerge.merge_method(space="delta", cut="row")
def row_peak(deltas_MRC, *, share: float = 0.5):
    """Keep in each row what is at least a share of the row's largest magnitude."""
    assert deltas_MRC.ndim == 3
    limit = share * deltas_MRC.abs().amax(2, keepdim=True)
    return deltas_MRC.where(deltas_MRC.abs() >= limit, 0).mean(0)


@outliermerge.merge_method(space="weight", cut="row", needs={"sigma": StandardDeviation()})
def row_scaled(weights_MRC, *, sigma, weight: outliermerge.PerModel = 1.0):
    """Centre the rows of each model, in units of the whole tensor's deviation."""
    centred = weights_MRC - weights_MRC.mean(2, keepdim=True)
    rows = centred.new_tensor(weights_MRC.shape[1:2], dtype=torch.int64).sum()
    scale = (weight / (1 + sigma)).to(centred.dtype)
    return (centred * scale[:, None, None]).sum(0), {"rows": rows}


@outliermerge.merge_method(space="delta", cut="tensor")
def tensor_reversed(deltas, *, scale: float = 1.0):
    """Add each task vector, reversed along the tensor's first axis."""
    shown = deltas if deltas.ndim == 1 else deltas.flip(1)
    return shown.sum(0) * scale


def make_tensors(seed: int, like: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        drawn = torch.randn(shape, generator=generator)
        if like is None:
            tensors[name] = drawn.to(torch.bfloat16 if number % 2 else torch.float32)
        else:
            moved = like[name].float() + 0.01 * seed * drawn
            tensors[name] = moved.to(like[name].dtype)
    return tensors


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("large")
    tensors = make_tensors(0)
    models = [save_tensors(folder / f"m{n}", make_tensors(n, tensors)) for n in (1, 2)]
    return save_tensors(folder / "base", tensors), models


@pytest.fixture(scope="module")
def matrices(tmp_path_factory) -> tuple[Path, list[Path]]:
    """Leave out the long vector: it is one row, and needs memory for all of it."""
    folder = tmp_path_factory.mktemp("matrices")
    drawn = make_tensors(0)
    kept = [name for name in drawn if name not in ("long.bias", "chunk.weight")]
    models = [make_tensors(n, drawn) for n in (1, 2)]
    base, *others = (
        save_tensors(folder / name, {k: tensors[k] for k in kept})
        for name, tensors in zip(("base", "a", "b"), (drawn, *models), strict=True)
    )
    return base, others


def spec_of(method: str, base: Path | None, models: list[Path], **more: Any) -> dict[str, Any]:
    own = more.pop("own", [{}] * len(models))
    document = {
        "merge_method": method,
        "models": [{"model": str(m), "parameters": p} for m, p in zip(models, own, strict=True)],
    } | more
    return document | ({"base_model": str(base)} if base else {})


def digest(folder: Path) -> dict[str, str]:
    paths = folder.glob("*.safetensors")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


METHODS: dict[str, dict[str, Any]] = {name: {} for name in TABLE} | {
    "min_sigma": {"t": 1.3, "weight": 0.7},
    "min_sigma by rows": {"sigma": "row", "scale": "mad", "conflict": "elect", "t": 1.1},
    "min_sigma of models": {"sigma": "model", "scale": "mad", "t": 1.1},
    "linear": {"weight": 0.3},
    "task_arithmetic": {"weight": 0.3, "lambda": 0.9},
    "ties": {"density": 0.3, "weight": 0.7, "rescale": True},
    "passthrough": {"scale": 0.3},
    "sce of some": {"select_topk": 0.2},
    "test_invariance:row_peak": {"share": 0.4},
    "test_invariance:row_scaled": {"weight": 0.7},
    "test_invariance:tensor_reversed": {"scale": 0.3},
    **BY_ANGLES,
}
BUDGETS = [(1, "7MB"), (1, "14MB"), (2, "21MB"), (2, "1GB"), (4, "28MB"), (4, "1GB")]
BY_ROW = ("arcee_fusion", "della", "della_linear")
# The first holds one row of 521 elements and little more.
ROW_BUDGETS = [(1, "60KB"), (1, "300KB"), (2, "7MB"), (4, "1GB")]
RANK_BUDGETS = [(1, "100KB"), (1, "300KB"), (2, "7MB"), (4, "1GB")]
TENSOR_BUDGETS = [(1, "43MB"), (1, "1GB"), (2, "1GB"), (4, "200MB")]
MATRIX_BUDGETS = [(1, "80MB"), (4, "320MB")]


def large_spec(method: str, large: tuple[Path, list[Path]]) -> dict[str, Any]:
    base, models = large
    if ":" not in method:
        models = as_many_as(method.partition(" ")[0], models)
    needs_base = method not in ("linear", "passthrough", "test_invariance:row_scaled")
    needs_base = needs_base and "of weights" not in method
    name = method.partition(" ")[0]
    return spec_of(name, base if needs_base else None, models, parameters=METHODS[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sampled(2)
def test_threads_and_memory_change_no_byte(method, large, matrices, tmp_path):
    by_row = "row_" in method or "by rows" in method or method in BY_ROW
    of_matrices = method in OF_MATRICES
    whole = "tensor_" in method or "by columns" in method or of_matrices
    planned = outliermerge.plan(large_spec(method, matrices if by_row else large))
    wide = next(job for job in planned.jobs if job.name == "wide.weight")
    blocks, digests, statistics = set(), [], []
    budgets = ROW_BUDGETS if by_row else TENSOR_BUDGETS if whole else BUDGETS
    budgets = RANK_BUDGETS if "della" in method else budgets
    budgets = MATRIX_BUDGETS if of_matrices else budgets
    for threads, memory in budgets:
        num_bytes = int(memory[:-2]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[memory[-2:]]
        options = Options(device="cpu", threads=threads, memory_bytes=num_bytes)
        block = block_elements(wide, options)
        blocks.add(block)
        output = tmp_path / f"{threads}-{memory}"
        result = outliermerge.run(planned, output=output, threads=threads, memory=memory)
        assert outliermerge.verify(output) == []
        digests.append(digest(output))
        statistics.append({k: v.get("statistics") for k, v in result.manifest["tensors"].items()})
    assert digests == digests[:1] * len(digests)
    assert statistics == statistics[:1] * len(statistics)
    assert (len(blocks) == 1) == whole


@pytest.mark.parametrize("kept_bytes", [0, 2 * CHUNK_ELEMENTS // 8])
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_how_much_della_keeps_of_its_first_reading_changes_no_byte(
    method, kept_bytes, matrices, tmp_path, monkeypatch
):
    own = {"parameters": {"density": 0.4, "epsilon": 0.2}}
    planned = outliermerge.plan(large_spec(method, matrices) | own)
    wide = next(job for job in planned.jobs if job.name == "wide.weight")
    whole = outliermerge.run(planned, output=tmp_path / "whole", threads=2).output
    assert wide.task.held_bytes > kept_bytes + CHUNK_ELEMENTS // 8
    monkeypatch.setattr("outliermerge.methods.statistics.drawn._KEPT_BYTES", kept_bytes)
    part = outliermerge.run(planned, output=tmp_path / "part", threads=2).output
    assert digest(part) == digest(whole)


def test_a_run_repeated_gives_the_same_files(large, tmp_path):
    spec = large_spec("min_sigma", large)
    folders = [outliermerge.run(spec, output=tmp_path / n).output for n in "ab"]
    left, right = (sorted(folder.iterdir()) for folder in folders)
    assert [p.name for p in left] == [p.name for p in right]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(left, right, strict=True))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", SEVERAL)
def test_shard_size_changes_no_tensor(method, tmp_path):
    base, models = family("llama", tmp_path, dtype=torch.bfloat16, shard_size="40KB")
    spec = spec_of(method, base if method in NEEDS_BASE else None, models)
    outputs = {
        size: outliermerge.run(spec, output=tmp_path / size, shard_size=size).output
        for size in ("5GB", "30KB", "9KB")
    }
    counts = [len(list(output.glob("*.safetensors"))) for output in outputs.values()]
    assert counts[0] == 1 < counts[1] < counts[2]
    whole, *others = (load_folder(output) for output in outputs.values())
    for tensors in others:
        assert tensors.keys() == whole.keys()
        assert all(bits(tensors[name]) == bits(whole[name]) for name in whole)
    assert all(outliermerge.verify(output) == [] for output in outputs.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("statistic", "parameters"),
    [
        (StandardDeviation(), {}),
        (Trim(), {"density": [0.3, 0.01], "rescale": True}),
        (Trim(), {"density": [1.0, 0.5]}),
    ],
    ids=["deviation", "trim-rescale", "trim"],
)
def test_statistics_do_not_depend_on_blocks(statistic, parameters, dtype):
    generator = torch.Generator().manual_seed(8)
    num_elements = 5 * CHUNK_ELEMENTS + 77
    block = (torch.randn(2, num_elements, generator=generator) * 3 + 100).to(dtype)

    def measured(num_chunks: int) -> list[Any]:
        state = statistic.start(2, num_elements, parameters)
        step = num_chunks * CHUNK_ELEMENTS
        while not isinstance(state, list):
            shares = [state.measure(block[:, i : i + step]) for i in range(0, num_elements, step)]
            for share in shares:
                state.add(share)
            state = state.finish()
        return state

    assert measured(1) == measured(2) == measured(3) == measured(100)


@pytest.mark.parametrize("method", ["min_sigma", "task_arithmetic"])
def test_the_order_of_models_matters_only_to_rounding(method, tmp_path):
    base, models = family("llama", tmp_path, num_models=3)
    own = [{"weight": w} for w in (0.3, 0.9, 0.5)]
    orders = {"abc": [0, 1, 2], "bca": [1, 2, 0], "cba": [2, 1, 0], "again": [0, 1, 2]}
    outputs = {
        name: outliermerge.run(
            spec_of(method, base, [models[i] for i in order], own=[own[i] for i in order]),
            output=tmp_path / name,
        ).output
        for name, order in orders.items()
    }
    assert digest(outputs["abc"]) == digest(outputs["again"])
    first = load_folder(outputs["abc"])
    for name in ("bca", "cba"):
        for tensor, value in load_folder(outputs[name]).items():
            scale = float(first[tensor].abs().max())
            assert torch.allclose(value, first[tensor], rtol=0, atol=4e-7 * scale), tensor


def with_negative_zeros(source: Path, target: Path) -> Path:
    tensors = load_folder(source)
    for tensor in tensors.values():
        tensor.view(-1)[0] = -0.0
    return save_tensors(target, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("min_sigma", {"t": 3, "weight": 0.3, "lambda": 0.7}),
        ("task_arithmetic", {"weight": 0.3}),
        ("ties", {"density": 0.2, "weight": 0.3}),
        ("linear", {"weight": 0.3}),
    ],
)
def test_equal_models_give_the_base_byte_for_byte(method, parameters, dtype, tmp_path):
    base, _ = family("llama", tmp_path / "made", num_models=0, dtype=dtype)
    names = ("base", "x", "y", "z")
    base, *models = (with_negative_zeros(base, tmp_path / name) for name in names)
    spec = spec_of(method, None if method == "linear" else base, models, parameters=parameters)
    result = outliermerge.run(spec, output=tmp_path / "out")
    before, after = load_folder(base), load_folder(result.output)
    assert before.keys() == after.keys()
    assert all(bits(after[name]) == bits(before[name]) for name in before)
    assert {entry["action"] for entry in result.manifest["tensors"].values()} == {"copy"}


def test_equal_models_are_not_copied_where_the_method_changes_them(tmp_path):
    tensors = {"w": torch.tensor([1.0, -2.0])}
    models = [save_tensors(tmp_path / name, tensors) for name in "ab"]
    spec = spec_of("linear", None, models, parameters={"normalize": False})
    result = outliermerge.run(spec, output=tmp_path / "out")
    assert torch.equal(load_folder(result.output)["w"], torch.tensor([2.0, -4.0]))
    assert result.manifest["tensors"]["w"]["action"] == "merge"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", SEVERAL)
def test_tensors_equal_in_all_models_are_copied(method, tmp_path):
    base, models = family("mixtral", tmp_path, dtype=torch.bfloat16)
    original = load_folder(base)
    frozen = [name for name in original if "experts.1." in name or "norm" in name]
    for model in models:
        tensors = load_folder(model) | {name: original[name] for name in frozen}
        save_tensors(model, {k: v.contiguous() for k, v in tensors.items()})
    spec = spec_of(method, base if method in NEEDS_BASE else None, models)
    result = outliermerge.run(spec, output=tmp_path / "out")
    merged = load_folder(result.output)
    actions = {name: entry["action"] for name, entry in result.manifest["tensors"].items()}
    assert actions == {name: "copy" if name in frozen else "merge" for name in original}
    assert all(bits(merged[name]) == bits(original[name]) for name in frozen)


def test_a_tensor_that_differs_in_its_last_element_is_merged(tmp_path):
    tensors = {"w": torch.zeros(3 * CHUNK_ELEMENTS + 5)}
    base = save_tensors(tmp_path / "base", tensors)
    model = {"w": tensors["w"].clone()}
    model["w"][-1] = 1.0
    models = [save_tensors(tmp_path / "a", tensors), save_tensors(tmp_path / "b", model)]
    result = outliermerge.run(spec_of("min_sigma", base, models), output=tmp_path / "out")
    assert result.manifest["tensors"]["w"]["action"] == "merge"
    assert torch.equal(load_folder(result.output)["w"], model["w"])


def check_own(
    method: str, large: tuple[Path, list[Path]], output: Path, expected: dict[str, Tensor]
) -> dict[str, Any]:
    assert outliermerge.verify(output) == []
    merged = load_folder(output)
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        if tensor.numel() == 0:
            continue
        kind = torch.finfo(tensor.dtype)
        allowed = kind.eps / 2 * expected[name].abs() + 1e-6 * expected[name].abs().max()
        assert ((tensor.double() - expected[name]).abs() <= allowed).all(), name
    manifest = json.loads((output / "outliermerge.json").read_text())
    sources = manifest["tensors"]["wide.weight"]["sources"]
    assert sources[-1] == str(large[1][-1])
    return manifest


@pytest.mark.parametrize(("threads", "memory"), ROW_BUDGETS)
def test_a_method_of_rows_sees_whole_rows(threads, memory, matrices, tmp_path):
    base, models = (load_folder(matrices[0]), [load_folder(model) for model in matrices[1]])
    expected = {}
    for name, before in base.items():
        rows = before.shape[0] if before.ndim > 1 else 1
        change = torch.zeros(before.numel(), dtype=torch.float64)
        for model in models if before.numel() else []:
            delta_RC = (model[name].float() - before.float()).double().reshape(rows, -1)
            limit = torch.tensor(0.4, dtype=torch.float32).double() * delta_RC.abs().amax(1)
            change += torch.where(delta_RC.abs() >= limit[:, None], delta_RC / 2, 0).reshape(-1)
        expected[name] = before.double() + change.view(before.shape)
    output = tmp_path / "out"
    spec = spec_of("test_invariance:row_peak", *matrices, parameters={"share": 0.4})
    outliermerge.run(spec, output=output, threads=threads, memory=memory)
    check_own("row_peak", matrices, output, expected)


@pytest.mark.parametrize(("threads", "memory"), ROW_BUDGETS)
def test_a_method_of_rows_gets_statistics_of_the_whole_tensor(threads, memory, matrices, tmp_path):
    models = [load_folder(model) for model in matrices[1]]
    expected = {}
    for name, first in models[0].items():
        total = torch.zeros(first.shape, dtype=torch.float64)
        for model, weight in zip(models, (0.5, 0.25), strict=True):
            if not first.numel():
                continue
            values = model[name].double()
            flat = values.flatten(1) if values.ndim > 1 else values.reshape(1, -1)
            centred = (flat - flat.mean(1, keepdim=True)) / (1 + values.std(correction=0))
            total += weight * centred.view(first.shape)
        expected[name] = total
    output = tmp_path / "out"
    own = [{"weight": 0.5}, {"weight": 0.25}]
    spec = spec_of("test_invariance:row_scaled", None, matrices[1], own=own)
    outliermerge.run(spec, output=output, threads=threads, memory=memory)
    manifest = check_own("row_scaled", matrices, output, expected)
    assert manifest["tensors"]["wide.weight"]["statistics"]["rows"] == 613


@pytest.mark.parametrize(("threads", "memory"), TENSOR_BUDGETS)
def test_a_method_of_tensors_sees_the_whole_tensor(threads, memory, large, tmp_path):
    base, models = (load_folder(large[0]), [load_folder(model) for model in large[1]])
    expected = {}
    for name, before in base.items():
        change = sum((model[name].float() - before.float()).double() for model in models)
        expected[name] = before.double() + (change.flip(0) if change.ndim else change)
    output = tmp_path / "out"
    spec = spec_of("test_invariance:tensor_reversed", *large)
    outliermerge.run(spec, output=output, threads=threads, memory=memory)
    check_own("tensor_reversed", large, output, expected)


@pytest.mark.parametrize(
    ("method", "memory"),
    [
        ("min_sigma", "900KB"),
        ("test_invariance:row_peak", "20KB"),
        ("test_invariance:tensor_reversed", "30MB"),
    ],
)
def test_a_budget_below_one_block_is_refused(method, memory, matrices, tmp_path):
    with pytest.raises(outliermerge.ArgumentError, match=r"too little for tensor 'wide\.weight'"):
        outliermerge.run(
            spec_of(method, *matrices), output=tmp_path / "out", threads=1, memory=memory
        )
    assert list(tmp_path.iterdir()) == []
