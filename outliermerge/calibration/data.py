"""Reads calibration data: texts, questions with answers, images; JSONL, Parquet or the hub's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from outliermerge.errors import OutlierMergeError, SpecError, as_path, quoted, shown
from outliermerge.optional import is_installed
from outliermerge.storage.files import read_bytes
from outliermerge.storage.json_text import parse_json

_MAX_BYTES = 1 << 30
_FORMS = '{"text": "…"}, or {"prompt": "…", "completion": "…"}, with "images": [FILE, …] if any'


@dataclass(frozen=True)
class Sample:
    """A text that a model reads.

    Attributes:
        prompt: what comes before; its tokens are not predicted.
        text: the text, or the completion of the prompt.
        images: the files of its images, in the order of their places in the prompt or text.
        label: the class of the text, for a classifier; None where there is none.
    """

    text: str
    prompt: str = ""
    images: tuple[Path, ...] = ()
    label: int | None = None


def read_samples(
    name: str, *, limit: int | None = None, column: str = "text", split: str = "train"
) -> list[Sample]:
    """Return the samples of a file or of a data set of the hub.

    Args:
        name: a file .jsonl, .json or .parquet, or the name of a data set.
        limit: take only so many, the first ones.
        column: the key of the text.
        split: of a data set of the hub.

    Raises:
        SpecError: there is no such file, or a line is wrong.
        OutlierMergeError: what reads it is not installed, or fails.
    """
    path = as_path(name)
    if path.suffix == ".parquet":
        rows: Iterator[tuple[str, Any]] = _parquet(path)
    elif path.exists() or path.suffix in (".jsonl", ".json"):
        rows = _lines(path)
    else:
        rows = _hub(name, split)
    folder = path.parent if path.exists() else Path()
    found = [
        _sample(row, where, column, folder)
        for where, row in islice(rows, limit)  # None takes all
    ]
    if not found:
        raise SpecError(f"{name}: holds no samples")
    return found


def samples_hash(samples: Iterable[Sample]) -> str:
    """Return a hash of what samples hold, the bytes of their images included.

    Raises:
        OutlierMergeError: an image cannot be read.
    """
    digest = xxhash.xxh3_128()
    for sample in samples:
        digest.update(json.dumps([sample.prompt, sample.text, sample.label]).encode() + b"\n")
        for image in sample.images:
            data = read_bytes(image, max_bytes=_MAX_BYTES)
            if data is None:
                raise OutlierMergeError(f"{image}: no such image")
            digest.update(xxhash.xxh3_128_digest(data))
    return digest.hexdigest()


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    data = read_bytes(path, max_bytes=_MAX_BYTES)
    if data is None:
        raise SpecError(f"{path}: no such file of samples")
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", parse_json(line)
            except ValueError as error:
                said = shown(error).rstrip(".")
                raise SpecError(f"{path}:{number}: {said}. Expected {_FORMS}.") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise SpecError(f"{path}: no such file of samples")
    if not is_installed("pyarrow"):
        raise OutlierMergeError(f"{path}: Parquet needs pyarrow: pip install pyarrow")
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (OSError, ValueError) as error:  # pyarrow's own errors are among them
        raise SpecError(f"{path}: cannot be read: {shown(error)}") from error


def _hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    if not is_installed("datasets"):
        raise OutlierMergeError(
            f"{quoted(name)}: no such file; a data set of the hub needs datasets, which is not "
            "installed: pip install datasets"
        )
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{name}[{split}]: row {number}", row
    except Exception as error:  # of many kinds: no network, no such name, no such split
        said = shown(str(error).partition("\n")[0])
        raise OutlierMergeError(
            f"{quoted(name)}: no such file, and the hub's data set does not load: {said}"
        ) from error


def _sample(row: Any, where: str, column: str, folder: Path) -> Sample:
    expected = _FORMS.replace('"text"', json.dumps(column))
    if not isinstance(row, Mapping):
        raise SpecError(f"{where}: found {quoted(str(row))}, expected {expected}")
    prompt = row.get("prompt", "") if "completion" in row else ""
    text = row["completion"] if "completion" in row else row.get(column)
    has_images = "images" in row or "image" in row
    text = "" if text is None and has_images else text
    if text == "" and prompt == "" and not has_images:
        raise SpecError(f"{where}: the text is empty; expected {expected}")
    if not (isinstance(text, str) and isinstance(prompt, str)):
        raise SpecError(f"{where}: found the keys {', '.join(map(str, row))}; expected {expected}")
    if not (prompt + text).isascii() and any("\ud800" <= one <= "\udfff" for one in prompt + text):
        raise SpecError(f"{where}: the text has half of a surrogate pair, which is no character")
    images = row.get("images", [row["image"]] if "image" in row else [])
    if not isinstance(images, list) or not all(isinstance(one, str) for one in images):
        raise SpecError(f"{where}: images: expected a list of files")
    label = row.get("label")
    return Sample(
        text=text,
        prompt=prompt,
        images=tuple(folder / one for one in images),
        label=label if isinstance(label, int) else None,
    )
