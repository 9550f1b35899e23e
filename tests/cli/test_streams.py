"""What a command does and says of it does not depend on who reads what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile.cases import pair

import outliermerge
from outliermerge.cli.streams import guard_streams

RUN = ["run", "spec.yaml", "--output", "out", "--no-load-check"]
COMMANDS = {"run": RUN, "plan": ["plan", "spec.yaml"], "methods": ["methods"], "help": ["--help"]}


def _without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def _call(
    folder: Path,
    arguments: list[str],
    out: Callable[[], int] | None = None,
    err: Callable[[], int] | None = None,
    closed: tuple[int, ...] = (),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    places = [subprocess.PIPE if place is None else place() for place in (out, err)]
    try:
        return subprocess.run(
            [sys.executable, "-m", "outliermerge", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
            stdout=places[0],
            stderr=places[1],
            preexec_fn=lambda: [os.close(number) for number in closed],
            text=True,
            errors="replace",
            timeout=300,
        )
    finally:
        for place in places:
            if place >= 0:
                os.close(place)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, model in enumerate((pair(tmp_path), tmp_path / "good")):  # they differ: a note
        (model / "generation_config.json").write_text(f'{{"top_k": {number + 1}}}')
    return tmp_path


@pytest.mark.parametrize(
    ("streams", "code"),
    [
        ({"out": _without_reader, "err": _without_reader}, 0),
        ({"err": _full}, 0),
        ({"out": _full}, 1),
        ({"out": _full, "err": _full}, 1),
        ({"closed": (1,)}, 0),
        ({"closed": (2,)}, 0),
        ({"closed": (0, 1, 2)}, 0),
        ({"PYTHONIOENCODING": "ascii"}, 0),
    ],
)
@pytest.mark.sampled(2)
def test_a_merge_is_made_whoever_reads_of_it(folder, streams, code):
    called = _call(folder, RUN, **streams)
    assert called.returncode == code, called.stderr
    assert "Traceback" not in (called.stderr or "")
    if "out" in streams and "err" not in streams:
        assert "standard output cannot be written: No space left on device" in called.stderr
    assert outliermerge.verify(folder / "out") == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "streams", [{"out": _full}, {"closed": (1,)}, {"PYTHONIOENCODING": "ascii"}]
)
@pytest.mark.sampled(2)
def test_nothing_that_is_printed_ends_in_a_traceback(folder, command, streams):
    called = _call(folder, COMMANDS[command], **streams)
    assert "Traceback" not in called.stderr
    assert called.returncode == int("out" in streams)


@pytest.mark.parametrize("out", [None, _without_reader])
def test_what_verify_finds_is_its_exit_code_though_nobody_reads_it(folder, out):
    assert _call(folder, RUN).returncode == 0
    shard = folder / "out/model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert _call(folder, ["verify", "out"], out).returncode == 1


def test_a_folder_that_is_gone_is_told(folder):
    gone = folder / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && {sys.executable} -m outliermerge plan ../spec.yaml"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    called = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    assert called.returncode == 1
    assert called.stderr.startswith("error: the present folder cannot be used: No such file")


def test_an_interrupt_before_a_command_begins_is_told(monkeypatch, capsys):
    from outliermerge.cli import main as cli

    def interrupted(commands: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "make_parser", interrupted)
    assert cli.main(["methods"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_streams_of_others_are_left_as_they_are(capsys):
    before = sys.stdout, sys.stderr
    guard_streams()
    assert (sys.stdout, sys.stderr) == before
