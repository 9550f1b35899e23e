"""What becomes of a head that is tied to the embeddings when an adapter changes one of the two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from outliermerge.checkpoint.adapter_config import CONFIG_NAME
from outliermerge.checkpoint.adapter_tensors import InDType
from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.meta import Checkpoint, Source, TensorMeta
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.jobs import Input
from outliermerge.planning.tied import tied_heads, unnamed_tie
from outliermerge.planning.tied_names import is_head


def settle_heads(
    folder: Path, under: Input, adapted: Checkpoint
) -> tuple[dict[str, Source], tuple[str, ...], list[str]]:
    """Tell what an adapter makes of heads that its base ties to the embeddings.

    Args:
        folder: of the adapter.
        under: its base.
        adapted: what the adapter makes of it.

    Returns:
        The model's tensors; the heads that the adapter parts from the embeddings; and notes.

    Raises:
        OutlierMergeError: it parts a head whose name cannot be told.
    """
    config = read_json(folder / CONFIG_NAME)
    before, tensors = under.checkpoint.tensors, dict(adapted.tensors)
    parted, notes = [], []
    if (name := unnamed_tie(under)) and _is_trained_whole(config, name):
        raise OutlierMergeError(
            f"{folder}: it has {shown(name)} by itself, which {shown(under.reference)} ties, so "
            "that the model "
            "has a head of its own, whose name cannot be told. Merge it with peft's "
            "merge_and_unload(), then save_pretrained()."
        )
    for head, original in tied_heads(under, filter(is_head, tensors)).items():
        old, value = before.get(head, before[original]), tensors[original]
        own = tensors.get(head, old)
        changes = value is not before[original]
        fate = _fate(config, (head, own, own is not old), (original, value, changes))
        if fate == "parted":
            tensors[head] = own
            parted.append(head)
        elif fate == "follows":
            tensors.pop(head, None)
            if head in before:
                tensors[head] = value
            if changes and not config.get("ensure_weight_tying"):
                notes.append(
                    f"it changes {original}, to which {shown(under.reference)} ties its head: the "
                    "head "
                    "changes with it, as when peft merges it, though it did not in training"
                )
    return tensors, tuple(parted), notes


def _fate(
    config: Mapping[str, Any], head: tuple[str, Source, bool], embeddings: tuple[str, Source, bool]
) -> Literal["parted", "follows", "compared"]:
    """Tell what becomes of a head; both are given with their tensor and whether it changes.

    LoRA and rows of tokens on the embeddings alone change the head with them, as when peft merges
    the adapter. `ensure_weight_tying` trains both as one. What is saved whole under both names
    without training is one tensor, which is compared when it is read. Else the two are parted.
    """
    (name, own, is_given), (original, value, changes) = head, embeddings
    # DoRA scales the head by rows and the embeddings by columns, so that they part in any case.
    is_one = config.get("ensure_weight_tying") is True and not config.get("use_dora")
    is_trained = _is_trained_whole(config, name)
    if is_given and isinstance(own, (TensorMeta, InDType)) and (is_one or not is_trained):
        return "compared" if isinstance(value, (TensorMeta, InDType)) else "follows"
    if is_one:
        return "follows"
    return "parted" if is_given or (changes and _is_trained_whole(config, original)) else "follows"


def _is_trained_whole(config: Mapping[str, Any], name: str) -> bool:
    whole = config.get("modules_to_save") or ()
    return any(f".{part}." in f".{name}" for part in whole)
