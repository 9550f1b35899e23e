"""Which stacks of layers a model has, and what lies before and after the layers."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest

from outliermerge.errors import OutlierMergeError
from outliermerge.planning.layers import choose_stack, stacks_of


def architectures() -> list[str]:
    folder = files("mergekit") / "_data" / "architectures"
    return sorted(f.name for f in folder.iterdir() if f.name.endswith(".json"))


def modules(name: str) -> dict[str, tuple[str, Any]]:
    """Return the modules of one of mergekit's architectures, with the start of their names."""
    text = (files("mergekit") / "_data" / "architectures" / name).read_text()
    told = json.loads(text)
    if "modules" not in told:
        return {"": ("", told)}
    return {
        key: (each.get("weight_prefix", ""), each["architecture"])
        for key, each in told["modules"].items()
    }


def names(prefix: str, told: Any, key: str) -> list[str]:
    return [prefix + weight["name"] for weight in told[key]]


def layer_names(prefix: str, told: Any) -> list[str]:
    templates = [prefix + weight["name"] for weight in told["layer_templates"]["weights"]]
    return [name.replace("${layer_index}", str(n)) for name in templates for n in range(3)]


# Its head's name depends on the number of layers; of Whisper mergekit forgets a dot.
PECULIAR = ("phi-1.json", "whisper.json")


@pytest.mark.parametrize("name", [name for name in architectures() if name not in PECULIAR])
def test_what_is_before_and_after_the_layers_is_as_in_mergekit(name):
    found = modules(name)
    every = [n for prefix, told in found.values() for n in (
        *names(prefix, told, "pre_weights"), *layer_names(prefix, told),
        *names(prefix, told, "post_weights"),
    )]  # fmt: skip
    stacks = stacks_of(every)
    for key, (prefix, told) in found.items():
        layers = layer_names(prefix, told)
        start = layers[0].partition(".0.")[0] + "." if layers else None
        stack = next((stack for stack in stacks if stack.prefix == start), None)
        if stack is None or key == "multi_modal_projector":
            continue
        before, after = (names(prefix, told, f"{w}_weights") for w in ("pre", "post"))
        assert [n for n in before if stack.is_after(n)] == []
        # The adapter of Llama 4 lies behind the vision tower; it is none of its norms or heads.
        behind = [n for n in after if "vision_adapter" not in n]
        assert [n for n in behind if not stack.is_after(n)] == []
        others = [n for n in every if n not in (*before, *after) and not n.startswith(start)]
        assert [n for n in others if stack.is_after(n) and not n.endswith("head.weight")] == []


TOWERS = [
    *(f"model.language_model.layers.{n}.mlp.up_proj.weight" for n in range(3)),
    *(f"model.vision_tower.encoder.layers.{n}.mlp.fc1.weight" for n in range(2)),
    "model.language_model.norm.weight", "model.vision_tower.post_layernorm.weight",
    "model.multi_modal_projector.linear_1.weight", "lm_head.weight",
]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "prefix"),
    [
        ("text", "model.language_model.layers."),
        ("vision", "model.vision_tower.encoder.layers."),
        ("model.vision_tower.encoder.layers", "model.vision_tower.encoder.layers."),
    ],
)
def test_a_stack_is_found_by_its_kind_or_its_names(wanted, prefix):
    assert choose_stack(TOWERS, wanted, "m").prefix == prefix


@pytest.mark.parametrize(
    ("tensors", "wanted", "said"),
    [
        (TOWERS, None, "m has several stacks of layers, and `stack` does not say which one is "
         r"sliced: text (3 layers, model.language_model.layers.*), vision (2 layers, "),
        (TOWERS, "decoder", "found 'decoder', expected one of the stacks of m: text (3 layers, "),
        (["w.weight", "mlp.0.weight"], None, "m has no layers"),
    ],
)  # fmt: skip
def test_a_stack_that_is_unclear_or_absent_is_told(tensors, wanted, said):
    with pytest.raises(OutlierMergeError) as caught:
        choose_stack(tensors, wanted, "m")
    assert said in str(caught.value)


def test_each_tower_has_its_own_end_and_the_text_has_the_head():
    text, vision = (choose_stack(TOWERS, kind, "m") for kind in ("text", "vision"))
    assert [n for n in TOWERS[5:] if text.is_after(n)] == [TOWERS[5], TOWERS[8]]
    assert [n for n in TOWERS[5:] if vision.is_after(n)] == [TOWERS[6]]


@pytest.mark.parametrize(
    ("prefixes", "kinds"),
    [
        (["encoder.block.", "decoder.block."], ["encoder", "decoder"]),
        (["model.encoder.layers.", "model.decoder.layers."], ["encoder", "decoder"]),
        (["bert.encoder.layer."], ["text"]),
        (["model.decoder.layers."], ["text"]),
        (["text_model.encoder.layers.", "vision_model.encoder.layers."], ["text", "vision"]),
        (["model.layers.", "mtp.layers."], ["text", "mtp"]),
        (["thinker.model.layers.", "talker.model.layers.", "thinker.audio_tower.layers."],
         ["thinker.model.layers", "talker.model.layers", "audio"]),
    ],
)  # fmt: skip
def test_stacks_are_named_by_their_kind(prefixes, kinds):
    stacks = stacks_of([f"{prefix}0.mlp.weight" for prefix in prefixes])
    assert [stack.name for stack in stacks] == kinds


def test_layers_that_predict_further_tokens_do_not_make_it_unclear():
    tensors = ["model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "mtp.layers.0.mlp.weight"]
    assert choose_stack(tensors, None, "m").prefix == "model.layers."
