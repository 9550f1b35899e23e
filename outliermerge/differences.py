"""How the models' configurations and other files differ, and whether a merge still makes sense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json, text_config

# Keys whose names differ between layouts; those on the right are of LLaVA's original code.
_ALIASES = {
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_sequence_length"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "hidden_act": ("hidden_act", "hidden_activation", "activation_function"),
}
_TEXT_KEYS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "hidden_act",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
    "tie_word_embeddings",
)
_VISION_KEYS = ("num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
_IMAGE_KEYS = ("image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints")
# With these the same shapes mean something else, or parts of a model would be lost.
_SENSELESS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_SIDECARS = (
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def compare_configs(
    models: Sequence[tuple[str, Mapping[str, Any]]],
) -> tuple[list[str], list[str]]:
    """Return how configs differ from the first one: what to know, and what forbids a merge.

    Args:
        models: name and config of each; a model without a config is {}.
    """
    notes: list[str] = []
    problems: list[str] = []
    known = [(name, _facts(config)) for name, config in models if config]
    for name, facts in known[1:]:
        first_name, first = known[0]
        for key in dict.fromkeys((*first, *facts)):
            ours, theirs = first.get(key), facts.get(key)
            optional = key in _IMAGE_KEYS or key == "rope_scaling"
            if ours == theirs or (not optional and (ours is None or theirs is None)):
                continue
            text = f"{key}: {_shown(ours)} in {first_name}, {_shown(theirs)} in {name}"
            (problems if key.rpartition(".")[2] in _SENSELESS else notes).append(text)
    return notes, problems


def compare_sidecars(models: Sequence[tuple[str, Path]]) -> list[str]:
    """Return which of the files that shape a model's input differ from the first model's."""
    notes = []
    (first_name, first), *others = models
    for name, root in others:
        for file in _SIDECARS:
            ours, theirs = first / file, root / file
            if not ours.is_file() and not theirs.is_file():
                continue
            if not ours.is_file() or not theirs.is_file():
                where = name if theirs.is_file() else first_name
                notes.append(f"{file}: only in {where}")
            elif not _same(ours, theirs):
                notes.append(f"{file}: differs between {first_name} and {name}")
    return notes


def _same(left: Path, right: Path) -> bool:
    if left.suffix == ".json":
        return read_json(left) == read_json(right)
    return left.read_bytes() == right.read_bytes()


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what matters of a config, by the same keys in every layout."""
    text = text_config(config)
    facts: dict[str, Any] = {key: _value(text, key) for key in _TEXT_KEYS}
    if facts["head_dim"] is None and facts["hidden_size"] and facts["num_attention_heads"]:
        facts["head_dim"] = facts["hidden_size"] // facts["num_attention_heads"]
    rope = text.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        rope = {"per layer type": rope} if rope else {}
    scaling = text.get("rope_scaling")
    facts["rope_theta"] = text.get("rope_theta", rope.get("rope_theta"))
    if not isinstance(scaling, dict):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    facts["rope_scaling"] = scaling if kind != "default" or len(scaling) > 1 else None
    facts |= {key: config.get(key) for key in _IMAGE_KEYS}
    vision = config.get("vision_config")
    if isinstance(vision, dict):
        facts |= {f"vision_config.{key}": _value(vision, key) for key in _VISION_KEYS}
    facts["vision_feature_layer"] = config.get(
        "vision_feature_layer", config.get("mm_vision_select_layer")
    )
    return facts


def _value(config: Mapping[str, Any], key: str) -> Any:
    names = _ALIASES.get(key, (key,))
    return next((config[name] for name in names if config.get(name) is not None), None)


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)
