"""What would only fail after a model has been loaded: found out before."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from outliermerge.checkpoint.config import read_json
from outliermerge.errors import OutlierMergeError, argument, listing, quoted, shown
from outliermerge.evaluation.model_types import MODEL_TYPES
from outliermerge.evaluation.suite import Suite
from outliermerge.evaluation.task_files import definition_of, lacking_data, own_files
from outliermerge.storage.files import small_bytes

# How a task file's comments name the command that makes its data.
_COMMAND = re.compile(r"(?m)^# +(?:made by): +(?P<command>.+)$")


def check_models(model_type: str, models: Iterable[tuple[str, Path]]) -> None:
    """Refuse models whose architecture a model type of lmms-eval cannot load.

    Args:
        models: the reference and the folder of each.

    Raises:
        OutlierMergeError: there are such models; the message names all of them.
    """
    known = MODEL_TYPES[model_type].architectures
    wrong = []
    for reference, folder in models:
        config = read_json(folder / "config.json")
        kind = config.get("model_type")
        if not known or not isinstance(kind, str) or kind in known:
            continue
        sees = any("vision" in key for key in config)
        others = [name for name, each in MODEL_TYPES.items() if kind in each.architectures]
        advice = f" {argument('model_type', others[0])} takes it." if others else ""
        what = shown(kind) if sees else f"{shown(kind)}, a text model that sees no pictures"
        wrong.append(f"model {quoted(reference)} is of type {what}.{advice}")
    if wrong:
        takes = " or ".join(known)
        raise OutlierMergeError("\n".join([*wrong, f"The model type {model_type} takes {takes}."]))


def check_data(suite: Suite) -> None:
    """Refuse a suite with tasks whose local data files are not there.

    Raises:
        OutlierMergeError: files are missing; the message says of each how it is made, where the
            task's file says it.
    """
    ours = own_files(suite.tasks_folder, suite.data)
    rows, commands = [], dict[str, None]()
    for task in suite.document.tasks:
        definition = definition_of(task.task, ours, suite.data)
        if definition is None or not (lacking := lacking_data(definition, suite.data)):
            continue
        rows += [f"{task.task}: {name}" for name in lacking]
        commands |= dict.fromkeys(_commands(definition.parts))
    if rows:
        where = suite.data or "no folder: the suite names none as `data`"
        makes = f"To make them:\n{listing(commands)}" if commands else (
            f"Put them there, or name another folder by {argument('data')}."
        )  # fmt: skip
        raise OutlierMergeError(f"data of tasks is not in {where}:\n{listing(rows)}\n{makes}")


def _commands(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        yield from _COMMAND.findall(small_bytes(file).decode("utf-8"))
