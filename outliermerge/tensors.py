"""The library: merges of tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from outliermerge.arguments import checked, wrong
from outliermerge.checkpoint.sources import DTYPES, DType
from outliermerge.engines.torch import is_finite
from outliermerge.engines.triton import TensorMerge
from outliermerge.errors import (
    ArgumentError,
    OutlierMergeError,
    SpecError,
    argument,
    listing,
    quoted,
    suggest,
)
from outliermerge.execution.in_memory import merge_all
from outliermerge.methods.context import Context
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.statistics.base import scope_of
from outliermerge.methods.table import find_method
from outliermerge.methods.task import Task
from outliermerge.optional import require_torch
from outliermerge.planning.parameters import context_of
from outliermerge.spec.settings import find_layers

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@checked
def merge_state_dicts(
    models: Sequence[Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor] | None = None,
    method: str | MergeMethod = "min_sigma",
    seed: int = 0,
    auxiliary: Mapping[str, Sequence[Mapping[str, Tensor]]] | None = None,
    allow_non_finite: bool = False,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge dicts of tensors in memory.

    Args:
        models: the models' tensors, by name; on any devices.
        base: the base model's tensors; needed by methods on task vectors.
        method: a name from `outliermerge methods`, `package.module:function`, or a method.
        seed: of methods that draw random numbers, which depend on the tensor's name, too.
        auxiliary: of methods that take statistics of data: by kind, such as `gram`, one dict of
            tensors a model, with the weights' names. What no model has is averaged.
        allow_non_finite: go on where values are infinite or NaN, such as those too large for
            float16.
        **parameters: of the method; those of each model as a list of one value a model.

    Returns:
        The merged tensors, with the names, dtypes and devices of the base (of the first model
        where there is no base). Tensors that are not floating-point must be equal and are copied.

    Raises:
        OutlierMergeError: names, shapes or non-float tensors differ; values are infinite or NaN.
        ArgumentError: an unknown method or parameter, or a value out of range.

    Example:
        >>> import torch, outliermerge
        >>> base = {"w": torch.zeros(4)}
        >>> tuned = [{"w": torch.tensor([1.0, 0, 0, 0])}, {"w": torch.tensor([0, 0.2, 0, 0])}]
        >>> outliermerge.merge_state_dicts(tuned, base=base, method="task_arithmetic", weight=0.5)
        {'w': tensor([0.5000, 0.1000, 0.0000, 0.0000])}
    """
    require_torch("a merge of tensors in memory")
    found = _method(method)
    if not models:
        raise OutlierMergeError("no models to merge")
    for name, each in [*(("models", model) for model in models), ("base", base)]:
        if not isinstance(each, Mapping) and each is not None:
            hint = ": give its state_dict()" if hasattr(each, "state_dict") else ""
            raise wrong(name, type(each).__name__, f"tensors by name{hint}")
    reference = models[0] if base is None else base
    for number, model in enumerate(models):
        if set(reference) != set(model):
            raise OutlierMergeError(
                f"models[{number}] does not hold the same tensors as "
                f"{'models[0]' if base is None else 'the base'}:\n"
                + listing(
                    f"{name}: {'extra' if name in model else 'missing'}"
                    for name in sorted(set(reference) ^ set(model))
                )
            )
    named = _named(models, base)
    found, models = _with_base(found, models, base)
    resolved = _resolved(found, len(models), parameters)
    given = _auxiliary(found, len(models), auxiliary)
    layers = find_layers(reference)
    merges = {}
    for name, tensor in reference.items():
        merges[name] = _prepared(
            [model[name] for model in models],
            None if base is None else base[name],
            found,
            resolved,
            context_of(name, tuple(getattr(tensor, "shape", ())), layers.get(name), seed),
            {kind: [own.get(name) for own in each] for kind, each in given.items()},
        )
    return _filled(
        merges,
        lambda name: {place: one[name] for place, one in named.items()},
        allow_non_finite=allow_non_finite,
    )


@checked
def merge_tensors(
    models: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    method: str | MergeMethod = "min_sigma",
    name: str = "",
    seed: int = 0,
    auxiliary: Mapping[str, Sequence[Tensor]] | None = None,
    allow_non_finite: bool = False,
    **parameters: Any,
) -> Tensor:
    """Merge one tensor in memory.

    Args:
        models: the models' tensors, all of one shape; on any devices.
        base: the base model's tensor, for methods on task vectors.
        method: a name, by default `min_sigma`; `package.module:function`, or a method.
        name: the tensor's name in its model; methods that draw random numbers draw others for
            another name.
        seed: of methods that draw random numbers.
        auxiliary: of methods that take statistics of data: by kind, one tensor a model.
        allow_non_finite: go on where values are infinite or NaN.
        **parameters: of the method; those of each model as a list.

    Returns:
        A tensor of the shape, dtype and device of the base (of the first model without one).

    Raises:
        OutlierMergeError: shapes differ, or tensors that are not floating-point differ; values
            are infinite or NaN.
        ArgumentError: an unknown method or parameter, or a value out of range.

    Example:
        >>> import torch, outliermerge
        >>> outliermerge.merge_tensors([torch.ones(2), torch.zeros(2)], method="linear")
        tensor([0.5000, 0.5000])
    """
    require_torch("a merge of tensors in memory")
    found = _method(method)
    if not models:
        raise OutlierMergeError("no models to merge")
    named = _named(models, base)
    found, models = _with_base(found, models, base)
    resolved = _resolved(found, len(models), parameters)
    context = Context(name, tuple(getattr(models[0], "shape", ())), seed=seed)
    needs = found.of(resolved, context).needs.values()
    if any(scope_of(need, resolved) == "model" for need in needs):
        raise ArgumentError(
            f"{found.name} measures whole models with these parameters: "
            "use merge_state_dicts or run"
        )
    given = _auxiliary(found, len(models), auxiliary)
    merge = _prepared(models, base, found, resolved, context, given)
    return _filled({name: merge}, lambda _: named, allow_non_finite=allow_non_finite)[name]


def _method(method: str | MergeMethod) -> MergeMethod:
    if not isinstance(method, (str, MergeMethod)):
        raise wrong("method", method, "a name, or a function decorated with @merge_method")
    try:
        return find_method(method) if isinstance(method, str) else method
    except SpecError as error:
        raise ArgumentError(error.marked) from error


def _with_base(
    method: MergeMethod, models: Sequence[T], base: T | None
) -> tuple[MergeMethod, Sequence[T]]:
    """Return the method that merges with or without a base, and the models that it merges."""
    if base is None and method.needs_base:
        raise ArgumentError(f"{method.name} needs a base model: give `base`")
    if base is None:
        return method, models
    method = method.with_base or method
    if method.base_as == "first":
        return method, [base, *models]
    return method, [*models, base] if method.base_as == "model" else models


def _named(models: Sequence[T], base: T | None) -> dict[str, T]:
    """Return what was given by the names that messages have for it."""
    named = {f"models[{number}]": each for number, each in enumerate(models)}
    return named if base is None else {"base": base, **named}


def _resolved(
    method: MergeMethod, num_models: int, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    most = method.max_models
    if method.space == "merged":
        raise ArgumentError(f"{method.name} is a modifier of merges, expected a merge method")
    if num_models < method.min_models or (most is not None and num_models > most):
        among = ", the base among them" if method.base_as == "first" else ""
        raise ArgumentError(f"{method.name} does not take {num_models} models{among}")
    for name in parameters:
        if name.removesuffix("_") not in method.parameters:
            valid = [*method.parameters, "base", "method", "seed", "auxiliary"]
            raise ArgumentError(
                f"{method.name}: unknown parameter {quoted(name)}. {suggest(name, valid)}"
            )
    try:
        resolved = method.resolve(num_models, parameters)
    except SpecError as error:
        raise ArgumentError(error.marked) from error
    return resolved


def _auxiliary(
    method: MergeMethod, num_models: int, given: Mapping[str, Sequence[T]] | None
) -> Mapping[str, Sequence[T]]:
    given = given or {}
    for kind in (*method.auxiliary, *given):
        if kind not in method.auxiliary:
            raise ArgumentError(
                f"auxiliary: {method.name} takes no {quoted(kind)}. "
                + suggest(kind, method.auxiliary)
            )
        if kind not in given or len(given[kind]) != num_models:
            found = len(given[kind]) if kind in given else "none"
            raise ArgumentError(
                f"{method.name} takes {kind} of each model: found {found}, "
                f"expected {num_models} as auxiliary={{{kind!r}: [...]}}"
            )
    return given


def _prepared(
    models: Sequence[Tensor],
    base: Tensor | None,
    method: MergeMethod,
    resolved: Mapping[str, Any],
    context: Context,
    auxiliary: Mapping[str, Sequence[Tensor | None]],
) -> TensorMerge | Tensor:
    """Return the merge that is to be done, or what needs none."""
    import torch

    where = f"tensor {context.name!r}: " if context.name else ""
    named = {"base": base, **{f"models[{number}]": each for number, each in enumerate(models)}}
    for name, each in named.items():
        if each is not None and not isinstance(each, torch.Tensor):
            kind = type(each).__name__
            advice = f": torch.from_numpy({name})" if kind == "ndarray" else ""
            raise ArgumentError(f"{where}{name}: found {kind}, expected a tensor{advice}")
    first = models[0] if base is None else base
    given = models[1:] if base is not None and method.base_as == "first" else models
    for number, tensor in enumerate(given):
        if tensor.shape != first.shape or tensor.is_floating_point() != first.is_floating_point():
            raise OutlierMergeError(
                f"{where}models[{number}] is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {first.dtype} {list(first.shape)}"
            )
    if not first.is_floating_point():
        if not all(torch.equal(first, tensor.to(first.device)) for tensor in models):
            raise OutlierMergeError(
                f"{where}{first.dtype} tensors cannot be merged, and they differ"
            )
        return first.detach().clone()
    if len(models) == 1 and method.idempotent(resolved):
        return models[0].detach().to(first.device, first.dtype, copy=True)
    lacks = tuple(k for k, each in auxiliary.items() if all(one is None for one in each))
    context = replace(context, lacks=lacks)
    sources = [base, *models] if method.uses_base and base is not None else list(models)
    method = method.of(resolved, context)
    more = [
        _checked(f"{where}auxiliary[{kind!r}][{number}]", one, method, kind, context.shape)
        for kind in method.auxiliary
        for number, one in enumerate(auxiliary[kind])
    ]
    in_blocks = more[: len(models) * len(method.in_blocks)]
    task = Task(
        method=method,
        parameters=resolved,
        dtypes=tuple(_dtype(tensor) for tensor in sources),
        out_dtype=_dtype(first),
        compute_dtype="float64"
        if any(tensor.dtype == torch.float64 for tensor in sources)
        else "float32",
        shape=tuple(first.shape),
        context=context,
        auxiliary=tuple(_dtype(tensor) for tensor in in_blocks),
    )
    result = torch.empty_like(first, memory_format=torch.contiguous_format, requires_grad=False)
    return TensorMerge(task, tuple(tensor.detach() for tensor in sources), result, tuple(more))


def _checked(
    place: str, given: Tensor | None, method: MergeMethod, kind: str, shape: tuple[int, ...]
) -> Tensor:
    """Return an auxiliary tensor.

    Raises:
        OutlierMergeError: it is missing, has another shape, or values that are not finite.
    """
    import torch

    wanted = method.prepared[kind].shape(shape) if kind in method.prepared else shape
    if not isinstance(given, torch.Tensor) or tuple(given.shape) != wanted:
        found = f"{given.dtype} {list(given.shape)}" if isinstance(given, torch.Tensor) else "none"
        raise OutlierMergeError(
            f"{place}: found {found}, expected a tensor {list(wanted)}, as the weights are "
            f"{list(shape)}"
        )
    if not given.is_floating_point() or not torch.isfinite(given).all():
        raise OutlierMergeError(f"{place}: has values that are infinite, NaN or no floats")
    if kind in method.prepared and (why := method.prepared[kind].wrong(given)):
        raise OutlierMergeError(f"{place}: has {why}")
    return given.detach()


def _dtype(tensor: Tensor) -> DType:
    return DTYPES[str(tensor.dtype).removeprefix("torch.")]


def _filled(
    merges: Mapping[str, TensorMerge | Tensor],
    given: Callable[[str], Mapping[str, Tensor]],
    *,
    allow_non_finite: bool,
) -> dict[str, Tensor]:
    """Return the results of merges by name.

    Args:
        merges: the merges that are to be done, and what needs none.
        given: returns the tensors that were given for a name.

    Raises:
        OutlierMergeError: a result has values that are infinite or NaN, and these are not allowed.
    """
    bad = merge_all([merge for merge in merges.values() if isinstance(merge, TensorMerge)])
    results = {}
    for name, merge in merges.items():
        result = results[name] = merge.result if isinstance(merge, TensorMerge) else merge
        is_copy = merge is result and result.is_floating_point()
        if not allow_non_finite and (merge in bad or (is_copy and not is_finite(result))):
            places = [
                f"in {place}" for place, one in given(name).items() if not is_finite(one)
            ] or [f"in the merge ({str(result.dtype).removeprefix('torch.')})"]
            raise OutlierMergeError(
                f"{f'tensor {name!r}' if name else 'the tensor'} has values that are infinite or "
                f"NaN {' and '.join(places)}. Check that model; "
                f"{argument('allow_non_finite', True)} goes on."
            )
    return results
