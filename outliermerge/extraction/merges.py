"""A merge of adapters, or of anything, as the model of which an adapter is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.reader import Reader
from outliermerge.engines.base import Engine
from outliermerge.engines.cpu import KernelEngine
from outliermerge.engines.kernels import find_kernels
from outliermerge.engines.torch import TorchEngine
from outliermerge.errors import SpecError, shown
from outliermerge.execution.merged import Merges
from outliermerge.execution.threads import choose_options
from outliermerge.extraction.pair import Pairs, paired
from outliermerge.methods.task import Task
from outliermerge.output.recipe import from_here, renamed
from outliermerge.planning.plan import Plan
from outliermerge.planning.planner import make_plan
from outliermerge.planning.stages import as_input
from outliermerge.spec.check import MergeSpec, load_spec
from outliermerge.spec.text import as_yaml
from outliermerge.storage.stamps import current_watch

_SPECS = (".yaml", ".yml")


def is_merge(model: object) -> bool:
    """Tell whether what an adapter is to be made of is a merge: a spec or a plan."""
    is_file = isinstance(model, (str, Path)) and str(model).endswith(_SPECS)
    return is_file or isinstance(model, (Mapping, MergeSpec, Plan))


def pairs_of_merge(spec: str | Path | Mapping[str, Any] | MergeSpec | Plan) -> Pairs:
    """Plan a merge, and return it tensor by tensor beside its base; nothing of it is written.

    Raises:
        SpecError: the spec is wrong, or names no base model.
        OutlierMergeError: a model is absent or broken, or the models do not fit together.
    """
    if isinstance(spec, Plan):
        plan = spec
    else:
        plan = make_plan(spec if isinstance(spec, MergeSpec) else load_spec(spec))
    if (watched := current_watch()) is not None:
        for path, stamp in plan.files:
            watched.note(path, stamp)
    name, base = plan.spec.source.file, plan.inputs[0]
    if base.role != "base":
        raise SpecError(
            f"{name}: no base_model: an adapter is a change of one. Name the model that the "
            "adapters were trained on"
        )
    pairs = paired(base, as_input(name, plan, kind="merge"))
    equal = (*plan.checks, *(job for job in plan.jobs if job.action == "equal"))
    twins = (
        (f"{name}: {shown(job.name)} must be equal in {models}, and is not", job.name, (one, other))
        for job in equal
        for models in [", ".join(shown(plan.inputs[number].reference) for number, _ in job.sources)]
        for (_, one), (_, other) in pairwise(job.sources)
    )
    recipe = as_yaml(renamed(plan.spec.as_dict(), from_here))
    return replace(pairs.with_twins(twins, plan.notes), recipe=recipe)


def reader_of_merges(memory_bytes: int, threads: int, folder: Path) -> Reader:
    """Return a reader that computes merges when they are read.

    Args:
        folder: for unnamed temporary files of what does not fit in memory.
    """
    options = choose_options(device="cpu", memory=memory_bytes, threads=threads, kernels=True)
    kernels = KernelEngine(find_kernels()) if options.kernels else None
    torch = TorchEngine(["cpu"])

    def engine_of(task: Task) -> Engine:
        return kernels if kernels is not None and options.kernels_do(task) else torch

    return Reader(memory_bytes, folder, Merges(engine_of))
