"""The merge of one tensor, block by block, wherever its blocks come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from outliermerge.execution.rounds import Round, Steps
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, Statistic
from outliermerge.methods.task import Task

Span: TypeAlias = tuple[int, int]
NeedKey: TypeAlias = tuple[Statistic, tuple[Any, ...]]
"""A statistic, and the values of the parameters that it depends on."""


def spans(num_elements: int, block_elements: int, *, start: int = 0) -> list[Span]:
    """Return the element ranges of blocks, from start on.

    >>> spans(10, 4)
    [(0, 4), (4, 8), (8, 10)]
    """
    return [
        (first, min(first + block_elements, num_elements))
        for first in range(start, num_elements, block_elements)
    ]


def measure_needs(
    tasks: Sequence[Task],
    measure: Callable[..., dict[NeedKey, Any]],
    *,
    num_elements: int,
    block_elements: int,
    on_pass: Callable[[int], None] = lambda num_elements: None,
) -> Steps[list[dict[str, list[Any]]]]:
    """Measure what methods need to know of a tensor, in as many passes as it takes.

    Args:
        tasks: merges of the same sources; what several need is measured once.
        measure: returns a span's share in each of some `passes`.
        on_pass: called with the number of elements that a pass will read.

    Returns:
        For each task its needs by name, as (nested) lists of numbers.
    """
    keys = [{name: _key(need, task) for name, need in task.method.needs.items()} for task in tasks]
    states: dict[NeedKey, Any] = {
        key: key[0].start(task.num_models, num_elements, task.parameters)
        for task, named in zip(tasks, keys, strict=True)
        for key in named.values()
    }
    aligned = max(CHUNK_ELEMENTS, block_elements // CHUNK_ELEMENTS * CHUNK_ELEMENTS)
    while waiting := {k: state for k, state in states.items() if not isinstance(state, list)}:
        chunks = next(iter(waiting.values())).chunks
        active = {key: state for key, state in waiting.items() if state.chunks == chunks}
        if chunks is None:
            read = spans(num_elements, aligned)
        else:
            read = [(i * CHUNK_ELEMENTS, (i + 1) * CHUNK_ELEMENTS) for i in chunks]
        on_pass(sum(stop - start for start, stop in read))
        shares = yield Round(partial(measure, passes=active), read)
        for share in shares:
            for key, state in active.items():
                state.add(share[key])
        states |= {key: state.finish() for key, state in active.items()}
    return [{name: states[key] for name, key in named.items()} for named in keys]


def _key(need: Statistic, task: Task) -> NeedKey:
    return need, tuple(task.parameters.get(name) for name in need.depends_on)


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
