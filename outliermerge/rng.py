"""Random numbers that are a function of a seed, a name and a place; the only source of randomness.

Number i of a stream depends only on (seed, name, i), so any span of a stream can be computed alone
and equals the same span of the whole stream. Only integer operations and the basic float64
operations are used, which IEEE 754 rounds correctly, and they are never fused. So every device
gives the same bits.

Saved adapters contain a seed in place of noise, so these streams are a file format: they must never
change.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from outliermerge.errors import OutlierMergeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014), its constants as signed 64-bit numbers.
_GAMMA, _MULTIPLY_1, _MULTIPLY_2 = (
    constant - (1 << 64)
    for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
# The intermediate values of this many elements fit in a core's cache; results do not depend on it.
_CACHED_ELEMENTS = 65_536
_SIN_TERMS = [
    (-1) ** k * (math.pi / 2) ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(9)
]
_LOG_TERMS = [2 / (2 * k + 1) for k in range(9)]


def uniform(
    seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return numbers start to stop (excluded) of a stream, uniform in [0, 1), as float64.

    `standard_normal` with the same seed and name uses the same bits, so use another name for it.

    Args:
        seed: any integer.
        name: what the numbers are for.
        start, stop: 0 <= start <= stop < 2⁶³.
        device: where they are made; their bits do not depend on it.

    >>> uniform(0, "a", 1, 3).equal(uniform(0, "a", 0, 4)[1:3])
    True
    """
    return _in_groups(seed, name, start, stop, device, _to_uniform, "float64")


def standard_normal(
    seed: int, name: str, start: int, stop: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return numbers start to stop (excluded) of a stream, of N(0, 1), as float32.

    They are √(−2 ln u) · sin(π/2 · v) (Box and Muller 1958), computed in float64, with u in (0, 1)
    of 40 bits and v in [−1, 1] of 24 bits. All numbers are within ±7.6.

    Args:
        seed: any integer.
        name: what the numbers are for.
        start, stop: 0 <= start <= stop < 2⁶³.
        device: where they are made; their bits do not depend on it.

    >>> standard_normal(0, "a", 1, 3).equal(standard_normal(0, "a", 0, 4)[1:3])
    True
    """
    return _in_groups(seed, name, start, stop, device, _to_normal, "float32")


def _in_groups(
    seed: int,
    name: str,
    start: int,
    stop: int,
    device: torch.device | str,
    convert: Callable[[Tensor], Tensor],
    dtype: str,
) -> Tensor:
    import torch

    if isinstance(seed, bool) or not isinstance(seed, int):
        raise OutlierMergeError(f"seed: found {seed!r}, expected an integer")
    assert 0 <= start <= stop < 1 << 63
    keys = stream_keys(seed, name)
    out = torch.empty(stop - start, dtype=getattr(torch, dtype), device=device)
    step = _CACHED_ELEMENTS if out.device.type == "cpu" else max(1, out.numel())
    for first in range(start, stop, step):
        last = min(first + step, stop)
        out[first - start : last - start] = convert(_bits(keys, first, last, out.device))
    return out


def stream_keys(seed: int, name: str) -> tuple[int, int]:
    """Return the two signed 64-bit numbers that a stream's numbers are made of."""
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    first, second = (int.from_bytes(digest[at : at + 8], "little", signed=True) for at in (0, 8))
    return first, second


def random_bits(
    keys: tuple[int, int], start: int, stop: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return 64 random bits for the places start to stop (excluded) of a stream, as int64.

    Args:
        keys: the stream's, from `stream_keys`.
    """
    import torch

    return _bits(keys, start, stop, torch.device(device))


def _bits(keys: tuple[int, int], start: int, stop: int, device: torch.device) -> Tensor:
    """Return 64 random bits for each place, as int64."""
    import torch

    # Two rounds, each after adding a key: with one round, streams would be pieces of one sequence.
    values = torch.arange(start + 1, stop + 1, dtype=torch.int64, device=device)
    values = _mix(values.mul_(_GAMMA).add_(keys[0]))
    return _mix(values.bitwise_xor_(keys[1]))


def _mix(values: Tensor) -> Tensor:
    for shift, factor in ((30, _MULTIPLY_1), (27, _MULTIPLY_2), (31, 1)):
        values.bitwise_xor_(_shifted(values, shift))
        if factor != 1:
            values.mul_(factor)
    return values


def _shifted(values: Tensor, shift: int) -> Tensor:
    # >> fills the free bits of an int64 with copies of its sign bit.
    return (values >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _to_uniform(bits: Tensor) -> Tensor:
    return _shifted(bits, 11).double().mul_(2.0**-53)


def _to_normal(bits: Tensor) -> Tensor:
    u = _shifted(bits, 24).double().add_(0.5).mul_(2.0**-40)
    turns = (bits & ((1 << 24) - 1)).double().mul_(2.0**-24)
    quarter_turns = turns.sub_(0.5).abs_().mul_(-4.0).add_(1.0)
    return _minus_two_log(u).sqrt_().mul_(_odd_series(quarter_turns, _SIN_TERMS)).float()


def _minus_two_log(u: Tensor) -> Tensor:
    """Return −2 ln u for u in (0, 1), by the series of artanh, within 1e-13 of its size."""
    import torch

    mantissa, exponent = torch.frexp(u)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2, mantissa)
    exponent = (exponent - small.int()).double()
    log = _odd_series(mantissa.sub(1.0).div_(mantissa.add_(1.0)), _LOG_TERMS)
    return log.add_(exponent.mul_(math.log(2.0))).mul_(-2.0)


def _odd_series(x: Tensor, terms: list[float]) -> Tensor:
    import torch

    square = x * x
    total = torch.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        total.mul_(square).add_(term)
    return total.mul_(x)
