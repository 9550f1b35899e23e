"""The config of an output of slices: how many layers it has, and what it says of each of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from outliermerge.checkpoint.config import at_level, language_levels, read_json
from outliermerge.checkpoint.model_types import effective_config
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.planning.plan import Input, Stacked
from outliermerge.planning.vocabulary_config import reached

Level = Mapping[str, Any]
Path = tuple[str, ...]

_COUNTS = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers", "num_hidden_layers"),
    "": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_blocks"),
}
# Lists with a value for each layer, by their names, where they have as many values as layers.
_PER_LAYER = re.compile(
    r"layer|block|pattern|type|head|attention|window|sliding|rope|theta|intermediate|ffn|mlp|moe"
    r"|expert|sparsity"
)
# Lists of the numbers of layers.
_NUMBERS = (
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "deepstack_visual_indexes",
    "fullatt_block_indexes", "attn_layer_indices", "full_attn_idxs", "global_attn_indexes",
)  # fmt: skip
# Keys that say of which kind every nth layer is, and those of the first such layer.
_PERIODS = {
    "attn_layer_period": "attn_layer_offset",
    "expert_layer_period": "expert_layer_offset",
    "interleave_moe_layer_step": None,
    "moe_layer_frequency": None,
    "cross_attention_frequency": None,
}
# The same of kinds of attention; `layer_types` goes before them.
_ATTENTION_PERIODS = (
    *("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval"),
    *("global_attn_every_n_layers", "no_rope_layer_interval"),
)
_TYPES = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "moe_layers")
_VARIES = re.compile(r"sliding|window|pattern|chunk|hybrid|global|no_rope|interval|dense|sparse")


def stacked_config(
    config: Mapping[str, Any], stacked: Stacked, inputs: Sequence[Input], owner: int
) -> dict[str, Any]:
    """Return a config that fits the layers of an output of slices.

    Args:
        config: the config of one of the models.
        owner: the model's number.

    Raises:
        OutlierMergeError: its keys cannot say of which kind the output's layers are, or a config
            has values that no model's config has.
    """
    try:
        return _stacked_config(config, stacked, inputs, owner)
    except (TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, OutlierMergeError):
            raise
        names = ", ".join(shown(entry.reference) for entry in inputs)
        raise OutlierMergeError(
            f"a config.json of {shown(names)} says something of single layers that cannot be so "
            f"({shown(error)}). Correct it, or fetch it again."
        ) from error


def _stacked_config(
    config: Mapping[str, Any], stacked: Stacked, inputs: Sequence[Input], owner: int
) -> dict[str, Any]:
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    if not changed:
        return changed
    configs = [read_json(entry.home / "config.json") for entry in inputs]
    found = _count_layers(changed, stacked, owner)
    for path in found:
        levels = [at_level(one, path) or at_level(config, path) for one in configs]
        _change_level(reached(changed, path), levels, stacked)
    if stacked.kind == "encoder" and "num_layers" in config and "num_decoder_layers" not in config:
        changed["num_decoder_layers"] = config["num_layers"]  # its default
    for path in found:
        _write_types(changed, configs, path, stacked)
    return changed


def with_depth(config: Mapping[str, Any], stacked: Stacked, owner: int) -> dict[str, Any]:
    """Return a model's config with the number of layers that the output of slices has."""
    changed = copy.deepcopy(dict(config))
    if changed:
        _count_layers(changed, stacked, owner)
    return changed


def _count_layers(config: dict[str, Any], stacked: Stacked, owner: int) -> list[Path]:
    """Write the number of layers; return the levels of the config that have it."""
    depth = stacked.depths[owner]
    paths = list(_levels(config, stacked.kind))
    keys = _COUNTS.get(stacked.kind, _COUNTS[""])
    found = [p for p in paths if any(at_level(config, p).get(key) == depth for key in keys)]
    if stacked.kind == "decoder" and any("decoder_layers" in at_level(config, p) for p in found):
        keys = keys[:1]
    if stacked.kind == "decoder" and "num_layers" in config:
        config["num_decoder_layers"] = depth  # T5's default is `num_layers`
        keys, found = ("num_decoder_layers",), [()]
    if not found and (full := effective_config(config)) is not None:
        for path in _levels(full, stacked.kind):
            for key in keys:
                if at_level(full, path).get(key) == depth and path not in found:
                    reached(config, path)[key] = depth
                    found.append(path)
    for path in found:
        level = reached(config, path)
        for key in keys:
            if level.get(key) == depth:
                level[key] = stacked.num_layers
    return found


def _levels(config: Mapping[str, Any], kind: str) -> Iterator[Path]:
    """Yield the keys that lead to the parts of a config that are of a kind of stack."""
    if kind not in ("vision", "audio"):
        yield from language_levels(config)
        if isinstance(config.get(kind), dict):
            yield (kind,)
        return
    pattern = re.compile({"vision": "visi|visual", "audio": "audio|speech"}[kind])

    def inner(level: Mapping[str, Any], path: Path) -> Iterator[Path]:
        for key, value in level.items():
            if isinstance(value, dict):
                if pattern.search(key):
                    yield (*path, key)
                yield from inner(value, (*path, key))

    yield from inner(config, ())


def _change_level(level: dict[str, Any], levels: Sequence[Level], stacked: Stacked) -> None:
    """Change what a part of the config says of single layers.

    Args:
        level: the part of the output's config.
        levels: by input the same part of its config.
    """
    for key in list(level):
        if key in _NUMBERS and isinstance(level[key], list):
            level[key] = [
                layer
                for layer, (number, own) in enumerate(_origins(stacked))
                if own in (levels[number].get(key) or ())
            ]
        elif _PER_LAYER.search(key) and isinstance(level[key], list):
            values = _each(key, levels, stacked)
            if values is not None:
                level[key] = values
    if level.get("num_nextn_predict_layers"):
        level["num_nextn_predict_layers"] = 0  # these layers are left out
    _change_windows(level, levels, stacked)
    _change_sparse_steps(level, levels, stacked)
    _change_dense_start(level, levels, stacked)
    periods = {**_PERIODS}
    if not any(key in level for key in _TYPES):
        periods |= dict.fromkeys(_ATTENTION_PERIODS)
    for key, offset in periods.items():
        if isinstance(level.get(key), int) and level[key] > 1:
            _check_period(key, offset, level, levels, stacked)


def _origins(stacked: Stacked) -> Iterator[tuple[int, int]]:
    """Yield by layer of the output the number of the input that it is from, and its layer."""
    for one in stacked.slices:
        start, stop = one.ranges[one.first]
        yield from ((one.first, layer) for layer in range(start, stop))


def _each(key: str, levels: Sequence[Level], stacked: Stacked) -> list[Any] | None:
    """Return the value of each layer; None if a model's list is not one of its layers."""
    found = []
    for number, own in _origins(stacked):
        values = levels[number].get(key)
        if not isinstance(values, list) or len(values) != stacked.depths[number]:
            return None
        found.append(values[own])
    return found


def _change_windows(level: dict[str, Any], levels: Sequence[Level], stacked: Stacked) -> None:
    """Change from which layer on Qwen2 attends within a window."""
    if not isinstance(level.get("max_window_layers"), int):
        return

    def is_full(number: int, own: int) -> bool:
        first = levels[number].get("max_window_layers")
        return not levels[number].get("use_sliding_window") or own < (first or 0)

    if not level.get("use_sliding_window"):
        level["max_window_layers"] = stacked.num_layers
        return
    full = _start_of(_told(stacked, is_full))
    if full is not None:
        level["max_window_layers"] = full
    elif "layer_types" not in level:
        level["layer_types"] = [
            "full_attention" if is_full(*origin) else "sliding_attention"
            for origin in _origins(stacked)
        ]


def _change_sparse_steps(level: dict[str, Any], levels: Sequence[Level], stacked: Stacked) -> None:
    """Change which layers of Qwen2-MoE have experts."""
    if not isinstance(level.get("decoder_sparse_step"), int):
        return

    def is_sparse(number: int, own: int) -> bool:
        step = levels[number].get("decoder_sparse_step") or 1
        return own not in (levels[number].get("mlp_only_layers") or ()) and (own + 1) % step == 0

    sparse, step = _told(stacked, is_sparse), level["decoder_sparse_step"]
    if any(told and (layer + 1) % step for layer, told in enumerate(sparse)):
        step = level["decoder_sparse_step"] = 1
    dense = [layer for layer, told in enumerate(sparse) if not told and (layer + 1) % step == 0]
    if dense or "mlp_only_layers" in level:
        level["mlp_only_layers"] = dense


def _change_dense_start(level: dict[str, Any], levels: Sequence[Level], stacked: Stacked) -> None:
    """Change how many layers of DeepSeek come before those with experts."""
    key = "first_k_dense_replace"
    if not isinstance(level.get(key), int):
        return

    def is_dense(number: int, own: int) -> bool:
        frequency = levels[number].get("moe_layer_freq") or 1
        return bool(own < (levels[number].get(key) or 0) or own % frequency)

    told, frequency = _told(stacked, is_dense), level.get("moe_layer_freq") or 1
    for start in range(len(told) + 1):
        if told == [layer < start or bool(layer % frequency) for layer in range(len(told))]:
            level[key] = start
            return
    raise OutlierMergeError(
        f"config.json: {key} {level[key]} says that only the first layers have no experts, which "
        "is not so of these slices: take no dense layers after others"
    )


def _check_period(
    key: str, offset: str | None, level: Level, levels: Sequence[Level], stacked: Stacked
) -> None:
    def is_told(one: Level, layer: int) -> bool:
        return bool((layer - ((offset and one.get(offset)) or 0)) % (one.get(key) or 1))

    for layer, (number, own) in enumerate(_origins(stacked)):
        same = levels[number].get(key) == level[key]
        remainder = layer % level[key] == own % level[key]
        if not (same and remainder) and is_told(level, layer) != is_told(levels[number], own):
            raise OutlierMergeError(
                f"config.json: {key} {level[key]} tells the kinds of layers by their numbers. "
                f"Layer {layer} of the output would be of another kind than layer {own}, which "
                f"it is from: take ranges that begin and end at multiples of {level[key]}"
            )


def _told(stacked: Stacked, tell: Callable[[int, int], bool]) -> list[bool]:
    return [tell(*origin) for origin in _origins(stacked)]


def _start_of(told: Sequence[bool]) -> int | None:
    """Return how many are true at the start; None if others are, too."""
    start = sum(told)
    return start if all(told[:start]) else None


def _write_types(
    config: dict[str, Any], configs: Sequence[Mapping[str, Any]], path: Path, stacked: Stacked
) -> None:
    """Write the types of layers where the model type's default for them would be another.

    The defaults are asked for only where something in the config may vary over the layers, since
    that takes seconds.
    """
    level = at_level(config, path)
    without_windows = level.get("use_sliding_window") is False
    varies = any(
        value and _VARIES.search(key) and not (without_windows and "window" in key)
        for key, value in level.items()
    )
    if not varies or any(key in level for key in _TYPES):
        return
    filled = effective_config(config)
    own = {number: effective_config(configs[number]) for number, _ in _origins(stacked)}
    if filled is None or not all(own.values()):
        return
    levels = [at_level(own.get(number) or {}, path) for number in range(len(configs))]
    for key in _TYPES:
        values = _each(key, levels, stacked)
        default = at_level(filled, path).get(key)
        if values is not None and default is not None and values != default:
            reached(config, path)[key] = values
