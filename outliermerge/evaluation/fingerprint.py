"""What an evaluation depends on: contents of files, and versions of the packages that read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from outliermerge.checkpoint.folders.folder import MANIFEST_NAME
from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation.formats import check_place, digest_of, load, write_json
from outliermerge.evaluation.model_types import HARNESSES, HarnessName

STAMPS_NAME = "fingerprints.json"
# These files do not change a model's answers.
_NOT_LOADED = re.compile(rf"({re.escape(MANIFEST_NAME)}|.*\.md|\.git.*|LICENSE.*)", re.IGNORECASE)


class Fingerprints:
    """Hashes of files, cached in a folder by size and time of change.

    Attributes:
        on_progress: called with the bytes just read.
    """

    def __init__(self, folder: Path, on_progress: Callable[[int], None] = lambda n: None) -> None:
        self._path = folder / STAMPS_NAME
        self.on_progress = on_progress
        check_place(self._path)
        try:
            known = load(self._path)
        except (OSError, OutlierMergeError):  # absent or damaged: hash all files again
            known = None
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}

    def of_files(self, files: Iterable[Path], root: Path | None = None) -> str:
        """Return a hash of files' contents and names, relative to a folder if one is given."""
        lines = [
            f"{path.relative_to(root).as_posix() if root else path.name} {self._of_file(path)}"
            for path in files
        ]
        return xxhash.xxh3_128_hexdigest("\n".join(sorted(lines)).encode())

    def of_model(self, path: Path) -> str:
        """Return a hash of a model's files, except its manifest and texts for people.

        Raises:
            OutlierMergeError: the model has no such files.
        """
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file() and not _NOT_LOADED.fullmatch(file.relative_to(path).parts[0])
        ]
        if not files:
            raise OutlierMergeError(f"{path}: an empty folder, expected a model")
        return self.of_files(files, path)

    def save(self) -> None:
        """Write the known hashes, for the next run."""
        write_json(self._path, self._known)

    def _of_file(self, path: Path) -> str:
        place, status = str(path.absolute()), path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self._known.get(place)
        if isinstance(known, list) and known[:-1] == stamp and isinstance(known[-1], str):
            self.on_progress(status.st_size)
            return known[-1]
        digest = digest_of(path, self.on_progress)
        if digest is None:
            raise OutlierMergeError(f"{path}: was removed while it was read")
        self._known[place] = [*stamp, digest]
        return digest


def versions(harness: HarnessName = "lmms_eval") -> dict[str, str]:
    """Return the versions of the packages that scores depend on.

    Raises:
        OutlierMergeError: the harness is not installed.
    """
    used = HARNESSES[harness]
    try:
        return {
            harness: version(used.package),
            "transformers": version("transformers"),
            "torch": version("torch"),
            "outliermerge": version("outliermerge"),
        }
    except PackageNotFoundError as error:
        cuda = " (without CUDA: see the README)" if harness == "lmms_eval" else ""
        raise OutlierMergeError(
            f"{error.name} is not installed here: pip install 'outliermerge[{used.extra}]'{cuda}"
        ) from error
