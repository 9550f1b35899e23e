"""Shared by the commands that analyse weights: flags, files, and the format of numbers."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from outliermerge.cli.parts import plain_json, say
from outliermerge.errors import SpecError

MOMENTS = (
    ("σ", "std", "{:.2g}"),
    ("kept %", "kept_ratio", "{:.2%}"),
    ("skew", "skewness", "{:.2f}"),
    ("kurtosis", "kurtosis", "{:.2f}"),
)
"""Columns of a table: the title, the attribute, the format."""
WIDE = 130  # characters of a terminal that has room for all columns


def add_filter(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the filter of elements."""
    parser.add_argument(
        "--filter",
        type=float,
        default=3.0,
        metavar="F",
        help="take skewness and kurtosis of the elements within Fσ of the mean (default 3)",
    )


def add_base(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the base of task vectors."""
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="measure the differences from this model (task vectors) instead of the weights",
    )


def add_rename(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the rename of tensors."""
    parser.add_argument(
        "--rename",
        metavar="MAP",
        help="from the models' names of tensors to the base's, as `rename` in a spec",
    )


def add_json_file(parser: argparse.ArgumentParser) -> None:
    """Add the flag for a JSON file of all results."""
    parser.add_argument(
        "--json", metavar="FILE", help="write all results as JSON (- for the standard output)"
    )


def add_table_files(parser: argparse.ArgumentParser) -> None:
    """Add the flags for files of all results, and for files with a row per tensor."""
    add_json_file(parser)
    parser.add_argument("--csv", metavar="FILE", help="write a table with a row for each tensor")
    parser.add_argument("--parquet", metavar="FILE", help="write the same table as Parquet")


def check_files(options: argparse.Namespace) -> None:
    """Before anything is read, refuse files that could not be written; else make them paths."""
    from outliermerge.analysis.extras import require
    from outliermerge.output.replaceable import Kind, writable

    kinds: tuple[Kind, ...] = ("json", "csv", "parquet", "png")
    given = ((kind, getattr(options, kind, None)) for kind in kinds)
    named = {kind: file for kind, file in given if file is not None}
    if "parquet" in named:
        require("pyarrow", "--parquet")
    for kind, file in named.items():
        if file == "-" and kind == "json":
            continue
        if file in ("", "-") or list(named.values()).count(file) > 1:
            raise SpecError(f"--{kind}: found {file!r}, expected a file of its own")
        setattr(options, kind, writable(file, kind))
    if "png" in named:
        require("matplotlib.figure", "a figure")


def write_files(
    options: argparse.Namespace, table: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> bool:
    """Write the requested files; tell whether standard output is free for tables."""
    from outliermerge.analysis import export

    for name, write in (("csv", export.write_csv), ("parquet", export.write_parquet)):
        if file := getattr(options, name, None):
            write(file, rows)
    if options.json == "-":
        print(plain_json(export.to_json(table)))
        return False
    if options.json:
        export.write_json(options.json, table)
    written = [
        str(file) for name in ("json", "csv", "parquet") if (file := getattr(options, name, None))
    ]
    if written:
        say(f"wrote {', '.join(written)}", file=sys.stderr)
    return True


def number_text(value: float, form: str) -> str:
    """Return a number in a format, without a percent sign."""
    text = "–" if math.isnan(value) else form.format(value).removesuffix("%")
    return re.sub(r"^-(?=[0.]+$)", "", text)  # no "-0.00"
