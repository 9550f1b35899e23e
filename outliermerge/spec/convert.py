"""Rules for tensors that one model has apart, and another together; and the output's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from outliermerge.errors import quoted
from outliermerge.spec.settings import SettingError, SpecPath

IN_MEMORY = "transformers"
"""The `layout` of a model's class in memory; others are those of models."""
KEYS = ("from", "to", "axis", "transpose")
_MAX_RULES, _MAX_AXIS = 1000, 63


@dataclass(frozen=True)
class Conversion:
    """A rule that holds in both directions.

    Attributes:
        parts: texts in the names of the tensors that are apart; `*` stands for a number, and
            tensors that differ in it are stacked.
        whole: what takes the place of such a text in the name of the tensor that they are in.
        axis: along which the parts lie side by side, after they are stacked.
        transposes: the whole has its last two axes the other way round.
        path: the keys that lead to it in the spec.
    """

    parts: tuple[str, ...]
    whole: str
    axis: int
    transposes: bool
    path: SpecPath


def parse_conversions(raw: object, path: SpecPath) -> tuple[Conversion, ...]:
    """Return the rules that a spec's `convert:` gives.

    Raises:
        SettingError: a rule has a wrong form.
    """
    if raw is None:
        return ()
    rules = raw if isinstance(raw, list) else [raw]
    if not rules:
        raise SettingError(path, "must not be empty")
    if len(rules) > _MAX_RULES:
        what = f"found {len(rules):,} rules, of which there may be {_MAX_RULES:,}"
        raise SettingError((*path, _MAX_RULES), what)
    return tuple(
        _parsed(rule, (*path, number) if isinstance(raw, list) else path)
        for number, rule in enumerate(rules)
    )


def _parsed(raw: object, path: SpecPath) -> Conversion:
    if not isinstance(raw, Mapping):
        raise SettingError(path, f"found {quoted(raw)}, expected a mapping of `from:` and `to:`")
    for key in raw:
        if key not in KEYS:
            said = f"unknown key {quoted(key)}. Valid: {', '.join(KEYS)}."
            raise SettingError((*path, key), said, at_key=True)
    for key in ("from", "to"):
        if key not in raw:
            raise SettingError(path, f"needs `{key}`")
    parts = [raw["from"]] if isinstance(raw["from"], str) else raw["from"]
    if not isinstance(parts, list) or not parts or not all(_is_text(part) for part in parts):
        said = f"found {quoted(raw['from'])}, expected a part of a tensor's name, or several"
        raise SettingError((*path, "from"), said)
    if not _is_text(raw["to"]) or "*" in raw["to"]:
        said = f"found {quoted(raw['to'])}, expected a part of a tensor's name without `*`"
        raise SettingError((*path, "to"), said)
    if len(set(parts)) < len(parts):
        raise SettingError((*path, "from"), "names the same tensors twice")
    if any(part.count("*") > 1 for part in parts) or len({"*" in part for part in parts}) > 1:
        said = "has `*` in some texts only, or twice in one: it stands for one number in each"
        raise SettingError((*path, "from"), said)
    axis = raw.get("axis", 0)
    if not isinstance(axis, int) or isinstance(axis, bool) or not 0 <= axis <= _MAX_AXIS:
        said = f"found {quoted(axis)}, expected the number of an axis, from 0 on"
        raise SettingError((*path, "axis"), said)
    transposes = raw.get("transpose", False)
    if not isinstance(transposes, bool):
        said = f"found {quoted(transposes)}, expected true or false"
        raise SettingError((*path, "transpose"), said)
    if len(parts) == 1 and "*" not in parts[0] and not transposes:
        raise SettingError(path, "only changes a name: write it as a `rename`")
    return Conversion(tuple(parts), raw["to"], axis, transposes, path)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
