"""The trials of a search in an SQLite file, which several processes may share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from outliermerge.errors import OutlierMergeError
from outliermerge.search.samplers import distribution_of
from outliermerge.search.space import Dimension
from outliermerge.storage.system import lock

TRIALS_NAME = "trials.sqlite"
STUDY = "search"
"""The study's name in the file."""
_OWNER, _REASON = "process", "reason"
_WAIT_SECONDS = 0.1
_BUSY_SECONDS = 120  # that a process waits for another that writes the file


@dataclass(frozen=True)
class Trial:
    """A trial.

    Attributes:
        number: from 1.
        point: its values by the names of dimensions.
        state: `done`, `stopped` (after a part of the questions), `failed` or `running`.
        values: its scores, one for each objective; of a stopped trial none.
        reason: why it failed.
        steps: its score after each part of the questions.
    """

    number: int
    point: Mapping[str, Any]
    state: str
    values: tuple[float, ...] = ()
    reason: str = ""
    steps: tuple[float, ...] = ()


_STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
}


class Running:
    """A trial that this process works on."""

    def __init__(
        self, study: optuna.Study, trial: optuna.Trial, noted: Mapping[int, float]
    ) -> None:
        self._study, self._trial, self._noted = study, trial, noted

    @property
    def number(self) -> int:
        """Its number, from 1."""
        return self._trial.number + 1

    def ask(self, dimension: Dimension) -> Any:
        """Return its value of a dimension."""
        trial, kind = self._trial, distribution_of(dimension)
        if dimension.choices is not None:
            return trial.suggest_categorical(dimension.name, list(dimension.choices))
        if isinstance(kind, optuna.distributions.IntDistribution):
            return trial.suggest_int(dimension.name, kind.low, kind.high, step=kind.step)
        assert isinstance(kind, optuna.distributions.FloatDistribution)
        return trial.suggest_float(
            dimension.name, kind.low, kind.high, step=kind.step, log=kind.log
        )

    def is_hopeless(self, value: float, step: int) -> bool:
        """Note the score after a part of the questions; tell whether to stop."""
        if step not in self._noted:  # by a process that was killed
            self._trial.report(value, step)
        return bool(self._trial.should_prune())

    def done(self, values: Sequence[float]) -> None:
        """Note the scores."""
        self._study.tell(self._trial, list(values))

    def stopped(self) -> None:
        """Note that it was stopped."""
        self._study.tell(self._trial, state=TrialState.PRUNED)

    def failed(self, reason: str) -> None:
        """Note that it has no score."""
        self._trial.set_user_attr(_REASON, reason[:2000])
        self._study.tell(self._trial, state=TrialState.FAIL)


class Trials:
    """The trials of a search.

    Args:
        folder: of the search.
        num_objectives: how many scores a trial has.
    """

    def __init__(self, folder: Path, num_objectives: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._work = folder / "work"
        self._work.mkdir(parents=True, exist_ok=True)
        self._name = uuid.uuid4().hex
        self._own = _locked(self._work / f"{self._name}.process")
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_min_trials=3)
        try:
            with exclusive(self._work / "ask.lock"):
                self._study = optuna.create_study(
                    storage=storage_of(folder),
                    study_name=STUDY,
                    directions=["maximize"] * num_objectives,
                    pruner=pruner,
                    load_if_exists=True,
                )
        except Exception as error:  # of SQLAlchemy, whose errors have no single class
            said = str(error).partition("\n")[0]
            raise OutlierMergeError(f"{folder / TRIALS_NAME}: cannot be used: {said}") from error

    def close(self) -> None:
        """Let go of the file."""
        self._study._storage.remove_session()
        self._own.close()
        with suppress(OSError):
            (self._work / f"{self._name}.process").unlink()

    def all(self) -> list[Trial]:
        """Return all trials by their numbers."""
        return [_plain(trial) for trial in self._study.get_trials(deepcopy=False)]

    def next(
        self, most: int, sampler: BaseSampler, fixed: Mapping[str, Any] | None = None
    ) -> Running | None:
        """Return a trial to work on: one that a killed process left, or a new one.

        Args:
            most: trials that there may be; None is returned when they are all taken.
            sampler: chooses its values.
            fixed: its values, which no sampler chooses.
        """
        self._study.sampler = sampler
        with exclusive(self._work / "ask.lock"):
            trials = self._study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state is TrialState.RUNNING and self._is_left(trial):
                    left = optuna.trial.Trial(self._study, trial._trial_id)
                    return self._taken(left, trial.intermediate_values)
            is_waiting = any(trial.state is TrialState.WAITING for trial in trials)
            if len(trials) >= most and not is_waiting:
                return None
            if fixed is not None and not is_waiting:
                self._study.enqueue_trial(dict(fixed))
            return self._taken(self._study.ask())

    def wait(self) -> None:
        """Wait until no other process works on a trial."""
        while any(
            trial.state is TrialState.RUNNING and not self._is_left(trial)
            for trial in self._study.get_trials(deepcopy=False)
        ):
            time.sleep(_WAIT_SECONDS)

    def _taken(self, trial: optuna.Trial, noted: Mapping[int, float] | None = None) -> Running:
        trial.set_user_attr(_OWNER, self._name)
        return Running(self._study, trial, noted or {})

    def _is_left(self, trial: FrozenTrial) -> bool:
        """Tell whether the process that worked on a trial is gone."""
        owner = trial.user_attrs.get(_OWNER)
        if owner is None or owner == self._name:
            return True
        path = self._work / f"{owner}.process"
        try:
            with path.open("r+") as file:
                if not lock(file.fileno()):
                    return False
        except FileNotFoundError:
            return True
        path.unlink(missing_ok=True)
        return True

    def front(self) -> list[int]:
        """Return the numbers of the trials that no other is better than in all objectives."""
        return [trial.number + 1 for trial in self._study.best_trials]


def _plain(trial: FrozenTrial) -> Trial:
    steps = tuple(value for _, value in sorted(trial.intermediate_values.items()))
    is_done = trial.state is TrialState.COMPLETE
    return Trial(
        number=trial.number + 1,
        point=dict(trial.params),
        state=_STATES[trial.state],
        values=tuple(trial.values) if is_done else (),
        reason=str(trial.user_attrs.get(_REASON, "")),
        steps=steps,
    )


def storage_of(folder: Path) -> optuna.storages.RDBStorage:
    """Return the storage of a search's folder."""
    return optuna.storages.RDBStorage(
        f"sqlite:///{(folder / TRIALS_NAME).absolute()}",
        engine_kwargs={"connect_args": {"timeout": _BUSY_SECONDS}},
    )


def _locked(path: Path) -> IO[str]:
    file = path.open("w")
    lock(file.fileno())
    return file


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time into the block."""
    with path.open("a") as file:
        while not lock(file.fileno()):
            time.sleep(_WAIT_SECONDS)
        yield
