"""The YAML of a mixture of experts, which is mergekit-moe's, and its checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from outliermerge.arguments import wrong
from outliermerge.errors import SpecError, as_path, quoted, suggest
from outliermerge.methods.table import find_method
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.document import DTypeName, ModelEntry, Reference, SpecDocument
from outliermerge.spec.models import ModelSpec
from outliermerge.spec.repeated import read_repeated
from outliermerge.spec.settings import SpecPath
from outliermerge.spec.text import Mistakes, SpecText, parse_mapping, read_text
from outliermerge.spec.validation import in_words, validated, without_consequences

ARCHITECTURES = ("mixtral", "qwen", "qwen3", "deepseek")
_EXPERTS = ("experts", "shared_experts")
_STAND_INS = {"base_model": "?", "experts": [{"source_model": "?"}], "source_model": "?"}


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_Prompts = Annotated[list[str], BeforeValidator(lambda value: [] if value is None else value)]


class ExpertEntry(_Entry):
    """An expert: the model whose MLP layers it is, and prompts that it is to answer."""

    source_model: Reference = Field(
        description="A folder, a hub id, an adapter of the base, or model+adapter."
    )
    positive_prompts: _Prompts = Field(
        default_factory=list, description="Texts that are to be routed to this expert."
    )
    negative_prompts: _Prompts = Field(
        default_factory=list, description="Texts that are to be routed to others."
    )
    noise_scale: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="Normal noise of this standard deviation is added to its weights.",
    )
    residual_scale: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="A factor of its `down_proj`, and so of what it adds.",
    )


class MoeDocument(_Entry):
    """A mixture of experts: the base model, the experts, and how tokens are routed to them."""

    merge_method: Literal["moe"] | None = Field(
        default=None, description="May be there; it says what the file is."
    )
    base_model: Reference = Field(
        description="The model that gives all but the MLP layers, and the tokenizer."
    )
    gate_mode: Literal["hidden", "cheap_embed", "random", "uniform_random"] = Field(
        default="hidden",
        description="What the routers are made of: the base's `hidden` states of the prompts, "
        "layer by layer; their embeddings (`cheap_embed`), the same for all layers; "
        "normal (`random`) or uniform (`uniform_random`) numbers.",
    )
    dtype: DTypeName | None = Field(
        default=None, description="The output's dtype; the base model's own by default."
    )
    experts: list[ExpertEntry] = Field(min_length=1, description="The experts, in order.")
    shared_experts: (
        Annotated[list[ExpertEntry], BeforeValidator(lambda value: value or [])] | None
    ) = Field(default=None, description="Experts that every token goes to.")
    experts_per_token: int = Field(
        default=2, ge=1, description="How many experts a token is routed to."
    )
    architecture: str | None = Field(
        default=None,
        description="The output's architecture: `mixtral`, `qwen`, `qwen3` or `deepseek`. By "
        "default the first of mixtral, deepseek, qwen and qwen3 that holds the models.",
    )
    seed: int = Field(default=0, description="The seed of random routers and of noise.")
    output: Reference | None = Field(default=None, description="The folder to write.")

    def models(self) -> Iterator[tuple[SpecPath, ExpertEntry]]:
        """Yield all experts, the shared ones last, each with its place in the file."""
        for key in _EXPERTS:
            for index, entry in enumerate(getattr(self, key) or ()):
                yield (key, index), entry

    @property
    def shared(self) -> list[ExpertEntry]:
        return self.shared_experts or []


@dataclass(frozen=True, repr=False)
class MoeSpec(MergeSpec):
    """A checked mixture: to what writes it, a merge by `passthrough` of tensors of its models.

    Attributes:
        moe: the file as it was written.
    """

    moe: MoeDocument = field(kw_only=True)

    @property
    def command(self) -> str:
        return "moe"

    @property
    def in_a_line(self) -> str:
        experts = ", ".join(entry.source_model for _, entry in self.moe.models())
        return f"mixture of experts of {experts} onto {self.moe.base_model}"

    @property
    def summary(self) -> str:
        return "The MLP layers of several models side by side, with a router before them."

    def as_dict(self) -> dict[str, Any]:
        return self.moe.model_dump(mode="json", exclude_defaults=True)

    def lasting(self, name: Callable[[str], str]) -> dict[str, Any]:
        """Return the file with its models named otherwise."""
        document = self.as_dict()
        document["base_model"] = name(document["base_model"])
        for key in _EXPERTS:
            for entry in document.get(key) or ():
                entry["source_model"] = name(entry["source_model"])
        return document


def load_moe_spec(spec: str | Path | Mapping[str, Any], *, lenient: bool = False) -> MoeSpec:
    """Read and check a mixture from a YAML file, from a dict, or from an output's manifest.

    Raises:
        SpecError: it cannot be read, or something in it is wrong.
    """
    if isinstance(spec, Mapping):
        return _check(dict(spec), SpecText("spec", lenient=lenient))
    if not isinstance(spec, (str, Path)):
        raise wrong("spec", spec, "a YAML file or a dict")
    path = as_path(spec)
    if repeated := read_repeated(path):
        return replace(_check(repeated.recipe, SpecText(str(path))), repeated=repeated)
    return parse_moe_spec(read_text(path, absent="no such file"), file=str(path), lenient=lenient)


def parse_moe_spec(text: str, *, file: str = "spec", lenient: bool = False) -> MoeSpec:
    """Read and check a mixture from YAML text.

    Raises:
        SpecError: as for load_moe_spec.
    """
    raw, source, duplicates = parse_mapping(text, file=file, expected="experts")
    return _check(raw, replace(source, lenient=lenient), duplicates)


def _check(raw: dict[str, Any], source: SpecText, duplicates: Sequence[SpecError] = ()) -> MoeSpec:
    if "experts" not in raw and ("models" in raw or "slices" in raw):
        raise source.error((), "a merge, without `experts`: run it with `outliermerge run`")
    mistakes = Mistakes(source)
    for duplicate in duplicates:
        mistakes.add(duplicate)
    document, problems = validated(MoeDocument, raw, _STAND_INS)
    for problem in without_consequences(problems):
        mistakes.add(_explained(problem, source))
    if document is None:
        mistakes.refuse()
        raise AssertionError("a document that is not valid has problems")
    if not any(problem["loc"][0] in _EXPERTS for problem in problems):
        mistakes.found += _wrong_together(document, source)
    mistakes.refuse()
    base = ModelSpec(document.base_model, ("base_model",))
    return MoeSpec(
        document=SpecDocument(
            merge_method="passthrough",
            models=[ModelEntry(model=document.base_model)],
            dtype=document.dtype,
            output=document.output,
            seed=document.seed,
        ),
        method=replace(find_method("passthrough"), name="moe"),
        base=base,
        models=tuple(ModelSpec(e.source_model, path) for path, e in document.models()),
        source=source,
        warnings=mistakes.warned(),
        moe=document,
    )


def _explained(problem: Any, source: SpecText) -> SpecError:
    """Return an error for one of pydantic's problems."""
    path: SpecPath = tuple(problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            kind = ExpertEntry if len(path) > 1 else MoeDocument
            said = (
                f"unknown key {quoted(str(path[-1]))}. {suggest(str(path[-1]), kind.model_fields)}"
            )
            return source.error(path, said, at_key=True, passed_over=path)
        case "missing":
            return source.error(path[:-1], f"`{path[-1]}` is missing")
        case _:
            return source.error(path, in_words(problem))


def _wrong_together(document: MoeDocument, source: SpecText) -> Iterator[SpecError]:
    """Yield what is wrong with values that are right by themselves."""
    number, wanted = len(document.experts), document.experts_per_token
    if number < wanted:
        yield source.error(
            ("experts_per_token",), f"found {wanted}, expected at most the {number} expert(s)"
        )
    if document.architecture is not None and document.architecture.lower() not in ARCHITECTURES:
        said = f"unknown architecture {quoted(document.architecture)}. "
        yield source.error(("architecture",), said + suggest(document.architecture, ARCHITECTURES))
    if document.gate_mode in ("random", "uniform_random"):
        return
    for index, entry in enumerate(document.experts):
        if not entry.positive_prompts:
            yield source.error(
                ("experts", index),
                f"`positive_prompts` is missing: the router of gate_mode {document.gate_mode} is "
                "made of them. `gate_mode: random` needs none",
            )
    for index, entry in enumerate(document.shared):
        if entry.negative_prompts and not entry.positive_prompts:
            yield source.error(
                ("shared_experts", index), "has negative_prompts but no positive_prompts"
            )
