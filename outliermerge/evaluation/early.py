"""What would only fail after a model has been loaded: found out before."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.errors import OutlierMergeError, argument, quoted, shown
from outliermerge.evaluation.model_types import HARNESSES, HarnessName
from outliermerge.evaluation.suite import Suite
from outliermerge.evaluation.task_files import lacking_data, own_files
from outliermerge.storage.files import small_bytes

# How lmms-eval's qwen3_vl tells a mixture of experts.
_MOE = re.compile(r"A\d+B")
# How one file of a model's own code imports from another.
_BESIDE = re.compile(r"(?m)^\s*from \.(\w+) import")
# How a task file's comments name the command that makes its data.
_COMMAND = re.compile(r"(?m)^# +(?:made by): +(?P<command>.+)$")


def check_models(
    model_type: str,
    models: Iterable[tuple[str, Path]],
    *,
    harness: HarnessName = "lmms_eval",
    own_code: bool = False,
    chat_template: bool = False,
) -> None:
    """Refuse models that a model type cannot load, or that cannot be asked as a suite asks.

    Args:
        models: the reference and the folder of each.
        own_code: the models' own Python files are run.
        chat_template: they are asked in their chat format.

    Raises:
        OutlierMergeError: there are such models; the message names all of them.
    """
    kinds = HARNESSES[harness].model_types
    known = kinds[model_type].architectures
    own_code |= kinds[model_type].own_code
    wrong, other_type = [], False
    for reference, folder in models:
        config = read_json(folder / "config.json")
        kind = config.get("model_type")
        start = f"model {quoted(reference)}"
        if own_code and (absent := _absent_code(folder, config)):
            wrong.append(
                f"{start} is loaded by code of its own, of which its folder lacks "
                f"{', '.join(map(shown, absent))}. Copy the .py files of the model that it was "
                "trained from."
            )
        if chat_template and not _has_chat_template(folder):
            wrong.append(f"{start} has no chat template, by which the suite asks")
        if not known or not isinstance(kind, str):
            continue
        if kind not in known:
            sees = any("vision" in key for key in config)
            others = [name for name, each in kinds.items() if kind in each.architectures]
            advice = f" {argument('model_type', others[0])} takes it." if others else ""
            what = shown(kind) if sees else f"{shown(kind)}, a text model that sees no pictures"
            wrong.append(f"{start} is of type {what}.{advice}")
            other_type = True
        elif model_type == "qwen3_vl" and ("moe" in kind) != bool(_MOE.search(str(folder))):
            has = "has no such part" if "moe" in kind else "has one"
            wrong.append(
                f"{start}: lmms-eval takes a model for a mixture of experts if its path has a part "
                f"such as A3B. {folder} {has}, but its type is {shown(kind)}. Rename the folder."
            )
    if other_type:
        wrong.append(f"The model type {model_type} takes {' or '.join(known)}.")
    if wrong:
        raise OutlierMergeError("\n".join(wrong))


def _absent_code(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the names of the Python files that a config names and that are not in its folder."""
    classes = config.get("auto_map")
    named = classes.values() if isinstance(classes, Mapping) else ()
    names = [name for name in named if isinstance(name, str)]
    wanted = [name.partition(".")[0] for name in names if "--" not in name]  # else on the hub
    absent = []
    for name in wanted:  # grows by what each file imports from beside it
        file = folder / f"{name}.py"
        if not file.is_file():
            absent.append(file.name)
            continue
        wanted += {found for found in _BESIDE.findall(_text(file)) if found not in wanted}
    return list(dict.fromkeys(absent))


def _has_chat_template(folder: Path) -> bool:
    files = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    if any((folder / name).exists() for name in files):
        return True
    return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))


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
