"""The statistic of Arcee Fusion: quartiles of how important the changes of a model are.

Shape suffixes: M models (2), E elements of a block, R rows along the last dimension, C columns.
"""

from __future__ import annotations

import struct
import threading
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from outliermerge.methods.context import Context
from outliermerge.methods.kernel_call import RawBlock
from outliermerge.methods.statistics.base import Pass, Scope

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-8
_DIGIT_BITS = 16
_NUM_BINS = 1 << _DIGIT_BITS


def by_last_dimension(block: Tensor, context: Context) -> Tensor:
    """Return a block of whole rows as rows along the tensor's last dimension, (M, R, C)."""
    return block.reshape(len(block), -1, context.columns)


def divergences(block_MRC: Tensor, compat: str) -> Tensor:
    """Return KL(softmax W₁ ‖ softmax W) of each row, (R,)."""
    import torch

    dtype = block_MRC.dtype if compat == "mergekit" else torch.float64
    q_RC, p_RC = (rows_RC.to(dtype).softmax(1) + _EPS for rows_RC in block_MRC)
    divergence_R: Tensor = (p_RC * (p_RC / q_RC).log()).sum(1)
    if compat == "none":
        divergence_R = divergence_R.clamp(min=0)  # which rounding alone makes of it
    return divergence_R.to(block_MRC.dtype)


def scores(block_MRC: Tensor, divergence_R: Tensor) -> Tensor:
    """Return how important each change is, (R, C)."""
    score_RC: Tensor = (block_MRC[1] - block_MRC[0]).abs().mul_(divergence_R[:, None])
    return score_RC


@dataclass(frozen=True)
class Quartiles:
    """The elements at q(n − 1) rounded down of a tensor's scores in order, q = ¼, ½, ¾; shape (3,).

    They are found exactly, by counting the scores' bits, 16 at a time. Where torch counts, it keeps
    the divergences of all rows from the first pass on; nothing else grows with the tensor. Kernels
    add divergences up in another order, so that they agree to the rounding of float64.
    """

    depends_on: tuple[str, ...] = ("compat",)
    scope: Scope = "tensor"
    with_context: bool = True
    kernels: ClassVar = ("importance",)

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        return 2

    def num_ranks(self, num_models: int, parameters: Mapping[str, Any]) -> int:
        return 3

    def start(
        self,
        num_models: int,
        num_elements: int,
        parameters: Mapping[str, Any],
        *,
        context: Context | None = None,
    ) -> Pass | list[Any]:
        if num_elements == 0:
            return [0.0] * 3
        assert context is not None
        ranks = [quarter * (num_elements - 1) // 4 for quarter in (1, 2, 3)]
        return _Ranked(context, parameters["compat"], ranks)


class _Ranked:
    """Counts scores whose highest bits are known by the next 16 bits.

    Args:
        ranks: of the scores wanted, from the smallest, among those that begin with a prefix.
        prefixes: for each rank the highest bits; none in the first pass.
        divergences: of all rows, after the first pass.
        num_left: the bits that are not known, after the first pass.
    """

    chunks = None
    by_row = True
    with_start = True

    def __init__(
        self,
        context: Context,
        compat: str,
        ranks: Sequence[int],
        prefixes: Sequence[int] = (),
        divergences: array[float] | None = None,
        num_left: int | None = None,
    ) -> None:
        import numpy

        self._context, self._compat = context, compat
        self.kernel = "importance" if compat == "none" else ""
        self._ranks, self._prefixes = ranks, prefixes
        self._known = divergences
        self._found = array("d")
        self._num_left, self._num_bits = num_left, 32
        self._counts = numpy.zeros((len(prefixes) or 1, _NUM_BINS + 1), numpy.int64)
        self._lock = threading.Lock()

    def measure(self, block_ME: Tensor, start: int = 0) -> list[float]:
        block_MRC = by_last_dimension(block_ME, self._context)
        _, num_rows, columns = block_MRC.shape
        found = []
        if self._known is None:
            divergence_R = divergences(block_MRC, self._compat)
            found = divergence_R.tolist()
        else:
            first = start // columns
            divergence_R = block_ME.new_tensor(self._known[first : first + num_rows])
        self._num_bits = 8 * block_ME.element_size()
        key_E = _ordered_bits(scores(block_MRC, divergence_R).view(-1))
        shift = (self._num_left or self._num_bits) - _DIGIT_BITS
        bins = [(key_E >> shift) + _NUM_BINS // 2]
        if self._prefixes:
            above_E = key_E >> (shift + _DIGIT_BITS)
            bins = [
                (key_E[above_E == prefix] >> shift) & (_NUM_BINS - 1) for prefix in self._prefixes
            ]
        counts = [each.bincount(minlength=_NUM_BINS).cpu().numpy() for each in bins]
        with self._lock:  # here and not in `add`, so that the counts of all blocks need not be held
            for total, own in zip(self._counts, counts, strict=True):
                total[:_NUM_BINS] += own
        return found

    def measure_raw(self, kernels: Any, block: RawBlock, start: int = 0) -> list[float]:
        """Count scores, which are not below 0; a last bin is for those above the others."""
        if self._prefixes:
            lows, shift = tuple(prefix << _DIGIT_BITS for prefix in self._prefixes), 0
            counts = tuple(self._counts)
        else:
            lows, shift = (0,), _DIGIT_BITS
            counts = (self._counts[0, _NUM_BINS // 2 :],)
        kernels.importance(block, start, self._context.columns, lows, shift, counts)
        return []

    def add(self, share: list[float]) -> None:
        self._found.extend(share)

    def finish(self) -> Pass | list[float]:
        ranks, prefixes = [], []
        for number, rank in enumerate(self._ranks):
            up_to = self._counts[number if self._prefixes else 0, :_NUM_BINS].cumsum()
            digit = int(up_to.searchsorted(rank, side="right"))
            ranks.append(rank - int(up_to[digit - 1] if digit else 0))
            before = self._prefixes[number] << _DIGIT_BITS if self._prefixes else -_NUM_BINS // 2
            prefixes.append(before + digit)
        num_left = (self._num_left or self._num_bits) - _DIGIT_BITS
        if num_left == 0:
            return [_value_of(key, self._num_bits) for key in prefixes]
        known = self._found if self._known is None else self._known
        return _Ranked(self._context, self._compat, ranks, prefixes, known, num_left)


def _ordered_bits(values: Tensor) -> Tensor:
    """Return integers in the order of some floats, NaN last."""
    import torch

    num_bits = 8 * values.element_size()
    bits = values.view(torch.int32 if num_bits == 32 else torch.int64)
    # Of what is below 0 all bits but the sign are turned over.
    return bits ^ ((bits >> (num_bits - 1)) & ((1 << (num_bits - 1)) - 1))


def _value_of(key: int, num_bits: int) -> float:
    """Return the float that `_ordered_bits` gives an integer for."""
    bits = key if key >= 0 else key ^ ((1 << (num_bits - 1)) - 1)
    integer, real = ("<i", "<f") if num_bits == 32 else ("<q", "<d")
    value: float = struct.unpack(real, struct.pack(integer, bits))[0]
    return value
