"""Refuses files that are not whole models: one process's slices, other libraries' adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.sources import TensorMeta
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.storage.files import names_in

# The number of a process in the name of a file or folder, as Megatron, DeepSpeed, FSDP, vLLM and
# Meta's code write it.
_RANK = re.compile(
    r"(?:(?:^|[._-])(?:mp_|pp_|tp_|dp_|ep_)?rank[._-]?|(?:^|[._-])[tp]p[._-]?|^consolidated\.)"
    r"(?P<number>\d+)(?=[._-]|$)"
)
_WORLD = re.compile(r"world_size[._-]?(\d+)")


def refuse_foreign_adapter(folder: Path) -> None:
    """Raise OutlierMergeError if a folder's adapter_config.json is not PEFT's."""
    path = folder / "adapter_config.json"
    config = read_json(path)
    if not config or "peft_type" in config:
        return
    if {"fine_tune_type", "lora_parameters", "lora_layers"} & config.keys():
        raise OutlierMergeError(
            f"{folder}: an adapter of mlx-lm, which is not read. Merge it into its base: "
            f"mlx_lm.fuse --model BASE --adapter-path {folder} --save-path MERGED (with "
            "--dequantize where the base is quantised), and name the result as the model."
        )
    raise OutlierMergeError(
        f"{folder}: an adapter that is not PEFT's (its adapter_config.json has no peft_type), "
        "which is not read. Merge it into its base with the library that trained it, and name "
        "the result."
    )


def refuse_ungathered(metas: Iterable[TensorMeta]) -> None:
    """Raise OutlierMergeError for float tensors of shape [0], which ZeRO-3 leaves of a parameter.

    Byte tensors are allowed: a module's own state (_extra_state) may be empty. Markers that belong
    to no module, such as v_pred of diffusion models, are allowed, too.
    """
    empty = [m for m in metas if m.shape == (0,) and m.dtype.is_float and "." in m.name]
    if empty:
        raise OutlierMergeError(
            f"{empty[0].path}: {len(empty)} tensor(s) are empty (of shape [0]), as DeepSpeed's "
            "ZeRO-3 saves weights that were not gathered, so that they are not in the file:\n"
            f"{listing((meta.name for meta in empty), limit=5)}\n"
            "Make them from the training's checkpoint: python zero_to_fp32.py CHECKPOINT OUT, or "
            "save again with stage3_gather_16bit_weights_on_model_save: true (accelerate: "
            "zero3_save_16bit_model)."
        )


def refuse_part(path: Path) -> None:
    """Raise OutlierMergeError if a file holds only one process's slices of a model's tensors."""
    is_megatron = path.parent.name.startswith("mp_rank_")
    for place in (path, path.parent) if is_megatron else (path,):
        world = _WORLD.search(place.name)
        others = [name for match in _RANK.finditer(place.name) for name in _others(place, match)]
        if others or (world and int(world[1]) > 1):
            rest = f", beside\n{listing(others, limit=5)}\n" if others else ". "
            raise OutlierMergeError(
                f"{path}: is one part of a model that was split over several processes, so that "
                f"its tensors are slices{rest}Put the parts together with the program that wrote "
                "them, and name the result: convert_llama_weights_to_hf.py of transformers for "
                "Meta's consolidated.NN.pth, zero_to_fp32.py for DeepSpeed's, Megatron's or the "
                "trainer's converter (verl: model_merger) for the others."
            )


def _others(place: Path, rank: re.Match[str]) -> list[str]:
    """Return the other parts, if one of them has the number 0, which no LoRA's rank has."""
    before, after = place.name[: rank.start("number")], place.name[rank.end("number") :]
    pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
    found = {n: int(match[1]) for n in names_in(place.parent) if (match := pattern.fullmatch(n))}
    if rank[0].startswith(("consolidated.", "mp_rank")):
        found.setdefault(f"{before}{'0' * len(rank['number'])}{after}", 0)
    return [name for name in found if name != place.name] if 0 in found.values() else []
