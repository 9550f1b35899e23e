"""A Python that has imported what takes long to import: what it runs are forks of one process.

Importing torch takes a second of a processor, and lmms-eval, which an evaluation does for each
model, takes many. `warm_python` starts this file as a process that imports it once, and gives a
program that stands for `python`: it hands its arguments, folder, variables and streams to that
process, which runs them in a fork, and ends as the fork does. A fork that starts `sys.executable`
starts that program. Where options of Python other than -W come first, it is Python itself.

What modules read when they are imported, such as HF_DATASETS_CACHE, is the same for all forks, and
a signal does not reach them: what is about either needs a process of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

LMMS_EVAL = (
    *("lmms_eval.evaluator", "lmms_eval.tasks", "lmms_eval.models.chat.llava_hf"),
    *("lm_eval.evaluator", "lm_eval.models.huggingface"),
    *("transformers.models.llava.modeling_llava", "matplotlib.figure"),
    *("outliermerge.cli.main", "outliermerge.evaluation.evaluate"),
)
# Of what the package needs, what reads no variables when it is imported; not the package, of which
# a fork may import a copy.
TORCH = ("torch", "pydantic", "rich.progress", "safetensors.torch", "tokenizers", "yaml")
READ_AT_IMPORT = ("HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "OMP_WAIT_POLICY")

CLIENT = """\
#!{python} -ISE
import json, os, socket, sys
if sys.argv[1] in ("-I", "-S", "-E", "-X"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
parent = os.getppid()
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"x"], [0, 1, 2])
request = [sys.argv[1:], os.getcwd(), dict(os.environ), parent]
server.sendall(json.dumps(request).encode() + b"\\n")
server.settimeout(1)
answer = b""
while os.getppid() == parent:
    try:
        answer = server.recv(16)
        break
    except TimeoutError:
        pass
code = int(answer or -9)
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextmanager
def warm_python(modules: Sequence[str]) -> Iterator[Path]:
    """Start the process; yield the program that stands for `python`, with `outliermerge` beside."""
    with tempfile.TemporaryDirectory(prefix="warm") as folder:  # a socket's path must be short
        program, command = Path(folder, "python"), Path(folder, "outliermerge")
        address = f"{folder}/socket"
        program.write_text(CLIENT.format(python=sys.executable, address=address))
        command.write_text(f'#!/bin/sh\nexec {program} -m outliermerge "$@"\n')
        for path in (program, command):
            path.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno()), str(program), *modules],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                env=os.environ
                | {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": f"{folder}/datasets"},
            )
        try:
            yield program
        finally:
            process.communicate()


def main(listener: socket.socket, program: str, modules: Sequence[str]) -> None:
    """Run what clients ask for, each in a fork, until the standard input ends."""
    sys.path.pop(0)  # the folder of this file
    for module in modules:
        importlib.import_module(module)
    sys.executable = program
    keepers = []
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        with listener.accept()[0] as client:
            keepers.append(os.fork())
            if keepers[-1] == 0:
                listener.close()
                _keep(client)
        keepers = [keeper for keeper in keepers if os.waitpid(keeper, os.WNOHANG)[0] == 0]
    for keeper in keepers:
        os.waitpid(keeper, 0)


def _keep(client: socket.socket) -> NoReturn:
    """Run a client's program in a fork; tell how it ended, or end it when the client is gone."""
    os.setsid()
    _, streams, *_ = socket.recv_fds(client, 1, 3)
    with client.makefile("rb") as file:
        request = json.loads(file.readline())
    child = os.fork()
    if child == 0:
        client.close()
        os._exit(_run(streams, *request))
    for stream in (0, *streams):
        os.close(stream)
    ended = os.pidfd_open(child)
    if ended not in select.select([client, ended], [], [])[0]:
        os.killpg(0, signal.SIGKILL)
    client.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    os._exit(0)


def _run(
    streams: list[int], arguments: list[str], folder: str, variables: dict[str, str], parent: int
) -> int:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    kept = {name: os.environ[name] for name in READ_AT_IMPORT if name in os.environ}
    os.environ.clear()
    os.environ.update(variables | kept)
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    os.getppid = lambda: parent
    if "OMP_NUM_THREADS" in variables:  # which torch has read
        sys.modules["torch"].set_num_threads(int(variables["OMP_NUM_THREADS"]))
    code: Any = 0
    try:
        _run_program(arguments)
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


def _run_program(arguments: list[str]) -> None:
    """Do what `python` does with these: any -W, then -c TEXT, -m MODULE or a file, and the rest."""
    while arguments[0] == "-W":
        warnings._setoption(arguments[1])
        arguments = arguments[2:]
    first, *rest = arguments
    if first == "-c":
        code: CodeType = compile(rest[0], "<string>", "exec")
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(code, {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], sys.argv[3:])
