"""Where a block of a tensor is: what a method may know besides the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outliermerge.rng import stream_keys, uniform

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Context:
    """The tensor that a block is of, and the block's place in it.

    Attributes:
        name: the tensor's, in the merge; tensors that are tied have one name.
        shape: of the whole tensor.
        layer: its place among the layers, from 0; None for what is in no layer.
        num_layers: of its stack of layers; 0 for what is in no layer.
        seed: of the merge.
        start: the first element of the block.
    """

    name: str = ""
    shape: tuple[int, ...] = ()
    layer: int | None = None
    num_layers: int = 0
    seed: int = 0
    start: int = 0

    def uniform(self, like: Tensor, *, model: int = 0, purpose: str = "") -> Tensor:
        """Return random numbers in [0, 1), float64, in the shape and on the device of one block.

        They depend on the seed, the tensor's name, the model, the purpose and the element alone:
        neither on blocks and threads nor on the device.

        Args:
            like: one model's share of a block: (E,), (R, C) or the tensor's shape.
            model: its number in the block.
            purpose: tells streams apart where a method needs several.

        >>> import torch
        >>> whole = Context("w").uniform(torch.empty(4))
        >>> Context("w", start=1).uniform(torch.empty(3)).equal(whole[1:])
        True
        """
        stream = self._stream(model, purpose)
        numbers = uniform(self.seed, stream, self.start, self.start + like.numel(), like.device)
        return numbers.view(like.shape)

    def keys(self, model: int = 0, purpose: str = "") -> tuple[int, int]:
        """Return what kernels make the numbers of `uniform` of, with an element's place."""
        return stream_keys(self.seed, self._stream(model, purpose))

    def _stream(self, model: int, purpose: str) -> str:
        return f"merge\n{self.name}\n{model}\n{purpose}"
