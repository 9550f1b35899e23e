"""The layers that replace a model's linear layers while an adapter is active."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from outliermerge.checkpoint.adapters.scaled import noise_sum, scaled_sum
from outliermerge.errors import OutlierMergeError
from outliermerge.peft.config import NoiseConfig, ScaledLoraConfig
from outliermerge.peft.initial import INITIAL
from outliermerge.rng import standard_normal

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Merging is in float64, on this many elements at a time.
_MERGED_ELEMENTS = 1 << 22


class ScaledLayer(nn.Module, BaseTunerLayer):
    """A linear layer whose weight an adapter changes; subclasses define the change.

    Attributes:
        base_layer: the layer that it replaces.
        name: the name of that layer in the model.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, name: str) -> None:
        super().__init__()
        self.base_layer = plain_layer(base_layer, name)
        self.name = name
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (inputs, outputs)."""
        return isinstance(self.base_layer, Conv1D)

    @abstractmethod
    def change(self, adapter: str, inputs: Tensor, without_bias: Tensor) -> Tensor:
        """Return the term that the adapter adds to the layer's outputs.

        Args:
            adapter: the adapter's name.
            inputs: the layer's inputs.
            without_bias: the layer's outputs for these inputs, minus its bias.
        """

    @abstractmethod
    def merged_rows(self, adapter: str, weight: Tensor, first: int, last: int) -> Tensor:
        """Return rows first to last (excluded) of W', as stored, in float64."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the outputs of the changed layer, in the dtype of the base layer's outputs."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        outputs: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return outputs
        bias = self.base_layer.bias
        # With s = 0 this adds exactly 0 to the base's outputs. (1 + s)·Wx + b would not, because it
        # is summed in another order.
        without_bias = outputs if bias is None else outputs - bias
        total = outputs
        for adapter in self._present(self.active_adapters):
            total = total + self.change(adapter, x, without_bias)
        return total.to(outputs.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace W by W', rounded once to the weight's dtype; W is kept for `unmerge`.

        Raises:
            ValueError: safe_merge is set, and W' has values that are not finite.
        """
        for adapter in self._present(check_adapters_to_merge(self, adapter_names)):
            weight = self.base_layer.weight
            merged = torch.empty_like(weight.data)
            step = max(1, _MERGED_ELEMENTS // merged.shape[1])
            for first in range(0, len(merged), step):
                last = min(first + step, len(merged))
                rows = self.merged_rows(adapter, weight.data, first, last)
                # Round through float32, as `outliermerge run` does when it reads the adapter.
                merged[first:last] = rows if merged.dtype == torch.float64 else rows.float()
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"{self.name}: the merged weight is not finite")
            self._unmerged = weight.data
            weight.data = merged
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Restore W, bit for bit."""
        if self._unmerged is not None:
            weight = self.base_layer.weight
            weight.data = self._unmerged.to(weight.device, weight.dtype)
        self._unmerged = None
        self.merged_adapters.clear()

    def _present(self, adapters: list[str]) -> list[str]:
        own = getattr(self, self.adapter_layer_names[0])
        return [adapter for adapter in adapters if adapter in own]

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move the adapter's parameters; peft's own also rounds them to the base's dtype."""
        device = device or self.base_layer.weight.device
        if device.type == "meta":
            return
        for kind in self.adapter_layer_names:
            parameters = getattr(self, kind)
            if adapter_name in parameters and parameters[adapter_name].device.type != "meta":
                parameters[adapter_name].data = parameters[adapter_name].data.to(device)


class ScaledLoraLinear(ScaledLayer):
    """(1 + s) · W + scaling · B·A in place of W (arXiv 2501.10661, eq. 6).

    Parameters, by adapter, in float32: scaled_lora_A (r, inputs), scaled_lora_B (outputs, r),
    scaled_lora_s (1,).
    """

    adapter_layer_names = ("scaled_lora_A", "scaled_lora_B", "scaled_lora_s")
    other_param_names = ("scaling",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: ScaledLoraConfig, name: str
    ) -> None:
        super().__init__(base_layer, adapter_name, name)
        weight = self.base_layer.weight
        outputs, inputs = weight.T.shape if self.transposed else weight.shape
        initial = INITIAL[config.init]((config.r, inputs), seed=config.seed, name=name)
        self.scaled_lora_A = nn.ParameterDict({adapter_name: nn.Parameter(initial)})
        zeros = torch.zeros(outputs, config.r)
        self.scaled_lora_B = nn.ParameterDict({adapter_name: nn.Parameter(zeros)})
        # Shape (1,), because FSDP cannot shard parameters without dimensions.
        self.scaled_lora_s = nn.ParameterDict(
            {adapter_name: nn.Parameter(torch.zeros(1))} if config.train_scale else {}
        )
        self.scaling = {adapter_name: config.lora_alpha / config.r}
        self.dropout = nn.Dropout(config.lora_dropout)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def change(self, adapter: str, inputs: Tensor, without_bias: Tensor) -> Tensor:
        """Return s · Wx + scaling · B(A(dropout(x)))."""
        a, b = self.scaled_lora_A[adapter], self.scaled_lora_B[adapter]
        inner = functional.linear(self.dropout(inputs.to(a.dtype)), a)
        change = functional.linear(inner, b) * self.scaling[adapter]
        if adapter in self.scaled_lora_s:
            change = change + self.scaled_lora_s[adapter] * without_bias
        return change

    def merged_rows(self, adapter: str, weight: Tensor, first: int, last: int) -> Tensor:
        """Return rows of (1 + s) · W + scaling · B·A."""
        left, right = self.scaled_lora_B[adapter].data, self.scaled_lora_A[adapter].data
        if self.transposed:
            left, right = right.T, left.T
        s = self.scaled_lora_s[adapter].item() if adapter in self.scaled_lora_s else 0.0
        rows = weight[first:last]
        return scaled_sum(rows, s, left[first:last], right, self.scaling[adapter])


class NoiseLinear(ScaledLayer):
    """W + s · N in place of W (arXiv 2501.10661, eq. 3); N is made from a seed and not saved.

    Parameters, by adapter, in float32: scaled_noise_s (1,).
    """

    adapter_layer_names = ("scaled_noise_s",)
    other_param_names = ("seed",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: NoiseConfig, name: str
    ) -> None:
        super().__init__(base_layer, adapter_name, name)
        self.scaled_noise_s = nn.ParameterDict({adapter_name: nn.Parameter(torch.zeros(1))})
        self.seed = {adapter_name: config.seed}
        # Neither a parameter nor a buffer: a model that is cast and cast back would round a buffer.
        self._noise: Tensor | None = None
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def change(self, adapter: str, inputs: Tensor, without_bias: Tensor) -> Tensor:
        """Return s · Nx, with N rounded to the dtype of x."""
        if (
            self._noise is None
            or self._noise.dtype != inputs.dtype
            or self._noise.device != inputs.device
        ):
            self._noise = None
            rows = self.noise_rows(adapter, 0, len(self.base_layer.weight), inputs.device)
            self._noise = rows.to(inputs.dtype)
        noise = self._noise.T if self.transposed else self._noise
        change: Tensor = self.scaled_noise_s[adapter] * functional.linear(inputs, noise)
        return change

    def noise_rows(self, adapter: str, first: int, last: int, device: torch.device) -> Tensor:
        """Return rows first to last (excluded) of N, as W is stored, in float32."""
        columns = self.base_layer.weight.shape[1]
        span = first * columns, last * columns
        return standard_normal(self.seed[adapter], self.name, *span, device).view(-1, columns)

    def merged_rows(self, adapter: str, weight: Tensor, first: int, last: int) -> Tensor:
        """Return rows of W + s · N."""
        noise = self.noise_rows(adapter, first, last, weight.device)
        return noise_sum(weight[first:last], self.scaled_noise_s[adapter].item(), noise)


def plain_layer(layer: nn.Module, name: str) -> nn.Linear | Conv1D:
    """Return a layer whose weight is a plain matrix of floats.

    Raises:
        OutlierMergeError: the layer is of another kind.
    """
    # A subclass may pack its weight, or never call forward (nn.MultiheadAttention's out_proj).
    if type(layer) is not nn.Linear and type(layer) is not Conv1D:
        raise OutlierMergeError(
            f"target_modules: {name} is a {type(layer).__module__}.{type(layer).__name__}, "
            "expected torch.nn.Linear or transformers' Conv1D, not quantised and without another "
            "adapter. Name other modules, or load the model unquantised."
        )
    weight = layer.weight
    if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
        raise OutlierMergeError(
            f"target_modules: {name} has a weight of {type(weight).__name__} and {weight.dtype}, "
            "expected a plain parameter of float32, bfloat16, float16 or float64. Load the model "
            "unquantised."
        )
    return layer
