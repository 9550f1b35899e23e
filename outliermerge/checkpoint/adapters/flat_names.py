"""Finds the layers of a base that the names in a LoRA file mean.

Kohya's scripts and LyCORIS write a layer's name with underscores in place of all dots, so a name
cannot be taken apart. It is looked for among the names of the base, written in the same way.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from outliermerge.errors import listing, shown

_PREFIX = re.compile(
    r"^(?P<part>(?:lora|lycoris|loha|lokr|oft)_(?:unet|transformer|te\d?|prior_\w+?)(?=_)"
    r"|lycoris(?=_)|(?:unet|transformer|prior|text_encoder(?:_\d)?|diffusion_model)(?=\.))[._]+"
)
_DENOISER = ("unet/", "transformer/", "prior/", "model.diffusion_model.", "diffusion_model.")
_FIRST = (
    "text_encoder/",
    "text_encoder/text_model.",
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.",
)
# Where the parts of a model are in its base, for names that fit several.
_ROOTS = {
    "unet": _DENOISER,
    "transformer": _DENOISER,
    "diffusion_model": _DENOISER,
    "prior": _DENOISER,
    "te": _FIRST,
    "te1": _FIRST,
    "text_encoder": _FIRST,
    "te2": ("text_encoder_2/", "text_encoder_2/text_model."),
    "text_encoder_2": ("text_encoder_2/", "text_encoder_2/text_model."),
    "te3": ("text_encoder_3/",),
    "text_encoder_3": ("text_encoder_3/",),
}
_BOUNDARY = re.compile(r"[./]")
_INNER = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(
    r"^(?P<side>down|mid|up)_block(?:s\.(?P<block>\d+))?"
    r"\.(?P<kind>attentions|resnets|downsamplers|upsamplers)\.(?P<number>\d+)\.(?P<rest>.+)$"
)


@dataclass(frozen=True)
class Group:
    """The layers of a file whose names begin alike.

    Attributes:
        start: how they begin: `lora_unet_`, `text_encoder.`, or nothing.
        part: which part of a model that is: `unet`, `te1`; "" if it does not say.
        layers: for each layer, by its whole name, the rest of the name with underscores.
    """

    start: str
    part: str
    layers: Mapping[str, str]


def groups_of(layers: Collection[str]) -> list[Group]:
    """Return the layers of a file, those together whose names begin alike.

    >>> groups_of(["lora_te1_encoder_fc1", "unet.conv_in"])[0].layers
    {'lora_te1_encoder_fc1': 'encoder_fc1'}
    """
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for layer in layers:
        match = _PREFIX.match(layer)
        start = match[0] if match else ""
        part = re.sub(r"^(lora|lycoris|loha|lokr|oft)_?", "", match["part"]) if match else ""
        found[start, part][layer] = _flat(layer.removeprefix(start))
    return [Group(start, part, layers) for (start, part), layers in found.items()]


class NotFoundError(Exception):
    """Names that mean no layer of the base, or several; its text says which."""


def targets_of(group: Group, base: Collection[str]) -> dict[str, str]:
    """Return for each layer of a group the name of the base's weight.

    All layers of a group are in one place of the base: what comes before the names is the same.

    Raises:
        NotFoundError: layers mean no tensor, or several.
    """
    hits: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    wanted = set(group.layers.values())
    own = _ROOTS.get(group.part)
    others = {root for roots in _ROOTS.values() for root in roots} - set(own) if own else set()
    for name in base:
        if not name.endswith(".weight"):
            continue
        for root, tail in _tails(name.removesuffix(".weight")):
            if root in others:
                continue
            for alias in {_flat(tail), *map(_flat, _aliases(tail))}:
                if alias in wanted:
                    hits[root][alias].append(name)
    whole = [root for root, found in hits.items() if len(found) == len(wanted)]
    if len(whole) > 1:
        known = [root for root in whole if root in _ROOTS.get(group.part, ())]
        whole = known or whole
    best = max(hits, key=lambda root: len(hits[root]), default=None)
    if best is None or not whole:
        found = hits[best] if best is not None else {}
        lacking = [layer for layer, rest in group.layers.items() if rest not in found]
        raise NotFoundError(
            f"{len(lacking)} of its {len(group.layers)} layers {group.start}… are none of the "
            f"base's:\n{listing(lacking, limit=5)}"
        )
    if len(whole) > 1:
        layer, rest = next(iter(group.layers.items()))
        each = [hits[root][rest][0] for root in whole]
        raise NotFoundError(
            f"its layers {group.start}… could be in several places of the base: {shown(layer)} is\n"
            f"{listing(each)}"
        )
    chosen = hits[whole[0]]
    for layer, rest in group.layers.items():
        if len(chosen[rest]) > 1:
            raise NotFoundError(
                f"its layer {shown(layer)} could be several of the base's:\n{listing(chosen[rest])}"
            )
    return {layer: chosen[rest][0] for layer, rest in group.layers.items()}


def _flat(name: str) -> str:
    return _BOUNDARY.sub("_", name)


def _tails(name: str) -> Iterator[tuple[str, str]]:
    """Yield the beginnings and ends of a name, cut at each of its dots."""
    yield "", name
    for match in _BOUNDARY.finditer(name):
        yield name[: match.end()], name[match.end() :]


def _aliases(tail: str) -> Iterator[str]:
    """Yield the names that other programs have for a layer.

    >>> [*_aliases("down_blocks.1.resnets.0.conv1")], [*_aliases("encoder.layers.0.mlp.fc1")]
    (['input_blocks.4.0.in_layers.2'], ['text_model.encoder.layers.0.mlp.fc1'])
    >>> [*_aliases("input_blocks.4.0.in_layers.2")], [*_aliases("output_blocks.5.2.conv")]
    (['down_blocks.1.resnets.0.conv1'], ['up_blocks.1.upsamplers.0.conv'])
    """
    if tail.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")):
        yield f"text_model.{tail}"  # a CLIP text model that transformers 5 saved
    if tail in _OUTER:
        yield _OUTER[tail]
    yield from (ours for ours, theirs in _OUTER.items() if theirs == tail)
    if match := _BLOCK.match(tail):
        yield from _as_original(match)
    elif tail.startswith(("input_blocks.", "middle_block.", "output_blocks.")):
        yield from _as_diffusers(tail)


def _as_original(match: re.Match[str]) -> Iterator[str]:
    """Yield the original names of a layer of a Stable Diffusion U-Net of diffusers.

    Its blocks have two residual layers on the way down, and three on the way up.
    """
    side, kind, rest = match["side"], match["kind"], match["rest"]
    block, number = int(match["block"] or 0), int(match["number"])
    if kind in ("attentions", "resnets") and number > (2 if side == "up" else 1):
        return
    inner = rest if kind == "attentions" else _INNER.get(rest)
    place = 1 if kind == "attentions" else 0
    if kind == "downsamplers" and rest == "conv":
        yield f"input_blocks.{3 + 3 * block}.0.op"
    elif kind == "upsamplers" and rest == "conv":
        yield from (f"output_blocks.{3 * block + 2}.{n}.conv" for n in (1, 2))
    elif inner is not None and side == "mid":
        yield f"middle_block.{1 if place else 2 * number}.{inner}"
    elif inner is not None:
        at = 3 * block + number
        first = f"input_blocks.{at + 1}" if side == "down" else f"output_blocks.{at}"
        yield f"{first}.{place}.{inner}"


def _as_diffusers(tail: str) -> Iterator[str]:
    """Yield the name that diffusers has for a layer of a Stable Diffusion U-Net."""
    side, *numbers = tail.split(".", 3 if not tail.startswith("middle") else 2)
    if len(numbers) < 2 or not all(n.isdigit() for n in numbers[:-1]):
        return
    *places, rest = numbers
    inner = next((ours for ours, theirs in _INNER.items() if theirs == rest), None)
    if side == "middle_block":
        place = int(places[0])
        if place == 1:
            yield f"mid_block.attentions.0.{rest}"
        elif inner is not None:
            yield f"mid_block.resnets.{place // 2}.{inner}"
        return
    if len(places) < 2:
        return
    number, place = map(int, places)
    block, index = divmod(number - 1 if side == "input_blocks" else number, 3)
    name = "down_blocks" if side == "input_blocks" else "up_blocks"
    if rest == "op":
        yield f"down_blocks.{block}.downsamplers.0.conv"
    elif rest == "conv":
        yield f"up_blocks.{block}.upsamplers.0.conv"
    elif place == 1:
        yield f"{name}.{block}.attentions.{index}.{rest}"
    elif inner is not None:
        yield f"{name}.{block}.resnets.{index}.{inner}"
