"""RegMean++: each layer's Gram matrices are of inputs that the merged layers before it give.

The layers are merged one after the other, in memory, by the Gram matrices that are then written as
statistics of the models. So a merge by `regmean` that takes these gives what RegMean++ gives.

Shape suffixes: M models, R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.arguments import nothing
from outliermerge.calibration.data import Sample
from outliermerge.calibration.measure import Partial, Wanted
from outliermerge.calibration.model import Feeder, Loaded, Several, load
from outliermerge.calibration.specs import plain_values, refuse_all_but_models
from outliermerge.calibration.sums import Summing, Sums, Unit, units_of
from outliermerge.errors import SpecError, shown
from outliermerge.methods.context import Context
from outliermerge.methods.table import find_method
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.settings import find_layers

if TYPE_CHECKING:
    from torch import Tensor

_KINDS = ("gram",)


@dataclass(frozen=True)
class Alternation:
    """A merge by `regmean` that is made layer by layer.

    Attributes:
        models: what is merged; the first one's class computes all.
        folders: where the statistics of each go.
        parameters: of the method, resolved.
    """

    models: tuple[str, ...]
    folders: tuple[Path, ...]
    parameters: Mapping[str, Any]


def alternation_of(spec: MergeSpec) -> Alternation:
    """Return what a spec asks for.

    Raises:
        SpecError: it is another merge, or one that cannot be made layer by layer.
    """
    if spec.method.name != "regmean":
        raise spec.source.error(
            ("merge_method",),
            f"found {shown(spec.method.name)}, expected regmean: a spec is measured for RegMean++ "
            "only. Run the merge, and measure its output",
        )
    refuse_all_but_models(spec, "RegMean++")
    given = {
        name: plain_values(spec, name) if one.per_model else plain_values(spec, name)[0]
        for name, one in spec.method.parameters.items()
    }
    folders = tuple(Path(model.statistics) for model in spec.models)
    if len({folder.absolute() for folder in folders}) < len(folders):
        raise SpecError(f"{spec.source.file}: each model needs `statistics: DIR` of its own")
    return Alternation(
        tuple(model.reference for model in spec.models),
        folders,
        spec.method.resolve(len(spec.models), given),
    )


def measure_alternating(
    merge: Alternation,
    samples: Sequence[Sequence[Sample]],
    *,
    device: str,
    data: Sequence[str],
    max_tokens: int = 512,
    on_progress: Callable[[int, int], None] = nothing,
) -> list[Mapping[str, Any]]:
    """Write statistics of each model, of inputs that the merge of the layers before gives.

    For each layer, each model's own layer is run behind the merged ones over the model's data; then
    the layer is merged. Tensors outside layers are averaged at the start; linear layers among them
    are measured last.

    Args:
        merge: what is merged.
        samples: the data of each model.
        device: where the model computes.
        data: what the data are called.
        max_tokens: of a sample.
        on_progress: called with the samples done, of all passes, and how many there are.

    Raises:
        OutlierMergeError: a model does not fit, or a folder is there.
    """
    loaded = load(merge.models[0], device=device, what="RegMean++")
    several = Several(loaded, merge.models)
    models = _Models(several, merge.parameters)
    units = units_of(loaded, _KINDS)
    groups = _groups(loaded, units)
    wanted = Wanted(_KINDS, max_tokens=max_tokens)
    partials = []
    for number, (folder, own) in enumerate(zip(merge.folders, samples, strict=True)):
        inputs_of = {"merged": {"models": list(merge.models), **merge.parameters}, "model": number}
        partials.append(
            Partial(
                several.loaded(number), own, folder, wanted,
                data=data[number], groups=[group for _, group in groups],
                more=json.loads(json.dumps(inputs_of)),
            )
        )  # fmt: skip
    feeder = Feeder(
        loaded, with_images=any(s.images for own in samples for s in own), max_tokens=max_tokens
    )
    done, total = 0, len(groups) * sum(map(len, samples))
    models.average()
    for place, (names, group) in enumerate(groups, start=1):
        for number, (partial, own) in enumerate(zip(partials, samples, strict=True)):
            if not partial.has(place):
                models.put(names, number)
                sums = Sums()
                summing = Summing(
                    loaded, feeder, group, _KINDS, fisher="empirical", seed=0, sums=sums
                )
                with summing.hooked():
                    for index, sample in enumerate(own):
                        on_progress(done + index, total)
                        summing.add(sample, index)
                partial.write_group(place, group, sums)
            done += len(own)
            on_progress(done, total)
        grams = [partial.tensors(place, "gram") for partial in partials]
        models.merge(names, grams, partials[0].turned(place))
    return [partial.finish() for partial in partials]


def _groups(loaded: Loaded, units: Sequence[Unit]) -> list[tuple[list[str], list[Unit]]]:
    """Return the layers in their order: the names of tensors, and the modules; others come last."""
    layers = find_layers(loaded.names.values())
    keys = {
        name: (layers[name].stack, layers[name].index) if name in layers else None
        for name in loaded.names.values()
    }
    found = {key: ([n for n in keys if keys[n] == key], list[Unit]()) for key in keys.values()}
    for unit in units:
        assert unit.inputs is not None
        found[keys[unit.inputs]][1].append(unit)
    last = found.pop(None, ([], []))
    groups = [one for one in found.values() if one[1]]
    return [*groups, ([], last[1])] if last[1] else groups


class _Models:
    """The models' tensors, and the module into which they and their merges are put."""

    def __init__(self, several: Several, parameters: Mapping[str, Any]) -> None:
        self._several, self._parameters = several, parameters

    def put(self, names: Sequence[str], number: int) -> None:
        """Put a model's tensors into the module."""
        for name in names:
            self._several.put(name, self._several.read(name)[number])

    def average(self) -> None:
        """Put the mean of the models into the module."""
        for name in self._several.names:
            self._several.put(name, self._mean(name))

    def merge(
        self, names: Sequence[str], grams: Sequence[Mapping[str, Tensor]], turned: Sequence[str]
    ) -> None:
        """Put the merge of a layer into the module: by Gram matrices, or the mean."""
        import torch

        parameters = self._parameters
        for name in names or grams[0]:
            if not all(name in own for own in grams):
                self._several.put(name, self._mean(name))
                continue
            weights_MRC = torch.stack(self._several.read(name))
            context = Context(name, tuple(weights_MRC.shape[1:]), turned=name in turned)
            method = find_method("regmean").of(parameters, context)
            made = method.prepared["gram"].make(
                (own[name].to(weights_MRC.device).double() for own in grams), parameters
            )
            own = method.arguments(parameters, like=weights_MRC.new_empty(0))
            own |= {"context": context} if method.takes_context else {}
            merged_RC = method.function(weights_MRC, gram=made, **own)
            self._several.put(name, merged_RC)

    def _mean(self, name: str) -> Tensor:
        weights = self._parameters["weight"]
        pairs = zip(self._several.read(name), weights, strict=True)
        total: Tensor = sum(one * weight for one, weight in pairs) / sum(weights)
        return total
