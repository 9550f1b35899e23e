"""DynaMath (arXiv 2411.00836) with short answers, scored by the published rules.

Source of the scoring: `evaluation/opensource_json_eval.py` in github.com/DynaMath/DynaMath at
65a346a. Its prompt asks for JSON with a "solution" and a "short answer". LLaVA-1.5 and its kin were
trained to answer shortly when a last line says so (LLaVA's docs/Evaluation.md) and rarely write
JSON, so the prompt here is the question and one such line: the letter, a number to three decimal
places, which is what the tolerance needs and the published prompt asks for, or a word or phrase.

The short answer within a response is "short answer" of the JSON object from the first `{` to the
last `}`, backslashes dropped, as published. Without one it is the last line that is not empty,
less one full stop: the published script cuts off the last character whatever it is.

It is right if, as published and by `answer_type`:
- float: what precedes the first space is a number within 0.001 of the truth. Python's `float` reads
  it, so "1,234", "3/4", "12cm" and a Unicode minus are wrong. "2π" is 2 times π; "π" is wrong, and
  what follows π is ignored;
- multiple choice: it is the letter, or, if longer, has the letter in its first three characters:
  "(B)", "B. yes", but not "Answer: B";
- anything else (text): it contains the truth, upper and lower case distinguished.

A seed question has ten variants. `average` is the mean over seeds of the share of variants that
are right: over 501 seeds of ten, the mean over the 5,010 answers. `worst` is the share of seeds
whose ten variants are all right. `process_docs` puts the variants of a seed next to each other, so
a limit cuts at most the last seed. A seed with fewer than ten variants is left out of `worst` with
a warning, no complete seed at all gives nan; `average` keeps it, with the variants it has.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

NUM_VARIANTS = 10
TOLERANCE = 0.001
INSTRUCTIONS = {
    "float": "Answer the question using a single number with three decimal places.",
    "multiple choice": "Answer with the option's letter from the given choices directly.",
    "text": "Answer the question using a single word or phrase.",
}

Doc = Mapping[str, Any]


def process_docs(dataset: Any) -> Any:
    """The rows by seed, the variants of a seed in the order of the files."""
    ids = list(dataset["id"])
    # Shorter first, so that "10" follows "9".
    return dataset.select(sorted(range(len(ids)), key=lambda row: (len(ids[row]), ids[row])))


def doc_to_visual(doc: Doc) -> list[Any]:
    """The picture, as RGB."""
    return [doc["decoded_image"].convert("RGB")]


def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: object = None) -> str:
    """The question, which names its choices if it has any, and what to answer with."""
    return f"{doc['question'].strip()}\n{INSTRUCTIONS[kind(doc)]}"


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Whether the response is right, for the overall measures and for the kind of answer."""
    item = {"unit": doc["id"], "right": is_right(short_answer(results[0]), doc)}
    return {"average": item, "worst": item, f"average_{kind(doc).replace(' ', '_')}": item}


def average(items: Sequence[Mapping[str, Any]]) -> float:
    """The mean over seeds of the share of variants that are right."""
    shares = [sum(rights) / len(rights) for rights in by_seed(items).values()]
    return sum(shares) / len(shares)


def worst(items: Sequence[Mapping[str, Any]]) -> float:
    """The share of seeds with every variant right, over those with all ten."""
    seeds = by_seed(items)
    complete = [all(rights) for rights in seeds.values() if len(rights) == NUM_VARIANTS]
    if len(complete) < len(seeds):
        logger.warning(
            "worst: left out %d of %d seeds, which lack a variant in this run",
            len(seeds) - len(complete),
            len(seeds),
        )
    return sum(complete) / len(complete) if complete else math.nan


def by_seed(items: Sequence[Mapping[str, Any]]) -> dict[str, list[bool]]:
    """The variants' rights under their seed."""
    seeds: dict[str, list[bool]] = defaultdict(list)
    for item in items:
        seeds[item["unit"]].append(item["right"])
    return seeds


def kind(doc: Doc) -> str:
    """Which of the three scoring rules holds: the few "int" and "single answer" go by text."""
    answer_type: str = doc["answer_type"]
    return answer_type if answer_type in INSTRUCTIONS else "text"


def short_answer(response: str) -> str:
    """The short answer within the response by the rules above."""
    start, end = response.find("{"), response.rfind("}")
    if 0 <= start < end:
        try:
            found = json.loads(response[start : end + 1].replace("\\", ""), strict=False)
            return str(found.get("short answer")).strip()
        except ValueError:
            pass
    lines = response.strip().splitlines()
    return lines[-1].strip().removesuffix(".") if lines else ""


def is_right(answer: str, doc: Doc) -> bool:
    """The published comparison of a short answer with the truth."""
    truth = doc["ground_truth"]
    if kind(doc) == "float":
        value, target = number(answer), number(truth)
        return value is not None and target is not None and abs(value - target) <= TOLERANCE
    if kind(doc) == "multiple choice":
        return truth == answer if len(answer) == 1 else truth in answer[:3]
    return truth in answer


def number(answer: str) -> float | None:
    """The number before the first space, "2π" being 2 times π; None if there is none."""
    before_pi, pi, _ = answer.split(" ")[0].partition("π")
    try:
        return float(before_pi) * (math.pi if pi else 1)
    except ValueError:
        return None
