"""The local files of a task, which may change.

All files of the user's tasks folder must be readable: the harness reads them when it starts, in the
process of each model. lmms-eval ends with a traceback if one is broken, lm-eval passes it over.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import yaml

from outliermerge.errors import OutlierMergeError, SpecError, quoted
from outliermerge.evaluation.model_types import HarnessName
from outliermerge.spec.text import Loader, error_at
from outliermerge.spec.yaml_words import in_words
from outliermerge.storage.files import small_bytes

# Names of readers that `datasets` takes instead of a hub id.
_BUILDERS = ("arrow", "csv", "json", "pandas", "parquet", "text")
# A line that may define a task, a group or a tag of this name.
_NAMED = rb"(?m)^(?:(?:task|group|tag)\b.*|\s*- *[\"']?)NAME[\"']?(?:\W|$)"
_MAX_INCLUDES = 20  # nested includes; lmms-eval's own are three deep


class _Loader(Loader):
    """Reads task files, ignoring their tags for functions and objects."""


for _prefix in ("!", "tag:yaml.org,2002:python/"):
    _Loader.add_multi_constructor(_prefix, lambda loader, suffix, node: None)


@dataclass(frozen=True)
class TaskFile:
    """The parts of a task file that are used here.

    Attributes:
        file: the file's path.
        parts: the file and all files that it includes.
        names: the names of the task or the groups that it defines.
        tags: names under which lm-eval runs it with others.
        members: the names of a group's tasks.
        source: the data set's name, or the name of its reader.
        patterns: the patterns of its data files.
    """

    file: Path
    parts: tuple[Path, ...]
    names: tuple[str, ...]
    tags: tuple[str, ...]
    members: tuple[str, ...]
    source: str | None
    patterns: tuple[str, ...]


def task_files(
    task: str,
    tasks_folder: Path | None,
    data: Path | None,
    *,
    harness: HarnessName = "lmms_eval",
) -> list[Path]:
    """Return the files of a task, or of a group's tasks, and their local data files.

    For the harness's own tasks only local data: their files are determined by its version.

    Raises:
        SpecError: a file of the tasks folder cannot be read, includes a missing file or itself; or
            a group contains itself.
    """
    ours = own_files(tasks_folder, data)
    theirs = _OfHarness(harness, data)
    found: set[Path] = set()
    done: set[str] = set()

    def add(name: str, within: tuple[str, ...]) -> None:
        if name in within:
            circle = " holds ".join(map(quoted, (*within[within.index(name) :], name)))
            raise SpecError(f"{tasks_folder}: a group of tasks holds itself: {circle}")
        if name in done:
            return
        own = [defined for defined in ours if name in defined.names][:1]
        for definition in own or theirs.defining(name):
            done.add(name)
            if definition in ours:
                # The code of functions that a file names is in the file's folder.
                for part in definition.parts:
                    found.update(path for path in part.parent.iterdir() if path.is_file())
            found.update(_local_data(definition, data))
            for member in definition.members:
                if member not in done or member in (*within, name):
                    add(member, (*within, name))

    add(task, ())
    return sorted(found)


def definition_of(
    task: str, ours: tuple[TaskFile, ...] = (), harness: HarnessName = "lmms_eval"
) -> TaskFile | None:
    """Return the file that defines a task: from the tasks folder, or else the harness's."""
    for defined in ours:
        if task in defined.names:
            return defined
    return next(iter(_OfHarness(harness, Path()).defining(task)), None)


class _OfHarness:
    """The files of a harness's own tasks. Without a `data` folder none has data of ours."""

    def __init__(self, harness: HarnessName, data: Path | None) -> None:
        self._package, self._data = harness, data
        self._files: list[Path] | None = None

    def defining(self, task: str) -> list[TaskFile]:
        """Return the file of a task or group, or the files of all tasks with a tag."""
        if self._data is None:
            return []
        if self._files is None:
            spec = util.find_spec(self._package)
            places = (spec and spec.submodule_search_locations) or ()
            self._files = sorted(
                f for place in places for f in Path(place, "tasks").rglob("*.yaml")
            )
        # Few tasks are in a file of another name; only for these all files are searched.
        of_its_name = [file for file in self._files if file.name == f"{task}.yaml"]
        wanted = task.encode("utf-8", "surrogatepass")  # YAML can escape what no file holds
        named = re.compile(_NAMED.replace(b"NAME", re.escape(wanted)))
        tagged = []
        for file in (*of_its_name, *self._files):
            text = file.read_bytes()
            if wanted not in text or not named.search(text):
                continue
            try:
                defined = _read(file, self._data)
            except OutlierMergeError:  # the harness's own
                continue
            if task in defined.names:
                return [defined]
            if task in defined.tags:
                tagged.append(defined)
        return tagged


def own_files(folder: Path | None, data: Path | None) -> tuple[TaskFile, ...]:
    """Return what the task files of a tasks folder say.

    Raises:
        SpecError: one cannot be read.
    """
    files = folder.rglob("*.yaml") if folder is not None else ()
    return tuple(_read(file, data) for file in sorted(files) if not file.is_dir())


def _read(file: Path, data: Path | None) -> TaskFile:
    """Read a task file strictly, with the files that it includes.

    Raises:
        SpecError: the file cannot be read, or has other values in place of names.
    """
    keys, parts = _keys(file, data, ())

    def value_of(key: str) -> Any:
        return keys.get(key, (None, file))[0]

    def wrong(key: str, value: object, expected: str) -> SpecError:
        return _wrong(keys[key][1], key, value, expected)

    def texts(key: str, value: object) -> tuple[str, ...]:
        values = value if isinstance(value, list) else [] if value is None else [value]
        for text in values:
            if not isinstance(text, str):
                raise wrong(key, text, "a text or a list of texts")
        return tuple(values)

    task, source, arguments = map(value_of, ("task", "dataset_path", "dataset_kwargs"))
    if source is not None and not isinstance(source, str):
        raise wrong("dataset_path", source, "a text")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise wrong("dataset_kwargs", arguments, "a mapping")
    patterns = (arguments or {}).get("data_files")
    of_splits = patterns.values() if isinstance(patterns, Mapping) else [patterns]
    members: list[Any] = []
    for entry in task if isinstance(task, list) else ():
        inner = entry.get("task") if isinstance(entry, Mapping) else entry
        members += inner if isinstance(inner, list) and inner is not entry else [inner]
    return TaskFile(
        file=file,
        parts=tuple(dict.fromkeys(parts)),
        names=texts("group", value_of("group"))
        + (() if isinstance(task, list) else texts("task", task)),
        tags=texts("tag", value_of("tag")),
        members=texts("task", [member for member in members if member is not None]),
        source=source,
        patterns=tuple(text for each in of_splits for text in texts("dataset_kwargs", each)),
    )


def _keys(
    file: Path, data: Path | None, within: tuple[Path, ...]
) -> tuple[dict[str, tuple[Any, Path]], tuple[Path, ...]]:
    """Return a task file's keys, each with the file it comes from, and all included files."""
    if file in within:
        circle = " includes ".join(map(str, (*within[within.index(file) :], file)))
        raise SpecError(f"{file}: task files include each other in a circle: {circle}")
    if len(within) > _MAX_INCLUDES:
        raise SpecError(f"{within[0]}: includes files more than {_MAX_INCLUDES} deep")
    own = _mapping(file)
    included = own.get("include")
    names = included if isinstance(included, list) else [] if included is None else [included]
    keys: dict[str, tuple[Any, Path]] = {}
    parts = [file]
    for name in reversed(names):
        if not isinstance(name, str):
            raise _wrong(file, "include", name, "a name of a file, or a list of them")
        path = _included(file, name, data)
        more, read = _keys(path, data, (*within, file))
        keys |= more
        parts += read
        if len(parts) > 100 * _MAX_INCLUDES:
            raise SpecError(f"{file}: include: more than {100 * _MAX_INCLUDES} files in all")
    return keys | {key: (value, file) for key, value in own.items()}, tuple(parts)


def _mapping(file: Path) -> dict[str, Any]:
    try:
        text = small_bytes(file).decode("utf-8")
        content = _Loader(text).get_single_data()
    except OutlierMergeError as error:
        raise SpecError(str(error)) from error
    except yaml.MarkedYAMLError as error:
        place, problem = in_words(error, text)
        raise error_at(str(file), place, f"not valid YAML: {problem}") from error
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise SpecError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{file}: found {quoted(content)}, expected the mapping of a task")
    return content


def _included(file: Path, name: str, data: Path | None) -> Path:
    """Return an included file, searched like lmms-eval, whose working directory is `data`."""
    try:
        for folder in (data, file.parent):
            path = folder / name if folder is not None else None
            if path is not None and path.is_file():
                return Path(os.path.normpath(path))
    except (OSError, ValueError):
        pass
    raise SpecError(f"{file}: include: there is no file {quoted(name)} beside it")


def _wrong(file: Path, key: str, value: object, expected: str) -> SpecError:
    return SpecError(f"{file}: {key}: found {quoted(value)}, expected {expected}")


def _local_data(task: TaskFile, data: Path | None) -> Iterator[Path]:
    """Yield data files from where workers and `datasets` look: beside the task, and in `data`."""
    if task.source is None:
        return
    generic = task.source in _BUILDERS
    places = [task.file.parent, data] if generic else [data and data / task.source]
    if Path(task.source).is_absolute():
        places = [Path(task.source)]
    for place in places:
        if place is None or not _is_folder(place):
            continue
        for pattern in task.patterns or ([] if generic else ["**/*"]):
            yield from _matching(place, pattern)


def lacking_data(task: TaskFile, data: Path | None) -> list[str]:
    """Return the names of a task's local data files that are not there."""
    if task.source not in _BUILDERS:
        return []
    places = [place for place in (task.file.parent, data) if place is not None]
    local = [pattern for pattern in task.patterns if "://" not in pattern]
    return [
        name
        for name in local
        if not any(file for place in places for file in _matching(place, name))
    ]


def _matching(place: Path, pattern: str) -> Iterator[Path]:
    names = glob.iglob(str(place / pattern), recursive=True)  # noqa: PTH207  absolute ones too
    return (Path(name) for name in names if Path(name).is_file())


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # not a valid file name, such as one of 10,000 characters
        return False
