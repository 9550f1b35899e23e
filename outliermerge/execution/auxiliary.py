"""Reads auxiliary tensors that methods take whole, and refuses statistics of other models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from outliermerge.checkpoint.measured import MeasuredTensor
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Source
from outliermerge.engines.torch import is_finite
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.methods.task import Task

if TYPE_CHECKING:
    from torch import Tensor


def wholes(task: Task, sources: Sequence[Source], reader: Reader) -> dict[str, Iterator[Tensor]]:
    """Return the auxiliary tensors that a method takes whole, each read when it is asked for.

    Args:
        sources: all models' of the first kind, then of the next.
    """
    num_models = task.num_models
    return {
        name: _read(sources[number * num_models : (number + 1) * num_models], reader, kind.wrong)
        for number, (name, kind) in enumerate(task.method.prepared.items())
    }


def _read(
    sources: Sequence[Source], reader: Reader, wrong: Callable[[Tensor], str]
) -> Iterator[Tensor]:
    for source in sources:
        values = reader.values(source, 0, source.num_elements).view(source.shape)
        if why := wrong(values) if is_finite(values) else "values that are infinite or NaN":
            raise OutlierMergeError(
                f"{source.stored[0].path}: {shown(source.name)} has {why}. Measure the model again."
            )
        yield values


def refuse_other_models(
    task: Task, auxiliary: Sequence[Source], checksum: Callable[[int], str]
) -> None:
    """Refuse statistics that were measured on another model.

    Args:
        auxiliary: the auxiliary tensors: all models' of the first kind, then of the next.
        checksum: returns the checksum of a source of the task, by its number.

    Raises:
        OutlierMergeError: a checksum is not that of the tensor that was measured.
    """
    for place, statistic in enumerate(auxiliary):
        if not isinstance(statistic, MeasuredTensor):
            continue
        found = checksum(place % task.num_models + task.is_delta)
        if found != statistic.of_checksum:
            raise OutlierMergeError(
                f"{statistic.folder}: these statistics are of another model: its tensor "
                f"{shown(statistic.name)} has the checksum {statistic.of_checksum}, that of the "
                f"model which is merged has {found}. Measure this model."
            )
