"""The library: merge checkpoints by a spec, or tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.layout import parse_bytes
from outliermerge.checkpoint.meta import DTYPES
from outliermerge.errors import OutlierMergeError, SpecError, listing
from outliermerge.execute import choose_options, torch_threads
from outliermerge.in_memory import merge_in_memory
from outliermerge.jobs import Plan
from outliermerge.kernels import find_kernels
from outliermerge.machine import num_threads
from outliermerge.manifest import verify_folder
from outliermerge.method import MergeMethod, Task
from outliermerge.methods import find_method
from outliermerge.planning.plan import DEFAULT_MEMORY_BYTES, make_plan
from outliermerge.rounds import run_all
from outliermerge.runs import RunResult, output_path, run_plans
from outliermerge.spec.check import MergeSpec, load_spec

if TYPE_CHECKING:
    from torch import Tensor


def plan(
    spec: str | Path | Mapping[str, Any] | MergeSpec, *, shard_size: int | str | None = None
) -> Plan:
    """Plan a merge without reading a tensor.

    Args:
        spec: a YAML file, or the same as a dict.
        shard_size: most bytes of a weight file, such as "5GB", the default.

    Raises:
        SpecError: the spec is wrong.
        OutlierMergeError: a model is absent or broken, or the models do not fit together.

    Example:
        >>> import outliermerge
        >>> outliermerge.plan("merge_configs/minilm_ties.yaml").jobs  # doctest: +SKIP
    """
    checked = spec if isinstance(spec, MergeSpec) else load_spec(spec)
    if shard_size is None:
        return make_plan(checked)
    return make_plan(checked, shard_bytes=parse_bytes(str(shard_size), option="--shard-size"))


def run(
    spec: str | Path | Mapping[str, Any] | Plan,
    *,
    output: str | Path | None = None,
    device: str = "cpu",
    memory: int | str = DEFAULT_MEMORY_BYTES,
    threads: int = 0,
    shard_size: int | str | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    kernels: bool = True,
    allow_non_finite: bool = False,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> RunResult:
    """Merge checkpoints on disk into a new model folder.

    A run that was killed goes on where it stopped when it is started again, and gives the same
    bytes. The output has its name only when it is complete.

    Args:
        spec: a YAML file, the same as a dict, or a plan.
        output: the folder or .safetensors file to write; the spec's `output` by default.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        memory: bytes for blocks and intermediate results, above what the interpreter takes.
        threads: worker threads; 0 for the processors at hand.
        shard_size: most bytes of a weight file, 5GB by default; not with a plan.
        overwrite: replace an existing output when the merge is done.
        fresh: start over instead of going on with a killed run.
        kernels: compute on the CPU by fused kernels; else by torch, as the methods are defined.
        allow_non_finite: go on where values are infinite or NaN, and list them.
        on_progress: called with the bytes just worked on, by any thread.

    Raises:
        SpecError: the spec or an argument is wrong.
        OutlierMergeError: a model or the output folder is not fit for it.

    Example:
        >>> import outliermerge
        >>> outliermerge.run("merge_configs/minilm_ties.yaml", output="merged")  # doctest: +SKIP
    """
    if isinstance(spec, Plan):
        if shard_size is not None:
            raise SpecError("shard_size: the plan has its shards already; give it to plan()")
        planned = spec
    else:
        planned = plan(spec, shard_size=shard_size)
    final = output_path(planned, output)
    options = choose_options(
        planned,
        device=device,
        memory=memory,
        threads=threads,
        kernels=kernels,
        allow_non_finite=allow_non_finite,
    )
    (result,) = run_plans(
        [(planned, final)], options, overwrite=overwrite, fresh=fresh, on_progress=on_progress
    )
    return result


def verify(folder: str | Path, *, threads: int = 0) -> list[str]:
    """Recompute every checksum of an output; return what differs from its manifest.

    Raises:
        OutlierMergeError: the folder has no manifest.
    """
    return verify_folder(Path(folder), threads=num_threads(threads))


def merge_state_dicts(
    models: Sequence[Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor] | None = None,
    method: str | MergeMethod = "min_sigma",
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge dicts of tensors in memory.

    Args:
        models: the models' tensors, by name; on any devices.
        base: the base model's tensors; needed by methods on task vectors.
        method: a name from `outliermerge methods`, `package.module:function`, or a method.
        **parameters: of the method; those of each model as a list of one value a model.

    Returns:
        The merged tensors, with the names, dtypes and devices of the base (of the first model
        where there is no base). Tensors that are not floating-point must be equal and are copied.

    Raises:
        OutlierMergeError: names, shapes or non-float tensors differ.
        SpecError: an unknown method or parameter, or a value out of range.

    Example:
        >>> import torch, outliermerge
        >>> base = {"w": torch.zeros(4)}
        >>> tuned = [{"w": torch.tensor([1.0, 0, 0, 0])}, {"w": torch.tensor([0, 0.2, 0, 0])}]
        >>> outliermerge.merge_state_dicts(tuned, base=base, method="task_arithmetic", weight=0.5)
        {'w': tensor([0.5000, 0.1000, 0.0000, 0.0000])}
    """
    found = find_method(method) if isinstance(method, str) else method
    if not models:
        raise OutlierMergeError("no models to merge")
    reference = models[0] if base is None else base
    for number, model in enumerate(models):
        differing = sorted(set(reference) ^ set(model))
        if differing:
            raise OutlierMergeError(
                f"models[{number}] does not hold the same tensors as "
                f"{'models[0]' if base is None else 'the base'}:\n{listing(differing)}"
            )
    merged = {}
    for name in reference:
        try:
            merged[name] = merge_tensors(
                [model[name] for model in models],
                base=None if base is None else base[name],
                method=found,
                **parameters,
            )
        except SpecError:
            raise
        except OutlierMergeError as error:
            raise OutlierMergeError(f"tensor {name!r}: {error}") from error
    return merged


def merge_tensors(
    models: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    method: str | MergeMethod = "min_sigma",
    **parameters: Any,
) -> Tensor:
    """Merge one tensor in memory.

    Args:
        models: the models' tensors, all of one shape; on any devices.
        base: the base model's tensor, for methods on task vectors.
        method: a name, `package.module:function`, or a method.
        **parameters: of the method; those of each model as a list.

    Returns:
        A tensor of the shape, dtype and device of the base (of the first model without one).

    Raises:
        OutlierMergeError: shapes differ, or tensors that are not floating-point differ.
        SpecError: an unknown method or parameter, or a value out of range.

    Example:
        >>> import torch, outliermerge
        >>> outliermerge.merge_tensors([torch.ones(2), torch.zeros(2)], method="linear")
        tensor([0.5000, 0.5000])
    """
    import torch

    found = find_method(method) if isinstance(method, str) else method
    if not models:
        raise OutlierMergeError("no models to merge")
    most = found.max_models
    if len(models) < found.min_models or (most is not None and len(models) > most):
        raise SpecError(f"{found.name} does not take {len(models)} models")
    if found.space == "delta" and base is None:
        raise SpecError(f"{found.name} works on differences from a base: give `base`")
    resolved = found.resolve(len(models), parameters)
    first = models[0] if base is None else base
    for number, tensor in enumerate(models):
        if tensor.shape != first.shape or tensor.is_floating_point() != first.is_floating_point():
            raise OutlierMergeError(
                f"models[{number}] is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {first.dtype} {list(first.shape)}"
            )
    if not first.is_floating_point():
        if not all(torch.equal(first, tensor.to(first.device)) for tensor in models):
            raise OutlierMergeError(f"{first.dtype} tensors cannot be merged, and they differ")
        return first.detach().clone()
    sources = [base, *models] if found.space == "delta" and base is not None else list(models)
    same = all(
        tensor.dtype == first.dtype and torch.equal(first, tensor.to(first.device))
        for tensor in sources
    )
    if same and (found.space == "delta" or found.idempotent(resolved)):
        return first.detach().clone()
    if len(models) == 1 and found.idempotent(resolved):
        return models[0].detach().to(first.device, first.dtype, copy=True)
    return _merge_in_memory(sources, found, resolved, first)


def _merge_in_memory(
    sources: Sequence[Tensor], method: MergeMethod, resolved: Mapping[str, Any], first: Tensor
) -> Tensor:
    import torch

    wide = any(tensor.dtype == torch.float64 for tensor in sources)
    task = Task(
        method=method,
        parameters=resolved,
        dtypes=tuple(DTYPES[str(tensor.dtype).removeprefix("torch.")] for tensor in sources),
        out_dtype=DTYPES[str(first.dtype).removeprefix("torch.")],
        compute_dtype="float64" if wide else "float32",
        shape=tuple(first.shape),
    )
    on_cpu = all(tensor.device.type == "cpu" for tensor in (first, *sources))
    threads = num_threads(0)
    merged = torch.empty_like(first, memory_format=torch.contiguous_format)
    with torch_threads() as prepare:
        steps = merge_in_memory(task, sources, merged, find_kernels() if on_cpu else None)
        run_all([steps], threads=threads, prepare=prepare)
    return merged
