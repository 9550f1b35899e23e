"""Decides what may be replaced or removed: only what outliermerge wrote, judged by contents."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.checksum import header_checksum
from outliermerge.checkpoint.folders.folder import MANIFEST_NAME
from outliermerge.checkpoint.folders.remote import RECORDS
from outliermerge.errors import OutlierMergeError, argument, listing, shown
from outliermerge.output.manifest_file import parsed_manifest, read_manifest
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
from outliermerge.storage.ranges import State
from outliermerge.storage.stand_ins import all_elsewhere
from outliermerge.storage.system import files_in


def check_apart(plan: Plan, final: Path) -> None:
    """Refuse an output path that is, contains or is inside a model of the merge.

    It may not be or hold anything else either that the plan has read, such as a tokenizer's files.

    Raises:
        OutlierMergeError: the output would damage them, or is inside another output, whose folder
            would no longer be as its manifest says.
    """
    own = (final, partial_folder(final), replaced_path(final), journal_path(final))
    places = {place: place.resolve() for place in own}
    for entry in plan.models:
        roots = {entry.checkpoint.root.resolve(), entry.home.resolve()}
        if entry.home != entry.checkpoint.root:  # an adapter over a base in another folder
            # What stands beside a model that is a file is no part of it.
            files = {stamp.path.resolve() for stamp in entry.checkpoint.weight_files}
            roots |= {path.parent for path in files} - {entry.checkpoint.root.resolve().parent}
        for place, resolved in places.items():
            for root in roots:
                if root == resolved or resolved in root.parents or root in resolved.parents:
                    raise OutlierMergeError(
                        f"{place}: is, holds or is inside the model {shown(entry.reference)}: "
                        "choose another output"
                    )
    others = dict.fromkeys(plan.auxiliary_files, "auxiliary tensors")
    others |= {path: "file" for path, stamp in plan.files if stamp and path not in others}
    above = cache(lambda folder: {folder, *folder.parents})  # most files are in a few folders
    followed = cache(Path.resolve)
    for path, what in others.items():
        real, folder = path.resolve(), followed(path.parent)
        around = {real, folder / path.name} | above(real.parent) | above(folder)
        for place, resolved in places.items():
            if resolved in around:
                raise OutlierMergeError(
                    f"{place}: is or holds the {what} {shown(str(path))}, which the merge reads: "
                    "choose another output"
                )
    for parent in final.resolve().parents:
        if (parent / MANIFEST_NAME).is_file():
            raise OutlierMergeError(
                f"{final}: is inside the output {parent}: choose another output"
            )


def check_apart_in_store(plan: Plan, final: str, bucket: Bucket) -> None:
    """Refuse an address that is, contains or is inside a model that is read, or an output.

    Raises:
        OutlierMergeError: the output would damage it.
    """
    roots = [root for entry in plan.models for root in (entry.checkpoint.root, entry.home)]
    output = _folders(final)
    for model in all_elsewhere([*roots, *(path for path, stamp in plan.files if stamp)]):
        address = _folders(model.address)
        shorter = min(len(address), len(output))
        if address[:shorter] == output[:shorter]:
            raise OutlierMergeError(
                f"{final}: is, holds or is inside the model {shown(model.address)}, which the "
                "merge reads: choose another output"
            )
    if parent := bucket.parent_with(MANIFEST_NAME):
        raise OutlierMergeError(f"{final}: is inside the output {parent}: choose another output")


def _folders(address: str) -> list[str]:
    """Return an address's scheme, bucket and folders, as the store takes them."""
    scheme, _, rest = address.partition("://")
    return [scheme.lower(), *filter(None, rest.split("/"))]


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


def check_begun_or_free(plan: Plan, final: str, *, overwrite: bool) -> None:
    """Refuse an address that is taken, unless a run has begun to write there.

    Raises:
        OutlierMergeError: something is there, and no killed run can go on to it.
    """
    bucket = Bucket(final)
    there = bucket.states()
    if not any(name.startswith(RECORDS) for name in there):
        check_apart_in_store(plan, final, bucket)
        check_free_in_store(bucket, there, overwrite=overwrite)


def check_free_in_store(bucket: Bucket, there: Mapping[str, State], *, overwrite: bool) -> set[str]:
    """Return the names of an old output that may be replaced; empty where nothing is.

    Raises:
        OutlierMergeError: what is there may not be replaced.
    """
    names = {name for name in there if not name.startswith(RECORDS)}
    if not names:
        return set()
    if MANIFEST_NAME not in names:
        raise OutlierMergeError(
            f"{bucket.address}: is not empty, and has no {MANIFEST_NAME}, so that it is no output "
            f"of outliermerge:\n{listing(sorted(names))}\nMove it away or choose another output."
        )
    if not overwrite:
        raise OutlierMergeError(
            f"{bucket.address}: exists already. Use {argument('overwrite', True)} to replace it, "
            f"or choose another {argument('output')}."
        )
    where = f"{bucket.address}/{MANIFEST_NAME}"
    manifest = parsed_manifest(bucket.get(MANIFEST_NAME) or b"", where)
    if foreign := sorted(names - listed(manifest) - {MANIFEST_NAME}):
        raise OutlierMergeError(
            f"{bucket.address}: {argument('overwrite', True)} would leave what outliermerge did "
            f"not write in the new output:\n{listing(foreign)}\nMove it away."
        )
    for name, shard in manifest["shards"].items():
        if name in there and there[name].num_bytes != shard["num_bytes"]:
            raise OutlierMergeError(
                f"{bucket.address}/{name}: is not the file that {MANIFEST_NAME} says outliermerge "
                "wrote. Move it away, or remove it."
            )
    return names


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
