"""Tensors that are buffers: copied, not merged, since a model has them as integers or booleans."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from outliermerge.checkpoint.meta import Source

# A map by its name, which no length shows: the values are rows of another tensor, or of another
# model (the tokens of a draft model in its target's vocabulary).
_MAP = re.compile(r"(^|[._])([a-z]+2[a-z]+|\w*(map|mapping|remap|permutation|perm))$")
_NO_MAP = re.compile(r"position|token_type|segment|count|mask|step|tracked")


def is_computed(name: str, source: Source) -> bool:
    """Tell whether a model class computes a tensor itself, so that a model may lack it.

    Older versions of transformers stored RoPE's frequencies, positions and masks.
    """
    last, shape = name.rpartition("/")[2].split("."), source.shape
    if last[-1] == "inv_freq":
        return len(shape) == 1
    if last[-1] in ("position_ids", "masked_bias"):
        return len(shape) < 2 or shape[0] == 1
    is_mask = last[-1] == "bias" and len(shape) == 4 and shape[:2] == (1, 1)
    return is_mask and last[-2:-1] != [] and "att" in last[-2]


def is_frequencies(name: str, sources: Sequence[Source]) -> bool:
    """Tell whether models hold RoPE's frequencies alike, whose mean would be of no model.

    In another dtype they are rounded, so that they tell nothing.
    """
    is_rope = name.rpartition(".")[2] == "inv_freq" and is_computed(name, sources[0])
    return is_rope and len({(source.dtype, source.shape) for source in sources}) == 1


def is_buffer(sources: Sequence[Source]) -> bool:
    """Tell whether models hold a buffer in one shape; a float in one may be an integer in another.

    A matrix of single bytes in place of floats is none: these are codes of a quantised weight.
    Complex numbers are buffers only where all models have them.
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
    # Masks and position ids of one row for all inputs begin with a dimension of 1.
    shape = source.shape
    return source.dtype.name in ("int8", "uint8") and len(shape) > 1 and shape[0] > 1


def maps_rows(name: str, source: Source, tensors: Mapping[str, Source]) -> bool:
    """Tell whether a buffer says what the rows of weights stand for, as a draft's d2t and t2d do.

    It has an element for every row of a weight in the same model, or is called a map. Under another
    model's map rows would stand for other tokens. Places in a sequence, counts and masks are none.
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
