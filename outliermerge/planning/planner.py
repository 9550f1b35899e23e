"""Makes a plan from a spec and the checkpoints' headers; no tensor is read."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.layout import OutputTensor, plan_layout
from outliermerge.checkpoint.sources import Source
from outliermerge.errors import listing, shown
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.table import method_named
from outliermerge.planning.advice import overlooked, refuse_unused
from outliermerge.planning.auxiliary import Auxiliaries
from outliermerge.planning.chat_templates import choose_template
from outliermerge.planning.class_labels import check_labels
from outliermerge.planning.drafts import Draft, Drafter, Findings, check_tied
from outliermerge.planning.gguf import as_gguf
from outliermerge.planning.inputs import open_inputs, open_tokenizer
from outliermerge.planning.layer_map import layer_map
from outliermerge.planning.metadata import kept_metadata
from outliermerge.planning.modules import PartOfBase, models_of_text, views, with_modules
from outliermerge.planning.notes import merge_notes
from outliermerge.planning.other_files import check_other_files
from outliermerge.planning.output_names import written_names
from outliermerge.planning.owners import input_named
from outliermerge.planning.parameters import (
    Parameters,
    check_scopes,
    context_of,
    gradients_of,
    modifiers_for,
    without_unused_filters,
)
from outliermerge.planning.plan import Input, Job, Module, Plan, Stacked
from outliermerge.planning.policies import Policies
from outliermerge.planning.proof import prove
from outliermerge.planning.quantize import quantized
from outliermerge.planning.repeated import check_sizes
from outliermerge.planning.sidecars import choose_sidecars, sidecar_contents, with_layers
from outliermerge.planning.slices import (
    at_ends,
    left_out,
    parts_of,
    several_dtypes,
    stack_slices,
    stacked_reference,
    unlike_layers,
    whole,
)
from outliermerge.planning.stages import as_input, of_whole
from outliermerge.planning.stops import further_stops
from outliermerge.planning.tied import grown_rows, match_tied
from outliermerge.planning.unmerged import refuse_unmerged
from outliermerge.planning.vocabulary_by_token import align_inputs
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.settings import SpecPath, find_layers
from outliermerge.storage.stamps import Watched, open_file, refuse_text, told_by_name, watching
from outliermerge.storage.stand_ins import naming_addresses

DEFAULT_SHARD_BYTES = 5 * 10**9


@naming_addresses()
def make_plan(spec: MergeSpec, *, shard_bytes: int | None = None) -> Plan:
    """Plan a merge from a spec and the headers of its models.

    Args:
        shard_bytes: most bytes of a weight file; by default 5 GB, and no limit where the output
            is a single file.

    Raises:
        SpecError: a filter or rule matches no tensor, or parameters contradict one another.
        OutlierMergeError: a model is absent or broken, or the models do not fit together; the
            message lists the tensors.
    """
    if shard_bytes is None and spec.repeated is not None:
        shard_bytes = spec.repeated.shard_bytes
    with told_by_name(), watching(Watched()) as watched, _without_collections():
        plan = _Planner(spec, {}).plan(shard_bytes)
        if plan.spec.document.format == "gguf":
            plan = as_gguf(plan)
        for content in sidecar_contents(plan).values():  # refuse now what cannot be written
            if isinstance(content, Path):
                open_file(content).close()
    for entry in plan.inputs:
        refuse_text(entry.checkpoint.root)
    check_sizes(plan)
    return replace(plan, layer_map=layer_map(plan), files=watched.stamps, shard_bytes=shard_bytes)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Let Python not look for cycles: what a plan makes stays, and there is more and more of it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on and not gc.get_freeze_count():
            gc.freeze()  # makes all that there is old, so that it is not looked through at once
            gc.unfreeze()
        if was_on:
            gc.enable()


class _Planner:
    def __init__(
        self,
        spec: MergeSpec,
        stages: dict[str, tuple[Input, MergeSpec]],
        part: PartOfBase | None = None,
    ) -> None:
        self.spec = spec
        self.method: MergeMethod = spec.method
        self.stages, self.stage_notes, self.part = stages, list[str](), part
        self.modules: tuple[Module, ...] = ()
        opened, self.model_numbers = open_inputs(spec, self._open_stage)
        if spec.modules:
            base, self.modules, notes, merges = with_modules(spec, opened[0], self._plan_module)
            self.spec = replace(self.spec, modules=merges)
            opened, self.stage_notes = (base,), [*self.stage_notes, *notes]
        if part is not None:
            opened = views(spec, part, opened, self.model_numbers)
        check_other_files(spec, opened)
        apart = refuse_unmerged(opened)
        self.layers_of = part.base if part is not None else opened[0]
        stack = part.stack if part is not None else spec.document.stack
        self.stacked = stack_slices(spec, opened, self.model_numbers, self.layers_of, stack)
        wanted = spec.document.config_source
        self.tied = match_tied(
            at_ends(self.stacked, opened) if self.stacked else opened,
            config_of=next((entry for entry in opened if entry.reference == wanted), opened[0]),
            wanted=spec.document.tie_word_embeddings,
        )
        self.outside = open_tokenizer(spec, opened)
        self.alignment = align_inputs(self.tied.inputs, spec, self.model_numbers, self.outside)
        self.inputs = tuple(
            replace(
                e,
                checkpoint=replace(
                    e.checkpoint, tensors={**e.checkpoint.tensors, **aligned.tensors}
                ),
            )
            for e, aligned in zip(self.tied.inputs, self.alignment.checkpoints, strict=True)
        )
        self.reference = self.inputs[0].checkpoint.tensors
        further = left_out(self.stacked, opened) if self.stacked else ()
        self.found = Findings(notes=[*self.stage_notes, *apart, *self.tied.notes, *further])
        self.found.checks += (
            check_tied(spec, self.inputs, copy) for copy in self.tied.copies if not copy.is_stray
        )
        self.found.checks += (
            replace(check, sources=tuple((number, source) for _, source in check.sources))
            for number, entry in enumerate(self.inputs)
            for check in entry.checks
        )
        self.parts = [whole(spec, self.inputs, self.model_numbers)]
        self.stored_reference = opened[0].checkpoint.tensors
        if self.stacked is not None:
            self.parts = parts_of(spec, self.stacked, self.inputs, self.layers_of)
            owner = next((n for n, e in enumerate(self.inputs) if e.reference == wanted), 0)
            self.found.notes += unlike_layers(self.stacked, self.inputs, owner)
            self.stored_reference = stacked_reference(self.parts, self.reference)
        self.names = dict.fromkeys(name for part in self.parts for name in part.names)
        names = dict.fromkeys(n for entry in self.inputs for n in entry.checkpoint.tensors)
        self.filtered_names = {**names, **self.names} if self.stacked else {**self.reference}
        policies = Policies(
            spec, self.model_numbers, names=names, has_base=self.inputs[0].role == "base"
        )
        self.layers = find_layers(self.names)
        self.used_settings: set[SpecPath] = set()
        self.auxiliaries = Auxiliaries(spec, self.model_numbers)
        self.drafters = [
            Drafter(
                spec,
                part,
                tied=self.tied,
                policies=policies,
                parameters=Parameters(spec, part, self.used_settings),
                found=self.found,
            )
            for part in self.parts
        ]

    def _open_stage(self, name: str) -> Input:
        """Return a stage as a model; each is planned once for all merges that use it."""
        if name not in self.stages:
            plan = _Planner(self.spec.stages[name], self.stages).plan(None)
            self.stages[name] = as_input(name, plan), plan.spec
            self.stage_notes += [of_whole(note, of=f"stage {shown(name)}") for note in plan.notes]
        entry, spec = self.stages[name]
        self.spec = replace(self.spec, stages={**self.spec.stages, name: spec})
        return entry

    def _plan_module(self, merge: MergeSpec, part: PartOfBase) -> Plan:
        return _Planner(merge, self.stages, part).plan(None)

    def plan(self, shard_bytes: int | None) -> Plan:
        drafts = self._drafts()
        self.found.refuse(self.inputs, list(self.names))
        if self.found.computed:
            self.found.notes.append(
                f"{len(self.found.computed)} buffer(s) that a model's class computes are not in "
                f"all models, which makes no difference:\n{listing(self.found.computed, limit=5)}"
            )
        used = {number for _, _, sources, *_ in drafts for number, _ in sources}
        refuse_unused(self.inputs, self.model_numbers, used)
        if any(drafter.parameters.any_resolved for drafter in self.drafters):
            self.spec = without_unused_filters(self.spec, self.used_settings, self.filtered_names)
        checkpoint = self.inputs[0].checkpoint
        written = written_names(self.spec, self.inputs, [draft[0] for draft in drafts])
        if shard_bytes is None and not self.inputs[0].is_one_file:
            shard_bytes = DEFAULT_SHARD_BYTES
        metadata, metadata_notes = kept_metadata(self.inputs)
        shards, placed = plan_layout(
            ((written[name], dtype, source[0][1].shape) for name, _, source, _, dtype, _ in drafts),
            shard_bytes=shard_bytes,
            components=checkpoint.components,
            metadata=metadata,
            whole=checkpoint.whole,
        )
        jobs = tuple(self._job(draft, placed[written[draft[0]]]) for draft in drafts)
        made, settings, quantized_notes = jobs, None, list[str]()
        entry = self.spec.document.quantize
        if entry is not None and self.spec.document.format != "gguf":
            found = quantized(self.spec, entry, self.inputs, jobs)
            shards, placed = plan_layout(
                ((job.name, job.output.dtype, job.output.shape) for job in found.jobs),
                shard_bytes=shard_bytes,
                components=checkpoint.components,
                metadata=metadata,
                whole=checkpoint.whole,
            )
            made = tuple(replace(job, output=placed[job.name]) for job in found.jobs)
            settings, quantized_notes = found.settings, [found.note]
        check_scopes(self.method, jobs, len(self.model_numbers), slices=self.stacked is not None)
        tokenizer = self.alignment.tokenizer
        wanted = self.outside.reference if self.outside else self.spec.tokenizer_owner
        others = (self.outside,) if self.outside else ()
        owner = input_named((*self.inputs, *others), wanted)
        sidecars, sidecar_notes = choose_sidecars(
            self.spec, self.inputs, tokenizer, self.stacked, owner, self.alignment.left_out
        )
        ids, stop_notes = further_stops(
            self.spec, self.inputs, self._ending(), sidecars, self.alignment, owner
        )
        template, template_notes = choose_template(self.spec, self.inputs, tokenizer, owner)
        config = next((file for file in sidecars if file.name == "config.json"), None)
        said = read_json(config.path) if config else {}
        if self.stacked is not None:
            said = with_layers(said, self.spec, self.inputs, self.stacked)
        proof, doubts = prove(
            self.stored_reference,
            {name: sources[0][1].shape for name, _, sources, *_ in drafts},
            said,
            self.spec.document.tie_word_embeddings,
        )
        return Plan(
            spec=self.spec,
            inputs=tuple(
                replace(entry, beside=self.auxiliaries.beside(number))
                for number, entry in enumerate(self.inputs)
            ),
            jobs=made,
            shards=tuple(shards),
            sidecars=sidecars,
            gradients=gradients_of(jobs, {new: old for old, new in written.items()}, self.layers),
            dropped=tuple(self.found.dropped),
            notes=(
                *self.found.notes,
                *self.alignment.notes,
                *self.auxiliaries.notes,
                *sidecar_notes,
                *stop_notes,
                *template_notes,
                *metadata_notes,
                *doubts,
                *quantized_notes,
                *(several_dtypes(self.stacked, jobs) if self.stacked else ()),
                *check_labels(self.spec, self.inputs, jobs),
                *overlooked(self.inputs, self.found.dropped),
                *merge_notes(
                    self.spec, self.inputs, jobs, sidecars, self.found.dropped, self.found.lacking
                ),
            ),
            checks=tuple(self.found.checks),
            proof=proof,
            components=checkpoint.components,
            num_rows=self._num_rows(),
            added_tokens=self.alignment.added_tokens,
            tokenizer=tokenizer,
            ids={**(tokenizer.ids if tokenizer else {}), **ids},
            chat_template=template,
            tied=self.tied.followers,
            stacked=self._stacked(),
            modules=self.modules,
            quantization=settings,
        )

    def _ending(self) -> list[Input]:
        """Return the models as which the output may end its texts; modules are asked together."""
        if self.modules:
            return models_of_text(self.inputs[0], self.modules)
        return [] if self.part is not None else [self.inputs[n] for n in self.model_numbers]

    def _job(self, draft: Draft, output: OutputTensor) -> Job:
        name, action, sources, parameters, _, why = draft
        if self.modules:
            owner = next((module.name for module in self.modules if name in module.names), None)
            why = f"module {shown(owner)}" if owner else "in no module, the base model's"
        original = self.tied.followers.get(name, name)
        context = context_of(
            original, output.shape, self.layers.get(original), self.spec.document.seed
        )
        holders: list[int] = []
        if self.method.auxiliary:
            holders = [number for number, _ in sources if number in self.model_numbers]
            lacks = self.auxiliaries.lacking(original, holders)
            turned = self.auxiliaries.turned(original, holders)
            context = replace(context, lacks=lacks, turned=turned)
        method, dtype = self.spec.method_for(parameters, context), self._compute_dtype(sources)
        stochastic = self.spec.document.rounding == "stochastic" and output.dtype.is_float
        if action != "merge":
            job = Job(action, method, parameters, sources, output, dtype, why)
            return replace(job, context=context, stochastic=True) if stochastic else job
        own = method_named(method)
        auxiliary = self.auxiliaries.of(original, output.shape, holders, own)
        modifiers = modifiers_for(self.spec, context)
        return Job(
            *(action, method, parameters, sources, output, dtype, why, context, auxiliary),
            *(modifiers, stochastic),
        )

    def _drafts(self) -> list[Draft]:
        """Return the draft of each tensor; tied tensors get the same one."""
        drafts: dict[str, Draft | None] = {}
        drafter_of: dict[str, Drafter] = {}
        for drafter in self.drafters:
            for name in drafter.part.names:
                if name not in self.tied.followers:
                    drafts[name], drafter_of[name] = drafter.draft(name), drafter
        for name, original in self.tied.followers.items():
            draft = drafts.get(original)
            if draft is None:
                continue
            drafter = drafter_of[original]
            drafts[name], drafter_of[name] = (name, *draft[1:]), drafter
            numbers = [number for number, _ in draft[2] if number in drafter.model_numbers]
            if draft[4].is_float and numbers:
                ours, its = (drafter.parameters.of(n, numbers) for n in (name, original))
                if ours != its:
                    self.found.notes.append(
                        f"{shown(name)} is tied to {shown(original)} in the output, and takes its "
                        "parameters"
                    )
        return [draft for name in self.names if (draft := drafts.get(name)) is not None]

    def _stacked(self) -> Stacked | None:
        if self.stacked is None:
            return None
        behind = (n for n in self.parts[-1].names if not n.startswith(self.stacked.prefix))
        return replace(self.stacked, after=frozenset(behind))

    def _num_rows(self) -> int | None:
        """Return the number of vocabulary rows if the output's config may state another one."""
        rows = self.alignment.num_rows or grown_rows(self.inputs[0])
        if rows is None and self.spec.document.config_source is not None:
            rows = self.alignment.stored_rows
        return rows

    def _compute_dtype(self, sources: tuple[tuple[int, Source], ...]) -> str:
        if self.spec.document.dtype == "float64":
            return "float64"
        for _, source in sources:
            if source.dtype.name == "float64":
                return "float64"
        return "float32"
