"""Searches on a Ray cluster: each request is a task, which merges and scores on its machine.

What trials there are, and what was answered, is kept by the driver alone. A task keeps nothing: it
merges, starts what scores, answers, and ends both. A trial whose worker or machine is lost is asked
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outliermerge.optional import require_ray
from outliermerge.output.cluster import Tasks, connected, has_gpus, num_at_once, usual_cpus
from outliermerge.output.options import RunOptions
from outliermerge.planning.plan import Plan
from outliermerge.search.asking import Answered, Bench, Request, Take
from outliermerge.search.ledger import Ledger
from outliermerge.search.scorer import Scorer
from outliermerge.search.workplace import Workplace

_PROGRAM_BYTES = 1_000_000_000  # of the interpreter, torch and a harness
_LOADED = 3  # times a merge's bytes: itself, and the model loaded from it, in float32 on a CPU
_MOST_LOSSES = 2  # of a request, before it counts as failed


@dataclass(frozen=True)
class Cluster:
    """Where a search places its tasks.

    Attributes:
        make: makes the scorer, on any machine, from a folder for its files.
        address: of the cluster; without one Ray looks for a running one, or starts one here.
        jobs: most trials at the same time; None for as many as fit.
    """

    make: Callable[[Path], Scorer]
    address: str | None = None
    jobs: int | None = None


@dataclass(frozen=True)
class _Bench:
    """What a task needs to merge and score."""

    make: Callable[[Path], Scorer]
    options: RunOptions
    work: Path


class OnRay:
    """Answers requests on the machines of a cluster.

    Args:
        cluster: where it is.
        ledger: keeps what is answered.
        planned: a plan like those of the requests.
        chosen: how merges are carried out; `threads` are those of a task, and the CPUs that it asks
            Ray for.
        work: the folder for merges that do not fit in memory, and for logs.
        device: of what scores.
    """

    def __init__(
        self,
        cluster: Cluster,
        ledger: Ledger,
        planned: Plan,
        chosen: RunOptions,
        work: Path,
        device: str,
    ) -> None:
        require_ray("executor ray")
        self._cluster, self._ledger, self._planned = cluster, ledger, planned
        self._chosen, self._work, self._device = chosen, work, device
        self._stack = ExitStack()

    def __enter__(self) -> OnRay:
        self._stack.enter_context(connected(self._cluster.address))
        devices = {self._chosen.device, self._device}
        on_gpus = any(name.startswith("cuda") for name in devices)
        on_gpus |= "auto" in devices and has_gpus()
        num_cpus = self._chosen.threads or usual_cpus()
        options = replace(self._chosen, threads=num_cpus)
        memory = self._planned.peak_memory_bytes(options.in_parts(self._planned))
        memory += _PROGRAM_BYTES
        self._needs = {
            "num_cpus": num_cpus,
            "num_gpus": int(on_gpus),
            "memory": memory + _LOADED * self._planned.num_written_bytes,
        }
        self._bench = _Bench(self._cluster.make, options, self._work)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def learn(self, parents: Mapping[str, Mapping[str, Any]]) -> None:
        """Have a task show the parents to the scorer; further tasks get it as it is then."""

        def take(key: int, scorer: Scorer) -> str:
            self._bench = replace(self._bench, make=_Learned(scorer))
            return ""

        Tasks[int](
            _learn,
            (self._bench, parents),
            self._needs,
            name=lambda key: "the parents",
            has_progressed=lambda key: False,
            on_wait=_nothing,
        ).run([0], take)

    def run(self, requests: Iterable[Request], take: Take, *, in_order: bool = False) -> None:
        """Answer requests, as many at the same time as there is room for."""

        def taken(request: Request, answered: Answered) -> str:
            if answered.record != request.record:
                self._ledger.put(request.document, answered.record)
            take(request, answered)
            return ""

        def lost(request: Request, why: str) -> None:
            reason = f"{why}, as it was {_MOST_LOSSES} times before"
            take(request, Answered(request.record, reason=reason))

        at_once = 1 if in_order else self._cluster.jobs or num_at_once(self._needs)
        Tasks[Request](
            _answer,
            self._bench,
            self._needs,
            name=lambda request: request.name,
            has_progressed=lambda request: False,
            on_wait=_nothing,
            most_losses=_MOST_LOSSES,
            on_lost=lost,
        ).run(requests, taken, at_once=at_once)

    def where(self, plan: Plan) -> str:
        """Say where merges are made."""
        return "on the cluster"


@dataclass(frozen=True)
class _Learned:
    """Gives a scorer that has learned from the parents."""

    scorer: Scorer

    def __call__(self, folder: Path) -> Scorer:
        return self.scorer


def _nothing() -> None:
    """Do nothing while tasks run."""


def _learn(shared: tuple[_Bench, Mapping[str, Mapping[str, Any]]], key: int) -> Scorer:
    """Show the parents to a scorer, on a machine of the cluster."""
    bench, parents = shared
    with closing(bench.make(bench.work)) as scorer, Workplace(bench.work, bench.options) as place:
        Bench(place, scorer).learn(parents)
        return scorer


def _answer(bench: _Bench, request: Request) -> Answered:
    """Answer a request on a machine of the cluster."""
    with closing(bench.make(bench.work)) as scorer, Workplace(bench.work, bench.options) as place:
        return Bench(place, scorer).answer(request, lambda document, record: None)
