"""What the commands of the paper's tables share: runs that go on where they were stopped.

A run is one training and its scores. It has a record in `runs/`, and while it is trained a
checkpoint in `checkpoints/`. A command makes the runs that have no record yet.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from evals.peft.study import batches, factor
from outliermerge.cli.terminal import counting_bars
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.storage.failures import naming
from outliermerge.storage.files import write_whole

CLIP = 1.0
LOG_SECONDS = 60.0  # between two lines of progress where there is no terminal
CHECKPOINT_SECONDS = 600.0

Key = tuple[str | int, ...]


class Diverged(OutlierMergeError):
    """A training whose loss is no number any more: the end of this run, not of the others."""


@dataclass(frozen=True)
class Recipe:
    """What a trained model depends on, besides its method and seed.

    Attributes:
        model, data: ids of the hub, or folders.
        rate: the highest learning rate.
        warmup: the share of the steps in which the rate goes up; their number if it is 1 or more.
        max_tokens: what is longer is cut.
        dtype: of the weights that are not trained.
    """

    model: str
    data: str
    rate: float
    batch: int
    epochs: int
    warmup: float
    max_tokens: int
    dtype: str = "float32"


class Examples(Protocol):
    """What is trained on."""

    lengths: Sequence[int]  # of each, in tokens

    def num_terms(self, rows: Sequence[int]) -> int:
        """Return over how many terms the loss of these examples is a mean."""
        ...

    def loss(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """Return the sum of these terms."""
        ...


# Records and checkpoints.


class Records:
    """The folder of a table: a record for each run, the checkpoints, and the table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: Key) -> Path:
        """Return where a run's record is."""
        return self.folder / "runs" / f"{_name(key)}.json"

    def checkpoint(self, key: Key) -> Path:
        """Return where a run's checkpoint is."""
        return self.folder / "checkpoints" / f"{_name(key)}.pt"

    def read(self, key: Key, recipe: Recipe) -> dict[str, Any] | None:
        """Return what a run has found; None if it has no record.

        Raises:
            OutlierMergeError: the record is damaged, or of another recipe.
        """
        path = self.path(key)
        if not path.exists():
            return None
        record = _read(path)
        _same(record["recipe"], asdict(recipe), path)
        found: dict[str, Any] = record["found"]
        return found

    def write(self, key: Key, recipe: Recipe, found: Mapping[str, Any]) -> None:
        """Record what a run has found: from then on it needs no checkpoint."""
        record = {"key": key, "recipe": asdict(recipe), "found": found}
        write_text(self.path(key), json.dumps(record, indent=1) + "\n")
        checkpoint = self.checkpoint(key)
        for path in checkpoint.parent.glob(f"{checkpoint.name}*"):  # and what killed runs left
            path.unlink()

    def all(self, **same: str) -> dict[Key, dict[str, Any]]:
        """Return what the runs of this folder have found, by their keys.

        Args:
            same: what all recipes must have, since the runs are rows of one table.

        Raises:
            OutlierMergeError: a record is damaged, or has something else.
        """
        found = {}
        for path in sorted((self.folder / "runs").glob("*.json")):
            record = _read(path)
            _same({name: record["recipe"].get(name) for name in same}, same, path)
            found[tuple(record["key"])] = record["found"]
        return found

    def write_table(self, table: str) -> None:
        """Write the table, and all records as one file."""
        import peft
        import transformers

        paths = sorted((self.folder / "runs").glob("*.json"))
        results = {
            "date": date.today().isoformat(),
            "machine": platform.machine(),
            "versions": {m.__name__: str(m.__version__) for m in (torch, transformers, peft)},
            "runs": [_read(path) for path in paths],
        }
        write_text(self.folder / "results.json", json.dumps(results, indent=1) + "\n")
        write_text(self.folder / "table.md", table)
        print(table)
        print(f"written to {self.folder / 'table.md'} and {self.folder / 'results.json'}")


def _name(key: Key) -> str:
    return "-".join(str(part).replace("/", "_") for part in key)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    kinds = {"key": list, "recipe": dict, "found": dict}
    if isinstance(record, dict) and all(isinstance(record.get(k), t) for k, t in kinds.items()):
        return record
    raise OutlierMergeError(f"{path} is not the record of a run. Remove it to make the run again")


def _same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    differing = [
        f"{name} {shown(before.get(name))}, now {shown(now.get(name))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise OutlierMergeError(
            f"{path} is of another recipe: {'; '.join(differing)}. Name another --output, or "
            "remove the file"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    with naming(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint so that it is there whole or not at all.

    Raises:
        OutlierMergeError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            torch.save(dict(state), part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one message that torch or safetensors cannot write a file or folder."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free / 1e6
        raise OutlierMergeError(
            f"{path} cannot be written, with {free:,.1f} MB free there: {first_line(error)}"
        ) from error


def load(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of the training that `about` describes.

    Raises:
        OutlierMergeError: it is damaged, or of another training.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["about"]
    except Exception as error:  # of zip, pickle, torch and the file system
        raise OutlierMergeError(
            f"{path} cannot be read: {first_line(error)}. Remove it to train from the beginning"
        ) from error
    _same(found, about, path)
    return state


# Training.


def train(
    model: nn.Module,
    examples: Examples,
    recipe: Recipe,
    *,
    seed: int,
    checkpoint: Path,
    micro_batch: int,
    title: str,
) -> dict[str, Any]:
    """Train what is not frozen, by AdamW without weight decay; go on from a checkpoint.

    The rate goes up linearly and then down to 0. The gradient is that of the mean over a batch,
    added up over parts of `micro_batch` examples, and clipped at a norm of 1. A finished training
    leaves its last checkpoint.

    Returns:
        The steps, the mean loss of each epoch, and the seconds of all its parts.

    Raises:
        Diverged: the loss or the gradient is no number.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(trained.values())).device
    optimizer = torch.optim.AdamW(trained.values(), lr=recipe.rate, weight_decay=0.0)
    per_epoch = math.ceil(len(examples.lengths) / recipe.batch)
    steps = per_epoch * recipe.epochs
    warm = round(recipe.warmup if recipe.warmup >= 1 else recipe.warmup * steps)
    warm = max(1, min(warm, steps - 1))
    about = {**asdict(recipe), "seed": seed, "examples": len(examples.lengths)}
    state: dict[str, Any] = {"step": 0, "losses": [0.0] * recipe.epochs, "seconds": 0.0}
    if checkpoint.exists():
        state = load(checkpoint, about)
        _restore(state, trained, optimizer, device, checkpoint)
    losses: list[float] = state["losses"]
    started = saved = time.monotonic()

    def keep(step: int) -> None:
        seconds = state["seconds"] + time.monotonic() - started
        found = {"about": about, "step": step, "losses": losses, "seconds": seconds}
        found["trained"] = {name: parameter.detach() for name, parameter in trained.items()}
        found["optimizer"] = optimizer.state_dict()
        found["random"] = _random_state(device)
        save(checkpoint, found)

    model.train()
    order: list[list[int]] = []
    with progress(title, steps, state["step"]) as show:
        for step in range(state["step"], steps):
            epoch, place = divmod(step, per_epoch)
            if not order or place == 0:
                order = batches(examples.lengths, recipe.batch, seed, epoch)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * factor(step, steps, warm)
            rows = order[place]
            terms, total = examples.num_terms(rows), torch.zeros((), device=device)
            for start in range(0, len(rows), micro_batch):
                loss = examples.loss(model, rows[start : start + micro_batch]) / terms
                loss.backward()
                total += loss.detach()
            norm = nn.utils.clip_grad_norm_(trained.values(), CLIP)
            if not math.isfinite(total) or not math.isfinite(norm):
                checkpoint.unlink(missing_ok=True)
                raise Diverged(
                    f"{title}: at step {step + 1} of {steps} the loss is {float(total):g} and the "
                    f"gradient's norm {float(norm):g}. Nothing of this run is kept; try a smaller "
                    f"--rate than {recipe.rate:g}"
                )
            optimizer.step()
            optimizer.zero_grad()
            losses[epoch] += float(total) / per_epoch
            show(step + 1, f"loss {float(total):.3f}")
            if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                keep(step + 1)
                saved = time.monotonic()
    seconds = state["seconds"] + time.monotonic() - started
    if state["step"] < steps:
        keep(steps)
    model.eval()
    return {"steps": steps, "losses": losses, "train_seconds": round(seconds, 1)}


def _restore(
    state: Mapping[str, Any],
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    path: Path,
) -> None:
    shapes = {name: parameter.shape for name, parameter in trained.items()}
    if {name: tensor.shape for name, tensor in state["trained"].items()} != shapes:
        raise OutlierMergeError(
            f"{path} is of another model. Remove it to train from the beginning"
        )
    for name, parameter in trained.items():
        parameter.data.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"]["cpu"])
    if device.type == "cuda" and "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"], device)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


@contextmanager
def progress(title: str, total: int, first: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Show a bar with the time left at a terminal, else a line every minute.

    Yields:
        A function that takes how much is done, and a note.
    """
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    began = said = time.monotonic()
    with counting_bars(console, quiet=False) as bars:
        bar = bars.add_task(escape(title), total=total, completed=first)

        def show(done: int, note: str) -> None:
            nonlocal said
            bars.update(bar, completed=done, description=escape(f"{title}, {note}"))
            now = time.monotonic()
            if not console.is_terminal and now - said >= LOG_SECONDS:
                said = now
                left = (now - began) / max(1, done - first) * (total - done)
                line = f"{title}: {done} of {total}, {note}, {left / 60:.0f} minutes left"
                print(line, file=sys.stderr, flush=True)

        yield show


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
