"""The table of merge methods."""

from __future__ import annotations

from outliermerge.errors import SpecError, suggest
from outliermerge.methods.averaging import linear, passthrough
from outliermerge.methods.contract import MergeMethod, import_method
from outliermerge.methods.min_sigma import min_sigma
from outliermerge.methods.ram import ram, ramplus_tl
from outliermerge.methods.sce import sce
from outliermerge.methods.sparse import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
)
from outliermerge.methods.task_arithmetic import task_arithmetic, ties

METHODS: dict[str, MergeMethod] = {
    method.name: method
    for method in (
        min_sigma,
        linear,
        task_arithmetic,
        ties,
        passthrough,
        dare_linear,
        dare_ties,
        breadcrumbs,
        breadcrumbs_ties,
        della,
        della_linear,
        sce,
        ram,
        ramplus_tl,
    )
}


def find_method(name: str) -> MergeMethod:
    """Return a method by its name in the table, or by `package.module:function`.

    Raises:
        SpecError: there is no such method.

    >>> find_method("min_sigma").space
    'delta'
    """
    if ":" in name:
        return import_method(name)
    if name not in METHODS:
        raise SpecError(
            f"unknown merge method {name!r}. {suggest(name, METHODS)} "
            "Your own is named package.module:function."
        )
    return METHODS[name]
