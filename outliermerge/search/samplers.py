"""The samplers of a search, each trial with a seed of its own.

So a search that is killed and resumed tries what it would have tried: what a sampler draws depends
on the search's seed, the trial's number, the parameter and the finished trials, and on nothing that
the process holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from outliermerge.errors import ArgumentError, SpecError, argument
from outliermerge.search.questions import number_of
from outliermerge.search.space import Dimension

SAMPLERS = ("tpe", "cmaes", "nsga2", "grid", "random")
MAX_GRID = 100_000
_MAX_SEED = 1 << 32


class SeededSampler(BaseSampler):
    """Gives each trial a sampler of its own seed.

    Args:
        make: makes a sampler from a seed.
        seed: of the search.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed

    def _of(self, trial: FrozenTrial, *names: str) -> BaseSampler:
        return self._make(number_of(self._seed, trial.number, *names) % _MAX_SEED)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return what is drawn together."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw what is drawn together."""
        sampler = self._of(trial)
        sampler.infer_relative_search_space(study, trial)  # some draw for what they inferred
        return sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one value."""
        sampler = self._of(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Prepare."""
        self._of(trial).before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Note what came of a trial."""
        self._of(trial).after_trial(study, trial, state, values)


class GridSampler(BaseSampler):
    """Takes the points of a grid by the numbers of trials."""

    def __init__(self, points: Sequence[Mapping[str, Any]]) -> None:
        self._points = points

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return nothing: values are taken one by one."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the point's value."""
        return self._points[trial.number % len(self._points)][param_name]


def make_sampler(name: str, seed: int, points: Sequence[Mapping[str, Any]]) -> BaseSampler:
    """Return a sampler by its name; `points` are those of a grid."""
    if name == "grid":
        return GridSampler(points)

    def make(own: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if name == "tpe":
                return optuna.samplers.TPESampler(
                    seed=own, multivariate=True, group=True, constant_liar=True
                )
            if name == "cmaes":
                return optuna.samplers.CmaEsSampler(seed=own)
            if name == "nsga2":
                return optuna.samplers.NSGAIISampler(seed=own, population_size=_POPULATION)
            return optuna.samplers.RandomSampler(seed=own)

    return SeededSampler(make, seed)


_POPULATION = 16  # of a generation of NSGA-II: a search of merges has tens of trials


def check_sampler(name: str, dimensions: Sequence[Sequence[Dimension]]) -> None:
    """Refuse a sampler that cannot search a space.

    Args:
        dimensions: what trials are asked for, for each combination of methods.

    Raises:
        ArgumentError: it cannot.
    """
    if name == "cmaes":
        numbers = min(sum(one.choices is None for one in own) for own in dimensions)
        if numbers < 2:
            raise ArgumentError(
                f"{argument('sampler', name)}: needs at least two ranges to search together, "
                f"found {numbers}. Use {argument('sampler', 'tpe')}"
            )


def grid_points(build: Callable[[Callable[[Dimension], Any]], Any]) -> list[dict[str, Any]]:
    """Return all points of a space: what `build` asks for depends on what it was answered.

    Raises:
        SpecError: a range has no steps, or there are too many points.
    """
    points: list[dict[str, Any]] = []
    begun: list[dict[str, Any]] = [{}]
    while begun:
        point = begun.pop()
        missing: list[Dimension] = []

        def ask(dimension: Dimension) -> Any:
            if dimension.name in point:  # noqa: B023
                return point[dimension.name]  # noqa: B023
            missing.append(dimension)  # noqa: B023
            return dimension.extremes[0]

        build(ask)
        if not missing:
            points.append(point)
            continue
        first = missing[0]
        if not first.points:
            raise SpecError(f"{first.name}: a grid needs a `step` for each range")
        begun += [{**point, first.name: value} for value in reversed(first.points)]
        if len(points) + len(begun) > MAX_GRID:
            raise SpecError(f"the grid has more than {MAX_GRID:,} points")
    return points


def distribution_of(dimension: Dimension) -> BaseDistribution:
    """Return a dimension as Optuna writes it."""
    if dimension.choices is not None:
        return CategoricalDistribution(list(dimension.choices))
    if dimension.is_whole:
        step = int(dimension.step or 1)
        high = int(dimension.points[-1])
        return optuna.distributions.IntDistribution(int(dimension.low), high, step=step)
    top = float(dimension.points[-1]) if dimension.step else dimension.high
    return optuna.distributions.FloatDistribution(
        dimension.low, top, log=dimension.log, step=dimension.step
    )
