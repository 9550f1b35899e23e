"""Table 2 of arXiv 2501.10661: DeBERTaV3 on GLUE, trained by amounts of noise and otherwise.

    python evals/peft/table2.py                      # the whole table: a GPU, the hub, days
    python evals/peft/table2.py --tasks rte mrpc --methods head noise --seeds 1
    python evals/peft/table2.py --small              # a replica on a CPU, seconds

What is there is kept: the same command goes on where it was stopped, and processes that share the
tasks, methods or seeds among them may have one --output.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from evals.peft import commands, glue, replicas
from evals.peft.runs import Diverged, Key, Recipe, Records, train
from evals.peft.study import Arm, Texts, mean_and_error
from outliermerge.errors import OutlierMergeError

MODEL, TYPE = "microsoft/deberta-v3-base", "deberta-v2"
TARGETS = ["query_proj", "key_proj", "value_proj", "dense"]  # Q, K, V, O, up, down
WHERE = {"target_modules": TARGETS}
HEAD = ("pooler.", "classifier.")
BATCH, WARMUP, SEEDS = 32, 0.1, (1, 2, 3, 4, 5)
FULL_RATE = 2e-5  # the paper has none for training all parameters
SMALL = Recipe("", "", 1e-2, batch=8, epochs=3, warmup=WARMUP, max_tokens=32)
SMALL_TASKS, SMALL_SEEDS = ("cola", "stsb"), (1, 2)

METHODS = {
    "head": Arm("head alone", ()),
    "full": Arm("all parameters", (), "full"),
    "svdiff": Arm("SVDiff", (), "svdiff"),
    "noise": Arm("noise, W + sN", (), "noise"),
    "lora": Arm("LoRA, r = 8", (), "lora", {"r": 8, "train_scale": False}),
    "gaussian": Arm("noise alone, sN", (), "gaussian"),
}
# MNLI, SST-2, CoLA, QQP, QNLI, RTE, MRPC, STS-B, all
PAPER = {
    "head": ("0", 65.37, 83.72, 52.93, 78.37, 72.43, 62.82, 75.74, 82.12, 71.69),
    "full": ("184M", 89.90, 95.63, 69.19, 92.40, 94.03, 83.75, 89.46, 91.60, 88.24),
    "svdiff": ("55,296", 68.32, 84.28, 55.21, 81.91, 75.86, 66.06, 76.47, 82.82, 73.87),
    "noise": ("72", 69.49, 88.53, 61.34, 84.02, 83.58, 71.12, 83.58, 87.29, 78.62),
    "gaussian": ("–", 35.45, 66.97, 7.11, 64.86, 57.04, 52.35, 69.36, 8.91, 45.13),
}


class Spectral(nn.Module):
    """U · relu(σ + δ) · V in place of a weight U · σ · V, with δ trained (arXiv 2303.11305)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        for name, tensor in (("left", left), ("values", values), ("right", right)):
            self.register_buffer(name, tensor)
        self.delta = nn.Parameter(torch.zeros_like(values))

    def forward(self, weight: Tensor) -> Tensor:
        # As a change of the weight, so that with δ = 0 it is the weight to the bit.
        change = torch.relu(self.values + self.delta) - self.values
        return weight + (self.left * change) @ self.right


@dataclass(frozen=True)
class Labelled:
    """Texts with labels on a device."""

    texts: Texts
    device: torch.device

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.texts.tokens]

    def num_terms(self, rows: Sequence[int]) -> int:
        return len(rows)

    def loss(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """Return the sum of cross entropies; of squares where a number is predicted."""
        inputs, labels = self.texts.batch(rows)
        logits = model(**_moved(inputs, self.device)).logits
        labels = labels.to(self.device)
        if labels.is_floating_point():
            return (logits[:, 0] - labels).square().sum()
        return functional.cross_entropy(logits, labels, reduction="sum")

    @torch.inference_mode()
    def logits(self, model: nn.Module, size: int) -> np.ndarray:
        """Return what a model says of each text."""
        lengths, found = self.lengths, {}
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            said = model(**_moved(self.texts.batch(rows)[0], self.device)).logits
            found.update(zip(rows, said.float().cpu().numpy(), strict=True))
        return np.stack([found[row] for row in range(len(order))])


def _moved(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def load_model(name: str, task: glue.Task, seed: int) -> nn.Module:
    """Return a pretrained DeBERTa with a new head, which the seed draws.

    Raises:
        OutlierMergeError: it is another model, or not a pretrained one.
    """
    import transformers

    kind = commands.pretrained(transformers.AutoConfig, name).model_type
    if kind != TYPE:
        raise OutlierMergeError(
            f"--model {name}: its model_type is {kind}, expected {TYPE}: Table 2 is of DeBERTaV3"
        )
    torch.manual_seed(seed)
    model, report = commands.pretrained(
        transformers.AutoModelForSequenceClassification,
        name,
        num_labels=task.num_labels,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    new = {*report["missing_keys"], *(each[0] for each in report["mismatched_keys"])}
    head = {each for each, _ in model.named_parameters() if each.startswith(HEAD)}
    if absent := sorted(new - head):
        raise OutlierMergeError(
            f"--model {name}: has no {absent[0]} (and {len(absent) - 1} others), which would be "
            "trained from random values. Name a whole pretrained DeBERTa"
        )
    if present := sorted(head - new):
        raise OutlierMergeError(
            f"--model {name}: has {present[0]}, so it is tuned to a task already. Name the "
            f"pretrained model, such as {MODEL}"
        )
    return model


def adapt(model: Any, method: str, seed: int) -> int:
    """Freeze what a method does not train; return the number of what it trains of the encoder."""
    arm, name, encoder = METHODS[method], model.base_model_prefix, model.base_model
    if arm.kind == "svdiff":
        encoder.requires_grad_(False)
        for layer in _matrices(encoder):
            spectral = Spectral(layer.weight.data)
            nn.utils.parametrize.register_parametrization(layer, "weight", spectral)
    elif arm.kind == "gaussian":
        encoder = METHODS["noise"].adapt(encoder, seed, WHERE)
        for layer in encoder.modules():
            if hasattr(layer, "scaled_noise_s"):
                layer.base_layer.weight.data.zero_()
                layer.scaled_noise_s["default"].data.fill_(1.0)
    else:
        encoder = arm.adapt(encoder, seed, WHERE)
    setattr(model, name, encoder)
    return sum(p.numel() for p in encoder.parameters() if p.requires_grad)


def _matrices(encoder: nn.Module) -> list[nn.Linear]:
    return [
        layer
        for name, layer in encoder.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in TARGETS
    ]


def recipe_of(task: str, method: str, options: argparse.Namespace) -> Recipe:
    """Return Table 10's recipe, with what the command line changes."""
    known = glue.TASKS[task]
    rate = options.rate or (FULL_RATE if method == "full" else known.rate)
    recipe = Recipe(
        options.model, options.data or glue.HUB, rate, BATCH, options.epochs or known.epochs,
        WARMUP, known.max_tokens,
    )  # fmt: skip
    if not options.small:
        return recipe
    return Recipe(
        recipe.model, recipe.data, options.rate or SMALL.rate, SMALL.batch,
        options.epochs or SMALL.epochs, WARMUP, SMALL.max_tokens,
    )  # fmt: skip


def one_run(
    key: Key, recipe: Recipe, parts: Mapping[str, Texts], records: Records, device: torch.device,
    micro_batch: int, title: str,
) -> None:  # fmt: skip
    """Train and score, and record it."""
    name, method, seed = str(key[0]), str(key[1]), int(key[2])
    task = glue.TASKS[name]
    model = load_model(recipe.model, task, seed)
    num_trained = adapt(model, method, seed)
    model.to(device)
    found: dict[str, Any] = {"num_trained": num_trained}
    found |= train(
        model,
        Labelled(parts["train"], device),
        recipe,
        seed=seed,
        checkpoint=records.checkpoint(key),
        micro_batch=micro_batch,
        title=title,
    )
    for split in filter(None, (task.validation, task.beside)):
        logits = Labelled(parts[split], device).logits(model, micro_batch)
        if not np.isfinite(logits).all():
            records.checkpoint(key).unlink()
            raise Diverged(f"{title}: the trained model says NaN or infinity. Nothing is kept")
        found[split] = glue.score(task, logits, parts[split].ratings.numpy())
    found["score"] = found[task.validation][task.metrics[0]]
    records.write(key, recipe, found)
    print(f"{title}: {task.metrics[0]} {found['score']:.2f}", file=sys.stderr, flush=True)


def table(found: Mapping[Key, Mapping[str, Any]]) -> str:
    """Return Table 2 in Markdown, each method's row above the paper's."""
    titles = [task.title for task in glue.TASKS.values()]
    lines = [
        "| trained | parameters | " + " | ".join(titles) + " | mean |",
        "|:--|--:|" + "--:|" * (len(titles) + 1),
    ]
    for method, arm in METHODS.items():
        scores: dict[str, dict[Any, float]] = {name: {} for name in glue.TASKS}
        own = {key: run for key, run in found.items() if key[1] == method}
        for (name, _, seed), run in own.items():
            scores[str(name)][seed] = run["score"]
        if own:
            counts = sorted({run["num_trained"] for run in own.values()})
            cells = [arm.title, " / ".join(f"{count:,}" for count in counts)]
            cells += [mean_and_error([*each.values()]) for each in scores.values()]
            shared = set.intersection(*(set(each) for each in scores.values()))
            means = [statistics.fmean(each[s] for each in scores.values()) for s in sorted(shared)]
            lines.append("| " + " | ".join([*cells, mean_and_error(means)]) + " |")
        if own and method in PAPER:
            count, *cited = PAPER[method]
            lines.append(f"| *paper* | {count} | " + " | ".join(f"{s:.2f}" for s in cited) + " |")
    seeds = len({key[2] for key in found})
    return "\n".join(lines) + (
        f"\n\nMean of {seeds} {'seed' if seeds == 1 else 'seeds'} ± one standard error, of the "
        "last weights on the development set; parameters are without the head's. CoLA: Matthews's "
        "correlation; STS-B: the mean of Pearson's and Spearman's; otherwise accuracy. *Paper*: "
        "Table 2 of arXiv 2501.10661, cited.\n"
    )


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    made = commands.arguments(__doc__ or "", model=MODEL, output="scores/table2", micro_batch=BATCH)
    made.add_argument("--data", help=f"a folder with TASK/SPLIT.jsonl (default: {glue.HUB})")
    made.add_argument("--tasks", nargs="+", choices=glue.TASKS, help="(default: all)")
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return made


def work(options: argparse.Namespace) -> int:
    """Make the runs that are not there, and the table."""
    import transformers

    device = commands.begin(
        options,
        replicas.table2,
        tasks=(SMALL_TASKS, tuple(glue.TASKS)),
        seeds=(SMALL_SEEDS, SEEDS),
    )
    records = Records(options.output)
    same = {"model": options.model, "data": options.data or glue.HUB}
    records.all(**same)
    recipes: dict[Key, Recipe] = {
        (name, method, seed): recipe_of(name, method, options)
        for name in options.tasks
        for method in options.methods
        for seed in options.seeds
    }
    todo = [key for key, recipe in recipes.items() if records.read(key, recipe) is None]

    @lru_cache(1)  # tasks come one after the other
    def parts(name: str) -> dict[str, Texts]:
        task = glue.TASKS[name]
        tokenizer = commands.pretrained(transformers.AutoTokenizer, options.model)
        splits = ("train", task.validation, *filter(None, [task.beside]))
        size = recipes[name, options.methods[0], options.seeds[0]].max_tokens
        rows = {split: glue.read(name, split, options.data) for split in splits}
        return {split: glue.texts(task, rows[split], tokenizer, size) for split in splits}

    # What is wrong with any of them is told before the first is trained on.
    for name in dict.fromkeys(str(key[0]) for key in todo):
        parts(name)

    def run(key: Key, title: str) -> None:
        one_run(key, recipes[key], parts(str(key[0])), records, device, options.micro_batch, title)

    code = commands.make_runs({key: partial(run, key) for key in todo})
    records.write_table(table(records.all(**same)))
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the table; return the exit code."""
    made = parser()
    options = made.parse_args(arguments)
    commands.check_arguments(made, options)
    return commands.ended(lambda: work(options))


if __name__ == "__main__":
    raise SystemExit(main())
