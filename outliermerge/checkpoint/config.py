"""A model's configuration files, as far as a merge has to know them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.files import load_json


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; an empty one where it is absent or is no JSON object."""
    value = load_json(path)
    return value if isinstance(value, dict) else {}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a config: its own level, or the one nested in it.

    >>> text_config({"model_type": "llava", "text_config": {"vocab_size": 32064}})
    {'vocab_size': 32064}
    """
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(nested := config.get(key), dict):
            return nested
    return config
