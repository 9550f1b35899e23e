"""The committed results: collected from what run.py left in the cache, and read again.

    python evals/evidence/results.py

Seeds that results.json has already stay there where the cache lacks them and the recipe is the
same, so that several machines can make them. Rows that they lack are added to them, if the average
scores there exactly as here, so that the models are the same.

A row of results.json is a model that was scored on the test split. For each task it has the mean
over the examples, and the standard error of the mean difference from the average of the same
models, example by example.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import transformers

from evals.evidence.families import FAMILIES
from evals.evidence.packages import cache, versions
from evals.evidence.run import AVERAGE, SIZES, folder_of, rows_of
from evals.evidence.training import Family

RESULTS = Path(__file__).with_name("results.json")
SEEDS = (1, 2, 3, 4, 5)

Row = dict[str, Any]


def collect(families: Sequence[Family], root: Path, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Return the results of all seeds that are complete but for the joint training."""
    found: dict[str, Any] = {}
    for family in families:
        own = {}
        for seed in seeds:
            folder = folder_of(family, seed, root) / "scores"
            if (result := _seed(family, folder)) is not None:
                own[str(seed)] = result
        found[family.name] = {
            "tasks": family.tasks,
            "recipe": asdict(family.recipe),
            "steps": family.steps,
            "joint_steps": family.joint_steps,
            "lower_is_better": family.lower_is_better,
            "factor": family.factor,
            "seeds": own,
        }
    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "families": found,
    }


def _seed(family: Family, folder: Path) -> dict[str, Any] | None:
    needed = [
        folder / distance / str(size) / f"{name}.npz"
        for distance in family.steps
        for size in SIZES
        for name in rows_of(family, size)
    ]
    if not all(path.is_file() for path in needed):
        return None
    singles = [folder / "base.npz", *sorted(folder.glob("joint-*.npz"))]
    singles += [folder / distance / f"{t}.npz" for distance in family.steps for t in family.tasks]
    merges = {}
    for cell in _cells(family):
        facts = json.loads((folder / cell / "facts.json").read_text())
        merges[cell] = {"facts": _rounded(facts[""]), "rows": _rows(folder / cell)}
    return {
        "models": {str(p.relative_to(folder).with_suffix("")): _row(p, None) for p in singles},
        "merges": merges,
    }


def _cells(family: Family) -> list[str]:
    return [f"{distance}/{size}" for distance in family.steps for size in SIZES]


def _rows(folder: Path) -> dict[str, Row]:
    """Return what was scored of a setting: nothing where the average was not."""
    path = folder / f"{AVERAGE}.npz"
    average = _examples(path) if path.is_file() else None
    return {p.stem: _row(p, average) for p in sorted(folder.glob("*.npz")) if average}


def _examples(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as found:
        return {n: found[n].astype(np.float64) for n in found.files if n != "about"}


def _row(path: Path, average: Mapping[str, np.ndarray] | None) -> Row:
    with np.load(path) as found:
        about = json.loads(found["about"].item())
    row: Row = {"scores": []}
    if average is not None:
        row["errors"] = []
    for task, scores in _examples(path).items():
        row["scores"].append(float(f"{scores.mean():.6g}"))
        if average is not None:
            error = (scores - average[task]).std(ddof=1) / len(scores) ** 0.5
            row["errors"].append(float(f"{error:.3g}"))
    if "chosen" in about:
        row["parameters"] = _rounded(about["chosen"])
    return row


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in values.items()
    }


def add_rows(family: Family, seed: str, result: Mapping[str, Any], root: Path) -> list[str]:
    """Add rows that a seed's result lacks, if all settings were scored; return their names.

    Raises:
        SystemExit: if the average scored otherwise, since then the models are others.
    """
    folder = folder_of(family, int(seed), root) / "scores"
    there = {cell: _rows(folder / cell) for cell in _cells(family)}
    known = {cell: result["merges"][cell]["rows"] for cell in there}
    sizes = {cell: int(cell.partition("/")[2]) for cell in there}
    lacks = {cell: set(rows_of(family, sizes[cell])) - set(known[cell]) for cell in there}
    unfinished = {name for cell, names in lacks.items() for name in names - set(there[cell])}
    new = {cell: names - unfinished for cell, names in lacks.items() if names - unfinished}
    added = sorted(set().union(*new.values()))
    for cell in new:
        before, now = (every[cell][AVERAGE]["scores"] for every in (known, there))
        if before != now:
            raise SystemExit(
                f"{family.name}, seed {seed}, {cell}: the average scored {before} in results.json, "
                f"and {now} here, so that {', '.join(added)} would be of other models. Remove "
                "results.json and make all seeds anew"
            )
    for cell, names in new.items():
        rows = {**known[cell], **{name: there[cell][name] for name in names}}
        result["merges"][cell]["rows"] = dict(sorted(rows.items()))
    return added


def with_earlier(found: dict[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Add the seeds and the packages of earlier results to what was found.

    Raises:
        SystemExit: if a package has another version now, since texts and images depend on it.
    """
    for package, version in earlier["packages"].items():
        if found["packages"].setdefault(package, version) != version:
            raise SystemExit(
                f"{package}: this machine has version {found['packages'][package]}, and the "
                f"results are of {version}; remove results.json and make all seeds anew"
            )
    for name, family in found["families"].items():
        old = earlier["families"].get(name, {"seeds": {}})
        if {**old, "seeds": 0} == {**json.loads(json.dumps(family)), "seeds": 0}:
            family["seeds"] = dict(sorted({**old["seeds"], **family["seeds"]}.items()))
    return found


def main() -> None:
    found = collect(list(FAMILIES.values()), cache())
    found["packages"] = versions()
    if RESULTS.is_file():
        found = with_earlier(found, json.loads(RESULTS.read_text()))
    for name, family in FAMILIES.items():
        for seed, result in found["families"][name]["seeds"].items():
            if added := add_rows(family, seed, result, cache()):
                print(f"{name}, seed {seed}: added {', '.join(added)}")
    # A line for each row.
    RESULTS.write_text(json.dumps(found, separators=(",", ":")).replace("},", "},\n") + "\n")
    for name, family in found["families"].items():
        print(f"{name}: seeds {', '.join(family['seeds']) or 'none'}")


if __name__ == "__main__":
    main()
