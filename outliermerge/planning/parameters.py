"""The parameters of a merge, tensor by tensor: by model, by filter, by layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from outliermerge.errors import OutlierMergeError, SpecError, shown
from outliermerge.methods.context import Context
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.parameter import Parameter
from outliermerge.methods.statistics.base import scope_of
from outliermerge.methods.table import method_named
from outliermerge.planning.plan import Job
from outliermerge.planning.slices import Part
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.settings import Layer, Setting, SpecPath
from outliermerge.spec.similar import part_meant
from outliermerge.spec.text import Mistakes

_UNREACHED = "is never reached: entries above take all of its tensors"


def context_of(name: str, shape: tuple[int, ...], layer: Layer | None, seed: int) -> Context:
    """Return a tensor's place in a merge, for methods that ask for it."""
    if layer is None:
        return Context(name, shape, seed=seed)
    return Context(name, shape, layer.index, layer.num_layers, seed)


def modifiers_for(spec: MergeSpec, context: Context) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Return the modifiers of a tensor: what `method_named` finds each by, and its parameters."""
    found = []
    for name, own in spec.modifiers:
        modifier = method_named(name)
        chosen = modifier.of(own, context)
        found.append((name if chosen is modifier else chosen.path, own))
    return tuple(found)


class Parameters:
    """The method's parameters as the spec sets them, for each tensor and model of a merge.

    Args:
        spec: the spec.
        part: the models that are merged, and their settings.
        used: takes up the places of the settings that tensors use.

    Attributes:
        any_resolved: it was asked for a tensor's parameters.
    """

    def __init__(self, spec: MergeSpec, part: Part, used: set[SpecPath]) -> None:
        self._spec, self._method, self._part, self._used = spec, spec.method, part, used
        self._models = dict(zip(part.numbers, part.models, strict=True))
        self.any_resolved = False
        settings = [*part.levels, *(model.settings for model in part.models)]
        entries = [e for level in settings for own in level.values() for e in own.entries]
        self._by_name = any(entry.filter is not None for entry in entries)
        self._by_layer = any(entry.is_gradient for entry in entries)
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def of(self, name: str, holders: list[int]) -> dict[str, Any]:
        """Return a tensor's parameters for the inputs that have it.

        Tensors share them where no setting tells them apart.

        Raises:
            SpecError: the values contradict one another.
        """
        position = self._part.positions.get(name, 0.0)
        key = (name if self._by_name else "", position if self._by_layer else 0.0, *holders)
        if (known := self._known.get(key)) is not None:
            return known
        given: dict[str, Any] = {}
        self.any_resolved = True
        for parameter in self._method.parameters.values():
            if parameter.per_model:
                given[parameter.name] = [
                    self._value(
                        self._part.own_name(number, name),
                        parameter,
                        position,
                        (self._models[number].settings, *self._part.levels),
                    )
                    for number in holders
                ]
            else:
                levels = self._part.levels
                given[parameter.name] = self._value(name, parameter, position, levels)
        values = (len(holders), *((k, tuple(v) if isinstance(v, list) else v)
                                  for k, v in given.items()))  # fmt: skip
        try:
            if values not in self._known:
                num_models = len(self._part.models)
                self._known[values] = self._method.resolve(len(holders), given, of=num_models)
        except SpecError as error:
            raise SpecError(f"{self._spec.source.file}: tensor {name!r}: {error}") from error
        found = self._known[values]
        if not self._by_name:
            self._known[key] = found
        return found

    def _value(
        self,
        tensor: str,
        parameter: Parameter,
        position: float,
        levels: Sequence[Mapping[str, Setting]],
    ) -> Any:
        for settings in levels:
            setting = settings.get(parameter.name)
            entry = setting.entry_for(tensor) if setting else None
            if entry is not None:
                self._used.add(entry.path)
                return entry.at(position)
        return parameter.default


def without_unused_filters(
    spec: MergeSpec, used: Collection[SpecPath], names: Collection[str]
) -> MergeSpec:
    """Return the spec without filters whose value no merged tensor has used, but with warnings.

    So the recipe of a merge runs strictly, too. In slices a filter may be of another slice's
    tensors, since one text often stands in all of them.

    Args:
        used: the places of the settings that tensors use.
        names: the names of all tensors.

    Raises:
        SpecError: there are such filters, and the spec is read strictly.
    """
    mistakes = Mistakes(spec.source)
    levels = [spec.settings, *(model.settings for model in spec.models)]
    levels += (level for one in spec.slices
               for level in (one.settings, *(model.settings for model in one.models)))  # fmt: skip

    def unused(path: SpecPath, message: str) -> SpecError:
        return spec.source.error(path, message, passed_over=path[:-1])

    for setting in (setting for level in levels for setting in level.values()):
        takes_all = False
        for entry in setting.entries:
            if entry.filter is None and takes_all:
                mistakes.add(unused(entry.path, f"this entry {_UNREACHED}"))
            elif entry.filter is not None and entry.path not in used:
                shadowed = any(entry.matches(name) for name in names)
                if shadowed and not takes_all and entry.path[0] == "slices":
                    continue
                what = _UNREACHED if shadowed else (
                    f"is in no merged tensor's name. {part_meant(entry.filter, names)}"
                )  # fmt: skip
                mistakes.add(unused(entry.filter_path, f"the filter {entry.filter!r} {what}"))
            takes_all = takes_all or entry.filter is None
    mistakes.refuse()
    return replace(
        spec,
        document=spec.document.without(mistakes.passed_over()),
        warnings=(*spec.warnings, *mistakes.warned()),
    )


def gradients_of(
    jobs: Sequence[Job], names: Mapping[str, str], layers: Mapping[str, Layer]
) -> dict[str, dict[str, list[Any]]]:
    """Return by layer the parameters that vary over a stack but not within a layer.

    Args:
        names: by name in the output the name in the merge.
        layers: by name in the merge the layer.
    """
    if len({id(job.parameters) for job in jobs if job.action == "merge"}) < 2:
        return {}
    seen: dict[str, dict[str, dict[int, set[Any]]]] = {}
    for job in jobs:
        layer: Layer | None = layers.get(names[job.name])
        if job.action != "merge" or layer is None:
            continue
        for name, value in job.parameters.items():
            values = seen.setdefault(name, {}).setdefault(layer.stack, {})
            values.setdefault(layer.index, set()).add(value)
    result: dict[str, dict[str, list[Any]]] = {}
    for name, stacks in seen.items():
        for stack, found in stacks.items():
            if len(set.union(*found.values())) > 1:
                rows = [sorted(found[index]) for index in sorted(found)]
                result.setdefault(name, {})[stack] = [
                    row[0] if len(row) == 1 else row for row in rows
                ]
    return result


def check_scopes(
    method: MergeMethod, jobs: Sequence[Job], num_models: int, *, slices: bool
) -> None:
    """Raise OutlierMergeError where a method measures whole models, but not over all tensors."""
    merges = [job for job in jobs if job.action == "merge"]
    distinct = {(job.method, id(job.parameters)): job for job in merges}
    if not any(
        scope_of(need, job.parameters) == "model"
        for job in distinct.values()
        for need in method_named(job.method).needs.values()
    ):
        return
    orders = {job.name: [number for number, _ in job.sources] for job in merges}
    for job in merges:
        lacks = job.task.num_models < num_models
        if slices and (lacks or orders[job.name] != orders[merges[0].name]):
            raise OutlierMergeError(
                f"{shown(job.name)} is not merged of all models in the same order, and "
                f"{method.name} measures whole models together: list the same sources in every "
                "slice"
            )
        if lacks:
            names = {getattr(need, "scope_parameter", "") for need in method.needs.values()}
            setting = ", ".join(f"`{name}: model`" for name in sorted(names) if name)
            raise OutlierMergeError(
                f"{shown(job.name)} is not in all models, and {method.name} measures whole models "
                f"together for other tensors. Give {setting} for this one, too: then what a model "
                "lacks is taken as the base's"
            )
