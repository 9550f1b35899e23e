"""Runs a spec through outliermerge and mergekit, and compares the outputs."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from checkpoints import load_folder
from torch import Tensor

import outliermerge
from outliermerge.methods.context import Context
from parity.models import family_of

with warnings.catch_warnings():
    # Its lazy_unpickle.py names a private module of numpy that has been renamed.
    warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
    from mergekit import sparsify
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

PLACED_OTHERWISE = {"qwen2_vl": ("visual.merger.mlp.",)}
"""mergekit takes the projector's two matrices for the last of two layers; they are in none."""
ROUNDING = float(torch.finfo(torch.float32).eps)


@dataclass
class Comparison:
    """What two tools made of one spec.

    Attributes:
        largest: the largest difference of an element, in units of the tensor's largest magnitude.
        differing: for each tensor, how many elements differ by more than rounding.
        num_elements: of all tensors.
        problems: names, shapes or dtypes that differ.
        placed_otherwise: as `differing`, for tensors that mergekit puts at another place among the
            layers, so that gradients give them another value.
    """

    largest: float = 0.0
    differing: dict[str, int] = field(default_factory=dict)
    num_elements: int = 0
    problems: list[str] = field(default_factory=list)
    placed_otherwise: dict[str, int] = field(default_factory=dict)


def compare(spec: dict[str, Any], models: Path, folder: Path) -> Comparison:
    """Merge by both tools in float32 and compare every element.

    What is random is drawn by both from the values themselves, so that both drop the same elements.

    Args:
        spec: as `specs` draws it.
        models: where the models are, or are made.
        folder: where the outputs go.
    """
    spec = copy.deepcopy(spec)
    kind = spec.pop("kind")
    family = family_of(kind, spec.pop("stored"), models)
    for entry in spec["models"]:
        entry["model"] = str(family / entry["model"])
    if "base_model" in spec:
        spec["base_model"] = str(family / spec["base_model"])
    with same_draws():
        theirs = by_mergekit(copy.deepcopy(spec), folder / "theirs")
        ours = load_folder(
            outliermerge.run(spec, output=folder / "ours", kernels=False, threads=1).output
        )
    names = {entry["model"] for entry in spec["models"]} | {spec.get("base_model")}
    inputs = [load_folder(Path(name)) for name in names if name]
    found = Comparison()
    found.problems += [f"only here: {name}" for name in sorted(ours.keys() - theirs.keys())]
    found.problems += [f"only there: {name}" for name in sorted(theirs.keys() - ours.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        mine, other = ours[name], theirs[name]
        if (mine.shape, mine.dtype) != (other.shape, other.dtype):
            found.problems.append(f"{name}: {mine.dtype} {tuple(mine.shape)} here, "
                                  f"{other.dtype} {tuple(other.shape)} there")  # fmt: skip
            continue
        size = max(float(x.abs().max()) for x in (mine, other, *(t[name] for t in inputs)))
        error = (mine.double() - other.double()).abs() / max(size, 1e-30)
        found.num_elements += mine.numel()
        limit = 512 if spec["merge_method"] == "nuslerp" else 16
        if num := int((error > limit * ROUNDING).sum()):
            found.differing[name] = num
        if any(name.startswith(prefix) for prefix in PLACED_OTHERWISE.get(kind, ())):
            found.placed_otherwise |= {name: found.differing.pop(name, 0)}
        else:
            found.largest = max(found.largest, float(error.max()))
    return found


def by_mergekit(spec: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Return what mergekit makes of a spec."""
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(spec), str(folder), options)
    return load_folder(folder)


def logits_of(folder: Path, tokens: list[int]) -> Tensor:
    """Return what an output answers to some tokens, loaded by transformers as its config says."""
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = {"input_ids": torch.tensor([tokens])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def assert_same_answers(ours: Tensor, theirs: Tensor) -> None:
    """Compare the logits of models whose weights are equal but for the rounding of float32."""
    assert ours.shape == theirs.shape and float(theirs.std()) > 1e-3
    limit = 1e-5 * float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)


def _chance_of(values: Tensor) -> Tensor:
    """Return a number in [0, 1) for each element that depends only on its value."""
    return (values.float().double().abs() * 1e7).frac()


@contextmanager
def same_draws() -> Iterator[None]:
    """Let both tools draw random numbers from the values that they drop."""
    drawn_from: list[Tensor] = []

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def bernoulli(self, chances: Tensor) -> Tensor:
            return (_chance_of(drawn_from[-1]).view_as(chances) < chances.double()).to(chances)

    def watched(function: Any) -> Any:
        def call(tensor: Tensor, **settings: Any) -> Any:
            drawn_from.append(tensor)
            try:
                return function(tensor, **settings)
            finally:
                drawn_from.pop()

        return call

    def uniform(self: Context, like: Tensor, *, model: int = 0, purpose: str = "") -> Tensor:
        return _chance_of(like)

    with (
        mock.patch.object(sparsify, "torch", Torch()),
        mock.patch.object(sparsify, "bernoulli", watched(sparsify.bernoulli)),
        mock.patch.object(sparsify, "della_magprune", watched(sparsify.della_magprune)),
        mock.patch.object(Context, "uniform", uniform),
    ):
        yield
