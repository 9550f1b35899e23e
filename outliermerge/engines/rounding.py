"""Rounding at random: a value goes up or down, the likelier the nearer; the mean is exact.

The random numbers are those of rng.py, a function of the seed, the tensor's name and the element's
place. So the bytes depend on neither blocks, threads, nor devices. The kernels do the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outliermerge.rng import random_bits

if TYPE_CHECKING:
    from torch import Tensor

_INFINITY = 0x7F800000  # of float32
# By dtype: the bits that float32 has more, the largest finite value, and the smallest normal one.
_DTYPES = {"bfloat16": (16, 0x7F7F0000, 0), "float16": (13, 0x477FE000, 0x38800000)}


def rounded(values_E: Tensor, dtype: str, keys: tuple[int, int], start: int) -> Tensor:
    """Return values as float32 that `dtype` holds exactly, each rounded up or down at random.

    Values beyond the largest finite one, infinities and NaN are left as they are. Values of
    float64 are rounded to float32 first.

    Args:
        dtype: `bfloat16` or `float16`.
        keys: of the random numbers, as `rng.stream_keys` returns them.
        start: the first element's place in the tensor.

    >>> import torch
    >>> sorted(set(rounded(torch.full((99,), 1 + 2**-9), "bfloat16", (1, 2), 0).tolist()))
    [1.0, 1.0078125]
    """
    import torch

    num_dropped, largest, smallest = _DTYPES[dtype]
    values_E = values_E.float()
    bits_E = values_E.view(torch.int32)
    size_E = bits_E & 0x7FFFFFFF
    drawn_E = random_bits(keys, start, start + values_E.numel(), values_E.device)
    below_E = (drawn_E >> (64 - num_dropped) & ((1 << num_dropped) - 1)).int()
    moved_E = ((bits_E + below_E) & -(1 << num_dropped)).view(torch.float32)
    result_E = torch.where(size_E < largest, moved_E, values_E)
    if smallest:  # smaller values are whole multiples of 2⁻²⁴
        share_E = (drawn_E >> 33 & 0x7FFFFFFF).double() * 2.0**-31
        steps_E = (size_E.view(torch.float32).double() * 2.0**24 + share_E).floor() * 2.0**-24
        small_E = steps_E.float().copysign(values_E)
        result_E = torch.where(size_E < smallest, small_E, result_E)
    return result_E
