"""The pointer text that Git LFS leaves in place of a file that was not fetched."""

from __future__ import annotations

from pathlib import Path

from outliermerge.errors import OutlierMergeError
from outliermerge.storage.stamps import open_file

# The start of a pointer (hawser was the first name of Git LFS).
LFS_POINTER = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/")
POINTER_ADVICE = "a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`."


def refuse_lfs_pointer(path: Path) -> None:
    """Raise OutlierMergeError if a file only points to its contents in Git LFS."""
    try:
        with open_file(path) as file:
            start = file.read(64)
    except OSError as error:
        raise OutlierMergeError(f"{path}: cannot be read: {error.strerror}") from error
    if start.startswith(LFS_POINTER):
        raise OutlierMergeError(f"{path}: {POINTER_ADVICE}")
