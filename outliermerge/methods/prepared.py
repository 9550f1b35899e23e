"""Auxiliary tensors that a method takes whole, made ready once for all blocks of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PANEL_ROWS = 256
"""How many rows of a matrix meet a prepared one at once; blocks begin at multiples of it."""


@dataclass(frozen=True)
class Prepared:
    """An auxiliary tensor that has another shape than the weights, and is not cut with them.

    Attributes:
        shape: returns its shape for that of the weights.
        make: makes what the method gets as the keyword, once for a tensor. It is given the models'
            tensors one after the other, in the compute dtype or a wider one that they are stored
            in, each read when it is asked for and not to be overwritten, and the resolved
            parameters.
        workspace: returns how many float64 tensors of its size `make` holds at most, its result
            included, for a number of models.
        wrong: says why a model's tensor cannot be what it is taken for; empty if it can.
    """

    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    make: Callable[[Iterator[Tensor], Mapping[str, Any]], Tensor]
    workspace: Callable[[int], int]
    wrong: Callable[[Tensor], str] = lambda tensor: ""
