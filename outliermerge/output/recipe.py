"""The recipe of an output: its spec with the models named so that any folder finds them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.adapters.config import base_of_adapter, is_adapter
from outliermerge.errors import as_path
from outliermerge.execution.jobs import JobResult
from outliermerge.planning.inputs import split_reference
from outliermerge.planning.plan import Options, Plan
from outliermerge.spec.moe import MoeSpec
from outliermerge.spec.text import as_yaml

RECIPE_NAME = "recipe.yaml"
_SOURCES = ("config_source", "tokenizer_source", "processor_source")
_SNAPSHOT = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[^/]+)/")


def recipe_of(plan: Plan) -> dict[str, Any]:
    """Return the spec of a plan with absolute paths, and hub ids with their commits.

    It names no output, so that it does not replace the one that it is in.
    """
    commits = _commits(plan)
    has_base = plan.spec.base is not None

    def lasting(reference: str) -> str:
        return _lasting(reference, commits, has_base=has_base)

    if isinstance(plan.spec, MoeSpec):
        document = plan.spec.lasting(lasting)
        document.pop("output", None)
        return document
    document = plan.spec.as_dict()
    document.pop("output", None)
    names = {}
    base = document.get("base_model")
    if isinstance(base, dict):
        names[base["model"]] = _lasting(base["model"], commits, has_base=False)
        document["base_model"] = base | {"model": names[base["model"]]}
    elif base is not None:
        document["base_model"] = names[base] = _lasting(base, commits, has_base=False)
    models = []
    for entry in document["models"]:
        names.setdefault(entry["model"], lasting(entry["model"]))
        entry = entry | {"model": names[entry["model"]]}
        if "auxiliary" in entry:
            entry["auxiliary"] = {k: lasting(place) for k, place in entry["auxiliary"].items()}
        models.append(entry)
    document["models"] = models
    return document | {
        key: names.get(document[key], document[key]) for key in _SOURCES if key in document
    }


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
    roots = [entry.checkpoint.root / "-" for entry in plan.inputs]
    for path in (*roots, *(path for path, _ in plan.files)):
        if match := _SNAPSHOT.search(path.as_posix()):
            found.setdefault(f"{match['owner']}/{match['name']}", set()).add(match["commit"])
    return found


def _lasting(reference: str, commits: Mapping[str, set[str]], *, has_base: bool) -> str:
    """Return a reference that means the same model in any folder, at any time."""
    path = as_path(reference)
    if "+" in reference and not path.exists():
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
    path = path.absolute()
    own_base = None if has_base or not _is_adapter(path) else base_of_adapter(path)
    if own_base is None:
        return str(path)
    return f"{_lasting(own_base, commits, has_base=False)}+{path}"


def _is_adapter(path: Path) -> bool:
    return path.is_dir() and is_adapter(path)
