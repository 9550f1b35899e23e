"""The merge of one tensor, block by block, wherever its blocks come from.

Shape suffixes: M models, S sources (the base, where there is one, then the models), E elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from outliermerge.method import MergeMethod
from outliermerge.statistics import CHUNK_ELEMENTS

if TYPE_CHECKING:
    from torch import Tensor

Span: TypeAlias = tuple[int, int]
Load: TypeAlias = "Callable[[Span], Tensor]"
Map: TypeAlias = Callable[[Callable[[Span], Any], Iterable[Span]], Iterable[Any]]
"""`map`, or that of a thread pool: results come in the order of the spans."""


def spans(num_elements: int, block_elements: int) -> list[Span]:
    """Return the element ranges of a tensor's blocks.

    >>> spans(10, 4)
    [(0, 4), (4, 8), (8, 10)]
    """
    return [
        (start, min(start + block_elements, num_elements))
        for start in range(0, num_elements, block_elements)
    ]


def to_deltas(block_SE: Tensor) -> Tensor:
    """Subtract the base, in place, and return the task vectors (M, E)."""
    return block_SE[1:].sub_(block_SE[0])


def measure_needs(
    method: MergeMethod,
    resolved: Mapping[str, Any],
    load: Load,
    *,
    num_models: int,
    num_elements: int,
    block_elements: int,
    run: Map,
) -> dict[str, list[Any]]:
    """Return a method's whole-tensor statistics, as lists, in as many passes as they take.

    Args:
        load: returns a span's sources (S, E) in the compute dtype, in a buffer of the thread.
        run: `map` or a thread pool's.
    """
    states: dict[str, Any] = {
        name: need.start(num_models, num_elements, resolved) for name, need in method.needs.items()
    }
    aligned = max(CHUNK_ELEMENTS, block_elements // CHUNK_ELEMENTS * CHUNK_ELEMENTS)
    while active := {name: s for name, s in states.items() if not isinstance(s, list)}:

        def measure(span: Span, active: dict[str, Any] = active) -> dict[str, Any]:
            block_SE = load(span)
            block_ME = to_deltas(block_SE) if method.space == "delta" else block_SE
            return {name: state.measure(block_ME) for name, state in active.items()}

        for shares in run(measure, spans(num_elements, aligned)):
            for name, share in shares.items():
                active[name].add(share)
        states |= {name: state.finish() for name, state in active.items()}
    return states


def merge_block(
    method: MergeMethod,
    block_SE: Tensor,
    keywords: Mapping[str, Any],
    shape: tuple[int, ...],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a block's merged weights (E,) in the compute dtype, and the method's report.

    Args:
        block_SE: the sources; overwritten.
        keywords: needs and parameters as the method's function takes them.
        shape: of the whole tensor, for methods that see rows or the tensor.
    """
    block_ME = to_deltas(block_SE) if method.space == "delta" else block_SE
    result = method.function(view_for(method, block_ME, shape), **keywords)
    merged, report = result if isinstance(result, tuple) else (result, {})
    merged_E = merged.reshape(-1)
    if merged_E.shape != block_SE.shape[1:]:
        raise ValueError(
            f"{method.name} returned shape {tuple(merged.shape)} for a block "
            f"of {block_SE.shape[1]} elements"
        )
    if method.space == "delta":
        merged_E = merged_E + block_SE[0]
    return merged_E, report


def view_for(method: MergeMethod, block_ME: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a block in the shape that the method's cut promises."""
    num_models = len(block_ME)
    if method.cut == "row":
        return block_ME.view(num_models, -1, math.prod(shape[1:]) if len(shape) > 1 else
                             block_ME.shape[1])  # fmt: skip
    if method.cut == "tensor":
        return block_ME.view(num_models, *shape)
    return block_ME


def fold_reports(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up the counts (integers) of blocks' reports; other values are of the whole tensor."""
    total: dict[str, Any] = {}
    for report in reports:
        for name, value in report.items():
            total[name] = _add(total[name], value) if name in total else value
    return total


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, list):
        return [_add(a, b) for a, b in zip(left, right, strict=True)]
    return left + right if isinstance(left, int) else left
