"""Opens an output that is to be written: a folder or a file on a disk, or a folder in a store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from outliermerge.errors import OutlierMergeError
from outliermerge.output.bucket_folder import BucketFolder
from outliermerge.output.folder import OutputFolder
from outliermerge.output.names import Final, real_output
from outliermerge.output.resumed import marks_of
from outliermerge.planning.plan import Plan
from outliermerge.storage.stamps import Watched, watching

Output: TypeAlias = OutputFolder | BucketFolder


def open_output(
    plan: Plan,
    final: Final,
    *,
    identity: Mapping[str, Any],
    fresh: bool = False,
    overwrite: bool = False,
    all_named: bool = False,
    part: str = "",
) -> Output:
    """Begin an output, or take over what an earlier run has written of it.

    Raises:
        OutlierMergeError: something else is there, or an unfinished output of another merge.
    """
    facts: dict[str, Any] = {"identity": identity, "marks": marks_of(plan), "fresh": fresh}
    facts |= {"overwrite": overwrite, "all_named": all_named, "part": part}
    with watching(Watched()):  # files of an old output are not inputs: do not note them
        if isinstance(final, str):
            if plan.conversion is not None:
                raise OutlierMergeError(
                    f"{final}: llama.cpp's converter reads and writes files of this machine: write "
                    "a folder, and copy it there"
                )
            return BucketFolder(plan, final, **facts)
        return OutputFolder(plan, real_output(final), **facts)
