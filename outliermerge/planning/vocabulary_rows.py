"""Which rows the models' vocabulary tensors get: by policy, which row of one is which of another.

A row is its token where the model's tokenizer has one for that id. Other rows are padding, or
reserved; such a row is the one with the same index in another model, if that is padding too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from outliermerge.errors import OutlierMergeError

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

    def describe(self, rows: Iterable[int]) -> str:
        """Return rows in words: tokens by name, padding counted."""
        ordered = sorted(rows)
        named = [row for row in ordered if row in self.tokens]
        padding = [row for row in ordered if row not in self.tokens]
        parts = []
        if named:
            shown = ", ".join(f"{self.tokens[row]!r} {row}" for row in named[:NUM_SHOWN])
            more = f" and {len(named) - NUM_SHOWN} more" if len(named) > NUM_SHOWN else ""
            parts.append(f"{count(len(named), 'token')} ({shown}{more})")
        if padding:
            what = "padding row" if self.has_tokenizer else "row"
            parts.append(f"{count(len(padding), what)} ({_ranges(padding)})")
        return " and ".join(parts)


@dataclass(frozen=True)
class Layout:
    """The output's rows: by a model's number, which of its rows each is, or ABSENT."""

    num_rows: int
    rows: Mapping[int, Sequence[int]]
    added_tokens: tuple[tuple[int, str, int], ...] = ()
    notes: tuple[str, ...] = ()


def _names(members: Sequence[Model]) -> Mapping[int, str]:
    """Return the tokens of the reference's rows.

    Where it has no tokenizer its rows match other models' by index, so that the first tokenizer
    of another one tells them.
    """
    reference = members[0]
    teller = next((model for model in members if model.has_tokenizer), reference)
    return {id_: token for id_, token in teller.tokens.items() if id_ < reference.num_rows}


def _matched(model: Model, num_rows: int, names: Mapping[int, str]) -> list[int]:
    """Return which of a model's rows each of the reference's rows is."""
    if not model.has_tokenizer:
        return [row if row < model.num_rows else ABSENT for row in range(num_rows)]
    ids = {token: id_ for id_, token in model.tokens.items()}
    rows = []
    for row in range(num_rows):
        name = names.get(row)
        if model.tokens.get(row) == name:
            rows.append(row if row < model.num_rows else ABSENT)
        else:
            rows.append(ABSENT if name is None else ids.get(name, ABSENT))
    return rows


def lay_out_base(members: Sequence[Model]) -> Layout:
    """Return the first model's rows."""
    num_rows, names = members[0].num_rows, _names(members)
    rows = {model.number: _matched(model, num_rows, names) for model in members[1:]}
    return Layout(num_rows, {0: list(range(num_rows)), **rows})


def lay_out_common(members: Sequence[Model]) -> Layout:
    """Return the first model's rows up to the last that all models have.

    Raises:
        OutlierMergeError: they lack rows before that, or ones that its tokenizer names.
    """
    reference, base = members[0], lay_out_base(members)
    shared = [
        row for row in range(base.num_rows) if all(rows[row] >= 0 for rows in base.rows.values())
    ]
    cut = set(range(base.num_rows)) - set(shared)
    if cut and min(cut) < len(shared):
        raise OutlierMergeError(
            f"`vocabulary: common` can only cut rows at the end, but of {reference.name} other "
            f"models lack {reference.describe(cut)}. Use `vocabulary: base`."
        )
    if named := [row for row in cut if row in reference.tokens]:
        raise OutlierMergeError(
            f"`vocabulary: common` would cut rows that the tokenizer of {reference.name} names: "
            f"{reference.describe(named)}. The output keeps that tokenizer: use "
            "`vocabulary: base`."
        )
    notes = (f"cut, as not all models have them: {reference.describe(cut)} of {reference.name}",)
    return Layout(
        len(shared),
        {number: rows[: len(shared)] for number, rows in base.rows.items()},
        notes=notes if cut else (),
    )


def lay_out_union(members: Sequence[Model]) -> Layout:
    """Return the first model's rows, then tokens and last padding that only others have.

    Raises:
        OutlierMergeError: the first model's tokenizer names other tokens for these rows.
    """
    reference, base = members[0], lay_out_base(members)
    known = set(_names(members).values())
    holders: dict[str, dict[int, int]] = {}
    for model in members[1:]:
        for id_, token in model.tokens.items():
            if token not in known:
                holders.setdefault(token, {})[model.number] = id_
    extra = list(holders.values())
    row = num_named = base.num_rows + len(extra)
    while padding := {
        model.number: row
        for model in members[1:]
        if row < model.num_rows and row not in model.tokens
    }:
        extra.append(padding)
        row += 1
    added = tuple(
        (base.num_rows + place, token, min(rows))
        for place, (token, rows) in enumerate(holders.items())
    )
    _check_free(reference, added)
    notes = [
        f"added after the rows of {reference.name}, from {model.name}: "
        + replace(model, tokens=own).describe(own)
        for model in members
        if (own := {id_: token for id_, token, number in added if number == model.number})
    ]
    if row > num_named:
        notes.append(
            f"added after the rows of {reference.name}: "
            f"{count(row - num_named, 'padding row')} ({_ranges(range(num_named, row))})"
        )
    rows = {
        number: [*matched, *(holder.get(number, ABSENT) for holder in extra)]
        for number, matched in base.rows.items()
    }
    new = tuple(entry for entry in added if entry[0] not in reference.beyond)
    return Layout(row, rows, new, tuple(notes))


def _check_free(reference: Model, added: Iterable[tuple[int, str, int]]) -> None:
    taken = {(id_, token) for id_, token, _ in added}
    ids, tokens = {id_ for id_, _ in taken}, {token for _, token in taken}
    wrong = [
        f"{token!r} {id_}"
        for id_, token in reference.beyond.items()
        if (id_, token) not in taken and (id_ in ids or token in tokens)
    ]
    if wrong:
        raise OutlierMergeError(
            f"`vocabulary: union` would put other tokens where the tokenizer of {reference.name} "
            f"names some that have no row: {', '.join(wrong[:NUM_SHOWN])}. Use `vocabulary: base`."
        )


def count(number: int, what: str) -> str:
    """Return a number with its noun.

    >>> count(1, "row"), count(2, "row")
    ('1 row', '2 rows')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


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
