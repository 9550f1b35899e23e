"""Sweeps: one spec with several values of its settings, merged from one reading of the models."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.api import plan
from outliermerge.arguments import checked, wrong
from outliermerge.errors import ArgumentError, SpecError, argument, as_path, shown
from outliermerge.output.names import Final
from outliermerge.output.options import RunOptions, showing_options
from outliermerge.output.run import RunResult, output_path, run_plans
from outliermerge.planning.plan import Plan
from outliermerge.search.keys import set_key
from outliermerge.spec.check import MergeSpec, load_spec
from outliermerge.spec.text import plain_yaml
from outliermerge.storage.addresses import is_address

_MAX_OUTPUTS = 1000
_IN_DICT = re.compile(r"^spec: ", re.MULTILINE)  # what the changed spec is called in messages


@dataclass(frozen=True)
class Variant:
    """One output of a sweep: its settings, their plan, and the folder's or file's name."""

    settings: Mapping[str, Any]
    plan: Plan
    name: str


def parse_values(option: str) -> tuple[str, list[Any]]:
    """Return the key and the values of an option such as `t=2,2.5,3`.

    Raises:
        ArgumentError: it is of another form.

    >>> parse_values("density=0.2,[0.2,0.5]")
    ('density', [0.2, [0.2, 0.5]])
    """
    key, equals, text = option.partition("=")
    if key and not text:
        raise ArgumentError(
            f"{argument('settings')} {shown(key)}: no values: write KEY=VALUE,VALUE,… such as "
            f"{shown(key)}=0.3,0.7"
        )
    try:
        values = plain_yaml(f"[{text}]")
    except ValueError:
        values = None
    if not (key and equals and values) or None in values:
        raise ArgumentError(
            f"{argument('settings')} {shown(option)}: write KEY=VALUE,VALUE,… such as t=2,2.5,3"
        )
    return key.strip(), values


@checked
def plan_sweep(
    spec: str | Path | Mapping[str, Any] | MergeSpec,
    settings: Mapping[str, Sequence[Any]],
    *,
    shard_size: int | str | None = None,
) -> list[Variant]:
    """Plan every combination of values, without reading a tensor.

    Args:
        spec: a YAML file, or the same as a dict.
        settings: values by key: `merge_method`, `dtype`, `out_dtype`, a parameter of the method,
            or `models.N.PARAMETER` for the N-th model's own, from 1. `slices.N.`, `modules.NAME.`
            and `stages.NAME.` before it say where it is, as in `stages.a.models.2.weight`.

    Raises:
        SpecError: the spec or a value is wrong; the message names the combination.
        ArgumentError: a key is wrong, there are none, or there are too many combinations.
        OutlierMergeError: the models do not fit together.
    """
    loaded = spec if isinstance(spec, MergeSpec) else load_spec(spec)
    if not settings:
        raise ArgumentError(f"{argument('settings')}: a sweep needs some, such as t=2,2.5,3")
    if empty := [key for key, values in settings.items() if not values]:
        raise ArgumentError(f"{argument('settings')} {shown(empty[0])}: has no values")
    if (number := math.prod(map(len, settings.values()))) > _MAX_OUTPUTS:
        raise ArgumentError(
            f"{argument('settings')}: {number:,} combinations, each a whole model, more than "
            f"the {_MAX_OUTPUTS:,} that one sweep may have"
        )
    variants: dict[str, Variant] = {}
    for values in itertools.product(*settings.values()):
        chosen = dict(zip(settings, values, strict=True))
        name = ",".join(f"{_text(key)}={_text(value)}" for key, value in chosen.items())
        document = copy.deepcopy(loaded.as_dict())
        for key, value in chosen.items():
            set_key(document, key, value)
        try:
            planned = plan(document, shard_size=shard_size)
        except SpecError as error:
            words = _IN_DICT.sub("", error.marked)
            raise SpecError(f"{argument('settings')} {name}: {words}") from error
        if planned.is_one_file:
            name += ".safetensors"
        if name in variants:
            raise ArgumentError(f"{argument('settings')}: {name} is there twice")
        variants[name] = Variant(chosen, planned, name)
    return list(variants.values())


@checked
@showing_options
def sweep(
    spec: str | Path | Mapping[str, Any] | Sequence[Variant],
    settings: Mapping[str, Sequence[Any]] | None = None,
    *,
    output: str | Path | None = None,
    shard_size: int | str | None = None,
    options: RunOptions | None = None,
    **changes: Any,
) -> list[RunResult]:
    """Merge every combination of values, reading the models once and sharing statistics.

    Args:
        spec: a YAML file, the same as a dict, or what plan_sweep returned.
        settings: values by key, as plan_sweep takes them; not with its variants.
        output: the folder, or its address, that gets a folder for each combination, such as
            `t=2`; the spec's `output` by default.
        shard_size: most bytes of a weight file, 5GB by default; not with variants.
        options: how it is carried out, as for `run`.
        **changes: single fields of `RunOptions`.

    Returns:
        A result for each combination, the last setting varying fastest.

    Raises:
        SpecError: the spec is wrong.
        ArgumentError: a setting or an argument is wrong.
        OutlierMergeError: a model or an output folder is not fit for it.

    Example:
        >>> import outliermerge
        >>> outliermerge.sweep("spec.yaml", {"t": [2, 3]}, output="merged")  # doctest: +SKIP
    """
    chosen = RunOptions.of(options, changes)
    if isinstance(spec, (str, Path, Mapping)):
        variants = plan_sweep(spec, settings or {}, shard_size=shard_size)
    elif (
        isinstance(spec, str)
        or not isinstance(spec, Sequence)
        or not all(isinstance(each, Variant) for each in spec)
    ):
        raise wrong("spec", spec, "a YAML file, a dict, or what plan_sweep returned")
    elif settings is not None or shard_size is not None:
        name = "settings" if settings is not None else "shard_size"
        raise ArgumentError(f"{argument(name)}: the variants have theirs: give it to plan_sweep()")
    else:
        variants = [each for each in spec if isinstance(each, Variant)]
    return run_plans([(each.plan, output_of(each, output)) for each in variants], chosen)


def output_of(variant: Variant, output: str | Path | None) -> Final:
    """Return the folder or file of one combination, or the address of a folder.

    Raises:
        SpecError: neither the argument nor the spec names a folder.
        ArgumentError: the argument cannot be the output.
    """
    folder = output or variant.plan.spec.document.output
    named: Final | None = None
    if isinstance(folder, str) and is_address(folder):
        named = f"{folder.rstrip('/')}/{variant.name}"
    elif folder is not None:
        named = as_path(folder) / variant.name
    return output_path(variant.plan, named)


def work_bytes(variants: Sequence[Variant], *, read_once: bool = True) -> int:
    """Return the bytes that pass through a sweep.

    Args:
        read_once: its models are read once for all, and not for each.
    """
    first, *others = (variant.plan for variant in variants)
    return first.work_bytes + sum(
        each.num_written_bytes if read_once else each.work_bytes for each in others
    )


def _text(value: Any) -> str:
    """Return a value as it can be part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")
