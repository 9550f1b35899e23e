"""How the models' configurations and other files differ, and whether a merge still makes sense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json, text_config

# One name for what layouts call differently; the last one is of LLaVA's original code.
_ALIASES = {
    "n_positions": "max_position_embeddings",
    "max_sequence_length": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "depth": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "hidden_activation": "hidden_act",
    "activation_function": "hidden_act",
    "torch_dtype": "dtype",
    "mm_vision_select_layer": "vision_feature_layer",
}
# What says nothing of how the weights are used.
_IGNORED = {
    "_commit_hash",
    "_diffusers_version",
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "quantization_config",
    "transformers_version",
    "transformers.js_config",
    "use_cache",
}
# These matter also where only one config has them.
_OPTIONAL = ("image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints", "rope_scaling")
# With these the same shapes mean something else, or parts of a model would be lost. A diffusers
# U-Net's `attention_head_dim` is its number of heads.
_SENSELESS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_head_dim",
)
_SIDECARS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def compare_configs(
    models: Sequence[tuple[str, Mapping[str, Any]]],
) -> tuple[list[str], list[str]]:
    """Return how configs differ from the first one: what to know, and what forbids a merge.

    Keys are compared that both configs have, whatever a layout calls them.

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
            optional = key in _OPTIONAL
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
        pairs = [(file, read_json(first / file), read_json(root / file)) for file in _SIDECARS]
        pairs.append(("chat template", chat_template(first), chat_template(root)))
        for what, ours, theirs in pairs:
            if ours and theirs and ours != theirs:
                notes.append(f"{what}: differs between {first_name} and {name}")
            elif bool(ours) != bool(theirs):
                has, lacks = (first_name, name) if ours else (name, first_name)
                notes.append(f"{what}: in {has}, not in {lacks}")
    return notes


def chat_template(root: Path) -> Any:
    """Return a model's chat template from the file that transformers would take it from."""
    jinja = root / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text("utf-8", errors="replace")
    for file in ("chat_template.json", "tokenizer_config.json"):
        if template := read_json(root / file).get("chat_template"):
            return template
    return None


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what matters of a config, by the same keys in every layout."""
    text = text_config(config)
    facts = _flat({key: value for key, value in config.items() if value is not text})
    facts |= _flat(text)
    # Parts of one model have model types of their own in newer configs.
    facts = {key: value for key, value in facts.items() if not key.endswith("model_type")}
    facts["model_type"] = config.get("model_type")
    if {"hidden_size", "num_attention_heads"} <= facts.keys() and "head_dim" not in facts:
        heads = facts["num_attention_heads"]
        if isinstance(heads, int) and isinstance(facts["hidden_size"], int) and heads > 0:
            facts["head_dim"] = facts["hidden_size"] // heads
    return facts


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for key, value in config.items():
        name = _ALIASES.get(key, key)
        if name in _IGNORED or value is None or name.startswith("rope_"):
            continue
        if isinstance(value, dict):
            facts |= _flat(value, f"{before}{name}.")
        else:
            facts[before + name] = value
    return facts | {before + key: value for key, value in _rope(config).items()}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE's base and scaling, which transformers 5 writes as one `rope_parameters`."""
    parameters = config.get("rope_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    facts: dict[str, Any] = {}
    theta = config.get("rope_theta", parameters.get("rope_theta"))
    if theta is not None:
        facts["rope_theta"] = theta
    scaling = config.get("rope_scaling")
    scaling = dict(scaling if isinstance(scaling, dict) else parameters)
    scaling.pop("rope_theta", None)
    kinds = [scaling.pop(word, None) for word in ("rope_type", "type")]
    kind = next((kind for kind in kinds if kind not in (None, "default", "mrope")), None)
    if kind or scaling:
        facts["rope_scaling"] = ({"rope_type": kind} if kind else {}) | scaling
    return facts


def _shown(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
