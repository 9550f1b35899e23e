"""The hub's cache on disk: which files belong to it, and the file list of a repository.

https://huggingface.co/docs/huggingface_hub/guides/manage-cache; the store that all repositories
share is that of huggingface_hub 2.4 (utils/_shared_blobs.py).
"""

from __future__ import annotations

import re
from pathlib import Path

from outliermerge.storage.stand_ins import elsewhere

_BLOB = re.compile(r"[0-9a-f]{8,64}")
_SHARED_MARKER = ".huggingface-shared-blobs"


def is_cached(file: Path) -> bool:
    """Tell whether a file, with links resolved, is a model's file in the hub's cache.

    Such paths are `models--org--name/blobs/<hash>`, `models--org--name/snapshots/<revision>/…` on
    disks without links, and `blobs/<two digits>/<hash>` in the store that all repositories share,
    which has a marker file.
    """
    if file.parent.name == "blobs":
        return file.parents[1].name.startswith("models--") and bool(_BLOB.fullmatch(file.name))
    shared = file.parents[1] if len(file.parents) > 1 else file.parent
    if shared.name == "blobs" and (shared / _SHARED_MARKER).is_file():
        return bool(_BLOB.fullmatch(file.name)) and file.parent.name == file.name[:2]
    return any(
        folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
        for folder in file.parents
        if len(folder.parents) > 1
    )


def blobs_of(folder: Path) -> tuple[Path, ...]:
    """Return the folders in the cache with the files that a snapshot, or a part of it, links to."""
    for revision in (folder, *folder.parents):
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs", repository.parent / "blobs"
    return ()


def repository_of(path: Path) -> str:
    """Return the hub's id of the model that a path is in, in the hub's cache or ours; "" if none.

    >>> repository_of(Path("/cache/models--org--name/snapshots/0a1b/config.json"))
    'org/name'
    """
    if (model := elsewhere(path)) is not None:
        there = model.address.partition("@")[0]
        return there.removeprefix("hf://") if there.startswith("hf://") else ""
    for revision in (path, *path.parents):
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository.name.removeprefix("models--").replace("--", "/", 1)
    return ""


def listed_files(snapshot: Path) -> list[str]:
    """Return all files of a model that is not all here, fetched or not; empty if not known.

    Only a part of a repository is fetched; its other files are known from the listing that
    huggingface_hub keeps.
    """
    if (model := elsewhere(snapshot)) is not None:
        return list(model.names)
    repository = snapshot.absolute().parent.parent
    if snapshot.absolute().parent.name != "snapshots" or not repository.name.startswith("models--"):
        return []
    import huggingface_hub as hub

    if not hasattr(hub, "get_cached_repo_tree"):  # of an older version
        return []
    repo_id = repository.name.removeprefix("models--").replace("--", "/")
    try:
        found = hub.get_cached_repo_tree(
            repo_id, revision=snapshot.name, cache_dir=repository.parent
        )
    except (hub.errors.CachedRepoTreeNotFoundError, hub.errors.HFValidationError, OSError):
        return []
    return [file.path for file in found]
