"""The models of a spec: the base model, those that are merged, and what each says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from outliermerge.checkpoint.measured import KINDS
from outliermerge.errors import OutlierMergeError, as_path, quoted, suggest
from outliermerge.methods.contract import MergeMethod
from outliermerge.spec.document import EXTRA, MISSING, ModelEntry, SpecDocument
from outliermerge.spec.parameters import parameter_settings
from outliermerge.spec.rename import Rename, parse_rename
from outliermerge.spec.settings import Setting, SpecPath, parse_policy
from outliermerge.spec.text import Mistakes, SpecText

STAND_IN = "?"
"""Stands for a model's name that is wrong, so that the rest of the file can be checked."""

_REQUIRED = {
    "weight": (
        *("linear", "nuslerp", "multislerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"),
        *("breadcrumbs", "breadcrumbs_ties", "della", "della_linear"),
    ),
    "t": ("slerp", "nearswap"),
}
"""The parameters that mergekit refuses a file without, and its methods that have them."""


_FOR_MORE = {"slerp": "multislerp or karcher", "nuslerp": "multislerp or karcher"}


@dataclass(frozen=True)
class ModelSpec:
    """A model of a spec.

    Attributes:
        settings: the settings of the method's parameters for this model.
        missing, extra: the model's own policies, which take precedence over the spec's.
        auxiliary: the folder or file of each auxiliary input, by its name in the method.
        statistics: the folder of what `measure` has written, for the other auxiliary inputs.
    """

    reference: str
    path: SpecPath
    rename: Rename = field(default_factory=Rename)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    missing: Setting = field(default_factory=Setting)
    extra: Setting = field(default_factory=Setting)
    auxiliary: Mapping[str, str] = field(default_factory=dict)
    statistics: str = ""


def base_of(document: SpecDocument, source: SpecText) -> ModelSpec | None:
    """Return the base model, or None."""
    entry = document.base_model
    if entry is None:
        return None
    path: SpecPath = ("base_model",)
    try:
        identity(entry.model)
    except OutlierMergeError as error:
        raise source.error(path, str(error)) from error
    return ModelSpec(entry.model, path, parse_rename(entry.rename, (*path, "rename")))


def models_of(
    entries: Sequence[ModelEntry],
    method: MergeMethod,
    base: ModelSpec | None,
    mistakes: Mistakes,
    *,
    at: SpecPath = ("models",),
    are_all: bool,
) -> tuple[ModelSpec, ...]:
    """Return the merged models.

    Args:
        at: the keys that lead to the entries.
        are_all: no entry of the spec is wrong, so that their number can be.
    """
    source = mistakes.source
    models: list[ModelSpec] = []
    places: dict[str, int] = {}
    base_identity = identity(base.reference) if base else None
    for index, entry in enumerate(entries):
        path: SpecPath = (*at, index)
        is_base = False
        if entry.model != STAND_IN:
            one = partial(_is_base, entry, base_identity, places, path, source)
            is_base = mistakes.attempt(one, False)
        if is_base:
            mistakes.attempt(partial(_refuse_on_base, entry, method, path, source), None)
            if method.needs_base:
                continue
        where = (*path, "parameters")
        models.append(
            ModelSpec(
                reference=entry.model,
                path=path,
                rename=mistakes.attempt(
                    partial(parse_rename, entry.rename, (*path, "rename")), Rename()
                ),
                settings=parameter_settings(
                    entry.parameters, method, where, mistakes, of_model=True
                ),
                missing=mistakes.attempt(
                    partial(parse_policy, entry.missing, MISSING, (*path, "missing")), Setting()
                ),
                extra=mistakes.attempt(
                    partial(parse_policy, entry.extra, EXTRA, (*path, "extra")), Setting()
                ),
                auxiliary=mistakes.attempt(partial(_auxiliary, entry, method, path, source), {}),
                statistics=entry.statistics or "",
            )
        )
    if base is not None and method.base_as == "first":
        models.insert(0, base)
    elif base is not None and method.base_as == "model" and base_identity not in places:
        models.append(base)
    if are_all:
        mistakes.attempt(partial(_check_number, len(models), method, at, source), None)
    return tuple(models)


def check_required(
    method: MergeMethod,
    settings: Mapping[str, Setting],
    models: Sequence[ModelSpec],
    mistakes: Mistakes,
) -> list[str]:
    """Return a note on a parameter that mergekit requires, and that nothing gives.

    Where the parameter is misspelt or misplaced, what was passed over becomes an error again:
    mergekit takes it for none, and refuses the file. A number of models that is larger than that
    of the models is an error, too.
    """
    notes = []
    for name, parameter in method.parameters.items():
        entries = settings[name].entries if name in settings else ()
        values = [(value, entry.path) for entry in entries for value in entry.values]
        for value, path in values or [(parameter.default, models[-1].path if models else ())]:
            try:
                parameter.check_count(value, len(models))
            except ValueError as error:
                said = str(error) if values else f"{name} is {value} if it is not given: {error}"
                mistakes.found.append(mistakes.source.error(path, said))
    for name, methods in _REQUIRED.items() if mistakes.source.lenient else ():
        given = name in settings or any(name in model.settings for model in models)
        if given or method.name not in methods:
            continue
        meant = [error for error in mistakes.warnings if error.meant == name]
        mistakes.found += meant
        if not meant:
            default = method.parameters[name].default
            notes.append(f"no `{name}` is given: {default:g} is used; mergekit refuses such a file")
    return notes


def _is_base(
    entry: ModelEntry,
    base: str | None,
    places: dict[str, int],
    path: SpecPath,
    source: SpecText,
) -> bool:
    """Tell whether an entry is the base model; note it among those that there are."""
    try:
        own = identity(entry.model)
    except OutlierMergeError as error:
        raise source.error((*path, "model"), str(error)) from error
    index = int(path[-1])
    if (first := places.setdefault(own, index)) != index:
        raise source.error(
            (*path, "model"), f"{quoted(entry.model)} stands twice, first as {path[-2]}[{first}]"
        )
    return own == base


def _check_number(number: int, method: MergeMethod, at: SpecPath, source: SpecText) -> None:
    least, most = method.min_models, method.max_models
    if number >= least and (most is None or number <= most):
        return
    wanted = f"at least {least}" if most is None else f"{least} to {most}"
    wanted = str(least) if most == least else wanted
    besides = " besides the base model" if method.uses_base else (
        ", the base model among them" if method.base_as == "first" else ""
    )  # fmt: skip
    said = f"{method.name} takes {wanted} model(s){besides}, found {number}"
    if number < least:
        raise source.error(at, f"{said}: add {least - number}")
    more = f", or take {_FOR_MORE[method.name]}" if method.name in _FOR_MORE else ""
    raise source.error(at, f"{said}: leave {number - (most or 0)} out{more}")


def _auxiliary(
    entry: ModelEntry, method: MergeMethod, path: SpecPath, source: SpecText
) -> Mapping[str, str]:
    for name in entry.auxiliary:
        if name not in method.auxiliary:
            raise source.error(
                (*path, "auxiliary", name),
                f"{method.name} takes no {quoted(name)}. {suggest(name, method.auxiliary)}",
                at_key=True,
            )
    if entry.statistics is not None and not method.auxiliary:
        raise source.error(
            (*path, "statistics"), f"{method.name} takes no statistics. Remove them.", at_key=True
        )
    for name in method.auxiliary:
        if name not in entry.auxiliary and entry.statistics is None:
            way = f"`auxiliary: {{{name}: FILE}}`"
            if name in KINDS:
                way = f"`statistics: DIR`, which `outliermerge measure` writes, or {way}"
            raise source.error(path, f"{method.name} needs {name!r} of each model: {way}")
    return entry.auxiliary


def _refuse_on_base(
    entry: ModelEntry, method: MergeMethod, path: SpecPath, source: SpecText
) -> None:
    if entry.parameters and (method.uses_base or method.base_as == "first"):
        raise source.error(
            (*path, "parameters"),
            f"{quoted(entry.model)} is the base model: "
            + ("it has no task vector, so its" if method.uses_base else f"for {method.name} its")
            + " parameters have no effect. Remove them.",
            at_key=True,
        )
    for key in ("rename", "missing", "extra", "auxiliary", "statistics"):
        if getattr(entry, key) not in (None, {}):
            where = " Write it under `base_model`." if key == "rename" else " Remove it."
            raise source.error(
                (*path, key), f"{quoted(entry.model)} is the base model.{where}", at_key=True
            )


def identity(reference: str) -> str:
    """Return what two names of one model have in common."""
    path = as_path(reference)
    try:
        return str(path.resolve()) if path.exists() else reference
    except (OSError, RuntimeError):  # opening the model later reports what is wrong
        return reference
