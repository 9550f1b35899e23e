"""YAML read strictly, with the line and column of every key and value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from outliermerge.errors import SpecError
from outliermerge.spec.settings import SpecPath


@dataclass(frozen=True)
class Source:
    """Where a spec is from, to point at its lines."""

    file: str
    keys: Mapping[SpecPath, tuple[int, int]] = field(default_factory=dict)
    values: Mapping[SpecPath, tuple[int, int]] = field(default_factory=dict)

    def error(self, path: SpecPath, message: str, *, at_key: bool = False) -> SpecError:
        """Return an error that starts with file, line, column and the key's path."""
        marks = self.keys if at_key else self.values
        place = self.file
        for end in range(len(path), -1, -1):
            if mark := marks.get(path[:end]) or self.keys.get(path[:end]):
                place = f"{self.file}:{mark[0]}:{mark[1]}"
                break
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
        return SpecError(f"{place}: {name.lstrip('.') + ': ' if name else ''}{message}")


def read_text(path: Path, *, absent: str) -> str:
    """Return a file's text.

    Raises:
        SpecError: it cannot be read; `absent` is what to say where there is none.
    """
    try:
        return path.read_text("utf-8")
    except FileNotFoundError as error:
        raise SpecError(f"{path}: {absent}") from error
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error


def parse_yaml(text: str, *, file: str) -> tuple[Any, Source]:
    """Return a YAML document's value and where its parts are.

    Raises:
        SpecError: it is not valid YAML, or a key stands twice or is not a text.
    """
    keys: dict[SpecPath, tuple[int, int]] = {}
    values: dict[SpecPath, tuple[int, int]] = {}
    _check_characters(text, file)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _record_marks(node, (), keys, values, file, parents=())
        raw = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        problem = error.problem or error.context or "cannot be read"
        if problem.startswith("but ") and error.context:
            problem = f"{error.context} {problem}"
        raise SpecError(f"{place}: not valid YAML: {problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{file}: not valid YAML: {error}") from error
    source = Source(file, keys, values)
    return raw, source


class _Loader(yaml.SafeLoader):
    """Gives values that Python refuses, such as the date 2024-13-45, their place."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise yaml.constructor.ConstructorError(
                None, None, str(error), node.start_mark
            ) from error


def _check_characters(text: str, file: str) -> None:
    if match := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, match.start()) + 1
        column = match.start() - text.rfind("\n", 0, match.start())
        raise SpecError(f"{file}:{line}:{column}: not valid YAML: the character {match[0]!r}")


def _record_marks(
    node: Any,
    path: SpecPath,
    keys: dict[SpecPath, tuple[int, int]],
    values: dict[SpecPath, tuple[int, int]],
    file: str,
    parents: tuple[int, ...],
) -> None:
    if node is None:
        return
    if id(node) in parents:
        mark = node.start_mark
        raise SpecError(
            f"{file}:{mark.line + 1}:{mark.column + 1}: not valid YAML: it contains itself"
        )
    parents = (*parents, id(node))
    values[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            mark = (key.start_mark.line + 1, key.start_mark.column + 1)
            if key.tag != "tag:yaml.org,2002:merge":
                if key.tag != "tag:yaml.org,2002:str":
                    raise SpecError(
                        f"{file}:{mark[0]}:{mark[1]}: found a key that is not a text. "
                        "Put it in quotes if it is meant."
                    )
                if (*path, key.value) in keys:
                    raise SpecError(
                        f"{file}:{mark[0]}:{mark[1]}: the key {key.value!r} stands twice, "
                        f"first in line {keys[(*path, key.value)][0]}"
                    )
                keys[(*path, key.value)] = mark
                _record_marks(value, (*path, key.value), keys, values, file, parents)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _record_marks(item, (*path, index), keys, values, file, parents)
