"""A language model on bytes: manual pages in English and Spanish, then in six other languages."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evals.evidence.from_files import SPACES
from evals.evidence.packages import debian
from evals.evidence.training import MEASURED, State, copied, fit

PACKAGES = {
    "english": ("manpages", "manpages-dev"),
    "spanish": ("manpages-es", "manpages-es-dev"),
    "german": ("manpages-de", "manpages-de-dev"),
    "french": ("manpages-fr", "manpages-fr-dev"),
    "polish": ("manpages-pl", "manpages-pl-dev"),
    "russian": ("manpages-ru", "manpages-ru-dev"),
    "ukrainian": ("manpages-uk",),
    "japanese": ("manpages-ja", "manpages-ja-dev"),
}
BASE = ("english", "spanish")
SHARES = {"test": 0.1, "validation": 0.1}  # of the pages
WINDOW, CONTEXT = 128, 32  # the first bytes of a window are not scored


@dataclass(frozen=True)
class Recipe:
    """What the models depend on but the seed."""

    width: int = 128
    hidden: int = 352
    layers: int = 4
    heads: int = 4
    batch: int = 16
    base_steps: int = 600
    base_rate: float = 2e-3
    rate: float = 6e-4
    replay: int = 5  # one of so many windows is of the base's languages
    num_validation: int = 24
    num_test: int = 96


@dataclass(frozen=True)
class Language:
    """The family."""

    name: str = "language"
    tasks: tuple[str, ...] = ("german", "french", "polish", "russian", "ukrainian", "japanese")
    recipe: Recipe = field(default_factory=Recipe)
    steps: dict[str, int] = field(default_factory=lambda: {"near": 40, "far": 140})
    joint_steps: int = 280
    lower_is_better: bool = True
    factor: float = 1.0
    from_files: tuple[str, ...] = tuple(SPACES)

    def world(self, seed: int) -> LanguageWorld:
        """Read the pages, and split them by the seed."""
        texts = {
            language: split(read_pages(packages), seed)
            for language, packages in PACKAGES.items()
            if language in (*BASE, *self.tasks)
        }
        return LanguageWorld(self.recipe, seed, texts)


def read_pages(packages: Sequence[str]) -> dict[str, bytes]:
    """Return the manual pages of packages by section and name, without comments."""
    found = {}
    for package in packages:
        for path in sorted((debian(package) / "usr" / "share" / "man").rglob("*.gz")):
            if path.is_symlink():
                continue
            lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
            text = b"".join(line for line in lines if not line.startswith((b'.\\"', b"'\\\"")))
            if len(text) > 4 * WINDOW:  # shorter ones name another page
                found[Path(path.parent.name, path.name).as_posix()] = text
    return found


def split(pages: dict[str, bytes], seed: int) -> dict[str, np.ndarray]:
    """Split whole pages at random; a page and its translations are in the same part."""
    parts: dict[str, list[bytes]] = {"training": [], "validation": [], "test": []}
    for name in sorted(pages):
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        drawn = int.from_bytes(digest[:8], "big") / 2**64
        test, validation = SHARES["test"], SHARES["validation"]
        part = "test" if drawn < test else "validation" if drawn < test + validation else "training"
        parts[part].append(pages[name])
    return {part: np.frombuffer(b"\n".join(texts), dtype=np.uint8) for part, texts in parts.items()}


@dataclass
class LanguageWorld:
    """One seed's texts, by language and split."""

    recipe: Recipe
    seed: int
    texts: dict[str, dict[str, np.ndarray]]

    def base(self) -> dict[str, Any]:
        """Train on the base's languages in turn."""
        model = self.model()
        self._fit(model, "base", [BASE], self.recipe.base_steps, self.recipe.base_rate)
        return {"state": copied(model)}

    def tune(
        self, base: dict[str, Any], tasks: Sequence[str], steps: int, keep: Collection[int]
    ) -> dict[int, State]:
        """Train the base on languages, with some windows of its own."""
        model = self.model(base["state"])
        own = [tuple(tasks)] * (self.recipe.replay - 1)
        return self._fit(model, "-".join(tasks), [*own, BASE], steps, self.recipe.rate, keep)

    @torch.inference_mode()
    def score(self, base: dict[str, Any], state: State, task: str, split: str) -> np.ndarray:
        """Return the bits per byte of each window."""
        model = self._scored
        model.load_state_dict(state)
        count = {"validation": self.recipe.num_validation, "test": self.recipe.num_test}[split]
        drawn = np.random.default_rng([self.seed, count, *task.encode()])
        return bits_per_byte(model, self.windows(task, split, count, drawn))

    def examples(
        self, base: dict[str, Any], state: State, task: str
    ) -> tuple[LlamaForCausalLM, Callable[[int], torch.Tensor]]:
        """Return a model, and what gives its loss for one training window after the other."""
        model, drawn = self.model(state), self._drawn(task)
        return model, lambda _: _losses(model, self.windows(task, "training", 1, drawn)).sum()

    def samples(self, task: str) -> list[dict[str, Any]]:
        """Return the first of these windows as texts: a character of Latin-1 for each byte."""
        drawn = self._drawn(task)
        windows = [self.windows(task, "training", 1, drawn)[0] for _ in range(MEASURED)]
        return [{"text": bytes(window.tolist()).decode("latin-1")} for window in windows]

    def _drawn(self, task: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *f"measured {task}".encode()])

    def save(self, state: State, folder: Path) -> None:
        """Write a model with a tokenizer whose tokens are bytes."""
        self.model(state).save_pretrained(folder)
        characters = Tokenizer(models.BPE({chr(byte): byte for byte in range(256)}, []))
        PreTrainedTokenizerFast(tokenizer_object=characters).save_pretrained(folder)

    def opened(self, folder: Path) -> State:
        """Return the tensors of a merge."""
        return load_file(folder / "model.safetensors")

    def stored_as(self, name: str) -> str:
        """Return the name as it is."""
        return name

    @cached_property
    def _scored(self) -> LlamaForCausalLM:
        return self.model()

    def model(self, state: State | None = None) -> LlamaForCausalLM:
        """Return a model with a state; without one as the seed makes it."""
        recipe = self.recipe
        torch.manual_seed(self.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=recipe.width,
                intermediate_size=recipe.hidden,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                num_key_value_heads=recipe.heads,
                max_position_embeddings=WINDOW,
                tie_word_embeddings=False,
            )
        )
        if state is not None:
            model.load_state_dict(state)
        return model

    def _fit(
        self, model: LlamaForCausalLM, name: str, groups: list[tuple[str, ...]], steps: int,
        rate: float, keep: Collection[int] = (),
    ) -> dict[int, State]:  # fmt: skip
        """Train on windows that are of the groups in turn, and of a group's languages in turn."""
        drawn = np.random.default_rng([self.seed, *name.encode()])
        places = [0] * len(groups)
        turn = 0

        def loss(step: int) -> torch.Tensor:
            nonlocal turn
            windows = []
            for _ in range(self.recipe.batch):
                group = turn % len(groups)
                language = groups[group][places[group] % len(groups[group])]
                places[group] += 1
                turn += 1
                windows.append(self.windows(language, "training", 1, drawn))
            return _losses(model, torch.cat(windows)).mean()

        return fit(model, loss, steps, rate, keep)

    def windows(
        self, language: str, split: str, count: int, drawn: np.random.Generator
    ) -> torch.Tensor:
        """Draw windows of the pages of a split."""
        text = self.texts[language][split]
        starts = drawn.integers(0, len(text) - WINDOW, count)
        return torch.from_numpy(np.stack([text[s : s + WINDOW] for s in starts]).astype(np.int64))


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, windows_NW: torch.Tensor) -> np.ndarray:
    """Return the bits per byte of each window, without the bytes that are its context."""
    losses_NW = torch.cat([_losses(model, part) for part in windows_NW.split(32)])
    return (losses_NW[:, CONTEXT - 1 :].mean(1) / np.log(2)).numpy().astype(np.float64)


def _losses(model: LlamaForCausalLM, windows_NW: torch.Tensor) -> torch.Tensor:
    logits_NWV = model(windows_NW, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits_NWV.transpose(1, 2), windows_NW[:, 1:], reduction="none")
