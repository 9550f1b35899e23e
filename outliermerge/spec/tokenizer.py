"""What a spec says of the output's tokenizer, and of the rows of single tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from outliermerge.checkpoint.folders.hub import is_hub_id
from outliermerge.errors import as_path, direct_reference, quoted, suggest
from outliermerge.spec.settings import SettingError, SpecPath, all_of
from outliermerge.spec.validation import describe

BASE, UNION = "base", "union"
# The largest vocabulary of a published model has a million tokens (XLM-V).
MAX_ROWS = 1 << 21
_NAME = {"type": "string", "minLength": 1}
_ROW_SCHEMA: dict[str, Any] = {
    "anyOf": [
        _NAME,
        {
            "type": "object",
            "required": ["kind"],
            "additionalProperties": False,
            "properties": {"kind": {"const": "zero"}},
        },
        {
            "type": "object",
            "required": ["kind", "model"],
            "additionalProperties": False,
            "properties": {
                "kind": {"const": "model_token"},
                "model": _NAME,
                "token": {"type": ["string", "null"]},
                "token_id": {"type": ["integer", "null"], "minimum": 0},
            },
            "oneOf": [
                {"required": [key], "properties": {key: {"not": {"type": "null"}}}}
                for key in ("token", "token_id")
            ],
        },
        {"type": "null"},
    ]
}
_KEYS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
_FORMS = "a model, {kind: zero}, or {kind: model_token, model: …, token: …}"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _direct(source: Any) -> Any:
    """Return where a row comes from, with the model's path as direct as the models' are."""
    if isinstance(source, dict) and isinstance(source.get("model"), str):
        return source | {"model": direct_reference(source["model"])}
    return direct_reference(source) if isinstance(source, str) else source


class TokenEntry(_Entry):
    """The row of a token."""

    source: Annotated[Any, WithJsonSchema(_ROW_SCHEMA), AfterValidator(_direct)] = Field(
        default=None,
        description="Where models that lack the token take its row from: a model, `{kind: zero}`, "
        "or `{kind: model_token, model: …, token: …}` (or `token_id`), the row of another token. "
        "By default the base, else the mean of the models that have it.",
    )
    force: bool = Field(
        default=False, description="Whether models that have the token take that row as well."
    )


class TokenizerEntry(_Entry):
    """The output's tokenizer: embeddings and head get a row for each of its tokens."""

    source: Annotated[str, Field(min_length=1), AfterValidator(direct_reference)] = Field(
        default=UNION,
        description="`base`, a model, or `union` (default): the base's tokenizer with all tokens "
        "that only other models have. Of a model that is not merged only the tokenizer is read.",
    )
    tokens: dict[str, TokenEntry] | None = Field(
        default=None,
        description="By token where its row comes from. Tokens that the tokenizer lacks are added.",
    )
    pad_to_multiple_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_ROWS,
        description="Rows are added until their number is a multiple of this; each is the mean of "
        "the model's rows.",
    )


@dataclass(frozen=True)
class TokenRow:
    """Where the row of a token comes from.

    Attributes:
        path: the token's place in the spec.
        is_zero: the row is zero.
        model: otherwise the model that has the row; None if the default holds.
        token, token_id: another token of that model whose row it is.
        force: whether models that have the token take that row as well.
    """

    path: SpecPath
    is_zero: bool = False
    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False

    @property
    def is_default(self) -> bool:
        return not self.is_zero and self.model is None


@dataclass(frozen=True)
class TokenizerRequest:
    """A tokenizer whose tokens decide which rows the output has.

    Attributes:
        path: the key that asks for it.
        source: `base`, `union`, or a model.
        tokens: what is said of single tokens.
        multiple: what the number of rows is a multiple of.
        is_outside: the source is none of the merged models: only its tokenizer is read.
    """

    path: SpecPath
    source: str
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    multiple: int = 1
    is_outside: bool = False

    @property
    def is_union(self) -> bool:
        return self.source == UNION


def plain_reference(name: str | None) -> str | None:
    """Return a model's name without the `model:` that mergekit takes before it.

    >>> plain_reference("model:org/name")
    'org/name'
    """
    return name.removeprefix("model:") if name is not None else None


def tokenizer_request(
    entry: TokenizerEntry | None,
    source: str | None,
    vocabulary: str | None,
    models: Sequence[str],
    pass_over: Callable[[SettingError], None],
) -> TokenizerRequest | None:
    """Return the tokenizer that a spec asks for with `tokenizer` or `tokenizer_source`.

    With `vocabulary`, `tokenizer_source` only says whose tokenizer files are taken.

    Args:
        models: the models that may be named.
        pass_over: called with an unknown key of a row.

    Raises:
        SettingError: keys contradict one another, or something names no model.
    """
    if entry is not None:
        for key, other in (("tokenizer_source", source), ("vocabulary", vocabulary)):
            if other is not None:
                raise SettingError(
                    (key,),
                    f"`tokenizer` says which tokens and rows the output has, `{key}: {other}` says "
                    "it as well: remove one of them",
                    at_key=True,
                )
        is_outside = _is_outside(entry.source, models, ("tokenizer", "source"))
        rows = all_of(
            partial(_token_row, token, said, (BASE, *models), pass_over)
            for token, said in (entry.tokens or {}).items()
        )
        name = plain_reference(entry.source) or BASE
        tokens = dict(zip(entry.tokens or {}, rows, strict=True))
        multiple = entry.pad_to_multiple_of or 1
        return TokenizerRequest(("tokenizer",), name, tokens, multiple, is_outside)
    if source is None:
        return None
    name = plain_reference(source) or BASE
    if vocabulary is not None and name == UNION:
        raise SettingError(
            ("vocabulary",),
            "`tokenizer_source: union` says which rows the output has, `vocabulary` says it as "
            "well: remove one of them",
            at_key=True,
        )
    if vocabulary is not None:
        _check_model(source, (BASE, *models), ("tokenizer_source",))
        return None
    is_outside = _is_outside(source, models, ("tokenizer_source",))
    return TokenizerRequest(("tokenizer_source",), name, is_outside=is_outside)


def _is_outside(name: str, models: Sequence[str], path: SpecPath) -> bool:
    """Tell whether a tokenizer is that of a model which is not merged.

    Raises:
        SettingError: it cannot be a model.
    """
    known = (BASE, UNION, *models)
    plain = plain_reference(name) or BASE
    if plain in known:
        return False
    if is_hub_id(plain) or as_path(plain).exists():
        return True
    advice = suggest(name, dict.fromkeys(known))
    raise SettingError(
        path, f"{quoted(name)} is none of the models, no other folder and no hub id. {advice}"
    )


def _check_model(name: str, known: Sequence[str], path: SpecPath) -> None:
    if plain_reference(name) not in known:
        advice = suggest(name, dict.fromkeys(known))
        raise SettingError(path, f"{quoted(name)} is none of the models. {advice}")


def _token_row(
    token: str,
    entry: TokenEntry,
    known: Sequence[str],
    pass_over: Callable[[SettingError], None],
) -> TokenRow:
    path: SpecPath = ("tokenizer", "tokens", token)
    if not token:
        raise SettingError(path, "a token must not be empty", at_key=True)
    found, place = entry.source, (*path, "source")
    if found is None:
        if entry.force:
            raise SettingError(
                (*path, "force"), f"it forces no row: `source` is missing, {_FORMS}", at_key=True
            )
        return TokenRow(path)
    if isinstance(found, str):
        _check_model(found, known, place)
        return TokenRow(path, model=plain_reference(found), force=entry.force)
    kind = found.get("kind") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(kind, str) or kind not in _KEYS:
        said = f"kind {quoted(kind)}" if kind is not None else describe(found)
        raise SettingError(place, f"found {said}, expected {_FORMS}")
    for key in found:
        if key not in _KEYS[kind]:
            said = f"unknown key {quoted(key)}. {suggest(str(key), _KEYS[kind])}"
            inner = (*place, str(key))
            pass_over(SettingError(inner, said, at_key=True, passed_over=inner))
    if kind == "zero":
        return TokenRow(path, is_zero=True, force=entry.force)
    model, other, number = (found.get(key) for key in ("model", "token", "token_id"))
    if not isinstance(model, str):
        raise SettingError((*place, "model"), f"found {describe(model)}, expected a model")
    _check_model(model, known, (*place, "model"))
    if (other is None) == (number is None):
        what = "both" if other is not None else "neither"
        raise SettingError(place, f"found {what}, expected `token` or `token_id`")
    if other is not None and not isinstance(other, str):
        raise SettingError((*place, "token"), f"found {describe(other)}, expected a text")
    if number is not None and (type(number) is not int or number < 0):
        said = f"found {describe(number)}, expected a whole number, 0 or more"
        raise SettingError((*place, "token_id"), said)
    return TokenRow(
        path, model=plain_reference(model), token=other, token_id=number, force=entry.force
    )
