"""Tensors that the output's class makes one, and that a merge would give several values."""

from __future__ import annotations

from collections.abc import Sequence

from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.planning.plan import Plan


def find_parted(plan: Plan, tied: Sequence[tuple[str, str]]) -> list[str]:
    """Return the tensors that the output's class makes one and the merge does not treat so."""
    jobs = {job.name: job for job in plan.jobs}

    def treated(name: str) -> tuple[object, ...]:
        job = jobs[name]
        return job.action, [number for number, _ in job.sources], job.parameters

    return [
        f"{shown(name)} is merged otherwise than {shown(other)}"
        for name, other in tied
        if jobs.keys() >= {name, other} and treated(name) != treated(other)
    ]


def refuse_parted(parted: Sequence[str]) -> None:
    """Raise OutlierMergeError if there are any, since loaders would take one of the values."""
    if parted:
        raise OutlierMergeError(
            "the output would hold several values of what its class ties to one tensor:\n"
            f"{listing(parted)}\n"
            "Models store it under different names, or filters part it. Save the models again "
            "by from_pretrained and save_pretrained of one version of transformers, and let "
            "parameters and policies treat these names alike."
        )
