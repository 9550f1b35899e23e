"""Trains the models of a family, merges and scores them, seed after seed.

    python evals/evidence/run.py language --seeds 1 2 3 4 5
    python evals/evidence/run.py language --methods average+svc regmean++

With --methods, the base and the fine-tunes are trained, and only these merges and the average are
scored: results.py adds them to the seeds that results.json has.

Every model and every merge is kept in the user's cache, under a hash of the recipe. What was
stopped goes on where it was. A method's parameters are chosen on validation data; the test split
is scored with its defaults and with what was chosen, and with nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from transformers.utils import logging

from evals.evidence import from_files
from evals.evidence.facts import facts
from evals.evidence.families import FAMILIES
from evals.evidence.methods import SPACES, candidates, merged, methods_of
from evals.evidence.packages import cache
from evals.evidence.training import MEASURED, Family, State, Statistics, World, measured

SIZES = (2, 4, 6)
AVERAGE = "linear-default"
SPACES_OF = SPACES | from_files.SPACES

# A model to score, and what is to be known of it.
Scored = tuple[State, Mapping[str, Any]]


def folder_of(family: Family, seed: int, root: Path) -> Path:
    """Return the folder of a seed; another recipe has another one."""
    made_of = {"recipe": asdict(family.recipe), "tasks": family.tasks, "steps": family.steps}
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return root / f"{family.name}-{digest[:8]}" / f"seed-{seed}"


def rows_of(family: Family, size: int) -> list[str]:
    """Return the names of what is scored of the merges of so many models."""
    methods = [*methods_of(size), *family.from_files]
    kinds = {method: ["default", *["chosen"] * bool(SPACES_OF[method])] for method in methods}
    return [f"{method}-{kind}" for method, every in kinds.items() for kind in every]


class Seed:
    """What is made of one seed of a family, in a folder."""

    def __init__(self, family: Family, seed: int, root: Path) -> None:
        self.family, self.seed, self.folder = family, seed, folder_of(family, seed, root)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.world: World = family.world(seed)

    def train(self) -> None:
        """Train the base and a fine-tune for each task."""
        self.base()
        for task in self.family.tasks:
            self.tuned(task)

    def base(self) -> dict[str, Any]:
        """Return the base, trained where it is not yet."""
        return self._kept("base", self.world.base)

    def tuned(self, task: str) -> dict[str, State]:
        """Return the fine-tune of a task at each distance."""
        steps = self.family.steps

        def make() -> dict[str, State]:
            found = self.world.tune(self.base(), [task], max(steps.values()), set(steps.values()))
            return {name: found[count] for name, count in steps.items()}

        return self._kept(task, make)

    def measured(self, task: str, distance: str) -> Statistics:
        """Return statistics of a fine-tune on examples of its task."""

        def make() -> Statistics:
            state = self.tuned(task)[distance]
            return measured(*self.world.examples(self.base(), state, task), MEASURED)

        return self._kept(f"{distance}-{task}-statistics", make)

    def joint(self, size: int) -> dict[str, State]:
        """Return the base trained on several tasks at once."""
        steps = self.family.joint_steps

        def make() -> dict[str, State]:
            tasks = self.family.tasks[:size]
            return {"state": self.world.tune(self.base(), tasks, steps, {steps})[steps]}

        return self._kept(f"joint-{size}", make)

    def score(self, only: Collection[str] = ()) -> None:
        """Merge and score at every distance with every number of task models.

        Args:
            only: score these methods and the average alone.
        """
        for distance in self.family.steps:
            if not only:
                self.score_parents(distance)
            for size in SIZES:
                self.score_merges(distance, size, only)

    def score_parents(self, distance: str) -> None:
        """Score the base and every fine-tune on all tasks."""
        every = self.family.tasks
        self._scored("base", every, lambda: (self.base()["state"], {}))
        for task in every:
            self._scored(f"{distance}/{task}", every, partial(self._task_model, task, distance))

    def score_merges(self, distance: str, size: int, only: Collection[str] = ()) -> None:
        """Score the merges of the first tasks' models by every method, or by some."""
        tasks = self.family.tasks[:size]
        base = self.base()["state"]
        models = [self.tuned(task)[distance] for task in tasks]
        folder = f"{distance}/{size}"
        record = self.folder / "scores" / folder / "facts.json"
        if not (only or record.is_file()):
            record.parent.mkdir(parents=True, exist_ok=True)
            _write(record, json.dumps(facts(base, models)).encode())
        merge = partial(
            merged,
            base=base,
            models=models,
            seed=self.seed,
            statistics=lambda: [self.measured(task, distance) for task in tasks],
        )
        with tempfile.TemporaryDirectory() as place:
            folders = from_files.Folders(self.world, base, models, tasks, Path(place))
            merges = {method: partial(merge, method) for method in methods_of(size)}
            merges |= {name: partial(folders.merged, name) for name in self.family.from_files}
            wanted = {AVERAGE.removesuffix("-default"), *only} if only else merges.keys()
            for method in [method for method in merges if method in wanted]:
                own = merges[method]
                self._scored(f"{folder}/{method}-default", tasks, partial(self._default, own))
                if SPACES_OF[method]:
                    chosen = partial(self._chosen, own, candidates(SPACES_OF[method]), tasks)
                    self._scored(f"{folder}/{method}-chosen", tasks, chosen)

    def score_joint(self) -> None:
        """Train on all tasks of a merge at once, and score."""
        for size in SIZES:
            tasks = self.family.tasks[:size]
            self._scored(f"joint-{size}", tasks, partial(self._joint_model, size))

    def _task_model(self, task: str, distance: str) -> Scored:
        return self.tuned(task)[distance], {}

    def _joint_model(self, size: int) -> Scored:
        return self.joint(size)["state"], {}

    def _default(self, merge: Callable[..., State]) -> Scored:
        return merge(parameters={}), {}

    def _chosen(
        self,
        merge: Callable[..., State],
        candidates: Sequence[Mapping[str, Any]],
        tasks: Sequence[str],
    ) -> Scored:
        """Choose a method's parameters by the mean of all tasks' validation scores."""
        tried = []
        for parameters in candidates:
            state = merge(parameters=parameters)
            means = [self._examples(state, task, "validation").mean() for task in tasks]
            tried.append((float(np.mean(means)), parameters))
        best = (min if self.family.lower_is_better else max)(tried, key=lambda one: one[0])
        return merge(parameters=best[1]), {"chosen": best[1], "tried": tried}

    def _examples(self, state: State, task: str, split: str) -> np.ndarray:
        return self.world.score(self.base(), state, task, split)

    def _scored(self, name: str, tasks: Sequence[str], make: Callable[[], Scored]) -> None:
        """Score a model on the test split, unless that was done."""
        path = self.folder / "scores" / f"{name}.npz"
        if path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        state, about = make()
        digest = hashlib.sha256(b"".join(state[n].numpy().tobytes() for n in sorted(state)))
        about = {**about, "digest": digest.hexdigest()}
        twin = self._twin(path.parent, about["digest"])
        scores = twin or {task: self._examples(state, task, "test") for task in tasks}
        unfinished = path.with_name(path.name + ".partial")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, about=np.array(json.dumps(about)), **scores)
        unfinished.rename(path)

    def _twin(self, folder: Path, digest: str) -> dict[str, np.ndarray] | None:
        """Return the scores of the same weights, which several methods may give."""
        for path in sorted(folder.glob("*.npz")):
            with np.load(path) as found:
                if json.loads(found["about"].item())["digest"] == digest:
                    return {name: found[name] for name in found.files if name != "about"}
        return None

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a model from memory or from its file, or make it."""
        memory = self.__dict__.setdefault("_memory", {})
        path = self.folder / f"{name}.pt"
        if name in memory:
            found: dict[str, Any] = memory[name]
            return found
        if path.is_file():
            found = torch.load(path, weights_only=True)
        else:
            start = time.perf_counter()
            found = make()
            unfinished = path.with_name(path.name + ".partial")
            torch.save(found, unfinished)
            unfinished.rename(path)
            print(f"{self.folder.parent.name} seed {self.seed}: trained {name} in "
                  f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
        memory[name] = found
        return found


def _write(path: Path, raw: bytes) -> None:
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_bytes(raw)
    unfinished.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", choices=["train", "score", "joint"], help="one part of the work")
    parser.add_argument(
        "--methods", nargs="+", choices=SPACES_OF, default=[], metavar="METHOD",
        help="score these merges and the average, and train nothing jointly",
    )  # fmt: skip
    options = parser.parse_args()
    family = FAMILIES[options.family]
    if absent := set(options.methods) - {*SPACES, *family.from_files}:
        parser.error(f"{options.family} is not merged by {', '.join(sorted(absent))}")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for number in options.seeds:
        seed = Seed(family, number, cache())
        for part, work in {
            "train": seed.train,
            "score": partial(seed.score, options.methods),
            "joint": seed.score_joint,
        }.items():
            if options.only in (None, part) and not (options.methods and part == "joint"):
                start = time.perf_counter()
                work()
                print(f"{options.family} seed {number}: {part}, "
                      f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
