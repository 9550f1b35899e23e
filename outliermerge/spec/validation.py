"""A file's keys and types checked by pydantic, and what is wrong with them in plain words."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from outliermerge.errors import nearest, quoted, shown

_Kind = TypeVar("_Kind", bound=BaseModel)
_MAX_ROUNDS = 5  # a wrong item of a list is emptied, then it lacks keys, which are filled in


def validated(
    kind: type[_Kind], raw: Mapping[str, Any], stand_ins: Mapping[str, Any]
) -> tuple[_Kind | None, list[Any]]:
    """Return a file's content, and what is wrong with it.

    What is wrong is left out of the content, so that the rest of it can be checked as well.

    Args:
        stand_ins: by key what stands for the value of a required one.
    """
    problems: list[Any] = []
    for _ in range(_MAX_ROUNDS):
        try:
            return kind.model_validate(raw), problems
        except ValidationError as error:
            found = error.errors(include_url=False)
            problems = problems or found
            raw = copy.deepcopy(dict(raw))
            for problem in found:
                _leave_out(raw, problem, stand_ins)
    return None, problems


def _leave_out(raw: Any, problem: Any, stand_ins: Mapping[str, Any]) -> None:
    *parents, last = problem["loc"]
    if last == "[key]":  # the key itself is wrong
        last = parents.pop()
    for key in parents:
        inner = raw[key] if isinstance(raw, list) else raw.get(key)
        if not isinstance(inner, (dict, list)):  # a union's own name for one of its kinds
            last = key
            break
        raw = inner
    if isinstance(raw, list):
        raw[last] = {}
    elif problem["type"] == "missing":
        raw[last] = copy.deepcopy(stand_ins.get(last))
    elif last in raw:
        del raw[last]
    else:  # a key of another type, which the problem tells as a text
        for key in [key for key in raw if str(key) == str(last)]:
            del raw[key]


def describe(value: object) -> str:
    """Return a value as a message names it."""
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value), quoted(value))


def in_words(problem: Any) -> str:
    """Return one of pydantic's problems as a sentence."""
    found, limits = f"found {describe(problem['input'])}, expected ", problem.get("ctx") or {}
    match problem["type"]:
        case "literal_error":
            return f"{found}{limits['expected']}"
        case "too_short" | "too_long" if limits["actual_length"]:
            wanted = limits.get("min_length", limits.get("max_length"))
            return f"found {limits['actual_length']:,} value(s), expected {wanted:,}"
        case "too_short" | "string_too_short":
            return "must not be empty"
        case "string_too_long":
            return f"is longer than {limits['max_length']:,} characters"
        case "string_type":
            return f"{found}a text"
        case "list_type":
            return f"{found}a list"
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"{found}a mapping"
        case "int_type" | "int_from_float" | "int_parsing":
            return f"{found}a whole number"
        case "bool_type" | "bool_parsing":
            return f"{found}true or false"
        case "greater_than_equal":
            return f"{found}{limits['ge']:,} or more"
        case "less_than_equal":
            return f"{found}{limits['le']:,} or less"
        case _:
            return f"found {describe(problem['input'])}: {problem['msg']}"


def how_to_write(problem: Any, *, python: bool = False) -> str:
    """Return how an item of a list is written that was found as a bare text, or without a dash.

    Args:
        python: write it in Python, not in YAML.
    """
    path, value = problem["loc"], problem["input"]
    if python:
        return _in_python(path, value)
    if problem["type"] == "dict_type" and isinstance(value, list):
        return ": write its keys without dashes and brackets"
    if path[-1] == "layer_range":
        if numbers := re.fullmatch(r"\D*(\d{1,9})\D+(\d{1,9})\D*", str(value)):
            start, stop = int(numbers[1]), int(numbers[2])
            return f": write [{start}, {stop}] for the layers {start} to {stop - 1}"
        return ": write [a, b] for the layers a to b - 1"
    name = {"models": "model", "modifiers": "modifier"}.get(str(path[0]))
    if name is None or len(path) > 2 or not isinstance(path[-1], (str, int)):
        return ""
    if isinstance(value, dict) and name in value and len(path) == 1:
        return f": write a dash before each, `- {name}: {shown(value[name])}`"
    if isinstance(value, dict) and f"-{name}" in value:
        return f": write a space after the dash, `- {name}: {shown(value[f'-{name}'])}`"
    if not isinstance(value, str):
        return ""
    if "," in value:
        return f": write `- {name}: …` for each, in a line of its own"
    bare = re.sub(rf"^{name}(: *| +)(?=.)", "", value)
    colon = ", with a colon and a space" if bare != value else ""
    return f": write `- {name}: {shown(bare)}`{colon}"


def _in_python(path: Sequence[str | int], value: object) -> str:
    name = {"models": "model", "modifiers": "modifier"}.get(str(path[0]))
    if name is None or len(path) > 2:
        return ""
    text = value.get(name) if isinstance(value, dict) else value
    if not isinstance(text, str):
        return ""
    entry = quoted(value if isinstance(value, dict) else {name: text})
    return f": write {entry if len(path) == 2 else f'[{entry}]'}"


def without_consequences(problems: Sequence[Any]) -> Iterator[Any]:
    """Yield what is wrong, without keys that are missing because they are misspelt."""
    unknown = [problem["loc"] for problem in problems if problem["type"] == "extra_forbidden"]
    for problem in problems:
        is_missing = problem["type"] == "missing"
        if not (is_missing and any(is_meant(problem, path) for path in unknown)):
            yield problem


def is_meant(problem: Any, unknown: Sequence[Any]) -> bool:
    """Tell whether a missing key was meant by an unknown one beside it."""
    *place, name = problem["loc"]
    *other, key = unknown
    return place == other and nearest(name, [str(key)]) is not None
