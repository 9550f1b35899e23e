"""The fused CPU kernels that fit this processor.

They work on storage dtypes directly and need neither torch nor numpy. torch computes where the
kernels were not compiled, or do not support a method or a dtype.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any


@cache
def find_kernels() -> Any | None:
    """Return the compiled module for this processor, or None where there is none."""
    try:
        found = importlib.import_module("outliermerge.engines._kernels")
    except ImportError:
        return None
    for level in range(found.level(), 2, -1):
        try:
            return importlib.import_module(f"outliermerge.engines._kernels_v{level}")
        except ImportError:
            continue
    return found


def names() -> frozenset[str]:
    """Return the names of the methods that kernels compute; none where they are not compiled."""
    kernels = find_kernels()
    return frozenset(name for name, _, _ in kernels.methods()) if kernels else frozenset()


def statistics() -> frozenset[str]:
    """Return the names of all kernel functions, such as those that measure statistics."""
    return frozenset(dir(find_kernels())) if find_kernels() else frozenset()
