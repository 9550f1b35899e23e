"""A small LLaVA that knows the right answer to every question of some tasks, and one that is mute.

Really trained, on what lmms-eval's chat path would feed it, until greedy decoding gives every
answer to the letter. Run as `python oracle_llava.py TASKS_FOLDER RIGHT MUTE TASK...` in the folder
with the data sets, in a process of its own: importing lmms-eval changes torch's global settings.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from PIL import Image
from torch import Tensor

IMAGE_SIZE, PATCH_SIZE = 32, 16
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LANGUAGE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4}
NUM_STEPS, LEARNING_RATE = 400, 3e-3
# Far below 0.7, the loss of a coin toss: the greedy answers then hold in 8 bit too.
GOOD_LOSS = 0.003
PAD, BOS, EOS, UNKNOWN, IMAGE = SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
TEMPLATE = (
    "{% for message in messages %}USER: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# A word or a mark with the space before it; put together again, nothing is lost.
PIECE = r" ?\w+| ?[^\w\s]|\s"


class Question(NamedTuple):
    """What a model is asked, as messages, and the text that is right."""

    messages: list[dict[str, Any]]
    images: list[Image.Image]
    answer: str


def save_oracles(
    python: Path, data: Path, tasks_folder: Path, tasks: Sequence[str], *, right: Path, mute: Path
) -> None:
    """Train on the tasks' questions, by a program that stands for `python`, and save both."""
    process = subprocess.run(
        [python, __file__, tasks_folder, right, mute, *tasks],
        cwd=data,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr


def find_questions(tasks_folder: str, names: Sequence[str]) -> list[Question]:
    """Ask lmms-eval for the messages that its chat models get."""
    from lmms_eval.protocol import ChatMessages
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("WARNING", include_path=tasks_folder, model_name="llava_hf")
    questions = []
    for name in names:
        task = manager.load_task_or_group([name], "chat")[name]
        for doc in task.eval_docs:
            chat = ChatMessages(messages=task.doc_to_messages(doc))
            images, _, _ = chat.extract_media()
            questions.append(Question(chat.model_dump()["messages"], images, answer(task, doc)))
    return questions


def answer(task: Any, doc: Mapping[str, Any]) -> str:
    """The right answer in the form asked for: a letter where MathVista has a choice's text."""
    if doc.get("choices") and doc["answer"] in doc["choices"]:
        return chr(ord("A") + doc["choices"].index(doc["answer"]))
    return str(task.doc_to_target(doc))


def make_processor(questions: Sequence[Question]) -> transformers.LlavaProcessor:
    """Return a processor whose tokenizer has a token for each piece of the texts."""
    texts = ["USER: \nASSISTANT:", *(question.answer for question in questions)]
    for question in questions:
        for message in question.messages:
            texts += [" " + part["text"] + " " for part in message["content"] if "text" in part]
    # A piece may stand after another character than in these texts: with and without its space.
    found = {piece.strip(" ") for text in texts for piece in re.findall(PIECE, text)}
    pieces = {start + piece for piece in found for start in ("", " ")} - {""}
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *sorted(pieces)])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(PIECE), behavior="isolated"
    )
    words.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )
    pixels = transformers.CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    )
    return transformers.LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token=IMAGE,
    )


def make_model(
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> transformers.LlavaForConditionalGeneration:
    """Return the model with random weights."""
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "pad")}
    ids["eos_token_id"] = tokenizer.eos_token_id
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, **TOWER, **HEADS
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer), tie_word_embeddings=False, **LANGUAGE, **HEADS, **ids
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(**ids)
    return model


def train(
    model: transformers.LlavaForConditionalGeneration,
    prompts: Sequence[Mapping[str, Tensor]],
    answers: Sequence[Sequence[int]],
) -> None:
    """Fit the answers, each with its end token, until they are nearly certain."""
    rows = [
        torch.cat([prompt["input_ids"][0], torch.tensor(tokens)])
        for prompt, tokens in zip(prompts, answers, strict=True)
    ]
    # On the right, and never looked at by what stands before it.
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.full_like(tokens, -100)
    for row, prompt, wanted in zip(labels, prompts, answers, strict=True):
        start = prompt["input_ids"].shape[1]
        row[start : start + len(wanted)] = torch.tensor(wanted)
    pixels = torch.cat([prompt["pixel_values"] for prompt in prompts])
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0)
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 20)
        loss = model(input_ids=tokens, pixel_values=pixels, labels=labels).loss
        if loss < GOOD_LOSS:
            return
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    raise AssertionError(f"after {NUM_STEPS} steps the loss is {loss:.4f}")


@torch.no_grad()
def silence(
    model: transformers.LlavaForConditionalGeneration,
    prompts: Sequence[Mapping[str, Tensor]],
    end: int,
) -> None:
    """Make the head emit the end token after every prompt: its logit is 1 there, the others 0."""
    states = [model(**prompt, output_hidden_states=True).hidden_states[-1][0, -1]
              for prompt in prompts]  # fmt: skip
    head = model.get_output_embeddings().weight
    head.zero_()
    head[end] = torch.linalg.pinv(torch.stack(states)).sum(1)


def decode(
    model: transformers.LlavaForConditionalGeneration,
    processor: transformers.LlavaProcessor,
    prompts: Sequence[Mapping[str, Tensor]],
) -> list[str]:
    """What greedy decoding answers."""
    answers = []
    for prompt in prompts:
        tokens = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0]
        answer = tokens[prompt["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(answer, skip_special_tokens=True))
    return answers


def main(tasks_folder: str, right: str, mute: str, *tasks: str) -> None:
    """Train, check and save."""
    questions = find_questions(tasks_folder, tasks)
    processor = make_processor(questions)
    model = make_model(processor.tokenizer)
    prompts = [
        processor(
            images=question.images,
            text=processor.apply_chat_template(
                question.messages, tokenize=False, add_generation_prompt=True
            ),
            return_tensors="pt",
        )
        for question in questions
    ]
    answers = [question.answer for question in questions]
    unknown, end = processor.tokenizer.unk_token_id, processor.tokenizer.eos_token_id
    assert not any((prompt["input_ids"] == unknown).any() for prompt in prompts)
    train(model, prompts, [[*processor.tokenizer(text).input_ids, end] for text in answers])
    model.eval()
    assert decode(model, processor, prompts) == answers
    model.save_pretrained(right)
    processor.save_pretrained(right)
    silence(model, prompts, end)
    assert decode(model, processor, prompts) == [""] * len(answers)
    model.save_pretrained(mute)
    processor.save_pretrained(mute)


if __name__ == "__main__":
    main(*sys.argv[1:])
