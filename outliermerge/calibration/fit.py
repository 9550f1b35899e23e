"""AdaMerging: weights of task vectors by which a merge is surest of what it says of texts.

The entropy of what the merged model predicts is made less by gradient steps on the weights. The
gradient of a weight is the inner product of its task vector with that of the merged tensors. So a
step takes one merge in memory, and one run over some samples, forward and back.

Shape suffixes: M models, G groups of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from outliermerge.arguments import nothing
from outliermerge.calibration.data import Sample
from outliermerge.calibration.model import Feeder, Several, load
from outliermerge.calibration.specs import plain_values, refuse_all_but_models
from outliermerge.errors import OutlierMergeError, SpecError, shown
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.settings import find_layers

if TYPE_CHECKING:
    from torch import Tensor

By: TypeAlias = Literal["model", "layer", "tensor"]


@dataclass(frozen=True)
class Wanted:
    """How weights are fitted.

    Attributes:
        by: a weight for each model, for each of its layers and the rest, or for each tensor.
        steps: of Adam.
        rate: its learning rate.
        batch: samples of each data set in a step; they are taken in turn.
        max_tokens: of a sample.
    """

    by: By = "layer"
    steps: int = 100
    rate: float = 1e-3
    batch: int = 4
    max_tokens: int = 512


@dataclass(frozen=True)
class Fitted:
    """What was found.

    Attributes:
        document: the spec with the weights.
        before, after: the mean entropy of all samples, in nats.
    """

    document: Mapping[str, Any]
    before: float
    after: float


def fit(
    spec: MergeSpec,
    samples: Sequence[Sequence[Sample]],
    *,
    wanted: Wanted,
    device: str,
    on_progress: Callable[[int, int], None] = nothing,
) -> Fitted:
    """Fit the weights of a merge by `task_arithmetic`; the base and all task vectors are in memory.

    Args:
        spec: the merge; its weights are the start.
        samples: data sets without labels, usually one for each model's task.
        wanted: how.
        device: where the model computes.
        on_progress: called with the steps done, and how many there are.

    Raises:
        SpecError: it is another merge, or one that cannot be fitted.
        OutlierMergeError: a model does not fit, or fails.
    """
    start, scale = _checked(spec)
    import torch

    assert spec.base is not None
    loaded = load(spec.base.reference, device=device, what="fit")
    if loaded.unknown:
        raise OutlierMergeError(
            f"{shown(loaded.reference)}: {shown(loaded.unknown[0])} is no tensor of its files as "
            "it is, and cannot be fitted"
        )
    several = Several(loaded, [model.reference for model in spec.models])
    groups = _groups(several.names, wanted.by)
    with_images = any(sample.images for own in samples for sample in own)
    feeder = Feeder(loaded, with_images=with_images, max_tokens=wanted.max_tokens)
    base = {name: several.parameter(name).detach().float().clone() for name in several.names}
    deltas = {
        name: [(one - base[name]) * scale for one in several.read(name)] for name in several.names
    }
    weights_MG = torch.tensor(start, dtype=torch.float64)[:, None].repeat(
        1, max(groups.values()) + 1
    )

    def put(weights_MG: Tensor) -> None:
        for name, group in groups.items():
            merged = base[name].clone()
            for weight, delta in zip(weights_MG[:, group].tolist(), deltas[name], strict=True):
                merged.add_(delta, alpha=weight)
            several.put(name, merged)

    every = [sample for own in samples for sample in own]
    put(weights_MG)
    before = _mean_entropy(feeder, every)
    optimizer = torch.optim.Adam([weights_MG.requires_grad_(True)], lr=wanted.rate)
    for step in range(wanted.steps):
        on_progress(step, wanted.steps)
        put(weights_MG.detach())
        loaded.module.zero_grad()
        num = wanted.batch * len(samples)
        for own in samples:
            for place in range(step * wanted.batch, (step + 1) * wanted.batch):
                loss: Any = _entropy(feeder, own[place % len(own)]) / num
                loss.backward()
        weights_MG.grad = _gradient(several, groups, deltas, weights_MG.detach())
        optimizer.step()
    on_progress(wanted.steps, wanted.steps)
    found = [[float(f"{weight:.6g}") for weight in row] for row in weights_MG.tolist()]
    put(torch.tensor(found, dtype=torch.float64))
    after = _mean_entropy(feeder, every)
    return Fitted(_document(spec, found, groups, wanted.by), before, after)


def _checked(spec: MergeSpec) -> tuple[list[float], float]:
    """Return the weights at the start, and what all are multiplied by."""
    if spec.method.name != "task_arithmetic":
        raise spec.source.error(
            ("merge_method",),
            f"found {shown(spec.method.name)}, expected task_arithmetic, whose weights are fitted",
        )
    refuse_all_but_models(spec, "fit")
    if spec.modifiers:
        raise spec.source.error(("modifiers",), "fit takes no `modifiers`: leave them out")
    if any(plain_values(spec, "normalize")):
        raise SpecError(f"{spec.source.file}: fit takes no `normalize: true`: leave it out")
    return plain_values(spec, "weight"), float(plain_values(spec, "lambda")[0])


def _groups(names: Sequence[str], by: By) -> dict[str, int]:
    """Return the number of each tensor's group; all that are in no layer are one."""
    layers = find_layers(names)
    keys: dict[Any, int] = {}
    found = {}
    for name in names:
        layer = layers.get(name)
        of_layer = (layer.stack, layer.index) if layer else None
        key = {"model": "", "layer": of_layer, "tensor": name}[by]
        found[name] = keys.setdefault(key, len(keys))
    return found


def _gradient(
    several: Several,
    groups: Mapping[str, int],
    deltas: Mapping[str, Sequence[Tensor]],
    like: Tensor,
) -> Tensor:
    import torch

    found_MG = torch.zeros_like(like)
    for name, group in groups.items():
        gradient = several.parameter(name).grad
        if gradient is not None:
            for number, delta in enumerate(deltas[name]):
                found_MG[number, group] += float((gradient.double() * delta).sum())
    return found_MG


def _entropy(feeder: Feeder, sample: Sample) -> Tensor:
    """Return the mean entropy of what the model predicts for a sample, in nats."""
    output, _, _ = feeder.run(sample)
    logits = getattr(output, "logits", None)
    if logits is None:
        raise OutlierMergeError("the model gives no logits, so that it is sure of nothing")
    logs = logits.float().log_softmax(-1)
    entropy: Tensor = -(logs.exp() * logs).sum(-1).mean()
    return entropy


def _mean_entropy(feeder: Feeder, samples: Sequence[Sample]) -> float:
    import torch

    with torch.no_grad():
        return sum(float(_entropy(feeder, sample)) for sample in samples) / len(samples)


def _document(
    spec: MergeSpec, weights: Sequence[Sequence[float]], groups: Mapping[str, int], by: By
) -> dict[str, Any]:
    """Return the spec with weights: one for each model, or by filters, longer names first."""
    document = dict(spec.as_dict())
    layers = find_layers(groups)
    filters: dict[str, int] = {}
    rest = 0
    for name, group in groups.items():
        layer = layers.get(name)
        if by == "tensor":
            filters[name] = group
        elif by == "layer" and layer is not None:
            filters[f"{layer.stack}{layer.index}."] = group
        else:
            rest = group
    entries = []
    for entry, own in zip(document["models"], weights, strict=True):
        values: Any = [
            {"filter": text, "value": own[group]}
            for text, group in sorted(filters.items(), key=lambda item: -len(item[0]))
        ]
        if by != "tensor":
            values.append({"value": own[rest]})
        value = values if filters else own[0]
        parameters = {**entry.get("parameters", {}), "weight": value}
        entries.append({**entry, "parameters": parameters})
    return document | {"models": entries}
