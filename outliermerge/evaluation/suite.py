"""A suite: a YAML file that lists tasks of lmms-eval and their settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from outliermerge.errors import OutlierMergeError, SpecError, as_path, quoted, suggest
from outliermerge.evaluation.formats import MAX_NAME
from outliermerge.evaluation.model_types import MODEL_TYPES
from outliermerge.spec.settings import SpecPath
from outliermerge.spec.text import SpecText, parse_yaml, read_text

_Text = Annotated[str, Field(min_length=1, max_length=4096)]
_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
_Count = Annotated[int, Field(ge=1, le=10**9)]
# Settings that lmms-eval's model types read; they silently ignore all others.
GENERATION = ("do_sample", "max_new_tokens", "num_beams", "temperature", "top_p", "until")
RESERVED = ("avg", "gain")


class _SuiteEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class SuiteTask(_SuiteEntry):
    """One column of the table."""

    title: _Name = Field(description="the column's title")
    task: _Name = Field(description="lmms-eval's name of the task")
    metric: _Name = Field(description='the key of its score: "metric,filter"')
    scale: Literal[1, 100] = Field(100, description="what makes the metric 0–100")
    limit: _Count | None = Field(None, description="questions asked; all of them by default")
    generation: dict[str, Any] = Field({}, description="generation settings, over the task's own")


class SuiteDocument(_SuiteEntry):
    """The keys of a suite."""

    tasks: list[SuiteTask] = Field(min_length=1)
    tasks_folder: _Text | None = Field(None, description="tasks of our own, beside lmms-eval's")
    data: _Text | None = Field(
        None, description="a folder with data sets under their hub ids, which win over the hub"
    )
    model_type: Literal["llava_hf", "qwen2_5_vl", "vllm"] = "llava_hf"
    model_args: dict[str, Any] = Field({}, description="for the model type, besides ours")
    device: _Text = Field("auto", description="cpu, cuda, cuda:N, or auto")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    load_in_8bit: bool = False
    batch_size: _Count = 1
    limit: _Count | None = Field(None, description="questions a task, where it says nothing")
    generation: dict[str, Any] = Field({}, description="for all tasks; a task's own win")
    judge: bool = Field(False, description="some task asks a language model whether answers fit")


@dataclass(frozen=True)
class Suite:
    """A suite that has been checked.

    Attributes:
        name: the name of its file.
        tasks_folder, data: absolute paths of existing folders.
    """

    name: str
    document: SuiteDocument
    tasks_folder: Path | None
    data: Path | None

    def limit_of(self, task: SuiteTask) -> int | None:
        """Return how many questions of a task are asked; None for all."""
        return task.limit or self.document.limit

    def generation_of(self, task: SuiteTask) -> dict[str, Any]:
        """Return the generation settings that replace those of the task's own file."""
        return {**self.document.generation, **task.generation}


def load_suite(path: str | Path, **overrides: Any) -> Suite:
    """Read and check a suite; `overrides` replace its keys where they are not None.

    Paths in a suite are relative to its file; paths in overrides are relative to the working
    directory.

    Raises:
        SpecError: the suite cannot be read, or something in it is unknown, has a wrong type or is
            out of range. The message starts with file, line and column.
    """
    file = Path(path)
    text = read_text(file, absent="no such suite. The project's own are in evals/")
    raw, source = parse_yaml(text, file=str(file))
    if not isinstance(raw, dict):
        raise source.error((), "expected a mapping with `tasks`")
    _check_texts(raw, (), source)
    given = {key: value for key, value in overrides.items() if value is not None}
    sources = dict.fromkeys(given, SpecText("command line"))
    document = _over(_validate(raw, source), given)
    _check(document, lambda key: sources.get(key, source))
    folders: dict[str, Path | None] = {}
    for key in ("tasks_folder", "data"):
        named = getattr(document, key)
        place = Path.cwd() if key in given else file.parent
        try:
            folders[key] = (place / as_path(named)).absolute() if named else None
        except OutlierMergeError as error:
            raise sources.get(key, source).error((key,), str(error)) from error
        if (found := folders[key]) is not None and not found.is_dir():
            raise sources.get(key, source).error((key,), f"no such folder: {found}")
    return Suite(file.stem, document, folders["tasks_folder"], folders["data"])


def _check_texts(value: object, path: SpecPath, source: SpecText) -> None:
    """Refuse lone surrogates, which YAML can escape but no file or terminal accepts."""
    if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
        raise source.error(path, f"found {quoted(value)}, which has half of a sign")
    entries = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else entries:
        _check_texts(key, path, source)
        _check_texts(inner, (*path, key), source)


def _over(document: SuiteDocument, given: Mapping[str, Any]) -> SuiteDocument:
    """Return a suite with the command's settings, which also replace those of single tasks."""
    limit, generation = given.get("limit"), given.get("generation", {})
    tasks = [
        task.model_copy(
            update={"limit": limit or task.limit, "generation": {**task.generation, **generation}}
        )
        for task in document.tasks
    ]
    merged = {**given, "generation": {**document.generation, **generation}}
    plain = {**document.model_dump(), **merged, "tasks": [task.model_dump() for task in tasks]}
    return _validate(plain, SpecText("command line"))


def _validate(raw: Mapping[str, Any], source: SpecText) -> SuiteDocument:
    try:
        return SuiteDocument.model_validate(raw)
    except ValidationError as error:
        raise SpecError(
            "\n".join(str(_explain(problem, source)) for problem in error.errors())
        ) from error


def _explain(problem: Any, source: SpecText) -> SpecError:
    path = tuple(problem["loc"])
    if problem["type"] == "extra_forbidden":
        fields = (SuiteTask if len(path) > 1 else SuiteDocument).model_fields
        name = str(path[-1])
        return source.error(
            path, f"unknown key {quoted(name)}. {suggest(name, fields)}", at_key=True
        )
    if problem["type"] == "missing":
        return source.error(path[:-1], f"`{path[-1]}` is missing")
    return source.error(path, f"found {quoted(problem['input'])}: {problem['msg']}")


def _check(document: SuiteDocument, source_of: Callable[[str], SpecText]) -> None:
    tasks = source_of("tasks")
    first: dict[tuple[str, str], int] = {}
    for index, task in enumerate(document.tasks):
        if task.title in RESERVED:
            raise tasks.error(
                ("tasks", index, "title"), f"{quoted(task.title)} is a column that the table adds"
            )
        for key in ("title", "task"):
            earlier = first.setdefault((key, getattr(task, key)), index)
            if earlier != index:
                raise tasks.error(
                    ("tasks", index, key),
                    f"{quoted(getattr(task, key))} stands twice, first in tasks[{earlier}]",
                )
        _check_settings(task.generation, GENERATION, ("tasks", index, "generation"), tasks)
    _check_settings(document.generation, GENERATION, ("generation",), source_of("generation"))
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", document.device):
        raise source_of("device").error(
            ("device",), f"found {quoted(document.device)}, expected cpu, cuda, cuda:N or auto"
        )
    _check_settings(document.model_args, None, ("model_args",), source_of("model_args"))
    kind = MODEL_TYPES[document.model_type]
    if document.load_in_8bit and kind.model_8bit is None:
        raise source_of("load_in_8bit").error(
            ("load_in_8bit",), f"{document.model_type} cannot load in 8 bit here"
        )
    if document.dtype != "auto" and not kind.takes_dtype:
        raise source_of("dtype").error(
            ("dtype",), f"{document.model_type} takes the checkpoint's dtype: leave it at auto"
        )
    if document.batch_size > 1 and kind.one_at_a_time:
        raise source_of("batch_size").error(
            ("batch_size",), f"{document.model_type} takes one question at a time"
        )
    for name in document.model_args:
        if name in (kind.path_argument, "device", "device_map", "dtype", "batch_size"):
            raise source_of("model_args").error(
                ("model_args", name), f"{quoted(name)} is set by the command", at_key=True
            )


def _check_settings(
    settings: Mapping[str, Any], known: Collection[str] | None, path: SpecPath, source: SpecText
) -> None:
    for name, value in settings.items():
        if known is not None and name not in known:
            raise source.error(
                (*path, name), f"no generation setting {quoted(name)}. {suggest(name, known)}",
                at_key=True,
            )  # fmt: skip
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise source.error(
                (*path, name), f"found {quoted(value)}, expected plain values"
            ) from error
