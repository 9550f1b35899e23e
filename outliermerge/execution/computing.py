"""What computes a plan here: the kernels, or torch where they cannot; and what to say of it."""

from __future__ import annotations

from collections.abc import Iterable

from outliermerge.checkpoint.by_kernels import is_by_kernels
from outliermerge.checkpoint.rearranged import Cut, Joined, Swapped
from outliermerge.checkpoint.sources import Source, inner
from outliermerge.engines.kernels import find_kernels
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.methods.kernel_call import CODES
from outliermerge.optional import INSTALL_TORCH, is_installed
from outliermerge.planning.merged import MergedSource, Restored
from outliermerge.planning.plan import Job, Options, Plan

_TIMES_AS_LONG = "5 to 8 times"  # measured: linear 5, min_sigma and ties 8
_COMPILE = (
    "Install a C compiler (Debian, Ubuntu: apt install gcc libc6-dev), then outliermerge again "
    "(pip install --force-reinstall --no-deps), or install a wheel, which has them compiled"
)


def reads_by_torch(sources: Iterable[Source], options: Options | None = None) -> bool:
    """Tell whether torch reads a source, because it is computed from other tensors or pickled."""
    pending, seen = [*sources], set[MergedSource]()
    while pending:
        source = pending.pop()
        if isinstance(source, MergedSource):
            if not (options and options.kernels_do(source.task)):
                return True
            pending += () if source in seen else source.sources
            seen.add(source)
        elif isinstance(source, Restored | Joined | Cut | Swapped):
            pending += inner(source)
        elif options and options.kernels and is_by_kernels(source):
            continue
        elif source.stored != (source,) or any(meta.offset is None for meta in source.stored):
            return True
    return False


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
            "nothing that is installed can compute a merge: outliermerge was installed without its "
            "C kernels, and torch is not there. Either is enough:\n"
            f"  the kernels: {_COMPILE}.\n"
            f"  torch, which takes {_TIMES_AS_LONG} as long: {INSTALL_TORCH}"
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
        f"torch computes, which takes {_TIMES_AS_LONG} as long as the C kernels: outliermerge was "
        f"installed without them. {_COMPILE}"
    )


def _why_torch(job: Job, options: Options) -> str | None:
    """Return why torch must be there for a job, or None where it need not."""
    models = [source for _, source in job.sources]
    sources = [*models, *job.auxiliary]
    dtypes = {source.dtype.name for source in sources}
    if reads_by_torch(models, options):
        if all(source.stored == (source,) for source in models):
            return "its elements are not in order in its .bin file"
        return "read from adapters, quantised weights, changed vocabularies or stages"
    if job.action == "equal" and len(dtypes) > 1:
        return f"compared as {' and '.join(sorted(dtypes))}"
    if not options.uses_torch(job):
        return "its auxiliary tensors are computed" if reads_by_torch(sources, options) else None
    if options.device != "cpu":
        return f"computed on the device {options.device}"
    if not options.kernels:
        return "computed without kernels, as was asked for"
    if job.compute_dtype != "float32" or not dtypes | {job.output.dtype.name} <= CODES.keys():
        return f"kernels do not compute with {', '.join(sorted(dtypes | {job.output.dtype.name}))}"
    if job.modifiers:
        return "kernels do not compute modifiers"
    name = job.task.method.name
    return f"{name} has no kernel, or none for these parameters"
