"""The names in a PEFT adapter's file, grouped by layer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from outliermerge.checkpoint.adapters.config import SCALED_LORA, SCALED_NOISE
from outliermerge.checkpoint.sources import TensorMeta

PREFIX = "base_model.model."
# The names of the attributes in which peft keeps a layer that it wraps.
WRAPPED = re.compile(r"(\.token_adapter)?\.base_layer\.|\.modules_to_save(\.default)?\.")
KEY = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta"
    r"|scaled_lora_[ABs]|scaled_noise_s|hada_[wt]\d(_[ab])?|lokr_[wt]\d(_[ab])?|ia3_l)(\.default)?"
    r"(\.(?P<end>weight|bias))?$"
)
# What is in the name of a tensor of an adapter, also of a kind that is not known.
FACTOR = re.compile(r"lora_|token_adapter\.trainable|hada_|lokr_|ia3_")
OWN_PARTS = {
    "LOHA": ("hada_",),
    "LOKR": ("lokr_",),
    "IA3": ("ia3_",),
    SCALED_LORA: ("scaled_lora_",),
    SCALED_NOISE: ("scaled_noise_",),
}


@dataclass
class LayerParts:
    """The tensors in an adapter's file for one layer of the base."""

    parts: dict[str, TensorMeta] = field(default_factory=dict)

    def pair(self) -> tuple[TensorMeta, TensorMeta, bool] | None:
        """Return A, B, and whether they are an embedding's; None if the layer has neither."""
        for a, b, embedding in (
            ("lora_A.weight", "lora_B.weight", False),
            ("lora_embedding_A", "lora_embedding_B", True),
            ("scaled_lora_A", "scaled_lora_B", False),
        ):
            if a in self.parts or b in self.parts:
                return self.parts[a], self.parts[b], embedding
        return None
