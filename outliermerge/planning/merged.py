"""A merge as a source: it is computed from other sources when it is read, and is not stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from outliermerge.checkpoint.sources import DType, Reading, Source, TensorMeta
from outliermerge.methods.statistics.base import scope_of
from outliermerge.methods.task import Task


@dataclass(frozen=True, eq=False, repr=False)
class MergedSource:
    """The merge of other sources. A Source; its values are rounded once, to the task's dtype.

    Attributes:
        name: for messages.
        task: how they are merged.
        sources: the base, where the method uses one, then the models; then the method's auxiliary
            tensors.
        stored_dtype: the dtype of an output if the spec does not set one; None is the task's.
    """

    name: str
    task: Task
    sources: tuple[Source, ...]
    stored_dtype: DType | None = None

    def __post_init__(self) -> None:
        needs = self.task.method.needs.values()
        if any(scope_of(need, self.task.parameters) == "model" for need in needs):
            raise ValueError(f"{self.task.method.name} measures whole models, not sources")

    def __repr__(self) -> str:
        task = self.task
        modifiers = [(modifier.name, dict(own)) for modifier, own in task.modifiers]
        return (
            f"MergedSource({self.name!r}, {task.method.path}, {dict(task.parameters)}, "
            f"{task.context}, {modifiers}, {task.compute_dtype}, {self.sources}, {self.out_dtype})"
        )

    @property
    def dtype(self) -> DType:
        return self.task.out_dtype

    @property
    def out_dtype(self) -> DType:
        return self.stored_dtype or self.task.out_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.task.shape

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.num_bytes

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        """The stored tensors that it is computed from, each once."""
        return tuple(dict.fromkeys(meta for source in self.sources for meta in source.stored))

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop, in `dtype`.

        Raises:
            OutlierMergeError: a source cannot be read, or has infinite or NaN values.
        """
        if stop > start:
            reader.merge(self, start, stop, out)


@dataclass(frozen=True)
class Restored:
    """A source whose values an output stores in another dtype by default. A Source."""

    source: Source
    out_dtype: DType

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def num_elements(self) -> int:
        return self.source.num_elements

    @property
    def num_bytes(self) -> int:
        return self.source.num_bytes

    @property
    def stored(self) -> tuple[TensorMeta, ...]:
        return self.source.stored

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source,)

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop, in `dtype`."""
        self.source.read(reader, start, stop, out)
