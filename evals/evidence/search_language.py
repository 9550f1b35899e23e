"""Searches merges of language models by `outliermerge search`, and confirms on pages held out.

    python evals/evidence/search_language.py --seeds 1 2

Of each seed, the first tasks' models at the far distance are searched over three methods and
their parameters, by the bits per byte of windows of the validation pages. What wins is then scored
on windows of the test pages, beside the defaults of the same methods. Nothing is chosen there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import yaml
from transformers import LlamaForCausalLM

import outliermerge
from evals.evidence.families import FAMILIES
from evals.evidence.language import LanguageWorld, bits_per_byte
from evals.evidence.packages import cache
from evals.evidence.run import Seed, folder_of
from evals.evidence.searched import WINDOWS_NAME

ROOT = Path(__file__).parents[2]
DISTANCE, SIZES = "far", (2, 4)
METHODS = ("min_sigma", "task_arithmetic", "ties")
SPACE = """\
merge_method: [min_sigma, task_arithmetic, ties]
t: {low: 0.5, high: 4}
lambda: {low: 0.1, high: 2}
density: {low: 0.1, high: 1}
"""
NUM_VALIDATION, NUM_TEST, NUM_ASKED = 240, 480, 60  # windows of each language
RESULTS = Path(__file__).parent / "searched.json"


def windows(world: LanguageWorld, task: str, split: str, count: int) -> torch.Tensor:
    """Draw windows of a split; other ones than those of the evidence."""
    drawn = np.random.default_rng([world.seed, count, 20, *task.encode()])
    return world.windows(task, split, count, drawn)


def write_models(seed: Seed, folder: Path, tasks: Sequence[str]) -> None:
    """Write the base and the tasks' models as folders, the spec, the space and the windows."""
    assert isinstance(seed.world, LanguageWorld)
    if (folder / WINDOWS_NAME).is_file():  # it is written last
        return
    states = {"base": seed.base()["state"]} | {task: seed.tuned(task)[DISTANCE] for task in tasks}
    for name, state in states.items():
        seed.world.model(state).save_pretrained(folder / name)
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec_of(folder, METHODS[0], tasks)))
    (folder / "space.yaml").write_text(SPACE)
    drawn = {
        task: windows(seed.world, task, "validation", NUM_VALIDATION).numpy() for task in tasks
    }
    unfinished = folder / f"unfinished-{WINDOWS_NAME}"
    np.savez(unfinished, **drawn)
    unfinished.rename(folder / WINDOWS_NAME)


def spec_of(folder: Path, method: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the spec of a merge by a method with its defaults."""
    spec = {"merge_method": method, "models": [{"model": str(folder / task)} for task in tasks]}
    return spec if method == "linear" else {**spec, "base_model": str(folder / "base")}


def searched(folder: Path, trials: int, seed: int) -> dict[str, Any]:
    """Run the command in a folder; return its result."""
    words = ["search", "spec.yaml", "--space", "space.yaml", "--output", "found", "--quiet"]
    words += ["--suite", "evals.evidence.searched:bits", "--trials", str(trials)]
    words += ["--questions", str(NUM_ASKED), "--seed", str(seed), "--threads", "1"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(
        [sys.executable, "-m", "outliermerge", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found: dict[str, Any] = json.loads((folder / "found" / "result.json").read_text())
    return found


def confirm(
    seed: Seed, folder: Path, tasks: Sequence[str], found: Mapping[str, Any]
) -> dict[str, dict[str, np.ndarray]]:
    """Score the winner, the methods' defaults and the average on test windows."""
    assert isinstance(seed.world, LanguageWorld)
    specs = {method: spec_of(folder, method, tasks) for method in (*METHODS, "linear")}
    drawn = {task: windows(seed.world, task, "test", NUM_TEST) for task in tasks}
    scores = {}
    for name, spec in {**specs, "winner": found["best"]["spec"]}.items():
        path = folder / "merged" / name
        outliermerge.run(spec, output=path, overwrite=True, threads=1)
        model = LlamaForCausalLM.from_pretrained(path).eval()
        scores[name] = {task: bits_per_byte(model, drawn[task]) for task in tasks}
    return scores


def compared(
    scores: Mapping[str, Mapping[str, np.ndarray]], name: str, other: str
) -> tuple[float, float]:
    """Return how much less a merge takes than another, the mean of languages, and its error."""
    pairs = [scores[other][task] - scores[name][task] for task in scores[name]]
    errors = [own.std(ddof=1) / math.sqrt(len(own)) for own in pairs]
    return float(np.mean([own.mean() for own in pairs])), math.hypot(*errors) / len(errors)


def row_of(number: int, size: int, trials: int, search_seed: int) -> dict[str, Any]:
    """Search the merges of so many models of a seed, and confirm what wins."""
    family = FAMILIES["language"]
    seed, tasks = Seed(family, number, cache()), family.tasks[:size]
    name = f"search-{size}-{search_seed}"
    folder = folder_of(family, number, cache()) / name
    folder.mkdir(exist_ok=True)
    write_models(seed, folder, tasks)
    found = searched(folder, trials, search_seed)
    scores = confirm(seed, folder, tasks, found)
    best = next(row for row in found["rows"] if row["name"] == found["best"]["name"])
    states = [trial["state"] for trial in found["trials"]]
    return {
        "seed": number,
        "search_seed": search_seed,
        "models": size,
        "trials": {state: states.count(state) for state in ("done", "stopped", "failed")},
        "settings": best["settings"],
        "method": found["best"]["spec"]["merge_method"],
        "search_gain": [best["gain"], best["stderr"]],
        "bits": {
            name: float(np.mean([own.mean() for own in tasks_.values()]))
            for name, tasks_ in scores.items()
        },
        "gains": {method: compared(scores, "winner", method) for method in METHODS},
    }


def page_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of `docs/evidence.md`."""
    lines = [
        "| seed | models | trials | what won | bits per byte | less than min-σ's defaults "
        "| than task arithmetic's | than TIES's |",
        "| --: | --: | --: | :-- | --: | --: | --: | --: |",
    ]
    for row in rows:
        gains = [f"{gain:+.4f} ± {error:.4f}" for gain, error in row["gains"].values()]
        number = sum(row["trials"].values())
        told = f"{number} ({row['trials']['stopped']} stopped)"
        cells = [row["seed"], row["models"], told, f"`{row['settings']}`"]
        cells += [f"{row['bits']['winner']:.4f}", *gains]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of the models")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="models of a merge")
    parser.add_argument("--trials", type=int, default=80)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in options.sizes:
        for number in options.seeds:
            row = row_of(number, size, options.trials, number)
            keep(row)
            print(page_of([row]), flush=True)


def keep(row: Mapping[str, Any]) -> None:
    """Put a row into the results, in the place of one of the same models."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    kept = {(each["models"], each["seed"]): each for each in [*rows, row]}
    RESULTS.write_text(json.dumps([kept[key] for key in sorted(kept)], indent=1) + "\n")


if __name__ == "__main__":
    main()
