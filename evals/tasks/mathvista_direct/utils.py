"""MathVista with short answers, scored by rules alone.

Sources, all of github.com/lupantech/MathVista at 53d5258: `evaluation/extract_answer.py` (what is
the answer within a response) and `evaluation/calculate_score.py` (is it right). The prompt is the
one lmms-eval 0.7.3 calls "format-prompt". The published extraction is followed up to the point
where it asks GPT-4; these rules stand in for GPT-4, the first that finds something wins.

Multiple choice, where a letter counts only if there is a choice for it:
 1. the response is nothing but a letter, in either case, with any marks around it: "(b).";
 2. it begins with a letter and a mark: "B. 60", "(b) 60", "B: 60", "B - 60";
 3. a capital letter after "answer", "option" or "choice", the last such: "The answer is (B) 60.";
 4. one and the same capital letter in parentheses: "so it is (B)";
 5. the choice after the last "answer is" or "answer:", in either case, as from here on;
 6. the choice it begins with: "Yes, it is cut in half.";
 7. the only choice it mentions: "The value is larger than before.";
 8. all of it, if it has no more words than the wordiest choice: a misspelt choice.
Integer and float: the number the response is; the number after the last "answer"; the count that
it begins with: "There are two bars above 40."; the last number; if there is no digit, the last
number word from zero to twelve. Signs, decimals and thousands separators are read; units,
currencies and "%" are passed over (45% is 45). Powers (10^2) and fractions (1/2) are not numbers.
List: the numbers in the last pair of square brackets, otherwise all numbers in the response.
If nothing is found, the answer is wrong.

The published scoring then applies, with two differences. An empty response is wrong: that is the
published option `ignore_empty_extractions`, without which it becomes the shortest choice. And an
answer that is a choice to the letter is that choice: without this "(c)" becomes the third choice
where the choices are "(c)", "(a)", "(e)", … (2 of the 1000 questions).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

NUMBER = re.compile(r"(?<![\w.^/])[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?![0-9/^])(?!\.[0-9])")
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
COUNT = re.compile(rf"there (?:is|are|was|were) ([0-9]+|{'|'.join(NUMBER_WORDS)})\b", re.IGNORECASE)
OPENING = r"""[\s("'*\[]*"""
CLOSING = r"""[\s)"'*\].:,;!]*"""
NUM_PLACES = {1: "one decimal place", 2: "two decimal places"}

Doc = Mapping[str, Any]


def doc_to_visual(doc: Doc) -> list[Any]:
    """The picture, as RGB."""
    return [doc["decoded_image"].convert("RGB")]


def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: object = None) -> str:
    """The question with its unit, the lettered choices, and what to answer with."""
    unit = f" (Unit: {doc['unit']})" if doc["unit"] else ""
    choices = [f"{letter}. {choice}" for letter, choice in lettered(doc).items()]
    return "\n".join([doc["question"] + unit, *choices, instruction(doc)])


def instruction(doc: Doc) -> str:
    """The line that names the form of the answer, as in lmms-eval's "format-prompt"."""
    if doc["question_type"] == "multi_choice":
        return "Answer with the option's letter from the given choices directly."
    if doc["answer_type"] == "integer":
        return "Answer the question using a single integer number."
    if doc["answer_type"] == "list":
        return "Answer the question using a Python list."
    num_places = int(doc["precision"])
    places = NUM_PLACES.get(num_places, f"{num_places} decimal places")
    return f"Answer the question using a single floating-point number with {places}."


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """1.0 or 0.0 for the response, over all questions and over those of its task."""
    right = float(normalised(extracted(results[0], doc), doc) == doc["answer"])
    task = doc["metadata"]["task"].replace(" ", "_")
    return {"accuracy": right, f"accuracy_{task}": right}


def lettered(doc: Doc) -> dict[str, str]:
    """The choices by their letter; none for a question without choices."""
    return {chr(ord("A") + i): choice for i, choice in enumerate(doc["choices"] or [])}


def extracted(response: str, doc: Doc) -> str | None:
    """The answer within the response by the rules above; None where they find none."""
    response = response.strip()
    if quoted := re.search(r'The answer is "(.*)"\.', response):
        response = quoted[1].strip()
    if doc["question_type"] == "multi_choice":
        return extracted_choice(response, lettered(doc)) if response else None
    if doc["answer_type"] == "list":
        brackets = re.findall(r"\[[^\[\]]*\]", response)
        numbers = find_numbers(brackets[-1] if brackets else response)
        return f"[{', '.join(numbers)}]" if numbers else None
    return extracted_number(response)


def extracted_choice(response: str, choices: Mapping[str, str]) -> str | None:
    """A letter, the text of a choice, or a text that resembles one."""
    if response in choices.values():
        return response
    if not re.search(r"\w", response):
        return None
    letter = f"([{''.join(choices)}])"
    alone, first = OPENING + letter + CLOSING, OPENING + letter + r"(?:[).:](?!\w)| -(?= ))"
    if match := re.fullmatch(alone, response, re.I) or re.match(first, response, re.I):
        return match[1].upper()
    label = r"\b(?i:(?:answer|option|choice)(?: letter)?(?: is)?(?: letter)?):?"
    named = rf"{label}{OPENING}{letter}(?![\w'])"
    if found := re.findall(named, response):
        return str(found[-1])
    if len(found := set(re.findall(rf"(?<!\w)\({letter}\)", response))) == 1:
        return str(found.pop())
    mentioned = mentions(response, list(choices.values()))
    if ends := [match.end() for match in re.finditer(r"(?i)\banswer(?: is|:)", response)]:
        if stated := [choice for start, choice in mentioned if start >= ends[-1]]:
            return stated[0]
    if mentioned and mentioned[0][0] == 0:
        return mentioned[0][1]
    if len({choice for _, choice in mentioned}) == 1:
        return mentioned[0][1]
    if len(response.split()) <= max(len(choice.split()) for choice in choices.values()):
        return response
    return None


def mentions(response: str, choices: Sequence[str]) -> list[tuple[int, str]]:
    """Where choices stand in the response as whole words, a longer one before those within it.

    Choices of one letter are left out: "a" and "I" are words.
    """
    choices = sorted((c for c in choices if not re.fullmatch(r"\s*[A-Za-z]?\s*", c)), key=len)[::-1]
    if not choices:
        return []
    texts = "|".join(f"({re.escape(choice.strip())})" for choice in choices)
    # "6" stands neither in "60" nor in "2.6", "-6" or "6.5", but does at the end of a sentence.
    found = re.finditer(rf"(?<![\w.-])(?:{texts})(?!\w|\.\w)", response, re.IGNORECASE)
    return [(match.start(), choices[match.lastindex - 1]) for match in found if match.lastindex]


def extracted_number(response: str) -> str | None:
    """The number in the response, without thousands separators and units."""
    response = THOUSANDS.sub("", response)
    try:
        float(response)
        return response
    except ValueError:
        pass
    _, *answers = re.split(r"(?i)\banswer\b", response)
    if answers and (numbers := find_numbers(answers[-1])):
        return numbers[0]
    if count := COUNT.match(response):
        return from_word(count[1])
    if numbers := find_numbers(response):
        return numbers[-1]
    words = [word for word in re.findall(r"[a-z]+", response.lower()) if word in NUMBER_WORDS]
    return from_word(words[-1]) if words else None


def from_word(number: str) -> str:
    """The digits of a number word; digits stay."""
    word = number.lower()
    return str(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else number


def find_numbers(text: str) -> list[str]:
    """The numbers in a text as Python reads them, in order."""
    return NUMBER.findall(re.sub("[−–]", "-", text))


def normalised(extraction: str | None, doc: Doc) -> str | None:
    """What is compared with the answer, by the published rule; None is never right."""
    if extraction is None:
        return None
    if doc["question_type"] == "multi_choice":
        return nearest_choice(extraction, lettered(doc))
    try:
        if doc["answer_type"] == "integer":
            return str(int(float(extraction)))
        if doc["answer_type"] == "float":
            return str(round(float(extraction), int(doc["precision"])))
    except (ValueError, OverflowError):
        return None
    return extraction


def nearest_choice(extraction: str, choices: Mapping[str, str]) -> str:
    """The choice of a letter, otherwise the one fewest edits away (of equals, the first)."""
    if extraction in choices:
        return choices[extraction]
    return min(choices.values(), key=lambda choice: Levenshtein.distance(extraction, choice))
