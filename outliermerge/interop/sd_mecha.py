"""The methods as merge methods of sd-mecha, for recipes of any models that it knows.

sd-mecha reads the models, computes recipes key by key in several threads, and writes the output.
A method gets one tensor of all models at a time.
"""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

from sd_mecha.extensions import merge_methods

from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.table import METHODS
from outliermerge.tensors import merge_tensors

if TYPE_CHECKING:
    import torch

PREFIX = "outliermerge_"
WITH_BASE = "_with_base"
# One merge uses all processors. Several at once would each start as many threads.
_ONE_AT_A_TIME = threading.Lock()


def register() -> dict[str, Any]:
    """Register all methods in sd-mecha, with `outliermerge_` before their names.

    A method takes the base model first if it has one, then the models. Methods that can do without
    a base, but merge task vectors with one, are registered twice, as `nuslerp` and as
    `nuslerp_with_base`. A parameter that each model may have its own value of is a number for all
    models, or a text of one number a model: "0.3, 0.7". A second call changes nothing.

    Returns:
        sd-mecha's merge methods, by their names without `outliermerge_`.
    """
    wanted = dict(METHODS)
    for name, method in METHODS.items():
        if method.with_base is not None:
            wanted[name + WITH_BASE] = method.with_base
    present = {one.identifier: one for one in merge_methods.get_all()}
    return {
        name: present.get(PREFIX + name) or _registered(PREFIX + name, method)
        for name, method in wanted.items()
    }


def _registered(identifier: str, method: MergeMethod) -> Any:
    """Register a method under a name, and return sd-mecha's object of it."""

    def merge(*tensors: torch.Tensor, key: str, **given: Any) -> torch.Tensor:
        values: dict[str, Any] = {
            one.name: _of_models(given[one.python_name])
            if one.per_model
            else given[one.python_name]
            for one in method.parameters.values()
        }
        if method.takes_context:
            values["seed"] = given["seed"]
        with _ONE_AT_A_TIME:
            return merge_tensors(
                tensors[1:] if method.needs_base else tensors,
                base=tensors[0] if method.needs_base else None,
                method=method,
                name=key,
                **values,
            )

    merge.__signature__ = _signature(method)  # type: ignore[attr-defined]  # inspect looks for it
    merge.__doc__ = method.documentation
    return merge_methods.merge_method(merge, identifier=identifier)


def _signature(method: MergeMethod) -> inspect.Signature:
    """Return the signature by which sd-mecha knows what a method takes."""
    from torch import Tensor

    weights = merge_methods.Parameter(Tensor, "weight")
    parts = [inspect.Parameter("models", inspect.Parameter.VAR_POSITIONAL, annotation=weights)]
    if method.needs_base:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parts.insert(0, inspect.Parameter("base", kind, annotation=weights))
    parts += [
        _keyword(one.python_name, one.default, merge_methods.T if one.per_model else one.type)
        for one in method.parameters.values()
    ]
    if method.takes_context:
        parts.append(_keyword("seed", 0, int))
    # Methods with such a parameter get the tensor's name.
    parts.append(inspect.Parameter("more", inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parts, return_annotation=merge_methods.Return(Tensor, "weight"))


def _keyword(name: str, default: object, kind: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=merge_methods.Parameter(kind),
    )


def _of_models(value: Any) -> Any:
    """Return the value of all models, or a list of one value a model."""
    return value.split(",") if isinstance(value, str) and "," in value else value
