"""The YAML spec: mergekit's vocabulary, read strictly. The only place where YAML is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from outliermerge.errors import OutlierMergeError, SpecError, as_path, suggest
from outliermerge.method import MergeMethod
from outliermerge.methods import find_method
from outliermerge.settings import Setting, SettingError, SpecPath, parse_setting

_NOT_YET = {
    "slices": "give whole `models`",
    "modules": "give whole `models`",
    "tokenizer": "the tokenizer is copied byte for byte from the base model",
    "chat_template": "the chat template is copied byte for byte from the base model",
}
_DTypeName = Annotated[
    Literal["float16", "bfloat16", "float32", "float64"],
    BeforeValidator(lambda v: v.removeprefix("torch.") if isinstance(v, str) else v),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelEntry(_Strict):
    """A model to merge."""

    model: str = Field(
        min_length=1, description="A folder, or a hub id: org/name or org/name@revision."
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Parameters of this model; they win over the global ones."
    )


class SpecDocument(_Strict):
    """A merge: the method, the base model, the models, and how the output is stored."""

    merge_method: str = Field(
        description="A name from `outliermerge methods`, or package.module:function."
    )
    base_model: str | None = Field(
        default=None,
        min_length=1,
        description="The model that the task models were fine-tuned from.",
    )
    models: list[ModelEntry] = Field(min_length=1, description="The models to merge, in order.")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Parameters of the method, for all models."
    )
    dtype: _DTypeName | None = Field(
        default=None,
        description="The output's dtype, unless out_dtype says otherwise. Arithmetic is in "
        "float32, or in float64 with `dtype: float64`.",
    )
    out_dtype: _DTypeName | None = Field(
        default=None, description="The output's dtype; the base model's own by default."
    )
    tokenizer_source: Literal["base"] | None = Field(
        default=None, description="Only `base`: its tokenizer files are copied byte for byte."
    )
    output: str | None = Field(
        default=None, min_length=1, description="The folder to write; --output wins over it."
    )
    missing: Literal["error", "base"] = Field(
        default="error",
        description="A tensor that a model lacks: stop, or take the model as unchanged there.",
    )
    extra: Literal["error", "copy", "drop"] = Field(
        default="error",
        description="A tensor that the base model lacks: stop, copy it (all models that have it "
        "must agree), or leave it out.",
    )


@dataclass(frozen=True)
class Source:
    """Where a spec is from, to point at its lines."""

    file: str
    keys: Mapping[SpecPath, tuple[int, int]] = field(default_factory=dict)
    values: Mapping[SpecPath, tuple[int, int]] = field(default_factory=dict)

    def error(self, path: SpecPath, message: str, *, at_key: bool = False) -> SpecError:
        """Return an error that starts with file, line, column and the key's path."""
        marks = self.keys if at_key else self.values
        place = self.file
        for end in range(len(path), -1, -1):
            if mark := marks.get(path[:end]) or self.keys.get(path[:end]):
                place = f"{self.file}:{mark[0]}:{mark[1]}"
                break
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
        return SpecError(f"{place}: {name.lstrip('.') + ': ' if name else ''}{message}")


@dataclass(frozen=True)
class ModelSpec:
    """A model of a spec with its parameters' settings."""

    reference: str
    settings: Mapping[str, Setting]
    path: SpecPath


@dataclass(frozen=True)
class MergeSpec:
    """A spec that has been checked.

    Attributes:
        document: the spec as written.
        method: the merge method.
        models: what is merged, in order; without the base for methods on task vectors.
        settings: global parameter settings.
        source: where it is from.
    """

    document: SpecDocument
    method: MergeMethod
    models: tuple[ModelSpec, ...]
    settings: Mapping[str, Setting]
    source: Source

    def as_dict(self) -> dict[str, Any]:
        """Return the spec as JSON values, without what it leaves at its default."""
        return self.document.model_dump(mode="json", exclude_defaults=True)

    def as_yaml(self) -> str:
        """Return the spec as YAML."""
        document = self.as_dict()
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        if yaml.safe_load(text) == document:
            return text
        return yaml.safe_dump(document, sort_keys=False)  # some line breaks need escapes


def load_spec(spec: str | Path | Mapping[str, Any]) -> MergeSpec:
    """Read and check a spec from a YAML file or from a dict.

    Raises:
        SpecError: it cannot be read, or anything in it is unknown, of a wrong type or out of
            range; the message starts with file, line and column.
    """
    if isinstance(spec, Mapping):
        return _check(dict(spec), Source("spec"))
    path = Path(spec)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise SpecError(f"{path}: no such spec file") from error
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    return parse_spec(text, file=str(path))


def parse_spec(text: str, *, file: str = "spec") -> MergeSpec:
    """Read and check a spec from YAML text.

    Raises:
        SpecError: as for load_spec.
    """
    keys: dict[SpecPath, tuple[int, int]] = {}
    values: dict[SpecPath, tuple[int, int]] = {}
    _check_characters(text, file)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _record_marks(node, (), keys, values, file, parents=())
        raw = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        problem = error.problem or error.context or "cannot be read"
        if problem.startswith("but ") and error.context:
            problem = f"{error.context} {problem}"
        raise SpecError(f"{place}: not valid YAML: {problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{file}: not valid YAML: {error}") from error
    source = Source(file, keys, values)
    if not isinstance(raw, dict):
        raise source.error((), f"found {_describe(raw)}, expected a mapping with `merge_method`")
    return _check(raw, source)


class _Loader(yaml.SafeLoader):
    """Gives values that Python refuses, such as the date 2024-13-45, their place."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise yaml.constructor.ConstructorError(
                None, None, str(error), node.start_mark
            ) from error


def _check_characters(text: str, file: str) -> None:
    if match := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, match.start()) + 1
        column = match.start() - text.rfind("\n", 0, match.start())
        raise SpecError(f"{file}:{line}:{column}: not valid YAML: the character {match[0]!r}")


def _record_marks(
    node: Any,
    path: SpecPath,
    keys: dict[SpecPath, tuple[int, int]],
    values: dict[SpecPath, tuple[int, int]],
    file: str,
    parents: tuple[int, ...],
) -> None:
    if node is None:
        return
    if id(node) in parents:
        mark = node.start_mark
        raise SpecError(
            f"{file}:{mark.line + 1}:{mark.column + 1}: not valid YAML: it contains itself"
        )
    parents = (*parents, id(node))
    values[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            mark = (key.start_mark.line + 1, key.start_mark.column + 1)
            if key.tag != "tag:yaml.org,2002:merge":
                if key.tag != "tag:yaml.org,2002:str":
                    raise SpecError(
                        f"{file}:{mark[0]}:{mark[1]}: found a key that is not a text. "
                        "Put it in quotes if it is meant."
                    )
                if (*path, key.value) in keys:
                    raise SpecError(
                        f"{file}:{mark[0]}:{mark[1]}: the key {key.value!r} stands twice, "
                        f"first in line {keys[(*path, key.value)][0]}"
                    )
                keys[(*path, key.value)] = mark
                _record_marks(value, (*path, key.value), keys, values, file, parents)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _record_marks(item, (*path, index), keys, values, file, parents)


def _check(raw: dict[str, Any], source: Source) -> MergeSpec:
    for key in raw:
        if key in _NOT_YET:
            raise source.error(
                (key,), f"a mergekit key that is not supported: {_NOT_YET[key]}", at_key=True
            )
    try:
        document = SpecDocument.model_validate(raw)
    except ValidationError as error:
        messages = [str(_explain(problem, raw, source)) for problem in error.errors()]
        raise SpecError("\n".join(messages)) from error
    try:
        method = find_method(document.merge_method)
    except SpecError as error:
        raise source.error(("merge_method",), str(error)) from error
    if method.space == "delta" and document.base_model is None:
        raise source.error(
            (), f"`base_model` is missing: {method.name} works on differences from a base model"
        )
    settings = _settings(document.parameters, method, ("parameters",), source, of_model=False)
    models = _models(document, method, source)
    return MergeSpec(document, method, models, settings, source)


def _models(document: SpecDocument, method: MergeMethod, source: Source) -> tuple[ModelSpec, ...]:
    models: list[ModelSpec] = []
    if document.base_model is not None:
        try:
            _identity(document.base_model)
        except OutlierMergeError as error:
            raise source.error(("base_model",), str(error)) from error
    first_place: dict[str, int] = {}
    for index, entry in enumerate(document.models):
        path: SpecPath = ("models", index)
        try:
            identity = _identity(entry.model)
        except OutlierMergeError as error:
            raise source.error((*path, "model"), str(error)) from error
        if identity in first_place:
            raise source.error(
                (*path, "model"),
                f"{entry.model!r} stands twice, first as models[{first_place[identity]}]",
            )
        first_place[identity] = index
        is_base = document.base_model is not None and identity == _identity(document.base_model)
        if is_base and method.space == "delta":
            if entry.parameters:
                raise source.error(
                    (*path, "parameters"),
                    f"{entry.model!r} is the base model: it has no task vector, "
                    "so its parameters have no effect. Remove them.",
                    at_key=True,
                )
            continue
        path_of_settings = (*path, "parameters")
        settings = _settings(entry.parameters, method, path_of_settings, source, of_model=True)
        models.append(ModelSpec(entry.model, settings, path))
    most = method.max_models
    if len(models) < method.min_models or (most is not None and len(models) > most):
        wanted = str(method.min_models) if most == method.min_models else (
            f"{method.min_models} to {most}" if most is not None else
            f"at least {method.min_models}"
        )  # fmt: skip
        besides = " besides the base model" if method.space == "delta" else ""
        raise source.error(
            ("models",), f"{method.name} takes {wanted} model(s){besides}, found {len(models)}"
        )
    return tuple(models)


def _identity(reference: str) -> str:
    path = as_path(reference)
    return str(path.resolve()) if path.exists() else reference


def _settings(
    raw: Mapping[str, Any],
    method: MergeMethod,
    path: SpecPath,
    source: Source,
    *,
    of_model: bool,
) -> dict[str, Setting]:
    settings = {}
    for name, value in raw.items():
        parameter = method.parameters.get(name)
        if parameter is None:
            known = [p.name for p in method.parameters.values() if p.per_model or not of_model]
            raise source.error(
                (*path, name),
                f"{method.name} has no parameter {name!r}. {suggest(name, known)}",
                at_key=True,
            )
        if of_model and not parameter.per_model:
            raise source.error(
                (*path, name),
                f"{name!r} is of the whole merge, not of one model: "
                "move it to the top-level `parameters`",
                at_key=True,
            )
        try:
            settings[name] = parse_setting(value, parameter, (*path, name))
        except SettingError as error:
            raise source.error(error.path, str(error), at_key=error.at_key) from error
    return settings


def _describe(value: object) -> str:
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value), repr(value))


def _explain(problem: Any, raw: dict[str, Any], source: Source) -> SpecError:
    path: SpecPath = tuple(problem["loc"])
    found = _describe(problem["input"])
    match problem["type"]:
        case "extra_forbidden":
            in_model = path[0] == "models"
            fields = ModelEntry.model_fields if in_model else SpecDocument.model_fields
            name = str(path[-1])
            advice = suggest(name, fields)
            try:
                method = find_method(str(raw.get("merge_method")))
            except SpecError:
                method = None
            if method is not None and name in method.parameters:
                advice = f"It is a parameter of {method.name}: put it under `parameters`."
            return source.error(path, f"unknown key {name!r}. {advice}", at_key=True)
        case "missing":
            return source.error(path[:-1], f"`{path[-1]}` is missing")
        case "literal_error":
            return source.error(path, f"found {found}, expected {problem['ctx']['expected']}")
        case "too_short" | "string_too_short":
            return source.error(path, "must not be empty")
        case "string_type":
            return source.error(path, f"found {found}, expected a text")
        case "list_type":
            return source.error(path, f"found {found}, expected a list")
        case "dict_type" | "model_type" | "model_attributes_type":
            return source.error(path, f"found {found}, expected a mapping")
        case _:
            return source.error(path, f"found {found}: {problem['msg']}")
