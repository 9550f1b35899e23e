"""Finds the tensors that have a row for every token.

In a few tensors, such as a bias of shape (1, V), tokens are along the last axis: for them, "rows"
means columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outliermerge.checkpoint.sources import Checkpoint, Source
from outliermerge.planning.vocabulary_config import vocabulary_sizes
from outliermerge.planning.vocabulary_runs import without_axis

_KNOWN_NAME = re.compile(
    r"(^|[./])("
    r"(embed_tokens|tok_embeddings|embed_in|wte|word_embeddings|shared)\.weight"
    r"|(lm_head|embed_out|output|output_layer|(predictions|lm_head)\.decoder)\.(weight|bias)"
    r"|predictions\.bias)$"
)
_KNOWN_LAST = re.compile(r"(^|[./])final_logits_bias$")  # (1, V), of BART and its relatives
_NUMBERED = re.compile(r"(^|\.)\d+\.")


@dataclass(frozen=True)
class VocabularyTensors:
    """The tensors whose rows are the vocabulary's.

    Attributes:
        axes: for each tensor's name, the axis along which it has a row for every token: 0 or -1.
        num_rows: the number of rows of each model's vocabulary tensors, by the model's number.
        unclear: tensors for which neither the name nor the number of rows decides it.
    """

    axes: Mapping[str, int]
    num_rows: Mapping[int, int]
    unclear: tuple[str, ...]


def find_vocabulary_tensors(
    checkpoints: Sequence[Checkpoint], configs: Sequence[Mapping[str, Any]]
) -> VocabularyTensors:
    """Find the tensors with a row for every token, by the models' configs and names.

    These are tensors whose number of rows differs between models as vocab_size does, and tensors
    named as embeddings or heads. Any other tensor with as many rows as tokens, the same in all
    models, may have that number by chance: it is unclear.
    """
    sizes = [vocabulary_sizes(config) for config in configs]
    sure: dict[str, dict[int, int]] = {}
    axes: dict[str, int] = {}
    unclear: list[str] = []
    counts = {size for size, _ in sizes}
    for name in dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.tensors):
        held = {
            number: checkpoint.tensors[name]
            for number, checkpoint in enumerate(checkpoints)
            if name in checkpoint.tensors
        }
        is_sized = not all(counts.isdisjoint(source.shape) for source in held.values())
        if not is_sized and _NUMBERED.search(name):
            continue  # neither its shape nor its name is of the vocabulary
        axis = axes[name] = _axis(name, held, sizes)
        rows = {number: source.shape[axis] for number, source in held.items() if source.shape}
        if (
            len(rows) < len(held)
            or len({without_axis(axis, source.shape) for source in held.values()}) > 1
            or not all(source.dtype.is_float for source in held.values())
            or any(rows[number] in sizes[number][1] for number in held)
        ):
            continue
        sized = all(rows[number] == sizes[number][0] for number in held)
        pattern = _KNOWN_NAME if axis == 0 else _KNOWN_LAST
        known = pattern.search(name) and not _NUMBERED.search(name)
        if known or (sized and len(set(rows.values())) > 1):
            sure[name] = rows
        elif sized:
            unclear.append(name)
    num_rows: dict[int, int] = {}
    for number, (size, _) in enumerate(sizes):
        found = [rows[number] for rows in sure.values() if number in rows]
        if found:
            num_rows[number] = size if size in found else found[0]
    if not sure and unclear:  # only the config says so
        num_rows = {
            number: size
            for number, (size, _) in enumerate(sizes)
            if size is not None and any(name in checkpoints[number].tensors for name in unclear)
        }
    names = [
        name
        for name, rows in sure.items()
        if all(num_rows[number] == count for number, count in rows.items())
    ]
    unclear += [name for name in sure if name not in names]
    return VocabularyTensors({name: axes[name] for name in names}, num_rows, tuple(unclear))


def _axis(
    name: str, held: Mapping[int, Source], sizes: Sequence[tuple[int | None, set[int]]]
) -> int:
    """Return the axis along which a tensor may have its tokens: the first, or else the last."""
    if any(len(source.shape) < 2 for source in held.values()):
        return 0
    if _KNOWN_LAST.search(name):
        return -1
    sized = [all(s.shape[axis] == sizes[n][0] for n, s in held.items()) for axis in (0, -1)]
    return -1 if sized[1] and not sized[0] and not _KNOWN_NAME.search(name) else 0
