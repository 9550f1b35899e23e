"""What a model's path may be: a folder of weights, a pipeline of such folders, or one file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from outliermerge.checkpoint.files import check_file, load_json, names_in
from outliermerge.checkpoint.meta import Checkpoint, FileStamp, Source
from outliermerge.checkpoint.weights import (
    OTHER_FORMATS,
    PYTORCH_PATTERNS,
    PYTORCH_SUFFIXES,
    SAFETENSORS_PATTERNS,
    SHARD,
    TRAINING_FILES,
    Weights,
    no_weights,
    read_metas,
    read_weights,
)
from outliermerge.errors import OutlierMergeError

__all__ = [
    "MANIFEST_NAME",
    "PIPELINE_NAME",
    "PYTORCH_PATTERNS",
    "SAFETENSORS_PATTERNS",
    "SIDECAR_PATTERNS",
    "open_checkpoint",
]

SIDECAR_PATTERNS = ("*.json", "*.txt", "*.model", "*.model.v*", "*.jinja", "*.py", "*.tiktoken",
                    "*.spm", "*.codes", "*.tokenizer", "LICENSE*", "NOTICE*")  # fmt: skip
MANIFEST_NAME = "outliermerge.json"
PIPELINE_NAME = "model_index.json"
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
_FILE_SUFFIXES = (".safetensors", *PYTORCH_SUFFIXES)
# What DataParallel and torch.compile put before the names of the module that they wrap.
_WRAPPERS = ("module.", "_orig_mod.")


def open_checkpoint(root: Path) -> Checkpoint:
    """Read the headers of a model: a folder of weights, a diffusers pipeline, or one file.

    In a folder safetensors files are used where there are any, PyTorch files otherwise. In one
    file, a prefix that a wrapper put before all names is stripped.

    Raises:
        OutlierMergeError: it is absent, holds no weights, or a file is missing, broken, dangerous
            or a link out of the folder.
    """
    if root.is_file():
        return _open_file(root)
    if not root.is_dir():
        kind = (
            "is neither a folder nor a regular file" if root.exists() else "no such file or folder"
        )
        raise OutlierMergeError(f"{root}: {kind}")
    if os.path.lexists(root / PIPELINE_NAME):
        components = _pipeline(root)
    else:
        weights = read_weights(root, root, loose=True)
        if weights is None:
            raise OutlierMergeError(no_weights(root))
        components = {"": weights}
    tensors: dict[str, Source] = {}
    for folder, weights in components.items():
        tensors |= {f"{folder}/{m.name}" if folder else m.name: m for m in weights.metas}
    paths = [path for weights in components.values() for path in weights.paths]
    sidecars, left_behind = _sidecars(root, set(paths))
    return Checkpoint(
        root=root,
        tensors=tensors,
        weight_files=tuple(FileStamp.of(path) for path in paths),
        sidecars=sidecars,
        left_behind=left_behind,
        components={folder: weights.stem for folder, weights in components.items()},
        notes=tuple(note for weights in components.values() for note in weights.notes),
    )


def _open_file(path: Path) -> Checkpoint:
    if path.suffix not in _FILE_SUFFIXES:
        for pattern, kind, advice in OTHER_FORMATS:
            if re.search(pattern, path.name):
                raise OutlierMergeError(f"{path}: is {kind}. {advice}")
        raise OutlierMergeError(
            f"{path}: is a file, expected a model folder or a file of weights "
            f"({', '.join(_FILE_SUFFIXES)})"
        )
    if (shard := SHARD.match(path.name)) and int(shard["total"]) > 1:
        raise OutlierMergeError(
            f"{path}: is one of {int(shard['total'])} shards: name the folder that holds them all"
        )
    metas, notes = read_metas(path)
    if not metas:
        raise OutlierMergeError(f"{path}: holds no tensors")
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
    )


def _wrapper_prefix(names: list[str]) -> str:
    """Return what wrappers put before all names.

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
    names = names_in(root)  # a name that is none of these could lead out of the folder
    components: dict[str, Weights] = {}
    for name, value in content.items():
        # A component is [library, class]; one that the pipeline does without is [null, null].
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
        elif (folder / "config.json").is_file():
            raise OutlierMergeError(
                f"{path}: names the component {name!r}, a model without its weights.\n"
                + no_weights(folder)
            )
    if not components:
        raise OutlierMergeError(f"{path}: names no component that has weights")
    return components


def _sidecars(root: Path, weights: set[Path]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    sidecars: list[str] = []
    left_behind: list[str] = []
    # rglob does not go into folders that are links; a component can be one.
    linked = [path for path in root.iterdir() if path.is_symlink() and path.is_dir()]
    for path in sorted({*root.rglob("*"), *(file for link in linked for file in link.iterdir())}):
        name = path.relative_to(root)
        if path.is_dir() or path in weights or any(p.startswith(".") for p in name.parts):
            continue
        carried = (
            len(name.parts) <= 2
            and any(path.match(pattern) for pattern in SIDECAR_PATTERNS)
            and not _INDEX.search(name.name)
            and not TRAINING_FILES.search(name.name)
            and name.name != MANIFEST_NAME
        )
        if carried:
            check_file(path, root)
        (sidecars if carried else left_behind).append(name.as_posix())
    return tuple(sidecars), tuple(left_behind)
