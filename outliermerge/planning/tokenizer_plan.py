"""What a merge does to the tokenizer and to the rows of its tokens, for a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelRows:
    """What becomes of a model's rows, and where the output's rows of this model come from.

    Attributes:
        reference: the model, as the spec names it.
        num_rows: of its vocabulary tensors.
        own: tokens that have the model's own row; `moved` of them with another id.
        taken: tokens that the model lacks, or is not to use its own row of, and that have a row
            of another model or token; `averaged` and `zero` are those that have the mean of
            several models' rows, or zeros.
        approximated: tokens that the model lacks, and whose rows are made of its other rows.
        dropped: tokens of the model that the output does not have.
        kept, reserved: rows of the model without a token that the output has, and that it lacks.
        follows: the model without a tokenizer has the tokens of this one.
    """

    reference: str
    num_rows: int
    own: int = 0
    moved: int = 0
    taken: int = 0
    averaged: int = 0
    zero: int = 0
    approximated: int = 0
    dropped: int = 0
    kept: int = 0
    reserved: int = 0
    follows: str | None = None

    def in_words(self) -> str:
        """Return the counts that are not 0, in words."""
        counts = (
            (self.own, "own"), (self.moved, "of them under another id"),
            (self.taken, "taken from others"), (self.averaged, "averaged over others"),
            (self.zero, "zero"), (self.approximated, "approximated"),
            (self.dropped, "tokens left out"),
            (self.kept, "rows without a token"),
            (self.reserved, "rows without a token left out"),
        )  # fmt: skip
        return ", ".join(f"{number:,} {what}" for number, what in counts if number)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "model": self.reference,
            "num_rows": self.num_rows,
            **{key: getattr(self, key) for key in _COUNTS},
            **({"tokens_of": self.follows} if self.follows else {}),
        }


_COUNTS = (
    *("own", "moved", "taken", "averaged", "zero", "approximated", "dropped", "kept", "reserved"),
)


@dataclass(frozen=True)
class TokenizerPlan:
    """The tokenizer of an output whose rows go by its tokens.

    Attributes:
        source: as the spec says it: `base`, `union` or a model.
        reference: the model whose tokenizer files it is made from.
        num_tokens: that it has.
        num_rows: of the output's vocabulary tensors.
        num_added: tokens that the files of `reference` do not have.
        num_pieces: those of them that are pieces of its own model, as those of other tokenizers.
        models: what becomes of each model's rows.
        files: the contents of the files that change.
        left_out: files of `reference` that do not fit the tokenizer.
        ids: by file of the config the values that change, by the keys that lead to them.
    """

    source: str
    reference: str
    num_tokens: int
    num_rows: int
    num_added: int
    num_pieces: int
    models: tuple[ModelRows, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    ids: Mapping[str, Mapping[tuple[str, ...], Any]] = field(default_factory=dict)

    def in_words(self) -> str:
        """Return where it is from and how large it is."""
        whose = f"{self.source} of all, made from" if self.source == "union" else "that of"
        added = f", {self.num_added:,} of them added" if self.num_added else ""
        more = self.num_rows - self.num_tokens
        rows = f"{self.num_rows:,} rows" + (f", {more:,} of them without a token" if more else "")
        return f"{whose} {self.reference}: {self.num_tokens:,} tokens{added}; {rows}"

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values, without the files."""
        return {
            "source": self.source,
            "model": self.reference,
            "num_tokens": self.num_tokens,
            "num_rows": self.num_rows,
            "num_added": self.num_added,
            "num_pieces": self.num_pieces,
            "rows": [model.as_dict() for model in self.models],
            "left_out": list(self.left_out),
            "ids": {
                file: {".".join(path): value for path, value in changed.items()}
                for file, changed in self.ids.items()
            },
        }


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template that a spec gives an output.

    Attributes:
        name: `auto`, the name of a format, or `inline`.
        text: the template.
        models: the models that have it already.
        others: the models that have another one, and those that have none.
        takes: what a trial has shown of it, in words.
    """

    name: str
    text: str
    models: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    takes: str = ""

    def in_words(self) -> str:
        """Return where it is from, and what it takes."""
        whose = f" of {', '.join(self.models)}" if self.models else ""
        other = f"; {', '.join(self.others)} differ" if self.others else ""
        return f"{self.name}{whose}{other}{'; ' if self.takes else ''}{self.takes}"

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "source": self.name,
            "models": list(self.models),
            "others": list(self.others),
            "takes": self.takes,
            "text": self.text,
        }
