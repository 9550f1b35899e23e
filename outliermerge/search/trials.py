"""The trials of a search in an SQLite file, which several processes may share."""

from __future__ import annotations

import errno
import sqlite3
import statistics
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.exceptions import OptunaError
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from outliermerge.errors import OutlierMergeError, shown
from outliermerge.search.samplers import distribution_of
from outliermerge.search.space import Dimension
from outliermerge.storage.failures import failure
from outliermerge.storage.system import lock

TRIALS_NAME = "trials.sqlite"
STUDY = "search"
"""The study's name in the file."""
# Of the database, and of values in it that are not what was written.
_ERRORS = (SQLAlchemyError, sqlite3.Error, OptunaError, ValueError, KeyError)
_OWNER, _REASON, _TAKEN = "process", "reason", "taken"
_WAIT_SECONDS = 0.1
_BUSY_SECONDS = 120  # that a process waits for another that writes the file
_MOST_TAKEN = 3  # times that a trial is begun
_LEAST_DONE = 5  # trials before one is stopped after a part of its questions


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
    """A trial that this process works on.

    Attributes:
        number: from 1.
    """

    def __init__(self, trials: Trials, trial: optuna.Trial, noted: Mapping[int, float]) -> None:
        self._trials, self._trial, self._noted = trials, trial, noted
        self.number = trial.number + 1

    def ask(self, dimension: Dimension) -> Any:
        """Return its value of a dimension."""
        trial, kind = self._trial, distribution_of(dimension)
        with self._trials.using():
            if dimension.choices is not None:
                return trial.suggest_categorical(dimension.name, list(dimension.choices))
            if isinstance(kind, optuna.distributions.IntDistribution):
                return trial.suggest_int(dimension.name, kind.low, kind.high, step=kind.step)
            assert isinstance(kind, optuna.distributions.FloatDistribution)
            return trial.suggest_float(
                dimension.name, kind.low, kind.high, step=kind.step, log=kind.log
            )

    def scored(self, values: Sequence[float]) -> None:
        """Note the scores after each part of the questions."""
        with self._trials.using():
            for step, value in enumerate(values):
                if step not in self._noted:  # by a process that was killed
                    self._trial.report(value, step)

    def done(self, values: Sequence[float]) -> None:
        """Note the scores."""
        self._tell(values=list(values))

    def stopped(self) -> None:
        """Note that it was stopped."""
        self._tell(state=TrialState.PRUNED)

    def failed(self, reason: str) -> None:
        """Note that it has no score."""
        with self._trials.using():
            self._trial.set_user_attr(_REASON, reason[:2000])
        self._tell(state=TrialState.FAIL)

    def left(self) -> None:
        """Note that its process ends without an answer, and is not killed by it."""
        with suppress(OutlierMergeError), self._trials.using():
            self._trial.set_user_attr(_TAKEN, self._trial.user_attrs.get(_TAKEN, 1) - 1)

    def _tell(self, **told: Any) -> None:
        with self._trials.using():
            self._trials.study.tell(self._trial, **told)
        self._trials.at_work.pop(self.number, None)


class Trials:
    """The trials of a search.

    Args:
        folder: of the search.
        num_objectives: how many scores a trial has.

    Attributes:
        study: Optuna's.
        at_work: by number the trials that this process works on.

    Raises:
        OutlierMergeError: the file cannot be used; so do all methods.
    """

    def __init__(self, folder: Path, num_objectives: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._path, self._work = folder / TRIALS_NAME, folder / "work"
        self._work.mkdir(parents=True, exist_ok=True)
        self._name = uuid.uuid4().hex
        self.at_work: dict[int, Running] = {}
        with self.using(), exclusive(self._work / "ask.lock"):
            self.study = optuna.create_study(
                storage=storage_of(folder),
                study_name=STUDY,
                directions=["maximize"] * num_objectives,
                load_if_exists=True,
            )
        self._own = _locked(self._work / f"{self._name}.process")

    @contextmanager
    def using(self) -> Iterator[None]:
        """Say in one message why the file cannot be used."""
        try:
            yield
        except OutlierMergeError:
            raise
        except _ERRORS as error:
            cause: BaseException = error
            while (under := cause.__cause__ or cause.__context__) is not None:
                cause = under  # Optuna says no more than that it failed
            said = str(cause).partition("\n")[0]
            if "disk is full" in said:
                raise failure(
                    self._path, "written", OSError(errno.ENOSPC, "", str(self._path))
                ) from error
            raise OutlierMergeError(
                f"{self._path}: cannot be used: {shown(said, 300)}. If it is damaged, remove it: "
                "what merges have scored is kept in `scores`, and trials are made again from that"
            ) from error

    def close(self) -> None:
        """Let go of the file."""
        for running in self.at_work.values():
            running.left()
        self.study._storage.remove_session()
        self._own.close()
        with suppress(OSError):
            (self._work / f"{self._name}.process").unlink()

    def all(self) -> list[Trial]:
        """Return all trials by their numbers."""
        with self.using():
            return [_plain(trial) for trial in self.study.get_trials(deepcopy=False)]

    def next(
        self, most: int, sampler: BaseSampler, fixed: Mapping[str, Any] | None = None
    ) -> Running | None:
        """Return a trial to work on: one that a killed process left, or a new one.

        Args:
            most: trials that there may be; None is returned when they are all taken.
            sampler: chooses its values.
            fixed: its values, which no sampler chooses.
        """
        with self.using(), exclusive(self._work / "ask.lock"):
            self.study.sampler = sampler
            trials = self.study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state is not TrialState.RUNNING or not self._is_left(trial):
                    continue
                left = optuna.trial.Trial(self.study, trial._trial_id)
                running = self._taken(left, trial.intermediate_values)
                if left.user_attrs[_TAKEN] <= _MOST_TAKEN:
                    return running
                running.failed(f"{_MOST_TAKEN} processes were killed while they worked on it")
            is_waiting = any(trial.state is TrialState.WAITING for trial in trials)
            if len(trials) >= most and not is_waiting:
                return None
            if fixed is not None and not is_waiting:
                self.study.enqueue_trial(dict(fixed))
            return self._taken(self.study.ask())

    def bars(self, num_steps: int) -> list[float | None]:
        """Return for each step of a trial the score below which it is stopped; None for none.

        It is the median of the trials that are done, of their scores after the same step.
        """
        with self.using():
            done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        found: list[float | None] = []
        for step in range(num_steps - 1):
            values = [own[step] for trial in done if step in (own := trial.intermediate_values)]
            found.append(statistics.median(values) if len(values) >= _LEAST_DONE else None)
        return [*found, None]

    def wait(self) -> None:
        """Wait until no other process works on a trial."""
        while True:
            with self.using():
                trials = self.study.get_trials(deepcopy=False)
            if not any(
                trial.state is TrialState.RUNNING and not self._is_left(trial) for trial in trials
            ):
                return
            time.sleep(_WAIT_SECONDS)

    def _taken(self, trial: optuna.Trial, noted: Mapping[int, float] | None = None) -> Running:
        trial.set_user_attr(_OWNER, self._name)
        trial.set_user_attr(_TAKEN, trial.user_attrs.get(_TAKEN, 0) + 1)
        running = self.at_work[trial.number + 1] = Running(self, trial, noted or {})
        return running

    def _is_left(self, trial: FrozenTrial) -> bool:
        """Tell whether the process that worked on a trial is gone."""
        owner = trial.user_attrs.get(_OWNER)
        if owner is None or owner == self._name:
            return trial.number + 1 not in self.at_work
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
        with self.using():
            return [trial.number + 1 for trial in self.study.best_trials]


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
    path = (folder / TRIALS_NAME).absolute()  # in an address, some signs of it would be special
    return optuna.storages.RDBStorage(
        f"sqlite:///{TRIALS_NAME}",
        engine_kwargs={
            "creator": lambda: sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
        },
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
