"""Makes a plan from a spec and the checkpoints' headers; no tensor is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.layout import OutputTensor, plan_layout
from outliermerge.checkpoint.sources import DTYPES, DType, Source
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.methods.contract import MergeMethod
from outliermerge.planning.advice import Unpaired, advise, overlooked, refuse_unused
from outliermerge.planning.architectures import CANNOT, verdict_on
from outliermerge.planning.auxiliary import Auxiliaries
from outliermerge.planning.buffers import is_buffer, is_computed, is_frequencies, maps_rows
from outliermerge.planning.class_labels import check_labels, leave_out_heads
from outliermerge.planning.inputs import open_inputs
from outliermerge.planning.metadata import kept_metadata
from outliermerge.planning.notes import merge_notes
from outliermerge.planning.other_files import check_other_files
from outliermerge.planning.output_names import written_names
from outliermerge.planning.parameters import Parameters, check_scopes
from outliermerge.planning.plan import Input, Job, Plan
from outliermerge.planning.policies import Policies
from outliermerge.planning.proof import prove
from outliermerge.planning.repeated import check_sizes
from outliermerge.planning.sidecars import choose_sidecars, sidecar_contents
from outliermerge.planning.tied import TiedCopy, grown_rows, lacks_tied_head, match_tied
from outliermerge.planning.unmerged import refuse_unmerged
from outliermerge.planning.vocabulary import Alignment, align_vocabulary
from outliermerge.spec.check import MergeSpec
from outliermerge.storage.stamps import Watched, open_file, refuse_text, told_by_name, watching

DEFAULT_SHARD_BYTES = 5 * 10**9
DEFAULT_MEMORY_BYTES = 2**30
_MISFIT = "of another shape or kind"


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
    with told_by_name(), watching(Watched()) as watched:
        plan = _Planner(spec).plan(shard_bytes)
        for content in sidecar_contents(plan).values():  # refuse now what cannot be written
            if isinstance(content, Path):
                open_file(content).close()
    for entry in plan.inputs:
        refuse_text(entry.checkpoint.root)
    check_sizes(plan)
    return replace(plan, files=watched.stamps, shard_bytes=shard_bytes)


class _Planner:
    def __init__(self, spec: MergeSpec) -> None:
        self.spec = spec
        self.method: MergeMethod = spec.method
        opened, self.model_numbers = open_inputs(spec)
        check_other_files(spec, opened)
        apart = refuse_unmerged(opened)
        wanted = spec.document.config_source
        self.tied = match_tied(
            opened,
            config_of=next((entry for entry in opened if entry.reference == wanted), opened[0]),
            wanted=spec.document.tie_word_embeddings,
        )
        self.alignment = _align(self.tied.inputs, spec)
        self.inputs = tuple(
            replace(
                e,
                checkpoint=replace(
                    e.checkpoint, tensors={**e.checkpoint.tensors, **aligned.tensors}
                ),
            )
            for e, aligned in zip(self.tied.inputs, self.alignment.checkpoints, strict=True)
        )
        self.stored_reference = opened[0].checkpoint.tensors
        self.reference = self.inputs[0].checkpoint.tensors
        self.problems: dict[str, list[str]] = {}
        self.unpaired: dict[int, Unpaired] = {}
        self.misfits: list[tuple[str, int]] = []
        self.dropped: list[str] = []
        self.lacking: dict[str, list[str]] = {}
        self.computed: dict[str, None] = {}
        self.notes = [*apart, *self.tied.notes]
        self.checks = [self._check_tied(copy) for copy in self.tied.copies if not copy.is_stray]
        self.names = dict.fromkeys(n for entry in self.inputs for n in entry.checkpoint.tensors)
        self.policies = Policies(
            spec, self.model_numbers, names=self.names, has_base=self.inputs[0].role == "base"
        )
        self.parameters = Parameters(spec, self.model_numbers, self.names, self.reference)
        self.auxiliaries = Auxiliaries(spec, self.model_numbers)

    def plan(self, shard_bytes: int | None) -> Plan:
        drafts = self._drafts()
        self._raise_problems()
        if self.computed:
            self.notes.append(
                f"{len(self.computed)} buffer(s) that a model's class computes are not in all "
                f"models, which makes no difference:\n{listing(self.computed, limit=5)}"
            )
        used = {number for _, _, sources, *_ in drafts for number, _ in sources}
        refuse_unused(self.inputs, self.model_numbers, used)
        self.spec = self.parameters.without_unused_filters()
        checkpoint = self.inputs[0].checkpoint
        written = written_names(self.spec, self.inputs, [draft[0] for draft in drafts])
        if shard_bytes is None and checkpoint.root.is_dir():
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
        check_scopes(self.method, jobs, len(self.model_numbers))
        sidecars, sidecar_notes = choose_sidecars(self.spec, self.inputs)
        config = next((file for file in sidecars if file.name == "config.json"), None)
        proof, doubts = prove(
            self.stored_reference,
            {name: sources[0][1].shape for name, _, sources, *_ in drafts},
            read_json(config.path) if config else {},
            self.spec.document.tie_word_embeddings,
        )
        return Plan(
            spec=self.spec,
            inputs=self.inputs,
            jobs=jobs,
            shards=tuple(shards),
            sidecars=sidecars,
            gradients=self.parameters.gradients(jobs, {new: old for old, new in written.items()}),
            dropped=tuple(self.dropped),
            notes=(
                *self.notes,
                *self.alignment.notes,
                *sidecar_notes,
                *metadata_notes,
                *doubts,
                *check_labels(self.spec, self.inputs, jobs),
                *overlooked(self.inputs, self.dropped),
                *merge_notes(self.spec, self.inputs, jobs, sidecars, self.dropped, self.lacking),
            ),
            checks=tuple(self.checks),
            proof=proof,
            components=checkpoint.components,
            num_rows=self._num_rows(),
            added_tokens=self.alignment.added_tokens,
            tied=self.tied.followers,
        )

    def _job(self, draft: _Draft, output: OutputTensor) -> Job:
        name, action, sources, parameters, _, why = draft
        method, dtype = self.spec.method_for(parameters), self._compute_dtype(sources)
        job = Job(action, method, parameters, sources, output, dtype, why)
        if action != "merge":
            return job
        original = self.tied.followers.get(name, name)
        holders = [number for number, _ in sources if number in self.model_numbers]
        return replace(
            job,
            context=self.parameters.context(original, output.shape, self.spec.document.seed),
            auxiliary=self.auxiliaries.of(original, output.shape, holders),
            modifiers=self.spec.modifiers,
        )

    def _drafts(self) -> list[_Draft]:
        """Return the draft of each tensor; tied tensors get the same one."""
        drafts = {n: self._draft(n) for n in self.names if n not in self.tied.followers}
        for name, original in self.tied.followers.items():
            draft = drafts[original]
            if draft is None:
                continue
            drafts[name] = (name, *draft[1:])
            numbers = [number for number, _ in draft[2] if number in self.model_numbers]
            if draft[4].is_float and numbers:
                ours, its = (self.parameters.of(n, numbers) for n in (name, original))
                if ours != its:
                    self.notes.append(
                        f"{shown(name)} is tied to {shown(original)} in the output, and takes its "
                        "parameters"
                    )
        return [draft for name in self.names if (draft := drafts.get(name)) is not None]

    def _num_rows(self) -> int | None:
        """Return the number of vocabulary rows if the output's config may state another one."""
        rows = self.alignment.num_rows or grown_rows(self.inputs[0])
        if rows is None and self.spec.document.config_source is not None:
            rows = self.alignment.stored_rows
        return rows

    def _draft(self, name: str) -> _Draft | None:
        holders = [
            number
            for number in self.model_numbers
            if name in self.inputs[number].checkpoint.tensors
        ]
        if name not in self.reference:
            return self._draft_extra(name, holders)
        first = self.reference[name]
        held = [first, *(self.inputs[number].checkpoint.tensors[name] for number in holders)]
        no_floats = not any(source.dtype.is_float for source in held)
        is_rope = is_frequencies(name, held)
        no_weight = no_floats or is_buffer(held) or is_rope
        free = no_weight and not maps_rows(name, first, self.reference)
        if free and self.policies.word("unequal", name) == "base":
            kinds = " or ".join(dict.fromkeys(source.dtype.name for source in held))
            reason = f"{kinds} buffer, the base model's"
            return name, "copy", ((0, first),), {}, first.out_dtype, reason
        for number in holders:
            source = self.inputs[number].checkpoint.tensors[name]
            both_float = source.dtype.is_float and first.dtype.is_float
            if source.shape != first.shape or not (both_float or is_buffer(held)):
                self.misfits.append((name, number))
                self._problem(
                    _MISFIT,
                    f"{shown(name)}: {_describe(first)} in {self.inputs[0].reference}, "
                    f"{_describe(source)} in {self.inputs[number].reference}",
                )
                return None
        if not self._may_lack(name, [n for n in self.model_numbers if n not in holders]):
            return None
        own = (0, first)
        found = tuple((n, self.inputs[n].checkpoint.tensors[name]) for n in holders)
        dtype = self._stored(first)
        if is_buffer(held) or is_rope:
            draft = self._draft_unmergeable(name, own, found)
            return (*draft[:5], "RoPE's frequencies, which models differ in") if is_rope else draft
        if not holders:
            return name, "copy", (own,), {}, dtype, "in no task model"
        if self.method.space == "weight":
            found = tuple(
                (n, self.inputs[n].checkpoint.tensors[name]) if n in holders else own
                for n in self.model_numbers
            )
            holders = list(self.model_numbers)
        parameters = self.parameters.of(name, holders)
        if len(found) == 1 and self.method.idempotent(parameters):
            return name, "copy", found, {}, dtype, "one model, unchanged by the method"
        if self.method.uses_base:
            found = (own, *found)
        one_source = len({source for _, source in found}) == 1 and len(found) > 1
        if one_source and (self.method.uses_base or self.method.idempotent(parameters)):
            return name, "copy", found[:1], {}, dtype, "the same tensor in every model"
        return name, "merge", found, parameters, dtype, ""

    def _draft_unmergeable(self, name: str, own: _Numbered, found: tuple[_Numbered, ...]) -> _Draft:
        sources = tuple(dict.fromkeys([own, *found]))
        dtypes = {self.inputs[n].reference: source.dtype.name for n, source in sources}
        kinds = " or ".join(dict.fromkeys(dtypes.values()))
        if len(set(dtypes.values())) > 1:
            where = ", ".join(f"{dtype} in {model}" for model, dtype in dtypes.items())
            self.notes.append(
                f"{shown(name)}: {where}; a buffer, which is copied as it is in "
                f"{self.inputs[0].reference} if all have the same values (else `unequal` decides)"
            )
        action: Literal["copy", "equal"] = "equal" if len(sources) > 1 else "copy"
        # Keep its own dtype: a smaller one would round indices.
        return name, action, sources, {}, own[1].out_dtype, f"{kinds} buffer"

    def _draft_extra(self, name: str, holders: list[int]) -> _Draft | None:
        copied = []
        for number in holders:
            word = self.policies.word("extra", name, number)
            tied = next((t for t in self.tied.copies if (t.number, t.name) == (number, name)), None)
            if word == "copy":
                copied.append(number)
            elif word is None and tied is not None:
                self.checks.append(self._check_tied(tied))
            elif word is None and is_computed(name, self.inputs[number].checkpoint.tensors[name]):
                continue
            elif word != "drop":
                where, first = self.inputs[number].reference, self.inputs[0].reference
                self._problem("extra", f"{shown(name)}: in {where}, not in {first}")
                self.unpaired.setdefault(number, Unpaired()).extra.append(name)
        found = tuple((n, self.inputs[n].checkpoint.tensors[name]) for n in copied)
        if not found:
            if holders:
                self.dropped.append(name)
            return None
        held = [source for _, source in found]
        if len({(source.shape, source.dtype) for source in held}) > 1 and not is_buffer(held):
            places = ", ".join(self.inputs[n].reference for n in copied)
            self._problem(_MISFIT, f"{name}: differs between {places}")
            return None
        action: Literal["copy", "equal"] = "equal" if len(found) > 1 else "copy"
        dtype = held[0].out_dtype if is_buffer(held) else self._stored(held[0])
        return name, action, found, {}, dtype, "extra, copied"

    def _check_tied(self, tied: TiedCopy) -> Job:
        entry = self.inputs[tied.number]
        copy, original = tied.sources
        reason = (
            f"the output ties {shown(tied.name)} to {shown(tied.original)}, so that of "
            f"{shown(entry.reference)} is left "
            "out, which is right only where they are equal in that model"
        )
        unwritten = OutputTensor(tied.name, copy.dtype, copy.shape, "", 0)
        sources = ((tied.number, copy), (tied.number, original))
        return Job("equal", self.method.name, {}, sources, unwritten, reason=reason)

    def _may_lack(self, name: str, lacking: list[int]) -> bool:
        allowed = True
        for number in lacking:
            word = self.policies.word("missing", name, number)
            if word is None and is_computed(name, self.reference[name]):
                self.computed[name] = None
            elif word != "base":
                self._problem("missing", f"{name}: not in {self.inputs[number].reference}")
                self.unpaired.setdefault(number, Unpaired()).missing.append(name)
                allowed = False
            elif lacks_tied_head(self.inputs[number], name):
                raise OutlierMergeError(
                    f"{name}: not in {self.inputs[number].reference}, whose config ties it to "
                    "embeddings that cannot be told. With `missing: base` the base's head would "
                    "stand beside other embeddings: save that model with its head."
                )
            elif len(lacking) < len(self.model_numbers):
                self.lacking.setdefault(self.inputs[number].reference, []).append(name)
        return allowed

    def _compute_dtype(self, sources: tuple[tuple[int, Source], ...]) -> str:
        wide = any(meta.dtype.name == "float64" for _, meta in sources)
        return "float64" if wide or self.spec.document.dtype == "float64" else "float32"

    def _stored(self, meta: Source) -> DType:
        document = self.spec.document
        wanted = document.out_dtype or document.dtype
        return DTYPES[wanted] if wanted and meta.dtype.is_float else meta.out_dtype

    def _problem(self, kind: str, message: str) -> None:
        self.problems.setdefault(kind, []).append(message)

    def _raise_problems(self) -> None:
        if not self.problems:
            return
        advice = advise(self.inputs, self.unpaired)
        unfit = {number for _, number in self.misfits}
        parts = verdict_on(self.inputs, unfit, {*self.unpaired}, cannot=CANNOT in advice)
        cannot = parts[0] == CANNOT
        for kind, items in self.problems.items():
            parts.append(f"{len(items)} tensor(s) {kind}:\n{listing(items, limit=4)}")
        if _MISFIT in self.problems:
            parts += [] if cannot else ["Such models cannot be merged as they are."]
            misfits = dict(self.misfits)
            others = [name for name in self.names if name not in misfits]
            parts += leave_out_heads(self.inputs, self.misfits, others=others)
        parts += [each for each in advice if each != CANNOT]
        raise OutlierMergeError("\n".join(parts))


_Numbered = tuple[int, Source]
_Action = Literal["merge", "copy", "equal"]
_Draft = tuple[str, _Action, tuple[_Numbered, ...], dict[str, Any], DType, str]


def _align(inputs: tuple[Input, ...], spec: MergeSpec) -> Alignment:
    """Align the vocabulary rows of the tensors that the reference has as well."""
    reference = inputs[0].checkpoint.tensors
    models = [
        (
            entry.reference,
            replace(
                entry.checkpoint,
                root=entry.tokenizer_home,
                tensors={n: s for n, s in entry.checkpoint.tensors.items() if n in reference},
            ),
        )
        for entry in inputs
    ]
    references = [entry.reference for entry in inputs]

    def number(wanted: str | None) -> int:
        return references.index(wanted) if wanted in references else 0

    return align_vocabulary(
        models,
        spec.document.vocabulary,
        homes=[entry.home for entry in inputs],
        tokenizer=number(spec.document.tokenizer_source),
        config=number(spec.document.config_source),
    )


def _describe(source: Source) -> str:
    return f"{source.dtype.name} {list(source.shape)}"
