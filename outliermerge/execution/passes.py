"""Measures the statistics that methods need of whole tensors, in one or several passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

from outliermerge.execution.rounds import Round, Steps
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, Pass, Statistic, scope_of
from outliermerge.methods.task import Task

Span: TypeAlias = tuple[int, int]
NeedKey: TypeAlias = tuple[Statistic, tuple[Any, ...]]
"""A statistic with the values of the parameters, and of the context, that it depends on."""
Measured: TypeAlias = Mapping[NeedKey, list[Any]]
"""Results of statistics, as (nested) lists of numbers."""


class Readable(Protocol):
    """A tensor's sources, as passes read them.

    A pass calls `measure` for every span, in any thread.

    Attributes:
        num_elements: how many elements the tensor has.
        measured_elements: how many are measured at a time; whole rows if it is merged by rows.
    """

    @property
    def num_elements(self) -> int: ...
    @property
    def measured_elements(self) -> int: ...
    def measure(self, span: Span, passes: Mapping[NeedKey, Pass]) -> dict[NeedKey, Any]:
        """Return what a span contributes to each of some passes; called by any thread."""

    def count(self, num_elements: int) -> None:
        """Count the elements that a pass is going to read."""


def spans(num_elements: int, block_elements: int, *, start: int = 0) -> list[Span]:
    """Return the element ranges (start, stop) of blocks.

    >>> spans(10, 4)
    [(0, 4), (4, 8), (8, 10)]
    """
    return [
        (first, min(first + block_elements, num_elements))
        for first in range(start, num_elements, block_elements)
    ]


def needs_of(task: Task, scope: str) -> dict[str, NeedKey]:
    """Return the statistics that a task's method needs of a whole tensor, or of the whole model."""
    return {
        name: (
            need,
            (
                *(task.parameters.get(key) for key in need.depends_on),
                *((task.context,) if getattr(need, "with_context", False) else ()),
            ),
        )
        for name, need in task.method.needs.items()
        if scope_of(need, task.parameters) == scope
    }


def start(need: Statistic, task: Task, num_elements: int) -> Any:
    """Return a statistic's first pass, or its result where none is needed."""
    more: dict[str, Any] = {}
    if getattr(need, "with_context", False):
        more["context"] = task.context
    return need.start(task.num_models, num_elements, task.parameters, **more)


def measure(tasks: Sequence[Task], tensors: Sequence[Readable], scope: str) -> Steps[Measured]:
    """Measure the statistics that methods need of one tensor, or of all tensors of a model.

    Args:
        tasks: merges of the same tensors. A statistic that several need is measured once.
        tensors: in the order in which their contributions are added up.
        scope: `tensor` or `model`.
    """
    num_elements = sum(tensor.num_elements for tensor in tensors)
    states: dict[NeedKey, Any] = {
        key: start(key[0], task, num_elements)
        for task in tasks
        for key in needs_of(task, scope).values()
    }
    while waiting := {k: state for k, state in states.items() if not isinstance(state, list)}:
        first = next(iter(waiting.values()))
        active = {key: state for key, state in waiting.items() if _reads(state) == _reads(first)}
        for tensor in tensors:
            shares = yield Round(partial(tensor.measure, passes=active), _read(tensor, first))
            for share in shares:
                for key, state in active.items():
                    state.add(share[key])
        states |= {key: state.finish() for key, state in active.items()}
    return states


def _reads(state: Pass) -> tuple[Sequence[int] | None, bool]:
    return state.chunks, getattr(state, "by_row", False)


def _read(tensor: Readable, state: Pass) -> list[Span]:
    """Return the spans of a pass: the whole tensor, or some chunks of it."""
    chunks, by_row = _reads(state)
    if by_row:
        found = spans(tensor.num_elements, tensor.measured_elements)
    elif chunks is None:
        step = tensor.measured_elements // CHUNK_ELEMENTS * CHUNK_ELEMENTS
        found = spans(tensor.num_elements, max(CHUNK_ELEMENTS, step))
    else:
        every = spans(tensor.num_elements, CHUNK_ELEMENTS)
        found = [every[number] for number in chunks if number < len(every)]
    tensor.count(sum(stop - start for start, stop in found))
    return found


def fold_reports(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine blocks' reports: add up integers, which are counts; other values are all equal."""
    total: dict[str, Any] = {}
    for report in reports:
        for name, value in report.items():
            total[name] = _add(total[name], value) if name in total else value
    return total


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, list):
        return [_add(a, b) for a, b in zip(left, right, strict=True)]
    return left + right if isinstance(left, int) else left
