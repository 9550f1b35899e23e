"""A model folder: which of its files hold weights, and which belong beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from outliermerge.checkpoint.meta import Checkpoint, FileStamp, TensorMeta
from outliermerge.checkpoint.safetensors_file import duplicates, read_header
from outliermerge.errors import OutlierMergeError, listing

SAFETENSORS_PATTERNS = ("*.safetensors",)
PYTORCH_PATTERNS = ("*.bin", "*.pt", "*.pth")
SIDECAR_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.spm",
                    "LICENSE*", "NOTICE*")  # fmt: skip
MANIFEST_NAME = "outliermerge.json"
_TRAINING_FILES = re.compile(
    r"(training_args|optimizer|scheduler|rng_state.*|scaler|trainer_state)\.(bin|pt|pth|json)$"
)
_SHARD_NUMBER = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<end>\..+)$")


def open_checkpoint(root: Path) -> Checkpoint:
    """Read the headers of every weight file in a model folder.

    safetensors files are used where there are any, PyTorch files otherwise.

    Raises:
        OutlierMergeError: the folder is absent, holds no weights, or a file is missing or broken.
    """
    if not root.is_dir():
        kind = "is a file, expected a model folder" if root.exists() else "no such folder"
        raise OutlierMergeError(f"{root}: {kind}")
    paths = _weight_files(root, "model.safetensors.index.json", SAFETENSORS_PATTERNS)
    if paths:
        metas = _read_all(root, "model.safetensors.index.json", paths, read_header)
    else:
        paths = _weight_files(root, "pytorch_model.bin.index.json", PYTORCH_PATTERNS)
        if not paths:
            raise OutlierMergeError(_no_weights(root))
        from outliermerge.checkpoint.pytorch_file import read_metas

        metas = _read_all(root, "pytorch_model.bin.index.json", paths, read_metas)
    sidecars, left_behind = _sidecars(root, set(paths))
    return Checkpoint(
        root=root,
        tensors={meta.name: meta for meta in metas},
        weight_files=tuple(FileStamp.of(path) for path in paths),
        sidecars=sidecars,
        left_behind=left_behind,
    )


def _weight_files(root: Path, index_name: str, patterns: tuple[str, ...]) -> list[Path]:
    index = root / index_name
    if index.is_file():
        return [root / name for name in dict.fromkeys(_weight_map(index).values())]
    found = sorted(
        path
        for pattern in patterns
        for path in root.glob(pattern)
        if path.is_file()
        and not _TRAINING_FILES.search(path.name)
        and not path.name.startswith("adapter_model.")
    )
    named = [path for path in found if re.match(r"(pytorch_)?model[.-]", path.name)]
    found = named or found
    _check_shard_numbers(found)
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """Return an index's weight_map after checking that every file is inside the folder."""
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise OutlierMergeError(f"{index}: not an index: no valid JSON weight_map") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise OutlierMergeError(f"{index}: not an index: weight_map names no tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise OutlierMergeError(f"{index}: tensor {name!r}: {file!r} is not a file name")
        parts = PurePosixPath(file)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file:
            raise OutlierMergeError(
                f"{index}: tensor {name!r}: {file!r} is outside the folder: refused"
            )
    missing = sorted({file for file in weight_map.values() if not _is_file(index.parent / file)})
    if missing:
        raise OutlierMergeError(
            f"{index}: names files that are not in the folder:\n{listing(missing)}\n"
            "Fetch the model again."
        )
    return weight_map


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no file can have that name
        return False


def _check_shard_numbers(paths: list[Path]) -> None:
    totals: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        if match := _SHARD_NUMBER.match(path.name):
            key = (match["stem"], match["total"], match["end"])
            totals.setdefault(key, set()).add(int(match["number"]))
    for (stem, total, end), numbers in totals.items():
        absent = set(range(1, int(total) + 1)) - numbers
        if absent:
            names = [f"{stem}-{number:05d}-of-{total}{end}" for number in sorted(absent)]
            raise OutlierMergeError(
                f"{paths[0].parent}: shards are missing:\n{listing(names)}\nFetch the model again."
            )


def _read_all(
    root: Path,
    index_name: str,
    paths: list[Path],
    read: Callable[[Path], list[TensorMeta]],
) -> list[TensorMeta]:
    metas = [meta for path in paths for meta in read(path)]
    if twice := duplicates(metas):
        raise OutlierMergeError(f"{root}: tensors stored twice:\n{twice}")
    index = root / index_name
    if index.is_file():
        files = {meta.name: meta.path for meta in metas}
        wrong = [
            f"{name}: the index says {file}, "
            + (f"it is in {files[name].name}" if name in files else "it is in no shard")
            for name, file in _weight_map(index).items()
            if files.get(name) != root / file
        ]
        if wrong:
            raise OutlierMergeError(f"{index}: disagrees with the shards:\n{listing(wrong)}")
    if not metas:
        raise OutlierMergeError(f"{root}: its weight files hold no tensors")
    return metas


def _no_weights(root: Path) -> str:
    if (root / "adapter_config.json").is_file():
        return (
            f"{root}: a PEFT adapter, not a full model. "
            "Merge it into its base first: peft's merge_and_unload(), then save_pretrained()."
        )
    names = sorted(path.name for path in root.iterdir())
    found = f"it has:\n{listing(names, limit=10)}" if names else "it is empty."
    return f"{root}: no weights (*.safetensors, *.bin, *.pt, *.pth): {found}"


def _sidecars(root: Path, weights: set[Path]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    sidecars: list[str] = []
    left_behind: list[str] = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if not path.is_file() or path in weights or any(p.startswith(".") for p in name.parts):
            continue
        carried = (
            len(name.parts) <= 2
            and any(path.match(pattern) for pattern in SIDECAR_PATTERNS)
            and not name.name.endswith(".index.json")
            and not _TRAINING_FILES.search(name.name)
            and name.name != MANIFEST_NAME
        )
        (sidecars if carried else left_behind).append(name.as_posix())
    return tuple(sidecars), tuple(left_behind)
