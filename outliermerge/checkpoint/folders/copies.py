"""Unread files of tensors: which are copies of what is read, and which hold other tensors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from outliermerge.checkpoint.folders.beside import unread_tensors
from outliermerge.checkpoint.folders.loaded import offered_files
from outliermerge.checkpoint.folders.weights import offered_by_hub, passed_over_note
from outliermerge.checkpoint.formats.table import SUFFIXES, read_file
from outliermerge.checkpoint.sources import Source, TensorMeta
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.storage.files import check_file, names_in

# Tensors that are trained in addition to the weights, possibly under the same names.
_TRAINED_BESIDE = re.compile(
    r"^(non_lora_(trainables|state_dict)|pytorch_(lora|custom_diffusion)_weights|adapter_model"
    r"|adapters?)\."
)
_WRAPPERS = re.compile(
    r"^(?:(?:module|model|base_model|transformer|_orig_mod|_forward_module|_fsdp_wrapped_module"
    r"|state_dict|ema|ema_model)\.)+"
)
_MIN_TENSORS = 8  # the fewest tensors of a whole model in another layout


def files_beside(
    root: Path,
    known: Collection[str],
    tensors: Mapping[str, Source],
    *,
    components: Collection[str] = ("",),
    is_pipeline: bool = False,
) -> tuple[tuple[Path, ...], list[str]]:
    """Return the files in a model's folder that may hold further tensors, and notes.

    A file is a copy, or another state, if its tensors have the names and shapes of tensors that are
    read, or if nearly all have their shapes. Of a file that was not fetched, only the name is
    known. Files that a pipeline's model_index.json does not name are not loaded with it.

    Args:
        known: the files that are read, and those that the loader ignores as well.
        tensors: the tensors that are read.
        components: the folders that have weights.
    """
    others, notes = unread_tensors(root, known)
    if not others:
        return (), notes
    read = _Read(tensors, components)
    copies: list[str] = []
    outside: list[str] = []
    left: list[str] = []
    for name in others:
        path = root / name
        if _TRAINED_BESIDE.match(path.name):
            left.append(name)
        elif is_pipeline and name.rpartition("/")[0] not in components:
            outside.append(name)
        elif read.has_all_of(path, root) if path.is_file() else read.has_part(name):
            copies.append(name)
        else:
            left.append(name)
    for kind, names in (
        ("as copies or other states of what is read", copies),
        ("as the pipeline does not name them; copies in another layout, mostly", outside),
    ):
        if names:
            notes.append(f"not read, {kind}:\n{listing(names)}")
    if left:
        notes.append(f"files of tensors that are not read, and left out:\n{listing(left)}")
    return tuple(root / name for name in left), notes


def beside_adapter(
    files: Sequence[Path], names: Collection[str], metas: Iterable[TensorMeta]
) -> tuple[tuple[Path, ...], list[str]]:
    """Return the files of tensors in an adapter's folder that nothing reads, and notes.

    Args:
        files: those that are read: the adapter's weights, and others with them.
        names: the names that an adapter's weight files can have. from_pretrained ignores those that
            are not the first of `files`, and whole models in the folder.
        metas: the adapter's tensors.
    """
    folder, read = files[0].parent, {file.name for file in files}
    loaded = {*names, *read, *offered_files(names_in(folder)), *offered_by_hub(folder, [""])}
    other_files, notes = files_beside(folder, loaded, {meta.name: meta for meta in metas})
    passed_over = sorted(n for n in loaded if n not in read and (folder / n).exists())
    if passed_over:
        notes.append(passed_over_note(folder, files[0].name, passed_over))
    return other_files, notes


class _Read:
    """The names and shapes of the tensors that are read, to compare with other files."""

    def __init__(self, tensors: Mapping[str, Source], components: Iterable[str]) -> None:
        prefixes = tuple(f"{folder}/" for folder in components if folder)
        self.entries = set()
        self.parts: set[str] = set()
        for name, source in tensors.items():
            inner = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
            self.entries |= {(_bare(name), source.shape), (_bare(inner), source.shape)}
            self.parts.update(inner.split(".")[:-1])
        self.shapes = Counter(source.shape for source in tensors.values())
        self.num_elements = sum(source.num_elements for source in tensors.values())

    def has_all_of(self, path: Path, root: Path) -> bool:
        if path.suffix not in SUFFIXES:
            return False
        try:
            check_file(path, root)
            metas, _, _ = read_file(path)
        except OutlierMergeError:
            return False
        if not metas or all((_bare(meta.name), meta.shape) in self.entries for meta in metas):
            return True
        shared = Counter(meta.shape for meta in metas) & self.shapes
        num_shared = sum(math.prod(shape) * count for shape, count in shared.items())
        num_own = sum(meta.num_elements for meta in metas)
        whole = num_shared >= 0.9 * max(num_own, self.num_elements)
        return whole and shared.total() >= _MIN_TENSORS

    def has_part(self, name: str) -> bool:
        """Tell whether an unfetched file has the name of a component that is read."""
        path = PurePosixPath(name)
        return len(path.parts) == 1 and path.stem != "model" and path.stem in self.parts


def _bare(name: str) -> str:
    """Return a tensor's name without the prefixes of wrappers.

    >>> _bare("module.model.layers.0.weight")
    'layers.0.weight'
    """
    return _WRAPPERS.sub("", name)
