"""Tables of methods on whole matrices, from what matrices.py and randomized.py write."""

from __future__ import annotations

from typing import Any

from markdown_tables import markdown, number
from report import median, round_ratios

PEAK = "peak_anonymous_megabytes"
HEADER = (
    "merge", "models", "s here", "times as fast", "CPU time less", "MB here", "MB of FusionBench",
    "apart",
)  # fmt: skip


def matrices(content: dict[str, Any]) -> str:
    """One row a method and size: reading, merging and writing, without imports."""
    rows = []
    for case in content["cases"]:
        times, less = (
            round_ratios(case, "FusionBench", "outliermerge", key)
            for key in ("work_seconds", "work_cpu_seconds")
        )
        rows.append(
            [
                _merge(case),
                str(case["models"]),
                number(median(case, "outliermerge", "work_seconds")),
                _with_range(times),
                _with_range(less),
                *(number(median(case, tool, PEAK)) for tool in ("outliermerge", "FusionBench")),
                f"{case['relative_distance']:.0e}" if "relative_distance" in case else "–",
            ]
        )
    return f"{markdown(HEADER, rows)}\n\n{_about(content)}"


def randomized(content: dict[str, Any]) -> str:
    """One row a method and size: exact, and from a random start."""
    rows = []
    for case in content["cases"]:
        times = round_ratios(case, "exact", "randomized", "work_seconds")
        rows.append(
            [
                _merge(case),
                str(case["models"]),
                *(number(median(case, tool, "work_seconds")) for tool in ("exact", "randomized")),
                _with_range(times),
                f"{case['relative_distance']:.2g}",
            ]
        )
    header = ("merge", "models", "s", "s, `randomized`", "times as fast", "apart")
    return f"{markdown(header, rows)}\n\n{_about(content)}"


def _merge(case: dict[str, Any]) -> str:
    return f"`{case['method']}`, {case['size']}, {case['layers']} of {case['of_layers']} layers"


def _about(content: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    loads = [case["load_before"] for case in content["cases"]]
    return (
        f"Medians of {content['runs']} alternating run(s) and their range on {content['date']}: "
        f"{content['hardware']}; {versions}; load before: {min(loads)} to {max(loads)}. "
        f"{content['note'][0].upper()}{content['note'][1:]}."
    )


def _with_range(found: list[float]) -> str:
    if not found:
        return "–"
    middle = number(sorted(found)[len(found) // 2])
    return middle if len(found) == 1 else f"{middle} ({number(min(found))}–{number(max(found))})"
