"""Which rows the models' vocabulary tensors get: by policy, which row of one is which of another.

A row is its token where the model's tokenizer has one for that id. Other rows are padding, or
reserved; such a row is the one with the same index in another model, if that is padding too.
The output's tokenizer tells which row a token has there: a reserved row that it has a token for is
that token's.
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
class Model:
    """A model that has vocabulary tensors.

    Attributes:
        number: its place among the models.
        name: as the user wrote it.
        num_rows: of its vocabulary tensors.
        tokens: by id, those that have a row.
        beyond: tokens that its tokenizer names but that have no row.
        has_tokenizer: False where it is not known which rows are tokens.
    """

    number: int
    name: str
    num_rows: int
    tokens: Mapping[int, str]
    beyond: Mapping[int, str]
    has_tokenizer: bool

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The rows that it has for tokens."""
        return {token: id_ for id_, token in self.tokens.items()}

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
class Written:
    """The tokenizer that the output has.

    Attributes:
        name: of the model that it is taken from.
        root: the folder that it is in.
        tokens: by the id that a loader gives them, with those that the merge adds.
        added: by the merge: id, token, number of the first model that has it.
    """

    name: str
    root: Path
    tokens: Mapping[int, str]
    added: tuple[tuple[int, str, int], ...] = ()


@dataclass(frozen=True)
class Layout:
    """The output's rows: by a model's number, which of its rows each is, or ABSENT."""

    num_rows: int
    rows: Mapping[int, Sequence[int]]
    notes: tuple[str, ...] = ()


def missing_tokens(members: Sequence[Model], written: Written) -> dict[str, int]:
    """Return the tokens that the output's tokenizer lacks, each with the first model that has it.

    Where it names none, tokens of the first model's rows are not asked for.
    """
    known = set((written.tokens or _names(members)).values())
    found: dict[str, int] = {}
    for model in members:
        for token in model.tokens.values():
            if token not in known:
                found.setdefault(token, model.number)
    return found


def _names(members: Sequence[Model]) -> Mapping[int, str]:
    """Return the tokens of the reference's rows.

    Where it has no tokenizer its rows match other models' by index, so that the first tokenizer
    of another one tells them.
    """
    reference = members[0]
    teller = next((model for model in members if model.has_tokenizer), reference)
    return {id_: token for id_, token in teller.tokens.items() if id_ < reference.num_rows}


def _new_names(members: Sequence[Model], written: Written) -> Mapping[int, str]:
    """Return the tokens, with a row in some model, of rows that are none of the reference's."""
    known = _names(members)
    return {
        id_: token
        for id_, token in written.tokens.items()
        if id_ not in known and any(token in model.ids for model in members)
    }


def _matched(
    model: Model, num_rows: int, known: Mapping[int, str], new: Mapping[int, str]
) -> list[int]:
    """Return which of a model's rows each of the output's rows is."""
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


def _lay_out(members: Sequence[Model], written: Written, num_rows: int) -> Layout:
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


def lay_out_base(members: Sequence[Model], written: Written) -> Layout:
    """Return the first model's rows."""
    return _lay_out(members, written, members[0].num_rows)


def lay_out_common(members: Sequence[Model], written: Written) -> Layout:
    """Return the first model's rows up to the last that all models have.

    Raises:
        OutlierMergeError: they lack rows before that, or ones that the tokenizer names.
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


def lay_out_union(members: Sequence[Model], written: Written) -> Layout:
    """Return the first model's rows, then those of tokens and last padding that only others have.

    Raises:
        OutlierMergeError: the tokenizer's ids leave rows between that no model has.
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


def check_ids(members: Sequence[Model], written: Written, layout: Layout) -> list[str]:
    """Prove that each id that the output's tokenizer gives leads to the row of its token.

    Returns:
        Notes on tokens that no model has a row for.

    Raises:
        OutlierMergeError: it does not; the message lists tokens.
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
    """Return a number with its noun.

    >>> count(1, "row"), count(2, "row")
    ('1 row', '2 rows')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def _shown(tokens: Sequence[tuple[int, str]]) -> str:
    shown = ", ".join(f"{token!r} {id_}" for id_, token in tokens[:NUM_SHOWN])
    more = f" and {len(tokens) - NUM_SHOWN} more" if len(tokens) > NUM_SHOWN else ""
    return f"{count(len(tokens), 'token')} ({shown}{more})"


def _ranges(rows: Iterable[int]) -> str:
    """Return sorted numbers as ranges.

    >>> _ranges([3, 4, 5, 9])
    '3–5, 9'
    """
    ranges = []
    for _, group in groupby(enumerate(rows), lambda pair: pair[1] - pair[0]):
        numbers = [row for _, row in group]
        ranges.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}")
    return ", ".join(ranges[:5]) + (", …" if len(ranges) > 5 else "")
