"""Reads a PEFT adapter's config, and refuses adapters that cannot be computed from their file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.patterns import (
    MAX_SECONDS,
    Budget,
    Pattern,
    PatternError,
    TooSlowError,
)
from outliermerge.errors import OutlierMergeError, listing, quoted, shown
from outliermerge.storage.files import check_file
from outliermerge.storage.stamps import is_there

CONFIG_NAME = "adapter_config.json"
SCALED_LORA, SCALED_NOISE = "SCALED_LORA", "SCALED_NOISE"
PATTERNS = ("rank_pattern", "alpha_pattern")
FILE_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
# What LLaVA's trainers, and others after them, save of what was trained beside the LoRA.
BESIDE_NAMES = ("non_lora_trainables.bin", "non_lora_state_dict.bin")
# Keys that a config may have: they are read here, or do not affect the merged weights.
_READ = {
    "LORA": {
        "alpha_pattern",
        "bias",
        "fan_in_fan_out",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "peft_type",
        "r",
        "rank_pattern",
        "target_parameters",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    },
    "LOHA": {"alpha", "alpha_pattern", "peft_type", "r", "rank_pattern"},
    "LOKR": {"alpha", "alpha_pattern", "peft_type", "r", "rank_pattern"},
    "IA3": {"fan_in_fan_out", "feedforward_modules", "peft_type"},
    # Keys of the adapters of outliermerge.peft.
    SCALED_LORA: {"fan_in_fan_out", "lora_alpha", "peft_type", "r", "train_scale"},
    SCALED_NOISE: {"peft_type", "seed"},
}
# Kinds of adapters that change a model's computation, not its weights: there is nothing to merge.
_PROMPTS = "trains what is put before the input, and changes no weight of the model"
_ROUTERS = "changes a layer's output by what its input is, and not its weights"
_NEVER_MERGED = {
    "ADAPTION_PROMPT": _PROMPTS,
    "CARTRIDGE": _PROMPTS,
    "CPT": _PROMPTS,
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "PREFIX_TUNING": _PROMPTS,
    "PROMPT_TUNING": _PROMPTS,
    "LILY": _ROUTERS,
    "POLY": _ROUTERS,
    "SHADOW": _ROUTERS,
    "XLORA": _ROUTERS,
}
# Settings of LoRA that peft cannot merge either.
_NEVER_MERGED_SETTINGS = {"alora_invocation_tokens", "arrow_config", "layer_replication"}
_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module"
    r"|base_model\.model)\."
)
_WITHOUT_MEANING = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "decompose_both",
    "decompose_factor",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init",
    "init_ia3_weights",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "module_dropout",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "rank_dropout",
    "rank_dropout_scale",
    "revision",
    "runtime_config",
    "seed",
    "target_modules",
    "task_type",
    "use_effective_conv2d",
    "velora_config",
}
# Initialisations that leave the base's weights unchanged. Others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA) subtract something from the base, which the adapter's file does not contain.
_LEAVES_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds a PEFT adapter."""
    return is_there(folder / CONFIG_NAME) and any(is_there(folder / name) for name in FILE_NAMES)


def base_of_adapter(folder: Path) -> str | None:
    """Return the name of the model that an adapter was trained on, from its config."""
    config = read_json(folder / CONFIG_NAME)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        return None
    local = name.startswith((".", "/", "~"))
    return f"{name}@{revision}" if revision and not local else name


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return an adapter's config after checking that the adapter can be computed.

    Raises:
        OutlierMergeError: the adapter is of an unsupported kind, or its file is not enough to
            compute the weights.
    """
    path = folder / CONFIG_NAME
    check_file(path, folder)
    config = read_json(path)
    if not config:
        raise OutlierMergeError(f"{path}: no JSON object with settings. Fetch it again.")
    check_config(path, config)
    return config


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is not enough to compute the weights, by its config.

    Args:
        path: the file that holds the config, for errors.
    """
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind in _NEVER_MERGED:
        raise OutlierMergeError(
            f"{path}: a PEFT adapter of type {kind}: it {_NEVER_MERGED[kind]}, so that it has no "
            "merged form. Leave it out, or use it beside the merged model if that is still of use."
        )
    if not isinstance(kind, str) or kind not in _READ:
        raise OutlierMergeError(
            f"{path}: a PEFT adapter of type {shown(kind)}; only LORA (with rsLoRA and DoRA), "
            f"LOHA, LOKR, IA3, {SCALED_LORA} and {SCALED_NOISE} can be a model. Merge it with "
            "peft's merge_and_unload(), then save_pretrained()."
        )
    initial = config.get("init_lora_weights")
    if initial not in _LEAVES_BASE:
        advice = (
            "Merge it with peft's merge_and_unload() where it was trained."
            if initial == "loftq"
            else "Convert it when it is saved: peft's save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)."
        )
        raise OutlierMergeError(
            f"{path}: init_lora_weights {quoted(initial)} also changed the base's weights, or is "
            "not "
            f"known not to, and the adapter does not hold that change. {advice}"
        )
    if kind == SCALED_NOISE and type(config.get("seed")) is not int:
        raise OutlierMergeError(
            f"{path}: seed: found {quoted(config.get('seed'))}, expected the integer that the "
            "noise was "
            "made from. Without it the adapter cannot be computed."
        )
    _check_types(path, config)
    unknown = [
        key for key, value in config.items() if value and key not in _READ[kind] | _WITHOUT_MEANING
    ]
    if unknown:
        advice = "Merge it with peft's merge_and_unload() where peft can, then save_pretrained()."
        if never := [key for key in unknown if key in _NEVER_MERGED_SETTINGS]:
            advice = f"With {', '.join(never)} it has no merged form."
        raise OutlierMergeError(
            f"{path}: cannot be computed with the settings:\n"
            + listing(f"{shown(key)}: {quoted(config[key])}" for key in unknown)
            + f"\n{advice}"
        )


def _check_types(path: Path, config: Mapping[str, Any]) -> None:
    for key, (expected, fits) in _TYPES.items():
        value = config.get(key)
        if value is not None and not fits(value):
            raise OutlierMergeError(f"{path}: {key}: found {quoted(value)}, expected {expected}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # type: ignore[arg-type]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_text_or_texts(value: object) -> bool:
    return _is_text(value) or _are_texts(value)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _are(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


_TEXTS = ("a list of texts", _are_texts)
_TEXT_OR_TEXTS = ("a text or a list of texts", _is_text_or_texts)
_BOOL = ("true or false", _is_bool)
# Settings with a type that peft and this code rely on; they may be null.
_TYPES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "r": ("a count", _is_count),
    "alpha": ("a number", _is_number),
    "lora_alpha": ("a number", _is_number),
    "rank_pattern": ("an object of counts", _are(_is_count)),
    "alpha_pattern": ("an object of numbers", _are(_is_number)),
    "target_modules": _TEXT_OR_TEXTS,
    "exclude_modules": _TEXT_OR_TEXTS,
    "layers_pattern": _TEXT_OR_TEXTS,
    "feedforward_modules": _TEXT_OR_TEXTS,
    "modules_to_save": _TEXTS,
    "target_parameters": _TEXTS,
    "peft_version": ("a text", _is_text),
    "layers_to_transform": (
        "a count or a list of counts",
        lambda value: _is_count(value) or _are_counts(value),
    ),
    "trainable_token_indices": (
        "a list of counts, or an object of such lists",
        lambda value: _are_counts(value) or _are(_are_counts)(value),
    ),
    "use_dora": _BOOL,
    "use_rslora": _BOOL,
    "fan_in_fan_out": _BOOL,
    "lora_bias": _BOOL,
    "train_scale": _BOOL,
}


class LayerPatterns:
    """Tells which layers a config's expressions match, by peft's rules.

    Args:
        path: the path of the config, for errors.
        config: the contents of the config.

    Raises:
        OutlierMergeError: a pattern is not a valid regular expression.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path, self._budget = path, Budget()
        self._patterns: dict[str, Pattern] = {}
        for key in PATTERNS:
            for pattern in config.get(key) or ():
                self.ends_with("", pattern, key)

    def _pattern(self, key: str, pattern: str, text: str) -> Pattern:
        if text not in self._patterns:
            try:
                self._patterns[text] = Pattern(text, self._budget)
            except PatternError as error:
                raise OutlierMergeError(
                    f"{self._path}: {key}: {quoted(pattern)} is not a regular expression: "
                    f"{shown(error)}"
                ) from error
        return self._patterns[text]

    def ends_with(self, module: str, pattern: str, key: str = "trainable_token_indices") -> bool:
        """Tell whether a regular expression matches a layer's name, or its end after a dot.

        Raises:
            OutlierMergeError: matching takes too long.
        """
        # With the text that peft puts before it, flags for the whole expression are errors.
        return module == pattern or self._search(key, pattern, rf"\A(.*\.)?({pattern})$", module)

    def is_all(self, module: str, pattern: str, key: str) -> bool:
        """Tell whether a regular expression matches the whole of a layer's name.

        Raises:
            OutlierMergeError: it is none, or matching takes too long.
        """
        return self._search(key, pattern, rf"\A(?:{pattern})\Z", module)

    def _search(self, key: str, pattern: str, text: str, module: str) -> bool:
        compiled = self._pattern(key, pattern, text)
        try:
            return compiled.search(module)
        except TooSlowError as error:
            raise OutlierMergeError(
                f"{self._path}: the pattern {quoted(pattern)} takes more than {MAX_SECONDS} "
                f"seconds to match names such as {quoted(module)}. Write it without repeats "
                "within repeats, or name the layers one by one."
            ) from error

    def value(self, patterns: object, names: Sequence[str], default: Any) -> Any:
        """Return the value of the first pattern that a layer's name ends with.

        Args:
            names: the names that the layer may have; the first one that a pattern matches counts.
        """
        if isinstance(patterns, Mapping):
            for name in names:
                for pattern, value in patterns.items():
                    if self.ends_with(name, pattern):
                        return value
        return default


def alpha_key(config: Mapping[str, Any]) -> str:
    """Return the key of the config's alpha."""
    return "alpha" if config["peft_type"] in ("LOHA", "LOKR") else "lora_alpha"


def matches_end(name: str, wanted: str) -> bool:
    """Tell whether a name is the wanted one, or ends with it after a dot."""
    return name == wanted or name.endswith(f".{wanted}")


def is_saved_whole(config: Mapping[str, Any], name: str) -> bool:
    """Tell whether peft saves a tensor whole; the base may have another shape, or lack it."""
    modules = (*(config.get("modules_to_save") or ()), "embed_tokens", "lm_head")
    return any(f".{module}." in f".{name}" for module in modules)


def without_wrappers(module: str) -> str:
    """Return a layer's name without the parts that trainers' wrappers add.

    >>> without_wrappers("_fsdp_wrapped_module.model.layers.0._orig_mod.q_proj")
    'model.layers.0.q_proj'
    """
    return _WRAPPERS.sub("", module)
