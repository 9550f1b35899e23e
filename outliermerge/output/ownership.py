"""What may be replaced or removed: only what outliermerge itself wrote, told by its contents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from outliermerge.checkpoint.checksum import header_checksum
from outliermerge.checkpoint.files import load_json
from outliermerge.checkpoint.folder import MANIFEST_NAME
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.failures import naming
from outliermerge.jobs import Input, Plan
from outliermerge.output.names import (
    journal_path,
    manifest_path,
    partial_folder,
    replaced_path,
    shard_path,
)
from outliermerge.output.system import files_in


def check_apart(inputs: Sequence[Input], final: Path) -> None:
    """Refuse an output that is, holds or is inside a model that is merged.

    Raises:
        OutlierMergeError: it would damage that model.
    """
    for entry in inputs:
        files = {stamp.path.resolve() for stamp in entry.checkpoint.weight_files}
        roots = {entry.checkpoint.root.resolve(), entry.home.resolve()}
        if entry.home != entry.checkpoint.root:  # an adapter, over the files of other folders
            roots |= {path.parent for path in files}
        for place in (final, partial_folder(final), replaced_path(final), journal_path(final)):
            resolved = place.resolve()
            for root in roots:
                if root == resolved or resolved in root.parents or root in resolved.parents:
                    raise OutlierMergeError(
                        f"{place}: is, holds or is inside the model {shown(entry.reference)}: "
                        "choose another output"
                    )


def check_free(plan: Plan, final: Path, *, overwrite: bool) -> None:
    """Refuse a name that something has which may not be replaced.

    Raises:
        OutlierMergeError: it exists, and is not ours or may not be overwritten.
    """
    manifest = manifest_path(final)
    there = [path for path in (final, manifest) if path.exists() or path.is_symlink()]
    if not there:
        return
    if plan.is_one_file and final.is_dir():
        raise OutlierMergeError(f"{final}: is a folder, and a file is to be written")
    if not overwrite:
        raise OutlierMergeError(
            f"{there[0]}: exists already. Use --overwrite to replace it when the merge is done, "
            "or choose another --output."
        )
    if not manifest.is_file():
        raise OutlierMergeError(
            f"{final}: --overwrite replaces only outputs of outliermerge, and this has no "
            f"{manifest.name}. Move it away."
        )
    written = _written(manifest)
    if final.is_dir():
        foreign = sorted(set(files_in(final)) - {*written, *_beside(manifest), MANIFEST_NAME})
        if foreign:
            raise OutlierMergeError(
                f"{final}: --overwrite would remove what outliermerge did not write:\n"
                f"{listing(foreign)}\nMove it away."
            )
    for name, header in written.items():
        path = shard_path(final, name)
        if not path.exists():
            continue
        with naming(path, "read"):
            found = header_checksum(path)
        if found != header:
            raise OutlierMergeError(
                f"{path}: is not the file that {manifest.name} says outliermerge wrote. "
                "Move it away, or remove it."
            )


def owned_files(folder: Path) -> set[str]:
    """Return what an old output's manifest lists; nothing where it has none."""
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        return set()
    return {*_written(manifest), *_beside(manifest)}


def _written(manifest: Path) -> dict[str, str]:
    """Return the checksums of headers by shard, as a manifest of ours has them.

    Raises:
        OutlierMergeError: it is none.
    """
    found = load_json(manifest)
    shards = found.get("shards") if isinstance(found, dict) else None
    if isinstance(shards, dict) and shards and isinstance(found.get("tensors"), dict):
        headers = {
            name: entry["header"]
            for name, entry in shards.items()
            if isinstance(entry, dict) and isinstance(entry.get("header"), str)
        }
        if len(headers) == len(shards):
            return headers
    raise OutlierMergeError(f"{manifest}: is no manifest of outliermerge. Move it away.")


def _beside(manifest: Path) -> list[str]:
    files = load_json(manifest).get("files")
    return list(files) if isinstance(files, dict) else []
