"""A process that asks transformers and diffusers what loading a model would find.

The model is built on torch's meta device. The libraries' own from_pretrained loads it from tensors
that have shapes and no data. So the libraries themselves decide which names they rename, tie, pack
or ignore, and no memory or disk space is needed. Code in a model's folder is never run
(trust_remote_code is off).
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_MAX_WORDS = 400


def main() -> None:
    """Read a request from standard input and write the findings to standard output.

    The request is a list of pairs: a part of an output, and the same part of its base or None. The
    base's part is checked only if the output's has problems. The answer has a pair of findings for
    each, as `check_part` returns them.
    """
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # text that the libraries print goes to standard error
    pairs = json.load(sys.stdin)
    with answer:
        json.dump([check_pair(*pair) for pair in pairs], answer)


def check_pair(
    output: Mapping[str, Any], base: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the findings on an output's part and, if it has problems, on the base's part."""
    found = check_part(output)
    clean = "by" in found and not (found["missing"] or found["unexpected"] or found["mismatched"])
    return found, None if clean or base is None else check_part(base)


def check_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return what from_pretrained finds when it loads a model.

    Args:
        part: the model's "library" and "class", its "config", and "tensors", the shapes by name.

    Returns:
        A dict with "by" (library and version), the "missing" and "unexpected" names, the
        "mismatched" [name, found, expected], the "num_rows" of the input embeddings or None, and
        the "tied" [name, other]. Or a dict with "unknown", the reason why the model cannot be
        checked here. Or a dict with "error", the message with which the library fails.
    """
    library, name = part["library"], part["class"]
    try:
        found = _load(library, name, part)
    except Unknown as unknown:
        return {"unknown": str(unknown)}
    except ImportError as error:
        return {"unknown": f"{name} cannot be imported: {_words(error)}"}
    except Exception as error:  # from_pretrained may raise anything for a wrong config
        return {"error": f"{type(error).__name__}: {_words(error)}"}
    return found


class Unknown(Exception):
    """A model cannot be built here, whatever its weights are; the text says why."""


def _words(error: Exception) -> str:
    """Return an error's text in one line, without the escape codes of terminal colours."""
    text = " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(error)).split())
    return text if len(text) <= _MAX_WORDS else text[:_MAX_WORDS] + "…"


def _load(library: str, name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    model_class = find_class(library, name, part["config"])
    if library == "transformers":
        check_type(model_class, part["config"])
    if issubclass(model_class, import_module("transformers").PreTrainedModel):
        by = f"transformers {import_module('transformers').__version__}"
        model, info = load_transformers(model_class, part["config"], part["tensors"])
    else:
        by = f"diffusers {import_module('diffusers').__version__}"
        model, info = _load_diffusers(model_class, part["config"], part["tensors"])
    return {
        "by": by,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(map(_mismatch, info["mismatched_keys"])),
        "num_rows": _num_rows(model),
        "tied": _tied(model, part["tensors"]),
    }


def _tied(model: Any, names: Mapping[str, Any]) -> list[list[str]]:
    """Return the pairs of stored tensors that a class of transformers 5 ties."""
    ties = getattr(model, "all_tied_weights_keys", None)
    pairs = ties.items() if isinstance(ties, dict) else ()
    return sorted([name, other] for name, other in pairs if {name, other} <= names.keys())


def find_class(library: str, name: str, config: Mapping[str, Any]) -> Any:
    """Return a model's class; raise Unknown if there is none here."""
    if find_spec("transformers") is None or (
        library != "transformers" and find_spec("diffusers") is None
    ):
        wanted = "transformers" if library == "transformers" else "diffusers and transformers"
        raise Unknown(f"{wanted} must be installed")
    if library in ("transformers", "diffusers"):
        module: Any = import_module(library)
    else:  # a subpackage of diffusers.pipelines, or a module in the pipeline's folder
        module = getattr(import_module("diffusers.pipelines"), library, None)
    found = getattr(module, name, None)
    if isinstance(found, type) and callable(getattr(found, "from_pretrained", None)):
        return found
    if config.get("auto_map"):
        raise Unknown(f"{name} needs its own code, which is not run")
    version = getattr(import_module("transformers"), "__version__", "")
    known = f"{library} {version}" if library == "transformers" else library
    raise Unknown(f"{known} has no {name}")


def check_type(model_class: Any, config: Mapping[str, Any]) -> None:
    """Refuse a model type that AutoConfig does not know, even if the class accepts it."""
    kind = config.get("model_type")
    known = import_module("transformers").CONFIG_MAPPING
    own = getattr(getattr(model_class, "config_class", None), "model_type", None)
    if kind is None or kind in known or kind == own:
        return
    if config.get("auto_map"):
        raise Unknown(f"its model_type {kind!r} needs its own code, which is not run")
    raise ValueError(f"model_type {kind!r} of its config is none that transformers knows")


def load_transformers(
    model_class: Any, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> tuple[Any, Mapping[str, Any]]:
    """Return a model on the meta device, and what transformers found in loading it."""
    import torch

    if find_spec("accelerate") is None:
        # All tensors go to one device; for that, transformers only checks that accelerate is
        # installed.
        for home in ("transformers.integrations.accelerate", "transformers.modeling_utils"):
            asks: Any = import_module(home)
            if hasattr(asks, "is_accelerate_available"):
                asks.is_accelerate_available = lambda *_: True
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        filled = model_class.config_class.from_pretrained(folder)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found: tuple[Any, Mapping[str, Any]] = model_class.from_pretrained(
        None,
        config=filled,
        state_dict=tensors,
        device_map="meta",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return found


def _load_diffusers(
    model_class: Any, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> tuple[Any, Mapping[str, Any]]:
    """Return a model on the meta device, and what transformers found in loading it."""
    """Load from a file of tensors without data: diffusers takes no tensors from memory."""
    import torch

    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        torch.save(tensors, Path(folder) / "diffusion_pytorch_model.bin")
        found: tuple[Any, Mapping[str, Any]] = model_class.from_pretrained(
            folder,
            device_map="meta",
            use_safetensors=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
        )
    return found


def _mismatch(entry: Any) -> list[Any]:
    """Return name, found and expected shape; transformers 4 may give only the name."""
    if isinstance(entry, str):
        return [entry, [], []]
    name, found, expected = entry
    return [name, list(found), list(expected)]


def _num_rows(model: Any) -> int | None:
    """Return the rows of the input embeddings; None if a model has no token embeddings."""
    from torch import nn

    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None
