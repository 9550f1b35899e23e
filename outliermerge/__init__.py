"""outliermerge: merge model checkpoints by the min-σ rule (arXiv 2501.10661) and others.

The package imports nothing heavy until one of its functions is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outliermerge.analysis.compare import compare_weights
    from outliermerge.analysis.report.build import build_report
    from outliermerge.analysis.simulate import simulate
    from outliermerge.analysis.spectra import layer_spectra
    from outliermerge.analysis.stats import stats_of_tensor, weight_stats
    from outliermerge.api import merge_state_dicts, merge_tensors, plan, run, verify
    from outliermerge.errors import ArgumentError, OutlierMergeError, SpecError
    from outliermerge.methods.contract import merge_method
    from outliermerge.methods.parameter import PerModel
    from outliermerge.methods.statistics.base import StandardDeviation
    from outliermerge.methods.statistics.gram import Gram
    from outliermerge.methods.statistics.trim import Trim
    from outliermerge.output.options import RunOptions
    from outliermerge.search.sweeps import sweep

__all__ = [
    "ArgumentError",
    "Gram",
    "OutlierMergeError",
    "PerModel",
    "RunOptions",
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
    "ArgumentError": "errors",
    "Gram": "methods.statistics.gram",
    "OutlierMergeError": "errors",
    "PerModel": "methods.parameter",
    "RunOptions": "output.options",
    "SpecError": "errors",
    "StandardDeviation": "methods.statistics.base",
    "Trim": "methods.statistics.trim",
    "build_report": "analysis.report.build",
    "compare_weights": "analysis.compare",
    "layer_spectra": "analysis.spectra",
    "merge_method": "methods.contract",
    "simulate": "analysis.simulate",
    "stats_of_tensor": "analysis.stats",
    "sweep": "search.sweeps",
    "weight_stats": "analysis.stats",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        from outliermerge.errors import nearest

        near = nearest(name, __all__)
        meant = f". Did you mean {near!r}?" if near else ""
        raise AttributeError(f"module 'outliermerge' has no attribute {name!r}{meant}")
    return getattr(importlib.import_module(f"outliermerge.{_HOMES.get(name, 'api')}"), name)
