"""Table 3 of arXiv 2501.10661: LoRA with and without a trained scale, on commonsense questions.

    git clone --depth 1 https://github.com/AGI-Edgerunners/LLM-Adapters
    python evals/peft/table3.py --data LLM-Adapters          # LLaMA-7B, ranks 16 and 32
    python evals/peft/table3.py --data LLM-Adapters --model meta-llama/Llama-2-7b-hf
    python evals/peft/table3.py --small                      # a replica on a CPU, seconds

What is there is kept: the same command goes on where it was stopped, and processes that share the
models, ranks, methods or seeds among them may have one --output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from torch.nn import functional

from evals.peft import commands, commonsense, replicas
from evals.peft.runs import Key, Recipe, Records, first_line, progress, train, write_text, writing
from evals.peft.study import Arm, Texts, mean_and_error
from outliermerge.errors import OutlierMergeError

MODEL = "huggyllama/llama-7b"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
RANKS, SEEDS = (16, 32), (1,)
BATCH, EPOCHS, WARMUP, MAX_TOKENS, DROPOUT = 16, 3, 100, 256, 0.05
NUM_BEAMS, NEW_TOKENS = 4, 32
METHODS = {
    "lora": Arm("LoRA", (), "lora", {"train_scale": False}),
    "lora_s": Arm("LoRA + s", (), "lora"),
}
SMALL = Recipe("", "", 3e-2, batch=8, epochs=6, warmup=0.1, max_tokens=64)
SMALL_RANKS, SMALL_SEEDS, SMALL_TASKS, SMALL_NEW_TOKENS = (4,), (1, 2), ("boolq", "ARC-Easy"), 6

# The last part of a model's name: its name in the paper, and Table 11's rates at ranks 16 and 32.
FAMILIES = {
    "llama-7b": ("LLaMA-7B", {16: 7e-5, 32: 3e-4}),
    "llama-2-7b-hf": ("LLaMA2-7B", {16: 2e-4, 32: 3e-4}),
    "meta-llama-3-8b": ("LLaMA3-8B", {16: 3e-4, 32: 3e-4}),
}
OTHER_RATE = 3e-4
# Parameters in %; BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c, OBQA; their mean
PAPER = {
    ("LLaMA-7B", "lora", 16): (0.42, 69.9, 77.8, 75.1, 72.1, 55.8, 77.1, 62.2, 78.0, 70.9),
    ("LLaMA-7B", "lora_s", 16): (0.42, 68.1, 81.8, 77.2, 84.2, 71.3, 78.2, 62.3, 77.4, 75.1),
    ("LLaMA-7B", "lora", 32): (0.83, 68.9, 80.7, 77.4, 78.1, 78.8, 77.8, 61.3, 74.8, 74.7),
    ("LLaMA-7B", "lora_s", 32): (0.83, 69.5, 82.3, 78.1, 80.5, 81.8, 81.5, 65.6, 79.0, 77.3),
    ("LLaMA2-7B", "lora", 16): (0.41, 71.2, 83.0, 68.0, 72.1, 80.9, 73.3, 59.0, 71.8, 72.4),
    ("LLaMA2-7B", "lora_s", 16): (0.41, 72.0, 82.5, 79.3, 89.1, 83.0, 83.3, 70.2, 82.0, 80.2),
    ("LLaMA2-7B", "lora", 32): (0.82, 69.1, 80.4, 78.0, 80.6, 81.1, 80.0, 66.5, 79.2, 76.8),
    ("LLaMA2-7B", "lora_s", 32): (0.82, 71.6, 83.1, 79.5, 85.8, 82.2, 81.2, 66.4, 78.8, 78.6),
    ("LLaMA3-8B", "lora", 16): (0.35, 72.3, 86.7, 79.3, 93.5, 84.8, 87.7, 75.7, 82.8, 82.8),
    ("LLaMA3-8B", "lora_s", 16): (0.35, 72.6, 87.9, 79.9, 94.4, 85.8, 87.8, 76.6, 84.6, 83.7),
    ("LLaMA3-8B", "lora", 32): (0.70, 70.8, 85.2, 79.9, 91.7, 84.3, 84.2, 71.2, 79.0, 80.8),
    ("LLaMA3-8B", "lora_s", 32): (0.70, 71.7, 86.2, 80.1, 93.3, 84.5, 87.0, 74.4, 84.4, 82.7),
}


def family(model: str) -> tuple[str, Mapping[int, float]]:
    """Return a model's name in the paper, if it is one of the paper's, and its rates by rank."""
    last = Path(model).name
    return FAMILIES.get(last.lower(), (last, {}))


@dataclass(frozen=True)
class Written:
    """Prompts with their answers; every token but the first is to be told, the prompt's, too."""

    texts: Texts
    device: torch.device

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.texts.tokens]

    def num_terms(self, rows: Sequence[int]) -> int:
        return sum(len(self.texts.tokens[row]) - 1 for row in rows)

    def loss(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """Return the sum of the tokens' cross entropies."""
        inputs = {name: each.to(self.device) for name, each in self.texts.batch(rows)[0].items()}
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        logits = model(**inputs, use_cache=False).logits
        return functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )


def training_texts(folder: str, tokenizer: Any, max_tokens: int) -> Texts:
    """Return prompts with answers as tokens, which end by the end of text where it has room."""
    written = [commonsense.prompt(row) + row["output"] for row in commonsense.read_training(folder)]
    tokens = tokenizer(written, truncation=True, max_length=max_tokens)["input_ids"]
    for each in tokens:
        if len(each) < max_tokens and each[-1] != tokenizer.eos_token_id:
            each.append(tokenizer.eos_token_id)
    return Texts(tokens, torch.zeros(len(tokens)))


def load_model(name: str, dtype: str) -> nn.Module:
    """Return a language model that has the matrices of a Llama.

    Raises:
        OutlierMergeError: it has other ones, or not all weights.
    """
    import transformers

    model, report = commands.pretrained(
        transformers.AutoModelForCausalLM,
        name,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
    )
    if absent := sorted(report["missing_keys"]):
        raise OutlierMergeError(
            f"--model {name}: has no {absent[0]} (and {len(absent) - 1} others). Name a whole model"
        )
    there = {each.rpartition(".")[2] for each, _ in model.named_modules()}
    if lacking := sorted(set(TARGETS) - there):
        raise OutlierMergeError(
            f"--model {name}: is a {model.config.model_type}, without {', '.join(lacking)}. Table "
            "3 is of models with the matrices of a Llama"
        )
    return model


@torch.inference_mode()
def answers(
    model: Any, tokenizer: Any, rows: Sequence[commonsense.Row], *, size: int, new_tokens: int,
    title: str,
) -> list[str]:  # fmt: skip
    """Return what a model writes behind each prompt, by beam search."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        num_beams=NUM_BEAMS,
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    tokens = tokenizer([commonsense.prompt(row) for row in rows])["input_ids"]
    # Filled up on the left: turned around, filled up on the right, and turned around again.
    turned = Texts([each[::-1] for each in tokens], torch.zeros(len(tokens)))
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    found: dict[int, str] = {}
    with progress(title, len(order)) as show:
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            inputs = {name: each.flip(1) for name, each in turned.batch(chosen)[0].items()}
            inputs = {name: each.to(model.device) for name, each in inputs.items()}
            written = model.generate(**inputs, generation_config=config)
            new = written[:, inputs["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            found.update(zip(chosen, texts, strict=True))
            show(start + len(chosen), "answers")
    return [found[row] for row in range(len(order))]


def recipe_of(rank: int, options: argparse.Namespace) -> Recipe:
    """Return Table 11's recipe, with what the command line changes."""
    if options.small:
        rate = options.rate or SMALL.rate
        epochs = options.epochs or SMALL.epochs
        same = {"model": options.model, "data": options.data, "dtype": options.dtype}
        return replace(SMALL, **same, rate=rate, epochs=epochs)
    rate = options.rate or family(options.model)[1].get(rank, OTHER_RATE)
    epochs = options.epochs or EPOCHS
    return Recipe(
        options.model, options.data, rate, BATCH, epochs, WARMUP, MAX_TOKENS, options.dtype
    )


@dataclass(frozen=True)
class Command:
    """What all runs of one command share."""

    options: argparse.Namespace
    records: Records
    device: torch.device
    tokenizer: Any
    tests: Mapping[str, Sequence[commonsense.Row]]

    @cached_property
    def training(self) -> Texts:
        max_tokens = SMALL.max_tokens if self.options.small else MAX_TOKENS
        return training_texts(self.options.data, self.tokenizer, max_tokens)

    def lacking(self, key: Key, recipe: Recipe) -> list[str]:
        """Return the tests that a run has no score of, on as many questions as are asked now."""
        found = self.records.read(key, recipe) or {"scores": {}}
        numbers = {task: score["questions"] for task, score in found["scores"].items()}
        return [task for task, rows in self.tests.items() if numbers.get(task) != len(rows)]

    def run(self, key: Key, recipe: Recipe, title: str) -> None:
        """Train where that is not done, and ask what was not asked."""
        import peft

        _, method, rank, seed = key
        keys = {"r": rank, "lora_alpha": 2 * int(rank), "lora_dropout": DROPOUT}
        arm = replace(METHODS[str(method)], keys={**METHODS[str(method)].keys, **keys})
        base = load_model(recipe.model, recipe.dtype)
        total = sum(parameter.numel() for parameter in base.parameters())
        torch.manual_seed(int(seed))
        model: Any = arm.adapt(base, int(seed), {"target_modules": TARGETS}).to(self.device)
        folder = self.records.folder / "adapters" / self.records.path(key).stem
        found = self.records.read(key, recipe)
        if found is None:
            found = {"num_trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
            found["percent"] = 100 * found["num_trained"] / total
            found |= train(
                model,
                Written(self.training, self.device),
                recipe,
                seed=int(seed),
                checkpoint=self.records.checkpoint(key),
                micro_batch=self.options.micro_batch,
                title=title,
            )
            with writing(folder.parent):
                model.save_pretrained(folder)
            found["scales"] = [
                parameter.item() for name, parameter in model.named_parameters() if "_s." in name
            ]
            found["scores"] = {}
            self.records.write(key, recipe, found)
        elif not folder.is_dir():
            raise OutlierMergeError(
                f"{folder} is not there, but {self.records.path(key)} says that it was trained. "
                "Remove the latter to train it again"
            )
        else:
            try:
                weights = peft.load_peft_weights(str(folder), device="cpu")
            except Exception as error:  # of several libraries
                raise OutlierMergeError(
                    f"{folder} cannot be read: {first_line(error)}. Remove it and "
                    f"{self.records.path(key)} to train it again"
                ) from error
            left_out = peft.set_peft_model_state_dict(model, weights).missing_keys
            if absent := [name for name in left_out if "scaled_lora" in name]:
                raise OutlierMergeError(f"{folder} has no {absent[0]}: it is of another model")
        model.eval()
        for task in self.lacking(key, recipe):
            found["scores"][task] = self.ask(model, key, task, f"{title}, {task}")
            self.records.write(key, recipe, found)

    def ask(self, model: nn.Module, key: Key, task: str, title: str) -> dict[str, Any]:
        """Ask a task's questions; keep what was written, and return the score."""
        rows = self.tests[task]
        texts = answers(
            model,
            self.tokenizer,
            rows,
            size=self.options.micro_batch,
            new_tokens=SMALL_NEW_TOKENS if self.options.small else NEW_TOKENS,
            title=title,
        )
        read = [commonsense.read_answer(task, text) for text in texts]
        lines = [
            json.dumps({"written": text, "read": word, "answer": row["answer"]})
            for text, word, row in zip(texts, read, rows, strict=True)
        ]
        name = f"{self.records.path(key).stem}-{task}.jsonl"
        write_text(self.records.folder / "answers" / name, "\n".join(lines) + "\n")
        right = sum(word == row["answer"] for word, row in zip(read, rows, strict=True))
        score = 100 * right / len(rows)
        print(f"{title}: {score:.1f}", file=sys.stderr, flush=True)
        return {"score": score, "questions": len(rows), "unread": read.count("")}


def table(found: Mapping[Key, Mapping[str, Any]]) -> str:
    """Return Table 3 in Markdown, each row above the paper's."""
    titles = [title for title, _ in commonsense.TASKS.values()]
    lines = [
        "| model | trained | parameters, % | " + " | ".join(titles) + " | mean |",
        "|:--|:--|--:|" + "--:|" * (len(titles) + 1),
    ]
    for model, method, rank in sorted(
        {key[:3] for key in found}, key=lambda key: (key[0], key[2], key[1])
    ):
        runs = [run for key, run in found.items() if key[:3] == (model, method, rank)]
        cells = [
            str(model),
            f"{METHODS[str(method)].title}, r = {rank}",
            f"{runs[0]['percent']:.2f}",
        ]
        for task in commonsense.TASKS:
            scores = [run["scores"][task]["score"] for run in runs if task in run["scores"]]
            cells.append(mean_and_error(scores, 1))
        means = [
            statistics.fmean(score["score"] for score in run["scores"].values())
            for run in runs
            if set(run["scores"]) == set(commonsense.TASKS)
        ]
        lines.append("| " + " | ".join([*cells, mean_and_error(means, 1)]) + " |")
        if cited := PAPER.get((str(model), str(method), int(rank))):
            said = " | ".join(f"{score:.1f}" for score in cited[1:])
            lines.append(f"| | *paper* | {cited[0]:.2f} | {said} |")
    unread = sum(score["unread"] for run in found.values() for score in run["scores"].values())
    return "\n".join(lines) + (
        "\n\nRight answers in %; mean of the seeds ± one standard error where there are several. "
        f"An answer is the first of a task's words in what the model writes; {unread} texts had "
        "none and count as wrong. *Paper*: Table 3 of arXiv 2501.10661, cited.\n"
    )


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    made = commands.arguments(__doc__ or "", model=MODEL, output="scores/table3", micro_batch=4)
    made.add_argument("--data", help=f"a clone of {commonsense.SOURCE}")
    made.add_argument("--ranks", type=int, nargs="+", help="(default: 16 32)")
    made.add_argument("--tasks", nargs="+", choices=commonsense.TASKS, help="(default: all)")
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    made.add_argument("--limit", type=int, help="ask the first questions of each task only")
    return made


def work(options: argparse.Namespace) -> int:
    """Make the runs that are not there, and the table."""
    import transformers

    device = commands.begin(
        options,
        replicas.table3,
        tasks=(SMALL_TASKS, tuple(commonsense.TASKS)),
        ranks=(SMALL_RANKS, RANKS),
        seeds=(SMALL_SEEDS, SEEDS),
    )
    tests = {
        task: commonsense.read_test(options.data, task)[: options.limit] for task in options.tasks
    }
    tokenizer = commands.pretrained(transformers.AutoTokenizer, options.model)
    if tokenizer.eos_token_id is None:
        raise OutlierMergeError(f"--model {options.model}: its tokenizer has no end of text")
    command = Command(options, Records(options.output), device, tokenizer, tests)
    name = family(options.model)[0]
    recipes: dict[Key, Recipe] = {
        (name, method, rank, seed): recipe_of(rank, options)
        for rank in options.ranks
        for method in options.methods
        for seed in options.seeds
    }
    todo = [key for key, recipe in recipes.items() if command.lacking(key, recipe)]
    if any(command.records.read(key, recipes[key]) is None for key in todo):
        _ = command.training  # what is wrong with it is told before a model is loaded
    code = commands.make_runs({key: partial(command.run, key, recipes[key]) for key in todo})
    command.records.write_table(table(command.records.all()))
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the table; return the exit code."""
    made = parser()
    options = made.parse_args(arguments)
    commands.check_arguments(made, options)
    if not options.small and not options.data:
        made.error(f"--data: name a copy of LLM-Adapters: git clone --depth 1 {commonsense.SOURCE}")
    for flag, values in (("--ranks", options.ranks or ()), ("--limit", [options.limit or 1])):
        if min(values, default=1) < 1:
            made.error(f"{flag}: found {min(values)}, expected 1 or more")
    return commands.ended(lambda: work(options))


if __name__ == "__main__":
    raise SystemExit(main())
