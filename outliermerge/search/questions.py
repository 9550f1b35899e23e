"""Which questions a search asks: a half is held out, and of the other a part tells models apart.

The part is a stratified sample: questions on which the models that are known before the search
differ are asked more often than those on which they agree. The weights undo that. A merge's mean
over the whole half is estimated by the difference estimator of surveys: the known models' mean over
the half, plus the weighted mean of the differences from it where the merge was asked.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from outliermerge.errors import OutlierMergeError, shown
from outliermerge.evaluation.table import pooled_stderr

Answers = Mapping[str, Mapping[str, float]]
"""The score of each question by task; more is better."""

LEAST_QUESTIONS = 4  # of a task: two to search with, and two that are held out
_NUM_STRATA = 3  # of the questions on which models differ
_BY_SIZE = 0.5  # of a sample is shared by the strata's sizes, the rest as Neyman (1934) does
_SHARES = (0.25, 0.5, 1.0)  # of a sample, after which a trial may be stopped


@dataclass(frozen=True)
class Suite:
    """A suite of several.

    Attributes:
        tasks: their names.
        worst, best: the lowest and highest score of the models that are known before the search,
            on the half that is searched. Suites have different units: between these two every
            suite goes from 0 to 1.
    """

    tasks: tuple[str, ...]
    worst: float
    best: float

    def scaled(self, score: float) -> float:
        """Return a score, 0 where the worst of the known models is, 1 where the best is."""
        return (score - self.worst) / (self.best - self.worst)


@dataclass(frozen=True)
class Sample:
    """The questions of a search.

    Attributes:
        asked: by task the questions that each trial is asked, in order, with their weights.
        expected: by task the known models' mean score on each question of the half they are from.
        searched: by task that half.
        held_out: by task the other half, which no trial is asked.
        suites: the suites of several, each with its tasks; each is then an objective.
    """

    asked: Mapping[str, Mapping[str, float]]
    expected: Mapping[str, Mapping[str, float]]
    searched: Mapping[str, Sequence[str]]
    held_out: Mapping[str, Sequence[str]]
    suites: Mapping[str, Suite] = field(default_factory=dict)

    @property
    def num_asked(self) -> int:
        return sum(map(len, self.asked.values()))

    def shares(self) -> list[dict[str, list[str]]]:
        """Return the questions of each step of a trial: a quarter, half, and all."""
        steps = []
        for share in _SHARES:
            step = {}
            for task, weights in self.asked.items():
                step[task] = list(weights)[: math.ceil(share * len(weights))]
            steps.append(step)
        return steps

    def estimate(
        self, answers: Answers, step: Mapping[str, Sequence[str]] | None = None
    ) -> dict[str, float]:
        """Return by task the estimated mean over the half, from the asked questions or a step's."""
        found = {}
        for task, weights in self.asked.items():
            names, expected = weights if step is None else step[task], self.expected[task]
            total = math.fsum(weights[name] for name in names)
            more = (weights[name] * (answers[task][name] - expected[name]) for name in names)
            found[task] = statistics.fmean(expected.values()) + math.fsum(more) / total
        return found

    def objectives(self, tasks: Mapping[str, float]) -> dict[str, float]:
        """Return the objectives of a search from scores by task: tasks, or scaled suites."""
        if not self.suites:
            return dict(tasks)
        return {
            name: suite.scaled(mean({task: tasks[task] for task in suite.tasks}))
            for name, suite in self.suites.items()
        }

    def overall(self, tasks: Mapping[str, float]) -> float:
        """Return the mean over tasks, or over scaled suites."""
        return mean(self.objectives(tasks))

    def stderr(self, errors: Mapping[str, float | None]) -> float | None:
        """Return the standard error of `overall` from those of tasks; None if one is not known."""
        if not self.suites:
            return pooled_stderr(list(errors.values()))
        own = [
            (suite, pooled_stderr([errors[task] for task in suite.tasks]))
            for suite in self.suites.values()
        ]
        return pooled_stderr(
            [None if error is None else error / (suite.best - suite.worst) for suite, error in own]
        )

    def value(self, answers: Answers, step: Mapping[str, Sequence[str]] | None = None) -> float:
        """Return the estimated score of a merge."""
        return self.overall(self.estimate(answers, step))


def sample(
    known: Sequence[Answers], *, number: int, seed: int, suites: Sequence[str] = ()
) -> Sample:
    """Choose the questions of a search.

    Args:
        known: the answers of models that were asked all questions.
        number: how many questions of each task a trial is asked.
        seed: of the order in which questions are taken.
        suites: their names, where there are several; tasks are then called SUITE/TASK.

    Raises:
        OutlierMergeError: a task has too few questions, the models were not asked the same, or a
            suite cannot be scaled.
    """
    asked, expected, searched, held_out = {}, {}, {}, {}
    for task, answers in known[0].items():
        if len(answers) < LEAST_QUESTIONS:
            raise OutlierMergeError(
                f"task {shown(task)} has {len(answers)} questions: a search needs at least "
                f"{LEAST_QUESTIONS}, half of which are held out"
            )
        if any(other.get(task, {}).keys() != answers.keys() for other in known):
            raise OutlierMergeError(
                f"task {shown(task)}: the models were not asked the same questions"
            )
        order = in_order(answers, seed=seed, what=task)
        middle = (len(order) + 1) // 2
        searched[task], held_out[task] = order[:middle], order[middle:]
        own = [one[task] for one in known]
        expected[task] = {
            name: statistics.fmean(one[name] for one in own) for name in searched[task]
        }
        asked[task] = _stratified(searched[task], own, number)
    found = {name: _suite(name, known, searched) for name in suites}
    return Sample(asked, expected, searched, held_out, found)


def _suite(name: str, known: Sequence[Answers], searched: Mapping[str, Sequence[str]]) -> Suite:
    """Return a suite, with the ends of its scale."""
    own = {task: names for task, names in searched.items() if task.startswith(f"{name}/")}
    scores = [mean(mean_of(answers, own)) for answers in known]
    if min(scores) == max(scores):
        raise OutlierMergeError(
            f"suite {shown(name)}: all models that are known before the search score "
            f"{scores[0]:.4g}, so that it cannot be scaled beside the others. Leave it out"
        )
    return Suite(tuple(own), min(scores), max(scores))


def in_order(names: Mapping[str, object] | Sequence[str], *, seed: int, what: str) -> list[str]:
    """Return names in an order that depends on a seed and on nothing else.

    >>> in_order(["a", "b", "c"], seed=0, what="x") == in_order(["c", "b", "a"], seed=0, what="x")
    True
    """
    return sorted(names, key=lambda name: (number_of(seed, what, name), name))


def number_of(seed: int, *names: object) -> int:
    """Return 64 bits that depend on a seed and on names."""
    return int(xxhash.xxh3_64_intdigest(repr((seed, *names)).encode()))


def mean(tasks: Mapping[Any, float]) -> float:
    """Return the mean over tasks."""
    return math.fsum(tasks.values()) / len(tasks)


def mean_of(answers: Answers, names: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return by task the mean over some questions."""
    return {
        task: math.fsum(answers[task][name] for name in own) / len(own)
        for task, own in names.items()
    }


def _stratified(
    names: Sequence[str], known: Sequence[Mapping[str, float]], number: int
) -> dict[str, float]:
    """Return a stratified sample of questions with their weights, every part of it alike."""
    if number >= len(names):
        return dict.fromkeys(names, 1.0)
    spread = {name: statistics.pstdev([one[name] for one in known]) for name in names}
    differing = sorted((name for name in names if spread[name]), key=lambda name: spread[name])
    size = max(1, math.ceil(len(differing) / _NUM_STRATA))
    strata = [differing[start : start + size] for start in range(0, len(differing), size)]
    agreeing = [name for name in names if not spread[name]]
    strata += [agreeing] if agreeing else []
    sizes = _sizes([[spread[name] for name in stratum] for stratum in strata], number)
    weighted = []
    place = {name: index for index, name in enumerate(names)}  # names are in random order
    for stratum, count in zip(strata, sizes, strict=True):
        taken = sorted(stratum, key=place.__getitem__)[:count]
        # Spread evenly, so that each share of the sample has its part of each stratum.
        weighted += [
            ((index + 0.5) / count, name, len(stratum) / count) for index, name in enumerate(taken)
        ]
    return {name: weight for _, name, weight in sorted(weighted)}


def _sizes(strata: Sequence[Sequence[float]], number: int) -> list[int]:
    """Return how many questions of each stratum are taken: half by size, half by size × spread.

    Neyman's shares alone would leave few questions to the stratum on which the known models agree,
    each with a large weight; a merge may differ from all of them there.
    """
    total, spread = sum(map(len, strata)), sum(map(sum, strata))
    wanted = []
    for spreads in strata:
        by_size = len(spreads) / total
        by_spread = sum(spreads) / spread if spread else by_size
        wanted.append(number * (_BY_SIZE * by_size + (1 - _BY_SIZE) * by_spread))
    sizes = [
        min(len(spreads), max(1, round(want))) for spreads, want in zip(strata, wanted, strict=True)
    ]
    # What rounding and small strata leave goes to the strata that have questions left.
    while sum(sizes) != number and number >= len(strata):
        more = 1 if sum(sizes) < number else -1
        open_ = [
            index
            for index, size in enumerate(sizes)
            if (size < len(strata[index]) if more > 0 else size > 1)
        ]
        best = max(open_, key=lambda index: more * (wanted[index] - sizes[index]))
        sizes[best] += more
    return sizes
