"""The rows of the output's vocabulary tensors, and the row of each model that matches each of them.

Rows match by token, if the tokenizers have a token for the row's id. Other rows are padding, or
reserved; they match the row with the same index in another model, if that is padding as well. The
output's tokenizer decides which row a token has in the output: a reserved row for which it has a
token belongs to that token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

from outliermerge.errors import OutlierMergeError, listing, shown

ABSENT = -1
NUM_SHOWN = 10


@dataclass(frozen=True)
class VocabularyModel:
    """A model that has vocabulary tensors.

    Attributes:
        number: the model's index among the models.
        name: the name that the user wrote.
        num_rows: the number of rows of its vocabulary tensors.
        tokens: the tokens that have a row, by id.
        beyond: tokens of its tokenizer that have no row.
        has_tokenizer: False if it is not known which rows are tokens.
    """

    number: int
    name: str
    num_rows: int
    tokens: Mapping[int, str]
    beyond: Mapping[int, str]
    has_tokenizer: bool

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each token that has a row."""
        return {token: id_ for id_, token in self.tokens.items()}

    def row_of(self, name: str | int) -> int | None:
        """Return the row of a token, or the row with a number if it has no token here."""
        if isinstance(name, str):
            return self.ids.get(name)
        return name if name < self.num_rows and name not in self.tokens else None

    def describe(self, rows: Iterable[int]) -> str:
        """Return rows in words: tokens by name, padding counted."""
        ordered = sorted(rows)
        named = [row for row in ordered if row in self.tokens]
        padding = [row for row in ordered if row not in self.tokens]
        parts = []
        if named:
            parts.append(_shown([(row, self.tokens[row]) for row in named]))
        if padding:
            what = "padding row" if self.has_tokenizer else "row"
            parts.append(f"{count(len(padding), what)} ({_ranges(padding)})")
        return " and ".join(parts)


@dataclass(frozen=True)
class OutputTokenizer:
    """The tokenizer that the output has.

    Attributes:
        name: the name of the model that it is taken from.
        root: the folder of its files.
        tokens: its tokens, with those that the merge adds, by the ids that a loader gives them.
        added: the tokens that the merge adds: id, token, and number of the first model that has it.
        left_out: its files that lack these tokens.
    """

    name: str
    root: Path
    tokens: Mapping[int, str]
    added: tuple[tuple[int, str, int], ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The output's rows: for each model's number, which of its rows each one is, or ABSENT."""

    num_rows: int
    rows: Mapping[int, Sequence[int]]
    notes: tuple[str, ...] = ()


def missing_tokens(members: Sequence[VocabularyModel], written: OutputTokenizer) -> dict[str, int]:
    """Return the tokens that the output's tokenizer lacks, each with the first model that has it.

    If the output's tokenizer has no tokens, those of the first model's rows are not missing.
    """
    known = set((written.tokens or _names(members)).values())
    found: dict[str, int] = {}
    for model in members:
        for token in model.tokens.values():
            if token not in known:
                found.setdefault(token, model.number)
    return found


def _names(members: Sequence[VocabularyModel]) -> Mapping[int, str]:
    """Return the tokens of the reference's rows.

    If it has no tokenizer, its rows match other models' rows by index; then the tokens come from
    the first other model that has a tokenizer.
    """
    reference = members[0]
    teller = next((model for model in members if model.has_tokenizer), reference)
    return {id_: token for id_, token in teller.tokens.items() if id_ < reference.num_rows}


def _new_names(members: Sequence[VocabularyModel], written: OutputTokenizer) -> Mapping[int, str]:
    """Return the tokens that have a row in some model and none in the reference."""
    known = _names(members)
    return {
        id_: token
        for id_, token in written.tokens.items()
        if id_ not in known and any(token in model.ids for model in members)
    }


def _matched(
    model: VocabularyModel, num_rows: int, known: Mapping[int, str], new: Mapping[int, str]
) -> list[int]:
    """Return for each row of the output the matching row of a model."""
    rows, names = [], {**new, **known}
    for row in range(num_rows):
        own = row if row < model.num_rows else ABSENT
        name = names.get(row)
        if not model.has_tokenizer:
            rows.append(ABSENT if row in new else own)
        elif model.tokens.get(row) == name:
            rows.append(own)
        else:
            rows.append(ABSENT if name is None else model.ids.get(name, ABSENT))
    return rows


def _lay_out(members: Sequence[VocabularyModel], written: OutputTokenizer, num_rows: int) -> Layout:
    known, new = _names(members), _new_names(members, written)
    rows = {model.number: _matched(model, num_rows, known, new) for model in members}
    reference, notes = members[0], []
    for what, ids in (
        ("put into reserved rows of", [id_ for id_ in new if id_ < reference.num_rows]),
        ("added after the rows of", [id_ for id_ in new if reference.num_rows <= id_ < num_rows]),
    ):
        for model in members:
            first = [
                id_
                for id_ in ids
                if new[id_] in model.ids
                and all(new[id_] not in m.ids for m in members[: members.index(model)])
            ]
            if first:
                which = _shown([(id_, new[id_]) for id_ in sorted(first)])
                notes.append(f"{what} {shown(reference.name)}, from {shown(model.name)}: {which}")
    return Layout(num_rows, rows, tuple(notes))


def lay_out_base(members: Sequence[VocabularyModel], written: OutputTokenizer) -> Layout:
    """Return the first model's rows."""
    return _lay_out(members, written, members[0].num_rows)


def lay_out_common(members: Sequence[VocabularyModel], written: OutputTokenizer) -> Layout:
    """Return the first model's rows up to the last that all models have.

    Raises:
        OutlierMergeError: some model lacks a row before that one, or the tokenizer names a token
            whose row is cut off.
    """
    reference, base = members[0], lay_out_base(members, written)
    shared = [
        row for row in range(base.num_rows) if all(rows[row] >= 0 for rows in base.rows.values())
    ]
    cut = set(range(base.num_rows)) - set(shared)
    if cut and min(cut) < len(shared):
        raise OutlierMergeError(
            f"`vocabulary: common` can only cut rows at the end, but of {shown(reference.name)} "
            "other "
            f"models lack {reference.describe(cut)}. Use `vocabulary: base`."
        )
    if named := [(row, written.tokens[row]) for row in sorted(cut) if row in written.tokens]:
        raise OutlierMergeError(
            f"`vocabulary: common` would cut rows that the tokenizer of {written.name} names: "
            f"{_shown(named)}. The output keeps that tokenizer: use `vocabulary: base`."
        )
    notes = (
        f"cut, as not all models have them: {reference.describe(cut)} of {shown(reference.name)}",
    )
    return Layout(
        len(shared),
        {number: rows[: len(shared)] for number, rows in base.rows.items()},
        (*base.notes, *(notes if cut else ())),
    )


def lay_out_union(members: Sequence[VocabularyModel], written: OutputTokenizer) -> Layout:
    """Return the first model's rows, then rows of tokens and of padding that only others have.

    Raises:
        OutlierMergeError: the tokenizer's ids leave a gap of rows that no model has.
    """
    reference = members[0]
    num_rows = max([reference.num_rows, *(id_ + 1 for id_ in _new_names(members, written))])
    num_named = num_rows
    while any(num_rows < m.num_rows and num_rows not in m.tokens for m in members[1:]):
        num_rows += 1
    layout = _lay_out(members, written, num_rows)
    if empty := [
        row for row in range(num_rows) if all(rows[row] < 0 for rows in layout.rows.values())
    ]:
        named = [(row, written.tokens[row]) for row in empty if row in written.tokens]
        what = f", which it has for {_shown(named)}" if named else ""
        raise OutlierMergeError(
            f"`vocabulary: union`: by the ids of the tokenizer of {written.name} the output needs "
            f"{count(len(empty), 'row')} ({_ranges(empty)}) that no model has{what}. "
            "`tokenizer_source` takes another model's tokenizer."
        )
    if num_rows == num_named:
        return layout
    padding = (
        f"{count(num_rows - num_named, 'padding row')} ({_ranges(range(num_named, num_rows))})"
    )
    note = f"added after the rows of {shown(reference.name)}: {padding}"
    return Layout(num_rows, layout.rows, (*layout.notes, note))


def check_ids(
    members: Sequence[VocabularyModel], written: OutputTokenizer, layout: Layout
) -> list[str]:
    """Prove that each id of the output's tokenizer is the number of its token's row.

    Returns:
        Notes on tokens that no model has a row for.

    Raises:
        OutlierMergeError: an id leads to another row; the message lists the tokens.
    """
    known = _names(members)
    wrong: list[str] = []
    beyond: list[tuple[int, str]] = []
    idle: list[tuple[int, str]] = []
    for id_, token in sorted(written.tokens.items()):
        holders = [model for model in members if token in model.ids]
        if id_ >= layout.num_rows:
            (beyond if holders else idle).append((id_, token))
        elif known.get(id_, token) != token:
            wrong.append(f"{id_}: {known[id_]!r} in the output, {token!r} in that tokenizer")
        elif stray := [m for m in holders if m.tokens.get(layout.rows[m.number][id_]) != token]:
            wrong.append(f"{id_}: {token!r}, which is row {stray[0].ids[token]} of {stray[0].name}")
    if wrong:
        raise OutlierMergeError(
            f"the ids of the tokenizer of {written.name} are not the rows of the output:\n"
            f"{listing(wrong, limit=5)}\n`tokenizer_source` takes another model's tokenizer."
        )
    if beyond or (idle and written.name != members[0].name):
        shown = [f"{id_}: {token!r}" for id_, token in (*beyond, *idle)]
        raise OutlierMergeError(
            f"the tokenizer of {written.name} has tokens beyond the output's {layout.num_rows} "
            f"rows:\n{listing(shown, limit=5)}\n`vocabulary: union` keeps the rows that they have, "
            "`tokenizer_source` takes another model's tokenizer."
        )
    if not idle:
        return []
    return [f"the tokenizer of {written.name} has {_shown(idle)}, for which no model has a row"]


def count(number: int, what: str) -> str:
    """Return a number with its noun, in the singular or plural.

    >>> count(1, "row"), count(2, "row")
    ('1 row', '2 rows')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def _shown(tokens: Sequence[tuple[int, str]]) -> str:
    shown = ", ".join(f"{token!r} {id_}" for id_, token in tokens[:NUM_SHOWN])
    more = f" and {len(tokens) - NUM_SHOWN} more" if len(tokens) > NUM_SHOWN else ""
    return f"{count(len(tokens), 'token')} ({shown}{more})"


def _ranges(rows: Iterable[int]) -> str:
    """Return sorted numbers as ranges, in words.

    >>> _ranges([3, 4, 5, 9])
    '3–5, 9'
    """
    ranges = []
    for _, group in groupby(enumerate(rows), lambda pair: pair[1] - pair[0]):
        numbers = [row for _, row in group]
        ranges.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}")
    return ", ".join(ranges[:5]) + (", …" if len(ranges) > 5 else "")
