"""How far a merge has moved from its base, estimated from a sample of what was written."""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import mul, sub
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import FLOAT_DTYPES
from outliermerge.execution.jobs import JobResult
from outliermerge.output.bucket_writer import BucketWriter
from outliermerge.output.writer import OutputWriter
from outliermerge.planning.plan import Job, Plan

# The sample is the same at every run, so that a resumed merge gives the same numbers. It has up to
# 65,536 elements, which take about 30 ms, and of small models so few that reading them again does
# not matter beside the merge.
_MAX_TENSORS, _MAX_ELEMENTS, _MIN_ELEMENTS, _MIN_SHARE = 256, 1 << 16, 1 << 13, 1 / 64
_LEAST_ELEMENTS = 128  # of a tensor
_MIN_RUNS, _MAX_RUNS, _NUM_RUNS = 2, 16, 512  # of a tensor, and of all: a disk may seek for each
_KNOWN_SHARE = 0.5  # of the merged elements, below which nothing is said


@dataclass(frozen=True)
class _Sums:
    """Sums over a sample, each element counted for those that it stands for.

    Attributes:
        base, merged: squares of the base, and of the merged task vector.
        tasks, dots: squares of each task vector, and its products with the merged one.
    """

    base: float
    merged: float
    tasks: tuple[float, ...]
    dots: tuple[float, ...]

    def scaled(self, factor: float) -> list[float]:
        return [factor * each for each in (self.base, self.merged, *self.tasks, *self.dots)]


def measure_drift(
    plan: Plan, results: Mapping[str, JobResult], writer: OutputWriter | BucketWriter
) -> dict[str, Any]:
    """Return how far the merge is from its base, as JSON values.

    Args:
        results: of the output's tensors.
        writer: holds the weight files, which are written.

    Returns:
        `relative_size`: |merged − base| / |base|; `cosines`: of the angle between the merged task
        vector and each model's; `length`: |merged − base| over the mean length of the models' task
        vectors; `standard_errors` of these three, 0 where all was read; `num_sampled` of
        `num_elements` merged elements that these rest on. For min-σ also
        `outliers_kept`: the share of elements that were kept whole of each model, exactly. Empty
        if the method has no base, or if too few tensors can be sampled.

    Raises:
        OutlierMergeError: a file cannot be read.
    """
    num_models = len(plan.spec.models)
    merged = [job for job in plan.jobs if results[job.name].action == "merge"]
    whole = [job for job in merged if len(job.sources) == 1 + num_models]
    orders = {tuple(number for number, _ in job.sources) for job in whole}
    if not plan.spec.method.uses_base or len(orders) != 1:
        return {}
    fitting = [job for job in whole if job.num_elements and _can_be_sampled(job)]
    num_elements = sum(job.num_elements for job in merged)
    num_fitting = sum(job.num_elements for job in fitting)
    if not fitting or num_fitting < _KNOWN_SHARE * num_elements:
        return {}
    step = -(-len(fitting) // _MAX_TENSORS)
    chosen = fitting[::step]
    total = sum(job.num_elements for job in chosen)
    sample = min(_MAX_ELEMENTS, max(_MIN_ELEMENTS, round(total * _MIN_SHARE)))
    strata: list[_Stratum] = []
    num_sampled = 0
    num_runs = min(_MAX_RUNS, max(_MIN_RUNS, _NUM_RUNS // len(chosen)))
    runs: list[list[tuple[int, int]]] = []
    for job in chosen:
        wanted = max(_LEAST_ELEMENTS, sample * job.num_elements // total)
        runs.append(_spans(job.num_elements, wanted, num_runs))
    pairs = zip(chosen, runs, strict=True)
    written = iter(writer.read_back([(job.output, span) for job, spans in pairs for span in spans]))
    with Reader(scattered=True) as reader:
        reader.read_ahead_of(_ranges(chosen, runs))
        for job, spans in zip(chosen, runs, strict=True):
            sampled = sum(stop - start for start, stop in spans)
            num_sampled += sampled
            factor = job.num_elements / sampled
            values = (_values(job, span, reader, next(written)) for span in spans)
            found = [_sums(each).scaled(factor) for each in values]
            strata.append(_Stratum(found, sampled / job.num_elements))
    sums = [sum(each) for each in zip(*(row for s in strata for row in s.rows), strict=True)]
    base, _, *rest = sums
    names = [plan.inputs[number].reference for number, _ in chosen[0].sources[1:]]
    if not all(map(math.isfinite, sums)) or not base or not all(rest[:num_models]):
        return {}
    size, length, *cosines = _ratios(sums)
    errors = _standard_errors(strata, sums, len(chosen) / len(fitting))
    size_error, length_error, *cosine_errors = map(_rounded, errors)
    found_drift = {
        "relative_size": _rounded(size),
        "cosines": dict(zip(names, map(_rounded, cosines), strict=True)),
        "length": _rounded(length),
        "standard_errors": {
            "relative_size": size_error,
            "cosines": dict(zip(names, cosine_errors, strict=True)),
            "length": length_error,
        },
        "num_sampled": num_sampled,
        "num_elements": num_elements,
    }
    if shares := _outliers(plan, whole, results):
        found_drift["outliers_kept"] = dict(zip(names, shares, strict=True))
    return found_drift


@dataclass(frozen=True)
class _Stratum:
    """What was read of one tensor.

    Attributes:
        rows: the scaled sums of each run of elements.
        share: of the tensor's elements that was read.
    """

    rows: list[list[float]]
    share: float


def _ratios(sums: Sequence[float]) -> list[float]:
    """Return the relative size, the length and the cosines that follow from sums."""
    base, moved, *rest = sums
    tasks, dots = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    mean_length = sum(map(math.sqrt, tasks)) / len(tasks)
    cosines = [
        dot / math.sqrt(moved * task) if moved else 0.0
        for dot, task in zip(dots, tasks, strict=True)
    ]
    return [math.sqrt(moved / base), math.sqrt(moved) / mean_length, *cosines]


def _standard_errors(
    strata: Sequence[_Stratum], sums: Sequence[float], share: float
) -> list[float]:
    """Return the standard errors of the ratios, by linearisation in two stages.

    Elements that lie together are alike, so the runs are what was drawn, not their elements.

    Args:
        strata: the tensors that were read; share is theirs of those that could be.
        sums: over all of them.
    """
    step = 1e-3  # small enough for the ratios to be straight, large enough for float64
    ratios = _ratios(sums)

    def influence(row: Sequence[float]) -> list[float]:
        moved = _ratios([a + step * b for a, b in zip(sums, row, strict=True)])
        return [(a - b) / step for a, b in zip(moved, ratios, strict=True)]

    within, totals = [0.0] * len(ratios), []
    for stratum in strata:
        found = [*zip(*map(influence, stratum.rows), strict=True)]
        totals.append([sum(each) for each in found])
        rest = max(0.0, 1 - stratum.share)
        within = [a + rest * _spread(each) for a, each in zip(within, found, strict=True)]
    between = [(1 - share) * _spread(each) for each in zip(*totals, strict=True)]
    return [math.sqrt(a + share * b) for a, b in zip(between, within, strict=True)]


def _spread(values: Sequence[float]) -> float:
    """Return the variance of a sum of values that were drawn, without the share not drawn."""
    num, mean = len(values), sum(values) / len(values)
    return num / (num - 1) * sum((value - mean) ** 2 for value in values) if num > 1 else 0.0


def _can_be_sampled(job: Job) -> bool:
    """Tell whether spans of a tensor can be read without computing more than them."""
    sources = [source for _, source in job.sources]
    dtypes = {job.output.dtype.name, *(source.dtype.name for source in sources)}
    return dtypes <= {*FLOAT_DTYPES} and all(
        source.stored == (source,) and source.stored[0].offset is not None for source in sources
    )


def _spans(num_elements: int, wanted: int, num_runs: int) -> list[tuple[int, int]]:
    """Return runs of elements, evenly placed; the whole tensor if it is small."""
    if num_elements <= wanted:
        return [(0, num_elements)] if num_elements else []
    length = wanted // num_runs
    room = num_elements - length
    starts = [room * (2 * number + 1) // (2 * num_runs) for number in range(num_runs)]
    return [(start, start + length) for start in starts]


def _ranges(
    jobs: Sequence[Job], runs: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[tuple[Path, int, int]]:
    """Yield where the bytes of some runs of elements are."""
    for job, spans in zip(jobs, runs, strict=True):
        for start, stop in spans:
            for meta in (meta for _, source in job.sources for meta in source.stored):
                size = meta.dtype.num_bytes
                if meta.offset is not None:
                    yield meta.path, meta.offset + start * size, (stop - start) * size


def _values(
    job: Job, span: tuple[int, int], reader: Reader, written: bytes
) -> list[Sequence[float]]:
    """Return the values of a span: of the base, of each model, and of the output."""
    found = []
    for _, source in job.sources:
        raw = bytearray((span[1] - span[0]) * source.dtype.num_bytes)
        source.read(reader, *span, memoryview(raw))
        found.append(_floats(raw, source.dtype.name))
    return [*found, _floats(written, job.output.dtype.name)]


def _floats(raw: bytes | bytearray, dtype: str) -> Sequence[float]:
    """Return stored values; numpy is not imported for so few."""
    if dtype == "float16":
        return struct.unpack(f"<{len(raw) // 2}e", raw)
    if dtype == "bfloat16":
        wide = bytearray(2 * len(raw))
        wide[2::4], wide[3::4] = raw[::2], raw[1::2]
        raw, dtype = wide, "float32"
    values = array("f" if dtype == "float32" else "d")
    values.frombytes(raw)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _sums(values: Sequence[Sequence[float]]) -> _Sums:
    base, *models, merged = values
    moved = list(map(sub, merged, base))
    tasks = [list(map(sub, model, base)) for model in models]
    return _Sums(
        base=_dot(base, base),
        merged=_dot(moved, moved),
        tasks=tuple(_dot(task, task) for task in tasks),
        dots=tuple(_dot(task, moved) for task in tasks),
    )


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return float(sum(map(mul, a, b)))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _outliers(
    plan: Plan, jobs: Sequence[Job], results: Mapping[str, JobResult]
) -> list[float] | None:
    """Return the share of elements that min-σ has kept whole of each model."""
    counts = [results[job.name].statistics.get("outliers") for job in jobs]
    if plan.spec.method.name != "min_sigma" or None in counts:
        return None
    num_elements = sum(job.num_elements for job in jobs)
    return [_rounded(sum(each) / num_elements) for each in zip(*counts, strict=True)]
