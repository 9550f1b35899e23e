"""A real encoder, all-MiniLM-L6-v2: its upper two layers, tuned to classify short texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from demo.fetch import fetch
from evals.evidence import texts
from evals.evidence.from_files import MODIFIERS
from evals.evidence.packages import cache
from evals.evidence.training import State, copied, fit

Rows = list[tuple[str, int]]


@dataclass(frozen=True)
class Recipe:
    """What the models depend on but the seed."""

    tuned_layers: int = 2  # from the top; the others and the embeddings stay as they are
    max_tokens: int = 16  # longer texts are left out
    num_training: int = 4096
    num_validation: int = 96
    num_probe: int = 256  # of the training texts; heads see no others
    num_test: int = 400
    probe_steps: int = 100
    probe_rate: float = 1e-2
    batch: int = 16
    rate: float = 2e-4


@dataclass(frozen=True)
class Encoder:
    """The family."""

    name: str = "encoder"
    tasks: tuple[str, ...] = tuple(texts.TASKS)
    recipe: Recipe = field(default_factory=Recipe)
    steps: dict[str, int] = field(default_factory=lambda: {"near": 50, "far": 200})
    joint_steps: int = 400
    lower_is_better: bool = False
    factor: float = 100.0
    # `measure` would run and merge the whole encoder, which takes too long; it has several heads.
    from_files: tuple[str, ...] = tuple(MODIFIERS)

    def world(self, seed: int) -> EncoderWorld:
        """Read the model and the texts."""
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        folder = fetch(cache() / "models")["all-MiniLM-L6-v2"]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return EncoderWorld(
            self.recipe,
            seed,
            AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
            lambda sentences: tokenizer(sentences)["input_ids"],
            {task: texts.read(task) for task in self.tasks},
        )


@dataclass
class Part:
    """A split of a task: what the lower layers make of the texts, and the texts' classes."""

    states_NTD: Tensor
    lengths: np.ndarray
    labels: Tensor

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return texts' states, cut to the longest one's length, and which tokens there are."""
        lengths = torch.from_numpy(self.lengths[rows])
        most = int(lengths.max())
        return self.states_NTD[rows, :most], torch.arange(most) < lengths[:, None]


@dataclass
class EncoderWorld:
    """One seed's texts; the base is the same for all seeds.

    A text is in the same split of all tasks.
    """

    recipe: Recipe
    seed: int
    encoder: Any
    tokens_of: Callable[[list[str]], list[list[int]]]
    rows: dict[str, Rows]

    def base(self) -> dict[str, Any]:
        """Take the encoder as it is, and fit a linear head for each task, which stays so."""
        upper = self._upper()
        return {"state": copied(upper), "heads": {t: self._probe(upper, t) for t in self.rows}}

    def tune(
        self, base: dict[str, Any], tasks: Sequence[str], steps: int, keep: Collection[int]
    ) -> dict[int, State]:
        """Train the upper layers on tasks in turn, under their heads."""
        upper = self._upper(base["state"])
        loss = self._loss(upper, base, tasks, "-".join(tasks), self.recipe.batch)
        return fit(upper, loss, steps, self.recipe.rate, keep)

    def examples(
        self, base: dict[str, Any], state: State, task: str
    ) -> tuple[nn.ModuleList, Callable[[int], Tensor]]:
        """Return the upper layers, and what gives their loss for one text after the other."""
        upper = self._upper(state)
        return upper, self._loss(upper, base, [task], f"measured {task}", 1)

    def stored_as(self, name: str) -> str:
        """Return the name with the number that the layer has in the whole encoder."""
        layer, _, rest = name.partition(".")
        lower = self.encoder.config.num_hidden_layers - self.recipe.tuned_layers
        return f"encoder.layer.{lower + int(layer)}.{rest}"

    def _loss(
        self,
        upper: nn.ModuleList,
        base: dict[str, Any],
        tasks: Sequence[str],
        name: str,
        batch: int,
    ) -> Callable[[int], Tensor]:
        drawn = np.random.default_rng([self.seed, *name.encode()])
        heads = {task: self._head(base["heads"][task]) for task in tasks}
        parts = {task: self._part(task, "training") for task in tasks}

        def loss(step: int) -> Tensor:
            task = tasks[step % len(tasks)]
            part = parts[task]
            rows = drawn.integers(0, len(part.labels), batch)
            features = _features(upper, *part.batch(rows))
            return functional.cross_entropy(heads[task](features), part.labels[rows])

        return loss

    @torch.inference_mode()
    def score(self, base: dict[str, Any], state: State, task: str, split: str) -> np.ndarray:
        """Return which texts are told right."""
        upper, head = self._upper(state), self._head(base["heads"][task])
        part = self._part(task, split)
        right = np.zeros(len(part.labels), dtype=bool)
        order = np.argsort(part.lengths, kind="stable")
        for rows in np.array_split(order, max(1, len(order) // 64)):
            told = head(_features(upper, *part.batch(rows))).argmax(1)
            right[rows] = (told == part.labels[rows]).numpy()
        return right

    def _upper(self, state: State | None = None) -> nn.ModuleList:
        layers = self.encoder.encoder.layer
        upper = nn.ModuleList(layers[len(layers) - self.recipe.tuned_layers :])
        if not hasattr(self, "_start"):
            self._start = copied(upper)
        upper.load_state_dict(self._start if state is None else state)
        return upper

    def _part(self, task: str, split: str) -> Part:
        memory = self.__dict__.setdefault("_parts", {})
        if (task, split) not in memory:
            memory[task, split] = self._read(task, split)
        part: Part = memory[task, split]
        return part

    @torch.no_grad()
    def _read(self, task: str, split: str) -> Part:
        recipe = self.recipe
        most = {
            "training": recipe.num_training,
            "validation": recipe.num_validation,
            "test": recipe.num_test,
        }[split]
        drawn = sorted((self._draw(text), text, label) for text, label in self.rows[task])
        least, limit = {"test": (0, 0.3), "validation": (0.3, 0.4), "training": (0.4, 1)}[split]
        # Six times as many as are needed, since some are too long.
        drawn = [row for row in drawn if least <= row[0] < limit][: 6 * most]
        tokens = self.tokens_of([text for _, text, _ in drawn])
        short = [n for n, each in enumerate(tokens) if len(each) <= recipe.max_tokens][:most]
        lengths = np.array([len(tokens[n]) for n in short])
        ids_NT = torch.zeros(len(short), recipe.max_tokens, dtype=torch.long)
        for row, n in enumerate(short):
            ids_NT[row, : lengths[row]] = torch.tensor(tokens[n])
        mask_NT = torch.arange(recipe.max_tokens) < torch.from_numpy(lengths)[:, None]
        layers = self.encoder.encoder.layer
        lower = layers[: len(layers) - recipe.tuned_layers]
        states = []
        for ids, mask in zip(ids_NT.split(64), mask_NT.split(64), strict=True):
            states.append(_through(lower, self.encoder.embeddings(input_ids=ids), mask))
        labels = torch.tensor([drawn[n][2] for n in short])
        return Part(torch.cat(states), lengths, labels)

    def _draw(self, text: str) -> float:
        digest = hashlib.sha256(f"{self.seed} {text}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def _head(self, state: State | None = None, classes: int = 0) -> nn.Linear:
        classes = classes if state is None else len(state["bias"])
        head = nn.Linear(self.encoder.config.hidden_size, classes)
        if state is not None:
            head.load_state_dict(state)
        return head.requires_grad_(state is None)

    def _probe(self, upper: nn.ModuleList, task: str) -> State:
        part = self._part(task, "training")
        count = min(self.recipe.num_probe, len(part.labels))
        rows = np.array_split(np.arange(count), max(1, count // 64))
        with torch.no_grad():
            features = torch.cat([_features(upper, *part.batch(each)) for each in rows])
        torch.manual_seed(self.seed)
        head = self._head(classes=1 + max(label for _, label in self.rows[task]))
        fit(
            head,
            lambda step: functional.cross_entropy(head(features), part.labels[:count]),
            self.recipe.probe_steps,
            self.recipe.probe_rate,
        )
        return copied(head)


def _through(layers: nn.ModuleList, states_NTD: Tensor, mask_NT: Tensor) -> Tensor:
    """Send states through layers; padded tokens are not looked at."""
    for layer in layers:
        found = layer(states_NTD, mask_NT[:, None, None])
        states_NTD = found if isinstance(found, Tensor) else found[0]
    return states_NTD


def _features(upper: nn.ModuleList, states_NTD: Tensor, mask_NT: Tensor) -> Tensor:
    """Return texts as the mean of the last states, at a length of √D so that heads learn fast."""
    last_NTD = _through(upper, states_NTD, mask_NT)
    mean_ND = (last_NTD * mask_NT[..., None]).sum(1) / mask_NT.sum(1, keepdim=True)
    return functional.normalize(mean_ND, dim=-1) * mean_ND.shape[-1] ** 0.5
