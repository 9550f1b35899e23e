"""What a search asks of merges, and how a machine answers: it merges, and has the merge scored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from outliermerge.api import plan
from outliermerge.errors import OutlierMergeError
from outliermerge.planning.plan import Plan
from outliermerge.search.ledger import Ledger, Questions, Record, key_of
from outliermerge.search.process import LateError
from outliermerge.search.questions import Sample
from outliermerge.search.scorer import Scorer
from outliermerge.search.workplace import Merged, Workplace


@dataclass(frozen=True, eq=False)
class Request:
    """Questions to a merge.

    Attributes:
        name: what is asked, for messages.
        document: its spec.
        steps: the questions by task, asked one step after the other; None for all that there are.
        record: what the ledger has of it.
        bars: for each step the score below which no further one is asked; None for none.
        sample: what scores are estimated by.
        seconds: that merging and scoring may take; None for as long as they take.
    """

    name: str
    document: Mapping[str, Any]
    steps: Sequence[Questions | None]
    record: Record
    bars: Sequence[float | None] = (None,)
    sample: Sample | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Answered:
    """What came of a request.

    Attributes:
        record: what the ledger now has of the merge.
        num_steps: how many steps were asked.
        reason: why it could not be merged or scored; empty if it could.
    """

    record: Record = field(default_factory=dict)
    num_steps: int = 0
    reason: str = ""


class Bench:
    """Merges specs in a workplace, and has them scored.

    Args:
        workplace: where merges are made.
        scorer: scores them.
    """

    def __init__(self, workplace: Workplace, scorer: Scorer) -> None:
        self._workplace, self._scorer = workplace, scorer
        self._here: tuple[str, Merged] | None = None

    def learn(self, parents: Mapping[str, Mapping[str, Any]]) -> None:
        """Show the parents to the scorer."""
        for name, document in parents.items():
            self._scorer.learn(name, self._merge(document))

    def answer(
        self, request: Request, keep: Callable[[Mapping[str, Any], Record], None]
    ) -> Answered:
        """Answer a request, step by step.

        Args:
            keep: called with the spec and its record after each step that was asked.
        """
        record, best, deadline = request.record, -math.inf, None
        try:
            if request.seconds is not None:
                self._scorer.start()
                deadline = time.monotonic() + request.seconds
            for number, (step, bar) in enumerate(zip(request.steps, request.bars, strict=True)):
                asked = self._ask(request.document, record, step, deadline)
                if asked is not record:
                    keep(request.document, asked)
                record = asked
                if bar is not None and request.sample is not None:
                    best = max(best, request.sample.value(record["answers"], step))
                    if best < bar:
                        return Answered(record, number + 1)
        except LateError:
            said = f"it took longer than {request.seconds:g} seconds, and was stopped"
            return Answered(record, reason=said)
        except OutlierMergeError as error:
            return Answered(record, reason=error.marked)
        return Answered(record, len(request.steps))

    def _ask(
        self,
        document: Mapping[str, Any],
        record: Record,
        questions: Questions | None,
        deadline: float | None,
    ) -> Record:
        """Return the record of a merge that was asked some questions, if it was not before."""
        answers = {task: dict(own) for task, own in record.get("answers", {}).items()}
        if questions is None and record.get("is_whole"):
            return record
        lacking: dict[str, list[str]] = {}
        for task, own in (questions or {}).items():
            if new := [name for name in own if name not in answers.get(task, ())]:
                lacking[task] = new
        if questions is not None and not lacking:
            return record
        merged = self._merge(document)
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        for task, scores in self._scorer.score(merged, lacking or None, seconds).items():
            answers.setdefault(task, {}).update(scores)
        return {
            "spec": dict(document),
            "checksum": merged.checksum,
            "answers": answers,
            "is_whole": questions is None or record.get("is_whole", False),
        }

    def _merge(self, document: Mapping[str, Any]) -> Merged:
        """Make a spec's merge, if it is not the one that is there."""
        key = key_of(document)
        if self._here is None or self._here[0] != key:
            self._here = None
            self._here = key, self._workplace.merge(plan(dict(document)))
        return self._here[1]


Take = Callable[[Request, Answered], None]


class Executor(Protocol):
    """Answers requests, here or elsewhere; what is answered is in the ledger."""

    def learn(self, parents: Mapping[str, Mapping[str, Any]]) -> None:
        """Show the parents to the scorer, if it is one that learns."""

    def run(self, requests: Iterable[Request], take: Take, *, in_order: bool = False) -> None:
        """Answer requests, each asked for when it can be worked on.

        Args:
            take: called with each request and its answer, as they come.
            in_order: the next request is asked for when the one before was taken.
        """

    def where(self, plan: Plan) -> str:
        """Say where the merges of plans like this one are made."""


class Here:
    """Answers requests in this process.

    Args:
        ledger: keeps what is answered.
        workplace: where merges are made.
        scorer: scores them.
    """

    def __init__(self, ledger: Ledger, workplace: Workplace, scorer: Scorer) -> None:
        self._ledger, self._workplace = ledger, workplace
        self._bench = Bench(workplace, scorer)

    def learn(self, parents: Mapping[str, Mapping[str, Any]]) -> None:
        """Show the parents to the scorer."""
        self._bench.learn(parents)

    def run(self, requests: Iterable[Request], take: Take, *, in_order: bool = False) -> None:
        """Answer requests one after the other."""
        for request in requests:
            take(request, self._bench.answer(request, self._ledger.put))

    def where(self, plan: Plan) -> str:
        """Say where merges are made."""
        return "in memory" if self._workplace.is_in_memory(plan) else "on the disk"
