"""Texts of four kinds, small models that have learnt one of them each, and what scores merges."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from text_models import save_text_model

FORMS = {
    "sums": "{0} and {1} make {2}.",
    "words": "The {0}th word of line {1} is: {2}",
    "code": "def f{0}(x): return x + {1} - {2}",
    "lists": "[{0}, {1}, {2}, {0}, {1}]",
}
NUM_QUESTIONS = 12  # of each kind


def tokens(kind: str, number: int) -> list[int]:
    """Return a text's bytes as tokens."""
    text = FORMS[kind].format(number, 3 * number, 4 * number)
    return [2 + byte for byte in text.encode()]


def save_models(folder: Path) -> None:
    """Save a base, and by kind a model that was trained on it for a second."""
    from transformers import LlamaForCausalLM

    save_text_model(folder / "base", seed=0)
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    for parameter in model.parameters():
        parameter.data /= 3
    model.save_pretrained(folder / "base")
    for kind in FORMS:
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.tensor([tokens(kind, number) for number in range(34, 50)])  # of one length
        for _ in range(20):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / kind)


def likelihood(model: Any, questions: Mapping[str, Sequence[str]] | None = None) -> Any:
    """Return for each text of each kind its mean log-likelihood."""
    asked = questions or {kind: [str(n) for n in range(NUM_QUESTIONS)] for kind in FORMS}
    found: dict[str, dict[str, float]] = {}
    for kind, names in asked.items():
        ids = [torch.tensor([tokens(kind, 50 + int(name))]) for name in names]
        scores = [-float(model(input_ids=each, labels=each).loss) for each in ids]
        found[kind] = dict(zip(names, scores, strict=True))
    return found


def deadly(model: Any, questions: Mapping[str, Sequence[str]] | None = None) -> Any:
    """Kill the process at the sixth call on some questions, and never again."""
    calls = Path("calls")
    with calls.open("a") as file:
        file.write("x" * (questions is not None))
    if calls.stat().st_size == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return likelihood(model, questions)
