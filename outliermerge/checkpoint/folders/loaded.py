"""Which of a folder's weight files a loader reads, by the order of from_pretrained.

transformers 4 and 5 (`_get_resolved_checkpoint_files`) look for the single file first, then for the
index; for safetensors first, then for PyTorch. diffusers (`ModelMixin.from_pretrained`) looks for
the index first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from outliermerge.checkpoint.folders.beside import TRAINING_FILES
from outliermerge.checkpoint.formats.table import FORMATS
from outliermerge.errors import OutlierMergeError

_DIFFUSERS = "diffusion_pytorch_model"
_LOADED = {
    ("model", "safetensors"),
    ("pytorch_model", "bin"),
    (_DIFFUSERS, "safetensors"),
    (_DIFFUSERS, "bin"),
}
# A variant, such as fp16, is before the extension, before or after a shard's number.
_WEIGHTS = re.compile(
    r"^(?P<stem>\w+)(\.(?P<variant>[A-Za-z]\w*))?(?P<shard>-\d{5}-of-\d{5})?"
    r"(\.(?P<late_variant>[A-Za-z]\w*))?\.(?P<format>safetensors|bin)$"
)
_INDEX = re.compile(
    r"^(?P<stem>\w+)\.(?P<format>safetensors|bin)\.index(\.(?P<variant>[A-Za-z]\w*))?\.json$"
)
_DISTRIBUTED = re.compile(r"^shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
_NOT_LOOSE = re.compile(r"^(\.|adapter_model\.|consolidated\.\d+\.pth$)")
_Kind = Literal["single", "index", "shards"]


class OpenChoiceError(OutlierMergeError):
    """It is unclear which of a folder's files are its weights."""


@dataclass(frozen=True, order=True, slots=True)
class _Group:
    """Files that a loader would read together."""

    variant: str
    stem: str
    format: str
    kind: _Kind


@dataclass(frozen=True, slots=True)
class Choice:
    """The files that a loader reads.

    Attributes:
        stem: the common stem of their names.
        files: their names; files that only an index names are not included.
        index: the name of their index, if they have one.
        variant: a variant such as fp16, if the folder has only that.
        offered: all files with names that a loader would take if others were missing.
    """

    stem: str
    files: tuple[str, ...] = ()
    index: str | None = None
    variant: str = ""
    offered: tuple[str, ...] = ()


def choose(names: Iterable[str], config: Mapping[str, Any], *, loose: bool) -> Choice | None:
    """Return which of a folder's files are its weights; None if it has none.

    Files without a variant are preferred to a variant. Files that a loader finds by itself are
    preferred to shards without an index.

    Args:
        names: the names of the files directly in the folder.
        config: the config in the folder, which shows the loader and can name the file.
        loose: take files of any name if none has a name that transformers or diffusers loads.

    Raises:
        OpenChoiceError: it is unclear which files are meant; the caller completes the message.
        OutlierMergeError: the config names a file that is missing or is not weights.
    """
    names = sorted(names)
    if distributed := [name for name in names if _DISTRIBUTED.match(name)]:
        raise OpenChoiceError(
            f"{distributed[0]} is of a distributed checkpoint, which newer versions of "
            "transformers load instead of all others, and which is not read. Load it with them and "
            "save_pretrained() it, if it is meant"
        )
    groups = _groups(names)
    offered = tuple(name for files in groups.values() for name in files)
    if (said := config.get("transformers_weights")) is not None:
        return _said(said, names, offered)
    if not groups:
        files = _loose_files(names) if loose else []
        return Choice("model", tuple(files)) if files else None
    variants = sorted({group.variant for group in groups})
    if variants[0] and len(variants) > 1:
        raise OpenChoiceError(
            f"its weights are there only as variants, and as several: {', '.join(variants)}"
        )
    is_diffusers = _is_diffusers(groups, config)
    best = min(groups, key=lambda group: _rank(group, is_diffusers))
    is_index = best.kind == "index"
    return Choice(
        stem=best.stem,
        files=() if is_index else tuple(groups[best]),
        index=groups[best][0] if is_index else None,
        variant=best.variant,
        offered=offered,
    )


def offered_files(names: Iterable[str]) -> list[str]:
    """Return those of a folder's files whose names a loader would take."""
    return [name for files in _groups(sorted(names)).values() for name in files]


def _groups(names: list[str]) -> dict[_Group, list[str]]:
    groups: dict[_Group, list[str]] = {}
    for name in names:
        match = _WEIGHTS.match(name) or _INDEX.match(name)
        if match is None or (match["stem"], match["format"]) not in _LOADED:
            continue
        found = match.groupdict()
        variant = found["variant"] or found.get("late_variant") or ""
        kind: _Kind = "shards" if found.get("shard") else "single"
        kind = "index" if match.re is _INDEX else kind
        group = _Group(variant, found["stem"], found["format"], kind)
        groups.setdefault(group, []).append(name)
    return groups


def _is_diffusers(groups: Iterable[_Group], config: Mapping[str, Any]) -> bool:
    """Tell whether diffusers loads a folder, by its config or else by its file names."""
    found = {group.stem == _DIFFUSERS: group.stem for group in groups if not group.variant}
    if "_class_name" in config:
        return True
    if len(found) == 2 and not {"model_type", "architectures"} & config.keys():
        raise OpenChoiceError(
            f"it has weights for transformers ({found[False]}) and for diffusers ({found[True]}), "
            "and its config.json does not tell which loads it"
        )
    return set(found) == {True}


def _rank(group: _Group, is_diffusers: bool) -> tuple[object, ...]:
    pickled = group.format == "bin"
    index_first = is_diffusers and not pickled
    return (
        group.variant != "",
        (group.stem == _DIFFUSERS) != is_diffusers,
        group.kind == "shards",
        pickled,
        group.kind == ("single" if index_first else "index"),
        group,
    )


def _said(said: object, names: list[str], offered: tuple[str, ...]) -> Choice:
    """Return the file that `transformers_weights` in a config names."""
    is_index = isinstance(said, str) and said.endswith(".safetensors.index.json")
    if not isinstance(said, str) or not (is_index or said.endswith(".safetensors")):
        raise OutlierMergeError(
            f"config.json: transformers_weights is {said!r}, expected the name of a .safetensors "
            "file or of an index of such."
        )
    if said not in names:
        raise OutlierMergeError(
            f"config.json: transformers_weights names {said!r}, which is not directly in the "
            "folder. Fetch it, or take the key out where other weights are meant."
        )
    return Choice("model", () if is_index else (said,), said if is_index else None, "", offered)


def _loose_files(names: list[str]) -> list[str]:
    for known in FORMATS:
        found = [
            name
            for name in names
            if name.endswith(known.suffixes)
            and not TRAINING_FILES.match(name)
            and not _NOT_LOOSE.match(name)
        ]
        named = [name for name in found if re.match(r"(pytorch_)?model[.-]", name)]
        if found:
            return named or found
    return []
