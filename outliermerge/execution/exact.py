"""Whether tensors of different element types hold the same values, compared without rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.sources import DType

if TYPE_CHECKING:
    from torch import Tensor


def same_values(dtype: DType, raw: memoryview, other_dtype: DType, other_raw: memoryview) -> bool:
    """Tell whether two buffers of equally many elements hold the same numbers.

    Integers are compared as integers: beyond 2⁵³ an integer need not equal the nearest float. NaN
    equals NaN.

    >>> from outliermerge.checkpoint.sources import DTYPES
    >>> ints, halves = bytearray([1, 0, 2, 0]), bytearray([0x80, 0x3F, 0, 0x40])
    >>> dtypes = DTYPES["int16"], DTYPES["bfloat16"]
    >>> same_values(dtypes[0], memoryview(ints), dtypes[1], memoryview(halves))
    True
    """
    a, b = _values(dtype, raw), _values(other_dtype, other_raw)
    if a.is_complex() or b.is_complex():
        import torch

        a, b = torch.view_as_real(_complex(a)), torch.view_as_real(_complex(b))
    if a.is_floating_point() and b.is_floating_point():
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    (whole_a, ints_a, large_a), (whole_b, ints_b, large_b) = _ints(a), _ints(b)
    return whole_a and whole_b and bool(((ints_a == ints_b) & (large_a == large_b)).all())


def are_whole(dtype: DType, raw: memoryview) -> bool:
    """Tell whether a buffer holds only whole numbers, as indices do and weights do not."""
    values = _values(dtype, raw)
    return not values.is_floating_point() or bool((values == values.trunc()).all())


def _values(dtype: DType, raw: memoryview) -> Tensor:
    """Return elements (E,); floats as float64, which holds all of them."""
    import torch

    values = torch.frombuffer(raw, dtype=getattr(torch, dtype.name)) if len(raw) else torch.empty(0)
    return values.double() if values.is_floating_point() else values


def _complex(values: Tensor) -> Tensor:
    import torch

    return values.to(torch.complex128)


def _ints(values: Tensor) -> tuple[bool, Tensor, Any]:
    """Return whether all are whole and fit in 64 bits, their low 64 bits, and which reach 2⁶³."""
    import torch

    if values.dtype == torch.uint64:
        low = values.view(torch.int64)
        return True, low, low < 0
    if not values.is_floating_point():
        return True, values.to(torch.int64), torch.zeros(len(values), dtype=torch.bool)
    # Comparisons with NaN are false.
    whole = bool(((values == values.trunc()) & (values >= -(2.0**63)) & (values < 2.0**64)).all())
    if not whole:
        return False, torch.zeros(len(values), dtype=torch.int64), values > 0
    large = values >= 2.0**63
    return True, torch.where(large, values - 2.0**64, values).to(torch.int64), large
