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
from dataclasses import dataclass

import xxhash

from outliermerge.errors import OutlierMergeError, shown

Answers = Mapping[str, Mapping[str, float]]
"""The score of each question by task; more is better."""

LEAST_QUESTIONS = 4  # of a task: two to search with, and two that are held out
_NUM_STRATA = 3  # of the questions on which models differ
_BY_SIZE = 0.5  # of a sample is shared by the strata's sizes, the rest as Neyman (1934) does
_SHARES = (0.25, 0.5, 1.0)  # of a sample, after which a trial may be stopped


@dataclass(frozen=True)
class Sample:
    """The questions of a search.

    Attributes:
        asked: by task the questions that each trial is asked, in order, with their weights.
        expected: by task the known models' mean score on each question of the half they are from.
        searched: by task that half.
        held_out: by task the other half, which no trial is asked.
    """

    asked: Mapping[str, Mapping[str, float]]
    expected: Mapping[str, Mapping[str, float]]
    searched: Mapping[str, Sequence[str]]
    held_out: Mapping[str, Sequence[str]]

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


def sample(known: Sequence[Answers], *, number: int, seed: int) -> Sample:
    """Choose the questions of a search.

    Args:
        known: the answers of models that were asked all questions.
        number: how many questions of each task a trial is asked.
        seed: of the order in which questions are taken.

    Raises:
        OutlierMergeError: a task has too few questions, or the models were not asked the same.
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
    return Sample(asked, expected, searched, held_out)


def in_order(names: Mapping[str, object] | Sequence[str], *, seed: int, what: str) -> list[str]:
    """Return names in an order that depends on a seed and on nothing else.

    >>> in_order(["a", "b", "c"], seed=0, what="x") == in_order(["c", "b", "a"], seed=0, what="x")
    True
    """
    return sorted(names, key=lambda name: (number_of(seed, what, name), name))


def number_of(seed: int, *names: object) -> int:
    """Return 64 bits that depend on a seed and on names."""
    return int(xxhash.xxh3_64_intdigest(repr((seed, *names)).encode()))


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
