"""Models with different vocabularies: aligns the rows of embeddings and heads by a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.sources import Checkpoint, Source
from outliermerge.checkpoint.tokens import (
    load_tokens,
    read_tokens,
    same_token_files,
    token_files,
)
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.planning.tokenizer_files import (
    TOKENIZER,
    contradicting,
    extend,
    find_entries,
    how_to_convert,
    read_files,
    refuse_tekken,
)
from outliermerge.planning.tokenizer_pieces import no_union
from outliermerge.planning.tokenizer_plan import TokenizerPlan
from outliermerge.planning.vocabulary_config import named_ids
from outliermerge.planning.vocabulary_rows import (
    ABSENT,
    NUM_SHOWN,
    Layout,
    OutputTokenizer,
    VocabularyModel,
    check_ids,
    count,
    lay_out_base,
    lay_out_common,
    lay_out_union,
    missing_tokens,
)
from outliermerge.planning.vocabulary_runs import rearrange
from outliermerge.planning.vocabulary_tensors import find_vocabulary_tensors
from outliermerge.storage.stamps import is_there

_BY_TOKEN = "`tokenizer: {source: union}` pairs rows by their tokens, as mergekit does"

Policy = Literal["error", "base", "common", "union"]

_LAYOUTS: dict[str, Callable[[Sequence[VocabularyModel], OutputTokenizer], Layout]] = {
    "base": lay_out_base,
    "common": lay_out_common,
    "union": lay_out_union,
}


@dataclass(frozen=True)
class Alignment:
    """Models with the same rows in their vocabulary tensors.

    Attributes:
        checkpoints: the models' checkpoints, in the given order.
        num_rows: the number of rows of the output's vocabulary tensors; None if nothing was
            changed.
        added_tokens: the tokens to add to the output's tokenizer: id, token, and number of the
            first model that has it.
        notes: notes for the user.
        stored_rows: the number of rows of the first model's vocabulary tensors; None if it has
            none.
        tokenizer: the output's tokenizer, if its tokens decide which rows there are.
        left_out: files of the output's tokenizer that would contradict what is added to it.
        tokens: the tokens of that tokenizer, by id.
    """

    checkpoints: tuple[Checkpoint, ...]
    num_rows: int | None
    added_tokens: tuple[tuple[int, str, int], ...]
    notes: tuple[str, ...]
    stored_rows: int | None = None
    tokenizer: TokenizerPlan | None = None
    left_out: tuple[str, ...] = ()
    tokens: Mapping[int, str] | None = None


def align_vocabulary(
    models: Sequence[tuple[str, Checkpoint]],
    policy: Policy,
    *,
    homes: Sequence[Path] | None = None,
    tokenizer: int = 0,
    config: int = 0,
) -> Alignment:
    """Give the vocabulary tensors (embeddings, heads) of all models the same rows.

    If a model lacks a row of the first model, it gets the first model's row, so its difference
    there is zero. If rows differ, the policy decides. `error` refuses the merge, `base` takes the
    first model's rows, `common` takes the rows that all models have, and `union` takes the first
    model's rows and those that only other models have. Tokens that the first model lacks get the
    ids that a loader of the output's tokenizer gives them: in reserved rows of the first model, or
    after its rows. A model that lacks such a row gets the mean of the models that have it.

    Args:
        models: for each model its name in the spec and its checkpoint, whose root has the
            tokenizer. The first model is the reference.
        policy: the word that says what is done if vocabularies differ.
        homes: the folders of the models' configs; their roots by default.
        tokenizer, config: numbers of the models whose tokenizer and config the output has.

    Raises:
        OutlierMergeError: vocabularies differ and the policy does not allow it, a tokenizer file
            is broken, ids of the output's tokenizer or config would not lead to their rows, or it
            is unclear which tensors are the vocabulary's.
    """
    checkpoints = tuple(checkpoint for _, checkpoint in models)
    homes = homes or [checkpoint.root for checkpoint in checkpoints]
    unchanged = Alignment(checkpoints, None, (), ())
    if any("" not in checkpoint.components for checkpoint in checkpoints):
        return unchanged  # each part of a pipeline has its own tokenizer
    configs = [read_json(home / "config.json") for home in homes]
    found = find_vocabulary_tensors(checkpoints, configs)
    same_rows = len(set(found.num_rows.values())) == 1
    numbers = {*found.num_rows, tokenizer}
    if 0 not in found.num_rows:
        return unchanged
    unchanged = replace(unchanged, stored_rows=found.num_rows[0])
    if same_rows and _one_tokenizer([checkpoints[number] for number in sorted(numbers)]):
        return unchanged
    members = [
        open_vocabulary(number, *models[number], rows) for number, rows in found.num_rows.items()
    ]
    roots = [checkpoint.root for checkpoint in checkpoints]
    root = roots[tokenizer]
    written = OutputTokenizer(models[tokenizer][0], root, read_tokens(root) or {})
    if policy == "error":
        clashes = _clashes(members)
        if not same_rows or clashes:
            raise OutlierMergeError(
                _difference(members, clashes, lambda p: _lay_out(p, members, written, roots)[0])
                + f"\nOr {no_union(roots) or _BY_TOKEN}."
            )
        rows = list(range(found.num_rows[0]))
        idle = check_ids(members, written, Layout(len(rows), {m.number: rows for m in members}))
        return replace(unchanged, notes=(*_unnamed_tokens(members, written), *idle))
    for model in members:
        refuse_tekken(model.name, roots[model.number])
    layout, written = _lay_out(policy, members, written, roots)
    idle = check_ids(members, written, layout)
    for model in members:
        if model.number == config:
            _check_named(members, layout, written, model, homes[config])
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
    notes = (*_notes(members, layout), *layout.notes, *_unnamed_tokens(members[:1], written), *idle)
    if written.added:
        verb = "is" if len(written.added) == 1 else "are"
        notes = (*notes, f"{count(len(written.added), 'token')} {verb} added to the tokenizer")
    if written.left_out:
        notes = (*notes, stale_files(written.name, written.left_out, len(written.added)))
    if not moved:
        return replace(
            unchanged, added_tokens=written.added, notes=notes, left_out=written.left_out
        )
    aligned = [dict(checkpoint.tensors) for checkpoint in checkpoints]
    for name, axis in found.axes.items():
        held = {n: c.tensors[name] for n, c in enumerate(checkpoints) if name in c.tensors}
        for number in held:
            aligned[number][name] = _aligned(name, axis, number, held, layout)
    return Alignment(
        tuple(
            replace(checkpoint, tensors=tensors)
            for checkpoint, tensors in zip(checkpoints, aligned, strict=True)
        ),
        layout.num_rows,
        written.added,
        notes,
        found.num_rows[0],
        left_out=written.left_out,
    )


def stale_files(name: str, files: Sequence[str], num_added: int) -> str:
    """Return the note on files of a model's tokenizer that the output does not have."""
    return (
        f"left out of the tokenizer of {shown(name)}, as they lack "
        f"{count(num_added, 'token')} of the output: {', '.join(files)}"
    )


def _lay_out(
    policy: str, members: Sequence[VocabularyModel], written: OutputTokenizer, roots: Sequence[Path]
) -> tuple[Layout, OutputTokenizer]:
    """Return the output's rows, and its tokenizer with the tokens that are added for them."""
    if policy == "union" and (missing := missing_tokens(members, written)):
        if not is_there(written.root / TOKENIZER):
            has = f"no {TOKENIZER}" if written.tokens else "no tokenizer files that can be read"
            raise OutlierMergeError(
                f"vocabulary: union has to add tokens to the tokenizer of {written.name}, which "
                f"has {has}: name a model that has one as `tokenizer_source`."
                + (f" Or {how_to_convert(written.root)}" if written.tokens else "")
            )
        names = {model.number: model.name for model in members}
        wanted = {token: names[number] for token, number in missing.items()}
        entries = find_entries(wanted, [roots[model.number] for model in members])
        before = written.tokens.values()
        files = extend(read_files(written.root), written.root, entries, before)
        tokens = load_tokens(files, written.root)
        added = [(id_, token, missing[token]) for id_, token in tokens.items() if token in missing]
        left_out = contradicting(files, written.root)
        written = replace(written, tokens=tokens, added=tuple(added), left_out=left_out)
    return _LAYOUTS[policy](members, written), written


def _one_tokenizer(checkpoints: Sequence[Checkpoint]) -> bool:
    roots = [checkpoint.root for checkpoint in checkpoints if token_files(checkpoint.root)]
    return all(same_token_files(roots[0], root) for root in roots[1:])


def open_vocabulary(
    number: int, name: str, checkpoint: Checkpoint, num_rows: int
) -> VocabularyModel:
    """Return a model's rows, with the tokens of the tokenizer in its checkpoint's root."""
    tokens = read_tokens(checkpoint.root)
    ordered = sorted((tokens or {}).items())
    return VocabularyModel(
        number=number,
        name=name,
        num_rows=num_rows,
        tokens={id_: token for id_, token in ordered if id_ < num_rows},
        beyond={id_: token for id_, token in ordered if id_ >= num_rows},
        has_tokenizer=tokens is not None,
    )


def _clashes(members: Sequence[VocabularyModel]) -> dict[int, str]:
    """Return for each model's number, in words, how its ids differ from those of earlier models."""
    seen: dict[int, tuple[str, str]] = {}
    places: dict[str, dict[int, str]] = {}
    clashes: dict[int, str] = {}
    for model in members:
        others, moved = [], []
        for id_, token in model.tokens.items():
            other, name = seen.setdefault(id_, (token, model.name))
            if other != token:
                others.append(f"{id_} is {token!r}, in {name} {other!r}")
            elif (known := places.get(token)) and id_ not in known:
                number, name = next(iter(known.items()))
                moved.append(f"{token!r} is {id_}, in {name} {number}")
        for id_, token in model.tokens.items():
            places.setdefault(token, {}).setdefault(id_, model.name)
        found = others or moved
        if found:
            what = "id means other tokens" if others else "token has other ids"
            more = f"; and {len(found) - NUM_SHOWN} more" if len(found) > NUM_SHOWN else ""
            clashes[model.number] = f"the same {what}: {'; '.join(found[:NUM_SHOWN])}{more}"
    return clashes


def _check_named(
    members: Sequence[VocabularyModel],
    layout: Layout,
    written: OutputTokenizer,
    model: VocabularyModel,
    home: Path,
) -> None:
    """Refuse to drop rows that the output's config names by an id."""
    wrong = []
    for file in ("config.json", "generation_config.json"):
        for key, ids in named_ids(read_json(home / file)).items():
            for id_ in ids:
                there = id_ < layout.num_rows
                if id_ >= model.num_rows or (there and layout.rows[model.number][id_] == id_):
                    continue
                new = written.tokens.get(id_)
                if (
                    there
                    and id_ not in model.tokens
                    and any(other.tokens.get(id_) == new for other in members)
                ):  # a model was trained with it at this id
                    continue
                token = f" ({model.tokens[id_]!r})" if id_ in model.tokens else ""
                what = f"is for {new!r}" if there and new else "it does not have"
                wrong.append(f"{file}: {key} {id_}{token}, a row that {what}")
    if wrong:
        raise OutlierMergeError(
            f"the config of {shown(model.name)} names rows by ids that the output would not keep "
            "for "
            f"them:\n{listing(wrong, limit=5)}\n"
            "`config_source` takes another model's config; an id without use can be taken out."
        )


def _aligned(
    name: str, axis: int, number: int, held: Mapping[int, Source], layout: Layout
) -> Source:
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
                f"tensor {name!r}: {'' if 0 in held else 'the first model lacks it, and '}no model "
                f"that has it has row {row} of the output's vocabulary: it cannot be given the "
                "output's rows"
            )
    return rearrange(number, held, cells, axis)


def _notes(members: Sequence[VocabularyModel], layout: Layout) -> list[str]:
    reference = members[0]
    notes = []
    for model in members:
        if not model.has_tokenizer:
            notes.append(
                f"{shown(model.name)} has no tokenizer files: its rows are matched by index"
            )
        if model is reference:
            continue
        rows = layout.rows[model.number]
        if others := set(range(model.num_rows)) - set(rows):
            notes.append(f"left out of {shown(model.name)}: {model.describe(others)}")
        shared = [row for row, own in enumerate(layout.rows[reference.number]) if row == own]
        if lacking := [row for row in shared if rows[row] == ABSENT]:
            notes.append(
                f"{shown(model.name)} lacks {reference.describe(lacking)} of "
                f"{shown(reference.name)}: "
                "unchanged there"
            )
        if num_moved := sum(rows[row] not in (row, ABSENT) for row in shared):
            notes.append(
                f"{shown(model.name)} has other ids than {shown(reference.name)} for "
                f"{count(num_moved, 'token')}: matched by token"
            )
    return notes


def _unnamed_tokens(members: Sequence[VocabularyModel], written: OutputTokenizer) -> list[str]:
    """Return notes on tokens whose rows are merged but that the output's tokenizer lacks."""
    return [
        f"the tokenizer of {written.name} does not name {model.describe(unnamed)} of "
        f"{shown(model.name)}: "
        "the output's cuts such texts into other tokens. `vocabulary: union` keeps them"
        for model in members
        if written.tokens and (unnamed := model.tokens.keys() - written.tokens.keys())
    ]


def _difference(
    members: Sequence[VocabularyModel], clashes: Mapping[int, str], lay_out: Callable[[str], Layout]
) -> str:
    reference, base = members[0], lay_out_base(members, OutputTokenizer("", Path(), {}))
    lines = [f"  {shown(reference.name)}: {count(reference.num_rows, 'row')}"]
    for model in members[1:]:
        rows = base.rows[model.number]
        parts = []
        if others := set(range(model.num_rows)) - set(rows):
            parts.append(f"    only it has {model.describe(others)}")
        if lacking := [row for row in range(base.num_rows) if rows[row] == ABSENT]:
            parts.append(f"    it lacks {reference.describe(lacking)}")
        if found := clashes.get(model.number):
            parts.append(f"    {found}")
        lines += [f"  {shown(model.name)}: {count(model.num_rows, 'row')}", *parts]
    return "\n".join(
        [
            "the models' vocabularies differ",
            *lines,
            "`vocabulary` in the spec sets what becomes of it:",
            f"  base: the rows of {shown(reference.name)}; tokens that only others have are left "
            "out "
            f"({_outcome('base', lay_out)})",
            f"  common: only the rows that all models have ({_outcome('common', lay_out)})",
            f"  union: the rows of {shown(reference.name)}, then those that only others have "
            f"({_outcome('union', lay_out)})",
        ]
    )


def _outcome(policy: str, lay_out: Callable[[str], Layout]) -> str:
    try:
        return count(lay_out(policy).num_rows, "row")
    except OutlierMergeError:
        return "not possible here"
