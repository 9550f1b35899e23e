"""Runs commands with failures at chosen calls: `inject.c`, built once, and what arms it.

`run_command` starts a program of its own. `Driver` runs the command line in forks of one process
that has imported everything: a hundredth of a second each, so that every call can be tried.

    with Driver(tmp_path) as driver:
        for call in driver.calls(["run", …], paths=[output]):
            done = driver.run(["run", …], Injection("kill_after", call.number, paths=[output]))
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT_SECONDS = 240  # a hang, however busy the machine is
HUNG = "hung"


@cache
def library() -> Path:
    """Compile inject.c and return the library.

    Raises:
        RuntimeError: there is no C compiler, or it fails.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("the tests of failing calls need a C compiler: install cc, or set CC")
    folder = Path(tempfile.mkdtemp(prefix="inject"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    built = folder / "inject.so"
    flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-O1"]
    done = subprocess.run(
        [compiler, *flags, "-o", str(built), str(HERE / "inject.c"), "-ldl"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{compiler} cannot compile tests/inject.c:\n{done.stderr}")
    return built


@dataclass(frozen=True)
class Injection:
    """What happens at which call; the words are those of inject.c.

    Attributes:
        mode: `log` lets all calls pass.
        number: of the call among those of `kinds` on files at or below `paths`.
        value: the errno, the signal, or the multiple of a short count.
    """

    mode: str = "log"
    number: int = 0
    value: int = 0
    kinds: str = "all"
    paths: Sequence[Path] = ()

    @property
    def joined_paths(self) -> str:
        return ":".join(map(str, self.paths))


@dataclass(frozen=True)
class Call:
    """A call that was made on a watched file; of two names, `path` is "old -> new"."""

    number: int
    kind: str
    function: str
    path: str


@dataclass(frozen=True)
class Done:
    """A command that has ended.

    Attributes:
        code: its exit code, the negative number of the signal that ended it, or `HUNG`.
        hits: the calls that the injection was made at.
    """

    code: int | str
    out: str
    err: str
    calls: tuple[Call, ...]
    hits: tuple[Call, ...]


def _done(code: int | str, out: str, err: str, log: str) -> Done:
    calls, hits = [], []
    for line in log.splitlines():
        which = hits if line.startswith("hit ") else calls
        number, kind, function, path = line.removeprefix("hit ").split(" ", 3)
        which.append(Call(int(number), kind, function, path))
    return Done(code, out, err, tuple(calls), tuple(hits))


def run_command(
    command: Sequence[str],
    injection: Injection,
    *,
    environment: Mapping[str, str] | None = None,
    limit_seconds: float = LIMIT_SECONDS,
) -> Done:
    """Run a program with an injection; what it starts itself is left alone."""
    said = (injection.kinds, injection.number, injection.mode, injection.value)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        log.touch()
        variables = {
            **(os.environ if environment is None else environment),
            "INJECT": " ".join(map(str, (*said, injection.joined_paths))),
            "INJECT_LOG": str(log),
            "LD_PRELOAD": str(library()),
        }
        process = subprocess.Popen(
            list(command),
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        code: int | str
        try:
            out, err = process.communicate(timeout=limit_seconds)
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            code = HUNG
        return _done(code, out, err, log.read_text())


class Driver:
    """A process that runs the command line in forks of itself, one at a time.

    Args:
        folder: for what the forks print; made where it is missing.
        modules: what the commands import besides `injection_driver.MODULES`.

    Attributes:
        cache: the folder where they keep configs of stages.
    """

    def __init__(self, folder: Path, modules: Sequence[str] = ()) -> None:
        self._folder, self.cache = folder, folder / "cache"
        folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "injection_driver.py"), str(library()), *modules],
            env={
                **os.environ,
                "LD_PRELOAD": str(library()),
                "XDG_CACHE_HOME": str(self.cache),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        arguments: Sequence[str | Path],
        injection: Injection,
        *,
        call: str = "outliermerge.cli.main:main",
        when_stopped: Callable[[], Any] = lambda: None,
        limit_seconds: float = LIMIT_SECONDS,
    ) -> Done:
        """Run a command with an injection.

        Args:
            call: the function, as MODULE:NAME, that takes the arguments and returns an exit code.
            when_stopped: called while a SIGSTOP (`signal_before`) has stopped the command, which
                then goes on.
        """
        out, err, log = (self._folder / name for name in ("out", "err", "log"))
        for path in (out, err, log):
            path.write_bytes(b"")
        self._send(
            {
                "arguments": [str(argument) for argument in arguments],
                "call": call,
                "injection": [
                    *(injection.kinds, injection.number, injection.mode, injection.value),
                    injection.joined_paths,
                ],
                "files": [str(out), str(err), str(log)],
                "limit_seconds": limit_seconds,
            }
        )
        while (answer := self._receive()) == "stopped":
            when_stopped()
            self._send("go on")
        return _done(answer, *(path.read_text(errors="replace") for path in (out, err, log)))

    def calls(
        self, arguments: Sequence[str | Path], *, paths: Sequence[Path], kinds: str = "all"
    ) -> list[Call]:
        """Run a command undisturbed and return its calls, whose numbers are for `run`."""
        done = self.run(arguments, Injection(kinds=kinds, paths=paths))
        assert done.code == 0, done.err
        return list(done.calls)

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the driver has ended"
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait(timeout=LIMIT_SECONDS)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def try_calls(
    title: str,
    calls: Sequence[Call],
    numbers: Sequence[int],
    check: Callable[[int], None],
    *,
    step: int = 1,
) -> int:
    """Check numbered calls, and name the one that fails; return how many were tried.

    Args:
        title: of what is tried; chooses where the steps begin.
        step: one of so many calls is tried.
    """
    numbers = numbers[sum(map(ord, title)) % step :: step]
    for number in numbers:
        try:
            check(number)
        except AssertionError as error:
            raise AssertionError(f"{title} at {calls[number]}: {error}") from error
    return len(numbers)
