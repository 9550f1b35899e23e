"""The keys of a YAML spec: names, types and descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
)

from outliermerge.errors import direct_reference
from outliermerge.spec.quantize import QuantizeField
from outliermerge.spec.rename import MAP_NAMES
from outliermerge.spec.settings import SpecPath
from outliermerge.spec.tokenizer import TokenizerEntry

MISSING = ("error", "base")
EXTRA = ("error", "copy", "drop")
UNEQUAL = ("error", "base")
OTHER_FILES = ("error", "drop")
DTYPE_ABBREVIATIONS = {
    "bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64", "f16": "float16",
    "f32": "float32", "f64": "float64", "half": "float16", "float": "float32", "single": "float32",
    "double": "float64",
}  # fmt: skip
"""What PyTorch and trainers call dtypes besides."""


def dtype_name(value: Any) -> Any:
    """Return the full name of a dtype that is written in one of its usual ways.

    >>> [dtype_name(name) for name in ("bf16", "torch.float16", "FP32", "int8")]
    ['bfloat16', 'float16', 'float32', 'int8']
    """
    if not isinstance(value, str):
        return value
    plain = value.lower().removeprefix("torch.")
    name = DTYPE_ABBREVIATIONS.get(plain, plain)
    return name if name in DTYPE_ABBREVIATIONS.values() else value


DTypeName = Annotated[
    Literal["float16", "bfloat16", "float32", "float64"], BeforeValidator(dtype_name)
]


def by_filters(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the JSON schemas of a setting: a value, an entry with a filter, a list of entries."""
    entry = {
        "type": "object",
        "required": ["value"],
        "additionalProperties": False,
        "properties": {"value": value, "filter": {"type": ["string", "null"], "minLength": 1}},
    }
    return [value, entry, {"type": "array", "items": entry, "minItems": 1}]


def _policy(words: tuple[str, ...]) -> Any:
    return WithJsonSchema({"anyOf": [*by_filters({"enum": list(words)}), {"type": "null"}]})


_RULE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": list(MAP_NAMES)},
        {
            "type": "object",
            "required": ["from", "to"],
            "additionalProperties": False,
            "properties": {"from": {"type": "string", "minLength": 1}, "to": {"type": "string"}},
        },
    ]
}
_RenameField = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [*_RULE_SCHEMA["anyOf"], {"type": "array", "items": _RULE_SCHEMA, "minItems": 1},
                   {"type": "null"}]}
    ),
]  # fmt: skip


_CONVERSION_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["from", "to"],
    "additionalProperties": False,
    "properties": {
        "from": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            ]
        },
        "to": {"type": "string", "minLength": 1},
        "axis": {"type": "integer", "minimum": 0},
        "transpose": {"type": "boolean"},
    },
}
_ConvertField = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [_CONVERSION_SCHEMA,
                   {"type": "array", "items": _CONVERSION_SCHEMA, "minItems": 1},
                   {"type": "null"}]}
    ),
]  # fmt: skip


Reference = Annotated[str, Field(min_length=1), AfterValidator(direct_reference)]
"""The name of a model, or of a path."""


class _SpecEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BaseEntry(_SpecEntry):
    """The base model, as a mapping: needed if it has more keys than its name."""

    model: Reference = Field(
        description="A folder, a file, or a hub id: org/name or org/name@revision."
    )
    rename: _RenameField = Field(
        default=None,
        description="Changes its tensors' names to those of the merge: a built-in map, a rule with "
        "`from` (a regular expression) and `to`, or a list of these.",
    )


class ModelEntry(BaseEntry):
    """A model to merge: also base+adapter, or a PEFT adapter for the base model."""

    missing: Annotated[Any, _policy(MISSING)] = Field(
        default=None, description="Like the top-level `missing`, for this model; it replaces that."
    )
    extra: Annotated[Any, _policy(EXTRA)] = Field(
        default=None, description="Like the top-level `extra`, for this model; it replaces that."
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Parameters of this model; they replace the global ones."
    )
    auxiliary: dict[str, Reference] = Field(
        default_factory=dict,
        description="Further tensors of this model for the method, by their name in the method: "
        "a folder or file whose tensors have the model's names and shapes.",
    )
    statistics: Reference | None = Field(
        default=None,
        description="A folder that `outliermerge measure` has written for this model, for methods "
        "that take statistics of data.",
    )


_Layer = Annotated[int, Field(strict=True)]


class SourceEntry(_SpecEntry):
    """Layers of a model."""

    model: Reference = Field(description="As under `models`.")
    layer_range: Annotated[list[_Layer], Field(min_length=2, max_length=2)] = Field(
        description="[a, b] takes the layers a to b - 1, counted from 0."
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Parameters of this model in this slice; they replace those of the slice.",
    )


class SliceEntry(_SpecEntry):
    """The next layers of the output: the same number of layers of every source, merged."""

    sources: list[SourceEntry] = Field(
        min_length=1, description="The models and their layers, in order."
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Parameters of the method in this slice; they replace the global ones.",
    )


class ModifierEntry(_SpecEntry):
    """A modifier: it changes the merged task vector before the base is added."""

    modifier: str = Field(min_length=1, description="lines, svc, or package.module:function.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Its parameters.")


_NAME_SCHEMA = {"type": "string", "minLength": 1}


class _NameOrEntry:
    """The JSON schema of a value that may be only a name."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Any:
        return {"anyOf": [_NAME_SCHEMA, handler(core)]}


_Base = Annotated[
    BaseEntry,
    _NameOrEntry(),
    BeforeValidator(lambda value: {"model": value} if isinstance(value, str) else value),
    PlainSerializer(
        lambda entry: entry.model if entry.rename is None else entry.model_dump(exclude_none=True)
    ),
]


class SpecDocument(_SpecEntry):
    """A merge: the method, the base model, the models, and how the output is stored."""

    merge_method: str = Field(
        description="A name from `outliermerge methods`, or package.module:function."
    )
    base_model: _Base | None = Field(
        default=None,
        description="The model that the task models were fine-tuned from: its name, or a mapping "
        "with `model` and `rename`.",
    )
    models: list[ModelEntry] = Field(min_length=1, description="The models to merge, in order.")
    slices: list[SliceEntry] = Field(
        default_factory=list,
        description="Instead of `models`: the layers of the output, slice by slice.",
    )
    stack: str | None = Field(
        default=None,
        min_length=1,
        description="With `slices`, in models with several stacks of layers: the one that is "
        "sliced, such as `text`, `vision`, `encoder`, `decoder`, or the start of its tensors' "
        "names. The others are those of the first slice.",
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Parameters of the method, for all models."
    )
    modifiers: list[ModifierEntry] = Field(
        default_factory=list,
        description="Modifiers of the merged task vector, applied in this order.",
    )
    seed: int = Field(default=0, description="The seed of methods that draw random numbers.")
    dtype: DTypeName | None = Field(
        default=None,
        description="The output's dtype, unless out_dtype says otherwise. Arithmetic is in "
        "float32, or in float64 with `dtype: float64`.",
    )
    out_dtype: DTypeName | None = Field(
        default=None, description="The output's dtype; the base model's own by default."
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest",
        description="How bfloat16 and float16 outputs are rounded: `nearest` (default), or "
        "`stochastic`: up or down at random, so that the mean over seeds is the exact value.",
    )
    format: Literal["safetensors", "gguf"] = Field(
        default="safetensors",
        description="What the weights are written as: `safetensors` (default), or `gguf`: one file "
        "for llama.cpp, of models like Llama and Qwen, and of others by llama.cpp's own converter.",
    )
    quantize: QuantizeField | None = Field(
        default=None,
        description="Quantises the output's weights: `fp8`, `int8`, `mxfp4` or `as-base`, or a "
        "mapping with `to`, `per`, `quant_method` and `ignore`; with `format: gguf` it is `q8_0`.",
    )
    rename: _RenameField = Field(
        default=None, description="Changes the names of the merge to those of the output."
    )
    convert: _ConvertField = Field(
        default=None,
        description="Tensors that one model has apart and another together, a rule or a list of "
        "rules: `from` (parts of names, in order; `*` is a number), `to` (what takes their place), "
        "`axis` (along which they lie side by side, after those of all numbers are stacked), "
        "`transpose` (the last two axes are swapped). Rules hold in both directions. What "
        "transformers converts itself needs none.",
    )
    layout: Reference | None = Field(
        default=None,
        description="The model whose names and forms of tensors the output has, or `transformers`: "
        "those that its class has in memory. By default the base model's.",
    )
    missing: Annotated[Any, _policy(MISSING)] = Field(
        default=None,
        description="A tensor that a model lacks: `error` (default), or `base`: its task "
        "vector is zero there. A method that counts models counts those that have it, but all if "
        "it measures whole models. One word, or a list of filters.",
    )
    extra: Annotated[Any, _policy(EXTRA)] = Field(
        default=None,
        description="A tensor that the base model lacks: `error` (default), `copy` (all models "
        "that have it must agree), or `drop`. One word, or a list of filters.",
    )
    unequal: Annotated[Any, _policy(UNEQUAL)] = Field(
        default=None,
        description="An integer, bool or complex tensor that differs between the models: `error` "
        "(default), or `base`: the base model's is taken. One word, or a list of filters.",
    )
    other_files: Annotated[Any, _policy(OTHER_FILES)] = Field(
        default=None,
        description="A file of tensors in a model's folder that is not read, such as a value "
        "head's: `error` (default), or `drop`: it is left out. One word, or a list of filters "
        "on file names.",
    )
    vocabulary: Literal["error", "base", "common", "union"] | None = Field(
        default=None,
        description="Rows of embeddings and head that differ: `error` (default); `base` keeps the "
        "base model's rows, `common` those that all models have, `union` those that any has. "
        "Reserved rows are kept.",
    )
    tokenizer: TokenizerEntry | None = Field(
        default=None,
        description="The output's tokenizer, as in mergekit: embeddings and head get a row for "
        "each of its tokens. A mapping with `source`, `tokens` and `pad_to_multiple_of`.",
    )
    tie_word_embeddings: bool | None = Field(
        default=None,
        description="Whether the output's head is tied to its embeddings: `true` ties it, `false` "
        "gives it its own head, and changes its config to match. By default as in the config.",
    )
    config_source: Reference | None = Field(
        default=None,
        description="The model whose config is used; default `base`.",
    )
    tokenizer_source: Reference | None = Field(
        default=None,
        description="Short for `tokenizer: {source: …}`. With `vocabulary` it only says whose "
        "tokenizer and chat template are taken; default `base`.",
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="The output's chat template: `auto` (the one that most models have), the name "
        "of a format such as `chatml`, or Jinja. By default that of the tokenizer.",
    )
    processor_source: Reference | None = Field(
        default=None,
        description="The model whose image processor is used; default `base`.",
    )
    stages: list[dict[str, Any]] = Field(
        default_factory=list,
        description="Merges that come before this one, each with a `name`, by which `models` and "
        "`base_model` of the others use it. Nothing of them is stored.",
    )
    modules: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Instead of `models`: merges of parts of the base model, by the parts' names "
        "(`text`, `vision`, `projector`, `encoder`, `decoder`, …, or the start of their tensors' "
        "names). What no module merges is the base model's.",
    )
    output: Reference | None = Field(
        default=None,
        description="The folder to write, or a .safetensors file where the base model is a file; "
        "an output that is given to the run replaces it.",
    )

    def without(self, paths: Sequence[SpecPath]) -> SpecDocument:
        """Return the document without what has no effect."""
        if not paths:
            return self
        raw = self.model_dump(exclude_defaults=True)
        for path in sorted(paths, key=_by_place, reverse=True):  # the last of a list first
            *parents, last = path
            holders: list[Any] = [raw]
            try:
                for key in parents:
                    holders.append(holders[-1][key])
                del holders[-1][last]
            except (LookupError, TypeError):  # it has been left out before
                continue
            if holders[-1] == []:
                del holders[-2][parents[-1]]
        return type(self).model_validate(raw)


def references(document: Mapping[str, Any]) -> list[str]:
    """Return the models to merge, as a spec's document names them, each once.

    >>> references({"models": [{"model": "a"}]})
    ['a']
    >>> sources = [{"model": "a", "layer_range": [0, 2]}]
    >>> references({"slices": [{"sources": sources}, {"sources": sources}]})
    ['a']
    """
    sources = (source for one in document.get("slices", ()) for source in one["sources"])
    return list(dict.fromkeys(entry["model"] for entry in (*document.get("models", ()), *sources)))


class SlicedDocument(SpecDocument):
    """A merge that has `slices` instead of `models`."""

    models: list[ModelEntry] = Field(default_factory=list, max_length=0)
    slices: list[SliceEntry] = Field(min_length=1)


def _by_place(path: SpecPath) -> list[str]:
    return [str(part).zfill(6) for part in path]
