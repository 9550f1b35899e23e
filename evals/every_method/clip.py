"""A small CLIP that is trained from scratch: garments and digits with captions, told by text.

The images, what is done to them and which are of which split are those of evals/evidence/vision.py.
A model is scored by the caption of a class to which it finds an image nearest (zero-shot).
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

try:  # transformers 5 has the image processor without torchvision under its own name
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

from evals.every_method.by_files import SPACES, Files
from evals.every_method.measuring import measured, write_samples
from evals.evidence import vision
from evals.evidence.training import State, Statistics, copied, fit
from evals.evidence.training import measured as measured_by_hand

CAPTIONS = {
    "garments": [
        f"a photo of a {name}"
        for name in (
            *("t-shirt", "trouser", "pullover", "dress", "coat"),
            *("sandal", "shirt", "sneaker", "bag", "boot"),
        )
    ],
    "digits": [
        f"a photo of the digit {name}"
        for name in "zero one two three four five six seven eight nine".split()
    ],
}
SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")


@dataclass(frozen=True)
class Recipe:
    """What the models depend on but the seed."""

    width: int = 48
    hidden: int = 96
    layers: int = 3
    text_layers: int = 2
    heads: int = 2
    patch: int = 7
    batch: int = 64
    base_steps: int = 800
    base_rate: float = 2e-3
    rate: float = 5e-4
    num_validation: int = 500
    num_test: int = 5000
    num_measured: int = 128


@dataclass(frozen=True)
class Clip:
    """The family."""

    name: str = "clip"
    tasks: tuple[str, ...] = ("garments-turned", "digits-inverted")
    recipe: Recipe = field(default_factory=Recipe)
    steps: dict[str, int] = field(default_factory=lambda: {"far": 400})
    joint_steps: int = 0
    lower_is_better: bool = False
    factor: float = 100.0
    # AdaMerging makes the entropy of texts or classes less, which this kind of model has not.
    by_files: tuple[str, ...] = tuple(name for name in SPACES if name != "adamerging")

    def world(self, seed: int) -> ClipWorld:
        """Read the images."""
        return ClipWorld(self.recipe, seed, vision.Vision().world(seed).sets)


class ClipWorld(vision.VisionWorld):
    """One seed's images and captions."""

    recipe: Recipe  # type: ignore[assignment]

    def base(self) -> dict[str, Any]:
        """Train on both sets, more on images as they are."""
        model = self._model()
        loss = self._loss_of(model, vision.BASE, "base", self.recipe.batch)
        fit(model, loss, self.recipe.base_steps, self.recipe.base_rate)
        return {"state": copied(model)}

    def tune(
        self, base: dict[str, Any], tasks: Sequence[str], steps: int, keep: Collection[int]
    ) -> dict[int, State]:
        """Train the base on a task, whose images are told from all captions."""
        model = self._model(base["state"])
        loss = self._loss_of(model, tasks, "-".join(tasks), self.recipe.batch)
        return fit(model, loss, steps, self.recipe.rate, keep)

    def statistics(self, base: dict[str, Any], state: State, task: str) -> Statistics:
        """Measure a model: Gram matrices by the command, Fisher information by the study's code.

        The command takes the likelihood of texts and classes, which this kind of model has not.
        """
        model = self._model(state)
        with tempfile.TemporaryDirectory() as folder:
            found = measured(self._saved(state, Path(folder)), self._samples(task), ("gram",))
        loss = self._loss_of(model, [task], f"measured {task}", 1)
        return found | {"fisher": measured_by_hand(model, loss, self.recipe.num_measured)["fisher"]}

    def _samples(self, task: str) -> list[dict[str, Any]]:
        """Return training images with their captions."""
        name, _, change = task.partition("-")
        images, labels, rows = self._rows(name, "training")
        samples = []
        for row in rows[: self.recipe.num_measured]:
            pixels = vision.CHANGES[change](images[[row]])[0]
            file = io.BytesIO()
            Image.fromarray((pixels * 255).round().byte().numpy()).save(file, "PNG")
            samples.append({"text": CAPTIONS[name][labels[row]], "image": file.getvalue()})
        return samples

    def _saved(self, state: State, folder: Path) -> Path:
        self._model(state).save_pretrained(folder)
        _processor().save_pretrained(folder)
        return folder

    def files(self, base: State, states: Sequence[State], tasks: Sequence[str], at: Path) -> Files:
        """Write the models, and samples of their tasks."""
        models = [self._saved(state, at / f"model-{i}") for i, state in enumerate(states)]
        data = [write_samples(at / task, self._samples(task)) for task in tasks]
        return Files(self._saved(base, at / "base"), models, data)

    def opened(self, folder: Path) -> State:
        """Return the tensors of a merge."""
        state: State = CLIPModel.from_pretrained(folder, dtype=torch.float32).state_dict()
        return state

    @torch.inference_mode()
    def score(self, base: dict[str, Any], state: State, task: str, split: str) -> np.ndarray:
        """Return which images are told right among the captions of their set."""
        self._scored.load_state_dict(state)
        name, _, change = task.partition("-")
        images, labels, rows = self._rows(name, split)
        captions = _captions([name])
        found = [
            _logits(self._scored, vision.CHANGES[change](images[part]), captions).argmax(1)
            for part in np.array_split(rows, max(1, len(rows) // 500))
        ]
        return (torch.cat(found) == labels[rows]).numpy()

    @cached_property
    def _scored(self) -> CLIPModel:  # type: ignore[override]
        return self._model().eval()

    def _model(self, state: State | None = None) -> CLIPModel:  # type: ignore[override]
        recipe, tokenizer = self.recipe, _tokenizer()
        torch.manual_seed(self.seed)
        tower = {
            "hidden_size": recipe.width,
            "intermediate_size": recipe.hidden,
            "num_attention_heads": recipe.heads,
        }
        config = CLIPConfig(
            text_config=tower
            | {
                "num_hidden_layers": recipe.text_layers,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 16,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config=tower
            | {
                "num_hidden_layers": recipe.layers,
                "image_size": vision.SIDE,
                "patch_size": recipe.patch,
            },
            projection_dim=recipe.width,
        )
        model = CLIPModel(config)
        if state is not None:
            model.load_state_dict(state)
        return model

    def _loss_of(
        self, model: CLIPModel, tasks: Sequence[str], name: str, batch: int
    ) -> Callable[[int], Tensor]:
        """Return the loss of a step: each image is to be nearest to its caption, among all."""
        drawn = np.random.default_rng([self.seed, *name.encode()])
        captions, starts = _captions(vision.SETS), {"garments": 0, "digits": vision.CLASSES}

        def loss(step: int) -> Tensor:
            own, _, change = tasks[step % len(tasks)].partition("-")
            images, labels, rows = self._rows_of(own)
            rows = rows[drawn.integers(0, len(rows), batch)]
            logits = _logits(model, vision.CHANGES[change](images[rows]), captions)
            return functional.cross_entropy(logits, labels[rows] + starts[own])

        return loss

    def _rows_of(self, name: str) -> tuple[Tensor, Tensor, np.ndarray]:
        """Return a set's training images, which are drawn once."""
        kept = self.__dict__.setdefault("_training", {})
        if name not in kept:
            kept[name] = self._rows(name, "training")
        found: tuple[Tensor, Tensor, np.ndarray] = kept[name]
        return found


def _logits(model: CLIPModel, images: Tensor, captions: dict[str, Tensor]) -> Tensor:
    pixels = ((images[:, None] - 0.5) / 0.5).expand(-1, 3, -1, -1)
    found: Tensor = model(pixel_values=pixels, **captions).logits_per_image
    return found


def _captions(sets: Sequence[str]) -> dict[str, Tensor]:
    texts = [caption for name in sets for caption in CAPTIONS[name]]
    return {**_tokenizer()(texts, padding=True, return_tensors="pt")}


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, which begins and ends a caption with a token."""
    words = {word: None for texts in CAPTIONS.values() for text in texts for word in text.split()}
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(token, vocabulary[token]) for token in ("<start>", "<end>")]
    whole.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unknown>",
    )


def _processor() -> CLIPProcessor:
    pixels = CLIPImageProcessor(
        size={"shortest_edge": vision.SIDE},
        crop_size={"height": vision.SIDE, "width": vision.SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(image_processor=pixels, tokenizer=_tokenizer())
