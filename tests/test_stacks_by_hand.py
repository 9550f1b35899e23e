"""A stack of seven layers is the model assembled by hand: its tensors, and what it computes."""

from __future__ import annotations

import pytest
import torch
from stacks import KINDS, make, save

import outliermerge

RANGES = [("base", 0, 2), ("m0", 1, 3), ("base", 0, 1), ("m0", 2, 4)]
LAYERS = [(name, layer) for name, start, stop in RANGES for layer in range(start, stop)]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(3)
def test_a_stack_of_seven_layers_is_the_model_assembled_by_hand(kind, tmp_path):
    models, how = save(kind, tmp_path, num_layers=4, num_models=1), KINDS[kind]
    spec = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(models[name]), "layer_range": [start, stop]}]}
            for name, start, stop in RANGES
        ],
    } | ({"stack": how.stack} if how.stack else {})

    plan = outliermerge.plan(spec)
    output = outliermerge.run(spec, output=tmp_path / "out").output

    by_hand = make(kind, layers=[layer for _, layer in LAYERS], seed=5)
    parts = {name: type(by_hand).from_pretrained(models[name]) for name in models}
    _copy(parts["base"], by_hand, but=how.layers)
    for number, (name, layer) in enumerate(LAYERS):
        theirs = parts[name].get_submodule(how.layers)[layer]
        _copy(theirs, by_hand.get_submodule(how.layers)[number])
    for place in how.after:
        _copy(parts["m0"].get_submodule(place), by_hand.get_submodule(place))
    if how.layers.startswith(("encoder", "decoder")):  # T5 has one table for all layers
        first = f"{how.layers}.0.layer.0.SelfAttention.relative_attention_bias"
        _copy(parts["base"].get_submodule(first), by_hand.get_submodule(first))

    made, told = type(by_hand).from_pretrained(output, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = by_hand.state_dict()
    assert made.state_dict().keys() == expected.keys()
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    inputs = {"input_ids": torch.tensor([[1, 5, 9, 3, 7, 11]]), **how.inputs}
    with torch.no_grad():
        torch.testing.assert_close(made(**inputs).logits, by_hand(**inputs).logits, rtol=0, atol=0)
    assert plan.as_dict(tensors=False)["layers"]["num_layers"] == len(LAYERS)


def _copy(source: torch.nn.Module, target: torch.nn.Module, *, but: str | None = None) -> None:
    """Copy what two modules both have, except a part."""
    theirs, ours = source.state_dict(), target.state_dict()
    with torch.no_grad():
        for name in ours.keys() & theirs.keys():
            if but is None or not name.startswith(f"{but}."):
                ours[name].copy_(theirs[name])
