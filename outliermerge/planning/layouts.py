"""Pairs of layouts that no rename can convert, and the programs that can."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_APART = re.compile(r"(?<![^./])experts\.\d+\.")
_FUSED = re.compile(r"(?<![^./])experts\.(?!\d)")
# Names in diffusers' layout only: a UNet in the original layout also has transformer_blocks.
_DIFFUSERS = re.compile(
    r"^(?:unet|transformer\w*|vae|text_encoder\w*|prior|controlnet)/"
    r"|(?<![^./])(?:down_blocks\.\d|mid_block\.|(?:single_)?transformer_blocks\.\d)"
)
_ORIGINAL = re.compile(
    r"(?<![^./])(?:model\.diffusion_model|first_stage_model|cond_stage_model|conditioner"
    r"|(?:input|output|double|single|joint)_blocks\.\d+|(?:encoder\.down|decoder\.up)\.\d+)\."
)
# Rotary embeddings rotate neighbouring elements in Meta's and torchtune's code, but the two halves
# of a head in transformers.
_TURNS_NEIGHBOURS = re.compile(r"(?<![^./])(?:w[qk]\.|sa_norm\.scale$)")
_TURNS_HALVES = re.compile(r"(?<![^./])self_attn\.[qk]_proj\.")


def how_to_convert(names: Collection[str], others: Collection[str], places: tuple[str, str]) -> str:
    """Return how to convert two models to one layout; "" if no known layouts are the reason.

    Args:
        names, others: the tensor names of the two models.
        places: what the spec calls the two models.
    """
    experts = [_experts(set(names) - set(others)), _experts(set(others) - set(names))]
    if all(experts) and sum(bool(_APART.search(name)) for name in experts) == 1:
        (apart, one), (fused, other) = sorted(
            zip(experts, places, strict=True), key=lambda pair: not _APART.search(pair[0])
        )
        return (
            f"Experts are apart in {one} ({apart}) and fused in {other} ({fused}): the same "
            "weights in two forms, which no rename pairs. Loading and saving with one version of "
            f"transformers makes one form of both: load {one} with transformers 5 and save it by "
            "save_pretrained(FOLDER, save_original_format=False), which fuses them as transformers "
            "does. No other program is needed where transformers is installed and both models "
            "have a config.json with a model type that it converts, or where `convert` in the spec "
            "says what is made of what. A policy for such tensors would lose what was trained in "
            "them."
        )
    image = {_image_layout(names): places[0], _image_layout(others): places[1]}
    if {"diffusers", "original"} <= image.keys():
        return (
            f"{image['diffusers']} is in the layout of diffusers, {image['original']} in the "
            "original layout of one file: the same weights under other names, and partly in other "
            "shapes. Convert one of them: diffusers' from_single_file() reads such a file and "
            "save_pretrained() writes a folder; its scripts/convert_diffusers_to_original_*.py "
            "make a file of a folder."
        )
    turns = {_turns(names): places[0], _turns(others): places[1]}
    if {"neighbours", "halves"} <= turns.keys():
        return (
            f"{turns['neighbours']} is in the layout of Meta's code or torchtune, "
            f"{turns['halves']} in that of transformers: their rotary embeddings pair other rows "
            "of queries and keys, so that these are in another order, and a rename would merge "
            "rows that do not belong together. Convert one of them: transformers' "
            "convert_llama_weights_to_hf.py or convert_mistral_weights_to_hf.py, or torchtune's "
            "FullModelHFCheckpointer."
        )
    return ""


def _experts(names: Collection[str]) -> str:
    """Return the first name of an expert that is stored singly, or else of stacked experts."""
    listed = sorted(names)
    return _first(_APART, listed) or _first(_FUSED, listed)


def _turns(names: Collection[str]) -> str:
    if _first(_TURNS_NEIGHBOURS, names):
        return "neighbours"
    return "halves" if _first(_TURNS_HALVES, names) else ""


def _image_layout(names: Collection[str]) -> str:
    if _first(_ORIGINAL, names):
        return "original"
    return "diffusers" if _first(_DIFFUSERS, names) else ""


def _first(pattern: re.Pattern[str], names: Iterable[str]) -> str:
    return next((name for name in names if pattern.search(name)), "")
