"""What an error advises, read from its message, and what no advice may lose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

LOSING = ("extra: drop", "missing: base", "value: drop", "value: base")


def spec_of(base: Path, *models: Any, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [m if isinstance(m, dict) else {"model": str(m)} for m in models],
        "parameters": {"weight": 0.5},
    } | keys


def advised(message: str, model: Path) -> dict[str, Any]:
    """Return the model's entry with the rename that a message has for it."""
    said = re.search(rf"`rename: (.*?)` on {re.escape(str(model))} pairs", message)
    assert said, message
    return {"model": str(model), "rename": yaml.safe_load(said[1])}
