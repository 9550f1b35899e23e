"""The parameters of a plan as the spec sets them: one row for each model and filter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outliermerge.planning.plan import Plan
from outliermerge.spec.inert import INERT_PARAMETERS
from outliermerge.spec.models import ModelSpec
from outliermerge.spec.settings import Entry, Setting


@dataclass(frozen=True)
class UsedSetting:
    """A value of a parameter, and the tensors that it is for.

    Attributes:
        models: the models that have it; empty if it is of the whole merge.
        filter: a part of the tensors' names; None for all that no filter above takes.
        values: one value, or the values between which a gradient over the layers runs.
        num_tensors: how many merged tensors use it.
    """

    parameter: str
    models: tuple[str, ...]
    filter: str | None
    values: tuple[Any, ...]
    num_tensors: int

    @property
    def text(self) -> str:
        """The value as a person reads it.

        >>> UsedSetting("weight", (), None, (0.2, 0.5), 3).text
        '0.2→0.5'
        """
        return "→".join(map(_text, self.values))

    def as_dict(self) -> dict[str, Any]:
        """Return the setting as JSON values."""
        return {
            "parameter": self.parameter,
            "models": list(self.models),
            "filter": self.filter,
            "values": list(self.values),
            "num_tensors": self.num_tensors,
        }


def used_settings(plan: Plan) -> list[UsedSetting]:
    """Return the settings that merged tensors use; those without effect are left out.

    Models with the same settings of a parameter share rows.
    """
    names = _merged_names(plan)
    own_settings = _own_settings(plan)
    found: list[UsedSetting] = []
    for parameter in plan.spec.method.parameters.values():
        if parameter.name in INERT_PARAMETERS:
            continue
        models: Sequence[ModelSpec | None] = plan.spec.models if parameter.per_model else [None]
        rows: dict[tuple[Any, ...], list[str]] = {}
        for model in models:
            reference = "" if model is None else model.reference
            counts = Counter(
                _entry(own_settings(reference, name), parameter.name, own)
                for name, own in names[reference]
            )
            key = tuple(
                (entry.filter, entry.values, count)
                if entry is not None
                else (None, (parameter.default,), count)
                for entry, count in sorted(counts.items(), key=_by_place)
            )
            rows.setdefault(key, []).append(reference)
        for key, references in rows.items():
            own = tuple(references) if parameter.per_model else ()
            found += [
                UsedSetting(parameter.name, own, filter_, values, count)
                for filter_, values, count in key
            ]
    return found


def _merged_names(plan: Plan) -> dict[str, list[tuple[str, str]]]:
    """Return the merged tensors by model, and under "" all of them.

    For each its name in the output and, as filters of the model see it, in the model.
    """
    found: dict[str, list[tuple[str, str]]] = {"": []}
    found |= {model.reference: [] for model in plan.spec.models}
    for job, _ in plan.weight_jobs:
        if job.action != "merge":
            continue
        name = job.context.name
        found[""].append((name, name))
        # A model of a method on weights is there even where another's tensor stands in.
        for number, _ in job.sources:
            reference = plan.inputs[number].reference
            if reference in found:
                own = plan.stacked.own_name(name, number) if plan.stacked else name
                found[reference].append((name, own))
    return found


def _own_settings(plan: Plan) -> Callable[[str, str], tuple[Mapping[str, Setting], ...]]:
    """Return what gives the settings of a model, or of all, for a tensor of the output."""
    spec, stacked = plan.spec, plan.stacked
    if stacked is None:
        by_model = {model.reference: (model.settings, spec.settings) for model in spec.models}
        return lambda reference, name: by_model.get(reference, (spec.settings,))
    slices = [
        {model.reference: (model.settings, one.settings, spec.settings) for model in one.models}
        | {"": (one.settings, spec.settings)}
        for one in spec.slices
    ]

    def levels(reference: str, name: str) -> tuple[Mapping[str, Setting], ...]:
        found = slices[stacked.slice_of(name)]
        return found.get(reference, found[""])

    return levels


def _entry(levels: Sequence[Mapping[str, Setting]], parameter: str, tensor: str) -> Entry | None:
    """Return the entry of the spec that a tensor uses; None for the default."""
    for settings in levels:
        setting = settings.get(parameter)
        if setting is not None and (entry := setting.entry_for(tensor)) is not None:
            return entry
    return None


def _by_place(item: tuple[Entry | None, int]) -> tuple[int, Iterable[Any]]:
    """Order entries as they stand in the spec, the default last."""
    entry = item[0]
    if entry is None:
        return 2, ()
    return (entry.path[0] == "parameters"), [str(part).zfill(6) for part in entry.path]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
