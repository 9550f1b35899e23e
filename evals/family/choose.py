"""Chooses the merge parameters on validation questions alone, and writes validation.json.

python evals/family/choose.py STRONG MILD     # the folders of two runs of train.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import transformers

import outliermerge
from evals.family import data
from evals.family.model import build_tokenizer, load
from evals.family.score import score
from evals.family.train import MODELS, SPECIALISTS

LAMBDAS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DENSITIES = (0.2, 0.5, 1.0)
OUT = Path(__file__).with_name("validation.json")

# The name of a merge, its method and parameters. Those with a choice of one are fixed beforehand:
# min-σ at the two thresholds of arXiv 2501.10661, TIES with λ 1 (arXiv 2306.01708).
CHOICES: dict[str, list[dict[str, Any]]] = {
    "average": [{"merge_method": "linear"}],
    "task_arithmetic": [
        {"merge_method": "task_arithmetic", "parameters": {"lambda": value}} for value in LAMBDAS
    ],
    "ties": [
        {"merge_method": "ties", "parameters": {"density": value, "lambda": 1}}
        for value in DENSITIES
    ],
    "min_sigma_t3": [{"merge_method": "min_sigma", "parameters": {"t": 3}}],
    "min_sigma_t2": [{"merge_method": "min_sigma", "parameters": {"t": 2}}],
}


def merge_spec(family: Path, choice: dict[str, Any]) -> dict[str, Any]:
    """Return the spec that merges a family's two specialists onto its base."""
    return {
        **choice,
        "base_model": str(family / "base"),
        "models": [{"model": str(family / name)} for name in SPECIALISTS],
    }


def validation_table(family: Path) -> dict[str, Any]:
    """Return the validation scores of a family's models and merges, the best of each marked.

    The best is the one with the highest mean of the two tasks; of equals, the first.
    """
    record = json.loads((family / "training.json").read_text())
    tokenizer = build_tokenizer()
    rows = {task: data.rows(task, "validation", record["seed"]) for task in data.TASKS}

    def scored(folder: Path) -> dict[str, float]:
        model = load(folder)
        result = {task: score(model, tokenizer, rows[task])["accuracy"] for task in rows}
        return {**result, "mean": round(sum(result.values()) / len(result), 4)}

    table: dict[str, Any] = {name: scored(family / name) for name in MODELS}
    chosen: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, choices in CHOICES.items():
            tried = []
            for i, choice in enumerate(choices):
                out = Path(scratch) / f"{name}-{i}"
                outliermerge.run(merge_spec(family, choice), output=out)
                tried.append({**choice, **scored(out)})
            table[name] = tried
            best = max(range(len(tried)), key=lambda i: (tried[i]["mean"], -i))
            chosen[name] = choices[best]
    return {
        "seed": record["seed"],
        "rows": len(rows["attributes"]),
        "chosen": chosen,
        "scores": table,
    }


def main() -> None:
    """Choose from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", type=Path, nargs="+", help="one of each regime")
    parser.add_argument("--output", type=Path, default=OUT)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    result = {}
    for family in options.families:
        regime = json.loads((family / "training.json").read_text())["regime"]
        result[regime] = validation_table(family)
        print(regime, json.dumps(result[regime]["chosen"]))
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
