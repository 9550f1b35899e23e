"""What an evaluation depends on: a model's files, a task's files and local data, the versions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash
import yaml

from outliermerge.checkpoint.folder import MANIFEST_NAME
from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation.scores import write_json

STAMPS_NAME = "fingerprints.json"
# Neither changes what a model answers.
_NOT_LOADED = re.compile(rf"({re.escape(MANIFEST_NAME)}|.*\.md|\.git.*|LICENSE.*)", re.IGNORECASE)
_BLOCK_BYTES = 1 << 22


class Fingerprints:
    """Hashes of files, remembered in a folder by size and time of change.

    Attributes:
        on_progress: called with the bytes just read.
    """

    def __init__(self, folder: Path, on_progress: Callable[[int], None] = lambda n: None) -> None:
        self._path = folder / STAMPS_NAME
        self.on_progress = on_progress
        try:
            self._known: dict[str, list[Any]] = json.loads(self._path.read_text("utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def of_files(self, files: Iterable[Path], root: Path) -> str:
        """Return the hash of some files' contents and of their names below a folder."""
        lines = [f"{path.relative_to(root).as_posix()} {self._of_file(path)}" for path in files]
        return xxhash.xxh3_128_hexdigest("\n".join(sorted(lines)).encode())

    def of_model(self, path: Path) -> str:
        """Return the hash of all files of a model but its manifest and texts for people.

        Raises:
            OutlierMergeError: it has none.
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
        """Write what is known, for the next time."""
        write_json(self._path, self._known)

    def _of_file(self, path: Path) -> str:
        place, status = str(path.absolute()), path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self._known.get(place)
        if known is not None and known[:-1] == stamp:
            self.on_progress(status.st_size)
            return str(known[-1])
        digest = xxhash.xxh3_128()
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                self.on_progress(len(block))
        self._known[place] = [*stamp, digest.hexdigest()]
        return digest.hexdigest()


def task_files(
    task: str, tasks_folder: Path | None, data: Path | None
) -> dict[str, tuple[Path | None, list[Path]]]:
    """Return the files of a task of ours and those of its local data, each below a folder.

    The files of lmms-eval's own tasks are told by its version.
    """
    definition: list[Path] = []
    config: Mapping[str, Any] | None = None
    if tasks_folder is not None:
        for file in sorted(tasks_folder.rglob("*.yaml")):
            found = _task_config(file)
            if found.get("task") == task:
                definition = [path for path in sorted(file.parent.iterdir()) if path.is_file()]
                config = found
    if config is None:
        config = _official(task)
    local = _local_data(config, data) if data else []
    return {
        "definition": (tasks_folder if definition else None, definition),
        "data": (data if local else None, local),
    }


def _official(task: str) -> Mapping[str, Any]:
    spec = util.find_spec("lmms_eval")
    places = [Path(place) / "tasks" for place in (spec and spec.submodule_search_locations) or ()]
    for place in places:
        for file in sorted(place.rglob(f"{task}.yaml")):
            found = _task_config(file)
            if found.get("task") == task:
                return found
    return {}


class _Loader(yaml.SafeLoader):
    """Reads lmms-eval's task files, whose functions are of no interest here."""


_Loader.add_constructor("!function", lambda loader, node: None)


def _task_config(file: Path) -> dict[str, Any]:
    try:
        found = yaml.load(file.read_text("utf-8"), Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _local_data(config: Mapping[str, Any], data: Path) -> list[Path]:
    arguments = config.get("dataset_kwargs") or {}
    named = arguments.get("data_files") or {}
    patterns = list(named.values()) if isinstance(named, dict) else [named]
    folder = data / str(config.get("dataset_path") or "")
    place = folder if folder != data and folder.is_dir() else data
    if not patterns:
        patterns = ["**/*"] if place != data else []
    files = {
        file
        for pattern in patterns
        for one in (pattern if isinstance(pattern, list) else [pattern])
        for file in place.glob(str(one))
    }
    return sorted(file for file in files if file.is_file())


def versions() -> dict[str, str]:
    """Return the versions of what scores depend on.

    Raises:
        OutlierMergeError: lmms-eval is not installed.
    """
    try:
        return {
            "lmms_eval": version("lmms-eval"),
            "transformers": version("transformers"),
            "torch": version("torch"),
            "outliermerge": version("outliermerge"),
        }
    except PackageNotFoundError as error:
        raise OutlierMergeError(
            f"{error.name} is not installed here: pip install 'outliermerge[eval]' "
            "(without CUDA: see the README)"
        ) from error
