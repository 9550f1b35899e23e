"""The ends of the contract of a method: last chunks, nested merges, tensors in memory, resuming."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder, save_tensors
from stopping import stopping_after
from torch import Tensor

import outliermerge
from outliermerge import ArgumentError, OutlierMergeError, PerModel
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import DTYPES, Source
from outliermerge.engines.torch import TorchEngine
from outliermerge.execution.merged import Merges
from outliermerge.methods.context import Context
from outliermerge.methods.contract import MergeMethod, merge_method
from outliermerge.methods.kernel_call import Kernel, KernelCall
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, StandardDeviation
from outliermerge.methods.statistics.trim import Trim
from outliermerge.methods.task import Task
from outliermerge.planning.merged import MergedSource

SHAPES = {"layers.0.a.w": (3, 50_000), "layers.1.a.w": (3, 50_000), "one": (), "none": (0, 4)}


@dataclass(frozen=True)
class LastChunk:
    """The number and the sum of the elements in each tensor's last chunk."""

    depends_on: tuple[str, ...] = ()

    def num_passes(self, parameters: Any) -> int:
        return 1

    def start(self, num_models: int, num_elements: int, parameters: Any) -> Any:
        return _Last((num_elements - 1) // CHUNK_ELEMENTS)


class _Last:
    def __init__(self, number: int) -> None:
        self.chunks = [number, number + 1]  # of the second there is nothing
        self._found = [0.0, 0.0]

    def measure(self, block_ME: Tensor) -> list[float]:
        return [float(block_ME.shape[1]), float(block_ME[0].double().sum())]

    def add(self, share: list[float]) -> None:
        self._found = [a + b for a, b in zip(self._found, share, strict=True)]

    def finish(self) -> list[Any]:
        return self._found


@merge_method(space="delta", needs={"last": LastChunk()})
def by_last(deltas_ME: Tensor, *, last: Tensor) -> Tensor:
    """Add task vectors."""
    return deltas_ME.sum(0)


@merge_method(space="delta")
def dropping(deltas_ME: Tensor, *, context: Context, weight: PerModel = 1.0) -> Tensor:
    """Drop half of the elements, and scale by depth."""
    kept = [context.uniform(row, model=i) > 0.5 for i, row in enumerate(deltas_ME)]
    depth = 1 if context.layer is None else (context.layer + 1) / context.num_layers
    return (deltas_ME * torch.stack(kept) * weight[:, None]).sum(0) * depth


@merge_method(space="delta", needs={"trim": Trim(scope="model"), "sigma": StandardDeviation()})
def trimming(deltas_ME: Tensor, *, trim: Tensor, sigma: Tensor, density: PerModel = 0.2) -> Tensor:
    """Keep the largest elements of whole models."""
    kept_ME = deltas_ME * (deltas_ME.abs() >= trim[0].to(deltas_ME.dtype)[:, None])
    return (kept_ME * (1 + sigma.to(deltas_ME.dtype)[:, None])).sum(0)


@merge_method(space="weight", auxiliary=("fisher",), needs={"sigma": StandardDeviation()})
def by_fisher(weights_ME: Tensor, *, fisher: Tensor, sigma: Tensor) -> Tensor:
    """Average in proportion to Fisher diagonals and deviations."""
    share_ME = fisher + sigma.to(weights_ME.dtype)[:, None] + 1
    return (weights_ME * share_ME).sum(0) / share_ME.sum(0)


@merge_method(space="delta", cut="tensor")
def reversing(deltas: Tensor) -> Tensor:
    """Add the task vectors backwards."""
    return deltas.sum(0).flip(0)


@merge_method(space="merged")
def halved(delta: Tensor) -> Tensor:
    """Halve."""
    return delta / 2


@pytest.fixture
def folder(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(3)
    for name in ("base", "a", "b", "fa", "fb"):
        drawn = {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
        save_tensors(
            tmp_path / name, {n: t.abs() if name[0] == "f" else t for n, t in drawn.items()}
        )
    return tmp_path


def spec_of(method: MergeMethod, folder: Path) -> dict[str, Any]:
    models: list[dict[str, Any]] = [{"model": str(folder / name)} for name in "ab"]
    if method.auxiliary:
        for model, name in zip(models, ("fa", "fb"), strict=True):
            model["auxiliary"] = {"fisher": str(folder / name)}
    base = {"base_model": str(folder / "base")} if method.uses_base else {}
    return base | {"merge_method": f"{__name__}:{method.name}", "models": models}


def sources_of(method: MergeMethod, folder: Path) -> tuple[Source, ...]:
    plan = outliermerge.plan(spec_of(method, folder))
    job = next(job for job in plan.jobs if job.name == "layers.0.a.w")
    return (*(source for _, source in job.sources), *job.auxiliary)


ENGINE = TorchEngine(["cpu"])
BY_TORCH = Merges(lambda task: ENGINE)


def merged_source(method: MergeMethod, *sources: Source, num_auxiliary: int = 0) -> MergedSource:
    num_models = len(sources) - num_auxiliary
    task = Task(
        method=method,
        parameters=method.resolve(num_models - method.uses_base, {}),
        dtypes=tuple(source.dtype for source in sources[:num_models]),
        out_dtype=DTYPES["float32"],
        compute_dtype="float32",
        shape=sources[0].shape,
        auxiliary=tuple(source.dtype for source in sources[num_models:]),
    )
    return MergedSource("merged", task, sources)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_pass_over_chosen_chunks_reads_nothing_past_a_tensor(kernels, folder):
    result = outliermerge.run(spec_of(by_last, folder), output=folder / "out", kernels=kernels)
    base, first = load_folder(folder / "base"), load_folder(folder / "a")
    num, total = result.manifest["tensors"]["layers.0.a.w"]["statistics"]["last"]
    assert num == 150_000 - 2 * CHUNK_ELEMENTS
    delta = (first["layers.0.a.w"] - base["layers.0.a.w"]).reshape(-1)[2 * CHUNK_ELEMENTS :]
    assert total == pytest.approx(float(delta.double().sum()))


@pytest.mark.parametrize("method", [dropping, trimming], ids=lambda method: method.name)
def test_tensors_in_memory_are_merged_as_files_are(method, folder):
    outliermerge.run(spec_of(method, folder) | {"seed": 5}, output=folder / "out")
    merged = load_folder(folder / "out")
    states = [load_folder(folder / name) for name in ("base", "a", "b")]
    found = outliermerge.merge_state_dicts(states[1:], base=states[0], method=method, seed=5)
    assert all(found[name].equal(tensor) for name, tensor in merged.items())


def test_of_one_tensor_no_whole_model_is_measured(folder):
    states = [load_folder(folder / name)["one"] for name in ("base", "a", "b")]
    alone = outliermerge.merge_tensors(states[1:], base=states[0], method=dropping, seed=5)
    assert alone.shape == ()
    with pytest.raises(ArgumentError, match=r"measures whole models .*: use merge_state_dicts"):
        outliermerge.merge_tensors(states[1:], base=states[0], method=trimming)


@pytest.mark.parametrize(
    ("method", "message"),
    [(by_fisher, "by_fisher takes fisher of each model: found none"), (halved, "is a modifier")],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_is_not_given_or_only_in_specs_is_refused_in_memory(method, message):
    with pytest.raises(ArgumentError, match=message):
        outliermerge.merge_tensors([torch.ones(3)] * 2, base=torch.ones(3), method=method)


def test_a_kernel_with_auxiliary_tensors_is_refused():
    kernel = Kernel("weighted_sum", lambda parameters, needs: KernelCall("weighted_sum"))
    with pytest.raises(TypeError, match="a kernel takes only the models"):
        merge_method(space="weight", auxiliary=("fisher",), kernel=kernel)(
            lambda weights_ME, *, fisher: weights_ME[0]
        )


@pytest.mark.parametrize("held_bytes", [0, 1 << 30])
def test_a_release_reaches_the_sources_of_a_merge(held_bytes, folder):
    base, *others = sources_of(reversing, folder)
    inner = merged_source(reversing, base, *others)
    outer = merged_source(reversing, base, merged_source(reversing, base, inner), inner)
    with Reader(held_bytes, folder, BY_TORCH) as reader:
        whole = reader.values(outer, 0, outer.num_elements)
        reader.release([(0, outer)])
        assert reader._once == {}
        assert reader._free_bytes == held_bytes
        assert reader.values(outer, 7, 90_000).equal(whole[7:90_000])


def test_a_merge_with_auxiliary_tensors_is_a_source(folder):
    source = merged_source(by_fisher, *sources_of(by_fisher, folder), num_auxiliary=2)
    outliermerge.run(spec_of(by_fisher, folder), output=folder / "out")
    with Reader(merges=BY_TORCH) as reader:
        values = reader.values(source, 0, source.num_elements)
    assert values.equal(load_folder(folder / "out")["layers.0.a.w"].reshape(-1))


@pytest.mark.parametrize("keeps_times", [True, False])
def test_a_resumed_run_takes_over_nothing_made_of_other_auxiliary_tensors(
    keeps_times, folder, monkeypatch
):
    spec, path = spec_of(by_fisher, folder), folder / "fa" / "model.safetensors"
    with stopping_after(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        outliermerge.run(spec, output=folder / "out", threads=1)
    before = path.stat()
    save_tensors(folder / "fa", {n: t + 1 for n, t in load_folder(folder / "fa").items()})
    if keeps_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        outliermerge.run(spec, output=folder / "out", threads=1)
    else:
        with pytest.raises(OutlierMergeError, match=r"the auxiliary tensors of .*/fa/"):
            outliermerge.run(spec, output=folder / "out", threads=1)
        outliermerge.run(spec, output=folder / "out", threads=1, fresh=True)
    outliermerge.run(spec, output=folder / "wanted")
    merged, wanted = (load_folder(folder / name) for name in ("out", "wanted"))
    assert all(merged[name].equal(tensor) for name, tensor in wanted.items())


def test_an_output_may_not_replace_auxiliary_tensors(folder):
    with pytest.raises(OutlierMergeError, match="is or holds the auxiliary tensors"):
        outliermerge.run(spec_of(by_fisher, folder), output=folder / "fa", overwrite=True)
