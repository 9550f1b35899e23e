"""Names of tensors changed on the way in and out: regular expressions, or a map that ships."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from outliermerge.errors import suggest
from outliermerge.spec.settings import SettingError, SpecPath

# Prefixes of names in two layouts. Those of LLaVA are from the conversion scripts
# (convert_llava_weights_to_hf.py, convert_llava_next_weights_to_hf.py) and the model classes of
# huggingface/transformers. A pair's second half may stand in several pairs; the first such pair is
# the way back.
_LLAVA_ORIGINAL_TO_HF = (
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),
)
_LLAVA_V4_TO_V5 = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("image_newline", "model.image_newline"),
    ("vision_tower.vision_model.", "model.vision_tower."),
    # Saved afresh by transformers 5, the tower has no level `vision_model`.
    ("vision_tower.", "model.vision_tower."),
    # In the names of transformers 4.52 to 4.57 it still has.
    ("vision_tower.vision_model.", "model.vision_tower.vision_model."),
)
# Of Qwen2-VL and Qwen2.5-VL; the published names are those of transformers before 4.52.
_QWEN_VL_V4_TO_V5 = (("model.", "model.language_model."), ("visual.", "model.visual."))
_PAIRS = {
    "llava_original_to_hf": _LLAVA_ORIGINAL_TO_HF,
    "llava_next_original_to_hf": (
        *_LLAVA_ORIGINAL_TO_HF,
        ("model.image_newline", "image_newline"),
    ),
    "transformers_v4_to_v5": _LLAVA_V4_TO_V5,
    "qwen_vl_v4_to_v5": _QWEN_VL_V4_TO_V5,
}
# Each map can be taken backwards: a_to_b as b_to_a.
_BACKWARDS = {
    "llava_hf_to_original": "llava_original_to_hf",
    "llava_next_hf_to_original": "llava_next_original_to_hf",
    "transformers_v5_to_v4": "transformers_v4_to_v5",
    "qwen_vl_v5_to_v4": "qwen_vl_v4_to_v5",
}
MAP_NAMES = (*_PAIRS, *_BACKWARDS)


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
        return _by_prefix(self.label, name)

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


def _by_prefix(map_name: str, name: str) -> str:
    pairs = _pairs(map_name)
    known = [old for old in pairs if name.startswith(old)]
    if not known:
        return name
    longest = max(known, key=len)
    return pairs[longest] + name[len(longest) :]


def _pairs(map_name: str) -> dict[str, str]:
    forwards = _PAIRS[_BACKWARDS.get(map_name, map_name)]
    ordered = reversed(forwards)  # of pairs that begin alike the first one wins
    if map_name in _BACKWARDS:
        return {new: old for old, new in ordered}
    return dict(ordered)


def best_rename(names: Iterable[str], wanted: Mapping[str, Any]) -> tuple[str, int] | None:
    r"""Return the map or prefix rule, as in YAML, that makes most names wanted ones, and how many.

    None where nothing pairs more of them than their names do as they are.

    >>> best_rename(["model.a.b", "model.c"], {"a.b": 1, "c": 1})
    ('[{from: "^model\\\\.", to: ""}]', 2)
    """
    listed = list(names)
    changes: dict[str, Callable[[str], str]] = {
        map_name: partial(_by_prefix, map_name) for map_name in MAP_NAMES
    }
    for prefix in _prefixes(listed):
        changes[_as_yaml(f"^{re.escape(prefix)}", "")] = partial(_without, prefix)
    for prefix in _prefixes(list(wanted)):
        changes[_as_yaml("^", prefix.replace("\\", "\\\\"))] = prefix.__add__
    counts = {
        text: sum(change(name) in wanted for name in listed) for text, change in changes.items()
    }
    best = max(counts, key=lambda text: counts[text])
    return (best, counts[best]) if counts[best] > sum(n in wanted for n in listed) else None


def _as_yaml(pattern: str, replacement: str) -> str:
    """Return a rule as YAML; a JSON text is one in YAML too."""
    return f"[{{from: {json.dumps(pattern)}, to: {json.dumps(replacement)}}}]"


def _prefixes(names: list[str]) -> list[str]:
    """Return the prefixes, up to a dot or slash, of the first and the last name."""
    ends = names[:1] + names[-1:]
    return list(
        dict.fromkeys(n[: i + 1] for n in ends for i, sign in enumerate(n[:-1]) if sign in "./")
    )


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)
