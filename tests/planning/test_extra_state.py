"""States of modules beside the weights, as NeMo and Transformer Engine store them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import outliermerge
from outliermerge.errors import OutlierMergeError

CPU = {"device": "cpu", "memory": "64MB"}
KEYS = ("layers.0.linear._extra_state", "_extra_state")
STATES = {
    "absent": None,
    "empty": lambda: torch.empty(0, dtype=torch.uint8),
    "bytes": lambda: torch.arange(5, dtype=torch.uint8),
    "other bytes": lambda: torch.arange(5, dtype=torch.uint8) + 1,
    "floats": lambda: torch.ones(2, 3),
    "BytesIO": lambda: io.BytesIO(b"x"),
    "None": lambda: None,
    "dict": lambda: {"scale": 1.0},
}


def _save(path: Path, kind: str, k: float) -> dict[str, torch.Tensor]:
    make = STATES[kind]
    state = {"layers.0.linear.weight": torch.arange(6.0).view(2, 3) + k}
    state |= {key: make() for key in KEYS} if make else {}
    torch.save(state, path)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("task", STATES)
@pytest.mark.parametrize("base", STATES)
def test_weights_are_merged_and_states_stay_the_base_s(base, task, method, tmp_path):
    stored = _save(tmp_path / "base.pt", base, 0.0)
    others = _save(tmp_path / "task.pt", task, 1.0)
    spec = {
        "merge_method": method,
        "base_model": str(tmp_path / "base.pt"),
        "models": [{"model": str(tmp_path / "task.pt")}],
    }

    plan = outliermerge.plan(spec)
    outliermerge.run(plan, output=tmp_path / "out.safetensors", **CPU)

    found = load_file(tmp_path / "out.safetensors")
    wanted = stored | {"layers.0.linear.weight": others["layers.0.linear.weight"]}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any("_extra_state" in note for note in plan.notes) == ({base, task} != {"absent"})


def test_what_is_no_tensor_under_another_name_is_refused(tmp_path):
    torch.save({"w": torch.ones(2), "state": io.BytesIO(b"x")}, tmp_path / "m.pt")
    spec = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "m.pt")}]}

    with pytest.raises(OutlierMergeError, match="'state' is a BytesIO"):
        outliermerge.plan(spec)
