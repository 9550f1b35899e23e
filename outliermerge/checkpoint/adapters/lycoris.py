"""The products that LoRA, LoHa, LoKr and full differences store, by the names of their parts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from outliermerge.checkpoint.adapters.context import Context
from outliermerge.checkpoint.adapters.keys import LayerParts
from outliermerge.checkpoint.adapters.products import (
    Hadamard,
    Kronecker,
    MisfitError,
    Pair,
    Product,
    ProductSum,
    Size,
    Tucker,
    Whole,
    described,
)
from outliermerge.checkpoint.adapters.tensors import as_of, transposed
from outliermerge.checkpoint.sources import Source, TensorMeta
from outliermerge.errors import shown

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_LORA = ("lora_up", "lora_down", "lora_mid")
KINDS = {"LoHa": _LOHA, "LoKr": _LOKR, "LoRA": _LORA, "full difference": ("diff",)}
Parts = dict[str, TensorMeta]


def kind_of(parts: Mapping[str, TensorMeta]) -> str | None:
    """Return the kind of a layer's change; None if no part is of a known one.

    Raises:
        MisfitError: the layer has parts of several kinds.
    """
    found = [kind for kind, names in KINDS.items() if not parts.keys().isdisjoint(names)]
    if len(found) > 1:
        raise MisfitError(f"it has parts of {' and '.join(found)}")
    return found[0] if found else None


def product_of(kind: str, parts: Parts) -> tuple[Product, int | None]:
    """Return the product of a layer's parts, which are taken out, and its rank, if it has one.

    Raises:
        MisfitError: parts are missing, or do not fit together.
    """
    if kind == "LoHa":
        rank: int | None
        one, rank = _factored(parts, "hada_w1_a", "hada_w1_b", parts.pop("hada_t1", None))
        other, _ = _factored(parts, "hada_w2_a", "hada_w2_b", parts.pop("hada_t2", None))
        return Hadamard(one, other), rank
    if kind == "LoKr":
        one, rank = _whole_or_factored(parts, "lokr_w1", None)
        other, other_rank = _whole_or_factored(parts, "lokr_w2", parts.pop("lokr_t2", None))
        return Kronecker(one, other), other_rank or rank
    if kind == "LoRA":
        up, down = _take(parts, "lora_up"), _take(parts, "lora_down")
        mid = parts.pop("lora_mid", None)
        if not down.shape:
            raise MisfitError(f"{shown(down.name)} is a scalar")
        return (Tucker(mid, up, down) if mid else Pair(up, down)), down.shape[0]
    return Whole(_take(parts, "diff")), None


def _whole_or_factored(
    parts: Parts, name: str, core: TensorMeta | None
) -> tuple[Product, int | None]:
    if name in parts:
        if core is not None or f"{name}_a" in parts:
            raise MisfitError(f"it has {name} and also factors of it")
        return Whole(parts.pop(name)), None
    return _factored(parts, f"{name}_a", f"{name}_b", core)


def _factored(parts: Parts, a: str, b: str, core: TensorMeta | None) -> tuple[Product, int]:
    left, right = _take(parts, a), _take(parts, b)
    if len(left.shape) != 2 or len(right.shape) < 2:
        raise MisfitError(f"{described(left)} and {described(right)} are no matrices")
    if core is None:
        return Pair(left, right), right.shape[0]
    return Tucker(core, transposed(left), right), right.shape[0]


def _take(parts: Parts, name: str) -> TensorMeta:
    if name not in parts:
        raise MisfitError(f"it has no {name}")
    return parts.pop(name)


def size_of(source: Source) -> Size:
    """Return how many rows a tensor has, and how many columns all its further axes are."""
    return (source.shape[0], math.prod(source.shape[1:])) if source.shape else (1, 1)


def summed(
    base: Source, product: Product, scale: float, alpha: TensorMeta | None = None
) -> ProductSum:
    """Return a base's tensor with a product added.

    Raises:
        MisfitError: the product has another size.
    """
    if product.size != size_of(base):
        raise MisfitError(
            f"its parts make a change of {list(product.size)}, but the base's {shown(base.name)} "
            f"is {list(base.shape)}"
        )
    return ProductSum(**as_of(base), base=base, product=product, scale=scale, alpha=alpha)


class LycorisLayers:
    """Makes the tensors that LoHa and LoKr change, as peft merges them."""

    def __init__(
        self,
        context: Context,
        layers: Mapping[str, LayerParts],
        tensors: Mapping[str, Source],
    ) -> None:
        self.context = context

    def change(self, tensors: dict[str, Source], module: str, found: LayerParts) -> None:
        """Put the changed weight of a layer in the place of the base's.

        Raises:
            OutlierMergeError: the layer's tensors do not fit together, the base, or the config.
        """
        target, parts = self.context.rename(f"{module}.weight"), dict(found.parts)
        base = tensors[target]
        self.context.check_floats(base, *parts.values())
        names = self.context.names(f"{module}.weight")
        if (whole := parts.get("lokr_w2")) is not None and len(whole.shape) == 3:
            raise self.context.refuse(
                f"{shown(module)}: lokr_w2 of a Conv1d, whose product peft puts in another order "
                "than that of other layers. Merge it with peft's merge_and_unload(), then "
                "save_pretrained()."
            )
        try:
            kind = kind_of(parts)
            assert kind is not None  # the names of the file were looked at
            product, rank = product_of(kind, parts)
            changed = summed(base, product, self.context.scale(names))
        except MisfitError as error:
            raise self.context.refuse(f"{shown(module)}: {error}") from error
        if parts:
            raise self.context.refuse(f"{shown(module)}: {', '.join(parts)} has no use")
        if rank is not None:
            self.context.check_rank(names, rank, "its change")
        tensors[target] = changed
