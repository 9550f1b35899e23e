"""`geoqa_direct`: G-LLaVA's rule and what is added to it, and the converter of the test set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from replicas_mathvista_geoqa import GEOQA, load, run_task, save_geoqa, save_geoqa_sources

converter = load("geoqa")
utils = load("tasks/geoqa_direct/utils")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        # Published, in order.
        ("The angle is D. It follows.\nAnswer:C", "C"),
        ("Therefore, the correct answer is option C.", "C"),
        ("Therefore, option C is selected.", "C"),
        ("Therefore, the answer is option C.", "C"),
        ("Therefore, the answer is (C) 14.", "C"),
        ("So option B is selected, but the correct answer is option C", "C"),
        ("So option C is selected, as option B fails", "C"),
        ("So the answer is option C, not option B", "C"),
        ("So the answer is (C), not option B", "C"),
        ("B. No: Answer:C", "C"),  # before the letter it begins with
        ("The choice that remains is C.", "C"),
        ("The length is CD.", "C"),  # the published pattern takes the start of a name
        ("is A. is B. is C. is D", "C"),  # the second to last piece
        # A letter alone.
        ("C", "C"),
        ("c", "C"),
        ("C.", "C"),
        ("(C)", "C"),
        ("(c).", "C"),
        (" C\n", "C"),
        ("**C**", "C"),
        # A letter first.
        ("C. 60°", "C"),
        ("(C) 60°", "C"),
        ("C: 60°", "C"),
        ("C) since the size is AB.", "C"),  # before "is A"
        # A letter after "answer", "option" or "choice".
        ("Answer: C", "C"),
        ("The answer is C", "C"),
        ("The answer is (C)", "C"),
        ("The correct answer is option C", "C"),
        ("ANSWER: C, not option", "C"),
        ("Option B fails; choice C", "C"),
        # Nothing found.
        ("", None),
        ("60°", None),  # a choice's text is not its letter
        ("E", None),
        ("Answer: E", None),
        ("is C", None),  # published: only before a full stop
        ("A triangle with sides B and C", None),
        ("The answer is CD", None),
        ("АВС", None),  # Cyrillic
        ("C.D", None),
        ("C and D", None),
    ],
)
def test_the_letter_within_a_response(response: str, letter: str | None) -> None:
    assert utils.extracted(response) == letter
    assert utils.process_results({"answer": "C"}, [response]) == {"accuracy": float(letter == "C")}
    assert utils.process_results({"answer": "D"}, [response]) == {"accuracy": 0.0}


def test_lmms_eval_scores_right_answers_one_and_none_zero(warm: Path, tmp_path: Path) -> None:
    save_geoqa(tmp_path)
    result = run_task(warm, "geoqa_direct", tmp_path)
    assert result["right"] == {"accuracy": 1.0}
    assert result["empty"] == {"accuracy": 0.0}
    assert result["pictures"] == [[30 * i, 0, 255] for i in range(len(GEOQA))]
    assert result["prompts"] == [
        f"{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\n"
        "Answer with the option's letter from the given choices directly."
        for question, (a, b, c, d), _ in GEOQA
    ]
    greedy = {"max_new_tokens": 128, "temperature": 0, "do_sample": False}
    assert greedy.items() <= result["generation"].items()


def convert(source: Path) -> int:
    lists = (source / "test_questions.jsonl", source / "test_answers.jsonl")
    count: int = converter.convert(*lists, source / "images", source / "out" / "test.parquet")
    return count


def test_the_converter_counts_the_questions(tmp_path: Path) -> None:
    save_geoqa_sources(tmp_path)
    assert convert(tmp_path) == len(GEOQA)


def edit(file: Path, number: int, **fields: str) -> None:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines[number].update(fields)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_the_converter_takes_answers_in_any_order(tmp_path: Path) -> None:
    save_geoqa_sources(tmp_path)
    questions, answers = tmp_path / "test_questions.jsonl", tmp_path / "test_answers.jsonl"
    answers.write_text("\n".join(reversed(answers.read_text().splitlines())))
    letters = {line["question_id"]: line["text"] for line in converter.read_lines(answers)}
    rows = [
        converter.row(line, letters, tmp_path / "images")
        for line in converter.read_lines(questions)
    ]
    assert [(row["question"], row["choices"], row["answer"]) for row in rows] == GEOQA


@pytest.mark.parametrize("letter", ["E", "", "AB"])
def test_the_converter_refuses_an_answer_that_is_no_letter(tmp_path: Path, letter: str) -> None:
    save_geoqa_sources(tmp_path)
    edit(tmp_path / "test_answers.jsonl", 2, text=letter)
    with pytest.raises(ValueError, match=f"question 2: the answer is '{letter}', not A to D"):
        convert(tmp_path)


def test_the_converter_refuses_a_question_without_an_answer(tmp_path: Path) -> None:
    save_geoqa_sources(tmp_path)
    answers = tmp_path / "test_answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="question 5: the answer is None"):
        convert(tmp_path)


def test_the_converter_refuses_a_text_of_another_form(tmp_path: Path) -> None:
    save_geoqa_sources(tmp_path)
    edit(tmp_path / "test_questions.jsonl", 1, text="Question:x\nChoices:\nA:1\nB:2\nC:3")
    with pytest.raises(ValueError, match="question 1: not 'Question:"):
        convert(tmp_path)


def test_the_converter_names_a_missing_picture(tmp_path: Path) -> None:
    save_geoqa_sources(tmp_path)
    (tmp_path / "images" / "test" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"question 3: there is no picture .*3\.png"):
        convert(tmp_path)
