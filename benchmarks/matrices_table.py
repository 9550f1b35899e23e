"""The table of methods beside FusionBench's, from the JSON that matrices.py writes."""

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
        layers = f", {case['layers']} of {case['of_layers']} layers"
        times, less = (
            round_ratios(case, "FusionBench", "outliermerge", key)
            for key in ("work_seconds", "work_cpu_seconds")
        )
        rows.append(
            [
                f"`{case['method']}`, {case['size']}{layers}",
                str(case["models"]),
                number(median(case, "outliermerge", "work_seconds")),
                _with_range(times),
                _with_range(less),
                *(number(median(case, tool, PEAK)) for tool in ("outliermerge", "FusionBench")),
                f"{case['relative_distance']:.0e}" if "relative_distance" in case else "–",
            ]
        )
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    loads = [case["load_before"] for case in content["cases"]]
    about = (
        f"Medians of {content['runs']} alternating run(s) and their range on {content['date']}: "
        f"{content['hardware']}; {versions}; load before: {min(loads)} to {max(loads)}. "
        f"{content['note'][0].upper()}{content['note'][1:]}."
    )
    return f"{markdown(HEADER, rows)}\n\n{about}"


def _with_range(found: list[float]) -> str:
    if not found:
        return "–"
    middle = number(sorted(found)[len(found) // 2])
    return middle if len(found) == 1 else f"{middle} ({number(min(found))}–{number(max(found))})"
