"""Adapters in one file, without a config beside it: kohya's, LyCORIS's, diffusers', ComfyUI's.

What they add to a weight is in the file: each layer has its factors, and `alpha` beside them. Where
it has none, the programs that read such files take the rank for it.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from outliermerge.checkpoint.adapters.config import LayerPatterns, check_config
from outliermerge.checkpoint.adapters.context import Context
from outliermerge.checkpoint.adapters.flat_names import Group, NotFoundError, groups_of, targets_of
from outliermerge.checkpoint.adapters.lycoris import kind_of, product_of, summed
from outliermerge.checkpoint.adapters.products import MisfitError, Multiplied, described
from outliermerge.checkpoint.adapters.tensors import Rescaled, ShiftedBias, as_of
from outliermerge.checkpoint.sources import Checkpoint, Source, TensorMeta
from outliermerge.errors import OutlierMergeError, shown

_METADATA = "lora_adapter_metadata"  # where diffusers writes the configs, one for each part
_PARTS = {
    r"\.lora_A(?:\.default)?\.weight|[._]lora(?:_linear_layer)?\.down\.weight|\.lora_down\.weight":
        "lora_down",
    r"\.lora_B(?:\.default)?\.weight|[._]lora(?:_linear_layer)?\.up\.weight|\.lora_up\.weight":
        "lora_up",
    r"\.lora_mid\.weight": "lora_mid",
    r"\.lora_B(?:\.default)?\.bias": "lora_bias",
    r"\.dora_scale|\.lora_magnitude_vector(?:\.default)?(?:\.weight)?": "dora_scale",
    r"\.alpha": "alpha",
    r"\.(?:diff|w_norm)": "diff",
    r"\.(?:diff_b|b_norm)": "diff_b",
    r"\.on_input": "on_input",
    r"\.weight": "weight",
}  # fmt: skip
_NAMED = [(re.compile(rf"^(?P<layer>.+?)(?:{end})$"), part) for end, part in _PARTS.items()]
_NAMED.append((re.compile(r"^(?P<layer>.+)\.(?P<part>hada_[wt]\d(?:_[ab])?)$"), ""))
_NAMED.append((re.compile(r"^(?P<layer>.+)\.(?P<part>lokr_[wt]\d(?:_[ab])?)$"), ""))
# A fast answer, since a model may have many names: words that a pattern needs, then the pattern.
_WORDS = ("lora", "hada_w1", "lokr_w1", ".on_input", ".diff", ".w_norm")
_HINT = re.compile(
    r"lora_(?:[AB]|down|up|linear_layer)\b|[._]lora\.(?:down|up)\.|hada_w1|lokr_w1"
    r"|\.(?:on_input|diff|w_norm)$",
    re.MULTILINE,
)
_FACTORS = re.compile(r"(?:hada|lokr)_w1|lora_down|lora_up|on_input|diff")
_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def is_single_file(lora: Checkpoint) -> bool:
    """Tell whether a file holds nothing but an adapter, and says how much that adds."""
    names = "\n".join(lora.tensors)
    if not any(word in names for word in _WORDS) or not _HINT.search(names):
        return False
    layers: dict[str, set[str]] = defaultdict(set)
    for name in lora.tensors:
        layer, part = _named(name)
        layers[layer].add(part)
    parts = {part for own in layers.values() for part in own}
    if not any(map(_FACTORS.search, parts)):
        return False
    if any("weight" in own and "on_input" not in own for own in layers.values()):
        return False  # of a model with an adapter that is not merged
    has_config = _METADATA in lora.metadata.get("", {})
    return all(
        group.start or has_config or all("alpha" in layers[layer] for layer in group.layers)
        for group in groups_of(layers)
    )


def _named(name: str) -> tuple[str, str]:
    """Return the layer and the part of it that a tensor's name means; no part if it means none.

    >>> _named("lora_unet_conv_in.lora_down.weight")
    ('lora_unet_conv_in', 'lora_down')
    >>> _named("unet.mid.attn1.processor.to_out_lora.up.weight")
    ('unet.mid.attn1.to_out.0', 'lora_up')
    """
    for pattern, part in _NAMED:
        if match := pattern.match(name):
            layer = match["layer"]
            if "_lora." in name:  # as diffusers wrote them before it used peft
                layer = layer.replace(".processor.", ".")
                stem, _, end = layer.rpartition(".")
                if stem.endswith("self_attn"):
                    layer = f"{stem}.{_ATTENTION.get(end, end)}"
                elif end == "to_out":
                    layer += ".0"
            return layer, part or match["part"]
    return name, ""


def open_single_file(lora: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Return the model that a base with such a file is.

    Args:
        lora: the file, as a checkpoint of its own.
        base: the model that it changes.

    Raises:
        OutlierMergeError: layers of the file are none of the base's, or do not fit it.
    """
    return _File(lora, base).checkpoint()


class _File:
    def __init__(self, lora: Checkpoint, base: Checkpoint) -> None:
        self.lora, self.base = lora, base
        self.layers: dict[str, dict[str, TensorMeta]] = defaultdict(dict)
        for name, source in lora.tensors.items():
            layer, part = _named(name)
            if not part or not isinstance(source, TensorMeta):
                raise self.refuse(
                    f"tensor {name!r} is of a kind that is not read. Merge the file into its base "
                    "with the program that trained it (LyCORIS: tools/merge.py; sd-scripts: "
                    "networks/merge_lora.py), and name the result as the model."
                )
            if (other := self.layers[layer].setdefault(part, source)) is not source:
                raise self.refuse(f"{other.name!r} and {name!r} are the same factor")
        self.configs = self._configs()

    def refuse(self, what: str) -> OutlierMergeError:
        return OutlierMergeError(f"{self.lora.weight_files[0].path}: {what}")

    def _configs(self) -> dict[str, dict[str, Any]]:
        """Return the configs that diffusers wrote into the file, by the part of the model."""
        text = self.lora.metadata.get("", {}).get(_METADATA)
        if text is None:
            return {}
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise self.refuse(f"its header's {_METADATA} is no JSON object. Fetch it again.")
        found: dict[str, dict[str, Any]] = defaultdict(lambda: {"peft_type": "LORA"})
        for key, value in content.items():
            part, _, setting = key.rpartition(".")
            found[part][setting] = value
        for config in found.values():
            config["peft_type"] = str(config["peft_type"]).removeprefix("PeftType.")
            check_config(self.lora.weight_files[0].path, config)
        return dict(found)

    def checkpoint(self) -> Checkpoint:
        tensors = dict(self.base.tensors)
        origin: dict[str, str] = {}
        for group in groups_of(self.layers):
            context = self._context(group)
            try:
                targets = targets_of(group, self.base.tensors)
            except NotFoundError as error:
                has = next(iter(self.base.tensors), "none")
                raise self.refuse(
                    f"{error}\n{self.base.root} has for example {shown(has)}. If these are layers "
                    "of a part that it does not have, such as a text encoder, name the whole model "
                    "as the base; if it is the same model with other names, convert one of the two."
                ) from error
            for layer, target in targets.items():
                if (other := origin.setdefault(target, layer)) != layer:
                    raise self.refuse(f"{other!r} and {layer!r} are both for {target!r}")
                try:
                    self._change(tensors, layer, target, context)
                except MisfitError as error:
                    raise self.refuse(f"{shown(layer)}: {error}") from error
        return replace(
            self.base,
            tensors=tensors,
            weight_files=(*self.base.weight_files, *self.lora.weight_files),
            sidecars=(),
            left_behind=(),
            notes=(*self.base.notes, *self.lora.notes, self._note()),
            other_files=(*self.base.other_files, *self.lora.other_files),
        )

    def _note(self) -> str:
        kinds = {kind_of(parts) or "(IA)³" for parts in self.layers.values()}
        if any("dora_scale" in parts for parts in self.layers.values()):
            kinds = {f"{kind} with norms (DoRA)" for kind in kinds}
        what = " and ".join(sorted(kinds))
        return f"{what} of {len(self.layers)} layers, computed when it is read"

    def _context(self, group: Group) -> Context | None:
        """Return what a config in the file says of a group of layers."""
        config = self.configs.get(group.start.rstrip("._"), self.configs.get(""))
        if config is None:
            return None
        path = self.lora.weight_files[0].path
        patterns = LayerPatterns(path, config)
        return Context(path, config, patterns, self.base, lambda name: name)

    def _change(
        self, tensors: dict[str, Source], layer: str, target: str, context: Context | None
    ) -> None:
        """Put what a layer changes in the place of the base's tensors."""
        parts, base = dict(self.layers[layer]), tensors[target]
        for source in (base, *parts.values()):
            if not source.dtype.is_float and source not in (
                parts.get("alpha"),
                parts.get("on_input"),
            ):
                raise MisfitError(f"{shown(source.name)} is {source.dtype.name}, expected floats")
        alpha = parts.pop("alpha", None)
        if alpha is not None and alpha.num_elements != 1:
            raise MisfitError(f"alpha is {list(alpha.shape)}, expected one number")
        bias = target.removesuffix("weight") + "bias"
        if (change := parts.pop("diff_b", None)) is not None:
            tensors[bias] = self._shifted(tensors, bias, change, 1.0)
        if "on_input" in parts:
            tensors[target] = self._multiplied(base, parts)
        elif (kind := kind_of(parts)) is not None:
            magnitude, bias_change = parts.pop("dora_scale", None), parts.pop("lora_bias", None)
            product, rank = product_of(kind, parts)
            scale = 1 / rank if rank and alpha is not None else 1.0
            if context is not None and rank is not None:
                scale = self._said(layer, alpha, rank, context)
            changed = summed(base, product, scale, alpha if rank is not None else None)
            tensors[target] = _rescaled(changed, magnitude) if magnitude else changed
            if bias_change is not None:
                if alpha is not None:
                    raise MisfitError(
                        f"has alpha and {shown(bias_change.name)}, expected one of them"
                    )
                tensors[bias] = self._shifted(tensors, bias, bias_change, scale)
        elif change is None:
            raise MisfitError(f"has {', '.join(self.layers[layer])} without factors")
        if parts:
            raise MisfitError(f"{', '.join(parts)} has no use")

    def _said(self, layer: str, alpha: TensorMeta | None, rank: int, context: Context) -> float:
        """Return the scale that a config in the file gives a layer."""
        if alpha is not None:
            raise MisfitError("has alpha, and the file's header a config, which has it too")
        names = [layer, layer.partition(".")[2]]
        context.check_rank(names, rank, "its change")
        return context.scale(names)

    def _shifted(
        self, tensors: Mapping[str, Source], name: str, change: TensorMeta, scale: float
    ) -> ShiftedBias:
        base = tensors.get(name)
        if base is None or base.shape != change.shape:
            has = "no such tensor" if base is None else list(base.shape)
            raise MisfitError(
                f"{described(change)} is for {shown(name)}, of which the base has {has}"
            )
        return ShiftedBias(**as_of(base), base=base, change=change, scale=scale)

    def _multiplied(self, base: Source, parts: dict[str, TensorMeta]) -> Multiplied:
        """Return a weight as LyCORIS's (IA)³ changes it, which leaves the bias."""
        on_input, vector = parts.pop("on_input"), parts.pop("weight", None)
        if vector is None or len(base.shape) < 2:
            raise MisfitError(f"has {shown(on_input.name)} without a vector for a matrix")
        rows, columns = base.shape[:2]
        if rows == columns:
            raise MisfitError(
                f"its weight {list(base.shape)} is square, so its shape does not tell whether "
                f"{shown(vector.name)} is for inputs or outputs. Merge it with LyCORIS's "
                "tools/merge.py."
            )
        if vector.num_elements not in (rows, columns):
            raise MisfitError(f"{described(vector)} does not fit the base's {list(base.shape)}")
        by_row = vector.num_elements == rows
        return Multiplied(**as_of(base), base=base, vector=vector, by_row=by_row, added=1.0)


def _rescaled(changed: Any, magnitude: TensorMeta) -> Rescaled:
    """Return DoRA of a sum: with a norm for each output, or for each input, by its shape."""
    shape = changed.shape
    of_inputs = len(magnitude.shape) > 1 and magnitude.shape[0] == 1 < math.prod(magnitude.shape)
    wanted = shape[1] if of_inputs and len(shape) > 1 else shape[0]
    if magnitude.num_elements != wanted:
        raise MisfitError(f"{described(magnitude)} does not fit the base's {list(shape)}")
    return Rescaled(**as_of(changed), direction=changed, magnitude=magnitude, by_column=of_inputs)
