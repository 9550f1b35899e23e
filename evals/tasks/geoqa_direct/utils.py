"""GeoQA (arXiv 2105.14517) answered by a letter, scored by G-LLaVA's rule, widened.

The rule is that of `scripts/geo_acc_calculate.py` in github.com/pipilurj/G-LLaVA at daea277
(arXiv 2312.11370): patterns in order, the first that is found names the letter, none is wrong. It
was made for answers that reason and then end in "Answer:C". It does not count a bare letter, nor
"Answer: C", "C. 60°" or "The answer is (C)". A short prompt calls for just these, so three patterns
are added: two above the published last one, which takes any "is C", even in "is CD", out of the
second to last piece between full stops, and one below it:

 1. published: "Answer:C", "the correct answer is option C", "option C is selected", "the answer is
    option C", "the answer is (C)", in this order, as written, anywhere;
 2. ours: the response is a letter, in either case, with any marks around it: "C", "(c).";
 3. ours: it begins with a capital letter and a mark: "C. 60°", "(C) 60°", "C: 60°";
 4. published: "is C" in the second to last piece between full stops;
 5. ours: a capital letter after "answer", "option" or "choice", the last such, in any case.

As in the published rule, the text of a choice does not count in place of its letter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

PUBLISHED = (
    r"Answer:([A-D])",
    r"the correct answer is option ([A-D])",
    r"option ([A-D]) is selected",
    r"the answer is option ([A-D])",
    r"the answer is \(([A-D])\)",
)
BARE = r"""[\s("'*\[]*([A-Da-d])[\s)"'*\].:,;!]*"""
LEADING = r"""[\s("'*\[]*([A-D])[).:](?!\w)"""
NAMED = r"""\b(?i:(?:answer|option|choice)(?: letter)?(?: is)?):?[\s("'*\[]*([A-D])(?![\w'])"""

Doc = Mapping[str, Any]


def doc_to_visual(doc: Doc) -> list[Any]:
    """The picture, as RGB."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """The question and the lettered choices between the task's two prompts."""
    choices = [f"{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"], strict=True)]
    text = "\n".join([doc["question"], *choices])
    kwargs = lmms_eval_specific_kwargs
    return f"{kwargs['pre_prompt']}{text}{kwargs['post_prompt']}"


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """1.0 or 0.0 for the response."""
    return {"accuracy": float(extracted(results[0]) == doc["answer"])}


def extracted(response: str) -> str | None:
    """The letter within the response by the rules above; None where they find none."""
    for pattern in PUBLISHED:
        if match := re.search(pattern, response):
            return match[1]
    if match := re.fullmatch(BARE, response) or re.match(LEADING, response):
        return match[1].upper()
    pieces = response.split(".")
    if len(pieces) > 1 and (match := re.search(r"is ([A-D])", pieces[-2])):
        return match[1]
    named = re.findall(NAMED, response)
    return named[-1] if named else None
