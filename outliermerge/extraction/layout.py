"""Models as their class has them in memory, where it packs experts that files have one by one."""

from __future__ import annotations

from dataclasses import replace

from outliermerge.checkpoint.config import read_json
from outliermerge.planning.conversion import Converted, converted, grounded
from outliermerge.planning.known_conversions import known_of
from outliermerge.planning.plan import Input


def in_memory(base: Input, model: Input) -> tuple[Input, Input]:
    """Return two models with packed experts, by what transformers knows of the base's class.

    They stay as they are where the class packs none, or transformers is not installed.
    """
    said = read_json(base.home / "config.json")
    known = known_of(said)
    made = [converted(entry.checkpoint.tensors, known, said, {}) for entry in (base, model)]
    if not any(map(_has_packed, made, (base, model))):
        return base, model
    first, second = (
        replace(entry, checkpoint=replace(entry.checkpoint, tensors=tensors))
        for entry, one in zip((base, model), made, strict=True)
        for tensors in [{name: grounded(source) for name, source in one.tensors.items()}]
    )
    return first, second


def _has_packed(made: Converted, entry: Input) -> bool:
    """Tell whether experts are packed under names that the model's files do not have."""
    return any(
        len(source.shape) == 3
        and not name.endswith(".weight")
        and name not in entry.checkpoint.tensors
        for name, source in made.tensors.items()
    )
