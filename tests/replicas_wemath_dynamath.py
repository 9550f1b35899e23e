"""We-Math and DynaMath in small, as they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures

TEXT = Value("string")
WEMATH_FEATURES = Features(
    {
        "ID": TEXT,
        "split": TEXT,
        "knowledge concept": TEXT,
        "question": TEXT,
        "option": TEXT,
        "answer": TEXT,
        "image_path": Image(),
        "key": TEXT,
        "question number": Value("int64"),
        "knowledge concept description": TEXT,
    }
)
DYNAMATH_FEATURES = Features(
    {
        "id": TEXT,
        "question": TEXT,
        "image": TEXT,
        "decoded_image": Image(),
        "ground_truth": TEXT,
        "answer_type": TEXT,
        "subject": TEXT,
        "knowledge_level": TEXT,
    }
)
# ID, key, options, answer, in the published order: by key, so that a problem is scattered.
WEMATH = [
    ("2steps_1", "2steps_1", "A. 3;B. 4; C. 5; D. No correct answer", "B"),
    ("2steps_1", "2steps_2", "A. Left;    B. Right; C. No correct answer", "A"),
    ("2steps_1", "2steps_multi", "A. 10 cm;B. 15 cm.; C. No correct answer", "C"),
    ("3steps_1", "3steps_1", "A. B; B. C; C. D; D. E; E. No correct answer", "E"),
    ("3steps_1", "3steps_2", "A. Get shape ;C.; B. Get shape ;B.; C. No correct answer", "A"),
    ("3steps_1", "3steps_3", "A. 0.5;B. 0.25; C. No correct answer", "B"),
    ("3steps_1", "3steps_multi", "A. 15π;B. 10π;C. 5π; D. No correct answer", "D"),
]
# Seed, answer type, truth of variant 1 to 10. Seed 10 is the last by number, the first by letter.
DYNAMATH = [
    ("10", "multiple choice", list("ABABABABAB")),
    ("9", "float", ["-9", "0.0833", "1728.0", "0", "5.0", "127429", "-0.5", "2.0944", "13", "20"]),
    ("2", "text", ["May", "5:0", "(3, -5)", "DE", "[1, 6]", "y = -3", "Q1", "743", "Nov", "white"]),
]


def picture(red: int, green: int) -> Pictures.Image:
    return Pictures.new("RGB", (32, 32), (20 * red, 80 * green, 255))


def save_wemath(folder: Path) -> None:
    """The hub's dataset under its id: a 2-step and a 3-step problem with all their questions."""
    rows: list[dict[str, Any]] = [
        {
            "ID": problem,
            "split": "testmini",
            "knowledge concept": "Area of Circles",
            "question": f"As shown in the diagram, what is {problem} of {key}? ",
            "option": options,
            "answer": answer,
            "image_path": picture(i, 0),
            "key": key,
            "question number": i + 1,
            "knowledge concept description": "Area of Circles:\n1. S = πr².",
        }
        for i, (problem, key, options, answer) in enumerate(WEMATH)
    ]
    data = folder / "We-Math" / "We-Math" / "data"
    data.mkdir(parents=True)
    table = Dataset.from_list(rows, features=WEMATH_FEATURES)
    table.to_parquet(data / "testmini-00000-of-00001.parquet")


def save_dynamath(folder: Path) -> None:
    """The hub's dataset under its id: three seeds in ten files of one variant each."""
    data = folder / "DynaMath" / "DynaMath_Sample" / "data"
    data.mkdir(parents=True)
    for variant in range(1, 11):
        rows: list[dict[str, Any]] = [
            {
                "id": seed,
                "question": f"What is variant {variant} of seed {seed}?",
                "image": f"images/image{seed}.png",
                "decoded_image": picture(variant, i),
                "ground_truth": truths[variant - 1],
                "answer_type": answer_type,
                "subject": "statistics",
                "knowledge_level": "high school",
            }
            for i, (seed, answer_type, truths) in enumerate(DYNAMATH)
        ]
        table = Dataset.from_list(rows, features=DYNAMATH_FEATURES)
        table.to_parquet(data / f"sample{variant}-00000-of-{variant:05d}.parquet")
