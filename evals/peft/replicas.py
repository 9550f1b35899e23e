"""Small replicas of the models and data of the paper's tables, in the same files and formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from evals.peft import commonsense, glue
from outliermerge.rng import uniform

NUM_TRAIN, NUM_TEST = 48, 16
GOOD, BAD = ("fine", "bright", "warm"), ("dull", "broken", "cold")
OTHER = tuple("the a film day road was is and very quite so rather not it".split())
TRAINED = ("boolq", "ARC-Easy")  # few words, so that they are learnt in a few steps
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")


def table2(folder: Path) -> tuple[str, str]:
    """Make a DeBERTa-v2 of random weights and all tasks of GLUE; return the folders of both."""
    from transformers import DebertaV2Config, DebertaV2Model

    model, data = folder / "model", folder / "data"
    for name, task in glue.TASKS.items():
        for split in filter(None, ("train", task.validation, task.beside)):
            size = NUM_TRAIN if split == "train" else NUM_TEST
            rows = [_glue_row(task, f"{name}/{split}", number) for number in range(size)]
            _write(data / name / f"{split}.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    size = _save_tokenizer(
        model, (*GOOD, *BAD, *OTHER), "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"
    )
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        type_vocab_size=0,
        max_position_embeddings=64,
        # As DeBERTaV3-base has it.
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        pooler_hidden_size=32,
        initializer_range=0.2,  # so large that texts differ and can be told apart
    )
    DebertaV2Model(config).save_pretrained(model)
    return str(model), str(data)


def table3(folder: Path) -> tuple[str, str]:
    """Make a Llama of random weights and the commonsense questions; return the folders of both."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, data = folder / "model", folder / "data"
    tests = {
        task: [_question(task, f"{task}/test", number) for number in range(NUM_TEST)]
        for task in commonsense.TASKS
    }
    trained = [
        _question(task, f"{task}/train", number)
        for task in TRAINED
        for number in range(NUM_TRAIN // len(TRAINED))
    ]
    _write(data / commonsense.TRAINING, json.dumps(trained))
    for task, rows in tests.items():
        _write(data / "dataset" / task / "test.json", json.dumps(rows))
    texts = [commonsense.prompt(row) + row["output"] for row in trained]
    words = {word for text in texts for word in _words(text)}
    words |= {word for _, choices in commonsense.TASKS.values() for word in choices}
    size = _save_tokenizer(model, sorted(words), "[CLS] $A", "[CLS] $A $B")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=SPECIAL.index("[CLS]"),
        eos_token_id=SPECIAL.index("[SEP]"),
        initializer_range=0.1,
        pad_token_id=SPECIAL.index("[PAD]"),
    )
    LlamaForCausalLM(config).save_pretrained(model)
    return str(model), str(data)


def _drawn(name: str, number: int) -> Callable[[Any], Any]:
    """Return a function that draws one of several things, the same for each name and number."""
    values = iter(uniform(0, f"replica/{name}", 64 * number, 64 * (number + 1)).tolist())
    return lambda things: things[int(next(values) * len(things))]


def _glue_row(task: glue.Task, name: str, number: int) -> dict[str, Any]:
    """Return texts of which the first has one telling word, which the label depends on."""
    draw = _drawn(name, number)
    is_good = draw((False, True))
    row: dict[str, Any] = {}
    for key in task.texts:
        words = [draw(OTHER) for _ in range(draw(range(4, 9)))]
        words.insert(draw(range(len(words))), draw(GOOD if is_good else BAD))
        row[key] = " ".join(words)
    if task.num_labels == 1:
        return row | {"label": round(3.0 * is_good + 2.0 * draw((0.1, 0.5, 0.9)), 3), "idx": number}
    return row | {"label": int(is_good), "idx": number}


def _question(task: str, name: str, number: int) -> dict[str, Any]:
    draw = _drawn(name, number)
    choices = commonsense.TASKS[task][1]
    answer = draw(choices)
    words = " ".join(draw(OTHER) for _ in range(draw(range(4, 9))))
    instruction = f"{words}\n\nAnswer format: {'/'.join(choices)}"
    output = f"the correct answer is {answer}"
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


def _words(text: str) -> list[str]:
    from tokenizers.pre_tokenizers import Whitespace

    return [word for word, _ in Whitespace().pre_tokenize_str(text)]


def _save_tokenizer(folder: Path, words: Iterable[str], single: str, pair: str) -> int:
    """Save a tokenizer that knows these words; return the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(each, ids[each]) for each in ("[CLS]", "[SEP]")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    return len(ids)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
