"""The spec and the output that a command line names."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from outliermerge.cli.shipped import find_file
from outliermerge.errors import ArgumentError, SpecError, as_path, shown

if TYPE_CHECKING:
    from outliermerge.spec.check import MergeSpec

STANDARD_INPUT = "-"


def read_spec(options: argparse.Namespace) -> MergeSpec:
    """Return the spec that a command is given: a file, a shipped name, or the standard input.

    Raises:
        SpecError: it cannot be read, or something in it is wrong.
    """
    from outliermerge.spec.check import load_spec, parse_spec

    lenient = getattr(options, "lenient", False)  # a sweep is strict
    if options.spec != STANDARD_INPUT:
        return load_spec(find_file(options.spec, "spec"), lenient=lenient)
    return parse_spec(read_standard_input(), file="standard input", lenient=lenient)


def read_any_spec(options: argparse.Namespace) -> MergeSpec:
    """Return the spec of a merge or of a mixture of experts, whichever a command is given.

    Raises:
        SpecError: it cannot be read, or something in it is wrong.
    """
    from outliermerge.spec.check import parse_spec
    from outliermerge.spec.moe import load_moe_spec, parse_moe_spec
    from outliermerge.spec.repeated import read_repeated
    from outliermerge.spec.text import read_text

    if options.spec == STANDARD_INPUT:
        file, text = "standard input", read_standard_input()
    else:
        file = find_file(options.spec, "spec")
        if repeated := read_repeated(as_path(file)):
            is_mixture = "experts" in repeated.recipe
            return load_moe_spec(file) if is_mixture else read_spec(options)
        text = read_text(as_path(file), absent="no such spec file")
    parse = parse_moe_spec if _is_mixture(text) else parse_spec
    return parse(text, file=file, lenient=options.lenient)


def _is_mixture(text: str) -> bool:
    from outliermerge.spec.text import plain_yaml

    try:
        raw = plain_yaml(text)
    except ValueError:  # what is wrong is told when it is parsed
        return False
    return isinstance(raw, dict) and "experts" in raw


def read_standard_input() -> str:
    """Return the text of the standard input.

    Raises:
        SpecError: it is no text, or too long.
    """
    from outliermerge.spec.text import MAX_BYTES, not_utf8

    if sys.stdin is None or sys.stdin.isatty():
        raise SpecError("standard input: nothing is piped into it. Use `… | outliermerge run -`")
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise SpecError(f"standard input: more than {MAX_BYTES:,} bytes, the limit of a spec")
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise SpecError(f"standard input: {not_utf8(data, error)}") from error


def named_output(options: argparse.Namespace) -> str | None:
    """Return the output that a command line names, after the spec or by --output.

    Raises:
        ArgumentError: it names two, or a spec.
    """
    folder: str | None = options.folder
    if folder is not None and options.output is not None and folder != options.output:
        raise ArgumentError(
            f"two outputs are given: {shown(folder)} and --output {shown(options.output)}"
        )
    if folder is not None and Path(folder).suffix in (".yaml", ".yml", ".json"):
        raise ArgumentError(
            f"{shown(folder)} is named as the output, but looks like a spec: one is merged at a "
            "time, and the second argument is the folder to write"
        )
    return options.output or folder
