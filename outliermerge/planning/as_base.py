"""Outputs in the format in which their base model is quantised."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.quantized.given_back import coded_again, forms_of, stored_form
from outliermerge.checkpoint.quantized.opened import QUANTIZATION_KEYS
from outliermerge.checkpoint.rearranged import reshaped
from outliermerge.checkpoint.sources import Checkpoint, Source, TensorMeta
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.planning.plan import Input, Job
from outliermerge.planning.quantized_jobs import Quantized, copy_of, sources_of

# Methods whose models are told by their names, shapes and config alone.
_METHODS = ("bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "mxfp4")


def as_base(base: Input, jobs: Sequence[Job]) -> Quantized:
    """Return the jobs that write each weight as the base model has it.

    Raises:
        OutlierMergeError: the base is not quantised, or in a form that cannot be written.
    """
    checkpoint = base.checkpoint
    quantised = {n: s for n, s in checkpoint.tensors.items() if s.stored != (s,)}
    what = f"the format of {shown(base.reference)}"
    if not quantised:
        raise OutlierMergeError(
            f"{shown(base.reference)} is not quantised: leave this out, or name a format: "
            "fp8, int8 or mxfp4"
        )
    config = read_json(base.home / "config.json")
    settings = next((config[key] for key in QUANTIZATION_KEYS if config.get(key)), None)
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method not in _METHODS:
        known = ", ".join(_METHODS)
        raise OutlierMergeError(
            f"{what} cannot be given back: the quantization_config of its config.json is of "
            f"{shown(method)}, and these can be: {known}. Name what to quantise to instead"
        )
    assert isinstance(settings, Mapping)
    held = {name: forms for name, source in quantised.items() if (forms := forms_of(source))}
    named = {job.name for job in jobs}
    if others := [name for name in quantised if name not in held or name not in named]:
        raise OutlierMergeError(
            f"{what} cannot be given back: these are of a kind that can only be read, or have "
            f"other names in the output:\n{listing(others)}\nName what to quantise to instead"
        )
    like = {_without_numbers(name) for name in held}
    if added := [
        job.name
        for job in jobs
        if job.name not in checkpoint.tensors and _without_numbers(job.name) in like
    ]:
        raise OutlierMergeError(
            f"{what} cannot be given back: it has no such tensors, and so no scales of them:\n"
            f"{listing(added)}\nName what to quantise to instead"
        )
    is_power = settings.get("scale_fmt") == "ue8m0"
    stored = _stored(checkpoint)
    source_by_name = sources_of(jobs, held)
    made: list[Job] = []
    for job in jobs:
        source = source_by_name.get(job.name)
        if job.name not in held:
            made.append(job if source is None else copy_of(job, job.name, source, is_merge=True))
            continue
        assert source is not None
        made += _given_back(job, source, quantised[job.name], stored, is_power=is_power)
    used = {job.name for job in made}
    first = next(job for job in jobs if job.name in held)
    made += (
        copy_of(first, name, meta, is_companion=True)
        for name, meta in checkpoint.companions.items()
        if name not in used
    )
    note = f"{len(held)} weights are quantised as {shown(base.reference)} is"
    return Quantized(tuple(made), settings, note)


def _without_numbers(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1", name)


_Place = tuple[object, str]


def _place(meta: TensorMeta) -> _Place:
    return meta.path, meta.name


def _stored(checkpoint: Checkpoint) -> dict[_Place, tuple[str, TensorMeta]]:
    """Return the tensors that stand beside weights, and their names, by where they are stored."""
    return {_place(meta): (name, meta) for name, meta in checkpoint.companions.items()}


def _given_back(
    job: Job,
    source: Source,
    before: Source,
    stored: Mapping[_Place, tuple[str, TensorMeta]],
    *,
    is_power: bool,
) -> Iterator[Job]:
    """Yield the jobs of a weight's scales, zero points and codes, in the form of the base."""
    forms = forms_of(before)
    assert forms is not None
    is_same = job.action == "copy" and source == before
    again = forms if is_same else coded_again(before, source, is_power=is_power)
    for form, made in zip(forms, again, strict=True):
        found = stored_form(form, made)
        assert found is not None
        meta, back = found
        name, whole = stored.get(_place(meta), (job.name, meta))
        back = whole if is_same else reshaped(back, whole.shape)
        yield copy_of(job, name, back, is_companion=form is not forms[-1])
