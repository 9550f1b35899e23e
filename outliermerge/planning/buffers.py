"""Tensors that are buffers: copied, not merged, since a model has them as integers or booleans."""

from __future__ import annotations

from collections.abc import Sequence

from outliermerge.checkpoint.meta import Source


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
