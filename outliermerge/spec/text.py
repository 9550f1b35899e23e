"""YAML read strictly, with the line and column of every key and value."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import yaml

from outliermerge.checkpoint.folders.absent import path_meant
from outliermerge.checkpoint.folders.beside import MANIFEST_NAME
from outliermerge.errors import OutlierMergeError, SpecError, listing_once, quoted, shown
from outliermerge.spec.settings import SettingError, SpecPath
from outliermerge.spec.validation import describe
from outliermerge.spec.yaml_words import in_words
from outliermerge.storage.files import read_bytes

# Limits for a spec. A spec with a filter for every layer of a hundred models has about 40,000
# values in 1 MB; YAML is read at about 40,000 values per second. Aliases can turn a few lines into
# any number of values, so the values that they stand for are counted.
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 2 << 20, 100_000, 50
MAX_MISTAKES = 10  # of a file, that are told at once
_MAX_NUMBER = 1000  # characters of a number or date; Python parses them in quadratic time

_T = TypeVar("_T")
_PLACE = attrgetter("place")


@dataclass(frozen=True)
class SpecText:
    """The file and text of a spec, for messages that point at its lines.

    Attributes:
        lenient: what mergekit passes over in silence is no error, but a warning.
        is_python: it is no file, but a dict.
        said: begins messages on a part of a file.
    """

    file: str
    keys: dict[SpecPath, tuple[int, int]] = field(default_factory=dict)
    values: dict[SpecPath, tuple[int, int]] = field(default_factory=dict)
    lenient: bool = False
    is_python: bool = False
    said: str = ""

    def part(self, path: SpecPath, *, said: str = "") -> SpecText:
        """Return the text of the part that a path leads to; paths into it start there."""
        keys, values = (
            {
                place[len(path) :]: mark
                for place, mark in marks.items()
                if place[: len(path)] == path
            }
            for marks in (self.keys, self.values)
        )
        return replace(self, keys=keys, values=values, said=said)

    def at(self, path: SpecPath) -> SpecText:
        """Return the same text as the part of a larger one, where a path leads to it."""
        keys, values = (
            {(*path, *place): mark for place, mark in marks.items()}
            for marks in (self.keys, self.values)
        )
        return replace(self, keys=keys, values=values)

    def error(
        self,
        path: SpecPath,
        message: str,
        *,
        at_key: bool = False,
        passed_over: SpecPath | None = None,
    ) -> SpecError:
        """Return an error that starts with file, line, column and the key's path."""
        marks = self.keys if at_key else self.values
        ends = range(len(path), -1, -1)
        found = (marks.get(path[:end]) or self.keys.get(path[:end]) for end in ends)
        name = "".join(f"[{p}]" if isinstance(p, int) else f".{shown(p)}" for p in path)
        said = f"{self.said}{name.lstrip('.') + ': ' if name else ''}{message}"
        error = error_at(self.file, next(filter(None, found), (0, 0)), said)
        error.passed_over = passed_over
        return error


def error_at(file: str, place: tuple[int, int], message: str) -> SpecError:
    """Return an error that starts with its file, and with line and column where they are known."""
    error = SpecError(f"{file}:{place[0]}:{place[1]}: {message}" if any(place) else
                      f"{file}: {message}")  # fmt: skip
    error.place = place
    return error


class Mistakes:
    """Gathers what is wrong with a file, so that all of it is told at once, by its lines.

    Attributes:
        found: the errors.
        warnings: what mergekit passes over, if the file is read leniently.
    """

    def __init__(self, source: SpecText) -> None:
        self.source = source
        self.found: list[SpecError] = []
        self.warnings: list[SpecError] = []

    def add(self, error: SpecError | SettingError) -> None:
        """Take up what is wrong: an error, or a warning if mergekit would pass over it."""
        if isinstance(error, SettingError):
            setting, at_key = error, error.at_key
            error = self.source.error(setting.path, str(setting), at_key=at_key)
            error.passed_over, error.meant = setting.passed_over, setting.meant
        is_warning = self.source.lenient and error.passed_over is not None
        (self.warnings if is_warning else self.found).append(error)

    def attempt(self, call: Callable[[], _T], default: _T) -> _T:
        """Return what a call returns; what is wrong is gathered."""
        try:
            return call()
        except SettingError as error:
            for each in error.all:
                self.add(each)
        except SpecError as error:
            self.add(error)
        return default

    def warned(self) -> tuple[str, ...]:
        """Return the warnings, by their lines."""
        return tuple(listing_once(map(str, sorted(self.warnings, key=_PLACE))))

    def passed_over(self) -> list[SpecPath]:
        """Return the keys that lead to what the warnings are about."""
        return [error.passed_over for error in self.warnings if error.passed_over]

    def refuse(self, kind: type[OutlierMergeError] = SpecError) -> None:
        """Raise an error, of one kind or another, if something is wrong."""
        in_order = sorted(self.found, key=_PLACE)
        messages = list(dict.fromkeys(listing_once(error.marked for error in in_order)))
        if (more := len(messages) - MAX_MISTAKES) > 0:
            messages[MAX_MISTAKES:] = [f"… and {more} more"]
        if messages:
            error = kind("\n".join(messages))
            if isinstance(error, SpecError):
                error.all = tuple(in_order)
            raise error


def read_text(path: Path, *, absent: str) -> str:
    """Return a file's text.

    Raises:
        SpecError: the file cannot be read; `absent` is the message if there is no file.
    """
    try:
        data = read_bytes(path, max_bytes=MAX_BYTES)
    except OutlierMergeError as error:
        what = f"{path}: is a folder, expected a YAML file" if path.is_dir() else error.marked
        if (path / MANIFEST_NAME).is_file():
            what += f". To repeat the merge that made it, name {path / MANIFEST_NAME}"
        raise SpecError(what) from error
    if data is None:
        meant = path_meant(path)
        near = f". Did you mean {quoted(str(meant))}?" if meant is not None else ""
        raise SpecError(f"{path}: {absent}{near}")
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: {not_utf8(data, error)}") from error


def not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    """Return what is wrong with a text that is not UTF-8, and what to do."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "is UTF-16, as Windows programs save it: save it as UTF-8"
    line = data.count(b"\n", 0, error.start) + 1
    return (
        f"is no UTF-8 text: found byte 0x{data[error.start]:02x} in line {line}. Save it as UTF-8"
    )


def as_yaml(document: Mapping[str, Any]) -> str:
    """Return a document as YAML, which reads back as the same document."""
    text: str = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) == document:
        return text
    escaped: str = yaml.safe_dump(dict(document), sort_keys=False)  # for some line breaks
    return escaped


def parse_yaml(
    text: str, *, file: str, mistakes: list[SpecError] | None = None
) -> tuple[Any, SpecText]:
    """Return a YAML document's value and the positions of its parts.

    Args:
        mistakes: takes up the duplicate keys; without it the first is raised.

    Raises:
        SpecError: it is not valid YAML, has too many values, a key is duplicate or not a text, or
            a second document follows.
    """
    found = _parsed(text, file, mistakes, lambda loader: iter([loader.get_single_node()]))
    return next(iter(found), (None, SpecText(file)))


def parse_documents(
    text: str, *, file: str, mistakes: list[SpecError] | None = None
) -> list[tuple[Any, SpecText]]:
    """Return what `parse_yaml` does for each of a file's documents that are not empty.

    Raises:
        SpecError: as for parse_yaml.
    """

    def nodes(loader: Any) -> Iterator[Any]:
        while loader.check_node():
            yield loader.get_node()

    return _parsed(text, file, mistakes, nodes)


def _parsed(
    text: str,
    file: str,
    mistakes: list[SpecError] | None,
    nodes: Callable[[Loader], Iterator[Any]],
) -> list[tuple[Any, SpecText]]:
    _check_characters(text, file)
    loader, found = Loader(text), []
    try:
        for node in nodes(loader):
            source = SpecText(file, {}, {})
            _record_marks(node, (), source, [] if mistakes is None else mistakes, parents=())
            raw = loader.construct_document(node) if node is not None else None
            if raw is not None:
                found.append((raw, source))
    except yaml.MarkedYAMLError as error:
        place, problem = in_words(error, text)
        raise error_at(file, place, f"not valid YAML: {problem}") from error
    except SpecError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{file}: not valid YAML: {error}") from error
    return found


def parse_mapping(
    text: str, *, file: str, expected: str
) -> tuple[dict[str, Any], SpecText, list[SpecError]]:
    """Return a YAML mapping, the positions of its parts, and its duplicate keys.

    Args:
        expected: what the mapping must have, for the message.

    Raises:
        SpecError: it is not valid YAML, or no mapping.
    """
    duplicates: list[SpecError] = []
    raw, source = parse_yaml(text, file=file, mistakes=duplicates)
    return as_mapping(raw, source, expected), source, duplicates


def as_mapping(raw: Any, source: SpecText, expected: str) -> dict[str, Any]:
    """Return a YAML document that is a mapping.

    Args:
        expected: what the mapping must have, for the message.

    Raises:
        SpecError: it is no mapping.
    """
    if not isinstance(raw, dict):
        raise source.error((), f"found {describe(raw)}, expected a mapping with `{expected}`")
    return raw


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
        raise ValueError(in_words(error, text)[1]) from error
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
    source: SpecText,
    mistakes: list[SpecError],
    parents: tuple[int, ...],
) -> None:
    if node is None:
        return
    if id(node) in parents:
        raise error_at(source.file, _place(node), "not valid YAML: it contains itself")
    parents = (*parents, id(node))
    source.values[path] = _place(node)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise error_at(
                    source.file,
                    _place(key),
                    "found a key that is not a text. Put it in quotes if it is meant.",
                )
            inner = (*path, key.value)
            if inner in source.keys:
                twice = error_at(
                    source.file,
                    _place(key),
                    f"the key {quoted(key.value)} stands twice, first in line "
                    f"{source.keys[inner][0]}. Remove one of them.",
                )
                twice.passed_over = ()  # the last one counts
                mistakes.append(twice)
                continue
            source.keys[inner] = _place(key)
            _record_marks(value, inner, source, mistakes, parents)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _record_marks(item, (*path, index), source, mistakes, parents)


def _place(node: Any) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1
