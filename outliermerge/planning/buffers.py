"""Buffers: tensors that are copied, not merged, as a model stores them as integers or booleans."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from outliermerge.checkpoint.sources import Source

# Names of maps. The length does not show what they are: the values are row numbers of another
# tensor or of another model (such as a draft model's tokens in the target's vocabulary).
_MAP = re.compile(r"(^|[._])([a-z]+2[a-z]+|\w*(map|mapping|remap|permutation|perm))$")
_NO_MAP = re.compile(r"position|token_type|segment|count|mask|step|tracked")


def is_computed(name: str, source: Source) -> bool:
    """Tell whether model classes compute a tensor themselves; then a model may lack it.

    Older versions of transformers stored RoPE frequencies, positions and masks.
    """
    last, shape = name.rpartition("/")[2].split("."), source.shape
    if last[-1] == "inv_freq":
        return len(shape) == 1
    if last[-1] in ("position_ids", "masked_bias"):
        return len(shape) < 2 or shape[0] == 1
    is_mask = last[-1] == "bias" and len(shape) == 4 and shape[:2] == (1, 1)
    return is_mask and last[-2:-1] != [] and "att" in last[-2]


def is_frequencies(name: str, sources: Sequence[Source]) -> bool:
    """Tell whether a tensor is RoPE frequencies, in one dtype; a mean would fit no model.

    In a smaller dtype they are rounded; then they cannot be compared.
    """
    is_rope = name.rpartition(".")[2] == "inv_freq" and is_computed(name, sources[0])
    return is_rope and len({(source.dtype, source.shape) for source in sources}) == 1


def is_buffer(sources: Sequence[Source]) -> bool:
    """Tell whether a tensor is a buffer, of one shape in all models; some may store it as floats.

    A matrix of bytes in one model and floats in another is no buffer: the bytes are codes of a
    quantised weight. Complex numbers are buffers only if all models have them.
    """
    floats = [source for source in sources if source.dtype.is_float]
    others = [source for source in sources if not source.dtype.is_float]
    if not others or len({source.shape for source in sources}) > 1:
        return False
    if not floats and len({source.dtype for source in sources}) == 1:
        return True
    if any(source.dtype.name == "complex64" for source in others):
        return False
    return not (floats and any(map(_looks_like_codes, others)))


def _looks_like_codes(source: Source) -> bool:
    # Masks and position ids with one row for all inputs begin with a dimension of 1.
    shape = source.shape
    return source.dtype.name in ("int8", "uint8") and len(shape) > 1 and shape[0] > 1


def maps_rows(name: str, source: Source, tensors: Mapping[str, Source]) -> bool:
    """Tell whether a buffer maps rows of weights to tokens, as a draft's d2t and t2d do.

    Such a buffer has an element for every row of a weight in the same model, or is named as a map.
    With another model's map, rows would stand for other tokens. Positions, counts and masks are not
    maps.
    """
    shape, dtype = source.shape, source.dtype.name
    is_kind = dtype == "bool" or "int" in dtype
    if not is_kind or _NO_MAP.search(name) or not shape or shape[0] < 2:
        return False
    if len(shape) == 1 and _MAP.search(name):
        return True
    if len(shape) > 2 or (len(shape) == 2 and (shape[0] == shape[1] or "int" not in dtype)):
        return False
    rows = {t.shape[0] for t in tensors.values() if t.dtype.is_float and len(t.shape) > 1}
    return shape[0] in rows
