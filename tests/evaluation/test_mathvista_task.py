"""`mathvista_direct`: its prompts, and its published and own rules on answers made by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from replicas_mathvista_geoqa import MATHVISTA, load, run_task, save_mathvista

utils = load("tasks/mathvista_direct/utils")


def question(answer: str, answer_type: str, **other: Any) -> dict[str, Any]:
    choices = other.get("choices")
    return {
        "question": "How much is it?",
        "choices": choices,
        "unit": None,
        "precision": None,
        "answer": answer,
        "question_type": "multi_choice" if choices else "free_form",
        "answer_type": answer_type,
        "metadata": {"task": "math word problem"},
    } | other


def is_right(response: str, doc: dict[str, Any]) -> bool:
    value = utils.process_results(doc, [response])["accuracy"]
    assert value in (0.0, 1.0)
    return bool(value == 1.0)


ANGLES = question("60°", "text", choices=["30°", "60°", "160°", "6.0"])
YES_NO = question("No", "text", choices=["Yes", "No"])
COMPARED = question("smaller than", "text", choices=["larger than", "equal to", "smaller than"])
SHAPES = question("B", "text", choices=["A", "B", "C", "D"])
CLOCK = question("quarter past", "text", choices=["half", "quarter", "quarter past"])
BRACKETS = question("(a)", "text", choices=["(c)", "(a)", "(b)"])
EFFECT = question("stay the same ", "text", choices=["increase", "stay the same ", "fall"])


@pytest.mark.parametrize(
    "response",
    [
        "60°",  # the choice
        "B",
        "b",
        "B.",
        "(B)",
        "(b)",
        " b) \n",
        "**B**",
        "B. 60°",
        "(B) 60°",
        "b: 60°",
        "B - 60°",
        "B - the second",
        "A.5 or so, hence 60°",  # no letter: a mark and then a word is a name
        "The answer is Around 60°.",  # a word, not the letter A
        "B) because A is wrong",
        "The answer is B.",
        "The correct answer is (B) 60°.",
        "The answer is option B",
        "Answer: B",
        "ANSWER:B",
        "The correct option letter is B.",
        "Option A fails, so the answer is B",
        "Thus it must be (B), as the angles add up.",
        "60° is what is left.",
        "The answer is 60°.",
        "30° and 60° were found; the answer is 60°, not 30°",
        "The angle measures 60°.",
        'The answer is "60°".',
        "60º",  # another degree sign: one edit from 60°, two from 6.0
        "\u200bThe correct option is (B) 60°.",
    ],
)
def test_a_response_that_gives_the_right_choice_is_right(response: str) -> None:
    assert is_right(response, ANGLES)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "  \n",
        "\u200b",
        "?",
        "A",
        "30°",
        "160°",  # holds "60°", but not as a word
        "E",  # nearest is 6.0 (three edits each, "30°" first): not 60° in any case
        "(E) 75°",  # no such choice, and two words where choices have one
        "It is either 30° or 60°.",
        "(A) or (B)",
        "I cannot tell from the picture.",
        "-60° is the value",
        "A: 60°",  # the letter counts, not the text
        "The answer is A man standing by 60°",
    ],
)
def test_a_response_that_does_not_give_the_right_choice_is_wrong(response: str) -> None:
    assert not is_right(response, ANGLES)


@pytest.mark.parametrize(
    ("response", "doc", "expected"),
    [
        ("No", YES_NO, True),
        ("no", YES_NO, True),
        ("No, it is not. Yes would mean more.", YES_NO, True),
        ("Yes, there is no other.", YES_NO, False),
        ("Yes would mean more; the answer is no.", YES_NO, True),
        ("There is nothing to see here", YES_NO, False),  # "no" is not a word of it
        ("It is Smaller Than before.", COMPARED, True),
        ("smaler then", COMPARED, True),  # two edits
        ("D", SHAPES, False),
        ("The shape is a triangle", SHAPES | {"answer": "A"}, False),  # the article
        ("(B)", SHAPES, True),
        ('The answer is "smaler then".', COMPARED, True),
        ("The time shown is quarter past.", CLOCK, True),
        ("?", CLOCK | {"answer": "half"}, False),  # otherwise the nearest, being the shortest
        ("\u200b", CLOCK | {"answer": "half"}, False),
        ("", CLOCK | {"answer": "half"}, False),
        ("(a)", BRACKETS, True),  # equal to a choice, so not the letter A
        ("B", BRACKETS, True),
        ("(B)", BRACKETS, True),
        ("(A)", BRACKETS, False),  # the letter of "(c)"
        ("stay the same", EFFECT, True),
        ("It will stay the same.", EFFECT, True),
        ("It may increase or stay the same.", EFFECT, False),
    ],
)
def test_choices_of_every_kind(response: str, doc: dict[str, Any], expected: bool) -> None:
    assert is_right(response, doc) is expected


def test_of_choices_equally_far_the_first_is_taken() -> None:
    # "cot" is one edit from each.
    for first, second in (("cat", "dot"), ("dot", "cat")):
        assert is_right("cot", question(first, "text", choices=[first, second]))
        assert not is_right("cot", question(second, "text", choices=[first, second]))


def test_equal_choices_are_both_right() -> None:
    doc = question("18", "text", choices=["9", "12", "18", "18"])
    assert is_right("C", doc) and is_right("D", doc) and not is_right("A", doc)


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("14", "14", True),
        (" 14\n", "14", True),
        ("14.", "14", True),
        ("14.0", "14", True),
        ("14.9", "14", True),  # published: cut off, not rounded
        ("1.4e1", "14", True),
        ("１４", "14", True),  # full-width digits are digits to Python
        ("14 cm", "14", True),
        ("14cm²", "14", True),
        ("14 m^2", "14", True),
        ("$14", "14", True),
        ("14%", "14", True),
        ("0.14", "14", False),  # a percentage is not converted
        ("The answer is 14 cm.", "14", True),
        ("The answer is 14, since 20 - 6 = 14 and 6 were red", "14", True),
        ("Of 20 objects 6 are red, so 14 are left.", "14", True),
        ("There are 14 bars with values above 40.", "14", True),
        ("There are two bars with values above 40.", "2", True),
        ("There are two bars with values above 40.", "40", False),
        ("Two objects are left.", "2", True),
        ("twofold", "2", False),
        ("-3", "-3", True),
        ("−3", "-3", True),  # the minus sign of typography
        ("The temperature is -3 degrees.", "-3", True),
        ("3", "-3", False),
        ("from 5-3 years", "3", True),  # a range, not a minus
        ("1,234", "1234", True),
        ("1,234,567 people", "1234567", True),
        ("It holds 1,234 litres.", "1234", True),
        ("12,34", "1234", False),
        ("10^2", "10", False),
        ("28/2", "28", False),
        ("28/2", "2", False),
        ("", "0", False),
        ("none", "0", False),
        ("inf", "0", False),
        ("nan", "0", False),
        ("version 1.2.3", "1", False),
        ("version 1.2.3", "3", False),
        ("15", "14", False),
    ],
)
def test_integers(response: str, answer: str, expected: bool) -> None:
    assert is_right(response, question(answer, "integer")) is expected


@pytest.mark.parametrize(
    ("response", "precision", "answer", "expected"),
    [
        ("1.2", 1, "1.2", True),
        ("1.24", 1, "1.2", True),  # rounded to one place
        ("1.26", 1, "1.2", False),
        ("1.24", 2.0, "1.24", True),  # the hub's column holds floats
        ("1.2", 2, "1.24", False),
        ("1.240", 2, "1.24", True),
        ("3", 1, "3.0", True),
        (".5", 1, "0.5", True),
        ("It is .5 m", 1, "0.5", True),
        ("-4.3", 1, "-4.3", True),
        ("−4.3 N", 1, "-4.3", True),
        ("$131,253.50", 1, "131253.5", True),
        ("The answer is 0.21 (21%).", 2, "0.21", True),
        ("about 28.3 m/s", 1, "28.3", True),
        ("0.21.", 2, "0.21", True),
        ("1/2", 1, "0.5", False),
        ("", 1, "0.0", False),
        ("unknown", 1, "0.0", False),
        ("inf", 1, "1.2", False),
    ],
)
def test_floats(response: str, precision: float, answer: str, expected: bool) -> None:
    assert is_right(response, question(answer, "float", precision=precision)) is expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("[2014, 2016]", True),
        ("[2014,2016]", True),
        ("The answer is [2014, 2016].", True),
        ("Not [2010, 2012] but [2014, 2016]", True),
        ("Between 2014 and 2016.", True),
        ("2014-2016", True),
        ("[2016, 2014]", False),
        ("[2014]", False),
        ("[]", False),
        ("", False),
        ("in no year", False),
    ],
)
def test_lists(response: str, expected: bool) -> None:
    assert is_right(response, question("[2014, 2016]", "list")) is expected


def test_a_list_of_hundreds_is_not_read_as_thousands() -> None:
    assert is_right("[100,200,-300]", question("[100, 200, -300]", "list"))


def test_a_list_keeps_its_decimals() -> None:
    assert is_right("[1.5,2.0]", question("[1.5, 2.0]", "list"))


def test_each_question_counts_for_its_task_too() -> None:
    result = utils.process_results(question("14", "integer"), ["14"])
    assert result == {"accuracy": 1.0, "accuracy_math_word_problem": 1.0}


def test_the_nearest_choice_is_by_the_distance_of_the_published_scoring() -> None:
    """Levenshtein's, which the published scoring calls by the package of that name."""

    def edits(a: str, b: str) -> int:
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            before, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
        return row[-1]

    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choices("abAB 0.°π∠", k=draw.randrange(9)))

    for _ in range(3000):
        a, b, c = text(), text(), text()
        assert utils.Levenshtein.distance(a, b) == edits(a, b)
        wanted = b if edits(a, b) <= edits(a, c) else c
        assert utils.nearest_choice(a, {"X": b, "Y": c}) == wanted


def test_the_prompt_names_an_unusual_precision() -> None:
    text = utils.doc_to_text(question("1.234", "float", precision=3.0))
    assert text.endswith("using a single floating-point number with 3 decimal places.")


def test_lmms_eval_scores_right_answers_one_and_none_zero(warm: Path, tmp_path: Path) -> None:
    save_mathvista(tmp_path)
    result = run_task(warm, "mathvista_direct", tmp_path)
    metrics = {"accuracy"} | {f"accuracy_{row[-1].replace(' ', '_')}" for row in MATHVISTA}
    assert len(metrics) == 6
    assert result["right"] == dict.fromkeys(metrics, 1.0)
    assert result["empty"] == dict.fromkeys(metrics, 0.0)
    assert result["pictures"] == [[30 * i, 0, 255] for i in range(len(MATHVISTA))]
    assert result["prompts"][1] == (
        "∠A is ( )\nA. 40°\nB. 60°\nC. 140°\nD. 60°\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert result["prompts"][3:] == [
        "How old is it? (Unit: years)\nAnswer the question using a single integer number.",
        "How cold is it?\nAnswer the question using a single integer number.",
        "How long is it?\n"
        "Answer the question using a single floating-point number with one decimal place.",
        "What does it cost?\n"
        "Answer the question using a single floating-point number with two decimal places.",
        "Which years?\nAnswer the question using a Python list.",
    ]
    greedy = {"max_new_tokens": 128, "temperature": 0, "do_sample": False}
    assert greedy.items() <= result["generation"].items()
