"""What computes a plan here: the kernels, or torch where they cannot; and what to say of it."""

from __future__ import annotations

from collections.abc import Iterable

from outliermerge.checkpoint.sources import Source
from outliermerge.engines.kernels import find_kernels
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.methods.kernel_call import CODES
from outliermerge.optional import INSTALL_TORCH, is_installed
from outliermerge.planning.plan import Job, Options, Plan

_NOT_COMPILED = "the C kernels are missing, which are compiled when outliermerge is installed"
_COMPILE = (
    "install outliermerge from a wheel, or install a C compiler (Debian, Ubuntu: apt install gcc "
    "libc6-dev) and then outliermerge again"
)


def reads_by_torch(sources: Iterable[Source]) -> bool:
    """Tell whether torch reads a source, because it is computed from other tensors or pickled."""
    return any(
        source.stored != (source,) or any(meta.offset is None for meta in source.stored)
        for source in sources
    )


def require_engines(plan: Plan, options: Options) -> None:
    """Refuse a plan that nothing installed can compute.

    Raises:
        OutlierMergeError: torch is needed and not installed.
    """
    why = why_none(plan, options)
    if why is not None:
        raise OutlierMergeError(why)


def why_none(plan: Plan, options: Options) -> str | None:
    """Return why nothing that is installed can compute a plan, or None where something can."""
    if is_installed("torch"):
        return None
    if options.device == "cpu" and find_kernels() is None:
        return (
            f"nothing here can compute a merge: {_NOT_COMPILED}, and torch is not installed. "
            f"For the kernels, {_COMPILE}. Or let torch compute, several times slower. "
            f"{INSTALL_TORCH}"
        )
    found: dict[str, list[str]] = {}
    for job in (*plan.jobs, *plan.checks):
        reason = _why_torch(job, options)
        if reason:
            found.setdefault(reason, []).append(job.name)
    if not found:
        return None
    rows = [
        f"{reason}: {len(names)} tensor(s), such as {shown(names[0])}"
        for reason, names in found.items()
    ]
    return f"this merge needs torch, which is not installed:\n{listing(rows)}\n{INSTALL_TORCH}"


def slowness_note(options: Options, *, kernels: bool) -> str | None:
    """Return a note where torch computes only because the kernels are missing, or None.

    Args:
        kernels: whether kernels were asked for.
    """
    if not kernels or options.device != "cpu" or find_kernels() is not None:
        return None
    return (
        f"torch computes, which takes about RATIO times as long: {_NOT_COMPILED}. For the kernels, "
        f"{_COMPILE}."
    )


def _why_torch(job: Job, options: Options) -> str | None:
    """Return why torch must be there for a job, or None where it need not."""
    sources = [*(source for _, source in job.sources), *job.auxiliary]
    dtypes = {source.dtype.name for source in sources}
    if any(source.stored != (source,) for source in sources):
        return "read from adapters, quantised weights or changed vocabularies"
    if reads_by_torch(sources):
        return "its elements are not in order in its .bin file"
    if job.action == "equal" and len(dtypes) > 1:
        return f"compared as {' and '.join(sorted(dtypes))}"
    if not options.uses_torch(job):
        return None
    if options.device != "cpu":
        return f"computed on the device {options.device}"
    if not options.kernels:
        return "computed without kernels, as was asked for"
    if job.compute_dtype != "float32" or not dtypes | {job.output.dtype.name} <= CODES.keys():
        return f"kernels do not compute with {', '.join(sorted(dtypes | {job.output.dtype.name}))}"
    if job.modifiers:
        return f"kernels do not compute modifiers: {', '.join(name for name, _ in job.modifiers)}"
    return f"the method {job.method} has no kernel, or its statistics have none"
