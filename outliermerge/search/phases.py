"""The phases of a search: models that are known before it, trials, and the best of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler

from outliermerge.errors import OutlierMergeError
from outliermerge.search.asking import Answered, Executor, Request
from outliermerge.search.ledger import Ledger
from outliermerge.search.parents import parents_of
from outliermerge.search.questions import Sample, mean_of
from outliermerge.search.result import DEFAULTS, Candidate, Found, make_rows
from outliermerge.search.scorer import Scorer
from outliermerge.search.space import Ask
from outliermerge.search.strategies import Strategy
from outliermerge.search.trials import Running, Trial, Trials, exclusive
from outliermerge.spec.check import MergeSpec

NUM_CONFIRMED = 3
_MOST_FAILURES = 5  # before the first trial with a score


class Listener:
    """Callbacks for events of a search. These do nothing."""

    def asking(self, name: str) -> None:
        """A model that is known before the search is asked all questions."""

    def begun(self, questions: Sample, *, where: str) -> None:
        """The questions are chosen.

        Args:
            where: merges are made, in words.
        """

    def trial(self, trial: Trial, most: int) -> None:
        """A trial is over."""

    def confirming(self, name: str) -> None:
        """A trial is asked the questions that were held out."""


def ask_known(
    spec: MergeSpec,
    executor: Executor,
    ledger: Ledger,
    scorer: Scorer,
    folder: Path,
    listener: Listener,
) -> tuple[list[Candidate], list[str]]:
    """Ask the parents and the spec as it is all questions."""
    parents, notes = dict(parents_of(spec)), list[str]()
    documents = {**parents, DEFAULTS: spec.as_dict()}
    found: dict[str, Candidate] = {}

    def requests() -> Iterator[Request]:
        for name, document in documents.items():
            listener.asking(name)
            yield Request(name, document, (None,), ledger.record(document))

    def take(request: Request, answered: Answered) -> None:
        name, document = request.name, request.document
        if not answered.reason:
            kind = "defaults" if name == DEFAULTS else "parent"
            found[name] = Candidate(name, kind, document, answered.record["answers"])
        elif name == DEFAULTS:
            raise OutlierMergeError(answered.reason)
        else:
            reason = f"it has no scores by itself: {answered.reason}"
            notes.append(f"{name} is not in the table: {reason}")

    with exclusive(folder / "work" / "known.lock"):
        if scorer.learns:
            base = spec.base.reference if spec.base else None
            executor.learn(
                {
                    name: document
                    for name, document in parents.items()
                    if document["models"][0]["model"] != base
                }
            )
        executor.run(requests(), take)
    return [found[name] for name in documents if name in found], notes


class Trying:
    """Turns trials into requests, and notes what comes of them."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        strategy: Strategy,
        trials: Trials,
        ledger: Ledger,
        questions: Sample,
        listener: Listener,
        *,
        apart: bool,
        seconds: float | None,
    ) -> None:
        self._spec, self._strategy, self._trials = spec, strategy, trials
        self._ledger, self._questions, self._listener = ledger, questions, listener
        self._apart, self._seconds = apart, seconds
        shares = questions.shares()
        self._stops_early = not (apart or strategy.in_order)
        self._steps = shares if self._stops_early else shares[-1:]
        self._running: dict[Request, Running] = {}

    def requests(self, sampler: BaseSampler) -> Iterator[Request]:
        """Yield a request for each trial; one is stopped after a part of its questions."""
        strategy, trials = self._strategy, self._trials
        while (values := strategy.follow(trials.all())) is not None:
            if (running := trials.next(strategy.most, sampler, values or None)) is None:
                return
            document = strategy.build(self._spec, running.ask)
            record = self._ledger.record(document)
            bars = trials.bars(len(self._steps))
            request = Request(
                f"trial {running.number}", document, self._steps, record, bars, self._questions,
                self._seconds,
            )  # fmt: skip
            self._running[request] = running
            yield request

    def take(self, request: Request, answered: Answered) -> None:
        """Note what came of a trial."""
        running, questions = self._running.pop(request), self._questions
        if answered.reason:
            running.failed(answered.reason)
        else:
            answers, steps = answered.record["answers"], self._steps[: answered.num_steps]
            if self._stops_early:
                running.scored([questions.value(answers, step) for step in steps])
            if len(steps) < len(self._steps):
                running.stopped()
            elif self._apart:
                objectives = questions.objectives(questions.estimate(answers))
                running.done(list(objectives.values()))
            else:
                running.done([questions.value(answers)])
        everyone = self._trials.all()
        self._listener.trial(everyone[running.number - 1], self._strategy.most)
        _refuse_hopeless(everyone)


def _refuse_hopeless(trials: Sequence[Trial]) -> None:
    """Stop a search of which nothing comes."""
    failed = [trial for trial in trials if trial.state == "failed"]
    if len(failed) >= _MOST_FAILURES and not any(trial.steps or trial.values for trial in trials):
        raise OutlierMergeError(
            f"the first {len(failed)} trials failed. The last of them: {failed[-1].reason}"
        )


def confirm(
    trials: Trials,
    known: Sequence[Candidate],
    spec: Mapping[str, Any],
    strategy: Strategy,
    executor: Executor,
    ledger: Ledger,
    questions: Sample,
    *,
    listener: Listener,
    settings: Mapping[str, Any],
    notes: Sequence[str],
    apart: bool,
) -> Found:
    """Ask the best trials all questions, and choose the winner by those of the search."""
    everyone = trials.all()
    done = sorted((t for t in everyone if t.values), key=lambda t: (-sum(t.values), t.number))
    best: dict[str, tuple[Trial, dict[str, Any]]] = {}
    for trial in done:
        document = strategy.build(spec, _answering(trial.point))
        if len(best) < NUM_CONFIRMED and all(document != other for _, other in best.values()):
            best[f"trial {trial.number}"] = trial, document
    everything = {
        task: [*own, *questions.held_out[task]] for task, own in questions.searched.items()
    }
    candidates: list[Candidate] = []

    def requests() -> Iterator[Request]:
        for name, (_, document) in best.items():
            listener.confirming(name)
            yield Request(name, document, (everything,), ledger.record(document))

    def take(request: Request, answered: Answered) -> None:
        if answered.reason:
            raise OutlierMergeError(f"{request.name}: {answered.reason}")
        trial, document = best[request.name]
        answers = answered.record["answers"]
        candidates.append(Candidate(request.name, "trial", document, answers, trial.point))

    executor.run(requests(), take)
    *parents, defaults = known

    def searched(candidate: Candidate) -> float:
        return questions.overall(mean_of(candidate.answers, questions.searched))

    candidates.sort(key=lambda each: list(best).index(each.name))  # a cluster's come as they may
    candidates.sort(key=searched, reverse=True)
    winner = max([defaults, *candidates], key=searched)
    failed = [trial for trial in everyone if trial.state == "failed"]
    reasons = [f"trial {trial.number} failed: {trial.reason}" for trial in failed[:3]]
    more = [f"{len(failed) - 3} more failed"] if len(failed) > 3 else []
    return Found(
        rows=tuple(make_rows([*parents, defaults, *candidates], questions)),
        best=winner.name,
        document=winner.document,
        checksum=str(ledger.record(winner.document).get("checksum", "")),
        questions={
            task: {
                "asked": len(asked),
                "searched": len(questions.searched[task]),
                "held_out": len(questions.held_out[task]),
            }
            for task, asked in questions.asked.items()
        },
        trials=tuple(everyone),
        front=tuple(trials.front()) if apart else (),
        settings=settings,
        notes=(*notes, *reasons, *more),
        suites=questions.suites,
    )


def _answering(point: Mapping[str, Any]) -> Ask:
    return lambda dimension: point[dimension.name]
