"""The task dynamath_direct: short answers, the published rules on them, average and worst."""

from __future__ import annotations

import json
import logging
import math

import pytest
from datasets import Dataset
from replicas_mathvista_geoqa import load, run_task
from replicas_wemath_dynamath import save_dynamath

task = load("tasks/dynamath_direct/utils")


def right(response, truth, answer_type):
    doc = {"id": "1", "answer_type": answer_type, "ground_truth": truth}
    return task.process_results(doc, [response])["average"]["right"]


def items(seeds):
    """Seeds as strings of 1 for a right variant, 0 for a wrong one."""
    return [
        task.process_results(
            {"id": str(number), "answer_type": "text", "ground_truth": "May"},
            ["May" if digit == "1" else "June"],
        )["worst"]
        for number, digits in enumerate(seeds)
        for digit in digits
    ]


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        ("2.0944", "2.0944", True),
        ("2.095", "2.0944", True),
        ("2.0936", "2.0944", True),
        ("2.096", "2.0944", False),
        ("13", "13", True),
        ("13.000", "13", True),
        ("13.", "13", True),
        ("14", "13", False),
        ("+13", "13", True),
        ("1.3e1", "13", True),
        ("-9", "-9", True),
        ("-9.0", "-9", True),
        ("9", "-9", False),
        ("− 9", "-9", False),
        ("−9", "-9", False),  # a Unicode minus
        ("13 cm", "13", True),
        ("13 cm.", "13", True),
        ("13cm", "13", False),
        ("$13", "13", False),
        ("50%", "0.5", False),
        ("about 13", "13", False),
        ("x = 13", "13", False),
        ("thirteen", "13", False),
        ("3/4", "0.75", False),
        ("0.75", "0.75", True),
        ("1728.0", "1728.0", True),
        ("1,728", "1728.0", False),
        ("2π", "6.2832", True),
        ("2.0π cm", "6.2832", True),
        ("-2π", "-6.2832", True),
        ("0.5π", "1.5708", True),
        ("π", "3.1416", False),
        ("π/2", "1.5708", False),
        ("3π/2", "9.4248", True),  # what follows π is ignored
        ("2*π", "6.2832", False),
        ("2 π", "6.2832", False),
        ("2pi", "6.2832", False),
        ("²", "2", False),
        ("nan", "13", False),
        ("inf", "13", False),
        ("", "0", False),
        (" \n ", "0", False),
        ("The sum is:\n13", "13", True),
        ("13", "thirteen", False),
    ],
)
def test_numbers(response, truth, expected):
    assert right(response, truth, "float") is expected


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        ("B", "B", True),
        ("B.", "B", True),
        (" B \n", "B", True),
        ("(B)", "B", True),
        ("B. yes", "B", True),
        ("(B) yes", "B", True),
        ("**B**", "B", True),
        ("A", "B", False),
        ("A. B", "B", False),
        ("b", "B", False),
        ("yes", "B", False),
        ("Answer: B", "B", False),
        ("Answer: B", "A", True),  # by its first letter, as published
        ("", "B", False),
        ("Ｂ", "B", False),
    ],
)
def test_choices(response, truth, expected):
    assert right(response, truth, "multiple choice") is expected


@pytest.mark.parametrize("answer_type", ["text", "single answer", "int"])
@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        ("May", "May", True),
        ("It is May.", "May", True),
        ("may", "May", False),
        ("Ma", "May", False),
        ("(3, -5)", "(3, -5)", True),
        ("(3,-5)", "(3, -5)", False),
        ("5:00", "5:0", True),
        ("∠ABC = 49°", "49", True),
        ("", "May", False),
    ],
)
def test_texts(response, truth, expected, answer_type):
    assert right(response, truth, answer_type) is expected


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ('{"solution": "May is June", "short answer": "B"}', "B"),
        (json.dumps({"solution": "first\nthen", "short answer": "2.500"}, indent=4), "2.500"),
        ('Here:\n```json\n{"short answer": "B"}\n```\nDone.', "B"),
        ('{"solution": "a\nb", "short answer": "B"}', "B"),
        ('{"solution": "\\frac{1}{2}", "short answer": "0.5"}', "0.5"),
        ('{"short answer": 2.5}', "2.5"),
        ('{"short answer": "2π"}', "2π"),
        ('{"solution": "B"}', "None"),
        ("{'short answer': 'B'}", "{'short answer': 'B'}"),
        ('{"short answer": "B"', '{"short answer": "B"'),
        ("}{", "}{"),
        ("It is so.\n\nB.\n", "B"),
        ("13..", "13."),
        ("", ""),
    ],
)
def test_the_short_answer_of_a_response(response, answer):
    assert task.short_answer(response) == answer


@pytest.mark.parametrize(
    ("answer_type", "instruction"),
    [
        ("float", "Answer the question using a single number with three decimal places."),
        ("multiple choice", "Answer with the option's letter from the given choices directly."),
        ("text", "Answer the question using a single word or phrase."),
        ("int", "Answer the question using a single word or phrase."),
    ],
)
def test_the_prompt_ends_with_what_to_answer(answer_type, instruction):
    doc = {"question": "Which? ", "answer_type": answer_type}
    assert task.doc_to_text(doc) == f"Which?\n{instruction}"


def test_average_and_worst():
    # 0.7, 1 and 0: seeds of ten.
    every = items(["1110111010", "1" * 10, "0" * 10])
    assert task.average(every) == pytest.approx(1.7 / 3)
    assert task.worst(every) == pytest.approx(1 / 3)


@pytest.mark.parametrize("measure", ["average", "worst"])
def test_the_score_is_the_mean_of_the_scores_of_the_units(measure):
    aggregate = getattr(task, measure)
    every = items(["1110111010", "1" * 10, "0" * 9 + "1", "1" * 10])
    alone = [aggregate([item for item in every if item["unit"] == unit]) for unit in "0123"]
    assert aggregate(every) == pytest.approx(sum(alone) / 4)


def test_a_seed_that_lacks_a_variant_is_left_out_of_worst_only(caplog):
    every = items(["1" * 10, "0" * 9, "01"])
    with caplog.at_level(logging.WARNING):
        assert task.worst(every) == 1
    assert "left out 2 of 3 seeds" in caplog.text
    assert task.average(every) == pytest.approx(1.5 / 3)
    assert math.isnan(task.worst(items(["1" * 9])))


def test_answers_count_under_their_kind():
    doc = {"id": "1", "ground_truth": "B"}
    for answer_type, metric in (
        ("float", "average_float"),
        ("multiple choice", "average_multiple_choice"),
        ("text", "average_text"),
        ("int", "average_text"),
    ):
        results = task.process_results({**doc, "answer_type": answer_type}, ["B"])
        assert set(results) == {"average", "worst", metric}


def test_the_variants_of_a_seed_come_together_in_order():
    ids = ["1", "2", "10"] * 3
    rows = task.process_docs(Dataset.from_dict({"id": ids, "variant": [1] * 3 + [2] * 3 + [3] * 3}))
    assert list(rows["id"]) == ["1"] * 3 + ["2"] * 3 + ["10"] * 3
    assert list(rows["variant"]) == [1, 2, 3] * 3


def test_lmms_eval_scores_right_answers_and_empty_ones(warm, tmp_path):
    save_dynamath(tmp_path)
    result = run_task(warm, "dynamath_direct", tmp_path)
    kinds = ["average_float", "average_multiple_choice", "average_text"]
    assert result["right"] == dict.fromkeys(["average", "worst", *kinds], 1.0)
    assert result["empty"] == dict.fromkeys(["average", "worst", *kinds], 0.0)
    questions = [prompt.splitlines()[0] for prompt in result["prompts"]]
    assert questions == [
        f"What is variant {variant} of seed {seed}?"
        for seed in (2, 9, 10)
        for variant in range(1, 11)
    ]
    assert result["pictures"] == [
        [20 * variant, 80 * row, 255] for row in (2, 1, 0) for variant in range(1, 11)
    ]
    assert result["generation"]["do_sample"] is False
    assert result["generation"]["temperature"] == 0
