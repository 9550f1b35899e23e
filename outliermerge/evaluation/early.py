"""What would only fail after a model has been loaded: found out before."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from outliermerge.checkpoint.config import read_json
from outliermerge.errors import OutlierMergeError, argument, quoted, shown
from outliermerge.evaluation.model_types import MODEL_TYPES
from outliermerge.evaluation.suite import Suite
from outliermerge.evaluation.task_files import lacking_data, own_files
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


def lacking_by_task(suite: Suite) -> dict[str, str]:
    """Return by task why it cannot be asked, where local data of ours is not there."""
    reasons: dict[str, str] = {}
    wanted = {task.task for task in suite.document.tasks}
    for definition in own_files(suite.tasks_folder, suite.data):
        if wanted.isdisjoint(definition.names):
            continue
        if not (lacking := lacking_data(definition, suite.data)):
            continue
        files = ", ".join(map(shown, lacking))
        where = (
            f"not in {suite.data}" if suite.data else "nowhere: the suite names no `data` folder"
        )
        commands = [c for part in definition.parts for c in _COMMAND.findall(_text(part))]
        make = f". To make it: {commands[0]}" if commands else ""
        reasons |= dict.fromkeys(definition.names, f"its data {files} is {where}{make}")
    return reasons


def _text(file: Path) -> str:
    return small_bytes(file).decode("utf-8")
