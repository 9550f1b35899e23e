"""PyTorch's pickled files (.bin, .pt, .pth, .ckpt): read without running code.

torch maps the file into memory and makes tensors of it. This module takes only their positions:
reading through the map would kill the process by a signal if the file has become shorter.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import struct
import sys
import zipfile
from bisect import bisect
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.sources import DTYPES, EXTRA_STATE, TensorMeta
from outliermerge.errors import OutlierMergeError, listing, quoted, shown
from outliermerge.storage.files import check_file
from outliermerge.storage.lfs import refuse_lfs_pointer
from outliermerge.storage.machine import mapped_files, path_of
from outliermerge.storage.stamps import open_file
from outliermerge.storage.system import knowing

if TYPE_CHECKING:
    from torch import Tensor

# Keys under which training code saves a model's state dict in a larger dict.
_NESTED = ("state_dict", "model", "model_state_dict", "module", "params", "params_ema")
# Limits of a pickle without its tensors' bytes: torch reads about a megabyte per second, and a
# usual pickle has 200 bytes per tensor. If the name of a global is longer than the limit, torch's
# own regular expressions can take hours.
_MAX_PICKLE_BYTES, _MAX_CALLED = 3 << 20, 1000
# How many times larger than the file an expanded tensor, such as a buffer, may be.
_MAX_EXPANDED_BYTES = 1 << 20
_REWRITE = "Rewrite it once: torch.save(torch.load(path, weights_only=True), path)"


@dataclass(frozen=True, slots=True)
class Strided:
    """Where a tensor's elements are in a file: from `offset` on, `strides` apart.

    Attributes:
        is_conjugate, is_negative: the values are the conjugates, or negatives, of the stored ones.
    """

    offset: int
    num_bytes: int
    strides: tuple[int, ...]
    is_conjugate: bool = False
    is_negative: bool = False

    def values(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor, of the elements from `offset` on."""
        values = flat.as_strided(shape, self.strides)
        values = values.conj() if self.is_conjugate else values
        return -values if self.is_negative else values


def load_strided(path: Path, descriptor: int) -> dict[str, Strided]:
    """Return where the tensors of an open file are.

    Raises:
        OutlierMergeError: as for read_file.
    """
    with knowing(path):
        content = _load(path, descriptor)
        state, _ = _state_dict(path, content)
        mapped = _Mapped(path, descriptor, content)
    return {name: mapped.place(name, tensor) for name, tensor in state.items()}


def read_file(path: Path) -> tuple[list[TensorMeta], list[str], dict[str, str]]:
    """Return the tensors of a file in its order, notes on where they were, and no texts.

    Raises:
        OutlierMergeError: the pickle would run code, holds no dict of tensors or several, is
            broken, or is of a kind that cannot be read in pieces: compressed, or older than
            PyTorch 1.6.
    """
    check_file(path)
    refuse_lfs_pointer(path)
    with open_file(path) as file:
        content = _load(path, file.fileno())
        state, notes = _state_dict(path, content)
        return _metas(path, state, _Mapped(path, file.fileno(), content)), notes, {}


class _Mapped:
    """Translates addresses in the memory that torch has mapped to positions in the file.

    torch does not check the length of a record: a longer tensor would go on in the next record.
    """

    def __init__(self, path: Path, descriptor: int, content: object) -> None:
        self._path = path
        self._num_bytes = os.fstat(descriptor).st_size
        self._records = _records(path, descriptor)
        self._ranges = mapped_files() or _mapped_records(path, descriptor, content)

    def place(self, name: str, tensor: Tensor) -> Strided:
        """Return where a tensor is in the file.

        Raises:
            OutlierMergeError: its bytes are not inside one record of the file.
        """
        strides, size = tensor.stride(), tensor.element_size()
        if not tensor.numel():
            return Strided(0, 0, strides)
        last = sum(
            (count - 1) * stride for count, stride in zip(tensor.shape, strides, strict=True)
        )
        num_bytes, address = (last + 1) * size, tensor.data_ptr()
        if tensor.numel() * size > self._num_bytes + _MAX_EXPANDED_BYTES:
            raise OutlierMergeError(
                f"{self._path}: tensor {name!r} of shape {quoted(list(tensor.shape))} has "
                f"{num_bytes:,} bytes in the file and is of {tensor.numel() * size:,}, more than "
                "the file has. Save a model whose tensors are contiguous()."
            )
        for start, end, to_offset in self._ranges:
            if start <= address < end:
                offset = address + to_offset
                if self._is_in_one_record(offset, offset + num_bytes):
                    return Strided(offset, num_bytes, strides, tensor.is_conj(), tensor.is_neg())
                raise OutlierMergeError(
                    f"{self._path}: tensor {name!r} needs {num_bytes:,} bytes from byte "
                    f"{offset:,} on, and its record in the file has fewer. Fetch it again."
                )
        raise OutlierMergeError(f"{self._path}: tensor {name!r} is not in it as it is. {_REWRITE}")

    def _is_in_one_record(self, start: int, end: int) -> bool:
        number = bisect(self._records, (start, self._num_bytes + 1)) - 1
        return number >= 0 and end <= self._records[number][1]


def _records(path: Path, descriptor: int) -> list[tuple[int, int]]:
    """Return where in an archive the bytes of its records start and end, sorted."""
    found = []
    try:
        with os.fdopen(os.dup(descriptor), "rb") as file, zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                file.seek(record.header_offset)
                header = file.read(30)  # lengths of name and extra field, which may differ here
                start = record.header_offset + 30 + sum(struct.unpack("<26xHH", header))
                found.append((start, start + record.file_size))
    except OSError as error:
        raise OutlierMergeError(f"{path}: cannot be read: {_first_line(error)}") from error
    except (zipfile.BadZipFile, struct.error, ValueError) as error:
        raise OutlierMergeError(
            f"{path}: broken or truncated: {_first_line(error)}. Fetch it again."
        ) from error
    return sorted(found)


def _mapped_records(path: Path, descriptor: int, content: object) -> list[tuple[int, int, int]]:
    """Tell where a file is mapped from the tensors that torch made, like `mapped_files`.

    Each storage is one record of the archive, at the same offset from its address: the first
    storage is the first record. Empty if that does not hold, as when a record is unused.
    """
    storages = _storages(content)
    records = {}
    with Path(path_of(descriptor, path)).open("rb") as file, zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if record.file_size and re.search(r"/data/\d+$", record.filename):
                file.seek(record.header_offset + 26)
                name_bytes, extra_bytes = struct.unpack("<2H", file.read(4))
                start = record.header_offset + 30 + name_bytes + extra_bytes
                records[start] = record.file_size
    if not storages or not records:
        return []
    to_offset = min(records) - min(storages)
    if {address + to_offset: size for address, size in storages.items()} != records:
        return []
    return [(address, address + size, to_offset) for address, size in storages.items()]


def _storages(content: object) -> dict[int, int]:
    """Return the addresses and sizes of the memory of all tensors in a pickle."""
    import torch

    found: dict[int, int] = {}
    pending, seen = [content], set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple, set)):
            pending += value
        elif isinstance(value, torch.Tensor) and str(value.layout) == "torch.strided":
            storage = value.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def _metas(path: Path, state: dict[str, Tensor], mapped: _Mapped) -> list[TensorMeta]:
    metas = []
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise OutlierMergeError(f"{path}: a tensor is named {name!r}, expected a text")
        if name == "__metadata__" or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise OutlierMergeError(
                f"{path}: no tensor of a safetensors file can be named {name!r}"
            )
        if str(tensor.layout) != "torch.strided" or tensor.is_nested or tensor.is_quantized:
            raise OutlierMergeError(
                f"{path}: tensor {name!r}: sparse, nested or quantised "
                f"({tensor.dtype}, {tensor.layout}), expected a dense one"
            )
        dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise OutlierMergeError(
                f"{path}: tensor {name!r}: unknown dtype {tensor.dtype}. "
                f"Supported: {', '.join(DTYPES)}"
            )
        if tensor.device.type != "cpu":
            raise OutlierMergeError(f"{path}: tensor {name!r} has no data ({tensor.device})")
        place = mapped.place(name, tensor)
        is_plain = not place.is_conjugate and not place.is_negative and tensor.is_contiguous()
        offset = place.offset if is_plain else None
        metas.append(TensorMeta(name, dtype, tuple(tensor.shape), path, offset))
    return metas


def _state_dict(path: Path, content: Any) -> tuple[dict[str, Tensor], list[str]]:
    import torch

    if not isinstance(content, dict):
        raise OutlierMergeError(
            f"{path}: holds a {type(content).__name__}, expected a dict of tensors"
        )
    places = _places(content) or {(): content}
    if len(places) > 1:
        found = listing(_place_name(keys) for keys in places)
        raise OutlierMergeError(
            f"{path}: holds tensors in several places, expected one state dict:\n{found}\n"
            f"Save the one that is meant alone: torch.save(torch.load({path.name!r}, "
            f"weights_only=True){''.join(f'[{key!r}]' for key in list(places)[-1])}, path)"
        )
    [(keys, state)] = places.items()
    states = [
        name
        for name, value in state.items()
        if str(name).endswith(EXTRA_STATE) and not isinstance(value, torch.Tensor)
    ]
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) and name not in states:
            raise OutlierMergeError(
                f"{path}: {name!r} is a {type(value).__name__}, expected a tensor. "
                "Save the model's state_dict() alone."
            )
    notes = []
    if states:
        notes.append(
            f"{path}: states of modules that are no tensors are left out:\n"
            f"{listing(states, limit=5)}"
        )
    if keys:
        notes.append(f"{path}: its tensors are those {_place_name(keys)}")
        others: list[str] = []
        for key in keys:
            others += [repr(other) for other in content if other != key]
            content = content[key]
        if others:
            notes[-1] += f"; what is beside them is not taken:\n{listing(others, limit=5)}"
    tensors = {name: value.detach() for name, value in state.items() if name not in states}
    return tensors, notes


def _places(
    value: dict[Any, Any], keys: tuple[str, ...] = ()
) -> dict[tuple[str, ...], dict[Any, Any]]:
    """Return the dicts that hold tensors, by the keys that lead to them."""
    import torch

    found = {}
    if any(isinstance(inner, torch.Tensor) for inner in value.values()):
        found[keys] = value
    if len(keys) < 2:
        for key in _NESTED:
            if isinstance(inner := value.get(key), dict):
                found |= _places(inner, (*keys, key))
    return found


def _place_name(keys: tuple[str, ...]) -> str:
    return "under " + " → ".join(map(repr, keys)) if keys else "at the top"


def _load(path: Path, descriptor: int) -> object:
    import torch

    try:
        _check_archive(path, descriptor)
        # Megatron stores module states as BytesIO, which runs no code.
        with torch.serialization.safe_globals([io.BytesIO]):
            return torch.load(
                path_of(descriptor, path), map_location="cpu", mmap=True, weights_only=True
            )
    except OutlierMergeError:
        raise
    except pickle.UnpicklingError as error:
        # torch ends with, for example, "WeightsUnpickler error: Unsupported global: GLOBAL
        # posix.system was not an allowed global by default."
        reason = str(error).rpartition("WeightsUnpickler error: ")[2]
        called = re.search(r"(?:GLOBAL|class) '?([\w.]+)", reason)
        if called is None:
            raise OutlierMergeError(
                f"{path}: its pickle is broken or not as torch.save writes it "
                f"({reason.strip().splitlines()[0]}). Fetch it again."
            ) from error
        raise OutlierMergeError(
            f"{path}: refused: the pickle holds more than tensors and could run code: it calls "
            f"{called[1]}. Convert it to safetensors where you trust it."
        ) from error
    except OSError as error:
        raise OutlierMergeError(f"{path}: cannot be read: {_first_line(error)}") from error
    except Exception as error:  # a broken pickle can make torch raise anything
        if "mmap can only be used" in str(error):
            raise OutlierMergeError(
                f"{path}: saved in the format before PyTorch 1.6, which cannot be read in pieces. "
                + _REWRITE
            ) from error
        raise OutlierMergeError(
            f"{path}: broken or truncated: {_first_line(error)}. Fetch it again."
        ) from error


def _check_archive(path: Path, descriptor: int) -> None:
    with Path(path_of(descriptor, path)).open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            orders = [r for r in records if r.filename.endswith("/byteorder") and r.file_size < 9]
            is_swapped = any(archive.read(r) != sys.byteorder.encode() for r in orders)
            for record in records:
                if record.filename.endswith("/data.pkl"):
                    _check_pickle(path, archive, record)
    names = {record.filename for record in records}
    if len(names) < len(records):
        raise OutlierMergeError(f"{path}: has two records of one name. Fetch it again.")
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise OutlierMergeError(
            f"{path}: a TorchScript program, which is code: refused. "
            "Save the state_dict() of torch.jit.load(path) where you trust it."
        )
    if is_swapped:
        raise OutlierMergeError(f"{path}: its bytes are in another order. {_REWRITE}")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise OutlierMergeError(f"{path}: compressed, which cannot be read in pieces. " + _REWRITE)


def _check_pickle(path: Path, archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    """Refuse a pickle that would keep torch busy."""
    if record.file_size > _MAX_PICKLE_BYTES:
        raise OutlierMergeError(
            f"{path}: its pickle has {record.file_size:,} bytes beside those of its tensors, more "
            f"than the {_MAX_PICKLE_BYTES:,} that are read. Convert it to safetensors where you "
            "trust it."
        )
    if record.compress_type != zipfile.ZIP_STORED:
        return  # torch refuses it
    data = archive.read(record)
    if not re.search(rb"c[^\n]{%d}" % _MAX_CALLED, data):
        return
    called = ""
    with suppress(ValueError, LookupError):  # torch stops at the same broken place
        for code, argument, _ in pickletools.genops(data):
            if code.name == "GLOBAL" and len(called := str(argument)) > _MAX_CALLED:
                break
    if len(called) > _MAX_CALLED:
        raise OutlierMergeError(
            f"{path}: refused: the pickle calls {shown(called)}, which is no function"
        )


def read_span(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return elements start to stop of a tensor, flattened, without copying the rest of it."""
    if tensor.is_contiguous():
        return tensor.reshape(-1)[start:stop]
    num_row_elements = max(1, tensor[0].numel())
    first_row, end_row = start // num_row_elements, -(-stop // num_row_elements)
    rows = tensor[first_row:end_row].reshape(-1)
    skipped = first_row * num_row_elements
    return rows[start - skipped : stop - skipped]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
