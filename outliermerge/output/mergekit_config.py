"""The recipe of an output in mergekit's form, where mergekit would compute the same values.

The facts about mergekit are those of version 0.1.5.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.sources import FLOAT_DTYPES
from outliermerge.output.recipe import from_here, recipe_of, renamed
from outliermerge.planning.plan import Plan
from outliermerge.spec.inert import INERT_PARAMETERS
from outliermerge.spec.text import as_yaml

MERGEKIT_NAME = "mergekit_config.yml"
METHODS = (
    "linear",
    "task_arithmetic",
    "ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "ram",
    "ramplus_tl",
    "passthrough",
)
# Parameters that mergekit does not have, with what it does in their place.
_OF_OURS = {"trim": "tensor", "consensus": "sum"}
# Keys for what mergekit does otherwise or not at all, with what leaves them without effect.
_OTHERWISE: dict[str, Any] = {
    "modifiers": [],
    "stages": [],
    "rename": None,
    "missing": "error",
    "extra": "error",
    "unequal": "error",
    "other_files": "error",
    "vocabulary": "error",
    "tokenizer": None,
    "chat_template": None,
    "tie_word_embeddings": None,
    "config_source": "base",
    "tokenizer_source": "base",
}


def mergekit_text(plan: Plan) -> str | None:
    """Return the recipe in mergekit's form; None if mergekit would not compute these values.

    What stays different: mergekit drops some of several elements that tie with the last one that
    TIES keeps.
    """
    document = _document(plan)
    if document is None:
        return None
    ranks = "density" in plan.spec.method.parameters
    return (
        "# The recipe of this folder in mergekit's form; merged by outliermerge "
        f"{version('outliermerge')}.\n"
        + ("# Of elements that tie with the last one kept, mergekit keeps some, we all.\n" * ranks)
        + as_yaml(document)
    )


def _document(plan: Plan) -> dict[str, Any] | None:
    spec, recipe = plan.spec, renamed(recipe_of(plan), from_here)
    if spec.method.name not in METHODS or not _is_plain(plan):
        return None
    given = recipe.get("parameters", {})
    if any(given.get(name, theirs) != theirs for name, theirs in _OF_OURS.items()):
        return None
    if any(recipe.get(key, plain) != plain for key, plain in _OTHERWISE.items()):
        return None
    base, models = recipe.get("base_model"), []
    for model in spec.models:
        entry = recipe["models"][model.path[1]]
        if not entry.keys() <= {"model", "parameters"}:
            return None
        models.append({"model": entry["model"]})
        if own := _without_inert(entry.get("parameters", {})):
            models[-1]["parameters"] = own
    uses_base = spec.method.uses_base
    if isinstance(base, dict) or not all(
        _can_be_named(name)
        for name in [*([base] if uses_base else []), *(m["model"] for m in models)]
    ):
        return None
    (compute_dtype,) = {job.compute_dtype for job in plan.jobs}
    (out_dtype,) = {job.output.dtype.name for job in plan.jobs}
    return {
        "merge_method": spec.method.name,
        # Of other methods the base only gives the layout; mergekit would average it in.
        **({"base_model": base} if uses_base else {}),
        "models": models,
        "parameters": _parameters(plan, given),
        "dtype": compute_dtype,
        "out_dtype": out_dtype,
    }


def _is_plain(plan: Plan) -> bool:
    """Tell whether all tensors are stored weights of whole models, paired by their names."""
    sources = [source for job in plan.jobs for _, source in job.sources]
    return (
        not plan.is_one_file
        and plan.stacked is None
        and not plan.modules
        and set(plan.components) == {""}
        and not (plan.tied or plan.dropped or plan.checks or plan.num_rows or plan.added_tokens)
        and not any(entry.renamed for entry in plan.inputs)
        and all(source.stored == (source,) for source in sources)
        and {job.output.dtype.name for job in plan.jobs} <= {*FLOAT_DTYPES}
        and len({job.output.dtype.name for job in plan.jobs}) == 1
        and len({job.compute_dtype for job in plan.jobs}) == 1
        and all(read_json(entry.home / "config.json") for entry in plan.inputs)
    )


def _can_be_named(name: str) -> bool:
    """Tell whether mergekit reads a name as we do: `+` is for adapters, `@` for revisions."""
    return "+" not in name and ("@" not in name or not Path(name).exists())


def _without_inert(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name not in INERT_PARAMETERS}


def _parameters(plan: Plan, given: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of the merge, with our defaults written out.

    Our filters may leave tensors to the default; mergekit's may not.
    """
    found = dict[str, Any]()
    for name, parameter in plan.spec.method.parameters.items():
        if name in INERT_PARAMETERS or name in _OF_OURS:
            continue
        default = parameter.default
        setting = given.get(name, default)
        entries = [setting] if isinstance(setting, dict) else setting
        if isinstance(entries, list) and isinstance(entries[0], dict):
            takes_all = any(entry.get("filter") in (None, "*") for entry in entries)
            setting = entries if takes_all else [*entries, {"value": default}]
        found[name] = setting
    return found
