"""Layers that LoRA, DoRA and the adapters of outliermerge.peft change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from outliermerge.checkpoint.adapters.config import CONFIG_NAME, SCALED_LORA, SCALED_NOISE
from outliermerge.checkpoint.adapters.context import Context
from outliermerge.checkpoint.adapters.keys import LayerParts
from outliermerge.checkpoint.adapters.scaled import NoiseSum, ScaledSum
from outliermerge.checkpoint.adapters.tensors import (
    LowRankSum,
    Rescaled,
    ShiftedBias,
    as_of,
    makes,
)
from outliermerge.checkpoint.sources import Source, TensorMeta
from outliermerge.errors import OutlierMergeError, shown

_Pair = tuple[TensorMeta, TensorMeta, bool]


class LoraLayers:
    """Makes the tensors that these adapters change.

    Args:
        layers: the tensors of all layers in the adapter's file.
        tensors: the tensors of the base.
    """

    def __init__(
        self,
        context: Context,
        layers: Mapping[str, LayerParts],
        tensors: Mapping[str, Source],
    ) -> None:
        self.context, self.config = context, context.config
        self.refuse = context.refuse
        self.seen_transposed = self._told_by_shapes(layers, tensors)

    def _told_by_shapes(
        self, layers: Mapping[str, LayerParts], tensors: Mapping[str, Source]
    ) -> set[bool]:
        """Return whether weights are stored transposed, for those whose shapes show it."""
        ways = set()
        for module, found in layers.items():
            pair = self._pair(module, found)
            if pair is not None and not pair[2]:
                shape = tensors[self.context.rename(f"{module}.weight")].shape
                fits = makes(shape, pair, transposed=False), makes(shape, pair, transposed=True)
                if fits[0] != fits[1]:
                    ways.add(fits[1])
        return ways

    def _pair(self, module: str, found: LayerParts) -> _Pair | None:
        try:
            return found.pair()
        except KeyError as error:
            raise self.refuse(f"{shown(module)}: has no {error.args[0]}") from error

    def change(self, tensors: dict[str, Source], module: str, found: LayerParts) -> None:
        """Put the changed weight of a layer, and its bias, in the place of the base's.

        Raises:
            OutlierMergeError: the layer's tensors do not fit together, the base, or the config.
        """
        target, parts = self.context.rename(f"{module}.weight"), dict(found.parts)
        base = tensors[target]
        if self.config["peft_type"] == SCALED_NOISE:
            tensors[target] = self._noisy(module, base, parts)
            return
        pair = self._pair(module, found)
        if pair is None:
            raise self.refuse(f"{shown(module)}: has {', '.join(parts)} without lora_A and lora_B")
        lora_a, lora_b, is_embedding = pair
        self.context.check_floats(base, lora_a, lora_b)
        if is_embedding and not makes(base.shape, pair, transposed=True):
            raise self._misfit(module, base.shape, pair)
        names = self.context.names(f"{module}.weight")
        rank = lora_a.shape[0] if lora_a.shape else None
        self.context.check_rank(names, rank, f"A {list(lora_a.shape)}")
        scale = self.context.scale(names)
        low_rank = LowRankSum(
            **as_of(base),
            base=base,
            lora_a=lora_a,
            lora_b=lora_b,
            scale=scale,
            transposed=is_embedding or self._is_transposed(module, base.shape, pair),
        )
        if self.config["peft_type"] == SCALED_LORA:
            tensors[target] = self._scaled(module, low_rank, parts)
            return
        magnitude = parts.pop("lora_magnitude_vector", None)
        is_dora = bool(self.config.get("use_dora"))
        if (magnitude is not None) != is_dora:
            has = "a" if magnitude else "no"
            raise self.refuse(
                f"{shown(module)}: has {has} lora_magnitude_vector, but use_dora is {is_dora} in "
                f"{CONFIG_NAME}"
            )
        tensors[target] = self._rescaled(module, low_rank, magnitude) if magnitude else low_rank
        if (change := parts.pop("lora_B.bias", None)) is not None:
            self._shift_bias(tensors, module, change, scale)
        if left := [part for part, meta in parts.items() if meta not in (lora_a, lora_b)]:
            raise self.refuse(f"{shown(module)}: {', '.join(left)} has no use")

    def _is_transposed(self, module: str, shape: tuple[int, ...], pair: _Pair) -> bool:
        """Tell whether a layer stores its weight (in, out), as GPT-2's Conv1D does.

        The config's fan_in_fan_out holds for the layer that was adapted last, so shapes decide
        first.
        """
        fits = makes(shape, pair, transposed=False), makes(shape, pair, transposed=True)
        if not any(fits):
            raise self._misfit(module, shape, pair)
        if not all(fits):
            return fits[1]
        return self.context.is_fan_in_fan_out(module, shape, self.seen_transposed)

    def _misfit(self, module: str, shape: tuple[int, ...], pair: _Pair) -> OutlierMergeError:
        return self.refuse(
            f"{shown(module)}: A {list(pair[0].shape)} and B {list(pair[1].shape)} do not make a "
            "change "
            f"of {list(shape)}: is it an adapter of {self.context.base.root}?"
        )

    def _noisy(self, module: str, base: Source, parts: dict[str, TensorMeta]) -> NoiseSum:
        s = self._scalar(module, base, parts.pop("scaled_noise_s"))
        return NoiseSum(**as_of(base), base=base, s=s, seed=self.config["seed"], module=module)

    def _scaled(self, module: str, sum_: LowRankSum, parts: dict[str, TensorMeta]) -> ScaledSum:
        s = parts.get("scaled_lora_s")
        if bool(self.config.get("train_scale")) != (s is not None):
            raise self.refuse(
                f"{shown(module)}: has {'a' if s else 'no'} scaled_lora_s, but train_scale is "
                f"{self.config.get('train_scale')} in {CONFIG_NAME}"
            )
        s = self._scalar(module, sum_.base, s) if s else None
        return ScaledSum(**{one.name: getattr(sum_, one.name) for one in fields(sum_)}, s=s)

    def _scalar(self, module: str, base: Source, s: TensorMeta) -> TensorMeta:
        if s.num_elements != 1 or not s.dtype.is_float or not base.dtype.is_float:
            raise self.refuse(
                f"{shown(module)}: {s.name} is {s.dtype.name} {list(s.shape)} and its weight "
                f"{base.dtype.name}, expected one float and floats"
            )
        return s

    def _rescaled(self, module: str, low_rank: LowRankSum, magnitude: TensorMeta) -> Rescaled:
        outputs = low_rank.num_columns if low_rank.transposed else low_rank.num_rows
        if magnitude.num_elements != outputs:
            raise self.refuse(
                f"{shown(module)}: lora_magnitude_vector has {magnitude.num_elements} values, "
                "expected "
                f"{outputs}"
            )
        return Rescaled(
            **as_of(low_rank),
            direction=low_rank,
            magnitude=magnitude,
            by_column=low_rank.transposed,
        )

    def _shift_bias(
        self, tensors: dict[str, Source], module: str, change: TensorMeta, scale: float
    ) -> None:
        target = self.context.rename(f"{module}.bias")
        base = tensors.get(target)
        if base is None or base.shape != change.shape:
            raise self.refuse(
                f"{shown(module)}: lora_bias needs a bias {list(change.shape)} in the base"
            )
        tensors[target] = ShiftedBias(**as_of(base), base=base, change=change, scale=scale)
