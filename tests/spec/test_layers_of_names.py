"""The layers of tensors by their names, against a search in each name."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from outliermerge.spec.settings import find_layers

PARTS = st.sampled_from(["model", "layers", "0", "1", "12", "weight", ""])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=6).map(".".join), max_size=12)


@given(names=NAMES)
def test_layers_are_those_of_each_name(names):
    expected = {}
    for name in names:
        match = re.search(r"(?:^|\.)(\d+)\.(?=.)", name)
        if match and "." in name[match.end() + 1 :]:
            expected[name] = name[: match.start(1)], int(match[1])
    found = find_layers(names)
    assert {name: (layer.stack, layer.index) for name, layer in found.items()} == expected
    for layer in found.values():
        of_stack = [index for stack, index in expected.values() if stack == layer.stack]
        assert layer.num_layers == max(of_stack) + 1
