"""Opens a method's auxiliary tensors, and pairs them with the models' tensors by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.folders.hub import resolve
from outliermerge.checkpoint.sources import Source
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.spec.check import MergeSpec
from outliermerge.storage.stamps import told_by_name


class Auxiliaries:
    """The auxiliary tensors of a spec's models.

    Args:
        spec: the spec.
        model_numbers: the numbers of the merged inputs, in the spec's order.

    Raises:
        OutlierMergeError: a folder or file cannot be read.
    """

    def __init__(self, spec: MergeSpec, model_numbers: Sequence[int]) -> None:
        self._names = spec.method.auxiliary
        self._tensors: dict[tuple[str, int], Mapping[str, Source]] = {}
        self._files: dict[tuple[str, int], str] = {}
        for model, number in zip(spec.models, model_numbers, strict=True):
            for name, reference in model.auxiliary.items():
                try:
                    with told_by_name():
                        opened = open_checkpoint(resolve(reference))
                except OutlierMergeError as error:
                    place = (*model.path, "auxiliary", name)
                    raise OutlierMergeError(str(spec.source.error(place, str(error)))) from error
                self._tensors[name, number] = opened.tensors
                self._files[name, number] = reference

    def of(self, tensor: str, shape: tuple[int, ...], holders: Sequence[int]) -> tuple[Source, ...]:
        """Return a tensor's auxiliary tensors: all models' of the first kind, then of the next.

        Raises:
            OutlierMergeError: an auxiliary tensor is missing, or has another shape.
        """
        found = []
        for name in self._names:
            for number in holders:
                source = self._tensors[name, number].get(tensor)
                if source is None or source.shape != shape or not source.dtype.is_float:
                    what = "is not in it" if source is None else (
                        f"is {source.dtype.name} {list(source.shape)}"
                    )  # fmt: skip
                    raise OutlierMergeError(
                        f"{self._files[name, number]}: {shown(tensor)} {what}, expected a "
                        f"floating-point tensor {list(shape)}, as the model has it"
                    )
                found.append(source)
        return tuple(found)
