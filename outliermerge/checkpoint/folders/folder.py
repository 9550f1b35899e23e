"""Opens a model's path: a folder of weights, a pipeline of such folders, or one file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from glob import escape
from pathlib import Path

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.folders.absent import is_model
from outliermerge.checkpoint.folders.beside import (
    MANIFEST_NAME,
    files_in,
    sidecars_of,
)
from outliermerge.checkpoint.folders.copies import files_beside
from outliermerge.checkpoint.folders.foreign import refuse_part, refuse_ungathered
from outliermerge.checkpoint.folders.weights import (
    OTHER_FORMATS,
    SHARD,
    Weights,
    no_weights,
    offered_by_hub,
    read_weights,
)
from outliermerge.checkpoint.formats.table import SUFFIXES, read_file
from outliermerge.checkpoint.sources import Checkpoint, Source
from outliermerge.errors import OutlierMergeError
from outliermerge.storage.files import check_file, load_json, names_in
from outliermerge.storage.stamps import FileStamp, is_there

__all__ = [
    "MANIFEST_NAME",
    "MODULES_NAME",
    "PIPELINE_NAME",
    "module_folders",
    "open_checkpoint",
    "refuse_unfinished",
]

PIPELINE_NAME = "model_index.json"
MODULES_NAME = "modules.json"  # of a SentenceTransformer
# The prefixes of names that DataParallel and torch.compile add.
_WRAPPERS = ("module.", "_orig_mod.")


def refuse_unfinished(root: Path) -> None:
    """Refuse the folder in which an output is being written: not all its weights are there.

    Raises:
        OutlierMergeError: it is one.
    """
    if root.name.endswith(".partial") and any(root.parent.glob(f"{escape(root.name)}.journal*")):
        raise OutlierMergeError(
            f"{root}: is an output that is not finished: its weights are not all written. To go "
            "on, start the same command again; it gets its name when it is complete."
        )


def open_checkpoint(root: Path) -> Checkpoint:
    """Read the headers of a model: a folder of weights, a diffusers pipeline, or one file.

    In a folder, the files are read that from_pretrained would take. The modules of a
    SentenceTransformer that have weights are components, like those of a pipeline. In a single
    file, a wrapper's prefix before all names is removed.

    Raises:
        OutlierMergeError: the model is absent or has no weights, or a file is missing, broken,
            dangerous, or a link out of the folder.
    """
    if root.is_file():
        return _open_file(root)
    if not root.is_dir():
        kind = (
            "is neither a folder nor a regular file" if root.exists() else "no such file or folder"
        )
        raise OutlierMergeError(f"{root}: {kind}")
    is_pipeline = is_there(root / PIPELINE_NAME)
    components = _pipeline(root) if is_pipeline else _modules(root)
    tensors: dict[str, Source] = {}
    for folder, weights in components.items():
        tensors |= {f"{folder}/{m.name}" if folder else m.name: m for m in weights.metas}
    paths = [path for weights in components.values() for path in weights.paths]
    passed_over = [path for weights in components.values() for path in weights.passed_over]
    known = {path.relative_to(root).as_posix() for path in (*paths, *passed_over)}
    names = files_in(root)
    sidecars = sidecars_of(names, components)
    for name in sidecars:
        check_file(root / name, root)
    known |= {*offered_by_hub(root, components)}
    other_files, beside = files_beside(
        root, known, tensors, components=components, is_pipeline=is_pipeline
    )
    return Checkpoint(
        root=root,
        tensors=tensors,
        weight_files=tuple(FileStamp.of(path) for path in paths),
        sidecars=tuple(sidecars),
        left_behind=tuple(n for n in names if n not in sidecars and root / n not in paths),
        components={folder: weights.stem for folder, weights in components.items()},
        notes=(*(note for weights in components.values() for note in weights.notes), *beside),
        other_files=other_files,
        metadata={folder: weights.metadata for folder, weights in components.items()},
        whole=_whole_components(root, components) if MODULES_NAME in sidecars else frozenset(),
    )


def _open_file(path: Path) -> Checkpoint:
    if path.suffix not in SUFFIXES:
        for pattern, kind, advice in OTHER_FORMATS:
            if re.search(pattern, path.name):
                raise OutlierMergeError(f"{path}: is {kind}. {advice}")
        folder = f". Name its folder: {path.parent}" if is_model(path.parent) else ""
        raise OutlierMergeError(
            f"{path}: is a file, expected a model folder or a file of weights "
            f"({', '.join(SUFFIXES)}){folder}"
        )
    if (shard := SHARD.match(path.name)) and int(shard["total"]) > 1:
        raise OutlierMergeError(
            f"{path}: is one of {int(shard['total'])} shards: name the folder that holds them all"
        )
    refuse_part(path)
    metas, notes, metadata = read_file(path)
    if not metas:
        raise OutlierMergeError(f"{path}: holds no tensors")
    refuse_ungathered(metas)
    prefix = _wrapper_prefix([meta.name for meta in metas])
    if prefix:
        notes.append(f"{path}: {prefix!r} is stripped from the start of all names")
    return Checkpoint(
        root=path,
        tensors={meta.name.removeprefix(prefix): meta for meta in metas},
        weight_files=(FileStamp.of(path),),
        sidecars=(),
        left_behind=(),
        components={"": path.stem},
        notes=tuple(notes),
        metadata={"": metadata},
    )


def _wrapper_prefix(names: list[str]) -> str:
    """Return the prefix that wrappers put before all names.

    >>> _wrapper_prefix(["module._orig_mod.a", "module._orig_mod.b"])
    'module._orig_mod.'
    """
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) and name != wrapper for name in names):
            return wrapper + _wrapper_prefix([name.removeprefix(wrapper) for name in names])
    return ""


def _pipeline(root: Path) -> dict[str, Weights]:
    """Read the components that a pipeline's model_index.json names and that have weights."""
    path = root / PIPELINE_NAME
    check_file(path, root)
    content = load_json(path)
    if not isinstance(content, dict):
        raise OutlierMergeError(f"{path}: not an index of a pipeline: no JSON object")
    names = names_in(root)  # any other name could lead out of the folder
    components: dict[str, Weights] = {}
    for name, value in content.items():
        # A component is [library, class]; an unused one is [null, null].
        if not isinstance(value, list) or len(value) != 2 or value[1] is None:
            continue
        folder = root / name
        if name not in names or not folder.is_dir():
            raise OutlierMergeError(
                f"{path}: names the component {name!r}, but there is no such folder. "
                "Fetch the model again."
            )
        weights = read_weights(folder, root, loose=False)
        if weights is not None:
            components[name] = weights
        elif is_there(folder / "config.json"):
            raise OutlierMergeError(
                f"{path}: names the component {name!r}, a model without its weights.\n"
                + no_weights(folder)
            )
    if not components:
        raise OutlierMergeError(f"{path}: names no component that has weights")
    return components


def module_folders(content: object) -> list[str]:
    """Return the folders that the modules.json of a SentenceTransformer names, "" for its root."""
    entries = content if isinstance(content, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return [path for path in paths if isinstance(path, str) and "/" not in path]


def _modules(root: Path) -> dict[str, Weights]:
    """Read the weights of a folder, and of the modules that its modules.json names."""
    path = root / MODULES_NAME
    names: list[str] = []
    if is_there(path):
        check_file(path, root)
        inside = names_in(root)  # any other name could lead out of the folder
        names = [name for name in module_folders(load_json(path)) if name in ("", *inside)]
    modules = {
        name: weights
        for name in names
        if name and (weights := read_weights(root / name, root, loose=False)) is not None
    }
    weights = read_weights(root, root, loose=not modules)
    if weights is None and (not modules or "" in names):
        raise OutlierMergeError(no_weights(root))
    return {"": weights, **modules} if weights is not None else modules


def _whole_components(root: Path, components: Iterable[str]) -> frozenset[str]:
    """Return the modules that a SentenceTransformer loads itself: they must not be sharded."""
    configs = {folder: read_json(root / folder / "config.json") for folder in components}
    return frozenset(folder for folder, config in configs.items() if "model_type" not in config)
