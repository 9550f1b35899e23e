"""The recipe of an output: its spec with the models named so that any folder finds them."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Container, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from outliermerge.checkpoint.adapters.config import base_of_adapter, is_adapter
from outliermerge.errors import as_path, direct
from outliermerge.execution.jobs import JobResult
from outliermerge.planning.inputs import is_combined, split_reference
from outliermerge.planning.plan import Options, Plan
from outliermerge.spec.modules import MODULES
from outliermerge.spec.moe import MoeSpec
from outliermerge.spec.stages import NAME, STAGES
from outliermerge.spec.text import as_yaml
from outliermerge.spec.tokenizer import BASE, UNION, plain_reference
from outliermerge.spec.transplant import TransplantSpec, words_of
from outliermerge.storage.stand_ins import elsewhere

RECIPE_NAME = "recipe.yaml"
_SOURCES = ("config_source", "tokenizer_source", "processor_source")
_SNAPSHOT = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[^/]+)/")


def recipe_of(plan: Plan) -> dict[str, Any]:
    """Return the spec of a plan with absolute paths, and hub ids with their commits.

    It names no output, so that it does not replace the one that it is in.
    """
    commits = _commits(plan)
    if isinstance(plan.spec, (MoeSpec, TransplantSpec)):
        document = plan.spec.lasting(partial(_lasting, commits=commits, has_base=True))
    else:
        document = renamed(plan.spec.as_dict(), partial(_lasting, commits=commits))
    document.pop("output", None)
    return document


class Name(Protocol):
    """Gives a model another name; has_base: an adapter is applied to a base of the merge."""

    def __call__(self, reference: str, *, has_base: bool) -> str: ...


def renamed(document: Mapping[str, Any], name: Name, stages: Container[str] = ()) -> dict[str, Any]:
    """Return a spec with other names for its models.

    Args:
        name: gives them.
        stages: names that are left as they are; those of the spec's own stages are, too.
    """
    document, names = dict(document), dict[str, str]()
    if entries := document.get(STAGES):
        stages = {entry[NAME] for entry in entries}
        document[STAGES] = [renamed(entry, name, stages) for entry in entries]
    base = document.get("base_model")

    def new(reference: str, *, has_base: bool = base is not None) -> str:
        return reference if reference in stages else name(reference, has_base=has_base)

    if isinstance(base, dict):
        names[base["model"]] = new(base["model"], has_base=False)
        document["base_model"] = base | {"model": names[base["model"]]}
    elif base is not None:
        document["base_model"] = names[base] = new(base, has_base=False)
    models = []
    for entry in document.get("models", ()):
        names.setdefault(entry["model"], new(entry["model"]))
        entry = entry | {"model": names[entry["model"]]}
        if "auxiliary" in entry:
            entry["auxiliary"] = {k: new(place) for k, place in entry["auxiliary"].items()}
        if "statistics" in entry:
            entry["statistics"] = new(entry["statistics"])
        models.append(entry)
    if models:
        document["models"] = models
    if "slices" in document:
        document["slices"] = [
            one
            | {
                "sources": [
                    source | {"model": names.setdefault(source["model"], new(source["model"]))}
                    for source in one["sources"]
                ]
            }
            for one in document["slices"]
        ]
    if modules := document.get(MODULES):
        document[MODULES] = {
            part: _module(entry, base, name, stages) for part, entry in modules.items()
        }

    def of_owner(written: str) -> str:
        plain = plain_reference(written) or BASE  # it may stand with mergekit's `model:` before it
        if plain in names:
            return names[plain]
        return written if plain in (BASE, UNION) else new(plain, has_base=True)

    if isinstance(tokenizer := document.get("tokenizer"), dict):
        document["tokenizer"] = _named(tokenizer, of_owner)
    if (layout := document.get("layout")) in names:
        document["layout"] = names[layout]
    return document | {key: of_owner(document[key]) for key in _SOURCES if key in document}


def _module(
    entry: Mapping[str, Any], base: Any, name: Name, stages: Container[str]
) -> dict[str, Any]:
    """Return a module with other names for its models; its base is that of the whole merge."""
    if "base_model" in entry:
        return renamed(entry, name, stages)
    found = renamed({"base_model": base, **entry}, name, stages)
    del found["base_model"]
    return found


def _named(tokenizer: dict[str, Any], name: Callable[[str], str]) -> dict[str, Any]:
    """Return what a spec says of the tokenizer, with other names for its models."""
    tokens: dict[str, Any] = {}
    for token, entry in (tokenizer.get("tokens") or {}).items():
        source = entry.get("source")
        if isinstance(source, str):
            entry = entry | {"source": name(source)}
        elif isinstance(source, dict) and "model" in source:
            entry = entry | {"source": source | {"model": name(source["model"])}}
        tokens[token] = entry
    changed: dict[str, Any] = {"tokens": tokens} if tokens else {}
    if "source" in tokenizer:
        changed["source"] = name(tokenizer["source"])
    return tokenizer | changed


def from_here(reference: str, *, has_base: bool = True) -> str:
    """Return a reference as a person writes it: from the present folder, if it is there or beside.

    >>> from_here(f"{Path.cwd()}/models/base"), from_here("org/base+models/lora")
    ('models/base', 'org/base+models/lora')
    """
    here = Path.cwd()
    near = here.parent if here.parent.name else here
    parts = split_reference(reference) if is_combined(reference) else [reference]
    return "+".join(
        os.path.relpath(part, here) if Path(part).is_relative_to(near) else part for part in parts
    )


def recipe_text(plan: Plan, options: Options, results: Mapping[str, JobResult]) -> str:
    """Return the text of an output's recipe, with the command that runs it."""
    return (
        f"# The recipe of this folder, merged by outliermerge {version('outliermerge')}. "
        "The same merge again:\n"
        f"#   {command(plan, options, results)}\n"
        "# Paths are absolute and hub ids have their commits: it runs from any folder.\n"
        + as_yaml(recipe_of(plan))
    )


def command(plan: Plan, options: Options, results: Mapping[str, JobResult]) -> str:
    """Return the command that makes an output again from its recipe, byte for byte.

    Args:
        results: of the output's tensors; they tell which flags were needed.
    """
    words = ["outliermerge", plan.spec.command, RECIPE_NAME, "DIR"]
    if isinstance(plan.spec, TransplantSpec):
        model, donor, *flags = map(shlex.quote, words_of(recipe_of(plan)))
        words[2:] = [model, donor, "DIR", *flags]
    if plan.shard_bytes is not None:
        words.append(f"--shard-size {plan.shard_bytes}")
    if options.device != "cpu":
        words.append(f"--device {options.device.partition(':')[0]}")
    elif not options.kernels:
        words.append("--no-kernels")
    if any(result.non_finite for result in results.values()):
        words.append("--allow-non-finite")
    return " ".join(words)


def _commits(plan: Plan) -> dict[str, set[str]]:
    """Return by repository of the hub the commits whose files were read."""
    found: dict[str, set[str]] = {}
    roots = [model.checkpoint.root / "-" for model in plan.models]
    for path in (*roots, *(path for path, _ in plan.files)):
        if match := _SNAPSHOT.search(path.as_posix()):
            found.setdefault(f"{match['owner']}/{match['name']}", set()).add(match["commit"])
    for model in plan.models:
        there = elsewhere(model.checkpoint.root)
        if there is not None and there.version:
            repository = there.address.partition("@")[0]
            for name in (repository, repository.removeprefix("hf://")):
                found.setdefault(name, set()).add(there.version)
    return found


def _lasting(reference: str, commits: Mapping[str, set[str]], *, has_base: bool) -> str:
    """Return a reference that means the same model in any folder, at any time."""
    path = as_path(reference)
    if is_combined(reference):
        stem, adapter = split_reference(reference)
        # With the model before the `+`, the adapter's own base does not matter.
        stem, adapter = (_lasting(part, commits, has_base=True) for part in (stem, adapter))
        return f"{stem}+{adapter}"
    if not path.exists():
        repository, _, revision = reference.partition("@")
        known = commits.get(repository, set())
        if revision in known or len(known) != 1:
            return reference
        return f"{repository}@{next(iter(known))}"
    path = direct(path.absolute())
    own_base = None if has_base or not _is_adapter(path) else base_of_adapter(path)
    if own_base is None:
        return str(path)
    return f"{_lasting(own_base, commits, has_base=False)}+{path}"


def _is_adapter(path: Path) -> bool:
    return path.is_dir() and is_adapter(path)
