"""The paper in five minutes: merge the small family, score parents and merges, show the table.

    python demo/family.py [--limit QUESTIONS] [--jobs MODELS_AT_ONCE]

Writes evals/data/tiny (the test sets), merged/tiny_*, and scores/tiny (scores.json, scores.md,
scores.png).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

FAMILY = Path("evals/family/models")
PARENTS = ("base", "instruct", "maths")
# Names in the table, and the specs in merge_configs.
MERGES = {
    "average": "tiny_average",
    "task arithmetic": "tiny_task_arithmetic",
    "TIES": "tiny_ties",
    "min-σ, t=3": "tiny_min_sigma_t3",
    "min-σ, t=2": "tiny_min_sigma_t2",
}
OUTPUT = Path("scores/tiny")


def command(*arguments: str) -> None:
    print("$ " + " ".join(arguments), flush=True)
    done = subprocess.run(arguments, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", help="questions of each task (default: all)")
    parser.add_argument("--jobs", default="2", help="models evaluated at once (default 2)")
    options = parser.parse_args()
    started = time.monotonic()
    command(sys.executable, "evals/family/data.py", "evals/data")
    for spec in MERGES.values():
        command("outliermerge", "run", f"merge_configs/{spec}.yaml", "--overwrite")
    models = [f"{name}={FAMILY / name}" for name in PARENTS]
    models += [f"{name}=merged/{spec}" for name, spec in MERGES.items()]
    limit = ["--limit", options.limit] if options.limit else []
    command(
        "outliermerge", "eval", *models, "--suite", "evals/tiny.yaml", "--output", str(OUTPUT),
        "--jobs", options.jobs, *limit,
    )  # fmt: skip
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
