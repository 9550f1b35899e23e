"""Runs functions in forks of itself, with inject.c armed; `injection.Driver` starts it.

A line of JSON on the standard input says what to run; the answer is its exit code, the negative
number of the signal that ended it, "hung", or "stopped": then a line is read before it goes on.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

# What commands import when they need it: here, so that no fork has to.
MODULES = (
    *("torch", "safetensors.torch", "numpy", "yaml", "xxhash", "rich.progress"),
    *(
        "outliermerge.cli.main",
        "outliermerge.cli.console",
        "outliermerge.cli.logs",
        *(f"outliermerge.cli.{name}" for name in ("run", "plan", "sweep", "join", "verify", "moe")),
        "outliermerge.cli.extract",
        "outliermerge.extraction.extract",
        "outliermerge.api",
        "outliermerge.search.sweeps",
        "outliermerge.output.parts",
    ),
    *(
        "outliermerge.output.manifest",
        "outliermerge.engines.torch",
        "outliermerge.output.verify_load",
    ),
    *("outliermerge.checkpoint.adapters.adapter", "outliermerge.checkpoint.formats.pytorch_file"),
    "outliermerge.checkpoint.quantized.opened",
    *("outliermerge.execution.routers", "outliermerge.planning.moe", "tokenizers"),
)


def import_all(more: Sequence[str] = ()) -> None:
    """Import what commands import when they need it, so that no fork has to."""
    for name in (*MODULES, *more):
        importlib.import_module(name)


def main(library: str, *modules: str) -> int:
    """Answer the lines until there are no more; a fork exits with what its function returns."""
    import_all(modules)
    inject = ctypes.CDLL(library)  # the one that was preloaded
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                code = _run(inject, wanted)
            except BaseException:
                traceback.print_exc()
                code = 70
            sys.stdout.flush()
            sys.stderr.flush()
            inject.inject_off()
            os._exit(code)  # without torch's farewell, which takes half a second
        print(json.dumps(_wait(child, wanted["limit_seconds"])), flush=True)
    return 0


def _run(inject: ctypes.CDLL, wanted: dict) -> int:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    for number, path in enumerate([os.devnull, *wanted["files"][:2]]):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    faulthandler.enable()
    log = os.open(wanted["files"][2], os.O_WRONLY | os.O_APPEND)
    kinds, number, mode, value, paths = wanted["injection"]
    module, _, name = wanted["call"].partition(":")
    function = getattr(importlib.import_module(module), name)
    texts = [os.fsencode(text) for text in (kinds, mode, paths)]
    if inject.inject_arm(texts[0], ctypes.c_long(number), texts[1], value, texts[2], log):
        raise ValueError(f"inject.c does not know {wanted['injection']}")
    return function(wanted["arguments"])


def _wait(child: int, limit_seconds: float) -> int | str:
    deadline = time.monotonic() + limit_seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if ended and os.WIFSTOPPED(status):
            print(json.dumps("stopped"), flush=True)
            sys.stdin.readline()
            os.kill(child, signal.SIGCONT)
        elif ended:
            return os.waitstatus_to_exitcode(status)
        elif signal.sigtimedwait([signal.SIGCHLD], max(deadline - time.monotonic(), 0)) is None:
            os.kill(child, signal.SIGABRT)  # faulthandler says where its threads are
            os.waitpid(child, 0)
            return "hung"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
