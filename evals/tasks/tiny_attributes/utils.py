"""The tiny family's two tasks: the answer is one word, and must be that word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """The picture, as RGB."""
    return [doc["image"].convert("RGB")]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1.0 or 0.0 for the response, counted in all and with the questions of its kind."""
    right = float(results[0].strip().lower() == doc["answer"])
    return {"accuracy": right, doc["kind"]: right}
