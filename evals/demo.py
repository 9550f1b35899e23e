"""The paper in five minutes: merge the small family, score parents and merges, show the table.

    python evals/demo.py [--limit QUESTIONS] [--jobs MODELS_AT_ONCE]

Writes evals/data/tiny (the test sets), merged/tiny_*, and scores/tiny (scores.json, scores.md,
scores.png).
"""

from __future__ import annotations

import sys
import time

from steps import command, merge, options, score

PARENTS = ("base", "instruct", "maths")
# Names in the table, and the specs in merge_configs.
MERGES = {
    "average": "tiny_average",
    "task arithmetic": "tiny_task_arithmetic",
    "TIES": "tiny_ties",
    "min-σ, t=3": "tiny_min_sigma_t3",
    "min-σ, t=2": "tiny_min_sigma_t2",
}


def main() -> None:
    chosen = options(__doc__ or "", jobs=2)
    started = time.monotonic()
    command(sys.executable, "evals/family/data.py", "evals/data")
    merge(list(MERGES.values()))
    models = {name: f"evals/family/models/{name}" for name in PARENTS}
    models |= {name: f"merged/{spec}" for name, spec in MERGES.items()}
    score(models, "evals/tiny.yaml", "scores/tiny", chosen)
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()
