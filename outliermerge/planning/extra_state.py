"""Modules' own states (`_extra_state`), such as Transformer Engine's, which cannot be averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from outliermerge.checkpoint.sources import EXTRA_STATE
from outliermerge.errors import shown
from outliermerge.planning.plan import Input


def one_extra_state(inputs: Sequence[Input]) -> tuple[Input, ...]:
    """Give all models the module states of the first one, with a note: they are opaque bytes.

    PyTorch stores under this name the result of `Module.get_extra_state`, which can be of any kind
    and size.
    """
    reference = inputs[0]
    own = {n: s for n, s in reference.checkpoint.tensors.items() if n.endswith(EXTRA_STATE)}
    result = [reference]
    for entry in inputs[1:]:
        tensors = entry.checkpoint.tensors
        theirs = [name for name in tensors if name.endswith(EXTRA_STATE)]
        if not own and not theirs:
            result.append(entry)
            continue
        kept = {name: source for name, source in tensors.items() if name not in theirs}
        what = f"has {len(theirs)} states of modules ({EXTRA_STATE}), which cannot be merged: "
        what += f"those of {shown(reference.reference)} are taken" if own else "they are left out"
        notes = (*entry.checkpoint.notes, what)
        result.append(
            replace(entry, checkpoint=replace(entry.checkpoint, tensors=kept | own, notes=notes))
        )
    return tuple(result)
