"""The one training loop of all families, and what a family has to offer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Statistics = dict[str, State]  # by kind: `gram`, `fisher`

BETAS, WEIGHT_DECAY, CLIP, WARMUP_STEPS = (0.9, 0.95), 0.05, 1.0, 20
MEASURED = 128  # training examples of a task, for methods that run models over data


class World(Protocol):
    """The data of one seed of a family, and what is done with it."""

    def base(self) -> dict[str, Any]:
        """Train the base: `state`, which is merged, and what the tasks keep of their own."""
        ...

    def tune(
        self, base: dict[str, Any], tasks: Sequence[str], steps: int, keep: Collection[int]
    ) -> dict[int, State]:
        """Train the base on tasks in equal parts; return the states after the steps to keep."""
        ...

    def score(self, base: dict[str, Any], state: State, task: str, split: str) -> np.ndarray:
        """Score each example of a split, `validation` or `test`."""
        ...

    def examples(
        self, base: dict[str, Any], state: State, task: str
    ) -> tuple[nn.Module, Callable[[int], Tensor]]:
        """Return a model, and what gives its loss for one training example after the other."""
        ...

    def stored_as(self, name: str) -> str:
        """Return a tensor's name in the whole model, which tells its layer."""
        ...


class Family(Protocol):
    """Models of one kind, which differ by seed.

    Attributes:
        name: of its folder and its part of the results.
        tasks: in the order in which merges take them: a merge of two takes the first two.
        recipe: all that the models depend on but the seed, as a dataclass.
        steps: of the fine-tunes, by the name of the distance that they lead to.
        joint_steps: of the training on all tasks of a merge at once.
        lower_is_better: of scores.
        factor: what a score is multiplied by in tables.
        from_files: the rows of `from_files.SPACES` that it can have.
    """

    name: str
    tasks: tuple[str, ...]
    recipe: Any
    steps: dict[str, int]
    joint_steps: int
    lower_is_better: bool
    factor: float
    from_files: tuple[str, ...]

    def world(self, seed: int) -> World:
        """Load the data of a seed."""
        ...


def fit(
    model: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    rate: float,
    keep: Collection[int] = (),
) -> dict[int, State]:
    """Train by AdamW, the rate up over some steps and then down a cosine to a tenth.

    Returns:
        The model's state after each of the steps to keep.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    warm = min(WARMUP_STEPS, max(1, steps // 5))
    kept: dict[int, State] = {}
    for step in range(steps):
        done = max(0, step - warm) / max(1, steps - warm)
        factor = (step + 1) / warm if step < warm else 0.55 + 0.45 * math.cos(math.pi * done)
        optimizer.param_groups[0]["lr"] = rate * factor
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        if step + 1 in keep:
            kept[step + 1] = copied(model)
    return kept


def measured(model: nn.Module, loss_of_example: Callable[[int], Tensor], num: int) -> Statistics:
    """Measure a model on examples of its task, as `outliermerge measure` does.

    Returns:
        `gram`: the mean of xxᵀ over the inputs x of each linear layer; `fisher`: the mean over the
        examples of each parameter's squared gradient.
    """
    grams: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def adding(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x_TC = arguments[0].detach().flatten(0, -2).double()
            grams[name] = grams.get(name, 0) + x_TC.mT @ x_TC
            counts[name] = counts.get(name, 0) + len(x_TC)

        return hook

    handles = [
        module.register_forward_pre_hook(adding(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    parameters = dict(model.named_parameters())
    fishers = {name: torch.zeros_like(each) for name, each in parameters.items()}
    for number in range(num):
        gradients = torch.autograd.grad(
            loss_of_example(number), [*parameters.values()], allow_unused=True
        )
        for total, gradient in zip(fishers.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.square() / num
    for handle in handles:
        handle.remove()
    return {
        "gram": {name: (total / counts[name]).float() for name, total in grams.items()},
        "fisher": fishers,
    }


def copied(model: nn.Module) -> State:
    """Return a copy of a model's tensors."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
