"""PyTorch's pickled files (.bin, .pt, .pth, .ckpt): memory-mapped, and without running code."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.files import check_file
from outliermerge.checkpoint.meta import DTYPES, EXTRA_STATE, TensorMeta, refuse_lfs_pointer
from outliermerge.errors import OutlierMergeError, listing

if TYPE_CHECKING:
    from torch import Tensor

# Under which training code keeps a model's state dict beside what else it saves.
_NESTED = ("state_dict", "model", "model_state_dict", "module", "params", "params_ema")
_REWRITE = "Rewrite it once: torch.save(torch.load(path, weights_only=True), path)"


def load_mapped(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors, their data still on disk, also where they are nested in it.

    Raises:
        OutlierMergeError: the pickle would run code, holds no dict of tensors or several, is
            broken, or is of a kind that cannot be mapped: compressed, or older than PyTorch 1.6.
    """
    return _state_dict(path)[0]


def read_pickle(path: Path) -> tuple[list[TensorMeta], list[str]]:
    """Return the tensors of a pickled file in its order, and notes on where they were."""
    state, notes = _state_dict(path)
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
        metas.append(TensorMeta(name, dtype, tuple(tensor.shape), path, None))
    return metas, notes


def _state_dict(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    import torch

    content = _load(path)
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


def _load(path: Path) -> object:
    import torch

    check_file(path)
    refuse_lfs_pointer(path)
    try:
        _check_archive(path)
        # Megatron keeps states of modules as such, which run no code.
        with torch.serialization.safe_globals([io.BytesIO]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
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
    except Exception as error:  # a broken pickle can make torch stumble over anything
        if "mmap can only be used" in str(error):
            raise OutlierMergeError(
                f"{path}: saved in the format before PyTorch 1.6, which cannot be read in pieces. "
                + _REWRITE
            ) from error
        raise OutlierMergeError(
            f"{path}: broken or truncated: {_first_line(error)}. Fetch it again."
        ) from error


def _check_archive(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise OutlierMergeError(
            f"{path}: a TorchScript program, which is code: refused. "
            "Save the state_dict() of torch.jit.load(path) where you trust it."
        )
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise OutlierMergeError(f"{path}: compressed, which cannot be read in pieces. " + _REWRITE)


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
