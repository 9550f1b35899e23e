"""Tables of merges of models that are elsewhere."""

from __future__ import annotations

from typing import Any

from markdown_tables import markdown, number
from methods_table import PEAK


def elsewhere(content: dict[str, Any]) -> str:
    """Merges of models in an object store, from the JSON that elsewhere.py writes."""
    return markdown(
        ["models in S3", "wall s", "over the line's time", "CPU s", "memory MB"],
        (
            [name, number(case["wall_seconds"]), f"{content['over_the_line'][name]:.2f}",
             number(case["cpu_seconds"]), number(case[PEAK])]
            for name, case in content["processes"].items()
        ),
    )  # fmt: skip


def elsewhere_output(content: dict[str, Any]) -> str:
    """The same merges with outputs in a folder and in the bucket, from elsewhere.py --output."""
    return elsewhere(content)


def on_ray(content: dict[str, Any]) -> str:
    """Merges on a Ray cluster against one machine and the model, from on_ray.py's JSON."""
    rows = []
    for case in content["cases"]:
        told, least, most = case["foretold"], *case["times_one_range"]
        line = case["line_megabytes_per_second"]
        rows.append(
            [
                f"{case['gigabytes']:.2f} GB on {case['machines']}, {line:g} MB/s each",
                f"{case['wall_seconds']:.0f}",
                f"{case['times_one']:.1f} ({least:.1f}–{most:.1f})",
                f"{told['seconds']:.0f}",
                f"{case['gigabytes_fetched']:.3f}",
                f"{told['fetched_bytes'] / 1e9:.3f}",
                f"{case['requests']:.0f}",
                str(told["requests"]),
                number(case["cpu_seconds"]),
            ]
        )
    header = ["models in S3, on machines of Ray", "wall s", "times as fast as one", "foretold s"]
    header += ["GB fetched", "foretold", "requests", "foretold", "CPU s of all"]
    return markdown(header, rows)


def headers(content: dict[str, Any]) -> str:
    """What plans of models as large as DeepSeek-V3 take, and what a merge would take."""
    local, start, bucket = (content[name] for name in ("local", "start", "bucket"))
    rows = [
        ["wall s", "wall_seconds", "≤ 5"],
        ["processor s", "cpu_seconds", "≤ 5"],
        ["memory MB", "megabytes", "≤ 300"],
    ]
    plans = markdown(
        ["", "plan, local files", "run until its first tensor", "plan, from the bucket", "goal"],
        (
            [name, *(number(case[key]) for case in (local, start, bucket)), goal]
            for name, key, goal in rows
        ),
    )
    costs = markdown(
        ["machines", "TB fetched", "requests", "foretold s"],
        (
            [str(cost["machines"]), f"{cost['fetched_bytes'] / 1e12:.2f}",
             f"{cost['requests']:,}", f"{cost['seconds']:,.0f}"]
            for cost in content["costs"]
        ),
    )  # fmt: skip
    return f"{plans}\n\n{costs}"
