"""PyTorch's pickled files (.bin, .pt, .pth), opened by memory map and without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING

from outliermerge.checkpoint.meta import DTYPES, TensorMeta, refuse_lfs_pointer
from outliermerge.errors import OutlierMergeError

if TYPE_CHECKING:
    from torch import Tensor


def load_mapped(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors, their data still on disk.

    Raises:
        OutlierMergeError: the pickle would run code, is not a dict of tensors, is broken, or is
            of the format before PyTorch 1.6, which cannot be mapped.
    """
    import torch

    refuse_lfs_pointer(path)
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise OutlierMergeError(
            f"{path}: refused: the pickle holds more than tensors and could run code "
            f"({_first_line(error)}). Convert it to safetensors where you trust it."
        ) from error
    except RuntimeError as error:
        if "mmap can only be used" in str(error):
            raise OutlierMergeError(
                f"{path}: saved in the format before PyTorch 1.6, which cannot be read in pieces. "
                "Rewrite it once: torch.save(torch.load(path, weights_only=True), path)"
            ) from error
        raise OutlierMergeError(
            f"{path}: broken or truncated: {_first_line(error)}. Fetch it again."
        ) from error
    except (OSError, EOFError, ValueError) as error:
        raise OutlierMergeError(f"{path}: cannot be read: {_first_line(error)}") from error
    if not isinstance(state, dict):
        raise OutlierMergeError(
            f"{path}: holds a {type(state).__name__}, expected a dict of tensors"
        )
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise OutlierMergeError(
                f"{path}: {name!r} is a {type(value).__name__}, expected a tensor. "
                "Save the model's state_dict() alone."
            )
    return state


def read_metas(path: Path) -> list[TensorMeta]:
    """Return the tensors of a pickled file in its order."""
    metas = []
    for name, tensor in load_mapped(path).items():
        if not isinstance(name, str):
            raise OutlierMergeError(f"{path}: a tensor is named {name!r}, expected a text")
        dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        plain = str(tensor.layout) == "torch.strided" and not tensor.is_nested
        if dtype is None or not plain:
            raise OutlierMergeError(
                f"{path}: tensor {name!r}: unknown dtype {tensor.dtype} ({tensor.layout}). "
                f"Supported: {', '.join(DTYPES)}"
            )
        if tensor.device.type != "cpu":
            raise OutlierMergeError(f"{path}: tensor {name!r} has no data ({tensor.device})")
        metas.append(TensorMeta(name, dtype, tuple(tensor.shape), path, None))
    return metas


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
