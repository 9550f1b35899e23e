"""Proves, before a byte is written, that the output's tensors match its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from outliermerge.checkpoint.config import text_config
from outliermerge.checkpoint.sources import Source
from outliermerge.errors import OutlierMergeError, listing, quoted
from outliermerge.planning.plan import Proof
from outliermerge.planning.tied import WAYS_OUT
from outliermerge.planning.tied_names import (
    EMBEDDINGS,
    head_beside,
    head_rename,
    is_head,
    may_have_head,
    ties_head,
    vocabulary_rows,
)
from outliermerge.spec.settings import find_layers


def prove(
    reference: Mapping[str, Source],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    tie: bool | None,
) -> tuple[Proof, list[str]]:
    """Return how the output's tensors compare with the reference's, and doubts about the config.

    Args:
        reference: the tensors that the base (or the first model) stores.
        shapes: the shapes of the output's tensors, by their names in the merge.
        config: the config of the output.
        tie: whether the output ties its head, if the spec says so; else None.

    Raises:
        OutlierMergeError: the output would have parameters that its config does not know: a head
            that is tied to the embeddings, or more layers.
    """
    added = tuple(name for name in shapes if name not in reference)
    problems = []
    heads = [name for name in added if is_head(name)]
    doubts = []
    ties = ties_head(config) if heads and tie is None else tie
    if heads and ties is None:
        doubts.append(
            f"{heads[0]} is copied, but the config does not say whether it ties it to the "
            "embeddings; if it does, nothing reads it"
        )
    embeddings = [name for name in shapes if name.endswith(EMBEDDINGS)]
    if embeddings and not any(map(is_head, shapes)) and _lacks_head(config):
        doubts.append(
            "the config does not tie the head to the embeddings, but no head is stored, here as in "
            "the reference: a class with a head draws one at random"
        )
    if heads and ties:
        problems.append(
            f"{heads[0]}: the config ties it to the embeddings (tie_word_embeddings), so nothing "
            f"would read it. {WAYS_OUT}"
        )
    for head in heads:
        if other := head_beside(head, reference):
            problems.append(
                f"{head}: the reference has {other} for a head, and loaders read one of the two. "
                f"`rename: {head_rename(head, other)}` on the model that has it pairs them."
            )
    ours, theirs = _stacks(shapes), _stacks(reference)
    depth = text_config(config).get("num_hidden_layers")
    known = _known_depths(config)
    for stack, num_layers in ours.items():
        if stack in theirs and num_layers > theirs[stack] and num_layers not in known:
            problems.append(
                f"{stack}: {num_layers} layers, where the reference has {theirs[stack]} and the "
                f"config says {quoted(depth)}. `config_source` takes the config of a model that "
                "has them; `extra: drop` leaves them out, with what was trained in them."
            )
    rows = vocabulary_rows(shapes)
    if heads and len(rows) > 1:
        problems.append(
            f"{heads[0]}: copied with {shapes[heads[0]][0]} rows, but embeddings and head have "
            f"{' and '.join(map(str, sorted(rows)))}. `extra: drop` leaves it out."
        )
    if problems:
        raise OutlierMergeError(
            "the output would have tensors that its config does not know:\n" + listing(problems)
        )
    if known and ours and known.isdisjoint(ours.values()):
        doubts.append(
            f"the config says num_hidden_layers {quoted(depth)}, but the tensors have "
            + ", ".join(f"{count} in {stack}*" for stack, count in ours.items())
        )
    proof = Proof(
        num_reference_parameters=sum(source.num_elements for source in reference.values()),
        added=added,
        removed=tuple(name for name in reference if name not in shapes),
        resized=tuple(
            name
            for name, shape in shapes.items()
            if name in reference and reference[name].shape != shape
        ),
    )
    return proof, doubts


def _lacks_head(config: Mapping[str, Any]) -> bool:
    """Tell whether a config's class has, or may have, a head that is not tied."""
    return may_have_head(config) and ties_head(config) is False


def _known_depths(config: Mapping[str, Any]) -> set[int]:
    """Return the numbers of layers that a stack may have: without and with multi-token prediction.

    DeepSeek-V3, GLM-4.5 and MiMo put the layers that predict further tokens last in the stack.
    """
    of_text = text_config(config)
    depth, more = of_text.get("num_hidden_layers"), of_text.get("num_nextn_predict_layers")
    if not isinstance(depth, int):
        return set()
    return {depth, depth + more} if isinstance(more, int) else {depth}


def _stacks(names: Mapping[str, Any] | Sequence[str]) -> dict[str, int]:
    return {layer.stack: layer.num_layers for layer in find_layers(names).values()}
