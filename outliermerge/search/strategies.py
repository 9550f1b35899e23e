"""What a search tries next: what a sampler draws, a greedy soup, or the parts of task vectors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from outliermerge.errors import SpecError, shown
from outliermerge.planning.plan import Plan
from outliermerge.search.keys import method_of
from outliermerge.search.questions import Sample, mean, mean_of
from outliermerge.search.result import Candidate
from outliermerge.search.space import Ask, Dimension, Space
from outliermerge.search.trials import Trial
from outliermerge.spec.settings import find_layers

STRATEGIES = ("sampler", "greedy-soup", "prune")
_IN, _OUT = "in", "out"
_MOST_GROUPS = 6  # of a stack's layers, each pruned as one


class Strategy(Protocol):
    """Chooses trials.

    Attributes:
        most: trials that there may be.
        in_order: whether a trial depends on the values of all before it.
    """

    most: int
    in_order: bool

    def build(self, spec: Mapping[str, Any], ask: Ask) -> dict[str, Any]:
        """Return the document of a trial."""

    def begin(self, known: Sequence[Candidate], questions: Sample) -> None:
        """Take up what is known before the first trial."""

    def follow(self, trials: Sequence[Trial]) -> Mapping[str, Any] | None:
        """Return the next trial's values, {} where a sampler draws them; None to end."""


@dataclass
class Drawn:
    """Trials that a sampler draws from a space."""

    space: Space
    most: int
    in_order = False

    def build(self, spec: Mapping[str, Any], ask: Ask) -> dict[str, Any]:
        """Return the document of a trial."""
        return self.space.build(spec, ask)

    def begin(self, known: Sequence[Candidate], questions: Sample) -> None:
        """Take up nothing."""

    def follow(self, trials: Sequence[Trial]) -> Mapping[str, Any] | None:
        """Leave it to the sampler."""
        return {}


class GreedySoup:
    """The greedy soup of arXiv 2203.05482: models, best first, each kept if it does no harm.

    Raises:
        SpecError: the spec has no models to choose from.
    """

    in_order = True

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._models = [entry["model"] for entry in spec.get("models", ())]
        if len(self._models) < 2 or "modules" in spec:
            raise SpecError("a greedy soup needs a spec with two or more `models`")
        self.most = len(self._models)
        self._order: list[int] = []

    def build(self, spec: Mapping[str, Any], ask: Ask) -> dict[str, Any]:
        """Return the spec with some of its models."""
        document = copy.deepcopy(dict(spec))
        entries = list(document["models"])
        document["models"] = [
            entry
            for number, entry in enumerate(entries, start=1)
            if ask(Dimension(f"models.{number}", choices={_IN: True, _OUT: False})) == _IN
        ]
        return document

    def begin(self, known: Sequence[Candidate], questions: Sample) -> None:
        """Sort the models by their own scores on the half that is searched."""
        own = {
            candidate.document["models"][0]["model"]: questions.overall(
                mean_of(candidate.answers, questions.searched)
            )
            for candidate in known
            if candidate.kind == "parent"
        }
        if lacking := [model for model in self._models if model not in own]:
            raise SpecError(
                f"a greedy soup needs each model's own score: {shown(lacking[0])} has none"
            )
        numbers = range(1, len(self._models) + 1)
        self._order = sorted(numbers, key=lambda number: -own[self._models[number - 1]])

    def follow(self, trials: Sequence[Trial]) -> Mapping[str, Any] | None:
        """Return the soup so far with the next model."""
        values = _values(trials)
        kept, best = self._order[:1], values[0] if values else -math.inf
        if not values:
            return self._point(kept)
        for index, number in enumerate(self._order[1:], start=1):
            if index >= len(values):
                return self._point([*kept, number])
            if values[index] >= best:
                kept, best = [*kept, number], values[index]
        return None

    def _point(self, kept: Sequence[int]) -> dict[str, str]:
        return {f"models.{number}": _IN if number in kept else _OUT for number in self._order}


class Prune:
    """Leaves out one part of a task vector after the other, where that does no harm.

    A part is a group of layers of one model, or all that is outside its layers; its weight becomes
    0 there.

    Args:
        spec: the document of the spec.
        plan: its plan.
        most: trials that there may be.

    Raises:
        SpecError: the method has no weights of task vectors, or the spec's are by tensor already.
    """

    in_order = True

    def __init__(self, spec: Mapping[str, Any], plan: Plan, most: int) -> None:
        if not spec.get("models") or "modules" in spec:
            raise SpecError("pruning needs a spec with `models`")
        method = method_of(spec)
        weight = method.parameters.get("weight")
        if weight is None or not weight.per_model or method.space == "weight":
            raise SpecError(
                f"pruning needs a method on task vectors with a `weight` of each model, which "
                f"{method.name} is not"
            )
        common = spec.get("parameters", {}).get("weight", weight.default)
        self._weights = [
            entry.get("parameters", {}).get("weight", common) for entry in spec["models"]
        ]
        if any(isinstance(one, (list, dict)) for one in self._weights):
            raise SpecError("pruning needs one number as the `weight` of each model")
        self._groups = _groups([job.name for job in plan.jobs if job.action == "merge"])
        parts = [*self._groups, "the rest"]
        self._names = [
            f"models.{number}[{part}]"
            for number in range(1, len(self._weights) + 1)
            for part in parts
        ]
        self.most = min(most, len(self._names))
        self._start = -math.inf

    def build(self, spec: Mapping[str, Any], ask: Ask) -> dict[str, Any]:
        """Return the spec with weights of 0 where parts are left out."""
        document = copy.deepcopy(dict(spec))
        is_in = {
            name: ask(Dimension(name, choices={_IN: True, _OUT: False})) == _IN
            for name in self._names
        }
        for number, (entry, weight) in enumerate(
            zip(document["models"], self._weights, strict=True), start=1
        ):
            start = f"models.{number}["
            own = {name: kept for name, kept in is_in.items() if name.startswith(start)}
            if all(own.values()):
                continue
            *groups, rest = own.values()
            entries: list[dict[str, Any]] = [
                {"filter": start, "value": weight if kept else 0}
                for kept, starts in zip(groups, self._groups.values(), strict=True)
                for start in starts
            ]
            entries.append({"value": weight if rest else 0})
            entry["parameters"] = {**entry.get("parameters", {}), "weight": entries}
        return document

    def begin(self, known: Sequence[Candidate], questions: Sample) -> None:
        """Begin with the score of the whole merge, on the questions of trials."""
        self._start = questions.value(known[-1].answers)

    def follow(self, trials: Sequence[Trial]) -> Mapping[str, Any] | None:
        """Return what is left so far without the next part."""
        values, away, best = _values(trials), list[str](), self._start
        for name, value in zip(self._names, values, strict=False):
            if value >= best:
                away, best = [*away, name], value
        if len(values) >= self.most:
            return None
        away.append(self._names[len(values)])
        return {name: _OUT if name in away else _IN for name in self._names}


def _values(trials: Sequence[Trial]) -> list[float]:
    """Return the scores of the trials that are over, the worst of all for those that failed."""
    over = [trial for trial in trials if trial.state != "running"]
    return [mean(dict(enumerate(trial.values))) if trial.values else -math.inf for trial in over]


def _groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Return groups of layers that follow one another: what they are called, and their filters."""
    stacks: dict[str, set[int]] = {}
    for layer in find_layers(names).values():
        stacks.setdefault(layer.stack, set()).add(layer.index)
    found = {}
    for stack, indexes in stacks.items():
        ordered = sorted(indexes)
        size = math.ceil(len(ordered) / _MOST_GROUPS)
        for start in range(0, len(ordered), size):
            own = ordered[start : start + size]
            last = f"-{own[-1]}" if len(own) > 1 else ""
            found[f"{stack}{own[0]}{last}"] = [f"{stack}{index}." for index in own]
    return found
