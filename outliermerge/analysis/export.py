"""Writes tables of statistics to files for scripts: JSON, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.analysis.extras import require
from outliermerge.storage.files import write_whole


def to_json(value: Any) -> str:
    """Return a table as JSON; NaN and infinite numbers become null."""
    text = json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    return _valid(text)


def write_json(path: Path, value: Any) -> None:
    """Write a table as JSON."""
    write_whole(path, (to_json(value) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV with a header; lists are joined by ×, NaN becomes an empty field."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    write_whole(path, _valid(text.getvalue()).encode())


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as Parquet; NaN stays NaN.

    Raises:
        OutlierMergeError: pyarrow is not installed.
    """
    pyarrow = require("pyarrow", "writing Parquet")
    parquet = require("pyarrow.parquet", "writing Parquet")
    written = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), written)
    write_whole(path, written.getvalue().to_pybytes())


def _valid(text: str) -> str:
    """Return a text with `?` for characters that cannot be encoded, as in some file names."""
    return text.encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return "×".join(map(str, value))
    return "" if isinstance(value, float) and math.isnan(value) else value
