"""Checks a space against its spec before anything is merged: keys, and the ends of each range."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from outliermerge.errors import OutlierMergeError, SpecError, shown, suggest
from outliermerge.search.keys import KEYS, WrongKeyError, fits, method_of, place_of
from outliermerge.search.space import Dimension, Space
from outliermerge.spec.check import load_spec
from outliermerge.spec.settings import SettingError
from outliermerge.spec.text import Mistakes

_IN_DICT = re.compile(r"^spec: ", re.MULTILINE)  # what a dict is called in messages


def check_space(space: Space, spec: Mapping[str, Any]) -> None:
    """Refuse keys that the spec does not have, and values that it could not have.

    Args:
        spec: the document of a spec that has been checked.

    Raises:
        SpecError: there are such; each line of the message has the file, line and column.
    """
    mistakes = Mistakes(space.source)
    for key, least in space.least.items():
        mistakes.attempt(partial(_check_members, dict(spec), key, least), None)
    for key in space.orders:
        mistakes.attempt(partial(_check_order, dict(spec), key), None)
    for key in space.values:
        mistakes.attempt(partial(_check_key, space, spec, key), None)
    mistakes.refuse()
    told = set[str]()
    for methods in space.combinations(spec):
        for key, said in _wrong_values(space, spec, methods):
            if key not in told:
                told.add(key)
                mistakes.found.append(space.source.error((key,), said))
    mistakes.refuse()


def _check_members(spec: dict[str, Any], key: str, least: int) -> None:
    place = _place(spec, key)
    models = place.holder.get("models")
    if place.rest != "models" or not models:
        raise SettingError((key,), "the spec has no `models` there", at_key=True)
    if least >= len(models):
        said = f"found {least}, but the spec has {len(models)} models: expected fewer"
        raise SettingError((key, "least"), said)


def _check_order(spec: dict[str, Any], key: str) -> None:
    place = _place(spec, key)
    if place.rest != "slices" or len(place.holder.get("slices", ())) < 2:
        raise SettingError((key,), "the spec has no two `slices` there", at_key=True)


def _place(spec: dict[str, Any], key: str) -> Any:
    try:
        return place_of(spec, key)
    except WrongKeyError as error:
        raise SettingError((key,), error.said, at_key=True) from error


def _check_key(space: Space, spec: Mapping[str, Any], key: str) -> None:
    """Refuse a key that the spec does not have with any of the methods."""
    known = dict[str, Any]()
    last = SettingError((key,), "no method has it", at_key=True)
    for methods in space.combinations(spec):
        try:
            document = Space(space.source, _only(space, set(methods)), {}).build(
                spec,
                lambda dimension: methods[dimension.name],  # noqa: B023
            )
            place = place_of(document, key)
            if fits(document, key):
                return
            known |= method_of(place.merge).parameters
            said = f"is no setting of the spec. {suggest(place.rest, [*KEYS, *known])}"
            last = SettingError((key,), said, at_key=True)
        except WrongKeyError as error:
            last = SettingError((key,), error.said, at_key=True)
        except SpecError as error:  # of a method that there is not
            last = SettingError((next(iter(methods), key),), error.marked)
    raise last


def _only(space: Space, keys: set[str]) -> dict[str, Any]:
    return {key: parts for key, parts in space.values.items() if key in keys}


def _wrong_values(
    space: Space, spec: Mapping[str, Any], methods: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return the keys whose values the spec refuses, and why; all others have their first value."""
    found = []
    for dimension in space.dimensions(spec, methods):
        if dimension.name in methods:
            continue
        for value in dimension.extremes:
            chosen = {**methods, dimension.name: value}
            if said := _refused(space, spec, chosen):
                key = _key_of(space, dimension)
                found.append((key, f"with {dimension.name} = {shown(value)}: {said}"))
                break
    if not found and (said := _refused(space, spec, methods)):
        key = next(iter(methods), next(iter(space.values), ""))
        found.append((key, said))
    return found


def _refused(space: Space, spec: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """Return what is wrong with a spec that has some values; empty if nothing."""

    def ask(dimension: Dimension) -> Any:
        return chosen.get(dimension.name, dimension.extremes[0])

    try:
        load_spec(space.build(spec, ask))
    except WrongKeyError as error:
        return error.said
    except OutlierMergeError as error:
        return _IN_DICT.sub("", error.marked)
    return ""


def _key_of(space: Space, dimension: Dimension) -> str:
    """Return the key of the file that a dimension is of."""
    keys = [*space.values, *space.least, *space.orders]
    starts = [key for key in keys if dimension.name == key or dimension.name.startswith(f"{key}[")]
    return max(starts, key=len, default=next(iter(space.least), keys[0]))
