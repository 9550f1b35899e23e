"""Names of tensors changed on the way in and out: regular expressions, or a map that ships."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from outliermerge.errors import suggest
from outliermerge.spec.rename_maps import MAP_NAMES, by_map
from outliermerge.spec.rename_search import best_rename, find_rename
from outliermerge.spec.settings import SettingError, SpecPath

__all__ = ["MAP_NAMES", "Rename", "Rule", "best_rename", "find_rename", "parse_rename"]


@dataclass(frozen=True)
class Rule:
    """One regular expression and its replacement, or one named map.

    Attributes:
        label: as the user wrote it.
        path: where it stands in the spec.
    """

    label: str
    path: SpecPath
    pattern: re.Pattern[str] | None = None
    replacement: str = ""

    def __call__(self, name: str) -> str:
        if self.pattern is not None:
            return self.pattern.sub(self.replacement, name)
        return by_map(self.label, name)

    def matches(self, name: str) -> bool:
        """Tell whether the rule has something to say of a name."""
        return bool(self.pattern.search(name)) if self.pattern else self(name) != name


@dataclass(frozen=True)
class Rename:
    """Rules that are applied one after another."""

    rules: tuple[Rule, ...] = ()

    def __call__(self, name: str) -> str:
        for rule in self.rules:
            name = rule(name)
        return name

    def apply(self, names: Iterable[str], check: bool = True) -> dict[str, str]:
        """Return the new name of each name.

        Raises:
            SettingError: a rule matches no name, or two names become one.
        """
        renamed = {name: name for name in names}
        for rule in self.rules:
            if check and not any(rule.matches(name) for name in renamed.values()):
                example = next(iter(renamed.values()), "")
                raise SettingError(
                    rule.path, f"{rule.label!r} matches no tensor; there is for example {example!r}"
                )
            renamed = {old: rule(new) for old, new in renamed.items()}
            origin: dict[str, str] = {}
            for old, new in renamed.items():
                if new in origin:
                    raise SettingError(
                        rule.path, f"{origin[new]!r} and {old!r} both become {new!r}"
                    )
                origin[new] = old
                if new in ("", "__metadata__") or any("\ud800" <= c <= "\udfff" for c in new):
                    raise SettingError(
                        rule.path, f"{old!r} becomes {new!r}, which cannot be a tensor's name"
                    )
        return renamed

    def counts(self, names: Iterable[str]) -> dict[str, tuple[int, str, str]]:
        """Return, by rule, how many names it changes, and one of them before and after."""
        result: dict[str, tuple[int, str, str]] = {}
        current = list(names)
        for rule in self.rules:
            changed = [(name, rule(name)) for name in current if rule(name) != name]
            if changed:
                result[rule.label] = (len(changed), *changed[0])
            current = [rule(name) for name in current]
        return result


def parse_rename(raw: object, path: SpecPath) -> Rename:
    """Return the rules that a spec's `rename:` gives.

    Raises:
        SettingError: the form is wrong, a map is unknown, or an expression is not valid.
    """
    if raw is None:
        return Rename()
    if isinstance(raw, list):
        if not raw:
            raise SettingError(path, "must not be empty")
        return Rename(tuple(_rule(item, (*path, index)) for index, item in enumerate(raw)))
    return Rename((_rule(raw, path),))


def _rule(raw: object, path: SpecPath) -> Rule:
    if isinstance(raw, str):
        if raw not in MAP_NAMES:
            raise SettingError(path, f"there is no map {raw!r}. {suggest(raw, MAP_NAMES)}")
        return Rule(raw, path)
    if not isinstance(raw, Mapping):
        raise SettingError(
            path, f"found {raw!r}, expected the name of a map, or a list of `from:` and `to:`"
        )
    for key in raw:
        if key not in ("from", "to"):
            raise SettingError((*path, key), f"unknown key {key!r}. Valid: from, to.", at_key=True)
    for key in ("from", "to"):
        if not isinstance(raw.get(key), str) or (key == "from" and not raw[key]):
            raise SettingError(path, f"needs `{key}`, a text")
    return _regex_rule(raw, path)


def _regex_rule(raw: Mapping[str, Any], path: SpecPath) -> Rule:
    try:
        pattern = re.compile(raw["from"])
    except re.error as error:
        raise SettingError(
            (*path, "from"), f"{raw['from']!r} is not a regular expression: {error}"
        ) from error
    try:  # a replacement that names a group which the expression lacks
        re.compile(pattern.pattern + "|").sub(raw["to"], "")  # also matches the empty text
    except (re.error, IndexError) as error:
        raise SettingError((*path, "to"), f"{raw['to']!r}: {error}") from error
    return Rule(raw["from"], path, pattern, raw["to"])
