"""Small models for transplants, and the rows that they are to get, written plainly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from checkpoints import load_folder
from safetensors.torch import save_file

from outliermerge.checkpoint.tokens import read_tokens
from outliermerge.planning.spelling import Pairing, pair_tokens, spelled

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def pairing(model: Path, donor: Path) -> Pairing:
    """Return which tokens two models have in common; all tokens must have rows."""
    sides = []
    for folder in (model, donor):
        tokens = read_tokens(folder)
        assert tokens is not None
        sides.append(spelled(folder, tokens))
    return pair_tokens(*sides)


def change(folder: Path, **tensors: torch.Tensor) -> None:
    """Change tensors of a model: `embeddings` or `head`."""
    names = {"embeddings": EMBEDDINGS, "head": HEAD}
    changed = load_folder(folder) | {names[key]: value for key, value in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def pursued(target: torch.Tensor, atoms: torch.Tensor, k: int) -> tuple[list[int], torch.Tensor]:
    """Return the atoms of orthogonal matching pursuit and their weights, in float64."""
    target, atoms = target.double(), atoms.double()
    chosen: list[int] = []
    left, weights = target, torch.zeros(0, dtype=torch.float64)
    for _ in range(k):
        products = (atoms @ left).abs()
        products[chosen] = -1
        chosen.append(int(products.argmax()))
        weights = torch.linalg.lstsq(atoms[chosen].T, target[:, None]).solution[:, 0]
        left = target - weights @ atoms[chosen]
    return chosen, weights


def nearest(target: torch.Tensor, atoms: torch.Tensor, k: int) -> tuple[list[int], torch.Tensor]:
    """Return the nearest atoms, with weights in proportion to 1/distance."""
    distances = (atoms.double() - target.double()).norm(dim=1)
    chosen: Sequence[int] = distances.argsort()[:k].tolist()
    weights = 1 / distances[chosen]
    return [*chosen], weights / weights.sum()
