"""Write GeoQA's test set, as G-LLaVA published it, as the parquet file that `geoqa_direct` reads.

    python evals/geoqa.py test_questions.jsonl test_answers.jsonl images DATA/geoqa/test.parquet

The two lists, 754 lines each, are in `playground/data` of github.com/pipilurj/G-LLaVA; the pictures
are in `images.zip` of the hub's dataset Luckyjhg/Geo170K, where `images` is the folder that holds
`test/0.png`. DATA is the folder the evaluation runs in.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Sequence, Value

FEATURES = Features(
    {
        "question_id": Value("int64"),
        "image": Image(),
        "question": Value("string"),
        "choices": Sequence(Value("string")),
        "answer": Value("string"),
    }
)
# What precedes "Question:" asks for reasoning; the task has its own prompt.
TEXT = re.compile(r".*?Question:(.*)\nChoices:\nA:(.*)\nB:(.*)\nC:(.*)\nD:(.*)", re.DOTALL)


def convert(questions: Path, answers: Path, images: Path, output: Path) -> int:
    """Write the parquet file; the number of questions, which is 754 for the official files.

    Raises:
        ValueError: A question has no answer, one of another form than A to D, no picture, or a
            text of another form than the published.
    """
    letters = {line["question_id"]: line["text"] for line in read_lines(answers)}
    rows = [row(line, letters, images) for line in read_lines(questions)]
    output.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in FEATURES}
    Dataset.from_dict(columns, features=FEATURES).to_parquet(output)
    return len(rows)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def row(line: dict[str, Any], letters: dict[int, str], images: Path) -> dict[str, Any]:
    """One published question with its picture and its answer."""
    number = line["question_id"]
    match = TEXT.fullmatch(line["text"])
    if match is None:
        raise ValueError(f"question {number}: not 'Question:… Choices: A:… D:…': {line['text']!r}")
    if letters.get(number) not in list("ABCD"):
        raise ValueError(f"question {number}: the answer is {letters.get(number)!r}, not A to D")
    picture = images / line["image"]
    if not picture.is_file():
        raise ValueError(f"question {number}: there is no picture {picture}")
    question, *choices = (part.strip() for part in match.groups())
    return {
        "question_id": number,
        "image": {"bytes": picture.read_bytes(), "path": picture.name},
        "question": question,
        "choices": choices,
        "answer": letters[number],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("questions", "answers", "images", "output"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    try:
        print(f"{convert(**vars(arguments))} questions, of 754, in {arguments.output}")
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
