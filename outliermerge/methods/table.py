"""The table of merge methods."""

from __future__ import annotations

from outliermerge.arguments import checked
from outliermerge.errors import SpecError, nearest, quoted
from outliermerge.methods.arcee_fusion import arcee_fusion
from outliermerge.methods.averaging import linear, passthrough
from outliermerge.methods.competition import pcb
from outliermerge.methods.consensus_masks import consensus_ta
from outliermerge.methods.contract import MergeMethod, import_method
from outliermerge.methods.elsewhere import known_elsewhere
from outliermerge.methods.fisher import fisher
from outliermerge.methods.isotropic import iso_c, iso_cts
from outliermerge.methods.lines import lines
from outliermerge.methods.mats import mats, mats_fisher
from outliermerge.methods.metagpt import metagpt
from outliermerge.methods.min_sigma import min_sigma
from outliermerge.methods.model_stock import model_stock
from outliermerge.methods.nearswap import nearswap
from outliermerge.methods.nuslerp import nuslerp
from outliermerge.methods.ram import ram, ramplus_tl
from outliermerge.methods.regmean import regmean
from outliermerge.methods.resmerge import resmerge
from outliermerge.methods.sce import sce
from outliermerge.methods.singular_vectors import tsv_m
from outliermerge.methods.sparse import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
)
from outliermerge.methods.spherical import karcher, multislerp, slerp
from outliermerge.methods.svc import svc
from outliermerge.methods.task_arithmetic import task_arithmetic, ties
from outliermerge.methods.wudi import aswudi, swudi, wudi

_SURE = 0.7  # a name so alike is meant: of a name of four letters, three are right

METHODS: dict[str, MergeMethod] = {
    method.name: method
    for method in (
        min_sigma,
        linear,
        task_arithmetic,
        ties,
        dare_linear,
        dare_ties,
        breadcrumbs,
        breadcrumbs_ties,
        della,
        della_linear,
        sce,
        ram,
        ramplus_tl,
        slerp,
        nuslerp,
        multislerp,
        karcher,
        model_stock,
        nearswap,
        arcee_fusion,
        iso_c,
        iso_cts,
        tsv_m,
        wudi,
        swudi,
        aswudi,
        resmerge,
        pcb,
        consensus_ta,
        metagpt,
        passthrough,
    )
}
"""The merge methods by name."""

WITH_DATA: dict[str, MergeMethod] = {
    method.name: method for method in (regmean, fisher, mats, mats_fisher)
}
"""The merge methods that take statistics of data besides the models, by name."""

EVERY = METHODS | WITH_DATA
"""All merge methods by name."""

MODIFIERS: dict[str, MergeMethod] = {modifier.name: modifier for modifier in (lines, svc)}
"""The modifiers of merged task vectors by name."""


@checked
def find_method(name: str) -> MergeMethod:
    """Return a method or modifier by its name in the tables, or by `package.module:function`.

    Raises:
        SpecError: there is no such method.

    >>> find_method("min_sigma").space
    'delta'
    """
    return method_named(name)


def method_named(name: str) -> MergeMethod:
    """Do as `find_method`, without a check of the argument: plans ask for each tensor.

    Raises:
        SpecError: there is no such method.
    """
    if ":" in name:
        return import_method(name)
    if name in MODIFIERS:
        return MODIFIERS[name]
    if name in WITH_DATA:
        return WITH_DATA[name]
    if name not in METHODS:
        if (modifier := name.strip().lower()) in MODIFIERS:
            raise SpecError(f"{name} is a modifier: write it under `modifiers`, as {modifier!r}")
        said = known_elsewhere(name, EVERY)
        if said is None:
            said = f"unknown merge method {quoted(name)}."
            if sure := meant_method(name):
                raise SpecError(f"{said} Did you mean {sure.name!r}?")
            near = nearest(name, EVERY)
            meant = f" Did you mean {near!r}?" if near else ""
            said += f"{meant} Valid: {', '.join(sorted(EVERY))}."
        raise SpecError(f"{said} A method of your own is named package.module:function.")
    return METHODS[name]


def meant_method(name: str) -> MergeMethod | None:
    """Return the method that was meant by a misspelt name; None if that is not sure.

    >>> meant_method("task-arithmatic").name
    'task_arithmetic'
    """
    sure = nearest(name, EVERY, cutoff=_SURE)
    return None if sure is None or known_elsewhere(name, EVERY) else EVERY[sure]
