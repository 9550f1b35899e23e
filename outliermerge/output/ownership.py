"""Decides what may be replaced or removed: only what outliermerge wrote, judged by contents."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.checksum import header_checksum
from outliermerge.checkpoint.folders.folder import MANIFEST_NAME
from outliermerge.errors import OutlierMergeError, argument, listing, shown
from outliermerge.output.manifest_file import read_manifest
from outliermerge.output.names import (
    journal_path,
    manifest_path,
    partial_folder,
    replaced_path,
    shard_path,
)
from outliermerge.planning.plan import Plan
from outliermerge.storage.bucket import Bucket
from outliermerge.storage.failures import naming
from outliermerge.storage.stand_ins import elsewhere
from outliermerge.storage.system import files_in


def check_apart(plan: Plan, final: Path) -> None:
    """Refuse an output path that is, contains or is inside a model of the merge.

    It may not hold auxiliary tensors either.

    Raises:
        OutlierMergeError: the output would damage them, or is inside another output, whose folder
            would no longer be as its manifest says.
    """
    others = dict.fromkeys(plan.auxiliary_files, "auxiliary tensors")
    if plan.tokenizer is not None:  # it may be that of a model which is not merged
        others |= {sidecar.path: "file" for sidecar in plan.sidecars}
    for path, what in others.items():
        if final.resolve() in (path.resolve(), *path.resolve().parents):
            raise OutlierMergeError(
                f"{final}: is or holds the {what} {shown(str(path))}: choose another output"
            )
    for entry in plan.models:
        files = {stamp.path.resolve() for stamp in entry.checkpoint.weight_files}
        roots = {entry.checkpoint.root.resolve(), entry.home.resolve()}
        if entry.home != entry.checkpoint.root:  # an adapter over a base in another folder
            roots |= {path.parent for path in files}
        for place in (final, partial_folder(final), replaced_path(final), journal_path(final)):
            resolved = place.resolve()
            for root in roots:
                if root == resolved or resolved in root.parents or root in resolved.parents:
                    raise OutlierMergeError(
                        f"{place}: is, holds or is inside the model {shown(entry.reference)}: "
                        "choose another output"
                    )
    for parent in final.resolve().parents:
        if (parent / MANIFEST_NAME).is_file():
            raise OutlierMergeError(
                f"{final}: is inside the output {parent}: choose another output"
            )


def check_apart_in_store(plan: Plan, final: str, bucket: Bucket) -> None:
    """Refuse an address that is, contains or is inside a model of the merge or an output.

    Raises:
        OutlierMergeError: the output would damage it.
    """
    for entry in plan.models:
        there = elsewhere(entry.checkpoint.root)
        address = f"{there.address}/" if there is not None else ""
        if address.startswith(f"{final}/") or (address and f"{final}/".startswith(address)):
            raise OutlierMergeError(
                f"{final}: is, holds or is inside the model {shown(entry.reference)}: choose "
                "another output"
            )
    if parent := bucket.parent_with(MANIFEST_NAME):
        raise OutlierMergeError(f"{final}: is inside the output {parent}: choose another output")


def check_free(plan: Plan, final: Path, *, overwrite: bool) -> None:
    """Refuse a path if what is there may not be replaced.

    Raises:
        OutlierMergeError: it exists, and outliermerge did not write it or it may not be
            overwritten.
    """
    manifest = manifest_path(final)
    there = [path for path in (final, manifest) if path.exists() or path.is_symlink()]
    if not there:
        return
    if plan.is_one_file and final.is_dir():
        raise OutlierMergeError(f"{final}: is a folder, and a file is to be written")
    if not overwrite:
        raise OutlierMergeError(
            f"{there[0]}: exists already. Use {argument('overwrite', True)} to replace it when the "
            f"merge is done, or choose another {argument('output')}."
        )
    if not manifest.is_file():
        raise OutlierMergeError(
            f"{final}: {argument('overwrite', True)} replaces only outputs of outliermerge, and "
            f"this has no {manifest.name}. Move it away."
        )
    found = read_manifest(final)
    if final.is_dir():
        foreign = sorted(set(files_in(final)) - listed(found) - {MANIFEST_NAME})
        if foreign:
            raise OutlierMergeError(
                f"{final}: {argument('overwrite', True)} would remove what outliermerge did not "
                f"write:\n{listing(foreign)}\nMove it away."
            )
        _check_removable(final)
    for name, shard in found["shards"].items():
        path = shard_path(final, name)
        if not path.exists():
            continue
        with naming(path, "read"):
            header = header_checksum(path)
        if header != shard["header"]:
            raise OutlierMergeError(
                f"{path}: is not the file that {manifest.name} says outliermerge wrote. "
                "Move it away, or remove it."
            )


def _check_removable(folder: Path) -> None:
    """Refuse an old output that could not be removed after the exchange."""
    for root, _, _ in os.walk(folder):
        if not os.access(root, os.W_OK | os.X_OK):
            raise OutlierMergeError(
                f"{root}: {argument('overwrite', True)} removes the old output when the merge is "
                "done, and you have no right to remove its files. Change its permissions (chmod "
                "u+w), or choose another output."
            )


def owned_files(folder: Path) -> set[str]:
    """Return the files that an old output's manifest lists; empty if it has no manifest."""
    return listed(read_manifest(folder)) if manifest_path(folder).is_file() else set()


def listed(manifest: Mapping[str, Any]) -> set[str]:
    """Return the files that a manifest lists."""
    return {*manifest["shards"], *manifest["files"]}
