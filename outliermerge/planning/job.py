"""The parts of a plan: what it reads, what it does to each tensor, and how it is run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from outliermerge.checkpoint.layout import OutputTensor
from outliermerge.checkpoint.sources import Checkpoint, Source, TensorMeta
from outliermerge.checkpoint.tokens import token_files
from outliermerge.display import short_repr
from outliermerge.methods.context import Context
from outliermerge.methods.kernel_call import CODES
from outliermerge.methods.statistics.base import is_measured_by
from outliermerge.methods.table import method_named
from outliermerge.methods.task import Task, kernel_fits
from outliermerge.storage.cached_files import DEFAULT_CACHE_BYTES


@dataclass(frozen=True)
class LayersOf:
    """Layers that follow one another, and are made in one way of the same layers of models.

    Attributes:
        merge: what they are layers of: `the output`, `stage NAME` or `module NAME`.
        prefix: the start of their tensors' names.
        start, stop: the layers.
        method: how they are merged; empty where they are copied.
        sources: the models, each with the first of its layers and the one after the last.
        stack: what a spec may call the stack of layers.
    """

    merge: str
    prefix: str
    start: int
    stop: int
    method: str
    sources: tuple[tuple[str, int, int], ...]
    stack: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "of": self.merge,
            "stack": self.stack,
            "layers": [self.start, self.stop],
            "method": self.method or "copy",
            "sources": [
                {"model": model, "layer_range": [start, stop]}
                for model, start, stop in self.sources
            ],
        }


@dataclass(frozen=True)
class Beside:
    """What a method takes of a model besides its weights: a folder of tensors, as `measure` writes.

    Attributes:
        kind: what the method calls it, such as `gram`.
        reference: where it is, as the spec names it.
        stored: its tensors that the merge may read.
    """

    kind: str
    reference: str
    stored: tuple[TensorMeta, ...]


@dataclass(frozen=True)
class Input:
    """A model that the merge reads.

    Attributes:
        reference: as the spec names it.
        home: where its config and tokenizer are: its own folder, for an adapter its base's.
        renamed: by rule of its `rename`, how many names it changes, and one before and after.
        parted: heads that an adapter trained apart from the embeddings that its base ties them to.
        alike: a head, its embeddings, and what must be equal for an adapter to keep them one.
        made_of: the models that it is a merge of, where it is a stage of this merge.
        checks: what must be equal for that merge to be right.
        layers: of a stage, where they are from.
        beside: what the method takes of it besides its weights.
    """

    reference: str
    role: Literal["base", "model"]
    checkpoint: Checkpoint
    home: Path
    renamed: Mapping[str, tuple[int, str, str]] = field(default_factory=dict)
    parted: tuple[str, ...] = ()
    alike: tuple[tuple[str, str, tuple[Source, Source]], ...] = ()
    made_of: tuple[Input, ...] = ()
    checks: tuple[Job, ...] = ()
    layers: tuple[LayersOf, ...] = ()
    beside: tuple[Beside, ...] = ()

    def __repr__(self) -> str:
        num = len(self.checkpoint.tensors)
        return short_repr(self, f"{self.reference} ({self.role}), {num} tensors")

    @property
    def stored(self) -> list[TensorMeta]:
        """The tensors of its own files that the merge may read."""
        files = {stamp.path for stamp in self.checkpoint.weight_files}
        metas = {m: None for s in self.checkpoint.tensors.values() for m in s.stored}
        return [meta for meta in metas if meta.path in files]

    @property
    def is_one_file(self) -> bool:
        """Whether it is a file with nothing beside it; of some files a config is made."""
        return self.checkpoint.root.is_file() and not self.home.is_dir()

    @property
    def tokenizer_home(self) -> Path:
        """Where its tokenizer is: an adapter saved with added tokens has one of its own."""
        root = self.checkpoint.root
        return root if root.is_dir() and token_files(root) else self.home


@dataclass(frozen=True)
class Sidecar:
    """A file carried over beside the weights: its name in the output, and where it is from."""

    name: str
    path: Path


@dataclass(frozen=True)
class Proof:
    """How the output's tensors compare with the reference's (the base, or the first model).

    Attributes:
        num_reference_parameters: stored by the reference.
        added, removed: names of tensors that only one of them has.
        resized: names of tensors whose number of rows differs.
    """

    num_reference_parameters: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    resized: tuple[str, ...]


@dataclass(frozen=True)
class LayersFrom:
    """Where some of the output's layers are from: a slice of the spec.

    Attributes:
        start, stop: the layers of the output.
        first: the number of the input that gives names and shapes.
        numbers: the numbers of the merged inputs, in order.
        ranges: by number of an input its layers; the base's too.
    """

    start: int
    stop: int
    first: int
    numbers: tuple[int, ...]
    ranges: Mapping[int, tuple[int, int]]


@dataclass(frozen=True)
class Stacked:
    """The layers of an output that are from slices.

    Attributes:
        name: what the spec may call the stack of layers.
        kind: what the layers are: `text`, `vision`, `audio`, `encoder` or `decoder`.
        prefix: the start of their tensors' names.
        slices: where they are from.
        depths: by input how many layers it has.
        after: the tensors behind the layers, which are of the last slice.
    """

    name: str
    kind: str
    prefix: str
    slices: tuple[LayersFrom, ...]
    depths: tuple[int, ...]
    after: frozenset[str] = frozenset()

    @property
    def num_layers(self) -> int:
        return self.slices[-1].stop

    def slice_of(self, name: str) -> int:
        """Return the number of the slice that a tensor of the merge is of."""
        index = name.removeprefix(self.prefix).partition(".")[0]
        if name.startswith(self.prefix) and index.isdecimal():
            starts = [one.start for one in self.slices]
            return bisect_right(starts, int(index)) - 1
        return len(self.slices) - 1 if name in self.after else 0

    def own_name(self, name: str, number: int) -> str:
        """Return the name of a tensor of the merge in an input that its slice takes."""
        index, dot, rest = name.removeprefix(self.prefix).partition(".")
        one = self.slices[self.slice_of(name)]
        if not (name.startswith(self.prefix) and index.isdecimal()) or number not in one.ranges:
            return name
        return f"{self.prefix}{int(index) - one.start + one.ranges[number][0]}{dot}{rest}"


@dataclass(frozen=True)
class Module:
    """A part of the base model that is merged by itself.

    Attributes:
        name: of the part, as the spec calls it.
        method: how it is merged.
        models: what it is merged of.
        names: its tensors in the output.
        num_merged: how many of them the method computes.
        kept: the tensors of the part that stay the base's.
        layers: where its layers are from.
    """

    name: str
    method: str
    models: tuple[str, ...]
    names: tuple[str, ...]
    num_merged: int
    kept: tuple[str, ...]
    layers: tuple[LayersOf, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        own = {"module": self.name, "method": self.method, "models": list(self.models)}
        return own | {
            "num_tensors": len(self.names), "num_merged": self.num_merged, "kept": list(self.kept)
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """One output tensor.

    Attributes:
        action: `merge` computes it; `copy` takes the first source's tensor; `equal` does so
            after checking that all sources hold the same values.
        sources: which input (its number in the plan) and which of its tensors; for a merge of
            task vectors the base's comes first.
        parameters: resolved for this tensor, per-model ones as tuples; empty unless merged.
        compute_dtype: of the arithmetic; float64 if the spec asks for it or a source is float64.
        reason: why it is not merged, in words.
        context: the tensor's place in the merge.
        auxiliary: the method's auxiliary tensors, of all models for one after the other.
        modifiers: what is done to the merged task vector: names and resolved parameters.
        stochastic: whether the output is rounded at random, up or down.
        of: the job whose weight it quantises, where the output is quantised.
        is_companion: it stands beside the codes of a weight, and has no parameters of the model.
    """

    action: Literal["merge", "copy", "equal"]
    method: str
    parameters: Mapping[str, Any]
    sources: tuple[tuple[int, Source], ...]
    output: OutputTensor
    compute_dtype: str = "float32"
    reason: str = ""
    context: Context = field(default_factory=Context)
    auxiliary: tuple[Source, ...] = ()
    modifiers: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    stochastic: bool = False
    of: Job | None = None
    is_companion: bool = False

    def __repr__(self) -> str:
        shape, what = list(self.output.shape), f"{self.action} by {self.method}"
        return short_repr(
            self,
            f"{self.name} {shape} {self.output.dtype.name}",
            what if self.action == "merge" else f"{self.action}: {self.reason}",
            ", ".join(f"{name}={value}" for name, value in self.parameters.items()),
        )

    @property
    def name(self) -> str:
        return self.output.name

    @property
    def num_elements(self) -> int:
        return self.sources[0][1].num_elements

    @property
    def task(self) -> Task:
        """How it is merged."""
        return Task(
            method=method_named(self.method),
            parameters=self.parameters,
            dtypes=tuple(source.dtype for _, source in self.sources),
            out_dtype=self.output.dtype,
            compute_dtype=self.compute_dtype,
            shape=self.output.shape,
            context=self.context,
            auxiliary=tuple(source.dtype for source in self.in_blocks),
            modifiers=tuple((method_named(name), own) for name, own in self.modifiers),
            stochastic=self.stochastic,
        )

    @property
    def in_blocks(self) -> tuple[Source, ...]:
        """The auxiliary tensors that are read with the blocks of the models."""
        return self.auxiliary[: len(self.auxiliary) - len(self.prepared)]

    @property
    def prepared(self) -> tuple[Source, ...]:
        """The auxiliary tensors that are read whole, once."""
        method = method_named(self.method)
        if not method.prepared:
            return ()
        num_models = len(self.auxiliary) // len(method.auxiliary)
        return self.auxiliary[num_models * len(method.in_blocks) :]

    @property
    def num_passes(self) -> int:
        """How often its sources are usually read."""
        merges = self.action == "merge"
        return method_named(self.method).num_passes(self.parameters) if merges else 1

    def fits_kernels(self, names: Container[str]) -> bool:
        """Tell whether the CPU kernels, which know methods of these names, can do it."""
        if self.action == "merge":
            dtypes = [self.output.dtype, *(source.dtype for _, source in self.sources)]
            method = method_named(self.method)
            return not self.modifiers and kernel_fits(method, dtypes, self.compute_dtype, names)
        source, output = self.sources[0][1].dtype, self.output.dtype
        return not source.is_float or {source.name, output.name} <= CODES.keys()

    @property
    def stored(self) -> frozenset[TensorMeta]:
        """The stored tensors that it reads."""
        sources = (*(source for _, source in self.sources), *self.auxiliary)
        return frozenset(meta for source in sources for meta in source.stored)

    @property
    def num_read_bytes(self) -> int:
        return sum(meta.num_bytes for meta in self.stored)

    @property
    def num_written_bytes(self) -> int:
        return self.num_elements * self.output.dtype.num_bytes


@dataclass(frozen=True)
class Options:
    """How a plan is run.

    Attributes:
        device: `cpu`, `cuda` (all GPUs) or `cuda:N`.
        threads: worker threads.
        memory_bytes: budget for blocks and intermediate results.
        most_memory_bytes: what the budget may grow to for a tensor that needs more; by default it
            does not grow.
        kernels: names of the fused CPU kernels; none where torch is to compute all.
        statistics: names of the functions that measure beside them.
        allow_non_finite: go on where values are infinite or NaN, and list them.
        cache_bytes: the most bytes that are kept on the disk of models which are elsewhere.
    """

    device: str
    threads: int
    memory_bytes: int
    kernels: frozenset[str] = frozenset()
    statistics: frozenset[str] = frozenset()
    allow_non_finite: bool = False
    cache_bytes: int = DEFAULT_CACHE_BYTES
    most_memory_bytes: int = 0

    def uses_kernels(self, job: Job) -> bool:
        return bool(self.kernels) and self.device == "cpu" and job.fits_kernels(self.kernels)

    def kernels_do(self, task: Task) -> bool:
        """Tell whether kernels alone do a task on the CPU, its statistics included."""
        return (
            bool(self.kernels)
            and self.device == "cpu"
            and task.fits_kernels(self.kernels)
            and all(is_measured_by(need, self.statistics) for need in task.method.needs.values())
        )

    def uses_torch(self, job: Job) -> bool:
        """Tell whether torch computes a job, or measures what a kernel needs to know."""
        if job.action != "merge" or not self.uses_kernels(job):
            return not self.uses_kernels(job)
        needs = method_named(job.method).needs.values()
        return not all(is_measured_by(need, self.statistics) for need in needs)


def row_elements(shape: tuple[int, ...]) -> int:
    """Return the elements of one row; a vector or a scalar is one row."""
    if len(shape) < 2:
        return max(1, shape[0] if shape else 1)
    elements = 1
    for size in shape[1:]:
        elements *= size
    return max(1, elements)
