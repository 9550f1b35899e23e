"""How a merge is carried out: what callers of the library choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from outliermerge.errors import suggest
from outliermerge.execution.threads import Executor, choose_options, execute
from outliermerge.planning.plan import Options
from outliermerge.planning.planner import DEFAULT_MEMORY_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a merge is carried out, for `run` and `sweep`.

    Attributes:
        device: `cpu`, `cuda` (all GPUs), `cuda:N`, or `auto`.
        memory: bytes for blocks and intermediate results, above what the interpreter takes; a
            number, or a text such as "2GiB".
        threads: worker threads; 0 for the processors at hand.
        kernels: compute on the CPU by fused kernels; else by torch, as the methods are defined.
        overwrite: replace an existing output when the merge is done.
        fresh: start over instead of going on with a killed run.
        allow_non_finite: go on where values are infinite or NaN, and list them.
        load_check: let transformers, where it is installed, prove in another process that it
            loads the output, as the command line does; it takes some seconds beside the merge.
        on_progress: called with the bytes just worked on, by any thread.
        on_waiting: called when all is computed and only the proof of loading is waited for.
        executor: what runs the plan's jobs: threads, or a function that is called like theirs.
    """

    device: str = "cpu"
    memory: int | str = DEFAULT_MEMORY_BYTES
    threads: int = 0
    kernels: bool = True
    overwrite: bool = False
    fresh: bool = False
    allow_non_finite: bool = False
    load_check: bool = False
    on_progress: Callable[[int], None] = lambda num_bytes: None
    on_waiting: Callable[[], None] = lambda: None
    executor: Executor = execute

    def changed(self, changes: Mapping[str, Any]) -> RunOptions:
        """Return the options with some of them changed.

        Raises:
            TypeError: there is no such option.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise TypeError(f"unexpected argument {name!r}. {suggest(name, known)}")
        return dataclasses.replace(self, **changes)

    def on_this_machine(self) -> Options:
        """Return the options of the plan, with the device, the memory and the threads resolved.

        Raises:
            ArgumentError: one is wrong.
        """
        return choose_options(
            device=self.device,
            memory=self.memory,
            threads=self.threads,
            kernels=self.kernels,
            allow_non_finite=self.allow_non_finite,
        )
