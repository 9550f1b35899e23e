"""Draws the questions of the small text tasks, and takes texts from the project's own pages.

    python evals/tiny_text/data.py

writes the three JSONL files beside it. They are committed, since the pages change.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

HERE = Path(__file__).parent
NUM_TEXTS = 32


def sums(draw: random.Random, number: int) -> list[dict[str, object]]:
    """Additions of two numbers below 20, with three wrong answers near the right one."""
    rows = []
    for _ in range(number):
        first, second = draw.randrange(1, 20), draw.randrange(1, 20)
        right = first + second
        near = [right + step for step in (-10, -2, -1, 1, 2, 10) if right + step > 0]
        choices = [right, *draw.sample(near, 3)]
        draw.shuffle(choices)
        answer = choices.index(right)
        rows.append({"first": first, "second": second, "choices": choices, "answer": answer})
    return rows


def words(draw: random.Random, number: int) -> list[dict[str, object]]:
    """Lists of three words, of which the first one is asked for."""
    names = "apple bread chair door egg fork glass hat ink jar key lamp map nail oil pen".split()
    return [{"words": (drawn := draw.sample(names, 3)), "first": drawn[0]} for _ in range(number)]


def texts() -> list[dict[str, object]]:
    """Paragraphs of plain sentences from docs/, of at least 200 letters."""
    found = []
    for page in sorted((HERE.parents[1] / "docs").rglob("*.md")):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        for part in text.split("\n\n"):
            plain = " ".join(part.split())
            if len(plain) >= 200 and re.match(r"[A-Z]", plain) and "|" not in plain:
                found.append({"page": page.name, "text": plain})
    return random.Random(0).sample(found, NUM_TEXTS)


def write(name: str, rows: Iterable[Mapping[str, object]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (HERE / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    draw = random.Random(0)
    write("sums.jsonl", sums(draw, 100))
    write("sums_shown.jsonl", sums(draw, 8))
    write("words.jsonl", words(draw, 50))
    write("texts.jsonl", texts())
