"""Tasks on a Ray cluster: placed, waited for, and given again where one is lost.

Ray itself retries nothing, so that each try is counted here. Nothing is kept in Ray.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from outliermerge.errors import ArgumentError, OutlierMergeError, argument, shown
from outliermerge.output.journal import BusyError
from outliermerge.output.options import ENOUGH_BYTES, RunOptions
from outliermerge.planning.plan import Options, Plan

_POLL_SECONDS, _BUSY_SECONDS = 0.5, 5
_END_SECONDS = 10  # for tasks that are cancelled
_NUM_CPUS = 4  # of a task, where the threads are not given
_MOST_LOSSES = 10
_RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}  # their names on a machine
_logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)
Needs = Mapping[str, float]
"""What a task asks Ray for: `num_cpus`, `num_gpus` and `memory`."""


@dataclass(frozen=True)
class _Outcome:
    """What became of a task.

    Attributes:
        value: what the function returned.
        busy: why another process is doing the same.
        error: the kind and the text of an error that would come again.
    """

    value: Any = None
    busy: str = ""
    error: tuple[str, str] | None = None


class Tasks(Generic[Key]):
    """Calls a function for several keys, each as a task on the cluster, in the driver's folder.

    Args:
        function: is called with `shared` and a key. It may be called for a key again.
        shared: what it needs besides; it is sent to the cluster once.
        needs: what each task asks Ray for.
        name: what the task of a key is called in messages.
        has_progressed: tells whether a task has done something since this was asked last: then its
            losses are counted from the beginning.
        on_wait: called about twice a second.
        place: returns the machine, as `machines` returns them, on which the task of a key should
            run; "" for any.
        most_losses: of one task, without progress in between.
        on_lost: called with a key whose task was lost more often, and why, in place of an error;
            the others go on.
    """

    def __init__(
        self,
        function: Callable[[Any, Key], Any],
        shared: Any,
        needs: Needs,
        *,
        name: Callable[[Key], str],
        has_progressed: Callable[[Key], bool],
        on_wait: Callable[[], None],
        place: Callable[[Key], str] = lambda key: "",
        most_losses: int = _MOST_LOSSES,
        on_lost: Callable[[Key, str], None] | None = None,
    ) -> None:
        import ray

        self._task = ray.remote(max_retries=0, **needs)(_called)
        self._shared = ray.put((function, shared, Path.cwd()))
        self._name, self._has_progressed, self._on_wait = name, has_progressed, on_wait
        self._place, self._most_losses, self._on_lost = place, most_losses, on_lost
        self._losses = Counter[Key]()

    def run(
        self,
        keys: Iterable[Key],
        take: Callable[[Key, Any], str],
        *,
        at_once: int | None = None,
    ) -> None:
        """Carry out tasks.

        Args:
            keys: the next ones are asked for when their tasks can be given.
            take: called with each key and what the function returned, as they come; returns why
                the task is to be done again, "" if it is well.
            at_once: most tasks that are given at the same time; None for all.

        Raises:
            OutlierMergeError: a task fails, or is lost too often.
        """
        import ray

        waiting, pending = iter(keys), dict[Any, Key]()
        try:
            while True:
                free = None if at_once is None else at_once - len(pending)
                for key in islice(waiting, free):
                    pending[self._start(key)] = key
                if not pending:
                    break
                ready, _ = ray.wait(list(pending), num_returns=1, timeout=_POLL_SECONDS)
                self._on_wait()
                for reference in ready:
                    key = pending.pop(reference)
                    if why := self._why_again(key, reference, take):
                        if self.count_loss(key, why):
                            pending[self._start(key)] = key
            self._on_wait()
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)
            if pending:  # until they have ended, they would keep another run from their parts
                ray.wait(list(pending), num_returns=len(pending), timeout=_END_SECONDS)

    def _start(self, key: Key) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        machine, task = self._place(key), self._task
        if machine:  # soft: it runs elsewhere if that one is gone
            strategy = NodeAffinitySchedulingStrategy(machine, soft=True)
            task = task.options(scheduling_strategy=strategy)
        return task.remote(self._shared, key)

    def _why_again(self, key: Key, reference: Any, take: Callable[[Key, Any], str]) -> str:
        """Return why a task that has ended is to be done again; "" if it is done."""
        import ray

        what = self._name(key)
        try:
            outcome: _Outcome = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            reason = shown(str(error.cause).partition("\n")[0], 500)
            raise OutlierMergeError(f"{what} failed on the cluster: {reason}") from error
        except ray.exceptions.RayError as error:  # of the worker, its machine or the cluster
            return f"{what} was lost: {type(error).__name__}"
        if outcome.error is not None:
            kind, text = outcome.error
            raise (ArgumentError if kind == "ArgumentError" else OutlierMergeError)(text)
        return outcome.busy or take(key, outcome.value)

    def count_loss(self, key: Key, why: str) -> bool:
        """Count that the work of a task is lost; tell whether to give it again.

        Raises:
            OutlierMergeError: it was lost too often, with no progress in between.
        """
        if self._has_progressed(key):
            self._losses[key] = 0
        self._losses[key] += 1
        if self._losses[key] > self._most_losses:
            if self._on_lost is not None:
                self._on_lost(key, why)
                return False
            raise OutlierMergeError(
                f"{why}, {self._most_losses} times without a tensor written in between. The same "
                "command goes on from here."
            )
        _logger.warning("%s; it goes on", why)
        return True


def _called(sent: tuple[Callable[[Any, Any], Any], Any, Path], key: Any) -> _Outcome:
    """Call the function of a task; this is what a worker of the cluster runs."""
    function, shared, here = sent
    try:
        os.chdir(here)
    except OSError as error:
        text = f"{here}: is not on machine {os.uname().nodename}: {error.strerror}. All machines "
        return _Outcome(error=("", text + "of the cluster must share it."))
    try:
        return _Outcome(function(shared, key))
    except BusyError as error:  # by a task that was taken for lost; it may be about to end
        time.sleep(_BUSY_SECONDS)
        return _Outcome(busy=error.marked)
    except OutlierMergeError as error:  # its class may not survive pickling
        return _Outcome(error=(type(error).__name__, error.marked))


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster, unless this process is connected already.

    Raises:
        OutlierMergeError: there is none at the address.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = str(error).partition("\n")[0]
        raise OutlierMergeError(
            f"{argument('address', address)}: no Ray cluster can be reached: {shown(reason, 300)}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _alive() -> dict[str, dict[str, float]]:
    """Return the resources of each machine of the cluster."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def this_machine() -> str:
    """Return the machine on which a task runs."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def machines(needs: Needs) -> list[str]:
    """Return the machines on which a task can run, in an order that stays."""
    return sorted(machine for machine, has in _alive().items() if _num_fitting(has, needs))


def memory_of_machines(needs: Needs) -> list[int]:
    """Return how much memory those machines have on which a task can run that needs other things.

    A machine without a limit on memory is left out.
    """
    alive = _alive().values()
    return [int(has["memory"]) for has in alive if "memory" in has and _num_fitting(has, needs)]


def fitting_options(chosen: RunOptions, plans: Sequence[Plan], needs: Needs) -> Options:
    """Return the options of a part, of which as many machines as possible have the memory.

    Args:
        needs: what its task asks Ray for besides.

    Raises:
        ArgumentError: an option is wrong, or no machine has the memory for a tensor.
    """
    # Where there is no machine, the cluster may start some that are large enough.
    *smaller, largest = sorted({*memory_of_machines(needs)}) or [ENOUGH_BYTES]
    for size in smaller:
        with suppress(ArgumentError):
            return chosen.in_parts(*plans, free=size)
    return chosen.in_parts(*plans, free=largest)


def _num_fitting(has: Mapping[str, float], needs: Needs) -> int:
    """Return how many tasks a machine can run at the same time."""
    wanted = {_RESOURCES[key]: value for key, value in needs.items() if value}
    return int(min(has.get(name, 0) // value for name, value in wanted.items()))


def usual_cpus() -> int:
    """Return the CPUs of a task: a few, or all of the smallest machine."""
    sizes = [int(node.get("CPU", 0)) for node in _alive().values()]
    return max(1, min([_NUM_CPUS, *filter(None, sizes)]))


def has_gpus() -> bool:
    """Tell whether a machine of the cluster has a GPU."""
    return any(node.get("GPU") for node in _alive().values())


def num_at_once(needs: Needs) -> int:
    """Return how many tasks can run at the same time, at least 1."""
    fitting = sum(_num_fitting(has, needs) for has in _alive().values())
    if not fitting:
        said = ", ".join(f"{_RESOURCES[key]} {value:,}" for key, value in needs.items() if value)
        _logger.warning("no machine of the cluster has what a task asks for now (%s)", said)
    return max(1, fitting)
