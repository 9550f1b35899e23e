"""What is no whole model is refused: slices for one process, other libraries' adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import save_lora, save_tensors
from safetensors.torch import save_file

import outliermerge
from outliermerge.errors import OutlierMergeError

STATE = {"w": torch.arange(6.0).view(2, 3)}


def _passthrough(model: Path | str, **more: object) -> dict:
    return {"merge_method": "passthrough", "models": [{"model": str(model)}], **more}


PARTS = (
    ("consolidated.00.pth", "consolidated.01.pth"),
    ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
    ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ("mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"),
    ("mp_rank_00_000/model_optim_rng.pt", "mp_rank_01_000/model_optim_rng.pt"),
    ("model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"),
    ("model_rank_0.safetensors", "model_rank_1.safetensors"),
    ("model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"),
    ("rank0.safetensors", "rank1.safetensors"),
)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("names", PARTS, ids=[names[0] for names in PARTS])
def test_one_of_several_processes_parts_is_refused(names, which, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save = save_file if name.endswith(".safetensors") else torch.save
        save(STATE, tmp_path / name)

    with pytest.raises(OutlierMergeError, match="split over several processes") as caught:
        outliermerge.plan(_passthrough(tmp_path / names[which]))

    other = names[1 - which].split("/")[0]
    assert f"  {other}\n" in str(caught.value)


def test_a_folder_of_such_parts_is_refused(tmp_path):
    for rank in (0, 1):
        save_file(STATE, tmp_path / f"model-rank-{rank}-part-0.safetensors")

    with pytest.raises(OutlierMergeError, match="split over several processes"):
        outliermerge.plan(_passthrough(tmp_path))


@pytest.mark.parametrize("name", ["consolidated.01.pth", "model_world_size_4_rank_0.pt"])
def test_a_part_whose_others_are_not_there_is_refused(name, tmp_path):
    torch.save(STATE, tmp_path / name)

    with pytest.raises(OutlierMergeError, match="split over several processes"):
        outliermerge.plan(_passthrough(tmp_path / name))


@pytest.mark.parametrize(
    "names",
    [
        ["consolidated.00.pth"],
        ["mp_rank_00_model_states.pt"],
        ["mp_rank_00/model_optim_rng.pt"],
        ["step_0.pt", "step_1.pt"],
        ["frank_0.pt", "frank_1.pt"],
        ["lora_rank_8.pt", "lora_rank_16.pt"],
        ["rank_0/m.pt", "rank_1/m.pt"],
    ],
)
def test_what_one_process_wrote_alone_is_read(names, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(STATE, tmp_path / name)

    plan = outliermerge.plan(_passthrough(tmp_path / names[-1]))
    assert [job.name for job in plan.jobs] == ["w"]


MLX = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 20.0}}
OLD_MLX = {"lora_layers": 16, "lora_parameters": {"rank": 8}}
LORA = {"model.layers.0.q_proj.lora_a": torch.ones(3, 1)}


@pytest.mark.parametrize("config", [MLX, MLX | {"fine_tune_type": "full"}, OLD_MLX, {"x": 1}])
@pytest.mark.parametrize(
    "names",
    [["adapters.safetensors"], ["adapters.safetensors", "0000100_adapters.safetensors"], ["a.npz"]],
)
@pytest.mark.parametrize("joined", [False, True])
def test_an_adapter_that_is_not_pefts_is_refused_by_what_it_is(config, names, joined, tmp_path):
    base = save_tensors(tmp_path / "base", STATE)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for name in names:
        if name.endswith(".npz"):
            (adapter / name).write_bytes(b"PK")
        else:
            save_file(LORA, adapter / name)

    reference = f"{base}+{adapter}" if joined else adapter
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(_passthrough(reference))

    wanted = "mlx_lm.fuse" if "lora_parameters" in config else "no peft_type"
    assert wanted in str(caught.value)
    assert "extra" not in str(caught.value)


WHOLE = {f"layers.{number}.weight": torch.ones(2, 2) for number in range(2)}
UNGATHERED = WHOLE | {"layers.1.weight": torch.empty(0), "bias": torch.ones(2)}


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "folder", "index"])
@pytest.mark.parametrize("method", ["passthrough", "linear", "task_arithmetic"])
def test_what_zero_3_did_not_gather_is_refused_even_where_all_models_lack_it(
    suffix, method, tmp_path
):
    paths = {name: tmp_path / f"{name}.{suffix}" for name in ("base", "a", "b")}
    for path in paths.values():
        if suffix == "safetensors":
            save_file(UNGATHERED, path)
        elif suffix == "pt":
            torch.save(UNGATHERED, path)
        else:
            save_tensors(path, UNGATHERED)
        if suffix == "index":
            (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
            weight_map = dict.fromkeys(UNGATHERED, "model-00001-of-00001.safetensors")
            index = json.dumps({"weight_map": weight_map})
            (path / "model.safetensors.index.json").write_text(index)
    spec: dict = {"merge_method": method, "models": [{"model": str(paths["a"])}]}
    if method != "passthrough":
        spec["models"].append({"model": str(paths["b"])})
    if method == "task_arithmetic":
        spec["base_model"] = str(paths["base"])

    with pytest.raises(OutlierMergeError, match=r"1 tensor\(s\) are empty") as caught:
        outliermerge.plan(spec)

    assert "  layers.1.weight\n" in str(caught.value)
    assert "zero_to_fp32.py" in str(caught.value)


def test_a_part_that_an_adapter_saves_whole_must_not_be_empty(tmp_path):
    base = save_tensors(tmp_path / "base", WHOLE)
    saved = {
        "layers.0.lora_A.weight": torch.ones(1, 2),
        "layers.0.lora_B.weight": torch.ones(2, 1),
        "layers.1.weight": torch.empty(0),
    }
    adapter = save_lora(tmp_path / "adapter", saved, target_modules=["0"], modules_to_save=["1"])

    with pytest.raises(OutlierMergeError, match="zero_to_fp32"):
        outliermerge.plan(_passthrough(f"{base}+{adapter}"))
