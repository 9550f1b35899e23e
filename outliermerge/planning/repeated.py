"""Checks that the inputs of a repeated merge are still those that its manifest lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError, listing
from outliermerge.planning.plan import Plan


def check_sizes(plan: Plan) -> None:
    """Refuse to repeat a merge if a weight file is another by its name or size.

    Raises:
        OutlierMergeError: the message lists the files.
    """
    if plan.spec.repeated is None:
        return
    then = plan.spec.repeated.inputs
    if len(then) != len(plan.inputs):
        _refuse(plan, [f"found {len(plan.inputs)} models, expected {len(then)}"])
    changed = []
    for entry, before in zip(plan.inputs, then, strict=True):
        now = {
            relative_to(stamp.path, entry.checkpoint.root): stamp.num_bytes
            for stamp in entry.checkpoint.weight_files
        }
        for file, num_bytes in before["files"].items():
            if file not in now:
                changed.append(f"{entry.reference}: {file} is not there any more")
            elif now[file] != num_bytes:
                changed.append(
                    f"{entry.reference}: {file} has {now[file]:,} bytes, expected {num_bytes:,}"
                )
        for file in now.keys() - before["files"].keys():
            changed.append(f"{entry.reference}: {file} was not there")
    _refuse(plan, changed)


def check_inputs(plan: Plan, inputs: Sequence[Mapping[str, Any]], written: Path | str) -> None:
    """Refuse to finish a repeated merge if other values were read than then.

    Args:
        inputs: the entries of the new manifest.
        written: the folder of the unfinished output.

    Raises:
        OutlierMergeError: the message lists the models.
    """
    if plan.spec.repeated is None:
        return
    pairs = zip(inputs, plan.spec.repeated.inputs, strict=True)
    _refuse(
        plan,
        [
            f"{now['model']}: its tensors have other values ({now['path']})"
            for now, then in pairs
            if now["checksum"] != then.get("checksum")
        ],
        f" {written} holds what was made of the present values: it can be removed.",
    )


def relative_to(path: Path, root: Path) -> str:
    """Return a path relative to a model's folder; the whole path if it is outside, as a base is."""
    if path == root or not path.is_relative_to(root):
        return str(path)
    return path.relative_to(root).as_posix()


def _refuse(plan: Plan, changed: Sequence[str], written: str = "") -> None:
    if not changed or plan.spec.repeated is None:
        return
    file = plan.spec.repeated.file
    beside = file.with_name("recipe.yaml")
    way_out = f" To merge what is there now: {beside}." if beside.is_file() else ""
    raise OutlierMergeError(
        f"{file}: this merge cannot be repeated, since models have changed:\n{listing(changed)}\n"
        f"Bring back what was merged.{way_out}{written}"
    )
