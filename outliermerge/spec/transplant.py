"""A transplant: a model gets the tokenizer of another one, and rows for its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from outliermerge.arguments import wrong
from outliermerge.errors import ArgumentError, argument, direct_reference, quoted, suggest
from outliermerge.methods.table import find_method
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.document import ModelEntry, SpecDocument
from outliermerge.spec.models import ModelSpec
from outliermerge.spec.text import SpecText

APPROXIMATIONS: Mapping[str, str] = MappingProxyType(
    {
        "omp": "a weighted sum of rows of tokens in common, those that add up to the donor's row "
        "(orthogonal matching pursuit, arXiv 2506.06607)",
        "interpolate": "the mean of the nearest tokens in common, weighted by 1/distance in the "
        "donor",
        "subtokens": "the mean of the rows of the model's own tokens that spell it",
        "mean": "the mean of all rows of the model",
        "zero": "zeros",
    }
)
"""By name how a row is approximated for a token that the model lacks."""
BY_DONOR_ROWS = ("omp", "interpolate")
"""Those that need the donor's weights."""
DEFAULT, DEFAULT_K = "omp", 64


@dataclass(frozen=True, repr=False)
class TransplantSpec(MergeSpec):
    """A checked transplant: to what writes it, a copy of a model with other rows.

    Attributes:
        model: the model that gets the tokenizer.
        donor: the model that has it.
        approximation: how rows are made for tokens that the model lacks.
        k: how many tokens in common make up such a row.
        multiple: what the number of rows is a multiple of.
    """

    model: str = field(kw_only=True)
    donor: str = field(kw_only=True)
    approximation: str = field(kw_only=True)
    k: int = field(kw_only=True)
    multiple: int = field(kw_only=True)

    @property
    def needs_donor_rows(self) -> bool:
        return self.approximation in BY_DONOR_ROWS

    @property
    def command(self) -> str:
        return "tokenizer transplant"

    @property
    def title(self) -> str:
        return "transplant"

    @property
    def in_a_line(self) -> str:
        return f"the tokenizer of {self.donor} in {self.model}, by {self.approximation}"

    @property
    def summary(self) -> str:
        return (
            "A model with the tokenizer of another one. Tokens that both have keep the model's "
            f"rows; a row of another token is {APPROXIMATIONS[self.approximation]}."
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "merge_method": self.title,
            "model": self.model,
            "donor": self.donor,
            "method": self.approximation,
            **({"k": self.k} if self.needs_donor_rows else {}),
            **({"pad_to_multiple_of": self.multiple} if self.multiple > 1 else {}),
        }

    def lasting(self, name: Callable[[str], str]) -> dict[str, Any]:
        """Return it with its models named otherwise."""
        return self.as_dict() | {"model": name(self.model), "donor": name(self.donor)}


def words_of(document: Mapping[str, Any]) -> list[str]:
    """Return the words of the command line that makes a transplant, after the command's name.

    >>> words_of({"model": "a", "donor": "b", "method": "omp", "k": 8})
    ['a', 'b', '--method', 'omp', '--k', '8']
    """
    flags = {k: v for k, v in document.items() if k not in ("merge_method", "model", "donor")}
    words = [document["model"], document["donor"]]
    for key, value in flags.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words


def transplant_spec(
    model: str,
    donor: str,
    *,
    method: str = DEFAULT,
    k: int = DEFAULT_K,
    pad_to_multiple_of: int | None = None,
) -> TransplantSpec:
    """Return a checked transplant.

    Raises:
        ArgumentError: an argument is wrong.
    """
    for name, value in (("model", model), ("donor", donor)):
        if not isinstance(value, str) or not value:
            raise wrong(name, value, "a folder, a hub id or model+adapter")
    model, donor = direct_reference(model), direct_reference(donor)
    if method not in APPROXIMATIONS:
        advice = suggest(str(method), APPROXIMATIONS)
        raise ArgumentError(f"{argument('method')}: no method {quoted(method)}. {advice}")
    multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
    for name, number in (("k", k), ("pad_to_multiple_of", multiple)):
        if type(number) is not int or number < 1:
            raise wrong(name, number, "a whole number of 1 or more")
    return TransplantSpec(
        document=SpecDocument(merge_method="passthrough", models=[ModelEntry(model=model)]),
        method=find_method("passthrough"),
        base=ModelSpec(model, ("model",)),
        models=(ModelSpec(model, ("model",)),),
        source=SpecText("transplant"),
        model=model,
        donor=donor,
        approximation=method,
        k=k,
        multiple=multiple,
    )
