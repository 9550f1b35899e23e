"""Models of other architectures: a line says how they differ, and no advice is given in vain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import save_tensors

import outliermerge
from outliermerge.errors import OutlierMergeError
from outliermerge.planning.architectures import CANNOT

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
}
ADVICE = ("`missing: base`", "`extra: copy`", "`rename", "may be the same weights")


def _save(
    folder: Path,
    *,
    layers: int = 2,
    size: int = 8,
    prefix: str = "model.",
    modules: tuple[str, ...] = ("attn", "mlp"),
    **config: object,
) -> str:
    names = [f"{prefix}layers.{n}.{m}.weight" for n in range(layers) for m in modules]
    tensors = {name: torch.zeros(size, size) for name in (f"{prefix}embed.weight", *names)}
    save_tensors(folder, tensors)
    own = {"num_hidden_layers": layers, "hidden_size": size}
    (folder / "config.json").write_text(json.dumps(CONFIG | own | config))
    return str(folder)


def _refusal(base: str, model: str) -> str:
    spec = {"merge_method": "ties", "base_model": base, "models": [{"model": model}]}
    with pytest.raises(OutlierMergeError) as raised:
        outliermerge.plan(spec)
    return str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": 3}, "is LlamaForCausalLM (3 layers, hidden size 8, 448 parameters)"),
        ({"layers": 1}, "is LlamaForCausalLM (1 layers, hidden size 8, 192 parameters)"),
        ({"size": 12}, "is LlamaForCausalLM (2 layers, hidden size 12, 720 parameters)"),
        ({"size": 16, "layers": 9}, "(9 layers, hidden size 16, 4.86k parameters)"),
        (
            {
                "prefix": "h.",
                "modules": ("wi", "wo"),
                "model_type": "gpt",
                "architectures": ["Gpt"],
            },
            "is Gpt (2 layers, hidden size 8, 320 parameters)",
        ),
    ],
)
def test_the_architectures_are_compared_before_the_tensors(tmp_path, change, said):
    base, other = _save(tmp_path / "base"), _save(tmp_path / "other", **change)
    message = _refusal(base, other).split("\n")
    first, second, third, *_ = message
    assert first == CANNOT
    assert "Such models cannot be merged as they are." not in message
    assert second.startswith(other) and said in second
    assert second.endswith(f"{base} is LlamaForCausalLM (2 layers, hidden size 8, 320 parameters).")
    assert " tensor(s) " in third
    assert CANNOT not in message[1:]
    assert not any(advice in line for line in message for advice in ADVICE)


def test_of_many_tensors_four_are_listed_and_the_others_counted(tmp_path):
    base, other = _save(tmp_path / "base"), _save(tmp_path / "other", layers=40)
    message = _refusal(base, other)
    assert "76 tensor(s) extra:" in message
    assert message.count(f"in {other}, not in {base}") == 4
    assert "  … and 72 more" in message


@pytest.mark.parametrize("config", [{}, {"model_type": "other"}, {"architectures": ["Other"]}])
def test_advice_that_can_work_is_given_still(tmp_path, config):
    base = _save(tmp_path / "base")
    renamed = _save(tmp_path / "renamed", prefix="language_model.model.", **config)
    message = _refusal(base, renamed)
    assert '`rename: [{from: "^language_model\\\\.", to: ""}]`' in message
    assert CANNOT not in message
    assert (" is LlamaForCausalLM (" in message) == ("architectures" in config)


def test_models_of_one_architecture_are_not_compared(tmp_path):
    base, other = _save(tmp_path / "base"), tmp_path / "other"
    _save(other)
    save_tensors(other, {"model.embed.weight": torch.zeros(8, 8)})
    (other / "config.json").write_text(json.dumps(CONFIG))
    message = _refusal(base, str(other))
    assert "LlamaForCausalLM" not in message
    assert "`missing: base`" in message


def test_models_without_a_config_are_not_compared(tmp_path):
    base, other = _save(tmp_path / "base"), tmp_path / "other"
    save_tensors(other, {"model.embed.weight": torch.zeros(8, 8), "x.y": torch.zeros(2)})
    message = _refusal(base, str(other))
    assert CANNOT not in message


def _with_biases(folder: Path, **config: object) -> str:
    """Save a model of the same names, with biases that the base's layers do not have."""
    _save(folder, **config)
    tensors = {f"model.layers.{n}.{m}.weight": torch.zeros(8, 8) for n in (0, 1)
               for m in ("attn", "mlp")}  # fmt: skip
    tensors |= {f"model.layers.{n}.attn.bias": torch.zeros(8) for n in (0, 1)}
    written = (folder / "config.json").read_text()
    save_tensors(folder, tensors | {"model.embed.weight": torch.zeros(8, 8)})
    (folder / "config.json").write_text(written)
    return str(folder)


QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def test_no_policy_is_offered_where_layers_of_another_type_have_more(tmp_path):
    base = _save(tmp_path / "base")
    other = _with_biases(tmp_path / "qwen", **QWEN)
    for message in (_refusal(base, other), _refusal(other, base)):
        assert message.startswith(CANNOT)
        assert not any(advice in message for advice in ADVICE)
    same = _refusal(base, _with_biases(tmp_path / "llama"))
    assert "`extra: copy`" in same and CANNOT not in same


def test_parts_of_layers_that_are_left_out_are_warned_of(tmp_path):
    base = _save(tmp_path / "base")
    spec = {"merge_method": "ties", "base_model": base, "extra": "drop"}

    def warnings(model: str) -> list[str]:
        notes = outliermerge.plan(spec | {"models": [{"model": model}]}).notes
        return [note for note in notes if note.startswith("warning: ")]

    (said,) = warnings(_with_biases(tmp_path / "qwen", **QWEN))
    assert "qwen is Qwen2ForCausalLM (" in said
    assert "2 tensor(s) of the layers of " in said and "may be of no use" in said
    assert warnings(_with_biases(tmp_path / "llama")) == []
