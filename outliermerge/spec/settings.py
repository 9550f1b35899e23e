"""Parameter settings: single values, gradients over layers, and filters on tensor names.

The rules are mergekit's. A filter is a part of the tensor's name, case-sensitive; the first entry
that matches wins. A list of n numbers is a gradient: at position p from 0 (first layer) to 1 (last)
it is interpolated between its neighbours. Texts and booleans do not interpolate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from outliermerge.errors import quoted

# Limits: more values of a gradient than any model has layers, and as many filters as can be matched
# in reasonable time.
_MAX_GRADIENT, _MAX_ENTRIES = 1000, 10_000
SpecPath = tuple[str | int, ...]


_T = TypeVar("_T")


class SettingError(ValueError):
    """A wrong setting, and the keys that lead to it in the spec.

    Attributes:
        all: this one, and those that were found with it.
        passed_over, meant: as those of SpecError.
    """

    def __init__(
        self,
        path: SpecPath,
        message: str,
        *,
        at_key: bool = False,
        passed_over: SpecPath | None = None,
        meant: str | None = None,
    ) -> None:
        super().__init__(message)
        self.path, self.at_key = path, at_key
        self.passed_over, self.meant = passed_over, meant
        self.all: tuple[SettingError, ...] = (self,)


def all_of(calls: Iterable[Callable[[], _T]]) -> list[_T]:
    """Return what each call returns.

    Raises:
        SettingError: some of them raise one; it holds those of all.
    """
    results, errors = [], list[SettingError]()
    for call in calls:
        try:
            results.append(call())
        except SettingError as error:
            errors += error.all
    if errors:
        errors[0].all = tuple(errors)
        raise errors[0]
    return results


class _Checked(Protocol):
    """Checks the values of a setting; a method's Parameter is one."""

    def check(self, value: object) -> Any:
        """Return a value converted to its type, or raise ValueError."""


@dataclass(frozen=True)
class Entry:
    """One value of a setting, for the tensors whose name contains `filter` (None: all)."""

    filter: str | None
    values: tuple[Any, ...]
    is_gradient: bool
    path: SpecPath

    @property
    def filter_path(self) -> SpecPath:
        return (*self.path[:-1], "filter")

    def matches(self, tensor_name: str) -> bool:
        return self.filter is None or self.filter in tensor_name

    def at(self, position: float) -> Any:
        """Return the value at a position between 0 and 1."""
        if not self.is_gradient:
            return self.values[0]
        scaled = position * (len(self.values) - 1)
        low = int(scaled)
        if not all(isinstance(value, float) for value in self.values):
            return self.values[low]
        high = min(low + 1, len(self.values) - 1)
        fraction = scaled - low
        return (1 - fraction) * self.values[low] + fraction * self.values[high]


@dataclass(frozen=True)
class Setting:
    """The entries of a spec for one parameter."""

    entries: tuple[Entry, ...] = ()

    def entry_for(self, tensor_name: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.matches(tensor_name)), None)


def _raise(error: SettingError) -> None:
    raise error


def parse_setting(
    raw: object,
    parameter: _Checked,
    path: SpecPath,
    pass_over: Callable[[SettingError], None] = _raise,
) -> Setting:
    """Return a setting whose values all have the parameter's type and range.

    Args:
        pass_over: called with an unknown key of an entry.

    Raises:
        SettingError: a value has a wrong form or type, or is out of range.
    """
    if isinstance(raw, Mapping):
        return Setting((_conditional(raw, parameter, path, pass_over),))
    if isinstance(raw, list) and raw and isinstance(raw[0], Mapping):
        _check_number(raw, _MAX_ENTRIES, "entries", path)
        entries = all_of(
            partial(_conditional, item, parameter, (*path, index), pass_over)
            for index, item in enumerate(raw)
        )
        return Setting(tuple(entries))
    return Setting((_entry(raw, parameter, None, path),))


def _conditional(
    raw: object, parameter: _Checked, path: SpecPath, pass_over: Callable[[SettingError], None]
) -> Entry:
    if not isinstance(raw, Mapping):
        raise SettingError(path, f"found {quoted(raw)}, expected a filter entry")
    for key in raw:
        if key not in ("filter", "value"):
            said = f"unknown key {quoted(key)}. Valid: filter, value."
            where = (*path, key)
            if "value" not in raw:  # it may be meant, so mergekit refuses it, too
                raise SettingError(where, said, at_key=True)
            pass_over(SettingError(where, said, at_key=True, passed_over=where))
    if "value" not in raw:
        raise SettingError(path, "an entry with a filter needs a `value`")
    name = raw.get("filter")
    if name is not None and (not isinstance(name, str) or not name):
        found = quoted(name)
        raise SettingError((*path, "filter"), f"found {found}, expected a part of a tensor's name")
    return _entry(raw["value"], parameter, None if name == "*" else name, (*path, "value"))


def _entry(raw: object, parameter: _Checked, name: str | None, path: SpecPath) -> Entry:
    is_gradient = isinstance(raw, list)
    items: list[Any] = raw if isinstance(raw, list) else [raw]
    if not items:
        raise SettingError(path, "found an empty list, expected at least one value")
    _check_number(items, _MAX_GRADIENT, "values", path)
    values = all_of(
        partial(_value, item, parameter, (*path, index) if is_gradient else path)
        for index, item in enumerate(items)
    )
    return Entry(name, tuple(values), is_gradient, path)


def _value(item: object, parameter: _Checked, path: SpecPath) -> Any:
    if isinstance(item, (list, Mapping)) or item is None:
        found = "nothing" if item is None else quoted(item)
        raise SettingError(
            path, f"found {found}, expected a value, a list of values or filter entries"
        )
    try:
        return parameter.check(item)
    except ValueError as error:
        raise SettingError(path, str(error)) from error


def _check_number(items: Sequence[object], most: int, what: str, path: SpecPath) -> None:
    if len(items) > most:
        raise SettingError(
            (*path, most), f"found {len(items):,} {what}, of which there may be {most:,}"
        )


@dataclass(frozen=True)
class _Choice:
    """Stands in for a parameter in `parse_setting`, for a setting that is one of a few words."""

    words: tuple[str, ...]

    def check(self, value: object) -> str:
        if not isinstance(value, str) or value not in self.words:
            expected = ", ".join(map(repr, self.words[:-1])) + f" or {self.words[-1]!r}"
            raise ValueError(f"found {quoted(value)}, expected {expected}")
        return value


def parse_policy(raw: object, words: tuple[str, ...], path: SpecPath) -> Setting:
    """Return a setting that is one of a few words, for all tensors or by filters.

    Raises:
        SettingError: a value has a wrong form, or is not one of the words.
    """
    if raw is None:
        return Setting()
    setting = parse_setting(raw, _Choice(words), path)
    for entry in setting.entries:
        if entry.is_gradient:
            raise SettingError(
                entry.path, "found a list of words, expected one word or a list of filter entries"
            )
    return setting


@dataclass(frozen=True)
class Layer:
    """A tensor's place in a stack of layers such as `model.layers.`."""

    stack: str
    index: int
    num_layers: int

    @property
    def position(self) -> float:
        """0 at the first layer, 1 at the last and in a stack of one."""
        return self.index / (self.num_layers - 1) if self.num_layers > 1 else 1.0


_INDEX = re.compile(r"(?:^|\.)(\d+)\.(?=.)")


def find_layers(names: Iterable[str]) -> dict[str, Layer]:
    """Return the layer of each tensor that belongs to a layer.

    The layer is the first whole number between dots in the name; its stack is the text before it.
    A number directly before the last part (`mm_projector.0.weight`) is a module of a sequence,
    not a layer. Tensors outside layers (embeddings, final norm, head) have position 0.

    >>> find_layers(["model.layers.0.mlp.up.weight", "model.layers.1.mlp.up.weight", "head.weight"])
    ... # doctest: +NORMALIZE_WHITESPACE
    {'model.layers.0.mlp.up.weight': Layer(stack='model.layers.', index=0, num_layers=2),
     'model.layers.1.mlp.up.weight': Layer(stack='model.layers.', index=1, num_layers=2)}
    """
    found: dict[str, tuple[str, int]] = {}
    sizes: dict[str, int] = {}
    start: str | None = None  # that of the layer that the names before were of
    for name in names:
        if start is None or not name.startswith(start):
            match = _INDEX.search(name)
            if match is None:
                continue
            start = name[: match.end()]
            place = name[: match.start(1)], int(match[1])
        if name.find(".", len(start) + 1) > 0:
            found[name] = place
            sizes[place[0]] = max(sizes.get(place[0], 0), place[1] + 1)
    layers = {place: Layer(*place, sizes[place[0]]) for place in dict.fromkeys(found.values())}
    return {name: layers[place] for name, place in found.items()}
