"""Models whose vocabularies differ: what a policy makes of their embeddings and heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from outliermerge.checkpoint.meta import Checkpoint, Source
from outliermerge.checkpoint.tokens import read_tokens, same_token_files, token_files
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.planning.vocabulary_rows import (
    ABSENT,
    NUM_SHOWN,
    Layout,
    Model,
    count,
    lay_out_base,
    lay_out_common,
    lay_out_union,
)
from outliermerge.planning.vocabulary_tensors import find_vocabulary_tensors, rearrange

Policy = Literal["error", "base", "common", "union"]

_LAYOUTS: dict[str, Callable[[Sequence[Model]], Layout]] = {
    "base": lay_out_base,
    "common": lay_out_common,
    "union": lay_out_union,
}


@dataclass(frozen=True)
class Alignment:
    """Models with the same rows in their vocabulary tensors.

    Attributes:
        checkpoints: of the models, in the same order.
        num_rows: of the output's vocabulary tensors; None where nothing was changed.
        added_tokens: by policy union, that the first model's tokenizer lacks: id in the output,
            token, number of the first model that has it.
        notes: what a person should know.
    """

    checkpoints: tuple[Checkpoint, ...]
    num_rows: int | None
    added_tokens: tuple[tuple[int, str, int], ...]
    notes: tuple[str, ...]


def align_vocabulary(models: Sequence[tuple[str, Checkpoint]], policy: Policy) -> Alignment:
    """Give the vocabulary tensors (embeddings, heads) of all models the same rows.

    A model that lacks a row of the first model is unchanged there: its tensor gives the first
    model's row. By policy, rows that differ are refused (`error`), are the first model's (`base`),
    are cut to those that all models have (`common`), or are the first model's followed by those
    that only others have (`union`); such a row is the mean of the models that have it in every
    model that lacks it.

    Args:
        models: each as the user names it, with its checkpoint; the first is the reference.
        policy: what is done where vocabularies differ.

    Raises:
        OutlierMergeError: vocabularies differ and the policy does not allow it, a tokenizer file
            is broken, or it is unclear which tensors are the vocabulary's.
    """
    checkpoints = tuple(checkpoint for _, checkpoint in models)
    unchanged = Alignment(checkpoints, None, (), ())
    if any("" not in checkpoint.components for checkpoint in checkpoints):
        return unchanged  # a pipeline's parts have tokenizers of their own
    found = find_vocabulary_tensors(checkpoints)
    same_rows = len(set(found.num_rows.values())) == 1
    holders = [checkpoints[number] for number in found.num_rows]
    if 0 not in found.num_rows or (same_rows and _one_tokenizer(holders)):
        return unchanged
    members = [_open(number, *models[number], rows) for number, rows in found.num_rows.items()]
    clashes = _clashes(members)
    if policy == "error":
        if not same_rows or any(clashes.values()):
            raise OutlierMergeError(_difference(members, clashes))
        return replace(unchanged, notes=tuple(_unnamed_tokens(members)))
    layout = _LAYOUTS[policy](members)
    moved = [
        number
        for number, rows in layout.rows.items()
        if rows != list(range(found.num_rows[number]))
    ]
    doubtful = [
        name for name in found.unclear if any(name in checkpoints[n].tensors for n in moved)
    ]
    if doubtful:
        raise OutlierMergeError(
            "the models' vocabularies differ, and it is unclear whether these tensors have a row "
            f"for every token:\n{listing(doubtful)}\nSuch models cannot be merged as they are."
        )
    notes = (*_notes(members, layout), *layout.notes)
    if not moved:
        return replace(unchanged, notes=notes)
    aligned = [dict(checkpoint.tensors) for checkpoint in checkpoints]
    for name in found.names:
        held = {n: c.tensors[name] for n, c in enumerate(checkpoints) if name in c.tensors}
        for number in held:
            aligned[number][name] = _aligned(name, number, held, layout)
    return Alignment(
        tuple(
            replace(checkpoint, tensors=tensors)
            for checkpoint, tensors in zip(checkpoints, aligned, strict=True)
        ),
        layout.num_rows,
        layout.added_tokens,
        notes,
    )


def _one_tokenizer(checkpoints: Sequence[Checkpoint]) -> bool:
    roots = [checkpoint.root for checkpoint in checkpoints if token_files(checkpoint.root)]
    return all(same_token_files(roots[0], root) for root in roots[1:])


def _open(number: int, name: str, checkpoint: Checkpoint, num_rows: int) -> Model:
    tokens = read_tokens(checkpoint.root)
    ordered = sorted((tokens or {}).items())
    return Model(
        number=number,
        name=name,
        num_rows=num_rows,
        tokens={id_: token for id_, token in ordered if id_ < num_rows},
        beyond={id_: token for id_, token in ordered if id_ >= num_rows},
        has_tokenizer=tokens is not None,
    )


def _clashes(members: Sequence[Model]) -> dict[int, list[tuple[int, str, str]]]:
    """Return by a model's number its ids that an earlier model uses for another token.

    Each comes with the other token and the name of the model that has it.
    """
    seen: dict[int, tuple[str, str]] = {}
    clashes: dict[int, list[tuple[int, str, str]]] = {}
    for model in members:
        found = clashes[model.number] = []
        for id_, token in model.tokens.items():
            other, name = seen.setdefault(id_, (token, model.name))
            if other != token:
                found.append((id_, other, name))
    return clashes


def _aligned(name: str, number: int, held: Mapping[int, Source], layout: Layout) -> Source:
    cells: list[tuple[tuple[int, int], ...]] = []
    for row in range(layout.num_rows):
        rows = {n: layout.rows[n][row] for n in held if layout.rows[n][row] != ABSENT}
        if number in rows:
            cells.append(((number, rows[number]),))
        elif 0 in rows:
            cells.append(((0, rows[0]),))
        elif rows:
            cells.append(tuple(rows.items()))
        else:
            raise OutlierMergeError(
                f"tensor {name!r}: the first model lacks it, and no model that has it has row "
                f"{row} of the output's vocabulary: it cannot be given the output's rows"
            )
    return rearrange(number, held, cells)


def _notes(members: Sequence[Model], layout: Layout) -> list[str]:
    reference = members[0]
    notes = []
    for model in members:
        if not model.has_tokenizer:
            notes.append(f"{model.name} has no tokenizer files: its rows are matched by index")
        if model is reference:
            continue
        rows = layout.rows[model.number]
        if others := set(range(model.num_rows)) - set(rows):
            notes.append(f"left out of {model.name}: {model.describe(others)}")
        shared = range(min(layout.num_rows, reference.num_rows))
        if lacking := [row for row in shared if rows[row] == ABSENT]:
            notes.append(
                f"{model.name} lacks {reference.describe(lacking)} of {reference.name}: "
                "unchanged there"
            )
        if num_moved := sum(rows[row] not in (row, ABSENT) for row in shared):
            notes.append(
                f"{model.name} has other ids than {reference.name} for "
                f"{count(num_moved, 'token')}: matched by token"
            )
    return notes


def _unnamed_tokens(members: Sequence[Model]) -> list[str]:
    """Return notes on tokens whose rows are merged but that the carried-over tokenizer lacks."""
    reference = members[0]
    return [
        f"the tokenizer of {reference.name} does not name {model.describe(unnamed)} of {model.name}"
        for model in members[1:]
        if reference.has_tokenizer and (unnamed := model.tokens.keys() - reference.tokens.keys())
    ]


def _difference(members: Sequence[Model], clashes: Mapping[int, list[tuple[int, str, str]]]) -> str:
    reference, base = members[0], lay_out_base(members)
    lines = [f"  {reference.name}: {count(reference.num_rows, 'row')}"]
    for model in members[1:]:
        rows = base.rows[model.number]
        parts = []
        if others := set(range(model.num_rows)) - set(rows):
            parts.append(f"    only it has {model.describe(others)}")
        if lacking := [row for row in range(base.num_rows) if rows[row] == ABSENT]:
            parts.append(f"    it lacks {reference.describe(lacking)}")
        if found := clashes[model.number]:
            shown = [
                f"{id_} is {model.tokens[id_]!r}, in {name} {token!r}"
                for id_, token, name in found[:NUM_SHOWN]
            ]
            more = f"; and {len(found) - NUM_SHOWN} more" if len(found) > NUM_SHOWN else ""
            parts.append(f"    the same id means other tokens: {'; '.join(shown)}{more}")
        lines += [f"  {model.name}: {count(model.num_rows, 'row')}", *parts]
    return "\n".join(
        [
            "the models' vocabularies differ",
            *lines,
            "`vocabulary` in the spec sets what becomes of it:",
            f"  base: the rows of {reference.name}; tokens that only others have are left out "
            f"({_outcome('base', members)})",
            f"  common: only the rows that all models have ({_outcome('common', members)})",
            f"  union: the rows of {reference.name}, then those that only others have "
            f"({_outcome('union', members)})",
        ]
    )


def _outcome(policy: str, members: Sequence[Model]) -> str:
    try:
        return count(_LAYOUTS[policy](members).num_rows, "row")
    except OutlierMergeError:
        return "not possible here"
