"""One component's stored tensors and settings, as all readers of quantised layouts take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from outliermerge.checkpoint.computed import ComputedTensor
from outliermerge.checkpoint.sources import DType, Reading, TensorMeta
from outliermerge.errors import OutlierMergeError

# What replaces a stored tensor: a computed tensor, or nothing.
Changes = dict[str, ComputedTensor | None]

TAKE_ORIGINAL = "Name the model that it was quantised from instead."
CODES = ("float8_e4m3fn", "float8_e5m2", "int8")
# Tensors stored beside a weight: about its activations, and about the weight itself.
ACTIVATIONS = ("activation_scale", "input_scale", "input_scale_ub", "input_zero_point",
               "output_scale", "output_zero_point", "scale_input")  # fmt: skip


@dataclass(frozen=True)
class QuantizedModel:
    """A component's stored tensors, and the quantisation settings in its config.json.

    Attributes:
        renamed: takes up the names of weights by those of the tensors of their codes, where these
            have others.
    """

    home: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, TensorMeta]
    out_dtype: DType
    reader: Reading
    renamed: dict[str, str] = field(default_factory=dict)

    @cached_property
    def has_activations(self) -> bool:
        """Whether any tensor is about activations, by its name; most models have none."""
        return any(name.endswith(ACTIVATIONS) for name in self.tensors)

    def refuse(self, what: str) -> NoReturn:
        raise OutlierMergeError(f"{self.home / 'config.json'}: quantization_config: {what}")

    def broken(self, name: str, what: str) -> NoReturn:
        raise OutlierMergeError(f"{self.tensors[name].path}: tensor {name!r}: {what}")

    def first_bytes(self, meta: TensorMeta, num_elements: int) -> bytes:
        """Return the stored bytes of a tensor's first elements."""
        found = bytearray(num_elements * meta.dtype.num_bytes)
        meta.read(self.reader, 0, num_elements, memoryview(found))
        return bytes(found)
