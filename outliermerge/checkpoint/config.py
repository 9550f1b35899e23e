"""The parts of a model's configuration files that a merge needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError
from outliermerge.storage.files import load_json

# Keys under which a config nests the language model's config; Qwen-Omni has two levels.
_PARTS = ("thinker_config", "text_config", "llm_config", "language_config")
_KINDS = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; an empty one if there is no such file.

    Raises:
        OutlierMergeError: the file exists and does not contain a JSON object.
    """
    value = load_json(path)
    if value is None and not path.exists():
        return {}
    if not isinstance(value, dict):
        raise OutlierMergeError(
            f"{path}: holds {_KINDS.get(type(value), 'a number')}, expected a JSON object "
            "({…}). Fetch it again."
        )
    return value


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a config: the innermost nested one, or the config itself.

    >>> text_config({"model_type": "llava", "text_config": {"vocab_size": 32064}})
    {'vocab_size': 32064}
    """
    return at_level(config, language_levels(config)[-1])


def language_levels(config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the keys that lead to each level of a config down to the language model's.

    >>> language_levels({"thinker_config": {"text_config": {}}, "vision_config": {}})
    [(), ('thinker_config',), ('thinker_config', 'text_config')]
    """
    levels: list[tuple[str, ...]] = [()]
    level = config
    while key := next((part for part in _PARTS if isinstance(level.get(part), dict)), None):
        levels.append((*levels[-1], key))
        level = level[key]
    return levels


def at_level(config: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the part of a config at a level; empty if there is none."""
    for key in path:
        config = config.get(key) or {}
    return config


def counts_as_predicted(name: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a tensor is in a layer that predicts further tokens, by the config.

    Inference servers read these layers; transformers ignores them. In DeepSeek-V3, GLM-4.5 and MiMo
    they are after the other layers, in Qwen3-Next under `mtp.`.

    >>> config = {"num_hidden_layers": 61, "num_nextn_predict_layers": 1}
    >>> counts_as_predicted("model.layers.61.eh_proj.weight", config)
    True
    >>> counts_as_predicted("model.layers.62.eh_proj.weight", config)
    False
    """
    of_text = text_config(config)
    depth, more = of_text.get("num_hidden_layers"), of_text.get("num_nextn_predict_layers")
    if re.search(r"(?:^|\.)mtp\.", name):
        return bool(more or of_text.get("mtp_num_hidden_layers"))
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if not match or not isinstance(depth, int) or not isinstance(more, int):
        return False
    return depth <= int(match[1]) < depth + more
