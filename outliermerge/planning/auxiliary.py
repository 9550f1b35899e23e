"""Opens a method's auxiliary tensors, and pairs them with the models' tensors by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.folders.hub import resolve
from outliermerge.checkpoint.measured import MeasuredTensor, Statistics
from outliermerge.checkpoint.sources import Source
from outliermerge.errors import OutlierMergeError, as_path, shown
from outliermerge.methods.contract import MergeMethod
from outliermerge.planning.job import Beside
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.models import ModelSpec
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
        self._lacking: dict[str, list[str]] = {}
        self._without_tokens: list[str] = []
        for model, number in zip(spec.models, model_numbers, strict=True):
            for name in self._names:
                reference = model.auxiliary.get(name, model.statistics)
                place = (*model.path, "statistics")
                if name in model.auxiliary:
                    place = (*model.path, "auxiliary", name)
                try:
                    with told_by_name():
                        self._tensors[name, number] = _opened(model, name)
                except OutlierMergeError as error:
                    raise OutlierMergeError(str(spec.source.error(place, str(error)))) from error
                self._files[name, number] = reference

    def lacking(self, tensor: str, holders: Sequence[int]) -> tuple[str, ...]:
        """Return the kinds that none of the models that have a tensor has for it."""
        return tuple(
            name
            for name in self._names
            if not any(tensor in self._tensors[name, number] for number in holders)
        )

    def turned(self, tensor: str, holders: Sequence[int]) -> bool:
        """Tell whether a tensor whose inputs were measured is stored as (inputs, outputs).

        Raises:
            OutlierMergeError: its statistics differ in that.
        """
        found = {
            source.turned: self._files[name, number]
            for name in self._names
            for number in holders
            if isinstance(source := self._tensors[name, number].get(tensor), MeasuredTensor)
        }
        if len(found) == 2:
            raise OutlierMergeError(
                f"{found[True]}: the inputs of {shown(tensor)} are its rows, and in {found[False]} "
                "they are its columns: these models do not compute alike"
            )
        return True in found

    def of(
        self, tensor: str, shape: tuple[int, ...], holders: Sequence[int], method: MergeMethod
    ) -> tuple[Source, ...]:
        """Return a tensor's auxiliary tensors: all models' of the first kind, then of the next.

        Args:
            tensor: its name in the merge.
            shape: the shape of the weights.
            holders: the numbers of the models that have it.
            method: what merges it.

        Raises:
            OutlierMergeError: an auxiliary tensor is missing, or has another shape.
        """
        found = []
        for name in method.auxiliary:
            whole = method.prepared.get(name)
            wanted = shape if whole is None else whole.shape(shape)
            for number in holders:
                source = self._tensors[name, number].get(tensor)
                if source is None or source.shape != wanted or not source.dtype.is_float:
                    what = "is not in it" if source is None else (
                        f"is {source.dtype.name} {list(source.shape)}"
                    )  # fmt: skip
                    has = f"the model has {list(shape)}"
                    raise OutlierMergeError(
                        f"{self._files[name, number]}: {name} of {shown(tensor)} {what}, expected "
                        f"a floating-point tensor {list(wanted)}, as {has}"
                    )
                found.append(source)
        if lacking := self.lacking(tensor, holders):
            self._lacking.setdefault(" and ".join(lacking), []).append(tensor)
        unused = [{*one.no_tokens} if isinstance(one, MeasuredTensor) else set() for one in found]
        if unused and set.intersection(*unused):
            self._without_tokens.append(tensor)
        return tuple(found)

    def beside(self, number: int) -> tuple[Beside, ...]:
        """Return what there is of a model, by its number."""
        return tuple(
            Beside(
                name,
                self._files[name, number],
                tuple(dict.fromkeys(meta for source in found.values() for meta in source.stored)),
            )
            for (name, own), found in self._tensors.items()
            if own == number
        )

    @property
    def notes(self) -> list[str]:
        """What is to be said of the tensors that were looked up: those that have nothing."""
        named = self._without_tokens
        return [
            f"{len(tensors)} tensor(s) such as {shown(tensors[0])} have no {names} in the "
            "statistics, and are averaged"
            for names, tensors in self._lacking.items()
        ] + [
            f"{len(named)} tensor(s) such as {shown(one)}, or some of their experts, had no tokens "
            "in any model's data, and are averaged there"
            for one in named[:1]
        ]


def _opened(model: ModelSpec, name: str) -> Mapping[str, Source]:
    if name in model.auxiliary:
        return open_checkpoint(resolve(model.auxiliary[name])).tensors
    return Statistics(as_path(model.statistics)).tensors(name)
