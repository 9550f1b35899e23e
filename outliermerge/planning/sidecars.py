"""The files beside the weights: which model they are from, and what the merge changes in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json, text_config
from outliermerge.checkpoint.files import check_file, names_in
from outliermerge.checkpoint.meta import DTYPES
from outliermerge.checkpoint.tokens import read_tokens
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.jobs import Input, Plan, Sidecar
from outliermerge.planning.differences import compare_configs, compare_sidecars
from outliermerge.planning.parts import differing_parts
from outliermerge.planning.vocabulary import Alignment
from outliermerge.spec.check import MergeSpec

_TOKENIZER = re.compile(
    r"(tokenizer|tokenization|vocab|merges|special_tokens_map|added_tokens|chat_template|spiece)"
    r"|\.(model|tiktoken|spm)$"
)
_PROCESSOR = re.compile(r"(pre)?processor_config\.json$|_processor.*\.py$|^processing_.*\.py$")


def choose_sidecars(
    spec: MergeSpec, inputs: Sequence[Input], alignment: Alignment
) -> tuple[tuple[Sidecar, ...], list[str]]:
    """Return the files that the output takes over, and how the models' files differ.

    Raises:
        SpecError: a `*_source` where the output is a single file.
        OutlierMergeError: configs that make the merge senseless, or a tokenizer that does not fit
            the output's rows.
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
    differing += differing_parts(inputs)
    notes = []
    if differing:
        kept = ", ".join(f"{kind} of {entry.reference}" for kind, entry in sources.items())
        notes.append(f"the models' files differ; the output has the {kept}:\n{listing(differing)}")
    if sources["tokenizer"] is not inputs[0]:
        _check_tokenizer(inputs[0], sources["tokenizer"], alignment)
    if alignment.added_tokens and not _covers(sources["tokenizer"], alignment):
        _check_extensible(sources["tokenizer"], inputs, alignment)
        notes.append(f"{len(alignment.added_tokens)} tokens are added to the tokenizer")
    return tuple(chosen[name] for name in sorted(chosen)), notes


def _config_files(reference: Input) -> list[str]:
    """Return the configs that models are compared by: the root's, and one for each part."""
    components, sidecars = reference.checkpoint.components, reference.checkpoint.sidecars
    if set(components) == {""} and "modules.json" not in sidecars:
        return ["config.json"]
    return [
        *(["config.json"] if "" in components else []),
        *(
            name
            for name in sidecars
            if re.search(r"/(config|\w+_config)\.json$", name) and _kind(name) == "config"
        ),
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


def _check_tokenizer(reference: Input, entry: Input, alignment: Alignment) -> None:
    """Refuse a tokenizer whose ids are not the output's rows."""
    ours = dict(read_tokens(reference.tokenizer_home) or {})
    ours |= {number: token for number, token, _ in alignment.added_tokens}
    theirs = read_tokens(entry.tokenizer_home) or {}
    wrong = [
        f"{number}: {ours[number]!r} in the output, {token!r} in that tokenizer"
        for number, token in sorted(theirs.items())
        if ours.get(number, token) != token
    ]
    if wrong:
        raise OutlierMergeError(
            f"tokenizer_source: the ids of {entry.reference} are not the rows of the output:\n"
            f"{listing(wrong, limit=5)}"
        )
    num_rows = alignment.num_rows or text_config(read_json(reference.home / "config.json")).get(
        "vocab_size"
    )
    beyond = [
        f"{n}: {token!r}" for n, token in sorted(theirs.items()) if num_rows and n >= num_rows
    ]
    if beyond:
        raise OutlierMergeError(
            f"tokenizer_source: {entry.reference} has tokens beyond the output's {num_rows} rows:\n"
            f"{listing(beyond, limit=5)}\n`vocabulary: union` keeps their rows."
        )


def _covers(entry: Input, alignment: Alignment) -> bool:
    tokens = read_tokens(entry.tokenizer_home) or {}
    return all(tokens.get(number) == token for number, token, _ in alignment.added_tokens)


def _check_extensible(entry: Input, inputs: Sequence[Input], alignment: Alignment) -> None:
    if not (entry.home / "tokenizer.json").is_file():
        raise OutlierMergeError(
            f"vocabulary: union has to add tokens to the tokenizer of {entry.reference}, "
            "which has no tokenizer.json: save it with transformers' fast tokenizer first"
        )
    ordinary = [
        f"{token!r} of {inputs[model].reference}"
        for _, token, model in alignment.added_tokens
        if token not in _added_entries(inputs[model].tokenizer_home)
    ]
    if ordinary:
        raise OutlierMergeError(
            "vocabulary: union can only add tokens that were added to a tokenizer whole; these "
            f"are pieces of the tokenizer's own model:\n{listing(ordinary, limit=5)}\n"
            "`vocabulary: base` leaves them out; `tokenizer_source` takes a tokenizer that has all."
        )


def _added_entries(home: Path) -> dict[str, dict[str, Any]]:
    entries = read_json(home / "tokenizer.json").get("added_tokens", [])
    return {entry["content"]: entry for entry in entries}


def sidecar_bytes(plan: Plan) -> dict[str, bytes]:
    """Return the contents of every file that is carried over, with what the merge changes."""
    contents = {sidecar.name: sidecar.path.read_bytes() for sidecar in plan.sidecars}
    for name, data in contents.items():
        if name.rpartition("/")[2] == "config.json":
            contents[name] = _changed_json(data, lambda config: _change_config(config, plan))
    present = {
        entry["id"]
        for entry in json.loads(contents.get("tokenizer.json", b"{}")).get("added_tokens", [])
    } if plan.added_tokens else set()  # fmt: skip
    for number, token, model in plan.added_tokens:
        if number in present:
            continue
        entry = _added_entries(plan.inputs[model].tokenizer_home)[token] | {"id": number}
        for name, change in _TOKEN_FILES.items():
            if name in contents:
                contents[name] = _changed_json(contents[name], lambda v, c=change, e=entry: c(v, e))
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
    changed = config.pop("transformers_weights", None) is not None or changed  # a file's name
    for part in (config, text_config(config)):
        if isinstance(part, dict) and part.pop("quantization_config", None) is not None:
            changed = True
    if plan.num_rows is not None and "vocab_size" in (text := text_config(config)):
        changed = changed or text["vocab_size"] != plan.num_rows
        text["vocab_size"] = plan.num_rows  # type: ignore[index]  # of the dict just parsed
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


def _extend_tokenizer(tokenizer: Any, entry: Mapping[str, Any]) -> bool:
    tokenizer["added_tokens"] = [*tokenizer.get("added_tokens", []), entry]
    return True


def _extend_config(config: Any, entry: Mapping[str, Any]) -> bool:
    if "added_tokens_decoder" not in config:
        return False
    described = {key: value for key, value in entry.items() if key != "id"}
    config["added_tokens_decoder"][str(entry["id"])] = described
    return True


def _extend_list(tokens: Any, entry: Mapping[str, Any]) -> bool:
    tokens[entry["content"]] = entry["id"]
    return True


_TOKEN_FILES = {
    "tokenizer.json": _extend_tokenizer,
    "tokenizer_config.json": _extend_config,
    "added_tokens.json": _extend_list,
}
