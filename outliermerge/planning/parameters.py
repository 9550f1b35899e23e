"""The parameters of a merge, tensor by tensor: by model, by filter, by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from outliermerge.checkpoint.sources import Source
from outliermerge.errors import OutlierMergeError, SpecError, shown
from outliermerge.methods.context import Context
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.statistics.base import scope_of
from outliermerge.planning.plan import Job
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.settings import Layer, SpecPath, find_layers
from outliermerge.spec.similar import part_meant
from outliermerge.spec.text import Mistakes

_UNREACHED = "is never reached: entries above take all of its tensors"


def context_of(name: str, shape: tuple[int, ...], layer: Layer | None, seed: int) -> Context:
    """Return a tensor's place in a merge, for methods that ask for it."""
    if layer is None:
        return Context(name, shape, seed=seed)
    return Context(name, shape, layer.index, layer.num_layers, seed)


class Parameters:
    """The method's parameters as the spec sets them, for each tensor and model.

    Args:
        spec: the spec.
        model_numbers: the numbers of the merged inputs, in the spec's order.
        names: the names of all tensors.
        reference: the tensors of the reference.
    """

    def __init__(
        self,
        spec: MergeSpec,
        model_numbers: Sequence[int],
        names: Iterable[str],
        reference: Mapping[str, Source],
    ) -> None:
        self._spec, self._method, self._reference = spec, spec.method, reference
        self._model_numbers = list(model_numbers)
        self._layers = find_layers(names)
        self._used_filters: set[SpecPath] = set()
        self._any_resolved = False

    def context(self, name: str, shape: tuple[int, ...], seed: int) -> Context:
        """Return a tensor's place in the merge."""
        return context_of(name, shape, self._layers.get(name), seed)

    def of(self, name: str, holders: list[int]) -> dict[str, Any]:
        """Return a tensor's parameters for the inputs that have it.

        Raises:
            SpecError: the values contradict one another.
        """
        layer = self._layers.get(name)
        position = layer.position if layer else 0.0
        given: dict[str, Any] = {}
        self._any_resolved = True
        for parameter in self._method.parameters.values():
            if parameter.per_model:
                given[parameter.name] = [
                    self._value(name, parameter.name, position, parameter.default, number)
                    for number in holders
                ]
            else:
                given[parameter.name] = self._value(
                    name, parameter.name, position, parameter.default, None
                )
        try:
            return self._method.resolve(len(holders), given)
        except SpecError as error:
            raise SpecError(f"{self._spec.source.file}: tensor {name!r}: {error}") from error

    def _value(
        self, tensor: str, parameter: str, position: float, default: Any, number: int | None
    ) -> Any:
        levels = [self._spec.settings]
        if number is not None:
            levels.insert(0, self._spec.models[self._model_numbers.index(number)].settings)
        for settings in levels:
            setting = settings.get(parameter)
            entry = setting.entry_for(tensor) if setting else None
            if entry is not None:
                self._used_filters.add(entry.path)
                return entry.at(position)
        return default

    def without_unused_filters(self) -> MergeSpec:
        """Return the spec without filters whose value no merged tensor has used, but with warnings.

        So the recipe of a merge runs strictly, too.

        Raises:
            SpecError: there are such filters, and the spec is read strictly.
        """
        mistakes = Mistakes(self._spec.source)
        levels = [self._spec.settings, *(model.settings for model in self._spec.models)]
        settings = (setting for level in levels for setting in level.values())
        for setting in settings if self._any_resolved else ():
            takes_all = False
            for entry in setting.entries:
                if entry.filter is None and takes_all:
                    mistakes.add(self._unused(entry.path, f"this entry {_UNREACHED}"))
                elif entry.filter is not None and entry.path not in self._used_filters:
                    shadowed = any(entry.matches(name) for name in self._reference)
                    what = _UNREACHED if shadowed else (
                        "is in no merged tensor's name. "
                        + part_meant(entry.filter, self._reference)
                    )  # fmt: skip
                    said = f"the filter {entry.filter!r} {what}"
                    mistakes.add(self._unused(entry.filter_path, said))
                takes_all = takes_all or entry.filter is None
        mistakes.refuse()
        return replace(
            self._spec,
            document=self._spec.document.without(mistakes.passed_over()),
            warnings=(*self._spec.warnings, *mistakes.warned()),
        )

    def _unused(self, path: SpecPath, message: str) -> SpecError:
        return self._spec.source.error(path, message, passed_over=path[:-1])

    def gradients(
        self, jobs: tuple[Job, ...], names: Mapping[str, str]
    ) -> dict[str, dict[str, list[Any]]]:
        """Return by layer the parameters that vary over a stack but not within a layer."""
        seen: dict[str, dict[str, dict[int, set[Any]]]] = {}
        for job in jobs:
            layer: Layer | None = self._layers.get(names[job.name])
            if job.action != "merge" or layer is None:
                continue
            for name, value in job.parameters.items():
                values = seen.setdefault(name, {}).setdefault(layer.stack, {})
                values.setdefault(layer.index, set()).add(value)
        result: dict[str, dict[str, list[Any]]] = {}
        for name, stacks in seen.items():
            for stack, layers in stacks.items():
                if len(set.union(*layers.values())) > 1:
                    rows = [sorted(layers[index]) for index in sorted(layers)]
                    result.setdefault(name, {})[stack] = [
                        row[0] if len(row) == 1 else row for row in rows
                    ]
        return result


def check_scopes(method: MergeMethod, jobs: Sequence[Job], num_models: int) -> None:
    """Raise OutlierMergeError where a method measures whole models and one lacks a tensor."""
    merges = [job for job in jobs if job.action == "merge"]
    needs = method.needs.values()
    if all(scope_of(need, job.parameters) == "tensor" for job in merges for need in needs):
        return
    for job in merges:
        if job.task.num_models < num_models:
            raise OutlierMergeError(
                f"{shown(job.name)} is not in all models, and {method.name} measures whole models "
                "together: with `missing: error` a plan says where it is not"
            )
