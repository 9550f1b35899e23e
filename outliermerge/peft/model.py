"""The two kinds of adapters as peft's tuners, and their entry in peft's tables."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from outliermerge.errors import OutlierMergeError
from outliermerge.peft.config import SCALED_LORA, SCALED_NOISE, NoiseConfig, ScaledLoraConfig
from outliermerge.peft.layer import NoiseLinear, ScaledLayer, ScaledLoraLinear


class _ScaledModel(BaseTuner):
    """The common base of both tuners: one adapter at a time, on plain linear layers."""

    tuner_layer_cls = ScaledLayer
    target_module_mapping = {  # noqa: RUF012 # peft declares an attribute of instances
        kind: list(names)
        for kind, names in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()
    }

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1:
            raise OutlierMergeError(
                f"a model takes one adapter of type {config.peft_type}, found "
                f"{', '.join(self.peft_config)}. Merge them with `outliermerge run`."
            )

    def _check_merge_allowed(self) -> None:
        if tied := self._get_tied_target_modules(self.model):
            raise OutlierMergeError(
                f"{', '.join(tied)}: shares its weight with another layer (tie_word_embeddings), "
                "which would be changed too. Load the model with tie_word_embeddings=False."
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = self._layer(peft_config, adapter_name, target, current_key)
        self._replace_module(parent, target_name, layer, target)

    @abstractmethod
    def _layer(self, config: Any, adapter_name: str, target: nn.Module, name: str) -> ScaledLayer:
        """Return the layer that replaces a given layer."""


class ScaledLoraModel(_ScaledModel):
    """A model with the layers of `ScaledLoraConfig`; made by peft.get_peft_model."""

    prefix = "scaled_lora_"

    def _layer(
        self, config: ScaledLoraConfig, adapter_name: str, target: nn.Module, name: str
    ) -> ScaledLayer:
        layer = ScaledLoraLinear(target, adapter_name, config, name)
        # Saved, because the shape of a square weight does not show it.
        if config.fan_in_fan_out not in (None, layer.transposed):
            raise OutlierMergeError(
                f"fan_in_fan_out: found {config.fan_in_fan_out}, expected {layer.transposed}, as "
                f"{name} is a {type(target).__name__}. Leave it out, and name target_modules of "
                "one kind of layer."
            )
        config.fan_in_fan_out = layer.transposed
        return layer


class NoiseModel(_ScaledModel):
    """A model with the layers of `NoiseConfig`; made by peft.get_peft_model."""

    prefix = "scaled_noise_"

    def _layer(
        self, config: NoiseConfig, adapter_name: str, target: nn.Module, name: str
    ) -> ScaledLayer:
        return NoiseLinear(target, adapter_name, config, name)


def register() -> None:
    """Register both kinds in peft's tables; it may be called again.

    Raises:
        OutlierMergeError: another adapter kind already has one of the names.
    """
    entries: list[tuple[str, type[PeftConfig], type[_ScaledModel]]] = [
        (SCALED_LORA, ScaledLoraConfig, ScaledLoraModel),
        (SCALED_NOISE, NoiseConfig, NoiseModel),
    ]
    for kind, config, tuner in entries:
        tables: list[tuple[dict[Any, Any], Any]] = [
            (PEFT_TYPE_TO_CONFIG_MAPPING, config),
            (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
            (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
        ]
        for table, value in tables:
            # Keys are members of a string enumeration, which equal plain strings.
            if (found := table.setdefault(kind, value)) != value:
                raise OutlierMergeError(
                    f"peft already has adapters of type {kind}, of {found!r}: this version of "
                    "outliermerge does not work with this version of peft."
                )
