"""Adapters of packed experts, over a base whose files have each expert by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from outliermerge.checkpoint.adapters.adapter import open_adapter
from outliermerge.checkpoint.adapters.config import CONFIG_NAME
from outliermerge.checkpoint.adapters.packed import lacks_parameters
from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.sources import Checkpoint
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.planning.conversion import Converted, converted, grounded, leaves_of, solved
from outliermerge.planning.known_conversions import known_of
from outliermerge.planning.plan import Input


def open_over(
    folder: Path,
    under: Input,
    rename: Callable[[str], str],
    tied: Callable[[str], str | None],
) -> Checkpoint:
    """Return the model that a base with an adapter is, in the base's own layout.

    Where the adapter is for parameters that the base's class has in memory and its files do not
    (`target_parameters` of packed experts), it is applied to the tensors as they are in memory.

    Args:
        folder: the adapter's folder.
        under: the model that it changes.
        rename, tied: as `open_adapter` takes them.

    Raises:
        OutlierMergeError: the adapter cannot be computed, or does not fit the base.
    """
    base = under.checkpoint
    made = _in_memory(folder, under)
    if made is None:
        return open_adapter(folder, base, rename, tied)
    tensors = {name: grounded(source) for name, source in made.tensors.items()}
    adapted = open_adapter(folder, replace(base, tensors=tensors), rename, tied)
    changed = {n: s for n, s in adapted.tensors.items() if tensors.get(n) is not s}
    there = {name: source for name, source in changed.items() if name in made.tensors}
    found = solved({name: made.tensors[name] for name in there}, there)
    for name in there:
        for leaf in leaves_of(made.tensors[name]):
            if leaf.name not in found or found[leaf.name].shape != leaf.shape:
                raise OutlierMergeError(
                    f"{folder}: it changes {shown(name)} {list(there[name].shape)}, which cannot "
                    f"be put back into {shown(leaf.name)} {list(leaf.shape)} of "
                    f"{shown(under.reference)}. Convert the base first: a merge of it alone, with "
                    "`layout: transformers`."
                )
    new = {name: source for name, source in changed.items() if name not in there}
    return replace(adapted, tensors={**base.tensors, **found, **new})


def _in_memory(folder: Path, under: Input) -> Converted | None:
    """Return the base as its class has it, where only that has the adapter's parameters."""
    config = read_json(folder / CONFIG_NAME)
    tensors = under.checkpoint.tensors
    if not lacks_parameters(config, tensors) or not under.home.is_dir():
        return None
    said = read_json(under.home / "config.json")
    made = converted(tensors, known_of(said), said, {})
    return None if lacks_parameters(config, made.tensors) else made
