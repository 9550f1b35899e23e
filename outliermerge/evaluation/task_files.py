"""The files that a task of lmms-eval is made of, as far as they are here and may change."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import Any

import yaml

from outliermerge.errors import OutlierMergeError

# What `datasets` reads files with, instead of a hub id.
_BUILDERS = ("arrow", "csv", "json", "pandas", "parquet", "text")


class _Loader(yaml.SafeLoader):
    """Reads lmms-eval's task files, whose functions are of no interest here."""


_Loader.add_constructor("!function", lambda loader, node: None)


def task_files(task: str, tasks_folder: Path | None, data: Path | None) -> list[Path]:
    """Return the files of a task, or of a group's tasks, and those of its data that are local.

    Of lmms-eval's own tasks only local data: their files are told by its version.

    Raises:
        OutlierMergeError: files include each other in a circle.
    """
    found: set[Path] = set()
    left, seen = [task], set()
    while left:
        name = left.pop()
        if name not in seen:  # a group may hold itself
            seen.add(name)
            files, members = _files_of(name, tasks_folder, data)
            found |= files
            left += members
    return sorted(found)


def _files_of(
    task: str, tasks_folder: Path | None, data: Path | None
) -> tuple[set[Path], list[str]]:
    """Return the files of one task, and the tasks of a group."""
    found: set[Path] = set()
    members: list[str] = []
    for file in _definitions(task, tasks_folder):
        config, files = _read(file)
        if tasks_folder is not None and tasks_folder in file.parents:
            # The functions that a file names are in its own folder.
            found.update(path for part in files for path in part.parent.iterdir() if path.is_file())
        members += _members(config)
        found.update(_local_data(config, file.parent, data))
    return found, members


def _definitions(task: str, tasks_folder: Path | None) -> Iterator[Path]:
    """Yield the file that defines a task: ours, or else lmms-eval's."""
    spec = util.find_spec("lmms_eval")
    official = [Path(place) / "tasks" for place in (spec and spec.submodule_search_locations) or ()]
    for files in (
        tasks_folder.rglob("*.yaml") if tasks_folder else (),
        (file for place in official for file in place.rglob(f"{glob.escape(task)}.yaml")),
        # Few are in a file of another name, and only then all have to be searched.
        (file for place in official for file in place.rglob("*.yaml")),
    ):
        for file in sorted(files):
            if not file.is_file():
                continue
            if task.encode() not in file.read_bytes():
                continue
            config, _ = _read(file)
            if task in (config.get("task"), config.get("group")):
                yield file
                return


def _read(file: Path, within: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Path]]:
    """Return a task file's keys, those that it includes among them, and the files they are from."""
    if file in within:
        circle = " includes ".join(map(str, (*within, file)))
        raise OutlierMergeError(f"task files include each other in a circle: {circle}")
    try:
        own = yaml.load(file.read_text("utf-8"), Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}, [file]  # lmms-eval will say what is wrong
    if not isinstance(own, dict):
        return {}, [file]
    config: dict[str, Any] = {}
    files = [file]
    for name in reversed(list(_texts(own.get("include")))):
        path = file.parent / name
        if path.is_file():
            keys, read = _read(path, (*within, file))
            config |= keys
            files += read
    return config | own, files


def _members(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of a group's tasks."""
    tasks = config.get("task")
    for entry in tasks if isinstance(tasks, list) else ():
        name = entry.get("task") if isinstance(entry, dict) else entry
        if isinstance(name, str):
            yield name


def _local_data(config: Mapping[str, Any], folder: Path, data: Path | None) -> Iterator[Path]:
    """Yield data files where lmms-eval and `datasets` look: beside the task, in `data`."""
    source = config.get("dataset_path")
    if not isinstance(source, str):
        return
    arguments = config.get("dataset_kwargs")
    patterns = _texts(arguments.get("data_files")) if isinstance(arguments, Mapping) else []
    places = [folder, data] if source in _BUILDERS else [data and data / source]
    if Path(source).is_absolute():
        places = [Path(source)]
    for place in places:
        if place is None or not place.is_dir():
            continue
        for pattern in patterns or ([] if source in _BUILDERS else ["**/*"]):
            for name in glob.glob(str(place / pattern), recursive=True):  # noqa: PTH207  absolute ones too
                if Path(name).is_file():
                    yield Path(name)


def _texts(value: object) -> list[str]:
    """Return the texts in a value that YAML can give, which may hold itself."""
    found: list[str] = []
    left, seen = [value], set()
    while left:
        part = left.pop()
        if isinstance(part, str):
            found.append(part)
        elif isinstance(part, (Mapping, list)) and id(part) not in seen:
            seen.add(id(part))
            left += reversed(list(part.values()) if isinstance(part, Mapping) else part)
    return found
