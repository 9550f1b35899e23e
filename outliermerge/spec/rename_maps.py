"""Built-in maps of tensor names from one layout to another, and back."""

from __future__ import annotations

import re

# Prefixes of names in two layouts. Those of LLaVA are from the conversion scripts
# (convert_llava_weights_to_hf.py, convert_llava_next_weights_to_hf.py) and the model classes of
# huggingface/transformers. Several pairs may have the same second name; the first such pair is used
# backwards.
_LLAVA_ORIGINAL_TO_HF = (
    ("model.embed_tokens.", "language_model.model.embed_tokens."),
    ("model.layers.", "language_model.model.layers."),
    ("model.norm.", "language_model.model.norm."),
    ("lm_head.", "language_model.lm_head."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),
)
_LLAVA_V4_TO_V5 = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("image_newline", "model.image_newline"),
    ("vision_tower.vision_model.", "model.vision_tower."),
    # transformers 5 saves the vision tower without the level `vision_model`.
    ("vision_tower.", "model.vision_tower."),
    # The names of transformers 4.52 to 4.57 still have that level.
    ("vision_tower.vision_model.", "model.vision_tower.vision_model."),
)
# Names of Qwen2-VL and Qwen2.5-VL; the published files have those of transformers before 4.52.
_QWEN_VL_V4_TO_V5 = (("model.", "model.language_model."), ("visual.", "model.visual."))
_PAIRS = {
    "llava_original_to_hf": _LLAVA_ORIGINAL_TO_HF,
    "llava_next_original_to_hf": (
        *_LLAVA_ORIGINAL_TO_HF,
        ("model.image_newline", "image_newline"),
    ),
    "transformers_v4_to_v5": _LLAVA_V4_TO_V5,
    "qwen_vl_v4_to_v5": _QWEN_VL_V4_TO_V5,
}
# Each map a_to_b can be used backwards, as b_to_a.
_BACKWARDS = {
    "llava_hf_to_original": "llava_original_to_hf",
    "llava_next_hf_to_original": "llava_next_original_to_hf",
    "transformers_v5_to_v4": "transformers_v4_to_v5",
    "qwen_vl_v5_to_v4": "qwen_vl_v4_to_v5",
}
# Maps of the ends of names: an expression and its replacement.
_NORM = r"(?i:layer_?norm\w*)"  # elsewhere, as in ConvNeXt, gamma is not a norm's scale
_ENDS = {
    # Names in BERT's and ViT's first checkpoints, which came from TensorFlow.
    "gamma_beta_to_weight_bias": (
        (rf"({_NORM})\.gamma$", r"\1.weight"),
        (rf"({_NORM})\.beta$", r"\1.bias"),
    ),
    "weight_bias_to_gamma_beta": (
        (rf"({_NORM})\.weight$", r"\1.gamma"),
        (rf"({_NORM})\.bias$", r"\1.beta"),
    ),
    # torch.nn.utils.weight_norm and its successor torch.nn.utils.parametrizations.weight_norm.
    "weight_norm_to_parametrizations": (
        (r"(?<![^.])weight_g$", "parametrizations.weight.original0"),
        (r"(?<![^.])weight_v$", "parametrizations.weight.original1"),
    ),
    "parametrizations_to_weight_norm": (
        (r"(?<![^.])parametrizations\.weight\.original0$", "weight_g"),
        (r"(?<![^.])parametrizations\.weight\.original1$", "weight_v"),
    ),
}
MAP_NAMES = (*_PAIRS, *_BACKWARDS, *_ENDS)


def by_map(map_name: str, name: str) -> str:
    """Return a name as a map changes it."""
    if map_name in _ENDS:
        for pattern, replacement in _ENDS[map_name]:
            name = re.sub(pattern, replacement, name)
        return name
    pairs = _pairs(map_name)
    known = [old for old in pairs if name.startswith(old)]
    if not known:
        return name
    longest = max(known, key=len)
    return pairs[longest] + name[len(longest) :]


def _pairs(map_name: str) -> dict[str, str]:
    forwards = _PAIRS[_BACKWARDS.get(map_name, map_name)]
    ordered = reversed(forwards)  # if two pairs begin alike, the first one wins
    if map_name in _BACKWARDS:
        return {new: old for old, new in ordered}
    return dict(ordered)
