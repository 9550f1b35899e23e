"""The merge of one tensor, from wherever its blocks come to wherever they go.

    measure what methods need to know of it → prepare each method → merge block by block

Files, memory and another merge differ in the feed that they give to `merge_tensor`, and in the
engine. Threads share the rounds: see rounds.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from outliermerge.execution.passes import Measured, Readable, Span, measure, needs_of
from outliermerge.execution.rounds import Round, Steps
from outliermerge.methods.task import Task

T = TypeVar("T", covariant=True)


class Prepares(Protocol):
    """An engine, as far as the merge of a tensor calls it itself; its feed does the rest."""

    def prepare(self, task: Task, needs: Mapping[str, list[Any]]) -> Any:
        """Return what the merge of a block needs to know of the whole tensor."""


class Feed(Readable, Protocol[T]):
    """A tensor's sources, and where what is merged of them goes."""

    def spans(self) -> list[Span]:
        """Return what threads take at a time in the merge."""

    def merge(self, span: Span, prepared: Sequence[Any]) -> T:
        """Merge a span in each way, put it where it goes, and return what is known of it.

        Args:
            prepared: what the engine has made of each way's needs.
        """


def merge_tensor(
    tasks: Sequence[Task],
    feed: Feed[T],
    engine: Prepares,
    *,
    known: Sequence[Measured] = (),
) -> Steps[tuple[list[dict[str, list[Any]]], list[T]]]:
    """Merge one tensor in one or several ways, which share what is read.

    Args:
        tasks: the ways, of the same sources.
        known: for each way what was measured over the whole model.

    Returns:
        For each way its needs by name, and what the feed returned for its spans, in order.
    """
    measured = yield from measure(tasks, [feed], "tensor")
    needs = [_named(task, "tensor", measured) for task in tasks]
    for own, task, of_model in zip(needs, tasks, known, strict=False):
        own |= _named(task, "model", of_model)
    prepared = [engine.prepare(task, own) for task, own in zip(tasks, needs, strict=True)]
    feed.count(feed.num_elements)
    done: list[T] = yield Round(partial(feed.merge, prepared=prepared), feed.spans())
    return needs, done


def _named(task: Task, scope: str, measured: Measured) -> dict[str, list[Any]]:
    named: Mapping[str, Any] = needs_of(task, scope)
    return {name: measured[key] for name, key in named.items()}
