"""Runs a plan in child processes, each of which does a share of the jobs on one thread."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError
from outliermerge.execution.jobs import JobResult
from outliermerge.execution.threads import Target, execute
from outliermerge.planning.plan import Job, Options


def execute_in_processes(
    targets: Sequence[Target],
    options: Options,
    *,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
    folder: Path | None = None,
) -> None:
    """Run the jobs of plans as `execute` does, in as many processes as there would be threads.

    Children are forked, so that they have the outputs' files open; they write the tensors, and
    this process records each of them.

    Raises:
        OutlierMergeError: as for `execute`; or a process has ended before its jobs.
    """
    execute([replace(target, jobs=()) for target in targets], options, folder=folder)  # the checks
    num_processes = options.threads
    own = replace(options, threads=1, memory_bytes=options.memory_bytes // num_processes)
    context = multiprocessing.get_context("fork")
    children: dict[Connection, Any] = {}
    try:
        for number in range(num_processes):
            shares = [
                replace(
                    target,
                    plan=replace(target.plan, checks=()),
                    jobs=target.jobs[number::num_processes],
                )
                for target in targets
            ]
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_work, args=(theirs, shares, own, folder))
            child.start()
            theirs.close()
            children[ours] = child
        for message in _messages(children):
            match message:
                case int(num_bytes):
                    on_progress(num_bytes)
                case (int(number), Job() as job, JobResult() as result):
                    targets[number].on_result(job, result)
                case Exception() as error:
                    raise error
    finally:
        for connection, child in children.items():
            child.terminate()  # where all went well it has ended
            child.join()
            connection.close()


def _messages(children: dict[Connection, Any]) -> Iterator[Any]:
    """Yield what children send, until each has sent None."""
    working = set(children)
    while working:
        for connection in wait(list(working)):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except EOFError as error:
                number = children[connection].pid
                raise OutlierMergeError(
                    f"worker process {number} was killed. The same command goes on from here."
                ) from error
            if message is None:
                working.remove(connection)
            else:
                yield message


def _work(
    connection: Connection, shares: Sequence[Target], options: Options, folder: Path | None
) -> None:
    def sender(number: int) -> Callable[[Job, JobResult], None]:
        return lambda job, result: connection.send((number, job, result))

    reported = [replace(share, on_result=sender(number)) for number, share in enumerate(shares)]
    try:
        execute(reported, options, on_progress=connection.send, folder=folder)
        connection.send(None)
    except Exception as error:
        connection.send(error)
    connection.close()
    os._exit(0)  # what the parent has open is closed by the parent
