"""outliermerge: merge model checkpoints, on disk or in memory.

    plan, run, verify, estimate     a merge of checkpoints: what it would do; do it; prove it
    sweep, plan_sweep               several settings at once
    run_part, join                  one merge by several processes, on one machine or several
    moe, transplant                 a mixture of experts; a model with another one's tokenizer
    extract                         an adapter of what a model and its base differ by
    merge_tensors, merge_state_dicts    tensors in memory, on any device
    merge_method, METHODS, find_method  write a method; the methods that there are
    weight_stats, compare_weights, layer_spectra, build_report, simulate    look at weights
    load_spec, read_manifest, RunOptions    a spec; what an output says of itself; how to run

`help(outliermerge.run)` explains a function, `docs/` the rest. Nothing heavy is imported until
one of these is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outliermerge.analysis.compare import Comparison, compare_weights
    from outliermerge.analysis.report.build import build_report
    from outliermerge.analysis.simulate import Simulation, simulate
    from outliermerge.analysis.spectra import LayerSpectra, layer_spectra
    from outliermerge.analysis.spectra_fingerprint import fingerprint_distance
    from outliermerge.analysis.stats import stats_of_tensor, weight_stats
    from outliermerge.analysis.table import TensorStats, WeightStats
    from outliermerge.api import (
        MoeResult,
        TransplantResult,
        estimate,
        moe,
        plan,
        run,
        transplant,
        verify,
    )
    from outliermerge.calibration.library import fit, measure
    from outliermerge.errors import ArgumentError, OutlierMergeError, SpecError
    from outliermerge.extraction.extract import extract
    from outliermerge.extraction.report import Extraction
    from outliermerge.methods.context import Context
    from outliermerge.methods.contract import MergeMethod, merge_method
    from outliermerge.methods.parameter import PerModel
    from outliermerge.methods.statistics.base import StandardDeviation
    from outliermerge.methods.statistics.gram import Gram
    from outliermerge.methods.statistics.trim import Trim
    from outliermerge.methods.table import METHODS, find_method
    from outliermerge.output.estimate import Estimate
    from outliermerge.output.manifest_file import Manifest, read_manifest
    from outliermerge.output.options import RunOptions
    from outliermerge.output.parts import join, run_part
    from outliermerge.output.run import RunResult
    from outliermerge.planning.plan import Plan
    from outliermerge.search.sweeps import Variant, plan_sweep, sweep
    from outliermerge.spec.check import MergeSpec, load_spec
    from outliermerge.tensors import merge_state_dicts, merge_tensors

    __version__: str

__all__ = [
    "METHODS",
    "ArgumentError",
    "Comparison",
    "Context",
    "Estimate",
    "Extraction",
    "Gram",
    "LayerSpectra",
    "Manifest",
    "MergeMethod",
    "MergeSpec",
    "MoeResult",
    "OutlierMergeError",
    "PerModel",
    "Plan",
    "RunOptions",
    "RunResult",
    "Simulation",
    "SpecError",
    "StandardDeviation",
    "TensorStats",
    "TransplantResult",
    "Trim",
    "Variant",
    "WeightStats",
    "build_report",
    "compare_weights",
    "estimate",
    "extract",
    "find_method",
    "fingerprint_distance",
    "fit",
    "join",
    "layer_spectra",
    "load_spec",
    "measure",
    "merge_method",
    "merge_state_dicts",
    "merge_tensors",
    "moe",
    "plan",
    "plan_sweep",
    "read_manifest",
    "run",
    "run_part",
    "simulate",
    "stats_of_tensor",
    "sweep",
    "transplant",
    "verify",
    "weight_stats",
]

_HOMES = {
    "ArgumentError": "errors",
    "Comparison": "analysis.compare",
    "Context": "methods.context",
    "Estimate": "output.estimate",
    "Extraction": "extraction.report",
    "Gram": "methods.statistics.gram",
    "LayerSpectra": "analysis.spectra",
    "METHODS": "methods.table",
    "Manifest": "output.manifest_file",
    "MergeMethod": "methods.contract",
    "MergeSpec": "spec.check",
    "MoeResult": "api",
    "OutlierMergeError": "errors",
    "PerModel": "methods.parameter",
    "Plan": "planning.plan",
    "RunOptions": "output.options",
    "RunResult": "output.run",
    "Simulation": "analysis.simulate",
    "SpecError": "errors",
    "StandardDeviation": "methods.statistics.base",
    "TensorStats": "analysis.table",
    "TransplantResult": "api",
    "Trim": "methods.statistics.trim",
    "Variant": "search.sweeps",
    "WeightStats": "analysis.table",
    "build_report": "analysis.report.build",
    "compare_weights": "analysis.compare",
    "estimate": "api",
    "extract": "extraction.extract",
    "find_method": "methods.table",
    "fingerprint_distance": "analysis.spectra_fingerprint",
    "fit": "calibration.library",
    "join": "output.parts",
    "layer_spectra": "analysis.spectra",
    "load_spec": "spec.check",
    "measure": "calibration.library",
    "merge_method": "methods.contract",
    "merge_state_dicts": "tensors",
    "merge_tensors": "tensors",
    "moe": "api",
    "plan": "api",
    "plan_sweep": "search.sweeps",
    "read_manifest": "output.manifest_file",
    "run": "api",
    "run_part": "output.parts",
    "simulate": "analysis.simulate",
    "stats_of_tensor": "analysis.stats",
    "sweep": "search.sweeps",
    "transplant": "api",
    "verify": "api",
    "weight_stats": "analysis.stats",
}


_COMMANDS = {
    "completion": "", "configs": "", "convert_config": "", "eval": "",
    "layers": "layer_spectra", "merge": "run", "methods": "METHODS", "push": "",
    "report": "build_report", "schema": "", "search": "", "stats": "weight_stats",
    "tokenizer": "transplant",
}  # fmt: skip
"""Commands of the program that have another name here, or no function."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("outliermerge")
    if name not in _HOMES:
        from outliermerge.errors import nearest

        if _COMMANDS.get(name) == "":
            command = name.replace("_", "-")
            raise AttributeError(
                f"module 'outliermerge' has no attribute {name!r}: it is only a command of the "
                f"program, `outliermerge {command}`. dir(outliermerge) lists all names."
            )
        near = _COMMANDS.get(name) or nearest(name, _HOMES, by_word=True)
        said = f"Did you mean {near!r}?" if near else "dir(outliermerge) lists all names."
        raise AttributeError(f"module 'outliermerge' has no attribute {name!r}. {said}")
    return getattr(importlib.import_module(f"outliermerge.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*_HOMES, "__doc__", "__file__", "__name__", "__version__"})
