"""How the models' configurations and other files differ, and whether a merge still makes sense."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json, text_config
from outliermerge.checkpoint.model_types import effective_config
from outliermerge.planning.owners import check_content, is_loaded, kind_of
from outliermerge.storage.files import load_json, small_bytes
from outliermerge.storage.stamps import same_bytes

# One name for keys that layouts name differently; the last is from LLaVA's original code.
_ALIASES = {
    "n_positions": "max_position_embeddings",
    "max_sequence_length": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "depth": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "n_kv_heads": "num_key_value_heads",
    "num_kv_heads": "num_key_value_heads",
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "hidden_activation": "hidden_act",
    "activation_function": "hidden_act",
    "torch_dtype": "dtype",
    "global_rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "local_rope_theta": "rope_local_base_freq",
    "rope_pct": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
    "mm_vision_select_layer": "vision_feature_layer",
}
# Keys that do not say how the weights are used.
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
# These matter even if only one config has them.
_OPTIONAL = ("image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints", "rope_scaling")
# If these numbers differ, equal shapes mean different things, or parts of a model are lost. In a
# diffusers U-Net `attention_head_dim` is the number of heads; in T5 `d_kv` is the size of a head.
# Layers that predict further tokens do not count as layers of the model.
_SENSELESS = re.compile(
    r"(^|_)heads$|(^|_)n(um)?_head(_kv)?$|(^|_)head_(dim|size)$|^(d_kv|d_head|kv_channels)$"
    r"|^(?!.*(mtp|predict))(.*_)?n(um)?_(\w+_)?(layers?|blocks)$|(^|_)(en|de)coder_layers$"
    r"|^(depths?|layers|num_stages)$"
)
# Newer configs keep all parameters of RoPE in one value, older ones in separate keys.
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_TEMPLATE = re.compile(r"^chat_template\.(jinja|json)$")
_ORIGIN = {"_from_model_config", "chat_template", "name_or_path", "special_tokens_map_file",
           "tokenizer_file", "transformers_version"}  # fmt: skip
# How many of the values that only one config has are named in a note.
_NUM_SHOWN = 6
_MAX_SHOWN = 80  # characters shown of a value
_ABSENT = object()


def compare_configs(
    models: Sequence[tuple[str, Mapping[str, Any]]],
) -> tuple[list[str], list[str]]:
    """Return how configs differ from the first one: notes, and differences that forbid a merge.

    Values are compared under one name for all layouts. If one config lacks a value or has null, and
    the other has a value, the model type's default is compared; if the default is unknown, a note
    names the value.

    Args:
        models: name and config of each; a model without a config is {}.
    """
    notes: list[str] = []
    problems: list[str] = []
    known = [(name, config) for name, config in models if config]
    for name, config in known[1:]:
        first_name, first = known[0]
        pair = (_Said(first_name, first), _Said(name, config))
        unsaid: dict[str, None] = {}
        for key in dict.fromkeys((*pair[0].facts, *pair[1].facts)):
            said = [side.facts.get(key, _ABSENT) for side in pair]
            if said[0] == said[1]:
                continue
            silent = any(value in (None, _ABSENT) for value in said)
            # In newer configs, scaling that depends on the kind of layer has another form.
            unclear = any(isinstance(value, _Unclear) for value in said)
            if silent or unclear or key.endswith("rope_scaling"):
                if None not in (pair[0].filled, pair[1].filled):
                    said = [side.effective(key) for side in pair]
                    if said[0] == said[1] or (_ABSENT in said and key not in _OPTIONAL):
                        continue  # the class ignores a key that it does not know
                elif silent and key not in _OPTIONAL:
                    unsaid[key] = None
                    continue
            shown = _shown_apart(*(side.meant(key) for side in pair))
            text = ", ".join(
                f"{value}{side.why(key)} in {side.name}"
                for side, value in zip(pair, shown, strict=True)
            )
            senseless = any(is_senseless(key, value) for value in said)
            (problems if senseless else notes).append(f"{key}: {text}")
        by_weight = sorted(
            unsaid, key=lambda key: not any(is_senseless(key, s.facts.get(key)) for s in pair)
        )
        notes += _unsaid(pair, by_weight)
    return notes, problems


def compare_sidecars(models: Sequence[tuple[str, Mapping[str, Path]]]) -> list[str]:
    """Return which files beside the weights differ from the first model's, grouped in lines.

    Args:
        models: name of each, and its files by their names.

    Raises:
        OutlierMergeError: a file that is compared is broken.
    """
    (first_name, first), *others = models
    relations: dict[tuple[str, str], list[str]] = {}
    for name, files in others:
        for file in sorted(first.keys() | files.keys()):
            if not _TEMPLATE.search(file) and (word := _relation(first.get(file), files.get(file))):
                relations.setdefault((file, word), []).append(name)
        ours, theirs = chat_template(first), chat_template(files)
        if ours != theirs:
            word = "in" if not theirs else "not in" if not ours else "differs"
            relations.setdefault(("chat template", word), []).append(name)
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (file, word), names in relations.items():
        alike.setdefault((word, tuple(names)), []).append(file)
    lines = []
    for (word, holders), found in alike.items():
        what, those = ", ".join(found), ", ".join(holders)
        if word == "differs":
            verb = "differs" if len(found) == 1 else "differ"
            lines.append(f"{what}: {verb} between {first_name} and {those}")
        else:
            has, lacks = (first_name, those) if word == "in" else (those, first_name)
            lines.append(f"{what}: in {has}, not in {lacks}")
    return lines


def _relation(ours: Path | None, theirs: Path | None) -> str | None:
    """Return how a file of a model differs from the first model's; None if it does not."""
    if ours is None or theirs is None:
        return "not in" if ours is None else "in"
    if ours == theirs or same_bytes(ours, theirs):
        return None
    if kind_of(ours.name) == "config" and not is_loaded(ours.name):
        return "differs"  # a file that no loader reads may have any content
    check_content(ours)
    check_content(theirs)
    if ours.suffix == ".json" and _without_origin(ours) == _without_origin(theirs):
        return None
    return "differs"


def _without_origin(path: Path) -> Any:
    """Return a JSON file's value without its keys of origin and without the chat template."""
    value = load_json(path)
    if not isinstance(value, dict):
        return value
    return {key: entry for key, entry in value.items() if key not in _ORIGIN}


def chat_template(files: Mapping[str, Path]) -> Any:
    """Return a model's chat template from the file that transformers would take it from."""
    if jinja := files.get("chat_template.jinja"):
        check_content(jinja)
        return small_bytes(jinja).decode("utf-8")
    for file in ("chat_template.json", "tokenizer_config.json"):
        if file in files and (template := read_json(files[file]).get("chat_template")):
            return template
    return None


class _Said:
    """The values of one config, and the defaults for those that it lacks."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self.name = name
        self.config = config
        self.facts = facts_of(config)

    @cached_property
    def filled(self) -> dict[str, Any] | None:
        """The facts with the model type's defaults filled in; None if these are not known."""
        config = effective_config(self.config)
        if config is None:
            return None
        facts = facts_of(config)
        for key in [key for key in facts if key.rpartition(".")[2] == "num_attention_heads"]:
            before, heads = key.removesuffix("num_attention_heads"), facts[key]
            # The values that transformers' code uses for classes without the key.
            if facts.get(f"{before}num_key_value_heads") is None:
                facts[f"{before}num_key_value_heads"] = heads
            hidden = facts.get(f"{before}hidden_size")
            if facts.get(f"{before}head_dim") is None and _are_counts(heads, hidden):
                facts[f"{before}head_dim"] = hidden // heads
        return facts

    def effective(self, key: str) -> Any:
        return (self.filled or {}).get(key, _ABSENT)

    def meant(self, key: str) -> Any:
        """Return its value, or else the default; None if neither is known."""
        if (value := self.facts.get(key)) is not None or key in _OPTIONAL:
            return value
        default = self.effective(key)
        return None if default is _ABSENT else default

    def why(self, key: str) -> str:
        is_default = self.facts.get(key) is None and self.meant(key) is not None
        return " (the default)" if is_default else ""


class _Unclear(str):
    """Two values that a config gives for one key, under two names; the loader takes one of them."""


def is_senseless(key: str, value: Any) -> bool:
    """Tell whether this difference forbids a merge: in a number, or in one for each part."""
    numbers = value if isinstance(value, list) else [value]
    if not isinstance(value, _Unclear) and not all(type(n) in (int, float) for n in numbers):
        return False
    return _SENSELESS.search(key.rpartition(".")[2]) is not None


def _are_counts(*values: Any) -> bool:
    return all(isinstance(value, int) and value > 0 for value in values)


def _unsaid(pair: tuple[_Said, _Said], keys: Sequence[str]) -> list[str]:
    """Return the keys that only one of two configs has, a line for each config."""
    lines = []
    for side, other in (pair, pair[::-1]):
        said = [f"{k} {_shown(side.facts[k])}" for k in keys if side.facts.get(k) is not None]
        more = f" and {len(said) - _NUM_SHOWN} more" if len(said) > _NUM_SHOWN else ""
        if said:
            only = ", ".join(said[:_NUM_SHOWN])
            lines.append(f"{side.name} says {only}{more}; {other.name} does not say")
    return lines


def facts_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config that matter, by the same keys for every layout."""
    text = text_config(config)
    facts = _flat({key: value for key, value in config.items() if value is not text})
    facts |= _flat(text)
    tied = [part.get("tie_word_embeddings") for part in (config, text)]
    if tied[0] != tied[1] and None not in tied:  # the transformers version decides between them
        facts["tie_word_embeddings"] = f"{tied[0]} (in its text part {tied[1]})"
    # In newer configs the parts of a model have their own model types.
    facts = {key: value for key, value in facts.items() if not key.endswith("model_type")}
    facts["model_type"] = config.get("model_type")
    return facts


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for key, value in config.items():
        name = _ALIASES.get(key, key)
        if name in _IGNORED or key in _ROPE:
            continue
        if value in ({"__float__": "Infinity"}, {"__float__": "-Infinity"}):
            value = float(value["__float__"])  # how transformers 5 writes infinite numbers
        if isinstance(value, dict):
            facts |= _flat(value, f"{before}{name}.")
        else:
            _add(facts, before + name, value)
    for key, value in _rope(config).items():
        _add(facts, before + key, value)
    return facts


def _add(facts: dict[str, Any], key: str, value: Any) -> None:
    """Add a value; if another name of it has a different value, keep both."""
    held = facts.get(key)
    if held is None:
        facts[key] = value
    elif value is not None and value != held:
        facts[key] = _Unclear(" or ".join(sorted((str(held), str(value)))))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE's base and scaling; transformers 5 writes both into `rope_parameters`."""
    parameters = config.get("rope_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scaling = config.get("rope_scaling")
    scaling = dict(scaling if isinstance(scaling, dict) else parameters)
    facts: dict[str, Any] = {}
    # Newer configs can have a base for each kind of layer; older ones have a key for local layers.
    whole, local = scaling.pop("full_attention", None), scaling.pop("sliding_attention", None)
    if isinstance(local, dict):
        facts["rope_local_base_freq"] = local.get("rope_theta")
        if left := _scaling(local):
            scaling["sliding_attention"] = left
    if isinstance(whole, dict):
        scaling = whole | scaling
        parameters = whole
    for held in (config, scaling, parameters):
        if held.get("rope_theta") is not None:
            _add(facts, "rope_theta", held["rope_theta"])
    if (rotated := scaling.get("partial_rotary_factor")) is not None:
        facts["partial_rotary_factor"] = rotated
    if left := _scaling(scaling):
        facts["rope_scaling"] = left
    return facts


def _scaling(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE's parameters without its base; empty if RoPE is not scaled."""
    left = dict(parameters)
    for key in ("rope_theta", "partial_rotary_factor"):
        left.pop(key, None)
    kinds = [left.pop(word, None) for word in ("rope_type", "type")]
    kind = next((kind for kind in kinds if kind not in (None, "default", "mrope")), None)
    return ({"rope_type": kind} if kind else {}) | left


def _shown(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}…"


def _shown_apart(one: Any, other: Any) -> tuple[str, str]:
    """Return two values as short texts that include the place where they differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [k for k in {**one, **other} if one.get(k, _ABSENT) != other.get(k, _ABSENT)]
        pairs = [(key, _shown_apart(one.get(key), other.get(key))) for key in keys[:_NUM_SHOWN]]
        more = f", and {len(keys) - _NUM_SHOWN} more" if len(keys) > _NUM_SHOWN else ""
        ours, theirs = (
            ", ".join(f"{key} {shown[side]}" for key, shown in pairs) + more for side in (0, 1)
        )
        return f"({ours})", f"({theirs})"
    texts = ["not given" if value is None else str(value) for value in (one, other)]
    if max(map(len, texts)) <= _MAX_SHOWN:
        return texts[0], texts[1]
    same = next((n for n, pair in enumerate(zip_longest(*texts)) if pair[0] != pair[1]), 0)
    start = max(0, same - _MAX_SHOWN // 2)
    if same < _MAX_SHOWN // 2:
        return _shown(one), _shown(other)
    ours, theirs = (f"…{_shown(text[start:])}" for text in texts)
    return ours, theirs
