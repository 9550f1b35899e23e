"""Rows by token: where each model's row of each token of the output's tokenizer comes from.

A model that has a token keeps its row. The row of another model is what the spec says; else the
base's; else that of the only model that has the token, or the mean of those that do; else zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

from outliermerge.errors import quoted, shown, suggest
from outliermerge.planning.tokenizer_plan import ModelRows
from outliermerge.planning.vocabulary_rows import VocabularyModel
from outliermerge.spec.settings import SettingError
from outliermerge.spec.tokenizer import BASE, TokenizerRequest, TokenRow

Name = str | int
"""A row of the output: its token, or its number if it has none."""
Cell = tuple[tuple[int, int], ...]
"""The models, by number, and their rows whose mean a row is; empty for a zero row."""


class TokenRows:
    """The rows of an output, by its tokens.

    Args:
        members: the models that have vocabulary tensors.
        tokens: the output's tokens by id.
        num_rows: how many rows have an id, or are kept though they have none.
        request: what the spec says of single tokens.
        number_of: the number of a model by its name in the spec.
        has_base: whether the first model is the base of the merge.

    Raises:
        SettingError: the spec names a token or a row that the model does not have.
    """

    def __init__(
        self,
        members: Sequence[VocabularyModel],
        tokens: Mapping[int, str],
        num_rows: int,
        request: TokenizerRequest,
        number_of: Callable[[str], int],
        *,
        has_base: bool,
    ) -> None:
        self.members = {model.number: model for model in members}
        self.tokens, self.num_rows, self.has_base = tokens, num_rows, has_base
        self.request = request
        self._known = frozenset(tokens.values())
        self._names: list[Name] = [tokens.get(row, row) for row in range(num_rows)]
        self._said: dict[str, Cell] = {}
        self._forced: set[str] = set()
        for token, row in request.tokens.items():
            if row.force:
                self._forced.add(token)
            if not row.is_default:
                number = 0 if row.model in (None, BASE) else number_of(row.model or "")
                self._said[token] = () if row.is_zero else (self._named(token, row, number),)
            elif not any(token in model.ids for model in members):
                raise SettingError(
                    row.path,
                    f"no model has {quoted(token)}, so that `source` must say which row it gets",
                    at_key=True,
                )
        self._defaults: dict[frozenset[int], list[Cell]] = {}

    def _named(self, token: str, row: TokenRow, number: int) -> tuple[int, int]:
        """Return the model and the row that the spec names for a token."""
        place = (*row.path, "source")
        model = self.members.get(number)
        if model is None:
            raise SettingError(place, f"{shown(row.model)} has no embeddings")
        if row.token_id is not None:
            if row.token_id >= model.num_rows:
                raise SettingError(
                    (*place, "token_id"),
                    f"{shown(model.name)} has {model.num_rows:,} rows, found {row.token_id:,}",
                )
            return number, row.token_id
        wanted = row.token if row.token is not None else token
        if wanted not in model.ids:
            _refuse_token(model, wanted, (*place, "token") if row.token is not None else place)
        return number, model.ids[wanted]

    def defaults(self, held: Collection[int]) -> list[Cell]:
        """Return for each row what models have that lack its token.

        Args:
            held: the numbers of the models that have the tensor.
        """
        key = frozenset(held)
        if key not in self._defaults:
            for token, cell in self._said.items():
                if lacking := [self.members[n].name for n, _ in cell if n not in key]:
                    raise SettingError(
                        (*self.request.tokens[token].path, "source"),
                        f"{shown(lacking[0])} lacks one of the vocabulary tensors",
                    )
            models = [self.members[number] for number in sorted(key)]
            self._defaults[key] = [self._default(name, models) for name in self._names]
        return self._defaults[key]

    def _default(self, name: Name, models: Sequence[VocabularyModel]) -> Cell:
        if isinstance(name, str) and (said := self._said.get(name)) is not None:
            return said
        rows = [(model.number, model.row_of(name)) for model in models]
        owners = tuple((number, row) for number, row in rows if row is not None)
        if len(owners) > 1 and self.has_base and owners[0][0] == 0:
            return owners[:1]
        return owners

    def cells(self, number: int, held: Collection[int]) -> Iterator[Cell]:
        """Yield the cells of a model's rows."""
        model = self.members[number]
        for name, default in zip(self._names, self.defaults(held), strict=True):
            own = None if name in self._forced else model.row_of(name)
            yield default if own is None else ((number, own),)

    def counts(self, number: int) -> ModelRows:
        """Return what becomes of a model's rows."""
        model = self.members[number]
        own = moved = taken = averaged = zero = kept = 0
        ids = model.ids
        for row, cell in enumerate(self.cells(number, self.members)):
            name = self._names[row]
            if isinstance(name, int):
                kept += model.row_of(name) is not None
            elif len(cell) == 1 and cell[0][0] == number and ids.get(name) == cell[0][1]:
                own += 1
                moved += cell[0][1] != row
            elif not cell:
                zero += 1
            else:
                averaged += len(cell) > 1
                taken += len(cell) == 1
        found = ModelRows(model.name, model.num_rows, own, moved, taken, averaged, zero)
        return replace(
            found,
            dropped=sum(token not in self._known for token in ids),
            kept=kept,
            reserved=model.num_rows - len(model.tokens) - kept,
        )

    def without_row(self) -> list[str]:
        """Return the output's tokens that no model has and the spec says nothing of."""
        every = set[str]().union(*(model.ids for model in self.members.values()))
        return [t for t in self.tokens.values() if t not in every and t not in self._said]


def _refuse_token(model: VocabularyModel, token: str, place: tuple[str | int, ...]) -> NoReturn:
    close = suggest(token, model.ids) if len(model.ids) <= 40 else ""
    raise SettingError(
        place, f"{shown(model.name)} has no token {quoted(token)}{'. ' if close else ''}{close}"
    )
