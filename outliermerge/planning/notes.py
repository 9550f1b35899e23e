"""Notes that the user should read before a merge starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from outliermerge.checkpoint.folders.beside import CARD_NAME
from outliermerge.errors import WARNING, listing
from outliermerge.planning.plan import Input, Job, Sidecar
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.models import ModelSpec
from outliermerge.spec.settings import Setting

_MAX_WARNINGS = 20


def _shared(spec: MergeSpec, models: Sequence[ModelSpec]) -> Iterator[Mapping[str, Setting]]:
    """Yield the settings that some models share."""
    yield spec.settings
    yield from (one.settings for one in spec.slices if one.models is models)


def _gradients(spec: MergeSpec) -> Iterator[str]:
    """Yield a note for each list that may be meant as one value for each model."""
    for name, setting in () if spec.slices else spec.settings.items():
        for entry in setting.entries:
            if (
                spec.method.parameters[name].per_model
                and entry.is_gradient
                and len(entry.values) == len(spec.models) > 1
            ):
                yield (
                    f"`{name}: [{', '.join(map(str, entry.values))}]` is a gradient over the "
                    f"layers, the same for every model; for one {name} per model, put it under "
                    "`parameters` of each model"
                )


def reading_notes(spec: MergeSpec, inputs: Sequence[Input]) -> Iterator[str]:
    """Yield what was passed over in a file, and how its models were read."""
    if spec.warnings:
        rows = listing(spec.warnings, limit=_MAX_WARNINGS)
        yield f"{WARNING}without effect, as mergekit passes over it in silence:\n{rows}"
    yield from spec.notes
    for entry in inputs:
        root = f"{entry.checkpoint.root}: "  # the reference names the model already
        for note in entry.checkpoint.notes:
            yield f"{entry.reference}: {note.removeprefix(root)}"


def merge_notes(
    spec: MergeSpec,
    inputs: Sequence[Input],
    jobs: Sequence[Job],
    sidecars: Sequence[Sidecar],
    dropped: Sequence[str],
    lacking: Mapping[str, Sequence[str]],
) -> Iterator[str]:
    """Yield a note for each unusual fact about the models and the jobs.

    Args:
        sidecars: files that are carried over.
        dropped: tensors that are left out.
        lacking: by model the tensors that it lacks while another task model has them.
    """
    yield from reading_notes(spec, inputs)
    lack_weight: dict[str, None] = {}
    for models in [one.models for one in spec.slices] or [spec.models]:
        names = [model.reference for model in models if not model.settings.get("weight")]
        given = [settings for settings in _shared(spec, models) if "weight" in settings]
        if len(names) < len(models) and not given:
            lack_weight |= dict.fromkeys(names)
    if lack_weight:
        yield f"no `weight` for {', '.join(lack_weight)}: 1 is used"
    yield from _gradients(spec)
    mixed = [
        f"{job.name}: {', '.join(source.out_dtype.name for _, source in job.sources)}"
        for job in jobs
        if len({source.out_dtype for _, source in job.sources}) > 1
    ]
    if mixed:
        yield f"dtypes differ between models:\n{listing(mixed, limit=5)}"
    narrowed = Counter(
        (widest.name, job.output.dtype.name)
        for job in jobs
        for widest in [max((s.out_dtype for _, s in job.sources), key=lambda d: d.num_bytes)]
        if job.output.dtype.num_bytes < widest.num_bytes
    )
    for (loaded, stored), count in narrowed.items():
        yield f"{count} tensors are loaded as {loaded} and stored as {stored}"
    for reason in ("in no task model", "extra, copied"):
        names = [job.name for job in jobs if job.reason == reason]
        if names:
            yield f"{len(names)} tensors {reason}:\n{listing(names, limit=5)}"
    for model, lacked in lacking.items():
        yield (
            f"{len(lacked)} tensor(s) are not in {model}, which is taken as unchanged there:\n"
            f"{listing(lacked, limit=5)}"
        )
    if dropped:
        yield f"{len(dropped)} extra tensor(s) are left out:\n{listing(dropped, limit=5)}"
    checkpoint = inputs[0].checkpoint
    known = {"config.json", "model_index.json", "modules.json"}
    if checkpoint.root.is_dir() and not known & {sidecar.name for sidecar in sidecars}:
        wanted = spec.document.config_source
        home = next((e.home for e in inputs if e.reference == wanted), inputs[0].home)
        yield f"{home} has no config.json: transformers cannot load it"
    left_behind = [
        name
        for name in checkpoint.left_behind
        if name != CARD_NAME and not name.endswith(".index.json")
    ]
    if left_behind:
        left = listing(left_behind, limit=5)
        yield f"files of the base model that are not carried over:\n{left}"
