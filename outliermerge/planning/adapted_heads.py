"""Heads that are tied to the embeddings, when an adapter changes one of the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.adapters.config import CONFIG_NAME
from outliermerge.checkpoint.adapters.products import Multiplied, ProductSum
from outliermerge.checkpoint.adapters.tensors import (
    InDType,
    LowRankSum,
    ReplacedRows,
    Rescaled,
    transposed,
)
from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.sources import Checkpoint, Source, TensorMeta
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.planning.plan import Input
from outliermerge.planning.tied import tied_heads, unnamed_tie
from outliermerge.planning.tied_names import is_head

_ADVICE = "Merge it with peft's merge_and_unload(), then save_pretrained()."


@dataclass(frozen=True)
class AdaptedHeads:
    """A model with an adapter, whose base ties heads to the embeddings.

    Attributes:
        tensors: the tensors of the model.
        parted: the heads that the adapter changes apart from the embeddings.
        alike: heads, their embeddings, and two sources that must be equal for the two to stay tied.
        notes: notes for the user.
    """

    tensors: Mapping[str, Source]
    parted: tuple[str, ...]
    alike: tuple[tuple[str, str, tuple[Source, Source]], ...]
    notes: tuple[str, ...]


def settle_heads(
    folder: Path, under: Input, adapted: Checkpoint, *, unties: bool = False
) -> AdaptedHeads:
    """Decide for each head that a base ties whether it stays tied under an adapter.

    Args:
        folder: the adapter's folder, or its only file.
        under: the adapter's base.
        adapted: the base's tensors as the adapter changes them.
        unties: the output has a head of its own, which can take the trained head.

    Raises:
        OutlierMergeError: head and embeddings become different tensors, and the name of one of them
            cannot be determined.
    """
    config = read_json(folder / CONFIG_NAME) if folder.is_dir() else {}
    _refuse_unnamed(folder, config, under, adapted)
    settling = _Settling(config, under, dict(adapted.tensors), unties)
    for head, original in tied_heads(under, filter(is_head, adapted.tensors)).items():
        settling.settle(head, original)
    return AdaptedHeads(
        settling.tensors, tuple(settling.parted), tuple(settling.alike), tuple(settling.notes)
    )


def _refuse_unnamed(
    folder: Path, config: Mapping[str, Any], under: Input, adapted: Checkpoint
) -> None:
    name = unnamed_tie(under)
    if name is None:
        return
    if is_head(name) and adapted.tensors[name] is not under.checkpoint.tensors[name]:
        raise OutlierMergeError(
            f"{folder}: it changes {shown(name)}, which {shown(under.reference)} ties to "
            f"embeddings that it does not store, and whose name cannot be told. {_ADVICE}"
        )
    if not is_head(name) and _is_trained_whole(config, name):
        raise OutlierMergeError(
            f"{folder}: it has {shown(name)} by itself, which {shown(under.reference)} ties, so "
            f"that the model has a head of its own, whose name cannot be told. {_ADVICE}"
        )


class _Settling:
    def __init__(
        self, config: Mapping[str, Any], under: Input, tensors: dict[str, Source], unties: bool
    ) -> None:
        self.config, self.under, self.unties = config, under, unties
        self.before = under.checkpoint.tensors
        self.tensors = tensors
        self.parted: list[str] = []
        self.alike: list[tuple[str, str, tuple[Source, Source]]] = []
        self.notes: list[str] = []

    def settle(self, head: str, original: str) -> None:
        """Separate a head from the embeddings, or keep it tied, or have the two compared.

        `ensure_weight_tying` trains both as one tensor, so the file has the same change for both.
        Not with DoRA: it has a norm for each token in the head, but for each column in the
        embeddings. Tensors that are saved whole under both names are compared when they are read.
        """
        old = self.before.get(head, self.before[original])
        own, value = self.tensors.get(head, old), self.tensors[original]
        is_given, changes = own is not old, value is not self.before[original]
        is_one = bool(self.config.get("ensure_weight_tying"))
        if is_given and _is_whole(own) and (is_one or not _is_trained_whole(self.config, head)):
            if _is_whole(value):
                return  # compared
            is_given = False  # saved unchanged
        if is_given:
            tokens = isinstance(own, ReplacedRows) and isinstance(value, ReplacedRows)
            may_be_one = (is_one or tokens) and not self.unties
            same = _same_change(own, value) if may_be_one else None
            if same is None:
                self._part(head, own)
            else:
                self._follow(head, original)
                self.alike += [(head, original, pair) for pair in same]
        elif changes and _is_trained_whole(self.config, original) and not is_one:
            self._part(head, own)
        elif not changes or is_one or _is_whole(value) or isinstance(value, ReplacedRows):
            # Embeddings that are saved untrained may have grown. peft trains single tokens of
            # embeddings and head as one.
            self._follow(head, original)
        elif self.unties:
            is_stored = head in self.before and own.shape == value.shape
            self._part(head, own if is_stored else _base_of(value))
        else:
            self._follow(head, original)
            self.notes.append(
                f"it changes {original}, to which {shown(self.under.reference)} ties its head: the "
                "head changes with it, as when peft merges it, though it did not in training"
            )

    def _part(self, head: str, own: Source) -> None:
        self.tensors[head] = own
        self.parted.append(head)

    def _follow(self, head: str, original: str) -> None:
        self.tensors.pop(head, None)
        if head not in self.before:
            return
        value, old = self.tensors[original], (self.before[head], self.before[original])
        if self.unties and value is old[1]:
            self.tensors[head] = old[0]
            return
        self.tensors[head] = value
        if old[0].shape == old[1].shape:
            self.alike.append((head, original, old))


def _is_trained_whole(config: Mapping[str, Any], name: str) -> bool:
    whole = config.get("modules_to_save") or ()
    return any(f".{part}." in f".{name}" for part in whole)


def _is_whole(source: Source) -> bool:
    return isinstance(source, (TensorMeta, InDType))


def _base_of(source: Source) -> Source:
    """Return the tensor that an adapter's change starts from."""
    changed = source.direction if isinstance(source, Rescaled) else source
    return changed.base if isinstance(changed, LowRankSum | ProductSum | Multiplied) else source


def _same_change(head: Source, embeddings: Source) -> list[tuple[Source, Source]] | None:
    """Return what must be equal for two changes to be the same; None if they differ."""
    if isinstance(head, ReplacedRows) and isinstance(embeddings, ReplacedRows):
        pairs: list[tuple[Source, Source]] = [(head.new, embeddings.new)]
        if head.base is not embeddings.base:  # of a resized vocabulary both are saved
            pairs.append((head.base, embeddings.base))
        is_one = head.indices == embeddings.indices
    elif type(head) is type(embeddings) is LowRankSum:
        assert isinstance(head, LowRankSum) and isinstance(embeddings, LowRankSum)
        a, b = embeddings.lora_a, embeddings.lora_b
        flipped = head.transposed != embeddings.transposed
        pairs = [
            (head.lora_a, transposed(b) if flipped else a),
            (head.lora_b, transposed(a) if flipped else b),
        ]
        is_one = head.scale == embeddings.scale
    else:
        return None
    fits = all(one.shape == other.shape for one, other in pairs)
    return pairs if is_one and fits else None
