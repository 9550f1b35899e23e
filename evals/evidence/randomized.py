"""Scores merges of the encoder with singular vectors from a random start beside exact ones.

    python evals/evidence/randomized.py --seeds 4 5

Six task models, at both distances; models are trained where the cache lacks them (some 20 minutes a
seed). Prints a line for each merge: the mean score of both, their difference with its standard
error over the test texts, and how far the merges are apart, over how far the exact one is from
the base.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

import outliermerge
from evals.evidence.families import FAMILIES
from evals.evidence.packages import cache
from evals.evidence.run import Seed
from evals.evidence.training import State

METHODS = ("tsv_m", "iso_cts", "resmerge")


def distance(one: State, other: State) -> float:
    """Return the length of what two models differ by."""
    return float(sum((one[n] - other[n]).double().square().sum() for n in one)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 5])
    torch.set_num_threads(1)
    print("| seed | distance | merge | exact | `randomized` | difference | apart |")
    print("|--:|:--|:--|--:|--:|--:|--:|")
    for number in parser.parse_args().seeds:
        seed = Seed(FAMILIES["encoder"], number, cache())
        base, tasks = seed.base()["state"], seed.family.tasks
        for steps in seed.family.steps:
            models = [seed.tuned(task)[steps] for task in tasks]
            for method in METHODS:
                states = [
                    outliermerge.merge_state_dicts(
                        models, base=base, method=method, randomized=randomized
                    )
                    for randomized in (False, True)
                ]
                exact, other = (
                    100
                    * np.concatenate([seed.world.score(seed.base(), s, t, "test") for t in tasks])
                    for s in states
                )
                gain = other - exact
                error = gain.std(ddof=1) / len(gain) ** 0.5
                apart = distance(*states) / distance(states[0], base)
                cells = (
                    *(str(number), steps, f"`{method}`", f"{exact.mean():.1f}"),
                    *(f"{other.mean():.1f}", f"{gain.mean():+.2f} ± {error:.2f}", f"{apart:.2g}"),
                )
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
