"""The weights of one folder: the files that hold them, and their headers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.folders.absent import meant_inside, models_in
from outliermerge.checkpoint.folders.foreign import (
    refuse_foreign_adapter,
    refuse_part,
    refuse_ungathered,
)
from outliermerge.checkpoint.folders.loaded import OpenChoiceError, choose, offered_files
from outliermerge.checkpoint.formats.safetensors_file import duplicates
from outliermerge.checkpoint.formats.table import PATTERNS, read_file
from outliermerge.checkpoint.sources import TensorMeta
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.storage.files import check_file, load_json, names_in
from outliermerge.storage.hub_cache import listed_files
from outliermerge.storage.stamps import is_there

_NUMBER = re.compile(r"\.(\d+)(?=\.)")
SHARD = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<end>\..+)$")

OTHER_FORMATS = (
    (r"\.gguf$", "GGUF", "Name the file itself as the model."),
    (r"^consolidated\.\d+\.pth$", "the original Llama format",
     "Convert it with transformers' convert_llama_weights_to_hf.py."),
    (r"\.h5$", "TensorFlow",
     "Convert it to safetensors: from_pretrained(…, from_tf=True) of transformers before 5, then "
     "save_pretrained()."),
    (r"\.msgpack$", "Flax",
     "Convert it to safetensors: from_pretrained(…, from_flax=True) of transformers before 5, "
     "then save_pretrained()."),
    (r"\.onnx$", "ONNX", "Take the model that it was exported from."),
    (r"\.ckpt$", "a training checkpoint", "Name the file itself as the model."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of one folder or file.

    Attributes:
        stem: the stem of the names of a merged model's weight files.
        metas: the tensors, in the order of the files.
        paths: the files that hold them.
        passed_over: files that a loader would take if the files in `paths` were missing.
        metadata: the metadata in the files' headers.
        notes: notes for the user on how they were read.
    """

    stem: str
    metas: list[TensorMeta]
    paths: list[Path]
    passed_over: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_weights(folder: Path, root: Path, *, loose: bool) -> Weights | None:
    """Read the headers of a folder's weight files, or return None where it has none.

    Args:
        folder: holds the files.
        root: the model's folder; links out of it are refused.
        loose: see `choose`.

    Raises:
        OutlierMergeError: a file is missing or broken, or it is unclear which files are meant.
    """
    config = folder / "config.json"
    if is_there(config):
        check_file(config, root)
    settings = read_json(config)
    try:
        chosen = choose(names_in(folder), settings, loose=loose)
    except OpenChoiceError as error:
        raise OutlierMergeError(f"{folder}: {error}. Move all but one of them away.") from error
    except OutlierMergeError as error:
        raise OutlierMergeError(f"{folder}: {error}") from error
    if chosen is None:
        return None
    index = folder / chosen.index if chosen.index else None
    if index is None:
        paths = [folder / name for name in chosen.files]
        _check_shard_numbers(paths)
        if not chosen.offered:  # no loader takes files of these names
            refuse_foreign_adapter(folder)
            for path in paths:
                refuse_part(path)
    else:
        check_file(index, root)
        weight_map, by_file = _weight_map(index)
        paths = list(dict.fromkeys(by_file.values()))
    metas: list[TensorMeta] = []
    notes: list[str] = []
    found_metadata: list[dict[str, str]] = []
    for path in paths:
        check_file(path, root)
        found_metas, found_notes, metadata = read_file(path)
        metas += found_metas
        notes += found_notes
        found_metadata.append(metadata)
    files = {meta.name: meta.path for meta in metas}
    if len(files) < len(metas):
        raise OutlierMergeError(f"{folder}: tensors stored twice:\n{duplicates(metas)}")
    refuse_ungathered(metas)
    if index is not None:
        notes += _check_index(index, {n: by_file[f] for n, f in weight_map.items()}, files)
    if not metas:
        raise OutlierMergeError(f"{folder}: its weight files hold no tensors")
    if chosen.variant:
        notes.append(f"{folder}: there is only the variant {chosen.variant}, which is taken")
    if "transformers_weights" in settings:
        notes.append(
            f"{folder}: its config.json names the weights (transformers_weights), which versions "
            "of transformers that do not know the key pass over"
        )
    passed_over = [folder / name for name in chosen.offered if folder / name not in paths]
    if told := [path.name for path in passed_over if not _is_index_of(path, index, paths, root)]:
        taken = chosen.index or (paths[0].name if len(paths) == 1 else f"{len(paths)} shards")
        notes.append(passed_over_note(folder, taken, told))
    stem = "model" if chosen.stem == "pytorch_model" else chosen.stem
    metadata = {k: v for found in reversed(found_metadata) for k, v in found.items()}
    return Weights(stem, metas, paths, tuple(passed_over), metadata, tuple(notes))


def offered_by_hub(root: Path, components: Iterable[str]) -> list[str]:
    """Return the files of a repository that a loader would take; not all of them are fetched."""
    listed = listed_files(root)
    return [
        f"{prefix}{name}"
        for prefix in (f"{folder}/" if folder else "" for folder in components)
        for name in offered_files(n.removeprefix(prefix) for n in listed if n.startswith(prefix))
    ]


def passed_over_note(folder: Path, taken: str, others: list[str]) -> str:
    """Return a note on files that from_pretrained would take if another were missing."""
    return (
        f"{folder}: {taken} is read, as from_pretrained takes it; passed over:\n{listing(others)}"
    )


def _is_index_of(path: Path, index: Path | None, paths: list[Path], root: Path) -> bool:
    """Tell whether a file is the index that is read, or names only files that are read."""
    if path == index:
        return True
    if not path.name.endswith(".json"):
        return False
    check_file(path, root)
    content = load_json(path)
    files = content.get("weight_map") if isinstance(content, dict) else None
    return isinstance(files, dict) and set(map(str, files.values())) <= {
        path.name for path in paths
    }


def _weight_map(index: Path) -> tuple[dict[str, str], dict[str, Path]]:
    """Return the file of each tensor, and the paths of these files, all inside the folder."""
    content = load_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if weight_map is None:
        raise OutlierMergeError(f"{index}: not an index: no valid JSON weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise OutlierMergeError(f"{index}: not an index: weight_map names no tensor")
    paths: dict[str, Path] = {}
    for name, file in weight_map.items():
        if isinstance(file, str) and file in paths:  # there are far more tensors than files
            continue
        if not isinstance(file, str) or not file or not file.isprintable():
            raise OutlierMergeError(f"{index}: tensor {name!r}: {file!r} is not a file name")
        parts = PurePosixPath(file)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file:
            raise OutlierMergeError(
                f"{index}: tensor {name!r}: {file!r} is outside the folder: refused"
            )
        paths[file] = index.parent / file
    missing = sorted(file for file, path in paths.items() if not os.path.lexists(path))
    if missing:
        raise OutlierMergeError(
            f"{index}: names files that are not in the folder:\n{listing(missing)}\n"
            "Fetch the model again."
        )
    return weight_map, paths


def _check_index(
    index: Path, weight_map: Mapping[str, Path], files: Mapping[str, Path]
) -> Iterator[str]:
    """Yield a note on names that an index lists and no shard has; from_pretrained ignores them.

    Args:
        weight_map, files: the file of each tensor, as the index says and as it is.

    Raises:
        OutlierMergeError: the index and the shards do not belong to the same model.
    """
    if files == weight_map:
        return
    held: dict[str, tuple[int, ...]] = {}
    for name in files:
        place, numbers = _numbered(name)
        held[place] = max(numbers, held.get(place, ()))
    layers = {_layer(name) for name in files}
    wrong, absent = [], []
    for name, path in weight_map.items():
        if files.get(name) == path:
            continue
        said = f"{name}: the index says {path.relative_to(index.parent)}"
        if name in files:
            wrong.append(f"{said}, it is in {files[name].name}")
            continue
        place, numbers = _numbered(name)
        # A gap in the layers is an error; a tied head, or a layer after the last one, may be
        # missing.
        if numbers and place in held and (numbers < held[place] or _layer(name) in layers):
            wrong.append(f"{said}, it is in no shard")
        absent.append(name)
    if wrong:
        raise OutlierMergeError(
            f"{index}: disagrees with the shards:\n{listing(wrong)}\n"
            "Fetch the model again, or save it again where it was made."
        )
    if absent:
        yield f"{index}: lists tensors that no shard holds, and are not read:\n{listing(absent)}"


def _numbered(name: str) -> tuple[str, tuple[int, ...]]:
    """Return a tensor's name without the numbers of layers and experts, and these numbers."""
    return _NUMBER.sub(".#", name), tuple(int(found) for found in _NUMBER.findall(name))


def _layer(name: str) -> str:
    """Return a tensor's name up to the last number in it."""
    return name[: max((match.end() for match in _NUMBER.finditer(name)), default=0)]


def _check_shard_numbers(paths: list[Path]) -> None:
    totals: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        if match := SHARD.match(path.name):
            key = (match["stem"], match["total"], match["end"])
            totals.setdefault(key, set()).add(int(match["number"]))
    for (stem, total, end), numbers in totals.items():
        absent = set(range(1, int(total) + 1)) - numbers
        if absent:
            names = [f"{stem}-{number:05d}-of-{total}{end}" for number in sorted(absent)]
            raise OutlierMergeError(
                f"{paths[0].parent}: shards are missing:\n{listing(names)}\nFetch the model again."
            )


def no_weights(folder: Path) -> str:
    """Return the message for a folder without readable weights."""
    refuse_foreign_adapter(folder)
    names = names_in(folder)
    if "adapter_config.json" in names:
        return (
            f"{folder}: a PEFT adapter without its weights: expected adapter_model.safetensors or "
            "adapter_model.bin beside adapter_config.json. Fetch it again."
        )
    for pattern, kind, advice in OTHER_FORMATS:
        files = [name for name in names if re.search(pattern, name)]
        if files:
            return f"{folder}: no weights that can be read, only {kind}: {files[0]}. {advice}"
    if inside := models_in(folder):
        return f"{folder}: no weights ({PATTERNS}), {meant_inside(inside, 'model')}"
    found = f"it has:\n{listing(names, limit=10)}" if names else "it is empty."
    return f"{folder}: no weights ({PATTERNS}): {found}"
