"""The table's methods by kind: a test that is parametrised by these takes a new method up."""

from __future__ import annotations

from typing import Any

from outliermerge.methods.table import METHODS

SEVERAL = [name for name, method in METHODS.items() if method.max_models is None]
OF_DELTAS = [name for name, method in METHODS.items() if method.uses_base]
NEEDS_BASE = [name for name, method in METHODS.items() if method.needs_base]
OF_MATRICES = [name for name, method in METHODS.items() if method.cut == "tensor"]
WITH_KERNELS = [name for name, method in METHODS.items() if method.kernel is not None]
OF_ONE_TENSOR: dict[str, dict[str, Any]] = {
    "pcb": {"trim": "tensor"},
    "metagpt": {"norms": "tensor"},
}
"""Parameters of methods that by default measure whole models, where there is one tensor only."""
BY_ANGLES: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": 0.7},
    "nuslerp by rows": {"nuslerp_flatten": False},
    "nuslerp by columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    "multislerp": {"weight": 0.7},
    "multislerp of weights": {"weight": 0.7},
    "nuslerp of weights": {"weight": 0.7},
    "nuslerp of weights by rows": {"nuslerp_flatten": False},
    "nuslerp of weights by columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    "karcher": {"tol": 1e-7},
    "model_stock": {},
    "model_stock by rows": {"filter_wise": True},
    "nearswap": {"t": 0.01},
    "arcee_fusion": {},
}
"""Parameters of methods that interpolate, by the method's name and what is special in the case."""
