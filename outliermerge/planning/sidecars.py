"""The files beside the weights: which model they come from, and how the merge changes them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import language_levels, read_json
from outliermerge.checkpoint.layout import component_of
from outliermerge.checkpoint.quantized.opened import QUANTIZATION_KEYS
from outliermerge.checkpoint.sources import FLOAT_DTYPES
from outliermerge.checkpoint.tokens import TOKEN_FILES
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.planning.chat_templates import with_template
from outliermerge.planning.differences import compare_configs, compare_sidecars
from outliermerge.planning.owners import (
    KINDS,
    Beside,
    Kind,
    choose_files,
    input_named,
    is_loaded,
    kind_of,
    missing_code,
)
from outliermerge.planning.parts import differing_parts
from outliermerge.planning.plan import Input, Plan, Sidecar, Stacked
from outliermerge.planning.slice_config import stacked_config, with_depth
from outliermerge.planning.special_tokens import special_tokens_that_differ
from outliermerge.planning.tokenizer_files import extend_files
from outliermerge.planning.tokenizer_plan import TokenizerPlan
from outliermerge.planning.vocabulary_config import fit_config, reached
from outliermerge.planning.vocabulary_ids import fit_ids
from outliermerge.spec.check import MergeSpec
from outliermerge.storage.files import small_bytes
from outliermerge.storage.json_text import json_bytes

_SOURCES = ("config_source", "tokenizer_source", "processor_source")


def choose_sidecars(
    spec: MergeSpec,
    inputs: Sequence[Input],
    tokenizer: TokenizerPlan | None = None,
    stacked: Stacked | None = None,
    owner: Input | None = None,
    left_out: Collection[str] = (),
) -> tuple[tuple[Sidecar, ...], list[str]]:
    """Return the files that the output takes over, and how the models' files differ.

    Args:
        tokenizer: what the merge does to the tokenizer.
        stacked: which layers are sliced: models may have different numbers of these.
        owner: the model whose tokenizer the output has; by default the first.
        left_out: files of the tokenizer that would contradict the output's.

    Raises:
        SpecError: the spec has a `*_source`, but the output is a single file.
        OutlierMergeError: the configs differ so that a merge makes no sense.
    """
    document = spec.document
    if inputs[0].is_one_file:
        for key in (*_SOURCES, "tokenizer", "chat_template"):
            if getattr(document, key) is not None:
                raise spec.source.error(
                    (key,), "the output is a single file, as the base is: nothing stands beside it"
                )
    sources: dict[Kind, Input] = {
        "config": input_named(inputs, document.config_source),
        "tokenizer": owner or inputs[0],
        "processor": input_named(inputs, document.processor_source),
    }
    besides: dict[str, Beside] = {}
    if not inputs[0].is_one_file:
        besides = {entry.reference: Beside.of(entry) for entry in inputs}
    owners = {
        kind: besides.get(entry.reference) or Beside.of(entry)
        for kind, entry in sources.items()
        if besides
    }
    _check_owners(spec, {kind: o for kind, o in owners.items() if sources[kind] is not inputs[0]})
    chosen = choose_files(owners)
    notes = [*missing_code(chosen)]
    if differing := _differences(inputs, list(besides.values()), stacked):
        kept = ", ".join(
            f"{kind} of {shown(entry.reference)}"
            if kind != "tokenizer" or tokenizer is None
            else "tokenizer that the spec asks for"
            for kind, entry in sources.items()
            if kind == "config" or any(beside.files[kind] for beside in besides.values())
        )
        notes.append(f"the models' files differ; the output has the {kept}:\n{listing(differing)}")
    if tokenizer is None:
        notes += special_tokens_that_differ(sources["config"], sources["tokenizer"])
    names = sorted(name for name in chosen if name not in left_out)
    return tuple(Sidecar(name, chosen[name]) for name in names), notes


def _check_owners(spec: MergeSpec, owners: Mapping[Kind, Beside]) -> None:
    """Refuse a `*_source` that has no file of the kind it is named for."""
    for kind, beside in owners.items():
        key = f"{kind}_source"
        has = beside.has_tokenizer if kind == "tokenizer" else bool(beside.files[kind])
        named = spec.tokenizer_owner if kind == "tokenizer" else getattr(spec.document, key)
        if named is not None and not has:
            path = spec.tokenizer.path if spec.tokenizer and kind == "tokenizer" else (key,)
            raise spec.source.error(
                path, f"{shown(beside.reference)} has no {kind} files that the output could have"
            )


def _differences(
    inputs: Sequence[Input], besides: Sequence[Beside], stacked: Stacked | None
) -> list[str]:
    """Return how the models' configs and files differ.

    Raises:
        OutlierMergeError: the configs differ so that a merge makes no sense.
    """
    differing: list[str] = []
    senseless: list[str] = []
    files = _config_files(inputs[0])
    for file in files:
        read = [read_json(entry.home / file) for entry in inputs]
        if stacked is not None:
            read = [with_depth(one, stacked, number) for number, one in enumerate(read)]
        configs = [(_in(e.reference, file), one) for e, one in zip(inputs, read, strict=True)]
        for found, new in zip((differing, senseless), compare_configs(configs), strict=True):
            found += new
    if senseless:
        raise OutlierMergeError(
            "the models' configs say that their weights do not mean the same, "
            f"whatever their shapes:\n{listing(senseless)}\n"
            "Merge models of one architecture; correct a config.json that is wrong."
        )
    if besides:
        differing += compare_sidecars(
            [(b.reference, _compared(b, besides, files)) for b in besides]
        )
    return [*differing, *differing_parts(inputs)]


def _compared(beside: Beside, all_: Sequence[Beside], but: Container[str]) -> dict[str, Path]:
    """Return a model's files to compare, except those in `but`, which are compared by values.

    Files that no loader reads are compared only if all models have them.
    """
    every = [{name for kind in KINDS for name in b.files[kind]} for b in all_]
    shared = set.intersection(*every)
    return {
        name: path
        for kind in KINDS
        for name, path in beside.files[kind].items()
        if name not in but and (kind != "config" or name in shared or is_loaded(name))
    }


def _config_files(reference: Input) -> list[str]:
    """Return the configs to compare: the root's, and one for each part."""
    components, sidecars = reference.checkpoint.components, reference.checkpoint.sidecars
    if set(components) == {""} and "modules.json" not in sidecars:
        return ["config.json"]
    return [
        *(["config.json"] if "" in components else []),
        *(
            name
            for name in sidecars
            if re.search(r"/(config|\w+_config)\.json$", name) and kind_of(name) == "config"
        ),
    ]


def _in(reference: str, file: str) -> str:
    """Return the name of a model's config in messages: with its folder if it is a part's."""
    folder = file.rpartition("/")[0]
    return f"{reference}/{folder}" if folder else reference


def sidecar_contents(plan: Plan) -> dict[str, bytes | Path]:
    """Return the content of every file that is carried over: bytes if the merge may change it.

    For the others the path of the file, which is copied.
    """
    files: dict[str, bytes | Path] = {sidecar.name: sidecar.path for sidecar in plan.sidecars}
    contents = {
        sidecar.name: small_bytes(sidecar.path)
        for sidecar in plan.sidecars
        if sidecar.path.name == "config.json" or sidecar.path.name in TOKEN_FILES
    }
    for name, data in contents.items():
        folder, _, file = name.rpartition("/")
        if file == "config.json":
            dtypes = _stored_dtypes(plan, folder)
            if plan.config is not None:
                data = json_bytes(plan.config)
            contents[name] = _changed_json(data, partial(_change_config, plan=plan, dtypes=dtypes))
    fit_config(contents, plan.num_rows)
    extend_files(contents, plan)
    if plan.tokenizer is not None:
        contents |= plan.tokenizer.files
    for name, values in plan.ids.items():
        data = contents.get(name) or small_bytes(_path(files[name]))
        contents[name] = fit_ids(data, values)
    if plan.chat_template is not None:
        contents |= with_template(files | contents, plan.chat_template.text)
    return files | contents


def _path(content: bytes | Path) -> Path:
    assert isinstance(content, Path)
    return content


def _changed_json(data: bytes, change: Any) -> bytes:
    """Return JSON text after a change; the same bytes if `change` says that nothing changed."""
    try:
        value = json.loads(data)
    except ValueError:
        return data
    if not change(value):
        return data
    return json_bytes(value)


def _stored_dtypes(plan: Plan, folder: str) -> list[str]:
    """Return the floating-point dtypes of a component's tensors, the most frequent first."""
    sizes: Counter[str] = Counter()
    for job in plan.jobs:
        in_it = component_of(job.name, plan.components) == folder
        if in_it and job.output.dtype.name in FLOAT_DTYPES:
            sizes[job.output.dtype.name] += math.prod(job.output.shape)
    return [name for name, _ in sizes.most_common()]


def _change_config(config: Any, plan: Plan, dtypes: Sequence[str]) -> bool:
    document = plan.spec.document
    if not isinstance(config, dict):
        return False
    changed = False
    if plan.stacked is not None:
        fitted = with_layers(config, plan.spec, plan.inputs, plan.stacked)
        changed = fitted != config
        config |= fitted
    changed = _set_dtype(config, document.out_dtype or document.dtype, dtypes) or changed
    changed = config.pop("transformers_weights", None) is not None or changed  # names a file
    if (tie := document.tie_word_embeddings) is not None:
        for path in language_levels(config):
            level = reached(config, path)
            changed = changed or level.get("tie_word_embeddings") is not tie
            level["tie_word_embeddings"] = tie
    changed = _drop_quantization(config) or changed
    if plan.quantization is not None:
        config["quantization_config"] = dict(plan.quantization)
    return changed or plan.quantization is not None


def with_layers(
    config: Mapping[str, Any], spec: MergeSpec, inputs: Sequence[Input], stacked: Stacked
) -> dict[str, Any]:
    """Return the config of an output of slices, from that of the config's source."""
    owner = input_named(inputs, spec.document.config_source)
    number = next(n for n, entry in enumerate(inputs) if entry is owner)
    return stacked_config(config, stacked, inputs, number)


def _drop_quantization(config: Any) -> bool:
    """Remove the keys that say that weights are quantised, at all levels of a config."""
    if not isinstance(config, dict):
        return False
    dropped = any([config.pop(key, None) is not None for key in QUANTIZATION_KEYS])
    for part in config.values():
        dropped = _drop_quantization(part) or dropped
    return dropped


def _set_dtype(config: dict[str, Any], wanted: str | None, stored: Sequence[str]) -> bool:
    """Set the dtype in a config and its parts to the stored dtype, because loaders use it.

    If tensors have several dtypes, a config that names one of them is left as it is.
    """
    changed = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value in FLOAT_DTYPES:
            right = wanted or (value if value in stored or not stored else stored[0])
            config[key] = right
            changed = changed or value != right
        elif isinstance(value, dict) and key not in QUANTIZATION_KEYS:
            changed = _set_dtype(value, wanted, stored) or changed
    return changed
