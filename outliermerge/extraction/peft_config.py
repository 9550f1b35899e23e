"""The adapter_config.json of an adapter whose layers have ranks of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

# The peft that has laid out factors of packed experts as they are written here first.
_LAYOUT_SINCE = "0.19.0"


def peft_config(
    *,
    base: str,
    architectures: Collection[str],
    ranks: Mapping[str, int],
    parameters: Mapping[str, int],
    whole: Collection[str],
    all_modules: Collection[str],
    all_tensors: Collection[str],
    has_biases: bool,
    is_tied: bool,
    is_transposed: bool,
) -> dict[str, Any]:
    """Return peft's config of a LoRA whose product is the change itself: lora_alpha = r.

    Args:
        base: the name of the base model.
        architectures: of the base's config.
        ranks: by name of a factored module its rank.
        parameters: the same of what is factored as a parameter.
        whole: the modules that are saved whole.
        all_modules: the names of all modules, and of those that they are in.
        all_tensors: the names of all tensors.
        has_biases: the file has biases.
        is_tied: embeddings and head are one tensor, and are changed as one.
        is_transposed: layers store their weights (in, out).
    """
    every = {**ranks, **parameters}
    rank, _ = Counter(every.values()).most_common(1)[0] if every else (1, 0)
    pattern = _rank_pattern(every, rank)
    of_parameters = {
        "target_parameters": _targets(parameters, all_tensors),
        "peft_version": _LAYOUT_SINCE,
    }
    is_causal = any(str(name).endswith("ForCausalLM") for name in architectures)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal else None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": is_transposed,
        "bias": "all" if has_biases else "none",
        "target_modules": _targets(ranks, all_modules),
        "modules_to_save": sorted(whole) or None,
        "ensure_weight_tying": is_tied,
        **(of_parameters if parameters else {}),
    }


def _targets(ranks: Mapping[str, int], every: Collection[str]) -> list[str]:
    """Return the shortest names that match the factored modules, or parameters, and no others.

    >>> _targets({"a.0.q": 1, "a.1.q": 1, "a.0.v": 1}, ["a", "a.0", "a.1", "a.0.q", "a.1.q",
    ...     "a.0.v", "a.1.v"])
    ['a.0.v', 'q']
    """
    own = Counter(map(_last, ranks))
    others = Counter(map(_last, every))
    return sorted({_last(m) if own[_last(m)] == others[_last(m)] else m for m in ranks})


def _rank_pattern(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """Return the ranks that are not the default, by type of module where all of it have one.

    The first expression that matches the end of a name counts, so longer names come first.
    """
    by_type: dict[str, set[int]] = {}
    for module, rank in ranks.items():
        by_type.setdefault(_last(module), set()).add(rank)
    found: dict[str, int] = {}
    for module, rank in ranks.items():
        last = _last(module)
        is_one = len(by_type[last]) == 1
        if is_one and rank != default:
            found[last] = rank
        elif not is_one:
            found[module] = rank
    return dict(sorted(found.items(), key=lambda item: (-len(item[0]), item[0])))


def saved_whole(wanted: Collection[str], all_modules: Collection[str]) -> list[str]:
    """Return the modules that peft saves whole if these are named: it compares the ends of names.

    >>> saved_whole(["norm"], ["norm", "input_layernorm", "q"])
    ['input_layernorm', 'norm']
    """
    found = {module for module in all_modules if module.endswith(tuple(wanted))} if wanted else ()
    return sorted(found)


def _last(module: str) -> str:
    return module.rpartition(".")[2]
