"""The files that a task of lmms-eval is made of, as far as they are here and may change."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import Any

import yaml

# What `datasets` reads files with, instead of a hub id.
_BUILDERS = ("arrow", "csv", "json", "pandas", "parquet", "text")


class _Loader(yaml.SafeLoader):
    """Reads lmms-eval's task files, whose functions are of no interest here."""


_Loader.add_constructor("!function", lambda loader, node: None)


def task_files(task: str, tasks_folder: Path | None, data: Path | None) -> list[Path]:
    """Return the files of a task, or of a group's tasks, and those of its data that are local.

    Of lmms-eval's own tasks only local data: their files are told by its version.
    """
    found: set[Path] = set()
    for file in _definitions(task, tasks_folder):
        config, files = _read(file)
        if tasks_folder is not None and tasks_folder in file.parents:
            # The functions that a file names are in its own folder.
            found.update(path for part in files for path in part.parent.iterdir() if path.is_file())
        for name in _members(config):
            found.update(task_files(name, tasks_folder, data))
        found.update(_local_data(config, file.parent, data))
    return sorted(found)


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
            if task.encode() not in file.read_bytes():
                continue
            config, _ = _read(file)
            if task in (config.get("task"), config.get("group")):
                yield file
                return


def _read(file: Path) -> tuple[dict[str, Any], list[Path]]:
    """Return a task file's keys, those that it includes among them, and the files they are from."""
    try:
        own = yaml.load(file.read_text("utf-8"), Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}, [file]
    if not isinstance(own, dict):
        return {}, [file]
    config: dict[str, Any] = {}
    files = [file]
    included = own.get("include") or []
    for name in reversed([included] if isinstance(included, str) else included):
        path = file.parent / name
        if path.is_file() and path != file:
            keys, read = _read(path)
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
    arguments = config.get("dataset_kwargs") or {}
    patterns = list(_texts(arguments.get("data_files")))
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


def _texts(value: object) -> Iterable[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else []
