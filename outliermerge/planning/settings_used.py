"""The parameters of a plan as the spec sets them: one row for each model and filter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from outliermerge.planning.plan import Plan
from outliermerge.spec.inert import INERT_PARAMETERS
from outliermerge.spec.models import ModelSpec
from outliermerge.spec.settings import Entry


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
    found: list[UsedSetting] = []
    for parameter in plan.spec.method.parameters.values():
        if parameter.name in INERT_PARAMETERS:
            continue
        models: Sequence[ModelSpec | None] = plan.spec.models if parameter.per_model else [None]
        rows: dict[tuple[Any, ...], list[str]] = {}
        for model in models:
            reference = "" if model is None else model.reference
            counts = Counter(_entry(plan, model, parameter.name, name) for name in names[reference])
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


def _merged_names(plan: Plan) -> dict[str, list[str]]:
    """Return the merged tensors by model, and under "" all of them, as filters see their names."""
    found: dict[str, list[str]] = {"": [], **{model.reference: [] for model in plan.spec.models}}
    for job in plan.jobs:
        if job.action != "merge":
            continue
        found[""].append(job.context.name)
        # A model of a method on weights is there even where another's tensor stands in.
        for number, _ in job.sources:
            reference = plan.inputs[number].reference
            if reference in found:
                found[reference].append(job.context.name)
    return found


def _entry(plan: Plan, model: ModelSpec | None, parameter: str, tensor: str) -> Entry | None:
    """Return the entry of the spec that a tensor uses; None for the default."""
    for settings in ((model.settings,) if model else ()) + (plan.spec.settings,):
        setting = settings.get(parameter)
        if setting is not None and (entry := setting.entry_for(tensor)) is not None:
            return entry
    return None


def _by_place(item: tuple[Entry | None, int]) -> tuple[int, Iterable[Any]]:
    """Order entries as they stand in the spec, the default last."""
    entry = item[0]
    if entry is None:
        return 2, ()
    return (entry.path[0] != "models"), [str(part).zfill(6) for part in entry.path]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
