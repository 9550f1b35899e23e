"""A process that asks transformers of which kinds the modules of a model are.

The model is built on torch's meta device, as for `output/load_worker.py`: no memory is needed, and
no code of a model's folder is run.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from outliermerge.output.load_worker import Unknown, check_type, find_class, load_transformers


def main() -> None:
    """Read a part, as `load_worker.check_part` takes it, and write what its class says of it."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # text that the libraries print goes to standard error
    found = asked(json.load(sys.stdin))
    with answer:
        json.dump(found, answer)


def asked(part: dict[str, Any]) -> dict[str, Any]:
    """Return by module its kind, and of those with packed experts their parameters; or why not.

    The kinds are those of `holding.LAYERS` and `holding.EXPERTS`, or `other`.
    """
    try:
        modules = _modules(part)
        kinds = {name: _kind(module) for name, module in modules.items()}
    except Unknown as unknown:
        return {"unknown": str(unknown)}
    except Exception as error:  # from_pretrained may raise anything for a wrong config
        return {"unknown": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    orders = {
        name: [parameter for parameter, _ in modules[name].named_parameters(recurse=False)]
        for name, kind in kinds.items()
        if kind.endswith("experts")
    }
    return {"kinds": kinds, "orders": orders}


def _modules(part: dict[str, Any]) -> dict[str, Any]:
    if part["library"] != "transformers":
        raise Unknown(f"{part['class']} is no class of transformers")
    model_class = find_class(part["library"], part["class"], part["config"])
    check_type(model_class, part["config"])
    model, _ = load_transformers(model_class, part["config"], part["tensors"])
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if next(module.parameters(recurse=False), None) is not None
    }


def _kind(module: Any) -> str:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Conv2d):
        return "convolution" if module.groups == 1 else "other"
    kinds = {nn.Linear: "linear", Conv1D: "transposed", nn.Embedding: "embedding"}
    if kind := next((kinds[cls] for cls in kinds if isinstance(module, cls)), ""):
        return kind
    shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
    if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
        return "other"
    if any(len(shape) == 3 and shape[0] > 1 for shape in shapes):
        return "turned experts" if getattr(module, "is_transposed", False) else "experts"
    return "other"
