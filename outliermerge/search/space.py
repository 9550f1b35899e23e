"""What a search varies: a YAML file of keys, as sweeps name them, with ranges and choices."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from outliermerge.errors import quoted, suggest
from outliermerge.search.keys import KEYS, fits, method_of, place_of, set_key
from outliermerge.spec.settings import SettingError, SpecPath, all_of
from outliermerge.spec.text import Mistakes, SpecText, parse_mapping, read_text

_METHOD = KEYS[0]
_MODELS, _SLICES, _ORDER = "models", "slices", "order"
_MEMBERS_KEYS = ("least",)
_PART_KEYS = ("filter", "layers", "low", "high", "step", "log", "choices", "value")
_FORMS = (
    "a range such as {low: 0, high: 1}, a list of choices, or a list of filter entries that each "
    "have one of these"
)
_MAX_LAYERS, _MAX_CHOICES = 1000, 10_000


@dataclass(frozen=True)
class Dimension:
    """One number or choice that a trial has.

    Attributes:
        name: the key, with the filter and the layers that it is for in brackets.
        low, high: the ends of a range, both included.
        step: the distance between its values; None where all between are possible.
        log: whether the range is searched on a logarithmic scale.
        is_whole: whether its values are whole numbers.
        choices: by their text in place of a range.
    """

    name: str
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    is_whole: bool = False
    choices: Mapping[str, Any] | None = None

    @property
    def points(self) -> list[Any]:
        """All values of it, if they can be counted; else none."""
        if self.choices is not None:
            return list(self.choices)
        step = self.step or (1 if self.is_whole else 0)
        if not step:
            return []
        number = math.floor((self.high - self.low) / step + 1e-9) + 1
        values = (self.low + index * step for index in range(number))
        return [int(value) if self.is_whole else value for value in values]

    @property
    def extremes(self) -> list[Any]:
        """Its choices, or the ends of its range."""
        if self.choices is not None:
            return list(self.choices)
        ends = (self.low, self.high)
        return [int(value) if self.is_whole else value for value in ends]


Ask = Callable[[Dimension], Any]
"""Returns the value of a dimension in a trial; of choices the text."""


@dataclass(frozen=True)
class _Part:
    """The values of a key for the tensors that a filter matches, in groups of layers."""

    filter: str | None
    layers: int | None
    dimension: Dimension | None
    value: Any = None

    def ask(self, key: str, ask: Ask) -> Any:
        if self.dimension is None:
            return self.value
        if self.layers is None:
            return _value(self._named(key, ""), ask)
        groups = (f"{number}/{self.layers}" for number in range(1, self.layers + 1))
        return [_value(self._named(key, group), ask) for group in groups]

    def _named(self, key: str, group: str) -> Dimension:
        assert self.dimension is not None
        where = ", ".join(filter(None, (self.filter, group)))
        name = f"{key}[{where}]" if where else key
        return Dimension(**{**vars(self.dimension), "name": name})


@dataclass(frozen=True)
class Space:
    """What a search varies.

    Attributes:
        source: the file and its lines, for messages.
        values: by key what it can be, for tensors by filters.
        least: by key of `models` how many of them at least take part.
        orders: keys of `slices` whose order is searched.
        text: the file's text.
    """

    source: SpecText
    values: Mapping[str, tuple[_Part, ...]]
    least: Mapping[str, int]
    orders: tuple[str, ...] = ()
    text: str = ""

    def build(self, spec: Mapping[str, Any], ask: Ask) -> dict[str, Any]:
        """Return a spec's document with the values that a function gives.

        A parameter that the method of a trial does not have is not asked for, and left out.
        """
        document: dict[str, Any] = copy.deepcopy(dict(spec))
        for key in self._methods:
            set_key(document, key, self._asked(key, ask))
            _drop_unknown(place_of(document, key).merge)
        absent: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = []
        for key, least in self.least.items():
            absent += _absent(document, key, least, ask)
        away = tuple(said for said, *_ in absent)
        settings = (key for key in self.values if key not in self._methods)
        for key in sorted(settings, key=lambda key: key.count(".")):
            if not key.startswith(away) and fits(document, key):
                set_key(document, key, self._asked(key, ask))
        for key in self.orders:
            _reorder(document, key, ask)
        for _, models, model in absent:
            models[:] = [each for each in models if each is not model]
        return document

    def dimensions(self, spec: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[Dimension]:
        """Return what a trial is asked for, if its choices are some; others are the first."""
        found: list[Dimension] = []

        def ask(dimension: Dimension) -> Any:
            found.append(dimension)
            return chosen.get(dimension.name, dimension.extremes[0])

        self.build(spec, ask)
        return found

    @property
    def _methods(self) -> list[str]:
        return [key for key in self.values if key.rpartition(".")[2] == _METHOD]

    def _asked(self, key: str, ask: Ask) -> Any:
        parts = self.values[key]
        if len(parts) == 1 and parts[0].filter is None:
            return parts[0].ask(key, ask)
        return [
            {**({"filter": part.filter} if part.filter else {}), "value": part.ask(key, ask)}
            for part in parts
        ]

    def combinations(self, spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the choices of methods, which decide what else is asked for."""
        found: list[dict[str, Any]] = [{}]
        for key in self._methods:
            dimension = self.values[key][0].dimension
            assert dimension is not None and dimension.choices is not None
            found = [{**one, key: label} for one in found for label in dimension.choices]
        yield from found


def _value(dimension: Dimension, ask: Ask) -> Any:
    answer = ask(dimension)
    return answer if dimension.choices is None else dimension.choices[answer]


def _drop_unknown(merge: dict[str, Any]) -> None:
    """Leave out the parameters that the method of a merge does not have."""
    known = method_of(merge).parameters
    slices = merge.get("slices", ())
    models = [*merge.get("models", ()), *(source for one in slices for source in one["sources"])]
    for holder in (merge, *slices, *models):
        given = holder.get("parameters") or {}
        for name in [name for name in given if name not in known]:
            del given[name]


def _absent(
    document: dict[str, Any], key: str, least: int, ask: Ask
) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Yield the models that take no part: the start of their keys, their list, and themselves."""
    place = place_of(document, key)
    models, lacking = place.holder[_MODELS], least
    for number, model in enumerate(models, start=1):
        name = f"{place.said}{_MODELS}.{number}"
        if lacking < len(models) - number + 1:  # else it is needed
            both = Dimension(name, choices={"in": True, "out": False})
            if not _value(both, ask):
                yield f"{name}.", models, model
                continue
        lacking = max(0, lacking - 1)


def _reorder(document: dict[str, Any], key: str, ask: Ask) -> None:
    """Put slices into another order: place by place, one of those that are left."""
    place = place_of(document, key)
    left, found = list(place.holder[_SLICES]), list[Any]()
    while len(left) > 1:
        name = f"{place.said}{_SLICES}[{len(found) + 1}]"
        which = ask(Dimension(name, 1, len(left), is_whole=True))
        found.append(left.pop(which - 1))
    place.holder[_SLICES] = found + left


def load_space(path: str | Path) -> Space:
    """Read a space file.

    Raises:
        SpecError: it cannot be read, or something in it is wrong; with file, line and column.
    """
    text = read_text(Path(path), absent="no such space file")
    raw, source, duplicates = parse_mapping(text, file=str(path), expected="KEY: values")
    mistakes = Mistakes(source)
    mistakes.found += duplicates
    values: dict[str, tuple[_Part, ...]] = {}
    least: dict[str, int] = {}
    orders: list[str] = []
    for key, value in raw.items():
        last = key.rpartition(".")[2]
        if last == _MODELS:
            number = mistakes.attempt(partial(_members, value, (key,)), None)
            least |= {} if number is None else {key: number}
        elif last == _SLICES:
            mistakes.attempt(partial(_check_order, value, (key,)), None)
            orders.append(key)
        else:
            parts = mistakes.attempt(partial(_parts, value, (key,), key), None)
            values |= {} if parts is None else {key: parts}
    if not raw:
        mistakes.found.append(source.error((), "is empty: name what is searched, as in t: [2, 3]"))
    mistakes.refuse()
    return Space(source, values, least, tuple(orders), text)


def _members(value: Any, path: SpecPath) -> int:
    if not isinstance(value, Mapping) or list(value) != list(_MEMBERS_KEYS):
        raise SettingError(
            path, f"found {quoted(value)}, expected {{least: N}}: at least N models take part"
        )
    least: Any = value["least"]
    if not _is_whole(least) or least < 1:
        raise SettingError((*path, "least"), f"found {quoted(least)}, expected a number from 1")
    return int(least)


def _check_order(value: Any, path: SpecPath) -> None:
    if value != _ORDER:
        raise SettingError(path, f"found {quoted(value)}, expected `order`: it is searched")


def _parts(value: Any, path: SpecPath, key: str) -> tuple[_Part, ...]:
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        parts = all_of(
            partial(_part, each, (*path, index), key) for index, each in enumerate(value)
        )
    elif isinstance(value, list):
        parts = [_Part(None, None, _choices(value, path, key))]
    else:
        parts = [_part(value, path, key)]
    if all(part.dimension is None for part in parts):
        raise SettingError(path, "has one value: put it into the spec, or give a range or choices")
    if key.rpartition(".")[2] in KEYS:
        only = parts[0].dimension
        if len(parts) > 1 or parts[0] != _Part(None, None, only) or not only or not only.choices:
            raise SettingError(path, "expected a list of choices")
    return tuple(parts)


def _part(value: Any, path: SpecPath, key: str) -> _Part:
    if not isinstance(value, Mapping):
        raise SettingError(path, f"found {quoted(value)}, expected {_FORMS}")
    for each in value:
        if each not in _PART_KEYS:
            said = f"unknown key {quoted(each)}. {suggest(str(each), _PART_KEYS)}"
            raise SettingError((*path, each), said, at_key=True)
    given, layers = value.get("filter"), value.get("layers")
    if given is not None and (not isinstance(given, str) or not given):
        said = f"found {quoted(given)}, expected a part of a tensor's name"
        raise SettingError((*path, "filter"), said)
    if layers is not None and not (_is_whole(layers) and 2 <= layers <= _MAX_LAYERS):
        said = f"found {quoted(layers)}, expected how many groups of layers, from 2"
        raise SettingError((*path, "layers"), said)
    kinds = [name for name in ("choices", "value", "low") if name in value]
    if "high" in value and "low" not in value:
        raise SettingError(path, "a range needs `low`, too")
    if len(kinds) != 1:
        raise SettingError(path, "expected one of: `low` and `high`, `choices`, `value`")
    if kinds == ["value"]:
        return _Part(given, None, None, value["value"])
    if kinds == ["choices"]:
        return _Part(given, layers, _choices(value["choices"], (*path, "choices"), key))
    return _Part(given, layers, _range(value, path, key))


def _range(value: Mapping[str, Any], path: SpecPath, key: str) -> Dimension:
    if "high" not in value:
        raise SettingError(path, "a range needs `high`, too")
    for name in ("low", "high", "step"):
        number = value.get(name, 1)
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise SettingError((*path, name), f"found {quoted(number)}, expected a number")
        if not math.isfinite(number):
            raise SettingError((*path, name), f"found {number}, expected a finite number")
    low, high, step, log = value["low"], value["high"], value.get("step"), value.get("log", False)
    if low >= high:
        raise SettingError(path, f"`low` is {low}, `high` is {high}: `high` must be larger")
    if step is not None and not 0 < step <= high - low:
        raise SettingError((*path, "step"), f"found {step}, expected more than 0, up to the range")
    if not isinstance(log, bool):
        raise SettingError((*path, "log"), f"found {quoted(log)}, expected true or false")
    if log and (low <= 0 or step is not None):
        raise SettingError((*path, "log"), "expected `low` above 0 and no `step`")
    whole = step is not None and all(map(_is_whole, (low, high, step)))
    if whole:
        return Dimension(key, low, high, step, is_whole=True)
    return Dimension(key, float(low), float(high), None if step is None else float(step), log)


def _choices(value: Any, path: SpecPath, key: str) -> Dimension:
    if not isinstance(value, list) or not 1 < len(value) <= _MAX_CHOICES:
        raise SettingError(path, f"found {quoted(value)}, expected a list of two or more choices")
    choices: dict[str, Any] = {}
    for index, each in enumerate(value):
        if each is None:
            raise SettingError((*path, index), "found nothing, expected a value")
        label = _label(each)
        if label in choices:
            raise SettingError((*path, index), f"{quoted(each)} stands twice")
        choices[label] = each
    return Dimension(key, choices=choices)


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
