"""Classifies the files of a model's folder other than the weights that are read."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal

from outliermerge.checkpoint.formats.table import SUFFIXES
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.storage.hub_cache import listed_files
from outliermerge.storage.stamps import open_file, refuse_text
from outliermerge.storage.system import refuse_special

SIDECAR_PATTERNS = ("*.json", "*.txt", "*.model", "*.model.v*", "*.jinja", "*.py", "*.tiktoken",
                    "*.spm", "*.codes", "*.tokenizer",
                    "LICENSE*", "NOTICE*")  # fmt: skip
_FILE_ENDS = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".codes")
MANIFEST_NAME = "outliermerge.json"
CARD_NAME = "README.md"
TRAINING_FILES = re.compile(
    r"^((train(ing|er)?_args|optim|optimizer.*|(lr_)?scheduler(_\d+)?"
    r"|((grad|loss)_)?scaler|sampler.*|dataloader.*)\.(bin|pt|pth|json)"
    r"|rng_state.*\.(bin|pt|pth|json)|optimizer\.safetensors|(trainer|training)_state\.\w+"
    r"|random_states_\d+\.pkl|custom_checkpoint_\d+\.pkl"
    r"|(zero|bf16_zero|fp16_zero)_pp_rank_.*|.*_optim_states\.pt|zero_to_fp32\.py"
    r"|latest|latest_checkpointed_iteration\.txt|trainer_log\.jsonl"
    r"|(all|train|eval|test|predict)_results\.(json|txt)|events\.out\.tfevents.*)$"
)
_TRAINING_FOLDERS = re.compile(
    r"^(checkpoint[-_]\d+|global_step\d+|runs|wandb|logs|tensorboard|lightning_logs|mlruns"
    r"|optimizer_\d+|__pycache__)$"
)
# Files in which exporters and other libraries store the same weights.
_COPY_FOLDERS = re.compile(
    r"^(onnx|openvino|coreml|gguf|ggml|original|tflite|tensorrt|flax|mlc|mlx|ctranslate2|litert"
    r"|torchscript|executorch|neuron)([-_].*)?$|^(bf|fp|float)(8|16|32)$"
    r"|\.(mlpackage|mlmodelc)$"
)
_COPIES = re.compile(
    r"\.(gguf|ggml|onnx|onnx_data|onnx\.data|h5|msgpack|ot|mlmodel|tflite|pb|engine|pte)$"
    r"|^consolidated[.-]|^openvino_.*\.(bin|xml)$|^ggml-.*\.bin$|^open_clip_(pytorch_)?model\."
)
# Files that were computed or recorded for use with a model, not trained with it, such as voices.
_DATA_FOLDERS = re.compile(
    r"^(voices?|speakers?|(speaker|voice)_embeddings?|xvectors?|assets?|examples?|samples?|demos?"
    r"|docs?|images?|figures?|tests?)$"
)
_DATA = re.compile(
    r"^(tokenizer|vocab|merges|token_bytes|label_?encoder|labels?|id2label|label2id"
    r"|speakers(_\w+)?|spk2info|xvector|mel_(stats|filters)|mean|std|stats?)(\.\w+)+$"
)
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
_TENSORS = (*SUFFIXES, ".npz", ".npy", ".pkl", ".joblib")
_TORCH_STARTS = (b"PK", b"\x80", b"version ")  # a zip, a pickle, a Git LFS pointer to either

Kind = Literal["sidecar", "tensors", "training", "copy", "data", "hidden", "other"]


def kind_of(name: str) -> Kind:
    """Return the kind of a file by its path inside a model's folder.

    >>> [kind_of(n) for n in ("config.json", "2_Dense/model.safetensors", "onnx/config.json")]
    ['sidecar', 'tensors', 'copy']
    >>> [kind_of(n) for n in ("checkpoint-500/model.safetensors", ".git/config", "README.md")]
    ['training', 'hidden', 'other']
    """
    *folders, file = PurePosixPath(name).parts
    if any(part.startswith(".") for part in (*folders, file)):
        return "hidden"
    if any(map(_TRAINING_FOLDERS.match, folders)) or TRAINING_FILES.match(file):
        return "training"
    if any(_COPY_FOLDERS.search(part.lower()) for part in folders) or _COPIES.search(file):
        return "copy"
    if file.endswith(_TENSORS):
        is_data = any(_DATA_FOLDERS.match(part.lower()) for part in folders) or _DATA.match(file)
        return "data" if is_data else "tensors"
    is_sidecar = len(folders) <= 1 and any(fnmatch(file, pattern) for pattern in SIDECAR_PATTERNS)
    return "sidecar" if is_sidecar and not file.endswith(MANIFEST_NAME) else "other"


def sidecars_of(names: Iterable[str], components: Collection[str]) -> list[str]:
    """Return those files of a model's folder that are small and belong to the model.

    The files of a subfolder with weights belong to another model, unless the subfolder is a
    component of this one.
    """
    names = sorted(names)
    folders = {name: name.rpartition("/")[0] for name in names}
    own = {"", *components}
    foreign = {
        folders[name] for name in names if kind_of(name) == "copy" or name.endswith(_TENSORS)
    }
    return [
        name
        for name in names
        if folders[name] not in foreign - own
        and kind_of(PurePosixPath(name).name if folders[name] in own else name) == "sidecar"
        and not _INDEX.search(name)
    ]


def files_in(root: Path) -> list[str]:
    """Return the paths of a model's files inside its folder, without hidden ones."""
    # rglob does not enter folders that are links; a component can be a link.
    found = []
    folders = [root]
    while folders:
        for path in _entries(folders.pop()):
            name = path.relative_to(root).as_posix()
            refuse_text(path)
            if not _is_folder(path):
                found.append(name)
                continue
            if name.endswith(_FILE_ENDS) and kind_of(name) == "sidecar":
                refuse_special(path, path.stat().st_mode)
            # Do not enter links to folders, except those of components.
            if not path.is_symlink() or path.parent == root:
                folders.append(path)
    return sorted(found)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        if path.is_symlink():  # to nowhere, or to itself
            return False
        raise


def _entries(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise OutlierMergeError(f"{folder}: cannot be read: {error.strerror}") from error


def unread_tensors(root: Path, known: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the files that hold unread tensors, and notes on others that hold only copies.

    Args:
        root: the model's folder.
        known: the files that are read, and those that the loader ignores as well.
    """
    present = files_in(root)
    names = sorted({*present, *listed_files(root)} - {*known})
    read = {os.path.realpath(root / name) for name in known}  # other files may link to these
    others = [
        name
        for name in names
        if kind_of(name) == "tensors"
        and os.path.realpath(root / name) not in read
        and _holds_tensors(root / name)
    ]
    notes = _copies_note([name for name in present if name not in known])
    if data := sorted({_place(name) for name in names if kind_of(name) == "data"}):
        notes.append(f"not read, as samples and tables beside the weights:\n{listing(data)}")
    return others, notes


def _holds_tensors(path: Path) -> bool:
    """Tell whether a file may hold tensors; a .bin can be anything."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        if path.suffix not in _TORCH:
            return True
        with open_file(path) as file:
            return file.read(8).startswith(_TORCH_STARTS)
    except OSError:
        return True


def _copies_note(names: Iterable[str]) -> list[str]:
    """Return a note on unread files with older states and copies of the weights."""
    suffixes = (*_TENSORS, ".onnx", ".gguf", ".h5", ".msgpack")
    found = {
        _place(name): None
        for name in sorted(names)
        if name.endswith(suffixes)
        and (kind_of(name) == "copy" or (_place(name) != name and kind_of(name) != "data"))
    }
    if not found:
        return []
    return [f"not read, as older states or copies in other formats:\n{listing(found)}"]


def _place(name: str) -> str:
    """Return the folder of older states, copies or samples that a file is in, or the file."""
    parts = PurePosixPath(name).parts
    for number, part in enumerate(parts[:-1], start=1):
        folders = (_TRAINING_FOLDERS, _COPY_FOLDERS, _DATA_FOLDERS)
        if any(pattern.search(part.lower()) for pattern in folders):
            return "/".join(parts[:number]) + "/"
    return name
