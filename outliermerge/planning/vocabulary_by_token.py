"""Models whose rows go by the tokens of the output's tokenizer, as `tokenizer` in a spec asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.sources import Checkpoint
from outliermerge.checkpoint.tokens import load_tokens, read_tokens, token_files
from outliermerge.errors import OutlierMergeError, listing, quoted, shown
from outliermerge.planning.owners import check_content
from outliermerge.planning.plan import Input
from outliermerge.planning.tokenizer_files import (
    TOKENIZER,
    added_entries,
    contradicting,
    extend,
    how_to_convert,
    plain_entry,
    read_files,
    refuse_tekken,
)
from outliermerge.planning.tokenizer_pieces import Donor, with_pieces
from outliermerge.planning.tokenizer_plan import TokenizerPlan
from outliermerge.planning.vocabulary import (
    Alignment,
    align_vocabulary,
    open_vocabulary,
    stale_files,
)
from outliermerge.planning.vocabulary_cells import TokenRows
from outliermerge.planning.vocabulary_ids import Side, changed_ids
from outliermerge.planning.vocabulary_rows import VocabularyModel, count
from outliermerge.planning.vocabulary_runs import padded, rearrange
from outliermerge.planning.vocabulary_tensors import VocabularyTensors, find_vocabulary_tensors
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.settings import SettingError
from outliermerge.spec.tokenizer import BASE, UNION, TokenizerRequest
from outliermerge.storage.stamps import is_there


def align_inputs(
    inputs: Sequence[Input],
    spec: MergeSpec,
    numbers: Sequence[int],
    outside: Input | None = None,
) -> Alignment:
    """Align the vocabulary rows of the tensors that the reference has as well.

    Args:
        numbers: the inputs that are the spec's models, in its order.
        outside: the model whose tokenizer the output has, if it is named in other words, or is
            not merged.

    Raises:
        SpecError: the spec names a token or row that there is not.
        OutlierMergeError: the vocabularies cannot be aligned as the spec asks.
    """
    reference = inputs[0].checkpoint.tensors
    checkpoints = [
        replace(
            entry.checkpoint,
            root=entry.tokenizer_home,
            tensors={n: s for n, s in entry.checkpoint.tensors.items() if n in reference},
        )
        for entry in inputs
    ]
    places = {entry.reference: number for number, entry in enumerate(inputs)}
    places |= {m.reference: n for m, n in zip(spec.models, numbers, strict=True)}

    def number_of(name: str | None) -> int:
        return places.get(name or BASE, 0)  # or the base in other words, such as ./base

    config = number_of(spec.document.config_source)
    homes = [entry.home for entry in inputs]
    if spec.tokenizer is not None:
        owner = 0 if spec.tokenizer.source in (BASE, UNION) else number_of(spec.tokenizer.source)
        names = [entry.reference for entry in inputs]
        if outside is not None:
            owner = places.get(outside.reference, len(inputs))
        if outside is not None and owner == len(inputs):
            names, homes = [*names, outside.reference], [*homes, outside.home]
            checkpoints = [*checkpoints, outside.checkpoint]
        models = _Models(names, checkpoints, homes, config, owner)
        try:
            found = _by_token(models, spec.tokenizer, number_of, has_base=inputs[0].role == "base")
            return replace(found, checkpoints=found.checkpoints[: len(inputs)])
        except SettingError as error:
            raise spec.source.error(error.path, str(error), at_key=error.at_key) from error
    return align_vocabulary(
        [(entry.reference, c) for entry, c in zip(inputs, checkpoints, strict=True)],
        spec.document.vocabulary or "error",
        homes=homes,
        tokenizer=number_of(spec.tokenizer_owner),
        config=config,
    )


@dataclass(frozen=True)
class _Models:
    """The models of a merge, and one without tensors if its tokenizer is of no merged model.

    Attributes:
        names: in the spec.
        checkpoints: their roots have the tokenizers.
        homes: the folders of their configs.
        config: the number of the model whose config the output has.
        owner: the number of the model whose tokenizer the output's is made from.
    """

    names: Sequence[str]
    checkpoints: Sequence[Checkpoint]
    homes: Sequence[Path]
    config: int
    owner: int

    def root(self, number: int) -> Path:
        return self.checkpoints[number].root


@dataclass(frozen=True)
class _Built:
    """A tokenizer: its tokens by id, the files that differ from its model's, what is added.

    And the files of its model that would contradict it.
    """

    tokens: Mapping[int, str]
    files: Mapping[str, bytes]
    num_added: int = 0
    num_pieces: int = 0
    left_out: tuple[str, ...] = ()


def _by_token(
    models: _Models, request: TokenizerRequest, number_of: Callable[[str], int], *, has_base: bool
) -> Alignment:
    checkpoints = tuple(models.checkpoints)
    configs = [read_json(home / "config.json") for home in models.homes]
    found = find_vocabulary_tensors(checkpoints, configs)
    owner = models.owner
    nothing = Alignment(checkpoints, None, (), (), found.num_rows.get(0))
    if any("" not in c.components for c in checkpoints) or 0 not in found.num_rows:
        if request.path == ("tokenizer_source",):
            return nothing
        raise SettingError(request.path, "no tensor is known to have a row for every token")
    own = _tokens(models.root(owner))
    if own is None:
        if request.path == ("tokenizer_source",) and not request.is_union:
            if all(read_tokens(c.root) is None for c in checkpoints):
                return nothing
        refuse_tekken(models.names[owner], models.root(owner))
        raise SettingError(
            request.path, f"{shown(models.names[owner])} has no tokenizer files that can be read"
        )
    members, notes = _open(models, found)
    built = _build(models, own, request, members)
    num_kept = _num_kept(built, next((m for m in members if m.number == owner), members[0]))
    num_rows = -(-num_kept // request.multiple) * request.multiple
    rows = TokenRows(members, built.tokens, num_kept, request, number_of, has_base=has_base)
    aligned = _rearranged(checkpoints, found, rows, num_rows)
    counts = tuple(
        replace(rows.counts(m.number), follows=None if m.has_tokenizer else models.names[0])
        for m in members
    )
    side = {number: _side(models, number, members) for number in (models.config, owner)}
    if owner not in found.num_rows:
        side[owner] = replace(side[owner], tokens=own, num_rows=len(own))
    ids, of_ids = changed_ids(side[models.config], side[owner], built.tokens)
    plan = TokenizerPlan(
        request.source, models.names[owner], len(built.tokens), num_rows,
        built.num_added, built.num_pieces, counts, built.files, built.left_out, ids,
    )  # fmt: skip
    notes += [*of_ids, *_notes(plan, rows)]
    if request.is_union:
        notes += _without_ends(models, found, built)
    changed = any(a is not b for a, b in zip(aligned, checkpoints, strict=True))
    known = {*found.num_rows.values()} != {num_rows} or changed
    return Alignment(
        tuple(aligned), num_rows if known else None, (), tuple(notes), found.num_rows[0], plan,
        built.left_out, built.tokens,
    )  # fmt: skip


def _num_kept(built: _Built, table: VocabularyModel) -> int:
    """Return how many rows the output has before padding.

    Behind the tokens are the reserved rows of the model whose tokenizer it is, or of the first.
    """
    num_named = max(built.tokens, default=-1) + 1
    is_reserved = max(table.tokens, default=-1) < num_named
    return max(num_named, table.num_rows) if is_reserved else num_named


def _without_ends(models: _Models, found: VocabularyTensors, built: _Built) -> Iterator[str]:
    """Yield a note on tokens of models that give the output no embeddings."""
    known = set(built.tokens.values())
    for number, name in enumerate(models.names):
        if number in found.num_rows:
            continue
        if lost := [t for t in (_tokens(models.root(number)) or {}).values() if t not in known]:
            yield (
                f"{count(len(lost), 'token')} that only {shown(name)} has ({_some(lost)}): not in "
                "the union, as its embeddings and head are not merged"
            )


def _tokens(root: Path) -> dict[int, str] | None:
    """Return the tokens of a folder's tokenizer files; None if it has none.

    Raises:
        OutlierMergeError: a file is broken; the message says where.
    """
    try:
        return read_tokens(root)
    except OutlierMergeError:
        for path in token_files(root):
            check_content(path)
        raise


def _open(models: _Models, found: VocabularyTensors) -> tuple[list[VocabularyModel], list[str]]:
    """Return the models that have vocabulary tensors; one without tokenizer has the first's."""
    members = [
        open_vocabulary(number, models.names[number], models.checkpoints[number], rows)
        for number, rows in found.num_rows.items()
    ]
    first, notes = members[0], list[str]()
    for place, model in enumerate(members):
        if not model.has_tokenizer:
            refuse_tekken(model.name, models.root(model.number))
            tokens = {id_: t for id_, t in first.tokens.items() if id_ < model.num_rows}
            members[place] = replace(model, tokens=tokens)
            notes.append(
                f"{shown(model.name)} has no tokenizer files that can be read: its rows are taken "
                f"for those of the tokens of {shown(first.name)}"
            )
    return members, notes


def _build(
    models: _Models,
    own: dict[int, str],
    request: TokenizerRequest,
    members: Sequence[VocabularyModel],
) -> _Built:
    """Return the output's tokenizer."""
    root, name = models.root(models.owner), models.names[models.owner]
    known = set(own.values())
    added_to = {m.number: added_entries(models.root(m.number)) for m in members}
    entries: dict[str, dict[str, Any]] = {}  # of all models, the first that has it
    for model in members:
        ordered = [token for token in model.ids if token in added_to[model.number]]
        entries |= {t: added_to[model.number][t] for t in ordered if t not in entries}
    donors: list[Donor] = []
    new: dict[str, dict[str, Any]] = {}
    if request.is_union:
        before = added_entries(root)
        new = {token: entry for token, entry in entries.items() if token not in before}
        seen = {*known, *entries}
        for model in members:
            further = [token for token in model.ids if token not in seen]
            seen.update(further)
            if further:
                donors.append(Donor(model.name, models.root(model.number), further))
    pieces = {piece for donor in donors for piece in donor.pieces}
    for token in request.tokens:
        if token not in known and token not in pieces:
            new.setdefault(token, entries.get(token) or plain_entry(token))
    if not new and not donors:
        return _Built(own, {})
    if not is_there(root / TOKENIZER):
        raise OutlierMergeError(
            f"{count(len(new) + len(pieces), 'token')} must be added to the tokenizer of "
            f"{shown(name)}, which has no {TOKENIZER}: {how_to_convert(root)}"
        )
    files = original = read_files(root)
    if donors:
        files = with_pieces(extend(files, root, [], own.values()), root, own, donors)
        own = load_tokens(files, root)
    files = extend(files, root, [*new.values()], own.values())
    tokens = load_tokens(files, root)
    wanted = known | pieces | new.keys()
    if any(tokens.get(id_) != token for id_, token in own.items()) or wanted - {*tokens.values()}:
        strange = sorted(wanted - {*tokens.values()})[:5]
        raise OutlierMergeError(
            f"{root}: the tokenizers library numbers its tokens otherwise once others are added"
            + (f", and drops {listing(map(quoted, strange))}" if strange else "")
            + ". `tokenizer: {source: base}` keeps it as it is."
        )
    changed = {name: data for name, data in files.items() if data != original.get(name)}
    stale = contradicting(files, root)
    return _Built(tokens, changed, len(tokens) - len(known), len(pieces), stale)


def _rearranged(
    checkpoints: Sequence[Checkpoint], found: VocabularyTensors, rows: TokenRows, num_rows: int
) -> list[Checkpoint]:
    """Return the checkpoints with the output's rows in their vocabulary tensors."""
    tensors = [dict(checkpoint.tensors) for checkpoint in checkpoints]
    moved: set[int] = set()
    for name, axis in found.axes.items():
        held = {n: c.tensors[name] for n, c in enumerate(checkpoints) if name in c.tensors}
        for number in held:
            source = rearrange(number, held, rows.cells(number, held), axis)
            tensors[number][name] = padded(source, num_rows, axis)
            if tensors[number][name] is not held[number]:
                moved.add(number)
    doubtful = [n for n in found.unclear if any(n in checkpoints[k].tensors for k in moved)]
    if doubtful:
        raise OutlierMergeError(
            "the rows of embeddings and head change, and it is unclear whether these tensors have "
            f"a row for every token:\n{listing(doubtful)}\nSuch models cannot be merged with "
            "another tokenizer."
        )
    return [
        replace(c, tensors=tensors[number]) if number in moved else c
        for number, c in enumerate(checkpoints)
    ]


def _side(models: _Models, number: int, members: Sequence[VocabularyModel]) -> Side:
    member = next((m for m in members if m.number == number), None)
    tokens = {**member.tokens, **member.beyond} if member else {}
    return Side(
        models.names[number], models.homes[number], models.root(number),
        tokens, member.num_rows if member else 0,
    )  # fmt: skip


def _notes(plan: TokenizerPlan, rows: TokenRows) -> list[str]:
    notes = []
    if zero := rows.without_row():
        notes.append(
            f"no model has a row for {count(len(zero), 'token')} of the tokenizer of "
            f"{shown(plan.reference)} ({_some(zero)}): the output's is zero"
        )
    if plan.left_out:
        notes.append(stale_files(plan.reference, plan.left_out, plan.num_added))
    beyond = [m for m in plan.models if m.reserved and m.num_rows > plan.num_rows]
    if beyond:
        which = ", ".join(f"{m.reserved:,} of {m.reference}" for m in beyond)
        notes.append(
            f"rows without a token are left out where the output has fewer rows ({shown(which)})"
        )
    return notes


def _some(tokens: Sequence[str]) -> str:
    return ", ".join(map(quoted, tokens[:5])) + (", …" if len(tokens) > 5 else "")
