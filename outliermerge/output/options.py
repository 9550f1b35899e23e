"""How a merge is carried out: what callers of the library choose."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from outliermerge.arguments import checked, nothing, wrong
from outliermerge.checkpoint.layout import parse_bytes
from outliermerge.execution.threads import (
    Executor,
    choose_device,
    choose_options,
    execute,
    free_bytes,
)
from outliermerge.planning.plan import Options, Plan
from outliermerge.storage.cached_files import DEFAULT_CACHE_BYTES

ENOUGH_BYTES = 1 << 62
"""The memory of machines that are not known: what is too little there is told there."""
_Function = TypeVar("_Function", bound=Callable[..., Any])


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a merge is carried out, for `run` and `sweep`.

    Attributes:
        device: `cpu`, `cuda` (all GPUs), `cuda:N`, or `auto`.
        memory: bytes for blocks and intermediate results, above what the interpreter takes; a
            number, or a text such as "2GiB". By default 1 GiB, and where a tensor needs more, as
            much as all threads need for it, up to three quarters of the free memory.
        threads: worker threads; 0 for the processors at hand. Fewer run where the memory is
            not enough for so many.
        kernels: compute on the CPU by fused kernels; else by torch, as the methods are defined.
        overwrite: replace an existing output when the merge is done.
        fresh: start over instead of going on with a killed run.
        allow_non_finite: go on where values are infinite or NaN, and list them.
        cache_size: most bytes that are kept on the disk, while it runs, of models that are read
            from elsewhere; a number, or a text such as "20GiB".
        load_check: let transformers, where it is installed, prove in another process that it
            loads the output, as the command line does; it takes some seconds beside the merge.
        on_progress: called with the bytes just worked on, by any thread.
        on_waiting: called when all is computed, and the proof of loading or llama.cpp's converter
            is waited for.
        executor: what runs the plan's jobs: threads, or a function that is called like theirs.

    Raises:
        ArgumentError: a value is wrong.

    >>> RunOptions(memory="lots")
    Traceback (most recent call last):
    ...
    outliermerge.errors.ArgumentError: memory: 'lots' is not a size. Write for example 5GB, 500MB \
or 1GiB.
    """

    device: str = "cpu"
    memory: int | str | None = None
    threads: int = 0
    kernels: bool = True
    overwrite: bool = False
    fresh: bool = False
    allow_non_finite: bool = False
    cache_size: int | str = DEFAULT_CACHE_BYTES
    load_check: bool = False
    on_progress: Callable[[int], None] = nothing
    on_waiting: Callable[[], None] = nothing
    executor: Executor = execute

    def __post_init__(self) -> None:
        if self.memory is not None:
            parse_bytes(str(self.memory), "memory")
        parse_bytes(str(self.cache_size), "cache_size")

    @staticmethod
    def of(options: object, changes: Mapping[str, Any]) -> RunOptions:
        """Return options, the default where there are none, with some of them changed.

        Raises:
            ArgumentError: a value is wrong, or the options are none.
        """
        chosen = RunOptions() if options is None else options
        if not isinstance(chosen, RunOptions):
            raise wrong("options", options, "RunOptions(…)")
        return dataclasses.replace(chosen, **changes)

    def on_this_machine(self, *plans: Plan) -> Options:
        """Return the options of plans, with the device, the memory and the threads resolved.

        Raises:
            ArgumentError: one is wrong, or the memory is too little for a tensor of a plan.
        """
        device = choose_device(self.device)
        return self._resolved(device, plans, free_bytes(device))

    def in_parts(self, *plans: Plan, free: int = ENOUGH_BYTES) -> Options:
        """Return the options of plans whose parts are written on other machines.

        The device is taken as it is named, and not looked for here. There each part takes, of what
        is free then, as much as it needs.

        Args:
            free: the memory of a machine; enough for every tensor, if that is not known.

        Raises:
            ArgumentError: an option is wrong, or the memory is too little for a tensor of a plan.
        """
        is_named = self.device.partition(":")[0] == "cuda"
        device = self.device if is_named else choose_device(self.device)
        return self._resolved(device, plans, free)

    def _resolved(self, device: str, plans: Sequence[Plan], free: int | None) -> Options:
        options = choose_options(
            device=device,
            memory=self.memory,
            threads=self.threads,
            kernels=self.kernels,
            allow_non_finite=self.allow_non_finite,
            cache_size=self.cache_size,
            free_bytes=free,
        )
        for plan in plans:
            options = plan.fitted(options)
        return options


def showing_options(function: _Function) -> _Function:
    """Show the fields of `RunOptions` in a function's signature, in place of `**changes`."""
    signature = inspect.signature(function)
    shown = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for field in dataclasses.fields(RunOptions):
        kind, default = inspect.Parameter.KEYWORD_ONLY, field.default
        shown.append(inspect.Parameter(field.name, kind, default=default, annotation=field.type))
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return function
