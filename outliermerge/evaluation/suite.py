"""A suite: a YAML file that lists tasks of a harness and their settings."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from outliermerge.errors import OutlierMergeError, as_path, quoted, suggest
from outliermerge.evaluation.formats import MAX_NAME
from outliermerge.evaluation.model_types import HARNESSES, Harness, HarnessName, ModelType
from outliermerge.spec.document import dtype_name
from outliermerge.spec.settings import SettingError, SpecPath
from outliermerge.spec.text import Mistakes, SpecText, parse_mapping, read_text
from outliermerge.spec.validation import (
    how_to_write,
    in_words,
    validated,
    without_consequences,
)

_Text = Annotated[str, Field(min_length=1, max_length=4096)]
_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
_Count = Annotated[int, Field(ge=1, le=10**9)]
_Shots = Annotated[int, Field(ge=0, le=10_000)]
RESERVED = ("avg", "gain")
# What stands for a required value that is wrong, so that the rest of the suite can be checked.
_STAND_IN = "?"
_STAND_INS = {"title": _STAND_IN, "task": _STAND_IN, "metric": _STAND_IN}
# Metrics of texts' likelihoods. They are no shares of 100.
_LIKELIHOODS = ("bits_per_byte", "byte_perplexity", "perplexity", "word_perplexity")

# Generation settings that are numbers of something.
_COUNTS = ("max_gen_toks", "max_new_tokens", "num_beams")


class _SuiteEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class SuiteTask(_SuiteEntry):
    """One column of the table."""

    title: _Name = Field(description="the column's title")
    task: _Name = Field(description="the harness's name of the task")
    metric: _Name = Field(description='the key of its score: "metric,filter"')
    scale: Literal[1, 100] = Field(100, description="what makes the metric 0–100")
    limit: _Count | None = Field(None, description="questions asked; all of them by default")
    generation: dict[str, Any] = Field({}, description="generation settings, over the task's own")
    num_fewshot: _Shots | None = Field(
        None, description="questions with their answers before each; lm_eval only"
    )


class SuiteDocument(_SuiteEntry):
    """The keys of a suite."""

    harness: HarnessName = Field("lmms_eval", description="lm_eval for models of text alone")
    tasks: list[SuiteTask] = Field(min_length=1)
    tasks_folder: _Text | None = Field(None, description="tasks of our own, beside the harness's")
    data: _Text | None = Field(
        None, description="a folder with data sets under their hub ids, which win over the hub"
    )
    model_type: _Text | None = Field(
        None, description="the harness's class for models: llava_hf or hf where none is named"
    )
    model_args: dict[str, Any] = Field({}, description="for the model type, besides ours")
    device: _Text = Field("auto", description="cpu, cuda, cuda:N, or auto")
    dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float32"], BeforeValidator(dtype_name)
    ] = "auto"
    load_in_8bit: bool = False
    batch_size: _Count = 1
    limit: _Count | None = Field(None, description="questions a task, where it says nothing")
    generation: dict[str, Any] = Field({}, description="for all tasks; a task's own win")
    judge: bool = Field(False, description="some task asks a language model whether answers fit")
    num_fewshot: _Shots | None = Field(None, description="for tasks without their own")
    apply_chat_template: bool = Field(False, description="ask in the model's chat format")
    system_instruction: _Text | None = Field(None, description="a text before all questions")
    fewshot_as_multiturn: bool = Field(True, description="examples are turns of the chat")
    confirm_run_unsafe_code: bool = Field(
        False, description="tasks may run the code that a model writes"
    )


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

    @property
    def harness(self) -> Harness:
        """The harness that asks its questions."""
        return HARNESSES[self.document.harness]

    @property
    def model_type(self) -> str:
        """The harness's name of the class that loads the models."""
        return _model_type(self.document)

    @property
    def kind(self) -> ModelType:
        """The arguments of the model type."""
        return self.harness.model_types[self.model_type]

    def limit_of(self, task: SuiteTask) -> int | None:
        """Return how many questions of a task are asked; None for all."""
        return task.limit or self.document.limit

    def generation_of(self, task: SuiteTask) -> dict[str, Any]:
        """Return the generation settings that replace those of the task's own file."""
        return {**self.document.generation, **task.generation}

    def shots_of(self, task: SuiteTask) -> int | None:
        """Return the number of examples before each question; None for the task's own."""
        return self.document.num_fewshot if task.num_fewshot is None else task.num_fewshot


def _model_type(document: SuiteDocument) -> str:
    return document.model_type or next(iter(HARNESSES[document.harness].model_types))


def load_suite(path: str | Path, **overrides: Any) -> Suite:
    """Read and check a suite; `overrides` replace its keys where they are not None.

    Paths in a suite are relative to its file; paths in overrides are relative to the working
    directory.

    Raises:
        SpecError: the suite cannot be read, or something in it is unknown, has a wrong type or is
            out of range. Each line of the message starts with file, line and column.
    """
    file = Path(path)
    text = read_text(file, absent="no such suite. The project's own are in evals/")
    raw, source, duplicates = parse_mapping(text, file=str(file), expected="tasks")
    mistakes = Mistakes(source)
    mistakes.found += duplicates
    mistakes.attempt(partial(_check_texts, raw, ()), None)
    given = {key: value for key, value in overrides.items() if value is not None}
    sources = dict.fromkeys(given, SpecText("command line"))
    document = _validated(raw, mistakes)
    if document is not None:
        over = Mistakes(SpecText("command line"))
        document = _over(document, given, over) or document
        mistakes.found += over.found
        own = given.get("generation", {})  # told once, not of each task
        for error in _wrong(document, is_whole=not mistakes.found, but=own):
            said = sources.get(str(error.path[0]), source)
            mistakes.found.append(said.error(error.path, str(error), at_key=error.at_key))
    folders: dict[str, Path | None] = {}
    for key in ("tasks_folder", "data") if document is not None else ():
        place = Path.cwd() if key in given else file.parent
        try:
            folders[key] = _folder(getattr(document, key), place)
        except OutlierMergeError as error:
            mistakes.found.append(sources.get(key, source).error((key,), str(error)))
    mistakes.refuse()
    assert document is not None
    return Suite(file.stem, document, folders["tasks_folder"], folders["data"])


def _folder(named: str | None, place: Path) -> Path | None:
    if named is None:
        return None
    folder = (place / as_path(named)).absolute()
    if not folder.is_dir():
        raise OutlierMergeError(f"no such folder: {folder}")
    return folder


def _check_texts(value: object, path: SpecPath) -> None:
    """Refuse lone surrogates, which YAML can escape but no file or terminal accepts."""
    if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
        raise SettingError(path, f"found {quoted(value)}, which has half of a sign")
    entries = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else entries:
        _check_texts(key, path)
        _check_texts(inner, (*path, key))


def _over(
    document: SuiteDocument, given: Mapping[str, Any], mistakes: Mistakes
) -> SuiteDocument | None:
    """Return a suite with the command's settings, which also replace those of single tasks."""
    generation = given.get("generation", {})
    of_all = {key: given[key] for key in ("limit", "num_fewshot") if key in given}
    tasks = [
        task.model_copy(update={**of_all, "generation": {**task.generation, **generation}})
        for task in document.tasks
    ]
    merged = {**given, "generation": {**document.generation, **generation}}
    plain = {**document.model_dump(), **merged, "tasks": [task.model_dump() for task in tasks]}
    return _validated(plain, mistakes)


def _validated(raw: Mapping[str, Any], mistakes: Mistakes) -> SuiteDocument | None:
    document, problems = validated(SuiteDocument, raw, _STAND_INS)
    for problem in without_consequences(problems):
        path = tuple(problem["loc"])
        if problem["type"] == "extra_forbidden":
            fields = (SuiteTask if len(path) > 1 else SuiteDocument).model_fields
            name = str(path[-1])
            said = f"unknown key {quoted(name)}. {suggest(name, fields)}"
            error = mistakes.source.error(path, said, at_key=True)
        elif problem["type"] == "missing":
            error = mistakes.source.error(path[:-1], f"`{path[-1]}` is missing")
        else:
            error = mistakes.source.error(path, in_words(problem) + how_to_write(problem))
        mistakes.found.append(error)
    return document


def _wrong(
    document: SuiteDocument, *, is_whole: bool, but: Collection[str] = ()
) -> Iterator[SettingError]:
    """Yield what is wrong beyond the types of single values.

    Args:
        is_whole: nothing has been left out of it, so that its model type can be the cause.
        but: generation settings of tasks that are passed over.
    """
    harness = HARNESSES[document.harness]
    kind = harness.model_types.get(_model_type(document), ModelType())
    known = [name for name in harness.generation if name not in kind.ignores]
    first: dict[tuple[str, str], int] = {}
    for index, task in enumerate(document.tasks):
        if task.title in RESERVED:
            said = f"{quoted(task.title)} is a column that the table adds"
            yield SettingError(("tasks", index, "title"), said)
        for key in ("title", "task"):
            value = getattr(task, key)
            earlier = first.setdefault((key, value), index)
            if earlier != index and value != _STAND_IN:
                said = f"{quoted(value)} stands twice, first in tasks[{earlier}]"
                yield SettingError(("tasks", index, key), said)
        kept = {key: value for key, value in task.generation.items() if key not in but}
        yield from _wrong_settings(kept, known, ("tasks", index, "generation"))
        if task.metric.partition(",")[0] in _LIKELIHOODS and task.scale != 1:
            said = f"found {task.scale}, expected 1: {task.metric} is no share of 100"
            yield SettingError(("tasks", index, "scale"), said)
    yield from _wrong_settings(document.generation, known, ("generation",))
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", document.device):
        said = f"found {quoted(document.device)}, expected cpu, cuda, cuda:N or auto"
        yield SettingError(("device",), said)
    yield from _wrong_settings(document.model_args, None, ("model_args",))
    if document.harness != "lm_eval":
        yield from _of_lm_eval(document)
    if is_whole:
        yield from _wrong_for_its_type(document)


def _of_lm_eval(document: SuiteDocument) -> Iterator[SettingError]:
    """Yield the settings that only lm_eval has."""
    said = f"{document.harness} has no such setting, only lm_eval has it"
    for key in ("num_fewshot", "apply_chat_template", "system_instruction",
                "fewshot_as_multiturn", "confirm_run_unsafe_code"):  # fmt: skip
        if getattr(document, key) != SuiteDocument.model_fields[key].default:
            yield SettingError((key,), said, at_key=True)
    for index, task in enumerate(document.tasks):
        if task.num_fewshot is not None and document.num_fewshot is None:
            yield SettingError(("tasks", index, "num_fewshot"), said, at_key=True)


def _wrong_for_its_type(document: SuiteDocument) -> Iterator[SettingError]:
    name, kinds = _model_type(document), HARNESSES[document.harness].model_types
    if name not in kinds:
        said = f"{document.harness} has no model type {quoted(name)}. {suggest(name, kinds)}"
        yield SettingError(("model_type",), said)
        return
    kind = kinds[name]
    if document.load_in_8bit and kind.model_8bit is None:
        yield SettingError(("load_in_8bit",), f"{name} cannot load in 8 bit here")
    if document.dtype != "auto" and not kind.takes_dtype:
        yield SettingError(("dtype",), f"{name} takes the checkpoint's dtype: leave it at auto")
    if document.batch_size > 1 and kind.one_at_a_time:
        yield SettingError(("batch_size",), f"{name} takes one question at a time")
    if document.batch_size > 1 and kind.own_batches:
        yield SettingError(("batch_size",), f"{name} makes its batches by itself: leave it out")
    for key in document.model_args:
        if key in (kind.path_argument, "device", "device_map", "dtype", "batch_size"):
            said = f"{quoted(key)} is set by the command"
            yield SettingError(("model_args", key), said, at_key=True)


def _wrong_settings(
    settings: Mapping[str, Any], known: Collection[str] | None, path: SpecPath
) -> Iterator[SettingError]:
    for name, value in settings.items():
        if known is not None and name not in known:
            said = f"no generation setting {quoted(name)}. {suggest(name, known)}"
            yield SettingError((*path, name), said, at_key=True)
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            yield SettingError((*path, name), f"found {quoted(value)}, expected plain values")
        if name in _COUNTS and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            said = f"found {quoted(value)}, expected a whole number from 1"
            yield SettingError((*path, name), said)
