"""The task wemath_direct: letters out of responses, and the four-way scores computed by hand."""

from __future__ import annotations

import logging
import math

import pytest
from datasets import Dataset
from replicas_mathvista_geoqa import load, run_task
from replicas_wemath_dynamath import WEMATH, save_wemath

task = load("tasks/wemath_direct/utils")


def items(measure, *problems):
    """Problems as (steps, multi): strings of 1 for right, 0 for wrong, such as ("10", "1")."""
    found = []
    for number, (steps, multi) in enumerate(problems):
        keys = [*(str(step + 1) for step in range(len(steps))), "multi"]
        for key, digit in zip(keys, steps + multi, strict=True):
            doc = {"ID": f"{len(steps)}steps_{number}", "key": f"{len(steps)}steps_{key}"}
            results = task.process_results({**doc, "answer": "A"}, ["A" if digit == "1" else "B"])
            found.append(results[measure])
    return found


def score(measure, *problems):
    return task.aggregate(items(measure, *problems))


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        (" B \n", "B"),
        ("B.", "B"),
        ("B. 400, 300", "B"),
        ("B: 60°", "B"),
        ("(B)", "B"),
        ("(B) 60", "B"),
        ("Answer: B", "B"),
        ("Answer: (B)", "B"),
        ("<Answer>: B.", "B"),
        ("<Answer>B</Answer>", None),
        ("<Reason>: A is not, so B. <Answer>: <C>", "C"),
        ("The Answer is A. No: Answer: D", "D"),
        ("H", "H"),
        ("The correct answer is B", "B"),
        ("The correct answer is (B) 60.", "B"),
        ("Not option A but option C.", "C"),
        ("First, option A", "F"),
        ("The answer: E", "E"),
        ("The answer is that B is wrong", None),
        ("Both", "B"),
        ("According to it, the answer is C", "A"),
        ("b", None),
        ("I", None),
        ("60", None),
        ("the answer is Blue", None),
        ("", None),
        ("   ", None),
        ("Answer:", None),
        ("（B）", None),
        ("πB", None),
    ],
)
def test_the_letter_of_a_response(response, letter):
    assert task.extracted(response) == letter


# Per problem: steps, multi, then its strict and its loose contribution.
TWO_STEPS = [
    ("00", "0", "ik", "ik"),
    ("10", "0", "ik", "ik"),
    ("01", "0", "ik", "ik"),
    ("11", "0", "ig", "ig"),
    ("00", "1", "rm", "rm"),
    ("10", "1", "rm", "cm"),
    ("01", "1", "rm", "cm"),
    ("11", "1", "cm", "cm"),
]
THREE_STEPS = [
    ("000", "0", "ik", "ik"),
    ("100", "0", "ik", "ik"),
    ("010", "0", "ik", "ik"),
    ("001", "0", "ik", "ik"),
    ("110", "0", "ik", "ik"),
    ("101", "0", "ik", "ik"),
    ("011", "0", "ik", "ik"),
    ("111", "0", "ig", "ig"),
    ("000", "1", "rm", "rm"),
    ("100", "1", "rm", "cm"),
    ("010", "1", "rm", "cm"),
    ("001", "1", "rm", "cm"),
    ("110", "1", "rm", "cm"),
    ("101", "1", "rm", "cm"),
    ("011", "1", "rm", "cm"),
    ("111", "1", "cm", "cm"),
]


@pytest.mark.parametrize(("steps", "multi", "strict", "loose"), TWO_STEPS + THREE_STEPS)
def test_a_problem_alone_is_one_of_the_four(steps, multi, strict, loose):
    contribution = {"ik": 0.0, "ig": 0.5, "cm": 1.0, "rm": 0.0}
    for setting, outcome in (("strict", strict), ("loose", loose)):
        assert score(setting, (steps, multi)) == contribution[outcome]
        for share in ("ik", "ig", "cm", "rm"):
            assert score(f"{setting}_{share}", (steps, multi)) == float(share == outcome)


# By hand, of the 24 problems above. IG: 2. IK: 3 + 7. Multi right: 4 + 8 = 12, of which every step
# right in 2, no step right in 2. Strict: CM 2, RM 10. Loose: CM 10, RM 2.
@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("strict", 3 / 24),
        ("strict_ik", 10 / 24),
        ("strict_ig", 2 / 24),
        ("strict_cm", 2 / 24),
        ("strict_rm", 10 / 12),
        ("loose", 11 / 24),
        ("loose_ik", 10 / 24),
        ("loose_ig", 2 / 24),
        ("loose_cm", 10 / 24),
        ("loose_rm", 2 / 12),
    ],
)
def test_all_problems_together(measure, expected):
    problems = [problem[:2] for problem in TWO_STEPS + THREE_STEPS]
    assert score(measure, *problems) == pytest.approx(expected, abs=1e-12)


def test_the_published_numbers_of_llava_1_6_13b():
    """we-math.github.io: of 525, IK 363, IG 17, CM 19 and RM 126 strict, 107 and 38 loose."""
    problems = (
        [("00", "0")] * 363
        + [("11", "0")] * 17
        + [("111", "1")] * 19
        + [("100", "1")] * 88
        + [("000", "1")] * 38
    )
    percent = {measure: round(100 * score(measure, *problems), 2) for measure in task.MEASURES}
    assert percent == {
        "strict": 5.24,
        "strict_ik": 69.14,
        "strict_ig": 3.24,
        "strict_cm": 3.62,
        "strict_rm": 86.9,
        "loose": 22.0,
        "loose_ik": 69.14,
        "loose_ig": 3.24,
        "loose_cm": 20.38,
        "loose_rm": 26.21,
    }


@pytest.mark.parametrize("measure", ["strict", "loose"])
def test_the_score_is_the_mean_of_the_scores_of_the_units(measure):
    problems = [("11", "0"), ("10", "1"), ("111", "1"), ("000", "1"), ("101", "0")]
    every = items(measure, *problems)
    units = sorted({item["unit"] for item in every})
    alone = [task.aggregate([item for item in every if item["unit"] == unit]) for unit in units]
    assert len(units) == 5
    assert task.aggregate(every) == pytest.approx(sum(alone) / 5)


@pytest.mark.parametrize("multi", ["0", "1"])
def test_nothing_is_divided_by_zero(multi):
    problems = [("00", multi), ("111", "0")]
    for measure in task.MEASURES:
        assert 0 <= score(measure, *problems) <= 1
    assert score("strict_rm", ("00", "0"), ("11", "0")) == 0


@pytest.mark.parametrize("missing", ["3steps_1", "3steps_3", "3steps_multi"])
def test_a_problem_that_lacks_a_question_is_left_out_and_named(missing, caplog):
    for measure in task.MEASURES:
        every = items(measure, ("11", "1"), ("110", "1"))
        kept = [item for item in every if item["question"] != missing]
        with caplog.at_level(logging.WARNING):
            assert task.aggregate(kept) == score(measure, ("11", "1"))
        assert "left out 1 of 2 problems" in caplog.text and "3steps_1" in caplog.text
        alone = [item for item in kept if item["unit"].startswith("3steps")]
        assert math.isnan(task.aggregate(alone))


def test_accuracy_is_over_all_questions():
    # 1 of 3 and 3 of 4 are right.
    assert task.accuracy(items("accuracy", ("10", "0"), ("110", "1"))) == 4 / 7


@pytest.mark.parametrize(
    ("option", "lines"),
    [
        ("A. 300;B. 400; C. 5;  D. 6 ", ["A. 300", "B. 400", "C. 5", "D. 6"]),
        ("A. F;    B. D;    C. No. ; ", ["A. F", "B. D", "C. No."]),
        ("A. B; B. C; C. A", ["A. B", "B. C", "C. A"]),
        ("A. Shape ;C.; B. Shape ;C.  ;C. No", ["A. Shape ;C.", "B. Shape ;C.", "C. No"]),
        ("A. right;  ; B. left", ["A. right", "B. left"]),
    ],
)
def test_the_prompt_has_an_option_a_line(option, lines):
    kwargs = {"pre_prompt": "<", "post_prompt": ">"}
    text = task.doc_to_text({"question": "Which? ", "option": option}, kwargs)
    assert text == "<" + "\n".join(["Which?", *lines]) + ">"


def test_the_questions_of_a_problem_come_together():
    ids = ["2steps_1", "2steps_2", "2steps_10", "2steps_1", "2steps_2", "2steps_10"]
    keys = ["2steps_1"] * 3 + ["2steps_multi"] * 3
    rows = task.process_docs(Dataset.from_dict({"ID": ids, "key": keys}))
    assert list(rows["ID"]) == ["2steps_1"] * 2 + ["2steps_2"] * 2 + ["2steps_10"] * 2
    assert list(rows["key"]) == ["2steps_1", "2steps_multi"] * 3


def test_lmms_eval_scores_right_answers_and_empty_ones(warm, tmp_path):
    save_wemath(tmp_path)
    result = run_task(warm, "wemath_direct", tmp_path)
    zero = dict.fromkeys(["accuracy", *task.MEASURES], 0.0)
    assert result["right"] == zero | dict.fromkeys(
        ["accuracy", "strict", "strict_cm", "loose", "loose_cm"], 1.0
    )
    assert result["empty"] == zero | {"strict_ik": 1.0, "loose_ik": 1.0}
    assert result["prompts"][0] == (
        "As shown in the diagram, what is 2steps_1 of 2steps_1?\n"
        "A. 3\nB. 4\nC. 5\nD. No correct answer\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert result["pictures"] == [[20 * row, 0, 255] for row in range(len(WEMATH))]
    assert result["generation"]["do_sample"] is False
    assert result["generation"]["temperature"] == 0
