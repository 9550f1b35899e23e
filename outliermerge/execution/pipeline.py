"""The merge of one tensor, wherever its blocks come from and go to.

    measure what methods need to know of it → prepare each method → merge block by block

Merges of files, of tensors in memory and of other merges differ only in the feed that they give to
`merge_tensor`, and in the engine. Threads share the rounds: see rounds.py.
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
    """The part of an engine that `merge_tensor` calls itself; the feed calls the rest."""

    def prepare(self, task: Task, needs: Mapping[str, list[Any]], wholes: Mapping[str, Any]) -> Any:
        """Return what the merge of a block needs, from the statistics of the whole tensor."""


class Feed(Readable, Protocol[T]):
    """A tensor's sources, and where the merged blocks go."""

    def wholes(self, task: Task) -> Mapping[str, Any]:
        """Return what the method takes whole, by its keywords."""

    def spans(self) -> list[Span]:
        """Return the spans of the merge; a thread works on one at a time."""

    def merge(self, span: Span, prepared: Sequence[Any]) -> T:
        """Merge a span for each task, deliver the result, and return a record of it.

        Args:
            prepared: for each task, what the engine's `prepare` returned.
        """


def merge_tensor(
    tasks: Sequence[Task],
    feed: Feed[T],
    engine: Prepares,
    *,
    known: Sequence[Measured] = (),
) -> Steps[tuple[list[dict[str, list[Any]]], list[T]]]:
    """Merge one tensor in one or several ways, reading its sources once for all.

    Args:
        tasks: the ways to merge; all have the same sources.
        known: for each task the statistics that were measured over the whole model.

    Returns:
        For each task its needs by name, and the feed's records of its spans, in order.
    """
    measured = yield from measure(tasks, [feed], "tensor")
    needs = [_named(task, "tensor", measured) for task in tasks]
    for own, task, of_model in zip(needs, tasks, known, strict=False):
        own |= _named(task, "model", of_model)
    prepared = [
        engine.prepare(task, own, feed.wholes(task)) for task, own in zip(tasks, needs, strict=True)
    ]
    feed.count(feed.num_elements)
    done: list[T] = yield Round(partial(feed.merge, prepared=prepared), feed.spans())
    return [{name: list(value) for name, value in own.items()} for own in needs], done


def _named(task: Task, scope: str, measured: Measured) -> dict[str, list[Any]]:
    named: Mapping[str, Any] = needs_of(task, scope)
    return {name: measured[key] for name, key in named.items()}
