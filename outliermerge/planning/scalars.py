"""Single numbers that models store in different shapes: [] in one model, [1] in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from outliermerge.checkpoint.sources import Source, TensorMeta
from outliermerge.errors import shown
from outliermerge.planning.plan import Input


def in_shapes_of(reference: Mapping[str, Source], entry: Input) -> Input:
    """Return an input whose single numbers have the reference's shapes, and a note for each."""
    changed: dict[str, Source] = {}
    notes = []
    for name, source in entry.checkpoint.tensors.items():
        wanted = reference.get(name, source)
        if wanted.shape == source.shape or not source.num_elements == wanted.num_elements == 1:
            continue
        if not isinstance(source, TensorMeta):
            continue
        changed[name] = replace(source, shape=wanted.shape)
        notes.append(
            f"{shown(name)} is one number, of shape {list(source.shape)}; it is taken in the shape "
            f"{list(wanted.shape)} that the first model stores"
        )
    if not changed:
        return entry
    tensors = {**entry.checkpoint.tensors, **changed}
    checkpoint = replace(entry.checkpoint, tensors=tensors, notes=(*entry.checkpoint.notes, *notes))
    return replace(entry, checkpoint=checkpoint)
