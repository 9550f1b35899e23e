"""The exact bytes of the output's files, planned before any tensor is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from outliermerge.checkpoint.formats.safetensors_file import PAGE_BYTES, make_header
from outliermerge.checkpoint.sources import DType
from outliermerge.errors import ArgumentError, argument

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_bytes(text: str, name: str) -> int:
    """Return a size in bytes from text such as 5GB (10⁹), 1GiB (2³⁰) or 4096.

    Raises:
        ArgumentError: the text is not a positive size.

    >>> parse_bytes("5GB", "shard_size"), parse_bytes("1.5 GiB", "memory")
    (5000000000, 1610612736)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = match[2].upper() if match else ""
    if match is None or unit not in _UNITS or not 1 <= float(match[1]) * _UNITS[unit] < 2**63:
        raise ArgumentError(
            f"{argument(name)}: {text!r} is not a size. Write for example 5GB, 500MB or 1GiB."
        )
    return int(float(match[1]) * _UNITS[unit])


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output: its name, type, shape, and where its bytes go."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.num_bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of the output: its name, first bytes and whole size."""

    file: str
    header: bytes
    num_bytes: int


def plan_layout(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]],
    *,
    shard_bytes: int | None,
    components: Mapping[str, str],
    metadata: Mapping[str, Mapping[str, str]] | None = None,
    whole: Collection[str] = (),
) -> tuple[list[Shard], dict[str, OutputTensor]]:
    """Place tensors into shards of at most shard_bytes (None: no limit), in the order given.

    A tensor larger than shard_bytes gets its own shard. Inside a shard, tensors of whole pages come
    first, so that they begin at a page boundary, as direct writes need. Among the others wider
    dtypes come first, so that every tensor is aligned.

    Args:
        components: for each folder the stem of its files. A tensor `unet/conv_in.weight` is stored
            as `conv_in.weight` in a file of the folder `unet`.
        metadata: for each folder the metadata in the headers of its files.
        whole: folders whose tensors stay in one file.
    """
    by_component: dict[str, list[list[tuple[str, DType, tuple[int, ...]]]]] = {}
    filled: dict[str, int] = {}
    for name, dtype, shape in tensors:
        component = component_of(name, components)
        groups = by_component.setdefault(component, [])
        num_bytes = math.prod(shape) * dtype.num_bytes
        full = shard_bytes is not None and filled.get(component, 0) + num_bytes > shard_bytes
        if not groups or (filled[component] and full and component not in whole):
            groups.append([])
            filled[component] = 0
        groups[-1].append((name, dtype, shape))
        filled[component] += num_bytes
    shards: list[Shard] = []
    placed: dict[str, OutputTensor] = {}
    for component, groups in by_component.items():
        folder = f"{component}/" if component else ""
        for number, group in enumerate(groups, start=1):
            part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            file = f"{folder}{components[component]}{part}.safetensors"
            group.sort(key=_has_no_whole_pages)
            header, offsets = make_header(
                ((name.removeprefix(folder), dtype, shape) for name, dtype, shape in group),
                (metadata or {}).get(component),
            )
            end = len(header)
            for (name, dtype, shape), offset in zip(group, offsets, strict=True):
                placed[name] = OutputTensor(name, dtype, shape, file, offset)
                end = max(end, offset + math.prod(shape) * dtype.num_bytes)
            shards.append(Shard(file, header, end))
    return shards, placed


def _has_no_whole_pages(tensor: tuple[str, DType, tuple[int, ...]]) -> tuple[bool, int]:
    _, dtype, shape = tensor
    ends_in_page = math.prod(shape) * dtype.num_bytes % PAGE_BYTES != 0
    return ends_in_page, -dtype.num_bytes if ends_in_page else 0


def component_of(name: str, components: Iterable[str]) -> str:
    """Return the component that a tensor belongs to, "" if it belongs to none.

    >>> component_of("unet/conv_in.weight", ["unet", "vae"])
    'unet'
    """
    for part in components:
        if part and name.startswith(f"{part}/"):
            return part
    return ""


def make_indexes(tensors: Iterable[OutputTensor], components: Mapping[str, str]) -> dict[str, str]:
    """Return for each component with several shards the name and the JSON text of its index."""
    groups: dict[str, list[OutputTensor]] = {}
    for tensor in tensors:
        groups.setdefault(component_of(tensor.name, components), []).append(tensor)
    indexes = {}
    for component, group in groups.items():
        if len({tensor.file for tensor in group}) > 1:
            folder = f"{component}/" if component else ""
            weight_map = {
                tensor.name.removeprefix(folder): tensor.file.removeprefix(folder)
                for tensor in group
            }
            metadata = {"total_size": sum(tensor.num_bytes for tensor in group)}
            index = {"metadata": metadata, "weight_map": weight_map}
            file = f"{folder}{components[component]}.safetensors.index.json"
            indexes[file] = json.dumps(index, indent=2) + "\n"
    return indexes
