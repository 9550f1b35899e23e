"""Which files of a repository, or of a folder elsewhere, a merge needs, by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.folders.beside import sidecars_of
from outliermerge.checkpoint.folders.folder import MODULES_NAME, PIPELINE_NAME, module_folders
from outliermerge.checkpoint.folders.loaded import OpenChoiceError, choose
from outliermerge.checkpoint.formats.table import PATTERNS
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.storage.files import load_json

_ADAPTER = r"adapter_model\.(bin|safetensors)"  # safetensors is preferred
_TRAINED_BESIDE = r"non_lora_(trainables|state_dict)\.bin"
NO_WEIGHTS = f"weights ({PATTERNS})"
"""What is missing where there are none, for messages."""


def wanted_files(names: Sequence[str], fetch: Callable[[list[str]], Path]) -> list[str]:
    """Return the weights that `open_checkpoint` reads, in one format, and the files beside them.

    Args:
        names: of all files.
        fetch: fetches files into a folder, and returns that folder.

    Raises:
        OutlierMergeError: there are no weights, or it is open which are meant.
    """
    lists = [name for name in (PIPELINE_NAME, MODULES_NAME) if name in names]
    folder = fetch(lists) if lists else Path()
    parts = parts_of(names, folder)
    if guides := [name for name in names if _is_guide(name, parts)]:
        folder = fetch(guides)
    if weights := weights_of(names, folder, parts):
        return [*sidecars_of(names, parts), *weights]
    raise OutlierMergeError(
        f"the repository has no {NO_WEIGHTS}. It has:\n{listing(sorted(names), limit=10)}"
    )


def parts_of(names: Collection[str], folder: Path) -> list[str]:
    """Return the folders of a repository that contain a model's weights, "" for its root."""
    pipeline = load_json(folder / PIPELINE_NAME) if PIPELINE_NAME in names else None
    if isinstance(pipeline, dict):
        return [key for key, value in pipeline.items() if isinstance(value, list)]
    modules = load_json(folder / MODULES_NAME) if MODULES_NAME in names else None
    return list(dict.fromkeys(["", *module_folders(modules)]))


def _is_guide(name: str, parts: Collection[str]) -> bool:
    """Tell whether a file determines which weights are read."""
    part, _, file = name.rpartition("/")
    return part in parts and (file == "config.json" or ".index." in file)


def weights_of(names: Collection[str], folder: Path, parts: Collection[str]) -> list[str]:
    """Return the weight files that `open_checkpoint` reads; an index in the folder is followed."""
    chosen: list[str] = []
    for part in parts:
        prefix = f"{part}/" if part else ""
        inside = sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
        inside = [name for name in inside if "/" not in name]
        if "adapter_config.json" in inside:
            files = [name for name in inside if re.fullmatch(_ADAPTER, name)][-1:]
            files += [name for name in inside if re.fullmatch(_TRAINED_BESIDE, name)]
            chosen += [prefix + file for file in files]
        config = read_json(folder / part / "config.json") if "config.json" in inside else {}
        try:
            choice = choose(inside, config, loose=not part)
        except OpenChoiceError as error:
            raise OutlierMergeError(
                f"{error}. Fetch one with `hf download … --include … --local-dir …` and name that "
                "folder."
            ) from error
        if choice is None:
            continue
        files = [*choice.files]
        if choice.index:
            content = load_json(folder / part / choice.index)
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
            if isinstance(weight_map, dict):
                files = [str(file) for file in dict.fromkeys(weight_map.values())]
            files.append(choice.index)
        # An index may say `./model.safetensors`, which is no name in a store.
        chosen += [PurePosixPath(prefix + file).as_posix() for file in files]
    return chosen
