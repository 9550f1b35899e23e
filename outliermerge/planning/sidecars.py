"""The files beside the weights: which model they are from, and what the merge changes in them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from outliermerge.checkpoint.config import read_json, text_config
from outliermerge.checkpoint.files import check_file, names_in
from outliermerge.checkpoint.meta import DTYPES
from outliermerge.checkpoint.quantized import QUANTIZATION_KEYS
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.jobs import Input, Plan, Sidecar
from outliermerge.planning.differences import compare_configs, compare_sidecars
from outliermerge.planning.tokenizer_files import extend_files
from outliermerge.planning.vocabulary_config import fit_config
from outliermerge.spec.check import MergeSpec

_TOKENIZER = re.compile(
    r"(tokenizer|tokenization|vocab|merges|special_tokens_map|added_tokens|chat_template|spiece)"
    r"|\.(model|tiktoken|spm)$"
)
_PROCESSOR = re.compile(r"(pre)?processor_config\.json$|_processor.*\.py$|^processing_.*\.py$")


def choose_sidecars(
    spec: MergeSpec, inputs: Sequence[Input]
) -> tuple[tuple[Sidecar, ...], list[str]]:
    """Return the files that the output takes over, and how the models' files differ.

    Raises:
        SpecError: a `*_source` where the output is a single file.
        OutlierMergeError: configs that make the merge senseless.
    """
    document = spec.document
    if inputs[0].checkpoint.root.is_file():
        for key in ("config_source", "tokenizer_source", "processor_source"):
            if getattr(document, key) is not None:
                raise spec.source.error(
                    (key,), "the output is a single file, as the base is: nothing stands beside it"
                )
    sources = {
        "config": _source(inputs, document.config_source),
        "tokenizer": _source(inputs, document.tokenizer_source),
        "processor": _source(inputs, document.processor_source),
    }
    chosen = {}
    for kind, entry in sources.items():
        home, names = entry.home, entry.checkpoint.sidecars
        if kind == "tokenizer" and entry.tokenizer_home != home:
            home, names = entry.tokenizer_home, tuple(names_in(entry.tokenizer_home))
        for name in names:
            if _kind(name) == kind and (home / name).is_file():
                check_file(home / name, home)
                chosen[name] = Sidecar(name, home / name)
    differing: list[str] = []
    senseless: list[str] = []
    for file in _config_files(inputs[0]):
        configs = [(_in(e.reference, file), read_json(e.home / file)) for e in inputs]
        for found, new in zip((differing, senseless), compare_configs(configs), strict=True):
            found += new
    if senseless:
        raise OutlierMergeError(
            "the models' configs say that their weights do not mean the same, "
            f"whatever their shapes:\n{listing(senseless)}\n"
            "Merge models of one architecture; correct a config.json that is wrong."
        )
    differing += compare_sidecars([(entry.reference, entry.home) for entry in inputs])
    notes = []
    if differing:
        kept = ", ".join(f"{kind} of {entry.reference}" for kind, entry in sources.items())
        notes.append(f"the models' files differ; the output has the {kept}:\n{listing(differing)}")
    return tuple(chosen[name] for name in sorted(chosen)), notes


def _config_files(reference: Input) -> list[str]:
    """Return the configs that models are compared by: one, or one for each part of a pipeline."""
    if set(reference.checkpoint.components) == {""}:
        return ["config.json"]
    return [
        name
        for name in reference.checkpoint.sidecars
        if re.search(r"/(config|\w+_config)\.json$", name) and _kind(name) == "config"
    ]


def _in(reference: str, file: str) -> str:
    """Return how a model's config is named: with its folder where it is of a part."""
    folder = file.rpartition("/")[0]
    return f"{reference}/{folder}" if folder else reference


def _kind(name: str) -> str:
    file = name.rpartition("/")[2]
    if _PROCESSOR.search(file):
        return "processor"
    return "tokenizer" if _TOKENIZER.search(file) else "config"


def _source(inputs: Sequence[Input], wanted: str | None) -> Input:
    return next((entry for entry in inputs if entry.reference == wanted), inputs[0])


def sidecar_bytes(plan: Plan) -> dict[str, bytes]:
    """Return the contents of every file that is carried over, with what the merge changes."""
    contents = {sidecar.name: sidecar.path.read_bytes() for sidecar in plan.sidecars}
    for name, data in contents.items():
        if name.rpartition("/")[2] == "config.json":
            contents[name] = _changed_json(data, lambda config: _change_config(config, plan))
    fit_config(contents, plan.num_rows)
    extend_files(contents, plan)
    return contents


def _changed_json(data: bytes, change: Any) -> bytes:
    """Return JSON text after a change that tells whether it did anything; else the same bytes."""
    try:
        value = json.loads(data)
    except ValueError:
        return data
    if not change(value):
        return data
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _change_config(config: Any, plan: Plan) -> bool:
    document = plan.spec.document
    wanted = document.out_dtype or document.dtype
    if not isinstance(config, dict):
        return False
    changed = wanted is not None and _set_dtype(config, wanted)
    if (tie := document.tie_word_embeddings) is not None:
        for level in (config, text_config(config)):
            changed = changed or level.get("tie_word_embeddings") is not tie
            level["tie_word_embeddings"] = tie  # type: ignore[index]  # of the dict just parsed
    for part in (config, text_config(config)):
        for key in QUANTIZATION_KEYS:
            if isinstance(part, dict) and part.pop(key, None) is not None:
                changed = True
    return changed


def _set_dtype(config: Any, wanted: str) -> bool:
    changed = False
    if isinstance(config, dict):
        for key, value in config.items():
            if key in ("dtype", "torch_dtype") and value in DTYPES and value != wanted:
                config[key] = wanted
                changed = True
            elif key.endswith("_config"):
                changed = _set_dtype(value, wanted) or changed
    return changed
