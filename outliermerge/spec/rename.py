"""Renames tensors of inputs and of the output, by regular expressions or by built-in maps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from outliermerge.checkpoint.patterns import (
    MAX_PATTERN,
    MAX_SECONDS,
    Budget,
    Pattern,
    PatternError,
    TooSlowError,
)
from outliermerge.checkpoint.sources import is_name
from outliermerge.errors import quoted, shown, suggest
from outliermerge.spec.rename_maps import MAP_NAMES, by_map
from outliermerge.spec.rename_search import best_rename, find_rename
from outliermerge.spec.settings import SettingError, SpecPath, all_of
from outliermerge.spec.similar import part_meant

__all__ = ["MAP_NAMES", "Rename", "Rule", "best_rename", "find_rename", "parse_rename"]


_MAX_RULES = 1000


@dataclass(frozen=True)
class Rule:
    """One regular expression and its replacement, or one named map.

    Attributes:
        label: the rule as the user wrote it.
        path: the keys that lead to it in the spec.
    """

    label: str
    path: SpecPath
    pattern: Pattern | None = None
    replacement: str = ""

    def __call__(self, name: str) -> str:
        if self.pattern is None:
            return by_map(self.label, name)
        try:
            return self.pattern.sub(self.replacement, name)
        except TooSlowError as error:
            raise self._too_slow(name) from error

    def matches(self, name: str) -> bool:
        """Tell whether the rule applies to a name."""
        if self.pattern is None:
            return self(name) != name
        try:
            return self.pattern.search(name)
        except TooSlowError as error:
            raise self._too_slow(name) from error

    def _too_slow(self, name: str) -> SettingError:
        return SettingError(
            (*self.path, "from"),
            f"{quoted(self.label)} takes more than {MAX_SECONDS} seconds to match names such as "
            f"{quoted(name)}. Write it without repeats within repeats.",
        )


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
                near = "" if rule.pattern is None else (
                    " " + part_meant(rule.label, renamed.values(), is_pattern=True)
                )  # fmt: skip
                raise SettingError(
                    rule.path,
                    f"{quoted(rule.label)} matches no tensor; there is for example "
                    f"{quoted(example)}.{near}",
                )
            renamed = {old: rule(new) for old, new in renamed.items()}
            origin: dict[str, str] = {}
            for old, new in renamed.items():
                if new in origin:
                    raise SettingError(
                        rule.path,
                        f"{quoted(origin[new])} and {quoted(old)} both become {quoted(new)}",
                    )
                origin[new] = old
                if not is_name(new):
                    raise SettingError(
                        rule.path,
                        f"{quoted(old)} becomes {quoted(new)}, which cannot be a tensor's name",
                    )
        return renamed

    def counts(self, names: Iterable[str]) -> dict[str, tuple[int, str, str]]:
        """Return for each rule how many names it changes, and one of them before and after."""
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
        SettingError: the value has a wrong form, a map is unknown, or an expression is not valid.
    """
    if raw is None:
        return Rename()
    budget = Budget()
    if isinstance(raw, list):
        if not raw:
            raise SettingError(path, "must not be empty")
        if len(raw) > _MAX_RULES:
            what = f"found {len(raw):,} rules, of which there may be {_MAX_RULES:,}"
            raise SettingError((*path, _MAX_RULES), what)
        rules = enumerate(raw)
        return Rename(
            tuple(all_of(partial(_rule, item, (*path, index), budget) for index, item in rules))
        )
    return Rename((_rule(raw, path, budget),))


def _rule(raw: object, path: SpecPath, budget: Budget) -> Rule:
    if isinstance(raw, str):
        if raw not in MAP_NAMES:
            raise SettingError(path, f"there is no map {quoted(raw)}. {suggest(raw, MAP_NAMES)}")
        return Rule(raw, path)
    if not isinstance(raw, Mapping):
        raise SettingError(
            path,
            f"found {quoted(raw)}, expected the name of a map, or a list of `from:` and `to:`",
        )
    for key in raw:
        if key not in ("from", "to"):
            raise SettingError(
                (*path, key), f"unknown key {quoted(key)}. Valid: from, to.", at_key=True
            )
    for key in ("from", "to"):
        if not isinstance(raw.get(key), str) or (key == "from" and not raw[key]):
            raise SettingError(path, f"needs `{key}`, a text")
    return _regex_rule(raw, path, budget)


def _regex_rule(raw: Mapping[str, Any], path: SpecPath, budget: Budget) -> Rule:
    try:
        pattern = Pattern(raw["from"], budget)
    except PatternError as error:
        raise SettingError(
            (*path, "from"), f"{quoted(raw['from'])} is not a regular expression: {shown(error)}"
        ) from error
    if len(raw["to"]) > MAX_PATTERN:
        what = f"has {len(raw['to']):,} characters, the limit is {MAX_PATTERN:,}"
        raise SettingError((*path, "to"), what)
    try:  # fails if the replacement names a group that the expression lacks
        re.compile(pattern.text + "|").sub(raw["to"], "")  # the `|` lets it match an empty text
    except (re.error, IndexError) as error:
        raise SettingError((*path, "to"), f"{quoted(raw['to'])}: {shown(error)}") from error
    return Rule(raw["from"], path, pattern, raw["to"])
