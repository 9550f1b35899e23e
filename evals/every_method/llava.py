"""The committed LLaVA of evals/family: its base and two specialists, and fresh test questions."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlavaForConditionalGeneration

from evals.every_method.by_files import SPACES, Files
from evals.every_method.measuring import measured, write_samples
from evals.evidence.training import State, Statistics
from evals.family import data
from evals.family.model import build_tokenizer, load, prompt
from evals.family.score import answers

MODELS = Path(data.__file__).with_name("models")
SPECIALISTS = {"attributes": "instruct", "mathematics": "maths"}


@dataclass(frozen=True)
class Recipe:
    """What the scores depend on besides the models."""

    num_validation: int = 120
    num_test: int = 600
    num_measured: int = 128
    test_seed: int = 22


@dataclass(frozen=True)
class Llava:
    """The family."""

    name: str = "llava"
    tasks: tuple[str, ...] = data.TASKS
    recipe: Recipe = field(default_factory=Recipe)
    steps: dict[str, int] = field(default_factory=lambda: {"strong": 400})
    joint_steps: int = 0
    lower_is_better: bool = False
    factor: float = 100.0
    by_files: tuple[str, ...] = tuple(SPACES)

    def world(self, seed: int) -> LlavaWorld:
        """Open the models, which are of one seed."""
        return LlavaWorld(self.recipe)


@dataclass
class LlavaWorld:
    """The models and their questions."""

    recipe: Recipe
    _rows: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)

    def base(self) -> dict[str, Any]:
        """Return the base."""
        return {"state": load(MODELS / "base").state_dict()}

    def tune(
        self, base: dict[str, Any], tasks: Sequence[str], steps: int, keep: Collection[int]
    ) -> dict[int, State]:
        """Return a task's specialist."""
        (task,) = tasks
        return dict.fromkeys(keep, load(MODELS / SPECIALISTS[task]).state_dict())

    def statistics(self, base: dict[str, Any], state: State, task: str) -> Statistics:
        """Measure a task's specialist on training questions."""
        return measured(MODELS / SPECIALISTS[task], self._samples(task), ("gram", "fisher"))

    def _samples(self, task: str) -> list[dict[str, Any]]:
        """Return training questions with their answers."""
        tokenizer = build_tokenizer()
        return [
            {
                "prompt": prompt(tokenizer, row["question"]),
                "completion": f" {row['answer']}{tokenizer.eos_token}",
                "image": row["image"],
            }
            for row in self._questions(task, "training", self.recipe.num_measured)
        ]

    def files(self, base: State, states: Sequence[State], tasks: Sequence[str], at: Path) -> Files:
        """Return the folders of the models, and write samples of their tasks."""
        models = [MODELS / SPECIALISTS[task] for task in tasks]
        data = [write_samples(at / task, self._samples(task)) for task in tasks]
        return Files(MODELS / "base", models, data)

    def opened(self, folder: Path) -> State:
        """Return the tensors of a merge."""
        return load(folder).state_dict()

    def score(self, base: dict[str, Any], state: State, task: str, split: str) -> np.ndarray:
        """Return which questions are answered right."""
        recipe = self.recipe
        num = recipe.num_test if split == "test" else recipe.num_validation
        rows = self._questions(task, split, num)
        self._scored.load_state_dict(state)
        found = answers(self._scored, build_tokenizer(), rows)
        return np.array([one == row["answer"] for one, row in zip(found, rows, strict=True)])

    @cached_property
    def _scored(self) -> LlavaForConditionalGeneration:
        return load(MODELS / "base")

    def _questions(self, task: str, split: str, num: int) -> list[dict[str, Any]]:
        """Return questions; those for tests are of a seed of their own."""
        if (task, split) not in self._rows:
            trained: int = json.loads((MODELS / "training.json").read_text())["seed"]
            seed = self.recipe.test_seed if split == "test" else trained
            self._rows[task, split] = data.rows(task, split, seed, num)
        return self._rows[task, split]
