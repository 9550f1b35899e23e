"""Runs llama.cpp's converter on a merge that lies in an unfinished output as safetensors."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.formats.gguf_file import REFETCH, read_file
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.output.folder import OutputFolder
from outliermerge.planning.gguf import FILE
from outliermerge.planning.llama_cpp import Conversion
from outliermerge.storage.failures import naming
from outliermerge.storage.machine import kill_all, was_killed
from outliermerge.storage.stamps import Watched, watching

_NUM_LINES, _MOST_WARNINGS, _MOST_LETTERS = 8, 20, 300
_TOWERS = "mmproj-"
# What it would make of the name of the unfinished folder is left out.
_NOT_GUESSED = ("basename", "finetune", "version", "organization", "size_label")


def convert(conversion: Conversion, folder: OutputFolder, kept: Iterable[str]) -> dict[str, Any]:
    """Make the GGUF files of a merge; return what the manifest says of it.

    Each is made under a name of its own: the converter of a killed run may still be at work.

    Args:
        kept: the files beside the weights; those of earlier runs are removed.

    Raises:
        OutlierMergeError: the converter failed, or made no whole file; its last lines are told.
    """
    said, warnings = conversion.as_dict(), list[str]()
    tries = {file: f"{secrets.token_hex(4)}.gguf" for file in conversion.files}
    names = [*tries, *tries.values(), *(_TOWERS + name for name in tries.values())]
    folder.expect(names, kept)
    for file, tried in tries.items():
        log = _run(conversion, folder.path, tried, is_tower=file != FILE)
        warnings += [line[:_MOST_LETTERS] for line in log if line.startswith("WARNING")]
        path, made = folder.path / file, folder.path / tried
        if not made.exists():  # older converters write it so
            made = made.with_name(_TOWERS + tried)
        if why := _what_is_wrong(made):
            raise _failure(conversion, folder.path, f"made {why}", log)
        with naming(path, "made"):
            made.replace(path)
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    return said | ({"warnings": warnings[:_MOST_WARNINGS]} if warnings else {})


def _what_is_wrong(made: Path) -> str | None:
    """Return what a converter has made that is no whole model; None if nothing is wrong."""
    if not made.exists():
        return "no file"
    try:
        with watching(Watched()):  # it is no input
            tensors = read_file(made)[0]
    except OutlierMergeError as error:
        return f"no whole file: {str(error).removesuffix(REFETCH)}"
    return None if tensors else "a file without tensors"


def _run(conversion: Conversion, folder: Path, file: str, *, is_tower: bool) -> list[str]:
    """Run the converter; return the lines that it has printed."""
    start = [] if conversion.is_program else [sys.executable]
    with tempfile.TemporaryDirectory() as place:
        about, log = Path(place, "metadata.json"), Path(place, "log")
        said = dict.fromkeys(f"general.{key}" for key in _NOT_GUESSED)
        about.write_text(json.dumps(said | {"general.name": conversion.name}))
        command = [
            *start, str(conversion.program), str(folder.absolute()),
            "--outfile", str((folder / file).absolute()), "--outtype", conversion.outtype,
            "--metadata", str(about), *(["--mmproj"] if is_tower else []),
        ]  # fmt: skip
        environment: Mapping[str, str] = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with log.open("wb") as printed:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed,
                    env=environment, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                why = f"cannot be started: {error.strerror}"
                raise _failure(conversion, folder, why, []) from error
            try:
                code = process.wait()
            finally:
                kill_all(process)
                process.wait()
        lines = log.read_text("utf-8", "replace").splitlines()
    if code:
        how = f"ended with exit code {code}"
        if was_killed(code):
            how = "was killed (signal 9), as the system does when memory runs out"
        elif code < 0:
            how = f"was ended by signal {-code} ({signal.strsignal(-code)})"
        raise _failure(conversion, folder, how, lines)
    return lines


def _failure(conversion: Conversion, folder: Path, how: str, log: list[str]) -> OutlierMergeError:
    last = [line.strip() for line in log if line.strip()][-_NUM_LINES:]
    said = "".join(f"\n  {shown(line[:_MOST_LETTERS])}" for line in last)
    return OutlierMergeError(
        f"{conversion.program}: {how}" + (f". Its last lines:{said}" if said else "")
        + f"\nThe merge stays in {folder}, and the same command goes on with the conversion."
    )  # fmt: skip
