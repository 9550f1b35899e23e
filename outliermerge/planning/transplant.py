"""Plans a transplant: a copy of a model with the rows of another tokenizer's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from outliermerge.checkpoint.combined import CombinedRows, Sums, copies
from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.folders.hub import refuse_absent
from outliermerge.checkpoint.layout import plan_layout
from outliermerge.checkpoint.sources import FLOAT_DTYPES, Source
from outliermerge.checkpoint.tokens import token_files
from outliermerge.errors import OutlierMergeError, argument, as_path, listing, shown
from outliermerge.planning.drafts import check_tied
from outliermerge.planning.inputs import open_model, tokenizer_of
from outliermerge.planning.metadata import kept_metadata
from outliermerge.planning.notes import reading_notes
from outliermerge.planning.owners import Beside, choose_files, missing_code
from outliermerge.planning.plan import Input, Job, Plan, Sidecar
from outliermerge.planning.planner import DEFAULT_SHARD_BYTES
from outliermerge.planning.proof import prove
from outliermerge.planning.sidecars import sidecar_contents
from outliermerge.planning.spelling import Pairing, Spelled, pair_tokens, spelled
from outliermerge.planning.tied import match_tied
from outliermerge.planning.tied_names import EMBEDDINGS, is_head
from outliermerge.planning.tokenizer_files import refuse_tekken
from outliermerge.planning.tokenizer_plan import ModelRows, TokenizerPlan
from outliermerge.planning.vocabulary import open_vocabulary
from outliermerge.planning.vocabulary_ids import Side, changed_ids
from outliermerge.planning.vocabulary_rows import VocabularyModel
from outliermerge.planning.vocabulary_tensors import VocabularyTensors, find_vocabulary_tensors
from outliermerge.spec.rename import Rename
from outliermerge.spec.transplant import TransplantSpec
from outliermerge.storage.stamps import Watched, open_file, refuse_text, told_by_name, watching

_TAKE_OUT = "An id without use can be taken out of the config."
_OWN = "rows of tokens in common; those of others are approximated"


@dataclass(frozen=True)
class Target:
    """A tensor of the output that has the rows of the donor's tokens.

    Attributes:
        name: in the output and in the model.
        source: the model's tensor.
        donor: the donor's tensor whose rows tell how rows are made; None if none is needed.
    """

    name: str
    source: Source
    donor: Source | None


@dataclass(frozen=True)
class Transplant:
    """A plan of a transplant, whose approximated rows may not be computed yet.

    Attributes:
        plan: its jobs make all tensors; those of the targets read `CombinedRows`.
        targets: tensors with a row for each token, without those that are tied to others.
        pairing: which tokens the two have in common.
        model, donor: their tokens.
        tokens: the output's tokens by id.
        missing: the output's rows that no row of the model is copied to, in order: tokens that
            the model lacks, and rows without a token.
    """

    plan: Plan
    targets: tuple[Target, ...]
    pairing: Pairing
    model: Spelled
    donor: Spelled
    tokens: Mapping[int, str]
    missing: tuple[int, ...]

    @property
    def spec(self) -> TransplantSpec:
        assert isinstance(self.plan.spec, TransplantSpec)
        return self.plan.spec

    @property
    def model_home(self) -> Path:
        return self.plan.inputs[0].tokenizer_home

    def with_sums(
        self, sums: Mapping[str, Sums], report: Mapping[str, Any], notes: Sequence[str]
    ) -> Transplant:
        """Return the transplant with its rows.

        Args:
            sums: by target what its missing rows are.
            report: how good they are, as JSON values.
            notes: what a person should know of them.
        """
        made = {
            id(job.sources[0][1]): replace(job.sources[0][1], sums=sums[job.name])
            for job in self.plan.jobs
            if job.name in sums and isinstance(job.sources[0][1], CombinedRows)
        }
        jobs = tuple(
            replace(job, sources=((0, made.get(id(job.sources[0][1]), job.sources[0][1])),))
            for job in self.plan.jobs
        )
        plan = replace(self.plan, jobs=jobs, transplant=report, notes=(*self.plan.notes, *notes))
        return replace(self, plan=plan)


def plan_transplant(spec: TransplantSpec, *, shard_bytes: int | None = None) -> Transplant:
    """Plan a transplant from headers and tokenizers; the rows are computed later.

    Raises:
        OutlierMergeError: a model is absent or broken, has no tokenizer or no embeddings, or the
            two do not fit together.
    """
    with told_by_name(), watching(Watched()) as watched:
        planned = _plan(spec, shard_bytes or DEFAULT_SHARD_BYTES)
        for content in sidecar_contents(planned.plan).values():
            if isinstance(content, Path):  # refuse now what cannot be written
                open_file(content).close()
    for entry in planned.plan.inputs:
        refuse_text(entry.checkpoint.root)
    plan = replace(planned.plan, files=watched.stamps, shard_bytes=shard_bytes)
    return replace(planned, plan=plan)


def _plan(spec: TransplantSpec, shard_bytes: int) -> Transplant:
    for reference in (spec.model, spec.donor):
        if "+" not in reference:
            refuse_absent(reference)
    model = open_model(spec.model, Rename(), "base", None)
    if not model.checkpoint.root.is_dir() or "" not in model.checkpoint.components:
        raise OutlierMergeError(
            f"{shown(spec.model)} is a file or a pipeline of several models, expected the folder "
            "of a language model with its config"
        )
    donor = _open_donor(spec)
    tied = match_tied((model,), config_of=model, wanted=None)
    model = tied.inputs[0]
    found = _vocabulary_of(model)
    rows = _open(model, found.num_rows[0])
    theirs = _vocabulary_of(donor) if spec.needs_donor_rows else None
    donated = _open(donor, theirs.num_rows[0] if theirs else None)
    tokens = {**donated.tokens, **donated.beyond}
    ours, its = (
        spelled(entry.tokenizer_home, own) for entry, own in ((model, rows.tokens), (donor, tokens))
    )
    pairing = pair_tokens(ours, its)
    pairing = replace(
        pairing, shared=[pair for pair in pairing.shared if pair[0] < donated.num_rows]
    )
    if spec.needs_donor_rows and not pairing.shared:
        raise OutlierMergeError(
            f"{shown(spec.model)} and {shown(spec.donor)} have no token in common that is not "
            f"special, which {argument('method', spec.approximation)} needs. "
            f"{argument('method', 'subtokens')} needs none."
        )
    num_named = max(tokens, default=-1) + 1
    num_rows = -(-num_named // spec.multiple) * spec.multiple
    kept = [pairing.rows.get(row) for row in range(num_rows)]
    combined = _combined(model, found, kept, spec, pairing)
    targets = tuple(
        Target(name, source.source, _counterpart(name, donor, theirs) if theirs else None)
        for name, source in combined.items()
        if name not in tied.followers
    )
    plan = _plan_of(spec, model, donor, combined, tied.followers, shard_bytes)
    checks = [check_tied(spec, (model,), c) for c in tied.copies if not c.is_stray]
    checks += [replace(c, sources=tuple((0, s) for _, s in c.sources)) for c in model.checks]
    sides = _side(model, rows), _side(donor, donated)
    ids, of_ids = changed_ids(*sides, tokens, ways_out=_TAKE_OUT, keeps_ends=True)
    of_tokenizer = TokenizerPlan(
        spec.donor, spec.donor, len(tokens), num_rows, 0, 0,
        (_counts(spec, rows, pairing, kept, len(tokens)),), ids=ids,
    )  # fmt: skip
    notes = [*tied.notes, *plan.notes, *of_ids, *_notes_on_k(spec, len(pairing.shared), targets)]
    plan = replace(
        plan,
        num_rows=num_rows,
        tokenizer=of_tokenizer,
        ids=ids,
        checks=tuple(checks),
        notes=tuple(notes),
    )
    missing = tuple(row for row, own in enumerate(kept) if own is None)
    return Transplant(plan, targets, pairing, ours, its, tokens, missing)


def _notes_on_k(spec: TransplantSpec, num_shared: int, targets: Sequence[Target]) -> Iterator[str]:
    """Yield a note if there are fewer tokens in common than are to make up a row, or too many."""
    if spec.needs_donor_rows and num_shared < spec.k:
        yield (
            f"k is {spec.k}, but the models have only {num_shared:,} tokens in common that rows "
            "can be made of: all of them are used"
        )
    columns = [target.donor.shape[-1] for target in targets if target.donor is not None]
    if spec.approximation == "omp" and min(spec.k, num_shared) >= min(columns):
        yield (
            f"k is {spec.k}, and a row of the donor has {min(columns):,} elements: as many rows "
            "add up to any row exactly, so that the error in the donor says nothing, and the "
            "model's rows can come out far off. Give a k that is well below it"
        )


def _open_donor(spec: TransplantSpec) -> Input:
    """Open the donor, or only its tokenizer if its rows are not needed."""
    path = as_path(spec.donor)
    if not spec.needs_donor_rows and ("+" not in spec.donor or path.exists()):
        return tokenizer_of(spec.donor)
    try:
        return open_model(spec.donor, Rename(), "model", None)
    except OutlierMergeError as error:
        if path.is_dir() and token_files(path):
            raise OutlierMergeError(
                f"{error.marked}\n{argument('method', spec.approximation)} needs the donor's "
                f"embeddings; {argument('method', 'subtokens')} needs only its tokenizer."
            ) from error
        raise


def _vocabulary_of(entry: Input) -> VocabularyTensors:
    """Return the tensors of a model that have a row for each token."""
    config = read_json(entry.home / "config.json")
    found = find_vocabulary_tensors([entry.checkpoint], [config])
    if 0 not in found.num_rows or not found.axes:
        raise OutlierMergeError(
            f"{shown(entry.reference)}: no tensor is known to have a row for every token"
        )
    return found


def _open(entry: Input, num_rows: int | None) -> VocabularyModel:
    """Return a model's tokens; all of them have rows if it is not known how many there are."""
    checkpoint = replace(entry.checkpoint, root=entry.tokenizer_home)
    found = open_vocabulary(0, entry.reference, checkpoint, 0)
    if not found.has_tokenizer:
        refuse_tekken(entry.reference, entry.tokenizer_home)
        raise OutlierMergeError(f"{shown(entry.reference)} has no tokenizer files that can be read")
    most = max(found.beyond, default=-1) + 1 if num_rows is None else num_rows
    return open_vocabulary(0, entry.reference, checkpoint, most)


def _counterpart(name: str, donor: Input, found: VocabularyTensors) -> Source:
    """Return the donor's tensor that is to it what one is to the model: embeddings or head.

    A donor without a head of its own ties it to the embeddings. A bias goes with its head.
    """
    tensors = donor.checkpoint.tensors
    matrices = [n for n, axis in found.axes.items() if axis == 0 and len(tensors[n].shape) == 2]
    heads = [other for other in matrices if is_head(other)]
    embeddings = [other for other in matrices if not is_head(other)]
    of_head = is_head(name) or name.endswith("bias")
    for other in (*heads, *embeddings) if of_head else (*embeddings, *heads):
        return tensors[other]
    raise OutlierMergeError(f"{shown(donor.reference)} has no matrix of embeddings")


def _combined(
    model: Input,
    found: VocabularyTensors,
    kept: Sequence[int | None],
    spec: TransplantSpec,
    pairing: Pairing,
) -> dict[str, CombinedRows]:
    """Return the model's vocabulary tensors with the donor's rows, not yet computed."""
    tensors = model.checkpoint.tensors
    unclear = [name for name in found.unclear if name in tensors]
    unclear += [n for n, axis in found.axes.items() if axis and tensors[n].shape[0] != 1]
    unclear += [
        name
        for name, source in tensors.items()
        if (name.endswith(EMBEDDINGS) or is_head(name)) and name not in found.axes
        if source.shape[:1] == (found.num_rows[0],)
    ]
    if unclear:
        raise OutlierMergeError(
            "it is unclear whether these tensors have a row for every token, so that "
            f"{shown(model.reference)} cannot get another tokenizer:\n{listing(unclear)}"
        )
    rows = copies(kept)
    basis = xxhash.xxh3_128_hexdigest(repr((spec.as_dict(), rows, pairing.shared)).encode())
    made: dict[int, CombinedRows] = {}  # tied tensors are one
    combined = {}
    for name, axis in found.axes.items():
        source = tensors[name]
        if source.out_dtype.name not in FLOAT_DTYPES:
            raise OutlierMergeError(
                f"{shown(name)} of {shown(model.reference)} is stored as {source.out_dtype.name}, "
                f"expected one of {', '.join(FLOAT_DTYPES)}"
            )
        shape = (len(kept), *source.shape[1:]) if axis == 0 else (1, len(kept))
        if id(source) not in made:
            made[id(source)] = CombinedRows(
                name=source.name, shape=shape, out_dtype=source.out_dtype, dtype=source.dtype,
                source=source, copied=rows, basis=basis,
            )  # fmt: skip
        combined[name] = made[id(source)]
    return combined


def _plan_of(
    spec: TransplantSpec,
    model: Input,
    donor: Input,
    combined: Mapping[str, CombinedRows],
    followers: Mapping[str, str],
    shard_bytes: int,
) -> Plan:
    sources = {**model.checkpoint.tensors, **combined}
    metadata, notes = kept_metadata((model,))
    shards, placed = plan_layout(
        ((name, source.out_dtype, source.shape) for name, source in sources.items()),
        shard_bytes=shard_bytes,
        components=model.checkpoint.components,
        metadata=metadata,
        whole=model.checkpoint.whole,
    )
    jobs = tuple(
        Job("copy", "passthrough", {}, ((0, source),), placed[name],
            reason=_OWN if name in combined else "the model's own")
        for name, source in sources.items()
    )  # fmt: skip
    owners = Beside.of(model), Beside.of(donor)
    chosen = choose_files({"config": owners[0], "tokenizer": owners[1], "processor": owners[0]})
    proof, doubts = prove(
        model.checkpoint.tensors,
        {name: source.shape for name, source in sources.items()},
        read_json(model.home / "config.json"),
        None,
    )
    return Plan(
        spec=spec,
        inputs=(model, donor),
        jobs=jobs,
        shards=tuple(shards),
        sidecars=tuple(Sidecar(name, chosen[name]) for name in sorted(chosen)),
        gradients={},
        dropped=(),
        notes=(*notes, *missing_code(chosen), *doubts, *reading_notes(spec, (model, donor))),
        checks=(),
        proof=proof,
        components=model.checkpoint.components,
        tied=followers,
    )


def _side(entry: Input, rows: VocabularyModel) -> Side:
    return Side(
        entry.reference, entry.home, entry.tokenizer_home, {**rows.tokens, **rows.beyond},
        rows.num_rows,
    )  # fmt: skip


def _counts(
    spec: TransplantSpec,
    rows: VocabularyModel,
    pairing: Pairing,
    kept: Sequence[int | None],
    num_tokens: int,
) -> ModelRows:
    own = [(row, place) for row, place in enumerate(kept) if place is not None]
    return ModelRows(
        spec.model,
        rows.num_rows,
        own=len(own),
        moved=sum(row != place for row, place in own),
        approximated=num_tokens - len(own),
        dropped=len(rows.tokens.keys() - {*pairing.rows.values()}),
        reserved=rows.num_rows - len(rows.tokens),
    )
