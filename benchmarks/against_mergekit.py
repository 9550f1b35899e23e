"""Whole-process wall time, CPU time and peak memory of outliermerge and of mergekit, alternating.

Builds bfloat16 checkpoints of 0.5B and 1.5B parameters (12 GB of disk at the most, removed at the
end), runs each merge with both tools in turn, and writes medians and ratios to
benchmarks/results/against_mergekit.json. The page cache is warm.

    python benchmarks/against_mergekit.py [--runs 3] [--folder DIR] [--keep]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from build_checkpoints import build

RESULT = Path(__file__).parent / "results" / "against_mergekit.json"
CASES: tuple[tuple[str, str, dict[str, Any], bool], ...] = (
    ("0.5B", "linear", {"weight": 0.5}, True),
    ("0.5B", "task_arithmetic", {"weight": 0.5}, True),
    ("0.5B", "ties", {"weight": 0.5, "density": 0.2}, True),
    ("0.5B", "min_sigma", {}, False),
    ("1.5B", "linear", {"weight": 0.5}, True),
    ("1.5B", "task_arithmetic", {"weight": 0.5}, False),
    ("1.5B", "ties", {"weight": 0.5, "density": 0.2}, False),
    ("1.5B", "min_sigma", {}, False),
)


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; return wall and CPU seconds and the peak of its anonymous memory in MB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    status = Path(f"/proc/{process.pid}/status")
    peak_kib = 0
    while True:
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak_kib = max(peak_kib, int(line.split()[1]))
        time.sleep(0.01)
    wall = time.perf_counter() - started
    assert process.stderr is not None
    messages = process.stderr.read().decode()
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{messages[-2000:]}")
    return {
        "wall_seconds": wall,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_anonymous_megabytes": peak_kib * 1024 / 1e6,
    }


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}


def run_case(
    folder: Path, size: str, method: str, parameters: dict[str, Any], peer: bool, num_runs: int
) -> dict[str, Any]:
    base, *models = build(size, folder / size)
    spec = {
        "merge_method": method,
        "models": [{"model": str(model), "parameters": parameters} for model in models],
        "dtype": "bfloat16",
    }
    if method != "linear":
        spec["base_model"] = str(base)
    path = folder / "spec.yaml"
    path.write_text(json.dumps(spec))
    commands = {
        "outliermerge": ["outliermerge", "run", str(path), "--output", str(folder / "ours")]
    }
    if peer:
        commands["mergekit"] = ["mergekit-yaml", str(path), str(folder / "theirs")]
        commands["mergekit"] += ["--no-copy-tokenizer"]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(num_runs):
        for name, command in commands.items():
            for target in ("ours", "theirs"):
                shutil.rmtree(folder / target, ignore_errors=True)
            runs[name].append(measure(command))
    case: dict[str, Any] = {"size": size, "method": method, "parameters": parameters}
    case |= {name: medians(measured) for name, measured in runs.items()}
    if peer:
        case["mergekit_over_outliermerge"] = {
            key: round(case["mergekit"][key] / case["outliermerge"][key], 2)
            for key in case["mergekit"]
        }
    return case


def table(report: dict[str, Any]) -> str:
    """Return the Markdown table that the README shows."""
    rows = [
        "| merge | wall s | CPU s | peak memory MB | mergekit wall s | CPU s | MB | wall ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        cells = [f"{case['method']}, {case['size']}"]
        for tool in ("outliermerge", "mergekit"):
            measured = case.get(tool)
            cells += [
                f"{measured[key]:.{digits}f}" if measured else "–"
                for key, digits in (
                    ("wall_seconds", 1),
                    ("cpu_seconds", 1),
                    ("peak_anonymous_megabytes", 0),
                )
            ]
        ratio = case.get("mergekit_over_outliermerge", {}).get("wall_seconds")
        rows.append("| " + " | ".join([*cells, f"{ratio:.1f}" if ratio else "–"]) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each merge (default 3)")
    parser.add_argument("--folder", type=Path, help="where to build (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument(
        "--resume", action="store_true", help="measure only the cases that the results lack"
    )
    parser.add_argument("--table", action="store_true", help="print the last results and stop")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULT.read_text())))
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="outliermerge-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < 16e9:
        raise SystemExit(f"{folder}: needs 16 GB free")
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {cpu[0].partition(': ')[2] if cpu else '?'}, "
        f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("outliermerge", "mergekit", "torch")},
        },
        "load_before": os.getloadavg()[0],
        "runs": options.runs,
        "note": "medians of alternating runs, whole process, page cache warm, bfloat16, two task "
        "models; outliermerge computes in float32, mergekit in bfloat16",
        "cases": [],
    }
    if options.resume and RESULT.is_file():
        earlier = json.loads(RESULT.read_text())
        if all(earlier[key] == report[key] for key in ("hardware", "versions", "runs")):
            report = earlier
    measured = {(case["size"], case["method"]) for case in report["cases"]}
    try:
        for size, method, parameters, peer in CASES:
            if (size, method) in measured:
                continue
            case = run_case(folder, size, method, parameters, peer, options.runs)
            report["cases"].append(case)
            print(json.dumps(case), flush=True)
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(report, indent=2) + "\n")
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"wrote {RESULT}", file=sys.stderr)


if __name__ == "__main__":
    main()
