"""The names of the tensors in the output."""

from __future__ import annotations

from collections.abc import Sequence

from outliermerge.checkpoint.layout import component_of
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.planning.plan import Input
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.settings import SettingError


def written_names(spec: MergeSpec, inputs: Sequence[Input], names: Sequence[str]) -> dict[str, str]:
    """Return the name in the output of each tensor of the merge.

    Args:
        inputs: the models; the output has the layout of the first.

    Raises:
        SpecError: the output's `rename` fits no tensor, gives two one name, or leads out of a
            pipeline's component.
        OutlierMergeError: a tensor belongs to no component of the first model.
    """
    reference, components = inputs[0], inputs[0].checkpoint.components
    others = {part for entry in inputs for part in entry.checkpoint.components} - {*components}
    lost = [
        name
        for name in names
        if component_of(name, others) or not (component_of(name, components) or "" in components)
    ]
    if lost:
        raise OutlierMergeError(
            f"tensors that are of no component of {shown(reference.reference)} "
            f"({', '.join(part or 'its root' for part in components)}):\n{listing(lost)}\n"
            "A `rename` must keep the folder of a part. A part that only other models have cannot "
            "be added: take a base model that has it; `extra: drop` loses its weights."
        )
    try:
        written = spec.rename.apply(names)
    except SettingError as error:
        raise spec.source.error(error.path, str(error), at_key=error.at_key) from error
    for old, new in written.items():
        if component_of(old, components) != component_of(new, components):
            raise spec.source.error(
                ("rename",), f"{old!r} becomes {new!r}, which is not of the same component"
            )
    return written
