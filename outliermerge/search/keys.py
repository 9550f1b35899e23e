"""The keys of sweeps and searches: settings of a spec, its stages, modules, slices and models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outliermerge.errors import ArgumentError, argument, shown, suggest
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.table import find_method
from outliermerge.spec.modules import MODULES
from outliermerge.spec.stages import NAME, STAGES

KEYS = ("merge_method", "dtype", "out_dtype")
"""The keys besides parameters."""
_NUMBERED = re.compile(r"(\w+)\.(\d{1,9})\.(.+)")


class WrongKeyError(ArgumentError):
    """A key that names no setting of a spec, or one that would have no effect.

    Attributes:
        said: what is wrong, without the key.
    """

    def __init__(self, key: str, said: str) -> None:
        super().__init__(f"{argument('settings')} {shown(key)}: {said}")
        self.said = said


@dataclass(frozen=True)
class Place:
    """What of a spec a key is of: a merge, a slice or a model.

    Attributes:
        holder: the mapping that gets the value.
        said: the part of the key that names it, such as `stages.a.`.
        rest: the part of the key that is left.
        merge: the merge that it is of.
        is_module: whether that is a module.
    """

    holder: dict[str, Any]
    said: str
    rest: str
    merge: dict[str, Any]
    is_module: bool = False

    @property
    def models(self) -> list[dict[str, Any]]:
        """The models of the place, or the sources of a slice."""
        found: list[dict[str, Any]] = self.holder.get("models") or self.holder.get("sources") or []
        return found


def set_key(document: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of a spec's document, such as `t`, `models.1.weight` or `stages.a.slices.2.t`.

    Raises:
        ArgumentError: there is no such setting, or another value in the spec would win.
    """
    place = place_of(document, key)
    holder, name = place.holder, place.rest
    is_merge = holder is place.merge
    if name in KEYS and is_merge and (name == KEYS[0] or not place.is_module):
        if MODULES in holder and name == KEYS[0]:
            raise WrongKeyError(key, f"the spec has modules: write {MODULES}.NAME.{name}")
        holder[name] = value
        return
    if not name.isidentifier() or name in KEYS:
        known = [*KEYS, *method_of(place.merge).parameters, "models.1.weight"]
        raise WrongKeyError(key, f"is no setting of a spec. {suggest(key, known)}")
    for each in _in_modules(place, key) if is_merge and MODULES in holder else [holder]:
        _refuse_own(each, place.said, name, key)
        each.setdefault("parameters", {})[name] = value


def place_of(document: dict[str, Any], key: str) -> Place:
    """Return what a key is of, by its parts.

    Raises:
        WrongKeyError: there is no such stage, module, slice or model.
    """
    place = Place(document, "", key, document)
    while "." in place.rest:
        word = place.rest.partition(".")[0]
        if word in (STAGES, MODULES):
            place = _in_named(place, word, key)
        elif match := _NUMBERED.fullmatch(place.rest):
            place = _in_numbered(place, match[1], int(match[2]), match[3], key)
        else:
            break
    return place


def _in_named(place: Place, word: str, key: str) -> Place:
    entries = place.holder.get(word, {})
    named = {each[NAME]: each for each in entries} if word == STAGES else dict(entries)
    rest = place.rest.removeprefix(f"{word}.")
    fitting = [name for name in named if rest.startswith(f"{name}.")]
    if not fitting:
        what = "stage" if word == STAGES else "module"
        told = rest.partition(".")[0]
        raise WrongKeyError(key, f"there is no {what} {shown(told)}. {suggest(told, named)}")
    name = max(fitting, key=len)
    found = named[name]
    said, rest = f"{place.said}{word}.{name}.", rest.removeprefix(f"{name}.")
    return Place(found, said, rest, found, is_module=word == MODULES)


def _in_numbered(place: Place, word: str, number: int, rest: str, key: str) -> Place:
    holder = place.holder
    if word == "slices":
        entries = holder.get("slices", [])
    elif word in ("models", "sources"):
        entries = place.models
        if "slices" in holder:
            raise WrongKeyError(
                key, f"the spec has slices: write {place.said}slices.N.{word}.M.{rest}"
            )
    else:
        raise WrongKeyError(key, f"is no setting of a spec. {suggest(word, ['models', 'slices'])}")
    if not 1 <= number <= len(entries):
        one = word.removesuffix("s")
        many = f"{word} 1 to {len(entries)}" if entries else f"no {word}"
        raise WrongKeyError(key, f"there is no {one} {number}: the spec has {many}")
    said = f"{place.said}{word}.{number}."
    return Place(entries[number - 1], said, rest, place.merge)


def _in_modules(place: Place, key: str) -> list[dict[str, Any]]:
    """Return the modules whose method has a parameter; all must have the same value of it now."""
    modules: Mapping[str, dict[str, Any]] = place.holder[MODULES]
    found = {
        name: module
        for name, module in modules.items()
        if place.rest in method_of(module).parameters
    }
    if not found:
        known = {each for module in modules.values() for each in method_of(module).parameters}
        raise WrongKeyError(key, f"no module has such a parameter. {suggest(place.rest, known)}")
    values = [(module.get("parameters") or {}).get(place.rest) for module in found.values()]
    if any(value != values[0] for value in values):
        ways = " and ".join(f"{place.said}{MODULES}.{name}.{place.rest}" for name in found)
        raise WrongKeyError(key, f"the modules have different values of it in the spec: set {ways}")
    return list(found.values())


def fits(document: dict[str, Any], key: str) -> bool:
    """Tell whether the method that a key is about has such a parameter.

    Raises:
        WrongKeyError: the key names no place of the spec.
    """
    place = place_of(document, key)
    if place.rest in KEYS:
        return True
    merges = place.merge[MODULES].values() if MODULES in place.merge else [place.merge]
    return any(place.rest in method_of(merge).parameters for merge in merges)


def method_of(merge: Mapping[str, Any]) -> MergeMethod:
    """Return the method of a merge, as its document names it."""
    method = find_method(merge["merge_method"])
    return method.with_base if method.with_base and merge.get("base_model") else method


def _refuse_own(holder: Mapping[str, Any], said: str, name: str, key: str) -> None:
    """Refuse a parameter that what is in a merge or slice has of its own."""
    for number, one in enumerate(holder.get("slices", ()), start=1):
        if any(name in (entry.get("parameters") or {}) for entry in (one, *one["sources"])):
            raise WrongKeyError(
                key, f"slice {number} has a {shown(name)} of its own in the spec, which would win. "
                f"Set {said}slices.{number}.{name}, or leave it out there"
            )  # fmt: skip
    for number, model in enumerate(holder.get("models") or holder.get("sources") or (), start=1):
        if name in (model.get("parameters") or {}):
            raise WrongKeyError(
                key, f"model {number} has a {shown(name)} of its own in the spec, which would win. "
                f"Set {said}models.{number}.{name}, or leave it out there."
            )  # fmt: skip
