"""Scores a merge of language models for `outliermerge search`, by windows of validation pages.

`search_language.py` writes the windows into the folder in which it runs the search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from transformers import LlamaForCausalLM

from evals.evidence.language import bits_per_byte

WINDOWS_NAME = "windows.npz"


@cache
def _validation() -> dict[str, torch.Tensor]:
    with np.load(WINDOWS_NAME) as found:
        return {task: torch.from_numpy(found[task]) for task in found.files}


def bits(
    model: LlamaForCausalLM, questions: Mapping[str, Sequence[str]] | None = None
) -> dict[str, dict[str, float]]:
    """Return by language and window the bits per byte, with the other sign: more is better."""
    found = {}
    for task, windows_NW in _validation().items():
        names = [str(n) for n in range(len(windows_NW))]
        names = names if questions is None else list(questions.get(task, ()))
        if names:
            scores = -bits_per_byte(model, windows_NW[[int(name) for name in names]])
            found[task] = dict(zip(names, scores.tolist(), strict=True))
    return found
