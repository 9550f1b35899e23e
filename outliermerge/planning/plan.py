"""What a plan is: inputs, jobs, shards, and the sums that a person asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.layout import Shard
from outliermerge.checkpoint.quantized.packed import turned_in
from outliermerge.checkpoint.sources import inner
from outliermerge.display import human_bytes, short_repr
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS
from outliermerge.methods.table import method_named
from outliermerge.planning.blocks import (
    block_elements,
    bytes_beside,
    bytes_per_element,
    counter_bytes,
    least_bytes,
    num_by_torch,
    too_little,
)
from outliermerge.planning.job import Input as Input
from outliermerge.planning.job import Job as Job
from outliermerge.planning.job import LayersFrom as LayersFrom
from outliermerge.planning.job import LayersOf as LayersOf
from outliermerge.planning.job import Module as Module
from outliermerge.planning.job import Options as Options
from outliermerge.planning.job import Proof as Proof
from outliermerge.planning.job import Sidecar as Sidecar
from outliermerge.planning.job import Stacked as Stacked
from outliermerge.planning.job import row_elements as row_elements
from outliermerge.planning.llama_cpp import Conversion
from outliermerge.planning.merged import merge_of, read_again
from outliermerge.planning.plan_html import plan_as_html
from outliermerge.planning.tokenizer_plan import ChatTemplate, TokenizerPlan
from outliermerge.spec.check import MergeSpec
from outliermerge.storage.stamps import FileStamp


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
        tokenizer: the output's tokenizer, where its tokens decide which rows there are.
        chat_template: the output's chat template, where the spec gives one.
        tied: by name of a tensor the one that it is equal to, as the output's config ties them.
        stacked: where the layers are from, if the spec has slices.
        modules: the parts of the base that are merged by themselves.
        layer_map: where the layers of the output and of its stages are from, if the spec has
            slices, stages or modules.
        files: what was read of the models, with stamps; None for what was looked for and absent.
        shard_bytes: most bytes of a weight file, if it is not the default.
        config: the output's config, where it is not the reference's.
        ids: by file of the config the token ids that change, by the keys that lead to them.
        quantization: what the config says of quantised weights, where the spec asks for some.
        transplant: how good the rows of another tokenizer's tokens are, as JSON values.
        conversion: what llama.cpp's converter makes of the output, which is then removed.
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
    tokenizer: TokenizerPlan | None = None
    chat_template: ChatTemplate | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    stacked: Stacked | None = None
    modules: tuple[Module, ...] = ()
    layer_map: tuple[LayersOf, ...] = ()
    files: tuple[tuple[Path, FileStamp | None], ...] = ()
    shard_bytes: int | None = None
    config: Mapping[str, Any] | None = None
    ids: Mapping[str, Mapping[tuple[str, ...], Any]] = field(default_factory=dict)
    transplant: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
    conversion: Conversion | None = None

    def __repr__(self) -> str:
        return short_repr(
            self,
            self.spec.in_a_line,
            f"{len(self.jobs)} tensors, {self.num_parameters:,} parameters",
            f"reads {human_bytes(self.num_read_bytes)}, writes "
            f"{human_bytes(self.num_written_bytes)} in {len(self.shards)} file(s)",
            f"{len(self.notes)} note(s) in .notes" if self.notes else "",
        )

    def _repr_html_(self) -> str:
        """Show the plan as tables in a notebook."""
        return plan_as_html(self)

    @property
    def all_inputs(self) -> tuple[Input, ...]:
        """The inputs, each followed by what it is made of, if that was not there before."""
        found, seen, pending = list[Input](), set[int](), [*reversed(self.inputs)]
        while pending:
            found.append(entry := pending.pop())
            if id(entry.made_of) not in seen:  # it is one for all that use a stage
                seen.add(id(entry.made_of))
                pending += reversed(entry.made_of)
        return tuple(found)

    @property
    def models(self) -> tuple[Input, ...]:
        """The models that are read, of the stages, too."""
        return tuple(entry for entry in self.all_inputs if not entry.made_of)

    @property
    def is_one_file(self) -> bool:
        """Whether the output is a single file, as the reference is."""
        return self.inputs[0].is_one_file

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
    def weight_jobs(self) -> list[tuple[Job, Job]]:
        """The job of each tensor of the model, and the job that writes it, which may be codes."""
        return [(job.of or job, job) for job in self.jobs if not job.is_companion]

    @property
    def num_parameters(self) -> int:
        return sum(job.num_elements for job, _ in self.weight_jobs)

    def merged_by(self, job: Job) -> tuple[str, str] | None:
        """Return the method that merges a tensor, and the dtype of its arithmetic; None if none.

        A copy of what a module or a stage merges is merged by the method there.
        """
        if (job.of or job).action == "merge":
            method = method_named((job.of or job).method)
            return self.spec.title, method.computes_in(job.compute_dtype)
        inside = merge_of(job.sources[0][1]) if job.action == "copy" else None
        if inside is None:
            return None
        method = inside.task.method
        return method.name, method.computes_in(inside.task.compute_dtype)

    @cached_property
    def _unlike(self) -> list[Job]:
        """Jobs that differ in more than names; any other job takes as much memory as one of these.

        Layers and experts have the same shapes, so that these are few.
        """
        found: dict[tuple[Any, ...], Job] = {}
        for job in self.jobs:
            sources = (*(source for _, source in job.sources), *job.auxiliary)
            key = (
                *(job.action, job.method, job.compute_dtype, job.output.dtype, job.output.shape),
                *(id(job.parameters), job.modifiers and id(job), len(job.auxiliary)),
                *(id(s) if inner(s) else (type(s), s.dtype, s.shape) for s in sources),
            )
            found.setdefault(key, job)
        return [*found.values()]

    def num_work_bytes(self, job: Job) -> int:
        """Bytes that pass through the job, every pass counted."""
        return job.num_passes * sum(s.num_bytes for _, s in job.sources) + job.num_written_bytes

    @property
    def work_bytes(self) -> int:
        """Bytes that pass through all jobs."""
        return sum(map(self.num_work_bytes, self.jobs))

    def fitted(self, options: Options) -> Options:
        """Return the options with as much memory, and as many threads, as the tensors allow.

        The memory grows to what all threads need for the largest tensor, as far as it may; then
        threads are left out.

        Raises:
            ArgumentError: the memory is too little for one thread.
        """
        if not self.jobs:
            return options
        largest = max(self._unlike, key=lambda job: least_bytes(job, options))
        needed = least_bytes(largest, options)
        most = max(options.memory_bytes, options.most_memory_bytes)
        if needed > most:
            raise too_little(largest, most, options)
        threads = min(options.threads, most // needed)
        return replace(
            options, threads=threads, memory_bytes=max(options.memory_bytes, threads * needed)
        )

    def peak_memory_bytes(self, options: Options) -> int:
        """Return the most memory that blocks and their intermediate results take."""
        peak = 0
        for job in self._unlike:
            block = min(block_elements(job, options), job.num_elements)
            peak = max(peak, block * bytes_per_element(job, options) + bytes_beside(job))
        return options.threads * peak + self._held_bytes(options) + self.counter_bytes(options)

    def _held_bytes(self, options: Options) -> int:
        """Return the memory that is held while tensors are merged.

        It is for merges that are read more than once and for packed codes that are turned, of which
        the rest goes to the disk, and for what statistics keep of a tensor: while one is merged,
        the next is measured.
        """
        held = kept = 0
        for job in self._unlike:
            if job.action == "merge" and options.uses_kernels(job):
                kept = max(kept, job.task.held_bytes)
            again = read_again(job.num_passes, (source for _, source in job.sources))
            whole = (*again, *turned_in(source for _, source in job.sources))
            held = max(held, sum(one.num_bytes for one in whole))
        return min(options.memory_bytes, options.threads * held) + 2 * kept

    def counter_bytes(self, options: Options) -> int:
        """Return the memory in which statistics count values, to find those of given ranks."""
        return max((counter_bytes(job, options) for job in self._unlike), default=0)

    def block_memory_bytes(self, options: Options) -> int:
        """Return the memory that blocks take as a rule; `peak_memory_bytes` is the most.

        Kernels hold a block of the output, and only pieces of the sources.
        """
        peak = 0
        for job in self._unlike:
            block = min(block_elements(job, options), job.num_elements)
            whole = block * bytes_per_element(job, options)
            by_torch = options.uses_torch(job) or num_by_torch(job, options)
            if not by_torch and not job.auxiliary:
                sources = sum(source.dtype.num_bytes for _, source in job.sources)
                piece = min(CHUNK_ELEMENTS, job.num_elements)
                whole = min(whole, block * job.output.dtype.num_bytes + piece * sources)
            peak = max(peak, whole + bytes_beside(job))
        return options.threads * peak + self._held_bytes(options) + self.counter_bytes(options)

    def as_dict(self, *, tensors: bool = True) -> dict[str, Any]:
        """Return the plan as JSON values, with an entry for each tensor if `tensors`."""
        return {
            "spec": self.spec.as_dict(),
            "method": self.spec.title,
            "compute_dtypes": sorted(
                {by[1] for job, _ in self.weight_jobs if (by := self.merged_by(job))}
            ),
            "inputs": [
                {
                    "model": entry.reference,
                    "role": entry.role,
                    **({"made_of": [m.reference for m in entry.made_of]} if entry.made_of else {}),
                    "path": str(entry.checkpoint.root),
                    "num_tensors": len(entry.checkpoint.tensors),
                    "num_bytes": sum(meta.num_bytes for meta in entry.stored),
                    "dtypes": dict(Counter(meta.dtype.name for meta in entry.stored)),
                    **({"auxiliary": own} if (own := _beside_as_dict(entry)) else {}),
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
            **({"layers": self._layers_as_dict(self.stacked)} if self.stacked else {}),
            **({"layer_map": [row.as_dict() for row in self.layer_map]} if self.layer_map else {}),
            **({"modules": [m.as_dict() for m in self.modules]} if self.modules else {}),
            "gradients": {name: dict(stacks) for name, stacks in self.gradients.items()},
            "shards": [{"file": s.file, "num_bytes": s.num_bytes} for s in self.shards],
            **({"conversion": self.conversion.as_dict()} if self.conversion else {}),
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
            "tokenizer": self.tokenizer.as_dict() if self.tokenizer else None,
            "chat_template": self.chat_template.as_dict() if self.chat_template else None,
            "num_rows": self.num_rows,
            "added_tokens": [
                {"id": number, "token": token, "from": self.inputs[model].reference}
                for number, token, model in self.added_tokens
            ],
            **({"tensors": list(map(self._job_as_dict, self.jobs))} if tensors else {}),
        }

    def _layers_as_dict(self, stacked: Stacked) -> dict[str, Any]:
        return {
            "stack": stacked.name,
            "prefix": stacked.prefix,
            "num_layers": stacked.num_layers,
            "slices": [
                {
                    "layers": [one.start, one.stop],
                    "sources": [
                        {"model": self.inputs[number].reference, "layer_range": list(layers)}
                        for number, layers in one.ranges.items()
                    ],
                }
                for one in stacked.slices
            ],
        }

    def _job_as_dict(self, job: Job) -> dict[str, Any]:
        return {
            "name": job.name,
            "action": job.action,
            "reason": job.reason,
            "shape": list(job.output.shape),
            "dtype": job.output.dtype.name,
            "file": job.output.file,
            "sources": [self.inputs[index].reference for index, _ in (job.of or job).sources],
            "stored_names": [source.name for _, source in (job.of or job).sources],
            "parameters": dict((job.of or job).parameters),
        }


def _beside_as_dict(entry: Input) -> list[dict[str, Any]]:
    """Return what a method takes of a model besides its weights, as JSON values."""
    return [
        {
            "kind": beside.kind,
            "path": beside.reference,
            "num_tensors": len(beside.stored),
            "num_bytes": sum(meta.num_bytes for meta in beside.stored),
            "dtypes": dict(Counter(meta.dtype.name for meta in beside.stored)),
        }
        for beside in entry.beside
    ]
