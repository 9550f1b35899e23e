"""The jobs of weights that an output stores in another form, as copies of computed sources."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from outliermerge.checkpoint.layout import OutputTensor
from outliermerge.checkpoint.sources import Source
from outliermerge.methods.statistics.base import scope_of
from outliermerge.planning.merged import MergedSource, WholeMerge
from outliermerge.planning.plan import Job
from outliermerge.planning.stages import source_of


@dataclass(frozen=True)
class Quantized:
    """The jobs of a quantised output, and what its config says of it.

    Attributes:
        settings: the config's `quantization_config`; None if it has none.
        note: what a person should know.
    """

    jobs: tuple[Job, ...]
    settings: Mapping[str, Any] | None
    note: str


def sources_of(jobs: Sequence[Job], chosen: Collection[str]) -> dict[str, Source]:
    """Return the merges to quantise as sources, tied ones as one.

    Where statistics are of the whole model, all merges become sources, so that they are measured
    together.
    """
    whole = WholeMerge()
    of_model = any(
        scope_of(need, job.parameters) == "model"
        for job in jobs
        if job.action == "merge"
        for need in job.task.method.needs.values()
    )
    made: dict[str, Source] = {}
    alike: dict[object, Source] = {}
    for job in jobs:
        if job.name in chosen or (of_model and job.action == "merge"):
            key = job.action, job.context.name or job.name, job.sources
            made[job.name] = alike.setdefault(key, source_of(job, whole))
    whole.tensors = tuple(s for s in made.values() if isinstance(s, MergedSource))
    return made


def copy_of(
    job: Job, name: str, source: Source, *, is_companion: bool = False, is_merge: bool = False
) -> Job:
    """Return the job that writes a source in the place of a job, or beside it."""
    dtype = job.output.dtype if is_merge else source.dtype
    return replace(
        job,
        action="copy",
        sources=((job.sources[0][0], source),),
        output=OutputTensor(name, dtype, source.shape, "", 0),
        parameters={},
        auxiliary=(),
        modifiers=(),
        stochastic=job.stochastic and is_merge,
        of=job,
        is_companion=is_companion,
    )
