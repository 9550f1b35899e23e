"""What a plan is: inputs, jobs, shards, and the sums that a person asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from outliermerge.checkpoint.layout import OutputTensor, Shard
from outliermerge.checkpoint.sources import DTYPES, Checkpoint, Source, TensorMeta
from outliermerge.checkpoint.tokens import token_files
from outliermerge.errors import ArgumentError, argument
from outliermerge.methods.context import Context
from outliermerge.methods.kernel_call import CODES
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS, is_measured_by
from outliermerge.methods.table import find_method
from outliermerge.methods.task import Task
from outliermerge.spec.check import MergeSpec
from outliermerge.storage.stamps import FileStamp

_MAX_BLOCK_CHUNKS = {"kernels": 16, "cpu": 4, "cuda": 64}


@dataclass(frozen=True)
class Input:
    """A model that the merge reads.

    Attributes:
        reference: as the spec names it.
        home: where its config and tokenizer are: its own folder, for an adapter its base's.
        renamed: by rule of its `rename`, how many names it changes, and one before and after.
        parted: heads that an adapter trained apart from the embeddings that its base ties them to.
        alike: a head, its embeddings, and what must be equal for an adapter to keep them one.
    """

    reference: str
    role: Literal["base", "model"]
    checkpoint: Checkpoint
    home: Path
    renamed: Mapping[str, tuple[int, str, str]] = field(default_factory=dict)
    parted: tuple[str, ...] = ()
    alike: tuple[tuple[str, str, tuple[Source, Source]], ...] = ()

    @property
    def stored(self) -> list[TensorMeta]:
        """The tensors of its own files that the merge may read."""
        files = {stamp.path for stamp in self.checkpoint.weight_files}
        metas = {m: None for s in self.checkpoint.tensors.values() for m in s.stored}
        return [meta for meta in metas if meta.path in files]

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
            method=find_method(self.method),
            parameters=self.parameters,
            dtypes=tuple(source.dtype for _, source in self.sources),
            out_dtype=self.output.dtype,
            compute_dtype=self.compute_dtype,
            shape=self.output.shape,
            context=self.context,
            auxiliary=tuple(source.dtype for source in self.auxiliary),
            modifiers=tuple((find_method(name), own) for name, own in self.modifiers),
        )

    def fits_kernels(self, names: Container[str]) -> bool:
        """Tell whether the CPU kernels, which know methods of these names, can do it."""
        if self.action == "merge":
            return self.task.fits_kernels(names)
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
        kernels: names of the fused CPU kernels; none where torch is to compute all.
        statistics: names of the functions that measure beside them.
        allow_non_finite: go on where values are infinite or NaN, and list them.
    """

    device: str
    threads: int
    memory_bytes: int
    kernels: frozenset[str] = frozenset()
    statistics: frozenset[str] = frozenset()
    allow_non_finite: bool = False

    def uses_kernels(self, job: Job) -> bool:
        return bool(self.kernels) and self.device == "cpu" and job.fits_kernels(self.kernels)

    def uses_torch(self, job: Job) -> bool:
        """Tell whether torch computes a job, or measures what a kernel needs to know."""
        if job.action != "merge" or not self.uses_kernels(job):
            return not self.uses_kernels(job)
        needs = job.task.method.needs.values()
        return not all(is_measured_by(need, self.statistics) for need in needs)


@dataclass(frozen=True)
class Plan:
    """Everything that a merge will do.

    Attributes:
        inputs: the models, the base first where there is one.
        jobs: one per output tensor, in the order of the base's files.
        shards: the output's weight files.
        sidecars: files that are carried over.
        gradients: for each parameter that varies over layers, its values by stack of layers.
        dropped: tensors that are left out by `extra: drop`, or because the head is tied.
        notes: what a person should know before starting.
        checks: tensors that must be equal for the merge to be right, but are not written.
        proof: how the output's tensors compare with the reference's.
        components: by component's folder the stem of its weight files.
        num_rows: of the vocabulary, where the merge changes it.
        added_tokens: id, token, and the input that has it, for a vocabulary that grows.
        tied: by name of a tensor the one that it is equal to, as the output's config ties them.
        files: what was read of the models, with stamps; None for what was looked for and absent.
    """

    spec: MergeSpec
    inputs: tuple[Input, ...]
    jobs: tuple[Job, ...]
    shards: tuple[Shard, ...]
    sidecars: tuple[Sidecar, ...]
    gradients: Mapping[str, Mapping[str, list[Any]]]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    checks: tuple[Job, ...]
    proof: Proof
    components: Mapping[str, str]
    num_rows: int | None = None
    added_tokens: tuple[tuple[int, str, int], ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    files: tuple[tuple[Path, FileStamp | None], ...] = ()

    @property
    def is_one_file(self) -> bool:
        """Whether the output is a single file, as the reference is."""
        return self.inputs[0].checkpoint.root.is_file()

    @property
    def auxiliary_files(self) -> dict[Path, FileStamp | None]:
        """The files of the method's auxiliary tensors, with their stamps."""
        stamps, found = dict(self.files), dict[Path, FileStamp | None]()
        for source in (source for job in self.jobs for source in job.auxiliary):
            found |= {meta.path: stamps.get(meta.path) for meta in source.stored}
        return found

    @property
    def num_read_bytes(self) -> int:
        return sum(job.num_read_bytes for job in (*self.jobs, *self.checks))

    @property
    def num_written_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def num_parameters(self) -> int:
        return sum(job.num_elements for job in self.jobs)

    def num_work_bytes(self, job: Job) -> int:
        """Bytes that pass through the job, every pass counted."""
        merges = job.action == "merge"
        passes = find_method(job.method).num_passes(job.parameters) if merges else 1
        return passes * sum(s.num_bytes for _, s in job.sources) + job.num_written_bytes

    @property
    def work_bytes(self) -> int:
        """Bytes that pass through all jobs."""
        return sum(map(self.num_work_bytes, self.jobs))

    def block_elements(self, job: Job, options: Options) -> int:
        """Return how many elements of the job's tensor are worked on at a time.

        Raises:
            ArgumentError: not even the smallest block fits the memory budget.
        """
        method = find_method(job.method)
        cut = job.task.cut if job.action == "merge" else "element"
        unit = {"element": CHUNK_ELEMENTS, "row": row_elements(job.output.shape),
                "tensor": max(1, job.num_elements)}[cut]  # fmt: skip
        per_element = self._bytes_per_element(job, options)
        fits = options.memory_bytes // (options.threads * per_element)
        if fits < min(unit, job.num_elements):
            needed = options.threads * per_element * min(unit, job.num_elements)
            raise ArgumentError(
                f"{argument('memory')}: {options.memory_bytes:,} bytes are too few for tensor "
                f"{job.name!r}: {method.name} needs {needed:,} on {options.threads} threads to "
                f"hold one {cut} block. Give more memory or fewer threads."
            )
        where = options.device.partition(":")[0] if options.uses_torch(job) else "kernels"
        most = _MAX_BLOCK_CHUNKS[where] * CHUNK_ELEMENTS
        return max(unit, min(fits, most) // unit * unit)

    def peak_memory_bytes(self, options: Options) -> int:
        """Return the most memory that blocks and their intermediate results take."""
        peak = 0
        for job in self.jobs:
            block = min(self.block_elements(job, options), job.num_elements)
            peak = max(peak, block * self._bytes_per_element(job, options))
        return options.threads * peak

    def _bytes_per_element(self, job: Job, options: Options) -> int:
        num_sources = len(job.sources)
        raw = sum(meta.dtype.num_bytes for _, meta in job.sources) + job.output.dtype.num_bytes
        raw += sum(source.dtype.num_bytes for source in job.auxiliary)
        # Computed sources hold their rows in float32 while they are made.
        raw += 16 * sum(source.stored != (source,) for _, source in job.sources)
        if job.action == "equal" and len({source.dtype for _, source in job.sources}) > 1:
            raw += 48  # their values in 64 bits, which are compared
        if job.action == "merge" and job.task.cut == "row" and options.uses_kernels(job):
            raw += 4 * num_sources + 26  # a row of each source in float32, and its ranks
        if job.action != "merge" or not options.uses_torch(job):
            return raw
        compute = DTYPES[job.compute_dtype].num_bytes
        rows = num_sources + len(job.auxiliary)
        workspaces = [find_method(job.method).workspace(num_sources)]
        workspaces += [find_method(name).workspace(1) for name, _ in job.modifiers]
        return raw + compute * (rows + max(workspaces))

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "spec": self.spec.as_dict(),
            "method": self.spec.method.name,
            "compute_dtypes": sorted({job.compute_dtype for job in self.jobs}),
            "inputs": [
                {
                    "model": entry.reference,
                    "role": entry.role,
                    "path": str(entry.checkpoint.root),
                    "num_tensors": len(entry.checkpoint.tensors),
                    "num_bytes": sum(meta.num_bytes for meta in entry.stored),
                    "dtypes": dict(Counter(meta.dtype.name for meta in entry.stored)),
                    "renamed": {
                        rule: {"num_tensors": count, "from": before, "to": after}
                        for rule, (count, before, after) in entry.renamed.items()
                    },
                }
                for entry in self.inputs
            ],
            "input_bytes": self.num_read_bytes,
            "write_bytes": self.num_written_bytes,
            "num_parameters": self.num_parameters,
            "actions": dict(Counter(job.action for job in self.jobs)),
            "gradients": {name: dict(stacks) for name, stacks in self.gradients.items()},
            "shards": [{"file": s.file, "num_bytes": s.num_bytes} for s in self.shards],
            "sidecars": {sidecar.name: str(sidecar.path) for sidecar in self.sidecars},
            "dropped": list(self.dropped),
            "notes": list(self.notes),
            "checks": [job.reason for job in self.checks],
            "tied": dict(self.tied),
            "proof": {
                "num_reference_parameters": self.proof.num_reference_parameters,
                "added": list(self.proof.added),
                "removed": list(self.proof.removed),
                "resized": list(self.proof.resized),
            },
            "num_rows": self.num_rows,
            "added_tokens": [
                {"id": number, "token": token, "from": self.inputs[model].reference}
                for number, token, model in self.added_tokens
            ],
            "tensors": [
                {
                    "name": job.name,
                    "action": job.action,
                    "reason": job.reason,
                    "shape": list(job.output.shape),
                    "dtype": job.output.dtype.name,
                    "file": job.output.file,
                    "sources": [self.inputs[index].reference for index, _ in job.sources],
                    "stored_names": [source.name for _, source in job.sources],
                    "parameters": dict(job.parameters),
                }
                for job in self.jobs
            ],
        }


def row_elements(shape: tuple[int, ...]) -> int:
    """Return the elements of one row; a vector or a scalar is one row."""
    if len(shape) < 2:
        return max(1, shape[0] if shape else 1)
    elements = 1
    for size in shape[1:]:
        elements *= size
    return max(1, elements)
