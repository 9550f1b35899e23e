"""The data of a report on a merge's output: its manifest, its inputs, its drift from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from outliermerge.analysis.compare import Comparison
from outliermerge.analysis.models import Subject, open_subject
from outliermerge.analysis.moved_layers import has_moved_layers
from outliermerge.analysis.report.data import Shown, drift_payload, short_titles
from outliermerge.analysis.report.origins import stages_of
from outliermerge.analysis.report.recorded import merge_payload
from outliermerge.analysis.table import WeightStats
from outliermerge.errors import OutlierMergeError
from outliermerge.output.names import manifest_path


def measure_merge(
    model: str,
    manifest: Mapping[str, Any],
    base: str | None,
    measure: Callable[..., WeightStats],
    compare: Callable[..., Comparison],
) -> tuple[list[Shown], dict[str, Any]]:
    """Return the statistics of an output and its task models, and further data for the page.

    An input that can no longer be read, and a stage, which was never stored, is left out with a
    note. Where slices give layers other numbers, nothing is compared by name.

    Args:
        model: the output's name.
        manifest: the output's manifest.
        base: a base to use instead of the manifest's.
        measure: `weight_stats` with its options.
        compare: `compare_weights` with its options.
    """
    inputs, spec = manifest["inputs"], manifest["spec"]
    title, *titles = short_titles([str(Path(model).resolve()), *(each["model"] for each in inputs)])
    outputs, notes = [Shown(title, "output", measure(model))], []
    named = {entry["model"]: name for entry, name in zip(inputs, titles, strict=True)}
    stages = stages_of(spec)
    is_moved = has_moved_layers(spec)
    if is_moved:
        notes.append(
            "Layers of the output have other numbers than in the models that they are from, so "
            "changes and drift, which are measured by name, are left out."
        )
    if "tokenizer" in spec or ("tokenizer_source" in spec and "vocabulary" not in spec):
        notes.append(
            "Rows of embeddings and head go by the tokens of the output's tokenizer. Their changes "
            "are shown only where a model has as many rows, and then row by row, whatever token "
            "each model has there."
        )
    if "modules" in spec:
        notes.append(
            "The merges of modules are not stored by themselves: what the output has of their "
            "models is left out."
        )
    merged_at = manifest_path(Path(model)).stat().st_mtime
    for entry, name in zip(inputs, titles, strict=True):
        if _has_changed(entry, merged_at):
            notes.append(
                f"Files of {name} have changed since the merge: what is shown of it may not be "
                "what was merged."
            )
        if entry["model"] in stages:
            notes.append(
                f"{name} is a stage of the merge and was not stored: what the output has of it, or "
                "how far it is from it, is left out."
            )
        elif entry["role"] == "base" and base is None:
            base = _reference(entry)
    if is_moved:
        base = None
    weights_of_base = None
    if base is not None:
        try:
            outputs.append(Shown(title, "output", measure(model, base=base)))
            weights_of_base = measure(base)
        except OutlierMergeError as error:
            notes.append(f"Shown without task vectors, since the base cannot be read: {error}")
            base = None
    renames = {each["model"]: each.get("rename") for each in spec.get("models", ())}
    tasks: list[tuple[Subject, Shown]] = []
    for entry, name in zip(inputs, titles, strict=True):
        if is_moved or entry["role"] == "base" or entry["model"] in stages:
            continue
        rename = renames.get(entry["model"])
        try:
            opened = open_subject(
                _reference(entry), base, rename=json.dumps(rename) if rename else None
            )
            shown = Shown(name, "task", measure(opened))
        except OutlierMergeError as error:
            notes.append(f"{name} is not shown, since it cannot be read: {error}")
        else:
            tasks.append((opened, shown))
    extra: dict[str, Any] = {"merge": merge_payload(manifest, named), "notes": notes}
    extra["base"] = weights_of_base
    if tasks:
        try:
            comparison = compare([open_subject(model, base), *(opened for opened, _ in tasks)])
        except OutlierMergeError as error:
            notes.append(f"Drift is not shown: {error}")
        else:
            names = [shown.title for _, shown in tasks]
            extra["drift"] = drift_payload(comparison, names, weights_of_base)
    return [*outputs, *(shown for _, shown in tasks)], extra


def _has_changed(entry: Mapping[str, Any], merged_at: float) -> bool:
    """Tell whether a file of an input is newer than the merge, or has another size than then."""
    root = Path(entry["path"])
    for name, num_bytes in entry["files"].items():
        path = root / name  # an absolute path stays as it is
        if path.is_file():
            found = path.stat()
            if found.st_size != num_bytes or found.st_mtime > merged_at:
                return True
    return False


def _reference(entry: Mapping[str, Any]) -> str:
    """Return the name to open an input by: its path at the merge, or `base+adapter` as given."""
    named, path = str(entry["model"]), str(entry["path"])
    return named if "+" in named and not Path(named).exists() else path
