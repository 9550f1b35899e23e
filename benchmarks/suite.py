"""The merges whose cost is known: beside a plain copy of the same files, and beside mergekit.

Builds checkpoints of one size at a time, runs each case's commands in turn as whole processes with
a warm page cache, and writes results/speed.json after every case. The checkpoints are removed.

    python benchmarks/suite.py [--runs 5] [--only ties-0.5B] [--resume]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_checkpoints import (
    FILE,
    SHAPES,
    build,
    num_model_bytes,
    num_parameters,
    statistics_of,
)
from measure import FailedCommand, alternate, measure, progress, script, surroundings
from report import ALONE, START_UP

RESULT = Path(__file__).parent / "results" / "speed.json"
PARAMETERS: dict[str, dict[str, float]] = {
    "passthrough": {},
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "min_sigma": {},
    "ties": {"weight": 0.5, "density": 0.2},
    "slerp": {"t": 0.5},
    "model_stock": {},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "breadcrumbs": {"weight": 0.5, "density": 0.9},
    "della": {"weight": 0.5, "density": 0.5},
    "sce": {"select_topk": 0.1},
}
# Measured by methods.py alone.
OTHERS: dict[str, dict[str, float]] = {
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.5},
    "karcher": {},
    "nearswap": {"t": 0.001},
    "arcee_fusion": {},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.9},
    "della_linear": {"weight": 0.5, "density": 0.5},
    "ram": {},
    "ramplus_tl": {},
    "iso_c": {},
    "iso_cts": {},
    "tsv_m": {},
    "wudi": {"iterations": 10},
    "swudi": {},
    "aswudi": {},
    "resmerge": {},
    "pcb": {},
    "consensus_ta": {},
    "metagpt": {},
    "lines": {},
    "svc": {},
    "regmean": {},
    "fisher": {},
    "mats": {"iterations": 10},
    "mats_fisher": {"iterations": 10},
}
WITH_DATA = {"regmean": "gram", "fisher": "fisher", "mats": "gram", "mats_fisher": "fisher"}
MODIFIERS = ("lines", "svc")  # measured behind task_arithmetic
OF_THE_MERGE = ("t", "select_topk", "iterations")  # parameters that a model cannot set for itself
WITHOUT_PEER = (
    "passthrough", "min_sigma", "iso_c", "iso_cts", "tsv_m", "wudi", "swudi", "aswudi",
    "resmerge", "pcb", "consensus_ta", "metagpt", *MODIFIERS, *WITH_DATA,
)  # fmt: skip
MEMORY = "64MB"
SWEEP = "t=2,2.5,3"
NOTE = (
    "whole processes, page cache warm, bfloat16 checkpoints, two task models unless a case says "
    "otherwise; outliermerge computes in float32, mergekit in bfloat16; ties keeps 20%, dare and "
    "della half, breadcrumbs 90%, sce 10%; slerp merges the base and one model; copy reads "
    "what the merge reads once and writes what it writes; a round's runs follow each other"
)


@dataclass(frozen=True)
class Case:
    """A merge, and with what it is done in turn."""

    method: str
    size: str
    num_models: int = 2
    tools: tuple[str, ...] = ("copy", "outliermerge")

    @property
    def name(self) -> str:
        return f"{self.method}-{self.size}-{self.num_models}"

    @property
    def num_outputs(self) -> int:
        return SWEEP.count(",") + 1 if "sweep" in self.tools else 1

    @property
    def disk_bytes(self) -> int:
        return num_model_bytes(self.size) * (1 + self.num_models + self.num_outputs)


def merges(size: str) -> list[Case]:
    """Return a size's cases.

    mergekit is left out from 3B on: what it holds would drive the inputs out of the page cache.
    """
    cases = []
    for method in PARAMETERS:
        tools = ["copy", "direct copy", "outliermerge", f"outliermerge --memory {MEMORY}"]
        if method not in WITHOUT_PEER and size not in ("3B", "7B"):
            tools.append("mergekit")
        if size in ("tiny", "0.5B") and method in ("min_sigma", "ties", "della", "sce"):
            tools.append("outliermerge --no-kernels")
        if size in ("tiny", "0.5B") and method == "min_sigma":
            tools.append("sweep")
        cases.append(Case(method, size, 1 if method in ALONE else 2, tuple(tools)))
    if size == "0.5B":
        for num_models in (3, 5, 8):
            cases += [
                Case("task_arithmetic", size, num_models, ("copy", "outliermerge", "mergekit")),
                Case("min_sigma", size, num_models),
            ]
    return cases


CASES = [case for size in ("0.1B", "0.5B", "1.5B", "3B") for case in merges(size)]


def commands(case: Case, folder: Path, models: Sequence[Path]) -> dict[str, list[str]]:
    """Write the case's spec and return its commands, which all write folder/out."""
    base, *tasks = models
    if case.method == "slerp":
        tasks = [base, *tasks]
    given = (PARAMETERS | OTHERS)[case.method]
    of_merge = {name: value for name, value in given.items() if name in OF_THE_MERGE}
    own = {name: value for name, value in given.items() if name not in of_merge}
    spec: dict[str, Any] = {
        "merge_method": case.method,
        "models": [{"model": str(path), "parameters": own} for path in tasks],
        "parameters": of_merge,
        "dtype": "bfloat16",
    }
    for model, path in zip(spec["models"], tasks, strict=True):
        if found := _statistics(case, path):
            model["auxiliary"] = found
    if case.method in MODIFIERS:
        spec |= {"merge_method": "task_arithmetic", "modifiers": [{"modifier": case.method}]}
    if case.method not in ("linear", "passthrough", *WITH_DATA):
        spec["base_model"] = str(base)
        tasks = list(dict.fromkeys([base, *tasks]))
    path, out = folder / "spec.yaml", folder / "out"
    path.write_text(json.dumps(spec))
    ours = [
        script("outliermerge"),
        "run",
        str(path),
        "--output",
        str(out),
        "--json",
        "--no-load-check",
    ]
    copier = [sys.executable, str(Path(__file__).with_name("copy_files.py"))]
    inputs = [path for model in tasks for path in _statistics(case, model).values()]
    copied = [str(out), *(str(Path(path) / FILE) for path in (*inputs, *tasks))]
    known = {
        "copy": [*copier, *copied],
        "direct copy": [*copier, "--direct", *copied],
        "outliermerge": ours,
        f"outliermerge --memory {MEMORY}": [*ours, "--memory", MEMORY],
        "outliermerge --no-kernels": [*ours, "--no-kernels"],
        "sweep": [ours[0], "sweep", str(path), "--set", SWEEP, *ours[3:5], "--no-load-check"],
        "mergekit": [script("mergekit-yaml"), str(path), str(out), "--no-copy-tokenizer"],
    }
    return {tool: known[tool] for tool in case.tools}


def _statistics(case: Case, model: Path) -> dict[str, str]:
    """Return the folder of a model's statistics by their kind, if the method takes some."""
    kind = WITH_DATA.get(case.method)
    return {kind: str(statistics_of(model, kind))} if kind else {}


def run_merge(case: Case, folder: Path, models: Sequence[Path], num_runs: int) -> dict[str, Any]:
    def clear() -> None:
        for path in folder.glob("out*"):  # of a failed run as well
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.sync()  # so that nothing of the last run is still being written during the next

    todo = commands(case, folder, models[: 1 + case.num_models])
    clear()
    measure(todo["copy"])  # the first after a build takes several times as long
    runs, failed = alternate(todo, num_runs, before=clear, label=case.name)
    clear()
    about: dict[str, Any] = {"name": case.name, "method": case.method, "size": case.size}
    about |= {"num_models": case.num_models, "parameters": (PARAMETERS | OTHERS)[case.method]}
    return about | {"runs": runs} | ({"failed": failed} if failed else {})


def run_start_up(num_runs: int) -> dict[str, Any]:
    helps = {"outliermerge": "outliermerge", "mergekit": "mergekit-yaml"}
    todo = {f"{tool} --help": [script(command), "--help"] for tool, command in helps.items()}
    alternate(todo, 1, label=f"{START_UP}, to warm up")
    runs, failed = alternate(todo, num_runs, label=START_UP)
    return {"name": START_UP, "runs": runs} | ({"failed": failed} if failed else {})


def chosen_names(only: Sequence[str], cases: Sequence[Case]) -> list[str]:
    """Return the names of the cases, or of those that have one of the texts in their name."""
    names = [START_UP, *(case.name for case in cases)]
    for text in only:
        if not any(text in name for name in names):
            raise SystemExit(f"--only {text}: no case has that in its name: {', '.join(names)}")
    return [name for name in names if not only or any(text in name for text in only)]


def opened(path: Path, now: dict[str, Any], *, go_on: bool) -> dict[str, Any]:
    """Return the report to complete: the one of the file, or an empty one."""
    empty = now | {"note": NOTE, "cases": []}
    if not go_on or not path.is_file():
        return empty
    earlier: dict[str, Any] = json.loads(path.read_text())
    for key in ("hardware", "versions", "runs"):
        if earlier[key] != now[key]:
            raise SystemExit(
                f"{path}: {key} was {earlier[key]}, is {now[key]}: its cases cannot be completed; "
                "measure all again, without --resume and --only, or give another --results"
            )
    return earlier


def save(report: dict[str, Any], case: dict[str, Any], path: Path) -> None:
    """Put a case into the report, in place of an earlier one, and write it."""
    others = [other for other in report["cases"] if other["name"] != case["name"]]
    report["cases"] = [*others, case]
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".half")
    half.write_text(json.dumps(report, indent=1) + "\n")
    half.replace(path)


def check_disk(folder: Path, cases: Sequence[Case]) -> None:
    """Say how much disk is needed; refuse to start without it."""
    needed = 1.05 * max((case.disk_bytes for case in cases), default=0)
    free = shutil.disk_usage(folder).free
    progress(f"needs {needed / 1e9:.1f} GB of disk in {folder}, {free / 1e9:.1f} GB are free")
    if free < needed:
        raise SystemExit(f"{folder}: has too little space; give another --folder, or fewer --only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=5, help="runs of each command (default 5)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="cases with it in their name"
    )
    parser.add_argument("--resume", action="store_true", help="measure only what is lacking")
    parser.add_argument("--with-7b", action="store_true", help="7B too (needs 64 GB of disk)")
    parser.add_argument("--tiny", action="store_true", help="5M parameters only, to try it out")
    parser.add_argument("--results", type=Path, default=RESULT, help="the JSON file to write")
    parser.add_argument("--folder", type=Path, help="where to build (default: TMPDIR)")
    options = parser.parse_args()

    cases = merges("tiny") if options.tiny else CASES + (merges("7B") if options.with_7b else [])
    names = chosen_names(options.only, cases)
    also = ("mergekit", "transformers")
    go_on = options.resume or bool(options.only)
    report = opened(options.results, surroundings(options.runs, also=also), go_on=go_on)
    if options.resume:
        done = {case["name"] for case in report["cases"] if "failed" not in case}
        names = [name for name in names if name not in done]
    folder = Path(tempfile.mkdtemp(prefix="outliermerge-bench-", dir=options.folder))
    try:
        check_disk(folder, [case for case in cases if case.name in names])
        report["num_parameters"] = {size: num_parameters(size) for size in SHAPES}
        if START_UP in names:
            save(report, run_start_up(options.runs), options.results)
        for size in dict.fromkeys(case.size for case in cases if case.name in names):
            of_size = [case for case in cases if case.size == size and case.name in names]
            num_models = max(case.num_models for case in of_size)
            progress(f"building a base and {num_models} task model(s) of {size}")
            models = build(size, folder / size, num_models=num_models)
            for case in of_size:
                save(report, run_merge(case, folder, models, options.runs), options.results)
            shutil.rmtree(folder / size)
    except FailedCommand as error:
        raise SystemExit(str(error)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    progress(f"wrote {options.results}")
    failed = [
        f"{case['name']}: {tool}: {message}"
        for case in report["cases"]
        for tool, message in case.get("failed", {}).items()
    ]
    if failed:
        raise SystemExit("failed, and left out of the results:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
