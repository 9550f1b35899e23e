"""We-Math (arXiv 2407.01284) answered by a letter, scored by the published rules.

Sources: `evaluation/four_dimensional_metrics.py` in github.com/We-Math/We-Math at a57a0e8 for the
letter within a response and for the scores; LLaVA's docs/Evaluation.md for the prompt.

The letter within a response, where the first rule that finds one wins:
 1. published: after the last "Answer" and without any of `<>:.`, the first character if it is A–H,
    be it a letter ("B", "B. 60", "Answer: B") or the start of a word ("Both" is B);
    ours: parentheses are left out like `<>:.`, so "(B)" and "Answer: (B)" count;
 2. ours: a lone capital letter after "answer", "option" or "choice", the last such: "The correct
    answer is B".
Lower-case letters and the text of an option do not count.

A problem is one multi-step question with its two or three single steps:

    multi-step question    every step right    some steps right    no step right
    wrong                  ig                  ik                  ik
    right, strict          cm                  rm                  rm
    right, loose           cm                  cm                  rm

`strict` and `loose` are (cm + 0.5 ig) / problems, each share is over problems too, except that rm
is rm / (rm + cm), and 0 where both are 0. The published script divides by 525 problems; here it is
the problems of the run that are complete. `process_docs` puts the questions of a problem next to
each other, 2-step problems first, so a limit cuts at most the last problem. A problem that lacks a
question is left out with a warning; no complete problem at all gives nan.

`accuracy` is the share of all questions that are right, those of incomplete problems too. Its unit
is the problem too: the questions of a problem are about the same thing, not independent.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

SHARES = ("ik", "ig", "cm", "rm")
MEASURES = [
    measure
    for setting in ("strict", "loose")
    for measure in (setting, *(f"{setting}_{share}" for share in SHARES))
]
# "…around point ;O.;B. Yes" and "…to get Shape ;C.; B. Shape": not every semicolon ends an option.
OPTION_END = re.compile(r";\s*(?=[A-H]\.\s*[^;\s])")
NAMED = re.compile(r"\b(?i:(?:answer|option|choice)(?: is)?):?\s*\(?([A-H])(?![\w'])")

Doc = Mapping[str, Any]


def process_docs(dataset: Any) -> Any:
    """The rows with the questions of a problem next to each other, otherwise in their order."""
    ids = list(dataset["ID"])
    first_row: dict[str, int] = {}
    for row, problem in enumerate(ids):
        first_row.setdefault(problem, row)
    return dataset.select(sorted(range(len(ids)), key=lambda row: first_row[ids[row]]))


def doc_to_visual(doc: Doc) -> list[Any]:
    """The picture, as RGB: the dataset keeps it under `image_path`."""
    return [doc["image_path"].convert("RGB")]


def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """The question and the options, one a line, between the task's two prompts."""
    options = [option.strip("; ") for option in OPTION_END.split(doc["option"])]
    kwargs = lmms_eval_specific_kwargs
    text = "\n".join([doc["question"].strip(), *options])
    return f"{kwargs['pre_prompt']}{text}{kwargs['post_prompt']}"


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Whether the response is right, and for each measure of problems what it is made from."""
    right = extracted(results[0]) == doc["answer"]
    item = {"unit": doc["ID"], "question": doc["key"], "right": right}
    return {"accuracy": item} | {measure: {**item, "measure": measure} for measure in MEASURES}


def accuracy(items: Sequence[Mapping[str, Any]]) -> float:
    """The share of questions that are right."""
    return sum(item["right"] for item in items) / len(items)


def aggregate(items: Sequence[Mapping[str, Any]]) -> float:
    """The measure that the items name, over the complete problems among them."""
    setting, _, share = items[0]["measure"].partition("_")
    problems: dict[str, dict[str, bool]] = defaultdict(dict)
    for item in items:
        problems[item["unit"]][item["question"]] = item["right"]
    outcomes = {unit: outcome(rights, setting) for unit, rights in problems.items()}
    incomplete = [unit for unit, found in outcomes.items() if found is None]
    if incomplete:
        logger.warning(
            "%s: left out %d of %d problems, which lack a question in this run, such as %s",
            items[0]["measure"],
            len(incomplete),
            len(problems),
            incomplete[0],
        )
    counts = Counter(found for found in outcomes.values() if found is not None)
    num_problems = counts.total()
    if num_problems == 0:
        return math.nan
    if not share:
        return (counts["cm"] + 0.5 * counts["ig"]) / num_problems
    if share == "rm":
        num_problems = counts["rm"] + counts["cm"]
    return counts[share] / num_problems if num_problems else 0.0


def outcome(rights: Mapping[str, bool], setting: str) -> str | None:
    """One of the four shares for a problem, from question key to right; None if incomplete."""
    steps = next(iter(rights)).split("_")[0]  # "2steps" of "2steps_1"
    step_keys = [f"{steps}_{step}" for step in range(1, int(steps[0]) + 1)]
    multi_key = f"{steps}_multi"
    if not {multi_key, *step_keys} <= rights.keys():
        return None
    step_rights = [rights[key] for key in step_keys]
    if not rights[multi_key]:
        return "ig" if all(step_rights) else "ik"
    mastered = all(step_rights) if setting == "strict" else any(step_rights)
    return "cm" if mastered else "rm"


def extracted(response: str) -> str | None:
    """The letter within the response by the rules above; None where they find none."""
    text = re.sub("[<>:.()]", "", response.rsplit("Answer", 1)[-1]).strip()
    if text[:1] in set("ABCDEFGH"):
        return text[0]
    named = NAMED.findall(response)
    return named[-1] if named else None
