"""The modules of a spec: parts of the base model, each with a merge of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from outliermerge.errors import quoted
from outliermerge.spec.settings import SettingError, SpecPath
from outliermerge.spec.text import Mistakes, SpecText
from outliermerge.spec.validation import describe

MODULES, KEEP = "modules", "keep"
_MAX_MODULES = 1000

# Keys at the top that a module takes, unless it has its own.
_INHERITED = ("base_model", "merge_method", "parameters", "missing", "extra", "unequal",
              "other_files", "seed", "dtype", "convert")  # fmt: skip
OF_WHOLE = ("other_files", "seed", "dtype", "convert")
"""Keys at the top that are for all modules, and that none may have."""
_NOT_IN_MODULE = (*OF_WHOLE, "out_dtype", "format", "quantize", "rounding", "rename", "layout",
                  "tokenizer", "tokenizer_source", "chat_template", "config_source",
                  "processor_source", "tie_word_embeddings", "stack", "stages", MODULES,
                  "output")  # fmt: skip
_ONLY_IN_MODULE = ("models", "slices", "modifiers", "vocabulary")
OF_MODULE = (*(key for key in _INHERITED if key not in OF_WHOLE), *_ONLY_IN_MODULE)
"""The keys of a module, besides its own filters."""


def split(
    raw: Mapping[str, Any], mistakes: Mistakes
) -> tuple[dict[str, Any], dict[str, tuple[dict[str, Any], SpecText]]]:
    """Return a spec with modules as a copy of its base, and each module's merge with its text.

    What is wrong with the keys is gathered.

    Raises:
        SpecError: there are too many modules.
    """
    source = mistakes.source
    for key in _ONLY_IN_MODULE:
        if raw.get(key) is not None:
            said = f"stands beside `{MODULES}`: write it in the modules that it is for"
            mistakes.found.append(source.error((key,), said, at_key=True))
    base = raw.get("base_model")
    name = base.get("model") if isinstance(base, dict) else base
    if name is None:
        said = f"`base_model` is missing: it gives all that none of the `{MODULES}` merges"
        mistakes.found.append(source.error((), said))
    modules = raw[MODULES]
    if not isinstance(modules, dict) or not modules:
        said = f"found {describe(modules)}, expected a mapping of parts of the base model to merges"
        mistakes.found.append(source.error((MODULES,), said if modules != {} else "is empty"))
        modules = {}
    if len(modules) > _MAX_MODULES:
        said = f"found {len(modules):,} modules, expected at most {_MAX_MODULES:,}"
        raise source.error((MODULES,), said, at_key=True)
    found = {}
    for part, entry in modules.items():
        path: SpecPath = (MODULES, part)
        if not isinstance(entry, dict):
            said = f"found {describe(entry)}, expected a merge with `models` or `slices`"
            mistakes.found.append(source.error(path, said))
            continue
        for key in _NOT_IN_MODULE:
            if key in entry:
                said = "a module has no such key: it belongs to the whole merge, at the top"
                mistakes.found.append(source.error((*path, key), said, at_key=True))
        found[part] = _merge_of(raw, part, entry, source)
    own = (*_INHERITED[1:], *_ONLY_IN_MODULE, MODULES)
    outer = {k: v for k, v in raw.items() if k not in own or k in OF_WHOLE}
    return outer | {"merge_method": "passthrough", "models": [{"model": name}]}, found


def _merge_of(
    raw: Mapping[str, Any], part: str, entry: Mapping[str, Any], source: SpecText
) -> tuple[dict[str, Any], SpecText]:
    """Return a module's merge with the keys that it takes from the top."""
    taken = [key for key in _INHERITED if key in raw and key not in entry]
    if "merge_method" in entry and "parameters" in taken:
        taken.remove("parameters")  # they are those of the method at the top
    own = {k: v for k, v in entry.items() if k not in (KEEP, *_NOT_IN_MODULE)}
    shared = raw.get("parameters")
    if "parameters" not in taken and "merge_method" not in entry and isinstance(shared, dict):
        given = entry["parameters"] or {}
        own["parameters"] = shared | given if isinstance(given, dict) else given
    if own.get("base_model", "") is None:
        del own["base_model"]
    text = source.part((MODULES, part), said=f"module {quoted(part)}: ")
    keys, values = (
        {p: mark for p, mark in all_.items() if p and p[0] in taken} | its
        for all_, its in ((source.keys, text.keys), (source.values, text.values))
    )
    return {key: raw[key] for key in taken} | own, replace(text, keys=keys, values=values)


def keep_of(entry: Mapping[str, Any], path: SpecPath) -> tuple[str, ...]:
    """Return a module's filters for tensors that stay the base model's.

    Raises:
        SettingError: it is neither a text nor a list of texts.
    """
    raw = entry.get(KEEP)
    given = [raw] if isinstance(raw, str) else raw if raw is not None else []
    if not isinstance(given, list):
        raise SettingError(path, f"found {describe(raw)}, expected parts of names of tensors")
    for index, each in enumerate(given):
        if not isinstance(each, str) or not each:
            where = (*path, index) if isinstance(raw, list) else path
            raise SettingError(where, f"found {describe(each)}, expected a part of a tensor's name")
    return tuple(given)
