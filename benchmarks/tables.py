"""The results as Markdown, each table between its markers in the documents, and as plots.

    python benchmarks/tables.py            # print all
    python benchmarks/tables.py --write    # put them into README.md and docs/, draw results/*.png

A table's place in a document is `<!-- bench:NAME -->` … `<!-- /bench -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elsewhere_tables import elsewhere, elsewhere_output, headers, on_ray
from markdown_tables import markdown, number
from matrices_table import matrices, randomized
from methods_table import PEAK, methods
from report import START_UP, Report, fit, median, overheads, ratio, round_ratios

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
NOT_CACHED = ("3B", "7B")  # their inputs are about as large as the memory
COPIES = {"copy": "plain copy", "direct copy": "copy past the page cache"}
LOW_MEMORY = "outliermerge --memory 64MB"
TORCH = "outliermerge --no-kernels"
METHODS = (
    "linear", "task_arithmetic", "min_sigma", "ties", "slerp", "model_stock", "dare_linear",
    "dare_ties", "breadcrumbs", "della", "sce", "passthrough",
)  # fmt: skip


def machine(report: Report) -> str:
    content = report.content
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return (
        f"Medians of {content['runs']} alternating runs on {content['date']}: "
        f"{content['hardware']}; {versions}; load before: {content['load_before']}."
    )


def work(report: Report) -> str:
    """Reading, computing and writing over copies of the same files, median and range."""

    def cell(method: str, size: str, copy: str) -> str:
        found = round_ratios(report.find(method, size), "outliermerge", copy, "work_seconds")
        if not found:
            return "–"
        return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"

    sizes = [size for size in report.sizes() if size not in NOT_CACHED]
    rows = [
        [f"{method}, over a {name}", *(cell(method, size, copy) for size in sizes)]
        for copy, name in COPIES.items()
        for method in METHODS
    ]
    return markdown(["work", *sizes], rows)


def mergekit(report: Report) -> str:
    """Whole processes of both."""
    keys = ("wall_seconds", "cpu_seconds", PEAK)
    rows = [
        [
            f"{case['method']}, {case['size']}",
            *(number(median(case, tool, key)) for tool in ("outliermerge", "mergekit")
              for key in keys),
            number(ratio(case, "mergekit", "outliermerge", "wall_seconds")),
        ]
        for case in report.cases
        if case["num_models"] == 2
    ]  # fmt: skip
    header = ["merge", "wall s", "CPU s", "memory MB", "mergekit wall s", "CPU s", "MB"]
    return markdown([*header, "wall ratio"], rows)


def payoff(report: Report) -> str:
    """What a reader sees first: two task models of 1.5B by both programs."""
    rows = []
    for method in METHODS:
        case = report.find(method, "1.5B")
        ours, theirs = (
            [median(case, tool, key) for key in ("wall_seconds", PEAK)]
            for tool in ("outliermerge", "mergekit")
        )
        if None in (*ours, *theirs):
            continue
        times = number(ratio(case, "mergekit", "outliermerge", "wall_seconds"))
        seconds, megabytes = (list(map(number, pair)) for pair in zip(ours, theirs, strict=True))
        rows.append(
            [f"`{method}`", f"{seconds[0]} s", f"{seconds[1]} s", f"{times} times"]
            + [f"{value} MB" for value in megabytes]
        )
    header = [
        "two models of 1.5B onto a base",
        "time here",
        "time of mergekit",
        "faster",
        "memory here",
        "memory of mergekit",
    ]
    return markdown(header, rows)


def memory(report: Report) -> str:
    """Peaks of anonymous memory."""
    sizes = report.sizes()
    tools = {"": "outliermerge", ", `--memory 64MB`": LOW_MEMORY, ", mergekit": "mergekit"}
    return markdown(
        ["peak memory, MB", *sizes],
        (
            [method + label]
            + [number(median(report.find(method, size), tool, PEAK)) for size in sizes]
            for method in METHODS
            for label, tool in tools.items()
        ),
    )


def _with_line(points: Sequence[tuple[float, float | None]]) -> list[str]:
    """Return the points' cells, then the slope and r² of the line through those measured."""
    line = fit([(x, y) for x, y in points if y is not None])
    cells = [number(y) for _, y in points]
    return cells + ([number(line.slope), f"{line.r_squared:.3f}"] if line else ["–", "–"])


def sizes(report: Report) -> str:
    """Wall time of whole processes against size."""
    names = report.sizes()
    rows = []
    for label, tool in {"": "outliermerge", ", mergekit": "mergekit"}.items():
        for method in METHODS:
            cases = [report.find(method, size) for size in names]
            seconds = [median(case, tool, "wall_seconds") for case in cases]
            billions = map(report.billions, names)
            rows.append([method + label, *_with_line(list(zip(billions, seconds, strict=True)))])
    from_disk = []
    for size in names:
        cases = [report.find(method, size) for method in METHODS]
        found = [median(case, "outliermerge", "disk_read_megabytes") or 0 for case in cases]
        from_disk.append(number(max(found) / 1000))
    rows.append(["GB of it read from the disk, at most", *from_disk, "–", "–"])
    return markdown(["wall s", *names, "s per billion", "r²"], rows)


def models(report: Report) -> str:
    """Wall time of whole processes against the number of task models, at 0.5B."""
    counts = (2, 3, 5, 8)
    rows = []
    for label, tool in {"": "outliermerge", ", mergekit": "mergekit"}.items():
        for method in ("task_arithmetic", "min_sigma"):
            cases = [report.find(method, "0.5B", count) for count in counts]
            seconds = [median(case, tool, "wall_seconds") for case in cases]
            rows.append([method + label, *_with_line(list(zip(counts, seconds, strict=True)))])
    names = [f"{count} models" for count in counts]
    return markdown(["wall s at 0.5B", *names, "s per model", "r²"], rows)


def start_up(report: Report) -> str:
    case = report.named(START_UP)
    helps = [
        median(case, f"{tool} --help", "wall_seconds") for tool in ("outliermerge", "mergekit")
    ]
    return markdown(
        ["start-up, s", "outliermerge", "mergekit"],
        [
            ["`--help`", *map(number, helps)],
            ["a run besides its work, at most", number(_overhead(report)), "–"],
        ],
    )


def _overhead(report: Report) -> float | None:
    """Return the largest of the cases' medians."""
    found = [statistics.median(times) for times in map(overheads, report.cases) if times]
    return max(found, default=None)


def extras(report: Report) -> str:
    """What kernels gain over torch, and a sweep over runs."""
    rows = []
    for case in report.cases:
        name = f"{case['method']}, {case['size']}"
        rows += [
            [f"{name}: by torch over by kernels, work",
             number(ratio(case, TORCH, "outliermerge", "work_seconds"))],
            [f"{name}: a sweep of three values of t over one run, wall",
             number(ratio(case, "sweep", "outliermerge", "wall_seconds"))],
        ]  # fmt: skip
    return markdown(["", "ratio"], rows)


def goals(report: Report) -> str:
    """What was aimed at, and what came out."""
    rows: list[tuple[str, float | None, float, bool]] = []
    limits = {"linear": 1.3, "task_arithmetic": 1.3, "min_sigma": 1.6, "ties": 2.5}
    limits |= dict.fromkeys(("slerp", "model_stock", "dare_linear", "dare_ties"), 1.6)
    limits |= dict.fromkeys(("breadcrumbs", "della", "sce"), 2.5)
    for method, limit in limits.items():
        for size in ("0.5B", "1.5B"):
            for copy, name in COPIES.items():
                found = ratio(report.find(method, size), "outliermerge", copy, "work_seconds")
                rows.append((f"{method}, {size}: work over a {name}", found, limit, False))
    times = {"linear": 8, "task_arithmetic": 8, "ties": 20, "slerp": 10}
    times |= {"dare_linear": 15, "dare_ties": 15, "breadcrumbs": 40, "della": 40}
    for method, limit in times.items():
        found = ratio(report.find(method, "1.5B"), "mergekit", "outliermerge", "wall_seconds")
        rows.append((f"{method}, 1.5B: times as fast as mergekit", found, limit, True))
    for tool, limit in {"outliermerge": 400, LOW_MEMORY: 150}.items():
        peaks = [median(case, tool, PEAK) for case in report.cases]
        most = max((peak for peak in peaks if peak is not None), default=None)
        rows.append((f"{tool}: peak memory of all cases, MB", most, limit, False))
    started = median(report.named(START_UP), "outliermerge --help", "wall_seconds")
    swept = ratio(report.find("min_sigma", "0.5B"), "sweep", "outliermerge", "wall_seconds")
    rows += [
        ("`--help`, s", started, 0.3, False),
        ("a run besides its work, at most, s", _overhead(report), 1, False),
        ("a sweep of three over one run", swept, 1.8, False),
    ]
    return markdown(
        ["goal", "limit", "measured", "met"],
        (
            [name, f"{'≥' if at_least else '≤'} {limit}", number(found) if limit > 10
             else f"{found:.2f}", "yes" if (found >= limit) == at_least or found == limit else "no"]
            for name, found, limit, at_least in rows
            if found is not None
        ),
    )  # fmt: skip


def inputs(content: dict[str, Any]) -> str:
    """Forms of task models, from the JSON that inputs.py writes."""
    return markdown(
        ["task models read as", "wall s", "CPU s", "memory MB", "over plain"],
        (
            [kind, *(number(case[key]) for key in ("wall_seconds", "cpu_seconds", PEAK)),
             f"{case['wall_over_plain']:.2f}"]
            for kind, case in content["cases"].items()
        ),
    )  # fmt: skip


def looking(content: dict[str, Any]) -> str:
    """Statistics of weights against one reading, from the JSON that looking.py writes."""
    rows = []
    for case in content["cases"]:
        least, most = case["over_reading_range"]
        rows.append(
            [
                case["name"],
                number(case["read_gigabytes"]),
                f"{case['reading']['seconds']:.3f}",
                number(case["stats"]["seconds"]),
                f"{case['over_reading']:.1f} ({least:.1f}–{most:.1f})",
                number(case["stats"][PEAK]),
            ]
        )
    header = ["`outliermerge stats`", "GB", "reading once, s", "stats, s", "ratio", "memory MB"]
    return markdown(header, rows)


def kernels(content: dict[str, Any]) -> str:
    """What kernels cost, from the JSON that kernels.py writes."""
    keys = ("nanoseconds", "nanoseconds before")
    return markdown(
        ["ns of one core for an element", "now", "before"],
        (
            [name, *(f"{case[key]:.2f}" if key in case else "–" for key in keys)]
            for name, case in content["cases"].items()
        ),
    )


SECTIONS: dict[str, Callable[[Report], str]] = {
    "machine": machine,
    "payoff": payoff,
    "work": work,
    "mergekit": mergekit,
    "memory": memory,
    "sizes": sizes,
    "models": models,
    "start-up": start_up,
    "extras": extras,
    "goals": goals,
}


def sections(results: Path = RESULTS) -> dict[str, str]:
    """Return what stands between the markers, for the results that are there."""
    found = {}
    if (results / "speed.json").is_file():
        report = Report.load(results / "speed.json")
        found = {name: write(report) for name, write in SECTIONS.items()}
    others = (
        *(inputs, looking, elsewhere, elsewhere_output, on_ray, headers, kernels, methods),
        *(matrices, randomized),
    )
    for write in others:
        path = results / f"{write.__name__}.json"
        if path.is_file():
            found[write.__name__] = write(json.loads(path.read_text()))
    return {name: text for name, text in found.items() if text}


def documents() -> list[Path]:
    """Return the documents that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, by_name: dict[str, str]) -> str:
    """Return a text with what is between its markers replaced.

    Raises:
        SystemExit: a marker names what was not measured.
    """

    def replaced(match: re.Match[str]) -> str:
        if match[1] not in by_name:
            names = ", ".join(by_name) or "nothing"
            raise SystemExit(f"bench:{match[1]} is not measured; there is: {names}")
        return f"<!-- bench:{match[1]} -->\n{by_name[match[1]]}\n<!-- /bench -->"

    return re.sub(r"<!-- bench:(\S+) -->\n.*?<!-- /bench -->", replaced, text, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the results")
    parser.add_argument("--write", action="store_true", help="write documents, draw the plots")
    options = parser.parse_args()
    by_name = sections(options.results)
    if not options.write:
        print("\n\n".join(f"<!-- bench:{name} -->\n{text}" for name, text in by_name.items()))
        return
    from plots import draw

    for document in documents():
        text = document.read_text()
        if (new := filled(text, by_name)) != text:
            document.write_text(new)
    draw(Report.load(options.results / "speed.json"), options.results)


if __name__ == "__main__":
    main()
