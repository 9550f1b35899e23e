"""Trains, merges and scores the small family for five seeds in two regimes; writes study.json, .md.

    python evals/family/study.py [--work scores/study]

Every seed has its own weights, training data and test sets. Recipe and merge parameters are those
that choose.py found on the validation questions of seed 0, which is not among these seeds; every
test set is scored once. A study that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import outliermerge
from evals.family import data
from evals.family.choose import OUT as CHOSEN
from evals.family.choose import merge_spec
from evals.family.train import MODELS, REGIMES, train_family
from outliermerge.cli.evaluation_progress import EvaluationProgress
from outliermerge.evaluation.evaluate import evaluate
from outliermerge.evaluation.scores import Score
from outliermerge.evaluation.suite import load_suite

ROOT = Path(__file__).parents[2]
SEEDS = (1, 2, 3, 4, 5)
NAMES = {
    "average": "average",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "min_sigma_t3": "min-σ, t=3",
    "min_sigma_t2": "min-σ, t=2",
}
RESULT, TABLE = Path(__file__).with_name("study.json"), Path(__file__).with_name("study.md")

# One score each: [regime][seed][row][task]
Found = dict[str, dict[int, dict[str, dict[str, float]]]]


def one_seed(seed: int, work: Path, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Train, merge and score for one seed; return scores and relative changes by regime."""
    folder = work / str(seed)
    data.write_test_sets(folder / "data", seed)
    suite = load_suite(ROOT / "evals" / "tiny.yaml", data=str(folder / "data"))
    result: dict[str, Any] = {}
    earlier: Path | None = None
    for regime in REGIMES:
        family = folder / regime
        if not family.exists():
            train_family(family, seed, regime, base=earlier)
        earlier = family
        record = json.loads((family / "training.json").read_text())
        models = [f"{name}={family / name}" for name in MODELS]
        for method, name in NAMES.items():
            output = folder / f"{regime}-{method}"
            if not output.exists():
                outliermerge.run(merge_spec(family, chosen[regime][method]), output=output)
            models.append(f"{name}={output}")
        with EvaluationProgress(suite.document.tasks, models) as listener:
            scores = evaluate(models, suite, output=folder / "scores", jobs=2, listener=listener)
        if scores.failures:
            raise SystemExit(f"failed: {scores.failures}")
        result[regime] = {
            "relative_change": {
                name: record[name]["relative_change"] for name in MODELS if name != "base"
            },
            "scores": {
                model.name: {
                    title: task.score
                    for title, task in model.tasks.items()
                    if isinstance(task, Score)
                }
                for model in scores.models
            },
            "versions": dict(scores.settings["versions"]),
        }
    return result


def mean_and_error(values: Sequence[float], sign: str = "") -> str:
    """Return the mean over seeds and its standard error, std(ddof=1) / √n, as a text."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):{sign}.1f} ± {error:.1f}"


def table(found: Mapping[int, Mapping[str, Any]], regime: str) -> str:
    """Return the table of a regime: mean scores over the seeds, ± one standard error."""
    seeds = list(found)
    rows = list(found[seeds[0]][regime]["scores"])
    titles = list(found[seeds[0]][regime]["scores"][rows[0]])

    def scores(row: str, title: str | None) -> list[float]:
        each = [found[seed][regime]["scores"][row] for seed in seeds]
        if title is not None:
            return [one[title] for one in each]
        return [statistics.fmean(one.values()) for one in each]

    average = scores("average", None)
    best = {
        title: max(rows, key=lambda row: statistics.fmean(scores(row, title)))
        for title in (*titles, None)
    }
    lines = [
        f"| model | {' | '.join(titles)} | mean | over the average |",
        "|:--|" + "--:|" * (len(titles) + 2),
    ]
    for row in rows:
        cells = []
        for title in (*titles, None):
            text = mean_and_error(scores(row, title))
            cells.append(f"**{text}**" if best[title] == row else text)
        gains = [a - b for a, b in zip(scores(row, None), average, strict=True)]
        cells.append("–" if row == "average" else mean_and_error(gains, "+"))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(study: Mapping[str, Any]) -> str:
    """Return the study as Markdown."""
    found = {int(seed): result for seed, result in study["seeds"].items()}
    parts = []
    for regime in REGIMES:
        changes = [
            change for one in found.values() for change in one[regime]["relative_change"].values()
        ]
        chosen = study["chosen"][regime]
        parts.append(
            f"Fine-tunes that moved by {min(changes):.1%} to {max(changes):.1%} of the base's norm "
            f"(task arithmetic with λ = {chosen['task_arithmetic']['parameters']['lambda']}, "
            f"TIES with density {chosen['ties']['parameters']['density']}):"
            f"\n\n{table(found, regime)}"
        )
    return (
        "\n\n".join(parts) + f"\n\nMean of {len(found)} seeds ± one standard error over seeds; "
        f"{study['num_questions']} questions a task and seed; {study['date']}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "scores" / "study")
    options = parser.parse_args()
    validation = json.loads(CHOSEN.read_text())
    chosen = {regime: validation[regime]["chosen"] for regime in REGIMES}
    started = time.monotonic()
    study: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "num_questions": data.ROWS,
        "chosen": chosen,
        "seeds": {},
    }
    for seed in SEEDS:
        print(f"seed {seed}, {time.monotonic() - started:.0f} s so far", flush=True)
        study["seeds"][str(seed)] = one_seed(seed, options.work.absolute(), chosen)
    study["seconds"] = round(time.monotonic() - started)
    RESULT.write_text(json.dumps(study, indent=1) + "\n")
    TABLE.write_text(report(study))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
