"""YAML read strictly, with the line and column of every key and value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from outliermerge.errors import OutlierMergeError, SpecError, quoted, shown
from outliermerge.spec.settings import SpecPath
from outliermerge.storage.files import read_bytes

# Limits for a spec. A spec with a filter for every layer of a hundred models has about 40,000
# values in 1 MB; YAML is read at about 40,000 values per second. Aliases can turn a few lines into
# any number of values, so the values that they stand for are counted.
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 2 << 20, 100_000, 50
_MAX_NUMBER = 1000  # characters of a number or date; Python parses them in quadratic time


@dataclass(frozen=True)
class SpecText:
    """The file and text of a spec, for messages that point at its lines."""

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
        name = "".join(f"[{p}]" if isinstance(p, int) else f".{shown(p)}" for p in path)
        return SpecError(f"{place}: {name.lstrip('.') + ': ' if name else ''}{message}")


def read_text(path: Path, *, absent: str) -> str:
    """Return a file's text.

    Raises:
        SpecError: the file cannot be read; `absent` is the message if there is no file.
    """
    try:
        data = read_bytes(path, max_bytes=MAX_BYTES)
    except OutlierMergeError as error:
        raise SpecError(str(error)) from error
    if data is None:
        raise SpecError(f"{path}: {absent}")
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error


def as_yaml(document: Mapping[str, Any]) -> str:
    """Return a document as YAML, which reads back as the same document."""
    text: str = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) == document:
        return text
    escaped: str = yaml.safe_dump(dict(document), sort_keys=False)  # for some line breaks
    return escaped


def parse_yaml(text: str, *, file: str) -> tuple[Any, SpecText]:
    """Return a YAML document's value and the positions of its parts.

    Raises:
        SpecError: it is not valid YAML, has too many values, or a key is duplicate or not a text.
    """
    keys: dict[SpecPath, tuple[int, int]] = {}
    values: dict[SpecPath, tuple[int, int]] = {}
    _check_characters(text, file)
    loader = Loader(text)
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
    except SpecError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{file}: not valid YAML: {error}") from error
    source = SpecText(file, keys, values)
    return raw, source


def plain_yaml(text: str) -> Any:
    """Return the value of a short YAML text, such as an option's.

    Raises:
        ValueError: it is not valid YAML, or has too many values.
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has {len(text):,} characters, the limit is {MAX_BYTES:,}")
        return Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ValueError(error.problem or error.context or "cannot be read") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


class Loader(yaml.SafeLoader):
    """Counts values before they are built, and adds the position to errors for single values."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_values = self._depth = 0
        self._sizes: dict[str | None, int] = {}  # for each anchor, how many values it stands for

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        before = self._num_values
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                self._refuse("it contains itself", self.anchors[event.anchor])
            self._num_values += self._sizes.get(event.anchor, 0)
        self._num_values += 1
        self._depth += 1
        if self._num_values > MAX_VALUES:
            self._refuse(f"here it has more than {MAX_VALUES:,} values, the limit", event)
        if self._depth > MAX_DEPTH:
            self._refuse(f"more than {MAX_DEPTH} lists and mappings in one another", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent) and event.anchor is not None:
            self._sizes[event.anchor] = self._num_values - before
        return node

    def _refuse(self, problem: str, event: Any) -> None:
        raise yaml.composer.ComposerError(None, None, problem, event.start_mark)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            if (
                isinstance(node, yaml.ScalarNode)
                and len(node.value) > _MAX_NUMBER
                and node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:binary")
            ):
                problem = f"a number of {len(node.value):,} characters. Put texts in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{quoted(node.value)} is no {kind}: put a text in quotes",
                node.start_mark,
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
                        f"{file}:{mark[0]}:{mark[1]}: the key {quoted(key.value)} stands twice, "
                        f"first in line {keys[(*path, key.value)][0]}"
                    )
                keys[(*path, key.value)] = mark
                _record_marks(value, (*path, key.value), keys, values, file, parents)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _record_marks(item, (*path, index), keys, values, file, parents)
