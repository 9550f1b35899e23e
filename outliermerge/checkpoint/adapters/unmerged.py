"""Detects tensors that are not weights but parts of one: factors, norms, masks.

They are detected by their neighbours and their names. Adapters' factors are next to the layer that
they change (peft, kohya's sd-scripts, LyCORIS, diffusers, torchtune); torch's parametrizations
store parts in place of a weight.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_DIFFUSERS = r"\w+_lora\d*(?=\.(?:down|up)\.)|lora_linear_layer"
_KOHYA = r"lora_(?:down|up|mid)|dora_scale|hada_[wt]\d\w*|lokr_[wt]\d\w*|oft_(?:blocks|diag)"
_PEFT = (
    r"(?:scaled_)?lora_(?:[ABab]|embedding_[AB]|magnitude_vector)|scaled_lora_s|scaled_noise_s"
    r"|ia3_l|(?:p?vera)_lambda_\w+|b?oft_[RSrs]|hra_u|trainable_tokens_delta"
)
_FACTOR = re.compile(
    rf"(?:^|[./])(?:(?:{_DIFFUSERS}|{_KOHYA}|{_PEFT})(?=\.|$)|lora\.(?:down|up)\.)"
)
# kohya's scripts and LyCORIS name modules with underscores in place of all dots.
_FLAT = re.compile(r"^(?:lora|lycoris|oft|loha|lokr)_(?:unet|te\d?|prior_\w+|transformer)_[^.]+\.")
_WRAPPED = re.compile(r"^(?P<layer>.+\.)(?:base_layer|original_module)\.")
# Some of these are in any such name. Looking for words in all names at once is fast, and a model
# may have many names.
_HINTS = ("lora", "lycoris", "loha", "hada_", "lok", "ia3", "lambda_", "oft_", "hra_u",
          "tokens_delta", "dora_", "base_layer", "original_module", "scaled_noise")  # fmt: skip
_MADE = ("parametrizations.", "_g\n", "_orig\n")
_FOR_KOHYA = re.compile(rf"(?:^|[./])(?:{_KOHYA})(?=\.|$)")
# The parts from which torch makes a weight, next to the original tensor.
_COMPANIONS = {
    r"^(?P<stem>(?:.*\.)?)(?P<weight>weight\w*)_g$": ("_v",),
    r"^(?P<stem>(?:.*\.)?)(?P<weight>weight\w*|bias)_orig$": ("_mask", "_u"),
}
_PARAMETRIZED = re.compile(r"^(?P<stem>(?:.*\.)?)parametrizations\.(?P<weight>[^.]+)\.")


def adapter_parts(names: Collection[str]) -> list[str]:
    """Return the names that belong to an adapter next to the weights that it changes.

    >>> adapter_parts(["q.base_layer.weight", "q.lora_A.default.weight", "norm.weight"])
    ['q.lora_A.default.weight']
    >>> adapter_parts(["q.base_layer.weight", "q.some_new_kind.default", "norm.weight"])
    ['q.some_new_kind.default']
    """
    text = "\n".join(names)
    if not any(hint in text for hint in _HINTS):
        return []
    wrapped = [match["layer"] for name in names if (match := _WRAPPED.match(name))]
    layers = tuple(dict.fromkeys(wrapped))
    found = {
        name
        for name in names
        if _FACTOR.search(name)
        or _FLAT.match(name)
        or (layers and name.startswith(layers) and not _WRAPPED.match(name))
    }
    alphas = {f"{_FACTOR.split(name)[0]}.alpha" for name in found}
    return [name for name in names if name in found or name in alphas]


def how_to_merge(names: Iterable[str], parts: Collection[str]) -> str:
    """Return what kind an unmerged adapter is, and how to merge it."""
    names = list(names)
    if len(names) > len(parts):
        return (
            "an unmerged adapter (of LoRA's kind) in a model's state dict, as a PeftModel has it "
            "before it is merged. How much it changes (lora_alpha, r) is not in the file. Load it "
            "into a PeftModel with the settings of its training, then merge_and_unload() and "
            "save_pretrained(); or save the PeftModel by its own save_pretrained(), and give that "
            "adapter as the model."
        )
    if any(_FLAT.match(name) or _FOR_KOHYA.search(name) for name in parts):
        return (
            "an adapter of LyCORIS's of a kind that is not read (OFT, BOFT, GLoRA, …). Merge it "
            "into its base model first, with LyCORIS's tools/merge.py."
        )
    return (
        "a LoRA or another adapter alone. To read it, peft's adapter_config.json is needed "
        "beside it, which says how much it changes, or an alpha beside each layer's factors. Of a "
        "LoRA that has neither, the program that trained it merges it into its base model."
    )


def composed(names: Collection[str]) -> dict[str, str]:
    """Return for each tensor that is a part of a weight the name of that weight.

    >>> composed(["conv.weight_g", "conv.weight_v", "conv.bias"])
    {'conv.weight_g': 'conv.weight', 'conv.weight_v': 'conv.weight'}
    """
    text = "\n".join((*names, ""))
    if not any(hint in text for hint in _MADE):
        return {}
    known = set(names)
    found: dict[str, str] = {}
    for name in names:
        if match := _PARAMETRIZED.match(name):
            found[name] = match["stem"] + match["weight"]
        for pattern, companions in _COMPANIONS.items():
            if match := re.match(pattern, name):
                weight = match["stem"] + match["weight"]
                for other in known.intersection(weight + end for end in companions):
                    found[name] = found[other] = weight
    return {name: found[name] for name in names if name in found}
