"""What a report of suite.py says: medians, ratios of one round's runs, straight lines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = ("tiny", "0.1B", "0.5B", "1.5B", "3B", "7B")
START_UP = "start-up"
ALONE = ("passthrough", "slerp", "nearswap", "arcee_fusion")  # they take one task model


@dataclass(frozen=True)
class Line:
    """y = intercept + slope × x by least squares, and the share of the variance it explains."""

    slope: float
    intercept: float
    r_squared: float


def fit(points: Sequence[tuple[float, float]]) -> Line | None:
    """Return the line through points, None where they are too few to tell one.

    >>> fit([(1, 5), (2, 7), (3, 9)])
    Line(slope=2.0, intercept=3.0, r_squared=1.0)
    """
    if len({x for x, _ in points}) < 3:
        return None
    xs, ys = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(xs, ys)
    residual = sum((y - intercept - slope * x) ** 2 for x, y in points)
    total = sum((y - statistics.mean(ys)) ** 2 for y in ys)
    return Line(slope, intercept, 1 - residual / total if total else 1.0)


@dataclass(frozen=True)
class Report:
    """The JSON that suite.py writes."""

    content: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Report:
        return cls(json.loads(path.read_text()))

    @property
    def cases(self) -> list[dict[str, Any]]:
        """Those that merge, small sizes first."""
        cases = [case for case in self.content["cases"] if case["name"] != START_UP]
        return sorted(cases, key=lambda case: SIZES.index(case["size"]))

    def find(self, method: str, size: str, num_models: int = 2) -> dict[str, Any] | None:
        return self.named(f"{method}-{size}-{1 if method in ALONE else num_models}")

    def named(self, name: str) -> dict[str, Any] | None:
        return next((case for case in self.content["cases"] if case["name"] == name), None)

    def billions(self, size: str) -> float:
        return float(self.content["num_parameters"][size]) / 1e9

    def sizes(self) -> list[str]:
        return [size for size in SIZES if any(case["size"] == size for case in self.cases)]


def values(case: dict[str, Any] | None, tool: str, key: str) -> list[float]:
    """Return a figure of every run of a case's tool; none where it was not measured."""
    runs = case["runs"].get(tool, []) if case else []
    return [run[key] for run in runs if key in run]


def median(case: dict[str, Any] | None, tool: str, key: str) -> float | None:
    found = values(case, tool, key)
    return statistics.median(found) if found else None


def round_ratios(case: dict[str, Any] | None, tool: str, other: str, key: str) -> list[float]:
    """Return what a figure of a tool is over the other's in the same round, for every round."""
    pairs = zip(values(case, tool, key), values(case, other, key), strict=False)
    return [mine / theirs for mine, theirs in pairs]


def ratio(case: dict[str, Any] | None, tool: str, other: str, key: str) -> float | None:
    found = round_ratios(case, tool, other, key)
    return statistics.median(found) if found else None


def overheads(case: dict[str, Any], tool: str = "outliermerge") -> list[float]:
    """Return what each run took besides its work and the syncing of files.

    Where a run does not say what syncing took, all it did after planning is left out.
    """
    return [
        run["wall_seconds"]
        - (run["work_seconds"] + run["sync_seconds"] if "sync_seconds" in run else run["seconds"])
        for run in case["runs"].get(tool, [])
    ]


# Ratios of which a larger one is worse: our figure over the other's.
RATIOS = (
    ("outliermerge", "copy", "work_seconds"),
    ("outliermerge", "direct copy", "work_seconds"),
    ("outliermerge", "mergekit", "wall_seconds"),
    ("outliermerge", "mergekit", "cpu_seconds"),
    ("outliermerge", "mergekit", "peak_anonymous_megabytes"),
    ("outliermerge", "outliermerge --no-kernels", "work_seconds"),
    ("sweep", "outliermerge", "wall_seconds"),
    ("outliermerge --help", "mergekit --help", "wall_seconds"),
)


def all_ratios(report: Report) -> Iterator[tuple[str, float]]:
    """Yield every ratio by name, larger being worse; none depends on how fast the machine is."""
    for case in report.content["cases"]:
        for tool, other, key in RATIOS:
            found = ratio(case, tool, other, key)
            if found is not None:
                yield f"{case['name']}: {tool} over {other}, {key.rpartition('_')[0]}", found
    sizes = report.sizes()
    for method in dict.fromkeys(case["method"] for case in report.cases):
        for tool in ("outliermerge", "outliermerge --memory 64MB"):
            small, large = (
                median(report.find(method, size), tool, "peak_anonymous_megabytes")
                for size in (sizes[0], sizes[-1])
            )
            if small and large and len(sizes) > 1:
                yield f"{method}: {tool}, memory of {sizes[-1]} over {sizes[0]}", large / small
