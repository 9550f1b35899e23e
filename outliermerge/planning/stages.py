"""A planned merge as a model of another: its tensors are computed when they are read."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import xxhash

from outliermerge.checkpoint.sources import DTYPES, Source
from outliermerge.errors import WARNING, OutlierMergeError, shown
from outliermerge.methods.statistics.base import scope_of
from outliermerge.planning.layer_map import layers_of_merge
from outliermerge.planning.merged import MergedSource, Restored, WholeMerge
from outliermerge.planning.plan import Input, Job, Plan
from outliermerge.planning.sidecars import sidecar_contents
from outliermerge.storage.failures import naming
from outliermerge.storage.files import small_bytes
from outliermerge.storage.machine import cache_folder

_KEPT_SECONDS = 7 * 86_400
_IN_USE_SECONDS = 2 * 86_400  # a merge reads them at its end, too
_MAX_KEPT = 100


def as_input(name: str, plan: Plan, *, kind: str = "stage") -> Input:
    """Return the output of a plan as a model, of which nothing is stored.

    Its merged tensors have the dtype of their arithmetic, and are rounded only by the merge that
    uses them.

    Args:
        name: of the stage.
        kind: what messages call it.
    """
    tensors: dict[str, Source] = {}
    said = f"{kind} {shown(name)}"
    alike: dict[object, Source] = {}  # tied tensors are one
    whole = WholeMerge()
    for job in plan.jobs:
        key = job.action, job.context.name or job.name, job.sources
        tensors[job.name] = alike.setdefault(key, source_of(job, whole))
    whole.tensors = tuple(each for each in tensors.values() if isinstance(each, MergedSource))
    first, home = plan.inputs[0], _home(plan)
    stamps = {s.path: s for entry in plan.inputs for s in entry.checkpoint.weight_files}
    checkpoint = replace(
        first.checkpoint,
        root=first.checkpoint.root if home == first.home else home,
        tensors=tensors,
        weight_files=tuple(stamps.values()),
        sidecars=tuple(sidecar.name for sidecar in plan.sidecars),
        left_behind=(),
        components=plan.components,
        notes=(),
        other_files=(),
    )
    return Input(
        name,
        "model",
        checkpoint,
        home=home,
        made_of=plan.inputs,
        checks=tuple(_checks(said, plan)),
        layers=layers_of_merge(said, plan),
    )


def of_whole(note: str, *, of: str) -> str:
    """Return a note of a stage's or module's plan as one of the whole plan; a warning stays one.

    >>> of_whole("rows differ", of="stage a"), of_whole(f"{WARNING}a slip", of="module b")
    ('stage a: rows differ', 'warning: module b: a slip')
    """
    text = note.removeprefix(WARNING)
    return f"{WARNING if text != note else ''}{of}: {text}"


def source_of(job: Job, whole: WholeMerge) -> Source:
    """Return what a job computes as a source, in the dtype of its arithmetic."""
    own, stored = job.sources[0][1], job.output.dtype
    if job.action != "merge":
        return own if own.out_dtype == stored else Restored(own, stored)
    task = replace(job.task, out_dtype=DTYPES[job.compute_dtype])
    sources = (*(source for _, source in job.sources), *job.auxiliary)
    needs = task.method.needs.values()
    of_model = any(scope_of(need, task.parameters) == "model" for need in needs)
    return MergedSource(job.name, task, sources, stored, whole if of_model else None)


def _checks(stage: str, plan: Plan) -> list[Job]:
    """Return what must be equal for a stage to be right; the outer plan gives it its number."""
    found = list(plan.checks)
    for job in plan.jobs:
        if job.action == "equal":
            models = ", ".join(shown(plan.inputs[number].reference) for number, _ in job.sources)
            reason = (
                f"{shown(job.name)} cannot be merged, and {stage} copies it, which is "
                f"right only where its models agree: {models}"
            )
            found.append(replace(job, reason=reason))
    return found


def _home(plan: Plan) -> Path:
    """Return where the stage's config and tokenizer are: a model's folder, or one made of them."""
    home, contents = plan.inputs[0].home, sidecar_contents(plan)
    is_as_stored = all(
        sidecar.path == home / sidecar.name and _is_in(sidecar.path, contents[sidecar.name])
        for sidecar in plan.sidecars
    )
    return home if is_as_stored else _written(contents)


def _is_in(path: Path, content: bytes | Path) -> bool:
    return content == path or (isinstance(content, bytes) and small_bytes(path) == content)


def _forget_unused(folder: Path) -> None:
    """Remove what no merge has used for a week, and of the rest what is more than the latest."""
    used: list[tuple[float, Path]] = []
    for each in folder.iterdir():
        with suppress(OSError):  # another process removes it, too
            used.append((each.stat().st_mtime, each))
    used.sort(reverse=True)
    now = time.time()
    for place, (at, each) in enumerate(used):
        if now - at > _KEPT_SECONDS or (place >= _MAX_KEPT and now - at > _IN_USE_SECONDS):
            shutil.rmtree(each, ignore_errors=True)


def _written(contents: Mapping[str, bytes | Path]) -> Path:
    """Write small files into a folder that is named by what they contain, and return it."""
    held = {
        name: content if isinstance(content, bytes) else small_bytes(content)
        for name, content in sorted(contents.items())
    }
    digest = xxhash.xxh3_128()
    for name, data in held.items():
        digest.update(f"{name}\n{len(data)}\n".encode() + data)
    folder = cache_folder("stages") / digest.hexdigest()
    with naming(folder, "written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.is_dir():
            os.utime(folder)
        else:
            _forget_unused(folder.parent)
            made = Path(tempfile.mkdtemp(dir=folder.parent))
            for name, data in held.items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                (made / name).write_bytes(data)
            with suppress(OSError):  # another process was first
                made.rename(folder)
            shutil.rmtree(made, ignore_errors=True)
        if any((folder / name).read_bytes() != data for name, data in held.items()):
            raise OutlierMergeError(f"{folder}: holds other files than its name says. Remove it.")
    return folder
