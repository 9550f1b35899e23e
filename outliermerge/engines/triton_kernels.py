"""The fused GPU kernels, in Triton: the statistics and merges of many tensors in one launch each.

Two tables describe a batch. `addresses` (T, S + 1) holds the addresses of each tensor's sources and
result. `pieces` (P, 3) holds for each piece the number of its tensor, its own number in the tensor,
and its count of elements, at most PIECE. A program works on one part of a piece, which has BLOCK
elements; arrays of one part have no shape suffix in their names.

Sources are widened to float32 and the result is rounded once. Products and sums are not contracted
to fused multiply-adds, and divisions are rounded correctly, so that elements are the same as on the
CPU. bfloat16 is converted by its bits, which gives the same values on every device and in Triton's
interpreter. Where Triton is not installed, this file can still be imported, and `is_installed` is
false.
"""

# mypy: ignore-errors
# The language of the kernels has Python's syntax, not its types.

from __future__ import annotations

from outliermerge.methods.statistics.base import CHUNK_ELEMENTS

try:
    import triton
    import triton.language as tl

    is_installed = True
    jit = triton.jit
    PIECE = tl.constexpr(CHUNK_ELEMENTS)
    BLOCK = tl.constexpr(4_096)
except ImportError:  # torch computes
    is_installed = False

    def jit(function):
        """Return a kernel unchanged."""
        return function


OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""Launch options: 16 elements per thread, no contraction to fused multiply-adds."""


@jit
def load(addresses, at, offsets, mask, CODE: tl.constexpr, ALIGN: tl.constexpr):
    """Return values of a tensor as float32, 0 where the mask is not set."""
    address = tl.load(addresses + at)
    if CODE == "b":
        place = tl.multiple_of(address.to(tl.pointer_type(tl.uint16)), ALIGN * 2)
        bits = tl.load(place + offsets, mask=mask, other=0).to(tl.uint32)
        values = (bits << 16).to(tl.float32, bitcast=True)
    elif CODE == "e":
        place = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), ALIGN * 2)
        values = tl.load(place + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        place = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), ALIGN * 4)
        values = tl.load(place + offsets, mask=mask, other=0.0)
    return values


@jit
def store(addresses, at, offsets, values, mask, CODE: tl.constexpr, ALIGN: tl.constexpr):
    """Store float32 values, rounded to nearest, ties to even."""
    address = tl.load(addresses + at)
    if CODE == "b":
        place = tl.multiple_of(address.to(tl.pointer_type(tl.uint16)), ALIGN * 2)
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored = tl.where(values == values, rounded, 0x7FC0)
        tl.store(place + offsets, stored.to(tl.uint16), mask=mask)
    elif CODE == "e":
        place = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), ALIGN * 2)
        tl.store(place + offsets, values.to(tl.float16), mask=mask)
    else:
        place = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), ALIGN * 4)
        tl.store(place + offsets, values, mask=mask)


@jit
def part_of(pieces, ALIGN: tl.constexpr):
    """Return this program's tensor, its elements' offsets in it, their mask and their count."""
    program = tl.program_id(0).to(tl.int64)
    parts: tl.constexpr = PIECE // BLOCK
    entry = pieces + program // parts * 3
    part = (program % parts).to(tl.int32)
    tensor = tl.load(entry).to(tl.int64)
    start = tl.load(entry + 1).to(tl.int64) * PIECE + part * BLOCK
    num = tl.multiple_of(tl.load(entry + 2) - part * BLOCK, ALIGN)
    lanes = tl.arange(0, BLOCK)
    return tensor, start + lanes, lanes < num, tl.minimum(tl.maximum(num, 0), BLOCK)


@jit
def load_base(addresses, row, offsets, mask, BASE: tl.constexpr, ALIGN: tl.constexpr):
    """Return the base's values, or 0 where there is no base."""
    if BASE == "":
        values = tl.zeros((BLOCK,), tl.float32)
    else:
        values = load(addresses, row, offsets, mask, BASE, ALIGN)
    return values


@jit
def moments(
    addresses, pieces, out,
    M: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Write each part's mean and its sum of squared deviations, float64 (parts, M, 2)."""
    tensor, offsets, mask, num = part_of(pieces, ALIGN)
    has_base: tl.constexpr = BASE != ""
    row = tensor * (M + has_base + 1)
    base = load_base(addresses, row, offsets, mask, BASE, ALIGN)
    to = out + tl.program_id(0).to(tl.int64) * (2 * M)
    by = tl.maximum(num, 1).to(tl.float64)
    for model in tl.static_range(M):
        values = load(addresses, row + has_base + model, offsets, mask, MODEL, ALIGN) - base
        wide = values.to(tl.float64)
        mean = tl.sum(wide, 0) / by
        away = tl.where(mask, wide - mean, 0.0)
        tl.store(to + 2 * model, mean)
        tl.store(to + 2 * model + 1, tl.sum(away * away, 0))


@jit
def combine_moments(partials, firsts, sizes, out, M: tl.constexpr):
    """Combine the moments of each tensor's parts by Chan's formula, float64 (T, M, 2).

    Args:
        partials: the moments of parts, as `moments` writes them.
        firsts: each tensor's first part (T,).
        sizes: elements of each tensor (T,).
    """
    WIDTH: tl.constexpr = 1024
    tensor, model = tl.program_id(0), tl.program_id(1)
    size = tl.load(sizes + tensor)
    num_parts = ((size + BLOCK - 1) // BLOCK).to(tl.int32)
    from_ = partials + (tl.load(firsts + tensor) * M + model) * 2
    lanes = tl.arange(0, WIDTH)
    sums = tl.zeros((WIDTH,), tl.float64)
    for start in range(0, num_parts, WIDTH):
        part = start + lanes
        there = part < num_parts
        count = tl.minimum(size - part.to(tl.int64) * BLOCK, BLOCK).to(tl.float64)
        at = from_ + part.to(tl.int64) * (2 * M)
        sums += tl.where(there, tl.load(at, mask=there, other=0.0) * count, 0.0)
    mean = tl.sum(sums, 0) / size.to(tl.float64)
    squares = tl.zeros((WIDTH,), tl.float64)
    for start in range(0, num_parts, WIDTH):
        part = start + lanes
        there = part < num_parts
        count = tl.minimum(size - part.to(tl.int64) * BLOCK, BLOCK).to(tl.float64)
        at = from_ + part.to(tl.int64) * (2 * M)
        away = tl.load(at, mask=there, other=0.0) - mean
        own = tl.load(at + 1, mask=there, other=0.0)
        squares += tl.where(there, own + count * away * away, 0.0)
    to = out + (tensor * M + model) * 2
    tl.store(to, mean)
    tl.store(to + 1, tl.sum(squares, 0))


@jit
def magnitudes(
    addresses, pieces, thresholds, out,
    M: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Write each part's sums of all magnitudes and of those a threshold keeps (parts, M, 2)."""
    tensor, offsets, mask, _ = part_of(pieces, ALIGN)
    has_base: tl.constexpr = BASE != ""
    row = tensor * (M + has_base + 1)
    base = load_base(addresses, row, offsets, mask, BASE, ALIGN)
    to = out + tl.program_id(0).to(tl.int64) * (2 * M)
    for model in tl.static_range(M):
        values = load(addresses, row + has_base + model, offsets, mask, MODEL, ALIGN) - base
        size = tl.abs(values)
        kept = tl.where(size >= tl.load(thresholds + model), size, 0.0)
        tl.store(to + 2 * model, tl.sum(size.to(tl.float64), 0))
        tl.store(to + 2 * model + 1, tl.sum(kept.to(tl.float64), 0))


@jit
def histogram(
    addresses, pieces, lows, counts, shift, num_bins,
    M: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Count magnitudes by their bits, in bins of 2^shift from a model's low on.

    Args:
        lows: (M,); the highest int32 for a model that is left out.
        counts: int32 (M, num_bins + 1), added to; the last one counts magnitudes above the bins.
    """
    tensor, offsets, mask, _ = part_of(pieces, ALIGN)
    has_base: tl.constexpr = BASE != ""
    row = tensor * (M + has_base + 1)
    base = load_base(addresses, row, offsets, mask, BASE, ALIGN)
    for model in tl.static_range(M):
        values = load(addresses, row + has_base + model, offsets, mask, MODEL, ALIGN) - base
        offset = (values.to(tl.int32, bitcast=True) & 0x7FFFFFFF) - tl.load(lows + model)
        counted = mask & (offset >= 0)
        bin_ = offset >> shift
        to = counts + model * (num_bins + 1)
        tl.atomic_add(to + bin_, 1, mask=counted & (bin_ < num_bins), sem="relaxed")
        above = tl.sum((counted & (bin_ >= num_bins)).to(tl.int32), 0)
        tl.atomic_add(to + num_bins, above, sem="relaxed")


@jit
def weighted_sum(
    addresses, pieces, parameters,
    M: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, OUT: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Write the weighted sum of the models; `parameters` are the weights, float32 (T, M)."""
    tensor, offsets, mask, _ = part_of(pieces, ALIGN)
    has_base: tl.constexpr = BASE != ""
    row = tensor * (M + has_base + 1)
    own = parameters + tensor * M
    base = load_base(addresses, row, offsets, mask, BASE, ALIGN)
    merged = tl.zeros((BLOCK,), tl.float32)
    for model in tl.static_range(M):
        values = load(addresses, row + has_base + model, offsets, mask, MODEL, ALIGN) - base
        merged += values * tl.load(own + model)
    store(addresses, row + has_base + M, offsets, merged + base, mask, OUT, ALIGN)


@jit
def min_sigma(
    addresses, pieces, parameters,
    M: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, OUT: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Merge by the min-σ rule.

    Args:
        parameters: float32 (T, 2 + M): threshold, λ; then weights of models.
    """
    tensor, offsets, mask, _ = part_of(pieces, ALIGN)
    has_base: tl.constexpr = BASE != ""
    row = tensor * (M + has_base + 1)
    own = parameters + tensor * (M + 2)
    threshold = tl.load(own)
    base = load_base(addresses, row, offsets, mask, BASE, ALIGN)
    merged = tl.zeros((BLOCK,), tl.float32)
    for model in tl.static_range(M):
        delta = load(addresses, row + has_base + model, offsets, mask, MODEL, ALIGN) - base
        if M & (M - 1) == 0:  # division by a power of two is an exact multiplication
            shared = delta * (1.0 / M)
        else:
            shared = tl.div_rn(delta, tl.full((BLOCK,), M, tl.float32))
        kept = tl.where(tl.abs(delta) <= threshold, shared, delta)  # NaN is kept
        merged += kept * tl.load(own + 2 + model)
    merged *= tl.load(own + 1)
    store(addresses, row + has_base + M, offsets, merged + base, mask, OUT, ALIGN)


@jit
def trimmed(
    addresses, row, offsets, mask, base, own, model: tl.constexpr,
    M: tl.constexpr, MODEL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Return a model's trimmed task vector times its scaled weight."""
    delta = load(addresses, row, offsets, mask, MODEL, ALIGN) - base
    kept = tl.where(tl.abs(delta) <= tl.load(own + 2 + M + model), 0.0, delta)
    return kept * tl.load(own + 2 + 2 * M + model)


@jit
def ties(
    addresses, pieces, parameters,
    M: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, OUT: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Trim, elect a sign, and merge the elements that agree with it.

    Args:
        parameters: float32 (T, 2 + 3M): λ, whether to normalize; then for all models the weights,
            the largest magnitudes that are dropped, and the scaled weights.
    """
    tensor, offsets, mask, _ = part_of(pieces, ALIGN)
    has_base: tl.constexpr = BASE != ""
    row = tensor * (M + has_base + 1)
    own = parameters + tensor * (3 * M + 2)
    base = load_base(addresses, row, offsets, mask, BASE, ALIGN)
    votes = tl.zeros((BLOCK,), tl.float32)
    for model in tl.static_range(M):
        at = row + has_base + model
        votes += trimmed(addresses, at, offsets, mask, base, own, model, M, MODEL, ALIGN)
    merged = tl.zeros((BLOCK,), tl.float32)
    divisor = tl.zeros((BLOCK,), tl.float32)
    for model in tl.static_range(M):
        at = row + has_base + model
        change = trimmed(addresses, at, offsets, mask, base, own, model, M, MODEL, ALIGN)
        agreeing = tl.where(votes < 0, -change, change)
        merged += tl.where(agreeing <= 0, 0.0, agreeing)
        divisor += tl.where(agreeing > 0, tl.load(own + 2 + model), 0.0)
    merged = tl.where(votes < 0, -merged, merged)
    divisor = tl.where(tl.load(own + 1) != 0, divisor, 1.0)
    merged = tl.div_rn(merged, tl.where(divisor == 0, 1.0, divisor))
    merged *= tl.load(own)
    store(addresses, row + has_base + M, offsets, merged + base, mask, OUT, ALIGN)


@jit
def heads_differ(
    addresses, sizes, out,
    M: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Tell for each tensor whether its sources differ in their first elements."""
    tensor = tl.program_id(0).to(tl.int64)
    has_base: tl.constexpr = BASE != ""
    FIRST: tl.constexpr = BASE if has_base else MODEL
    row = tensor * (M + has_base + 1)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < tl.multiple_of(tl.load(sizes + tensor), ALIGN)
    first = load(addresses, row, offsets, mask, FIRST, ALIGN)
    found = tl.zeros((BLOCK,), tl.int32)
    for model in tl.static_range(M):
        values = load(addresses, row + has_base + model, offsets, mask, MODEL, ALIGN)
        found |= (mask & (values != first)).to(tl.int32)
    tl.store(out + tensor, tl.max(found, 0))
