r"""MathVision (arXiv 2402.14804) with short answers, scored by rules alone.

The two prompts are those that lmms-eval 0.7.3 has for short answers. What is the answer within a
response, the first of these that there is:

 1. what the last `\boxed{…}` holds;
 2. what follows the last "answer is" or "answer:", to the end of the sentence;
 3. the whole response.

Multiple choice: right if it is the letter of the right choice, with any marks around it, or begins
with that letter and a mark ("B. 60"), or is the text of that choice. A free answer is right if it
is the answer's text without spaces, dollars and a unit in `\text{…}` or behind it, or has the same
value: as in the published scoring, numbers are compared by two decimals; LaTeX by math-verify.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

OPENING = r"""[\s("'*\[{$]*"""
CLOSING = r"""[\s)"'*\]}$.:,;!]*"""

Doc = Mapping[str, Any]


def doc_to_visual(doc: Doc) -> list[Any]:
    """The picture, as RGB."""
    return [doc["decoded_image"].convert("RGB")]


def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: object = None) -> str:
    """The question, the lettered choices, and what to answer with."""
    choices = [f"{letter}. {choice}" for letter, choice in lettered(doc).items()]
    wanted = (
        "Answer with the option's letter from the given choices directly."
        if choices
        else "Answer the question with a number directly."
    )
    return "\n".join([doc["question"], *choices, wanted])


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """1.0 or 0.0 for the response."""
    answer = extracted(results[0])
    if choices := lettered(doc):
        return {"accuracy": float(is_choice(answer, doc["answer"], choices))}
    return {"accuracy": float(is_equal(answer, doc["answer"]))}


def lettered(doc: Doc) -> dict[str, str]:
    """The choices by their letter; none for a question without choices."""
    return {chr(ord("A") + i): choice for i, choice in enumerate(doc["options"] or [])}


def extracted(response: str) -> str:
    """The answer within the response by the rules above."""
    if (start := response.rfind("\\boxed{")) >= 0:
        return braced(response[start + len("\\boxed{") :])
    _, *said = re.split(r"(?i)\banswer(?: is|:)", response)
    if said:
        return re.split(r"\n|\.(?=\s|$)", said[-1].strip())[0]
    return response.strip()


def braced(text: str) -> str:
    """The text up to the brace that closes one before it."""
    depth = 1
    for place, sign in enumerate(text):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return text[:place]
    return text


def is_choice(answer: str, right: str, choices: Mapping[str, str]) -> bool:
    """Whether an answer is the right choice, by its letter or its text."""
    letter = f"([{''.join(choices)}])"
    alone = re.fullmatch(OPENING + letter + CLOSING, answer, re.IGNORECASE)
    first = re.match(OPENING + letter + r"[).:](?!\w)", answer, re.IGNORECASE)
    if match := alone or first:
        return match[1].upper() == right
    return plain(answer) == plain(choices[right])


def is_equal(answer: str, right: str) -> bool:
    """Whether two answers have the same text or the same value."""
    ours, theirs = plain(answer), plain(right)
    if not ours:
        return False
    numbers = [number(text) for text in (ours, theirs)]
    if ours == theirs or None in numbers:
        return ours == theirs or is_same_latex(ours, theirs)
    return round(numbers[0], 2) == round(numbers[1], 2)


def plain(text: str) -> str:
    """A text without spaces, dollars, units and a full stop, in lower case."""
    text = re.sub(r"\\text\{[^}]*\}|\\[,!;]|\\left|\\right|[\s$]", "", text).rstrip(".").lower()
    if with_unit := re.fullmatch(r"([-+]?[0-9.,]+)(?:°|\^\\circ|\^\{\\circ\}|%|\\%|[a-z]+)", text):
        return with_unit[1]
    return text


def number(text: str) -> float | None:
    """A number, without thousands separators; None if the text is none."""
    try:
        return float(re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text))
    except ValueError:
        return None


def is_same_latex(answer: str, right: str) -> bool:
    """Whether math-verify finds two expressions equal, within its limits of seconds."""
    from math_verify import parse, verify

    if len(answer) > 200:
        return False
    ours, theirs = (parse(f"${text}$") for text in (answer, right))
    return bool(ours and theirs and verify(theirs, ours))
