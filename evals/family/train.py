"""Trains the tiny family from scratch: a base, an attributes and a mathematics specialist.

    python evals/family/train.py OUT --seed 0 --regime strong     # minutes, on two idle cores
    python evals/family/train.py OUT2 --regime mild --base OUT    # another regime on the same base

Stage 0 teaches the vision tower what lies in each patch of drawn images: without it, training
stays where the question's text alone leads. The base then learns both tasks until it answers a
part of the validation questions, and the specialists start from it, one thread each.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from evals.family import data
from evals.family.model import build_model, build_tokenizer, load, save
from evals.family.score import logits, pixel_values, prompt_ids, score

IMAGES_PER_STEP, QUESTIONS_PER_IMAGE = 32, 4
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.05, 1.0
WARMUP_STEPS = 20

TOWER_STEPS, TOWER_RATE, TOWER_IMAGES, TOWER_BATCH = 1200, 2e-3, 8000, 64

BASE_RATE = 2e-3
BASE_MIX = {"attributes": 0.3, "mathematics": 0.7}
BASE_MOST_STEPS, BASE_COOLDOWN_STEPS = 600, 40
BASE_FIRST_CHECK, BASE_CHECK_EVERY, BASE_CHECK_ROWS = 80, 20, 300
# Counting breaks out at a step that depends on the seed: the base stops soon after, with room left
# for the specialists. Accuracy on validation rows, before the cooldown.
BASE_GOAL = {"attributes": 0.5, "mathematics": 0.45}

REPLAY = 0.1  # share of the other task in a specialist's images
REGIMES = {"strong": (5e-4, 400), "mild": (3e-4, 200)}  # learning rate, steps
SPECIALISTS = {"instruct": "attributes", "maths": "mathematics"}
MODELS = ("base", *SPECIALISTS)


@dataclass
class Pool:
    """What a task's training draws from: images, and each one's encoded questions by kind."""

    pixels: torch.Tensor
    questions: list[list[list[list[int]]]]  # [image][kind][question]: prompt, answer, end

    @classmethod
    def of(cls, task: str, seed: int, most: int | None = None) -> Pool:
        """Encode the training split of a task."""
        tokenizer = build_tokenizer()
        drawn = data.scenes(task, "training", seed, most)
        known: dict[tuple[str, str], list[int]] = {}

        def encode(text: str, answer: str) -> list[int]:
            if (text, answer) not in known:
                end = tokenizer.convert_tokens_to_ids([answer, tokenizer.eos_token])
                known[text, answer] = prompt_ids(tokenizer, text) + end
            return known[text, answer]

        return cls(
            pixel_values([scene.png for scene in drawn]),
            [[[encode(*q) for q in kind] for kind in s.questions.values() if kind] for s in drawn],
        )


def _batch(
    pools: dict[str, Pool], mix: dict[str, float], generator: np.random.Generator
) -> tuple[torch.Tensor, list[list[int]]]:
    images, sequences = [], []
    for task in generator.choice(list(mix), IMAGES_PER_STEP, p=list(mix.values())):
        pool = pools[task]
        image = generator.integers(len(pool.questions))
        images.append(pool.pixels[image])
        kinds = pool.questions[image]
        for _ in range(QUESTIONS_PER_IMAGE):
            kind = kinds[generator.integers(len(kinds))]
            sequences.append(kind[generator.integers(len(kind))])
    return torch.stack(images), sequences


def _loss(model: LlavaForConditionalGeneration, batch: Any) -> torch.Tensor:
    images, sequences = batch
    scores = logits(model, images, sequences)
    each = torch.arange(len(sequences))
    ends = torch.tensor([len(sequence) for sequence in sequences])
    answer, end = (torch.tensor([s[at] for s in sequences]) for at in (-2, -1))
    loss = functional.cross_entropy(scores[each, ends - 3], answer)
    return loss + functional.cross_entropy(scores[each, ends - 2], end)


def _fit(
    parameters: list[torch.nn.Parameter],
    loss_of_step: Callable[[int], torch.Tensor],
    rate_of_step: Callable[[int], float | None],
    name: str,
) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=BETAS, weight_decay=WEIGHT_DECAY)
    losses: list[float] = []
    step = 0
    while (rate := rate_of_step(step)) is not None:
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / WARMUP_STEPS)
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        losses.append(loss.item())
        step += 1
        if step % 100 == 0:
            print(f"{name}: step {step}, loss {np.mean(losses[-50:]):.3f}", flush=True)
    return [round(float(np.mean(losses[max(0, i - 20) : i + 1])), 4) for i in _marks(len(losses))]


def _marks(count: int) -> list[int]:
    return sorted({*range(99, count, 100), count - 1})


def _cosine(rate: float, steps: int) -> Callable[[int], float | None]:
    return lambda step: rate * (1 + math.cos(math.pi * step / steps)) / 2 if step < steps else None


def patch_labels(placed: list[Any]) -> np.ndarray[Any, Any]:
    """Return [patch, (colour, shape, holds a centre)]; 0 is none, from what a drawing returned."""
    labels = np.zeros((data.IMAGE_SIZE // data.CELL, data.IMAGE_SIZE // data.CELL, 3), dtype=int)
    for colour, shape, (left, top, right, bottom) in placed:
        what = list(data.COLOURS).index(colour) + 1, data.SHAPES.index(shape) + 1
        rows = slice(int(top) // data.CELL, int(bottom) // data.CELL + 1)
        columns = slice(int(left) // data.CELL, int(right) // data.CELL + 1)
        labels[rows, columns, :2] = what
        labels[int(top + bottom) // 2 // data.CELL, int(left + right) // 2 // data.CELL, 2] = 1
    return labels.reshape(-1, 3)


def train_tower(model: LlavaForConditionalGeneration, seed: int, scale: float) -> list[float]:
    """Stage 0: teach the tower colour, shape and centre of what lies in each patch."""
    generator = data.stream(seed, "tower", "training")
    drawn = []
    for i in range(max(TOWER_BATCH, int(TOWER_IMAGES * scale))):
        if i % 2:
            drawn.append(data.draw_single(generator))
        else:
            count = generator.integers(data.FEWEST_SHAPES, 17)
            drawn.append(data.draw_grid(generator.choice(list(data.COLOURS), count), generator))
    pixels = pixel_values([data.to_png(image) for image, _ in drawn])
    labels = torch.from_numpy(np.stack([patch_labels(placed) for _, placed in drawn]))
    sizes = (len(data.COLOURS) + 1, len(data.SHAPES) + 1, 2)
    tower = model.model.vision_tower
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = torch.nn.Linear(tower.config.hidden_size, sum(sizes))

    def loss_of_step(step: int) -> torch.Tensor:
        batch = torch.from_numpy(generator.integers(0, len(pixels), TOWER_BATCH))
        scores = head(tower(pixels[batch]).last_hidden_state[:, 1:]).split(sizes, -1)
        truths = labels[batch].unbind(-1)
        losses = (
            functional.cross_entropy(score.flatten(0, 1), truth.flatten())
            for score, truth in zip(scores, truths, strict=True)
        )
        return sum(losses, torch.zeros(()))

    steps = max(1, int(TOWER_STEPS * scale))
    return _fit(
        [*tower.parameters(), *head.parameters()], loss_of_step, _cosine(TOWER_RATE, steps), "tower"
    )


def train_base(
    model: LlavaForConditionalGeneration, pools: dict[str, Pool], seed: int, scale: float
) -> dict[str, Any]:
    """Train on both tasks until validation reaches the goal, then let the rate fall to zero."""
    tokenizer = build_tokenizer()
    rows = {task: data.rows(task, "validation", seed, BASE_CHECK_ROWS) for task in data.TASKS}
    generator = data.stream(seed, "base", "training")
    checks: list[dict[str, float]] = []
    most, cooldown = (max(1, int(n * scale)) for n in (BASE_MOST_STEPS, BASE_COOLDOWN_STEPS))
    stop: list[int] = []

    def rate_of_step(step: int) -> float | None:
        if not stop and step >= BASE_FIRST_CHECK and step % BASE_CHECK_EVERY == 0:
            check = {task: score(model, tokenizer, rows[task])["accuracy"] for task in rows}
            checks.append({"step": step, **check})
            print(f"base: step {step}, validation {check}", flush=True)
            if all(check[task] >= goal for task, goal in BASE_GOAL.items()):
                stop.append(step + cooldown)
        if not stop and step == most:
            stop.append(step + cooldown)
        if not stop:
            return BASE_RATE
        return BASE_RATE * (stop[0] - step) / cooldown if step < stop[0] else None

    losses = _fit(
        list(model.parameters()),
        lambda step: _loss(model, _batch(pools, BASE_MIX, generator)),
        rate_of_step,
        "base",
    )
    return {"steps": stop[0], "losses": losses, "checks": checks}


def train_specialist(
    name: str, base: Path, out: Path, pools: dict[str, Pool], seed: int, regime: str, scale: float
) -> dict[str, Any]:
    """Fine-tune the base on one task, with a little of the other."""
    started = time.perf_counter()
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # the other specialist has the other core
    transformers.utils.logging.disable_progress_bar()
    model = load(base)
    rate, steps = REGIMES[regime]
    steps = max(1, int(steps * scale))
    mix = {t: 1 - REPLAY if t == SPECIALISTS[name] else REPLAY for t in data.TASKS}
    generator = data.stream(seed, name, "training")
    losses = _fit(
        list(model.parameters()),
        lambda step: _loss(model, _batch(pools, mix, generator)),
        _cosine(rate, steps),
        name,
    )
    save(model, out)
    return {
        "steps": steps,
        "rate": rate,
        "losses": losses,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _train_specialists(calls: list[tuple[Any, ...]], in_parallel: bool) -> list[dict[str, Any]]:
    if not in_parallel:
        return [train_specialist(*call) for call in calls]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(calls), mp_context=spawn) as executor:
        return list(executor.map(train_specialist, *zip(*calls, strict=True)))


def relative_change(base: Path, tuned: Path) -> float:
    """Return ‖tuned − base‖ / ‖base‖ over all weights."""
    a, b = load(base).state_dict(), load(tuned).state_dict()
    change = sum(float((b[name] - a[name]).double().square().sum()) for name in a)
    return math.sqrt(change / sum(float(t.double().square().sum()) for t in a.values()))


def train_family(
    out: Path,
    seed: int,
    regime: str,
    *,
    base: Path | None = None,
    scale: float = 1.0,
    in_parallel: bool = True,
) -> dict[str, Any]:
    """Train base, instruct and maths into the folder `out`, and write training.json beside them.

    Args:
        out: a folder that does not exist; it has its name only when all is complete.
        seed: of the weights, the drawn scenes, and the order of the training rows.
        regime: a key of REGIMES, how far the specialists move from the base.
        base: a folder of an earlier run with the same seed, whose base is used again.
        scale: of the number of steps, images and validation rows; less than 1 only in tests.
        in_parallel: train the specialists in processes of one thread each, not one after the other.

    Raises:
        ValueError: `out` exists, or the earlier run had another seed.
    """
    if out.exists():
        raise ValueError(f"{out} exists")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    transformers.utils.logging.disable_progress_bar()
    most = None if scale == 1 else 200
    pools = {task: Pool.of(task, seed, most) for task in data.TASKS}
    record: dict[str, Any] = {
        "seed": seed,
        "regime": regime,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if base is not None:
        earlier = json.loads((base / "training.json").read_text())
        if earlier["seed"] != seed:
            raise ValueError(f"{base} has the seed {earlier['seed']}, not {seed}")
        shutil.copytree(base / "base", partial / "base")
        record |= {stage: earlier[stage] for stage in ("tower", "base")}
    else:
        started = time.perf_counter()
        model = build_model(seed)
        record["tower"] = {"losses": train_tower(model, seed, scale)}
        record["tower"]["seconds"] = round(time.perf_counter() - started, 1)
        started = time.perf_counter()
        record["base"] = train_base(model, pools, seed, scale)
        record["base"]["seconds"] = round(time.perf_counter() - started, 1)
        save(model, partial / "base")
    tuned = _train_specialists(
        [
            (name, partial / "base", partial / name, pools, seed, regime, scale)
            for name in SPECIALISTS
        ],
        in_parallel,
    )
    for name, result in zip(SPECIALISTS, tuned, strict=True):
        change = relative_change(partial / "base", partial / name)
        record[name] = {**result, "relative_change": round(change, 4)}
    tokenizer = build_tokenizer()
    num_rows = data.ROWS if scale == 1 else BASE_CHECK_ROWS // 10
    validation = {task: data.rows(task, "validation", seed, num_rows) for task in data.TASKS}
    record["validation"] = {
        name: {t: score(load(partial / name), tokenizer, validation[t]) for t in data.TASKS}
        for name in MODELS
    }
    (partial / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in partial.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    partial.rename(out)
    return record


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--regime", choices=REGIMES, default="strong")
    parser.add_argument("--base", type=Path, help="a folder of an earlier run, to reuse its base")
    options = parser.parse_args()
    try:
        record = train_family(options.out, options.seed, options.regime, base=options.base)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    for name, scores in record["validation"].items():
        print(name, {task: s["accuracy"] for task, s in scores.items()})


if __name__ == "__main__":
    main()
