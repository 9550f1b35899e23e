"""The recipe of an output in mergekit's form, where mergekit means the same by it.

The file is for readers of an output who use mergekit: it says in their words what was merged, and
mergekit makes the same model of it. Where a method drops elements at random, that is a model by the
same recipe from another draw. The facts about mergekit are those of version 0.1.5.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.sources import FLOAT_DTYPES
from outliermerge.methods.contract import MergeMethod
from outliermerge.output.recipe import from_here, recipe_of, renamed
from outliermerge.planning.plan import Plan
from outliermerge.spec.inert import INERT_PARAMETERS
from outliermerge.spec.text import as_yaml

MERGEKIT_NAME = "mergekit_config.yml"
_RANKED = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")
_DARE = ("dare_linear", "dare_ties")
_DRAWN = (*_DARE, "della", "della_linear")
METHODS = (
    *("linear", "task_arithmetic", *_RANKED, *_DRAWN, "ram", "ramplus_tl", "passthrough"),
    *("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "nearswap", "arcee_fusion"),
)
# Parameters that mergekit does not have, with what it does in their place.
_OF_OURS = {"trim": "tensor", "consensus": "sum", "compat": "mergekit", "rescale_by": "l1"}
# Keys for what mergekit does otherwise or not at all, with what leaves them without effect.
_OTHERWISE: dict[str, Any] = {
    "modifiers": [],
    "quantize": None,
    "format": "safetensors",
    "rounding": "nearest",
    "stack": None,
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
    """Return the recipe in mergekit's form; None if mergekit would not make this model of it."""
    document = _document(plan)
    if document is None:
        return None
    lines = [
        "The recipe of this folder in mergekit's form; merged by outliermerge "
        f"{version('outliermerge')}."
    ]
    method = plan.spec.method.name
    if method in _RANKED:
        lines.append("Of elements that tie with the last one kept, mergekit keeps some, we all.")
    if method in _DRAWN:
        lines.append("mergekit drops other elements at random; its seed is --random-seed.")
    if method in _DARE:
        lines.append("It scales what is kept to the L1 norm; we divide by the density, by default.")
    return "".join(f"# {line}\n" for line in lines) + as_yaml(document)


def _document(plan: Plan) -> dict[str, Any] | None:
    spec, recipe = plan.spec, renamed(recipe_of(plan), from_here)
    if spec.method.name not in METHODS or not _is_plain(plan):
        return None
    given = recipe.get("parameters", {})
    if _has_ours(spec.method, given):
        return None
    if any(recipe.get(key, plain) != plain for key, plain in _OTHERWISE.items()):
        return None
    base = recipe.get("base_model")
    # Of other methods the base only gives the layout; mergekit would average it in.
    if spec.method.base_as == "reference" and not spec.method.uses_base:
        base = None
    if isinstance(base, dict):
        return None
    merged = _slices(plan, recipe, base) if spec.slices else _models(plan, recipe, base)
    if merged is None:
        return None
    (compute_dtype,) = {job.compute_dtype for job in plan.jobs}
    (out_dtype,) = {job.output.dtype.name for job in plan.jobs}
    return {
        "merge_method": spec.method.name,
        **({"base_model": base} if base is not None else {}),
        **merged,
        "parameters": _parameters(plan, given),
        "dtype": compute_dtype,
        "out_dtype": out_dtype,
    }


def _has_ours(method: MergeMethod, given: dict[str, Any]) -> bool:
    """Tell whether a merge does what mergekit has no parameter for."""
    wanted = {name: theirs for name, theirs in _OF_OURS.items() if name in method.parameters}
    if method.name in _DARE:  # the two ways differ less than two draws do
        del wanted["rescale_by"]
    return any(
        given.get(name, method.parameters[name].default) != theirs
        for name, theirs in wanted.items()
    )


def _models(plan: Plan, recipe: dict[str, Any], base: str | None) -> dict[str, Any] | None:
    entries = recipe["models"]
    models = [m.path[1] for m in plan.spec.models if m.path[0] == "models"]
    found = _entries([entries[number] for number in models], "model")
    if found is None or (base is not None and not _can_be_named(base)):
        return None
    return {"models": found}


def _slices(plan: Plan, recipe: dict[str, Any], base: str | None) -> dict[str, Any] | None:
    given, found = recipe.get("parameters", {}), []
    for one, written in zip(plan.spec.slices, recipe["slices"], strict=True):
        own = written.get("parameters", {})
        sources = _entries(written["sources"], "model", "layer_range")
        if sources is None or _has_ours(plan.spec.method, given | own):
            return None
        if base is not None and base not in (source["model"] for source in sources):
            assert plan.spec.base is not None
            layers = one.ranges[plan.spec.base.reference]
            sources.append({"model": base, "layer_range": [*layers]})
        own = _theirs(own)
        found.append({"sources": sources, **({"parameters": own} if own else {})})
    # mergekit takes as many models for what is behind the layers as for what is before them.
    is_alike = len(found[0]["sources"]) == len(found[-1]["sources"])
    return {"slices": found} if is_alike else None


def _entries(entries: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]] | None:
    """Return what a spec says of its models; None if mergekit would read it otherwise."""
    found = []
    for entry in entries:
        if not entry.keys() <= {*keys, "parameters"} or not _can_be_named(entry["model"]):
            return None
        own = _theirs(entry.get("parameters", {}))
        found.append({key: entry[key] for key in keys})
        found[-1] |= {"parameters": own} if own else {}
    return found


def _is_plain(plan: Plan) -> bool:
    """Tell whether all tensors are stored weights of whole models, paired by their names."""
    sources = [source for job in plan.jobs for _, source in job.sources]
    return (
        not plan.is_one_file
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


def _theirs(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return what mergekit knows of some parameters, and takes into account."""
    unknown = {*INERT_PARAMETERS, *_OF_OURS}
    return {name: value for name, value in parameters.items() if name not in unknown}


def _parameters(plan: Plan, given: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of the merge, with our defaults written out.

    Our filters may leave tensors to the default; mergekit's may not.
    """
    found = dict[str, Any]()
    for name, parameter in _theirs({**plan.spec.method.parameters}).items():
        default = parameter.default
        setting = given.get(name, default)
        entries = [setting] if isinstance(setting, dict) else setting
        if isinstance(entries, list) and isinstance(entries[0], dict):
            takes_all = any(entry.get("filter") in (None, "*") for entry in entries)
            setting = entries if takes_all else [*entries, {"value": default}]
        found[name] = setting
    return found
