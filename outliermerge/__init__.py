"""outliermerge: merge model checkpoints by the min-σ rule (arXiv 2501.10661) and others.

The package imports nothing heavy until one of its functions is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outliermerge.errors import OutlierMergeError, SpecError
    from outliermerge.merge import merge_state_dicts, merge_tensors, plan, run, verify
    from outliermerge.method import PerModel, merge_method
    from outliermerge.statistics import StandardDeviation
    from outliermerge.sweeps import sweep
    from outliermerge.trim import Trim
    from outliermerge.weights.compare import compare_weights
    from outliermerge.weights.report.build import build_report
    from outliermerge.weights.simulate import simulate
    from outliermerge.weights.spectra import layer_spectra
    from outliermerge.weights.stats import stats_of_tensor, weight_stats

__all__ = [
    "OutlierMergeError",
    "PerModel",
    "SpecError",
    "StandardDeviation",
    "Trim",
    "build_report",
    "compare_weights",
    "layer_spectra",
    "merge_method",
    "merge_state_dicts",
    "merge_tensors",
    "plan",
    "run",
    "simulate",
    "stats_of_tensor",
    "sweep",
    "verify",
    "weight_stats",
]

_HOMES = {
    "OutlierMergeError": "errors",
    "PerModel": "method",
    "SpecError": "errors",
    "StandardDeviation": "statistics",
    "Trim": "trim",
    "build_report": "weights.report.build",
    "compare_weights": "weights.compare",
    "layer_spectra": "weights.spectra",
    "merge_method": "method",
    "simulate": "weights.simulate",
    "stats_of_tensor": "weights.stats",
    "weight_stats": "weights.stats",
    "sweep": "sweeps",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'outliermerge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"outliermerge.{_HOMES.get(name, 'merge')}"), name)
