"""Models of different architectures: how they differ in a line, and whether they can be merged."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.errors import shown
from outliermerge.planning.differences import facts_of, is_senseless
from outliermerge.planning.plan import Input

_UNITS = ((10**9, "B"), (10**6, "M"), (10**3, "k"))
CANNOT = "Models of different architectures or sizes cannot be merged."


def verdict_on(
    inputs: Sequence[Input], unfit: Collection[int], unpaired: Collection[int], *, cannot: bool
) -> list[str]:
    """Return whether models with other tensors than the first can be merged, and what they are.

    Args:
        unfit: the numbers of models with tensors of another shape; `unpaired` of other names.
        cannot: whether it is known already that they cannot.
    """
    cannot = cannot or any(differ_in_size(inputs[number], inputs[0]) for number in unfit)
    first = CANNOT if cannot else "the models do not hold the same tensors"
    return [first, *compare_architectures(inputs, {*unfit, *unpaired})]


def compare_architectures(inputs: Sequence[Input], numbers: Iterable[int]) -> list[str]:
    """Return a line for each of some models that is of another architecture or size than the first.

    Args:
        numbers: the numbers of those models.
    """
    first, *others = [inputs[0], *(inputs[number] for number in sorted(numbers))]
    return [
        f"{shown(other.reference)} is {_said(other)}; {shown(first.reference)} is {_said(first)}."
        for other in others
        if _kind(other) != _kind(first) or differ_in_size(other, first)
    ]


def differ_in_size(entry: Input, other: Input) -> bool:
    """Tell whether two models' configs have other numbers of layers, heads or features."""
    return _differ(_facts(entry), _facts(other))


def differ_in_kind(entry: Input, other: Input) -> bool:
    """Tell whether two models' configs name different model types."""
    kinds = [_facts(each).get("model_type") for each in (entry, other)]
    return None not in kinds and kinds[0] != kinds[1]


def _differ(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return any(
        None not in (value, theirs.get(key))
        and value != theirs[key]
        and (key == "hidden_size" or is_senseless(key, value))
        for key, value in ours.items()
    )


def _kind(entry: Input) -> str:
    config = _config(entry)
    named = config.get("architectures")
    kind = named[0] if isinstance(named, list) and named else config.get("model_type")
    return shown(kind) if kind else "of no known architecture"


def _said(entry: Input) -> str:
    """Return a model's architecture, layers and size in words."""
    facts = _facts(entry)
    number = sum(source.num_elements for source in entry.checkpoint.tensors.values())
    unit, sign = next(((unit, sign) for unit, sign in _UNITS if number >= unit), (1, ""))
    sizes = (("num_hidden_layers", "{} layers"), ("hidden_size", "hidden size {}"))
    parts = [text.format(shown(facts[key])) for key, text in sizes if facts.get(key) is not None]
    parts.append(f"{number / unit:.3g}{sign} parameters")
    return f"{_kind(entry)} ({', '.join(parts)})"


def _config(entry: Input) -> dict[str, Any]:
    return read_json(entry.home / "config.json") if entry.home.is_dir() else {}


def _facts(entry: Input) -> dict[str, Any]:
    config = _config(entry)
    return facts_of(config) if config else {}
