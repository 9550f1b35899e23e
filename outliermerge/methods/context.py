"""What a method may know of a block besides its values: its tensor, and its place in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outliermerge.rng import stream_keys, uniform

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Context:
    """The tensor that a block belongs to, and the block's place in it.

    Attributes:
        name: the tensor's name in the merge; tied tensors share one name.
        shape: of the whole tensor.
        layer: the index of the tensor's layer, from 0; None for a tensor outside layers.
        num_layers: the number of layers in its stack; 0 for a tensor outside layers.
        seed: the merge's random seed.
        start: the first element of the block.
        lacks: the auxiliary tensors of the method that no model has for this tensor.
        turned: the models' inputs were measured, and are the tensor's rows, not its columns.
    """

    name: str = ""
    shape: tuple[int, ...] = ()
    layer: int | None = None
    num_layers: int = 0
    seed: int = 0
    start: int = 0
    lacks: tuple[str, ...] = ()
    turned: bool = False

    @property
    def columns(self) -> int:
        """The elements of a row along the last dimension; a vector is one row.

        >>> Context(shape=(4, 3, 2)).columns, Context(shape=(5,)).columns, Context(shape=()).columns
        (2, 5, 1)
        """
        return self.shape[-1] if self.shape else 1

    def uniform(self, like: Tensor, *, model: int = 0, purpose: str = "") -> Tensor:
        """Return random float64 numbers in [0, 1), with the shape and device of `like`.

        They depend only on the seed, the tensor's name, the model, the purpose and the element's
        position. They are the same for any blocks, threads and devices.

        Args:
            like: one model's part of a block: (E,), (R, C) or the tensor's shape.
            model: the model's index in the block.
            purpose: a name for the random stream, if a method needs several streams.

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
