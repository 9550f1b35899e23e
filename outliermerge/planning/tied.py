"""Tied tensors: several names under which a model uses one tensor.

A model may store such a tensor once, several times, or as separate tensors.

An output head may be tied to the embeddings: `tie_word_embeddings` in the config says so, or the
default of the model type. The embeddings of an encoder and its decoder are always one tensor, and
so are the two biases of a BERT head. This module gives all models the same names for tied tensors.
It also tells the plan which tensors of the output are tied, so that they are written equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from outliermerge.checkpoint.config import read_json, text_config
from outliermerge.checkpoint.sources import Source
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.planning.plan import Input
from outliermerge.planning.tied_names import (
    EMBEDDINGS,
    component,
    embeddings_of,
    head_of,
    is_head,
    may_have_head,
    original_of,
    ties_head,
)

WAYS_OUT = (
    "`tie_word_embeddings: false` in the spec gives the output a head of its own, and its config "
    "says so; `tie_word_embeddings: true` uses the embeddings as the head, and what the head "
    "learned apart from them is left out."
)


@dataclass(frozen=True)
class TiedCopy:
    """Two tensors of one model that must be equal for the merge to be right.

    Attributes:
        number: the number of the input.
        name: the name of the copy in the merge.
        original: the name of the tensor that it is tied to.
        sources: the copy and the original, as the model stores them.
        is_stray: the output has no such copy, so the policy `extra` applies to it.
    """

    number: int
    name: str
    original: str
    sources: tuple[Source, Source]
    is_stray: bool


@dataclass(frozen=True)
class Tied:
    """Models whose tied tensors have the output's names.

    Attributes:
        inputs: the models.
        followers: for each tied tensor of the output, the name of the tensor that it equals.
        copies: pairs of tensors that must be equal in a model.
        notes: notes for the user.
    """

    inputs: tuple[Input, ...]
    followers: Mapping[str, str]
    copies: tuple[TiedCopy, ...]
    notes: tuple[str, ...]


def grown_rows(entry: Input) -> int | None:
    """Return the number of embedding rows if an adapter has changed it; else None."""
    if entry.home == entry.checkpoint.root:
        return None
    tensors = entry.checkpoint.tensors
    rows = {tensors[name].shape[0] for name in tensors if name.endswith(EMBEDDINGS)}
    said = text_config(_config(entry)).get("vocab_size")
    return rows.pop() if len(rows) == 1 and said not in (None, *rows) else None


def tied_heads(entry: Input, heads: Iterable[str]) -> dict[str, str]:
    """Return the heads that a model ties, each with the name of its embeddings.

    Args:
        entry: the model.
        heads: the heads that the model stores or that its adapter has. If there are none, the name
            of the head that the model must have is derived.
    """
    tensors, heads = entry.checkpoint.tensors, list(heads)
    if not heads and may_have_head(_config(entry)):
        embeddings = [name for name in tensors if name.endswith(EMBEDDINGS)]
        derived = head_of(embeddings[0]) if len(embeddings) == 1 else None
        heads = [derived] if derived else []
    found = {head: original_of(head, tensors) for head in heads}
    return {
        head: original
        for head, original in found.items()
        if original and _ties(entry, head, [original])
    }


def with_embeddings(entry: Input) -> Input:
    """Return a model; a tied tensor stored only as the head gets the embeddings' name."""
    tensors = entry.checkpoint.tensors
    head = _lone_head(entry)
    name = head and embeddings_of(head, tensors)
    if not name or name in tensors:
        return entry
    named = {name if other == head else other: source for other, source in tensors.items()}
    return replace(entry, checkpoint=replace(entry.checkpoint, tensors=named))


def _lone_head(entry: Input) -> str | None:
    """Return the head of a model that ties the head to embeddings which it does not store."""
    tensors = entry.checkpoint.tensors
    heads = [name for name in tensors if is_head(name)]
    if len(heads) != 1 or original_of(heads[0], tensors):
        return None
    return heads[0] if _ties(entry, heads[0], []) else None


def unnamed_tie(entry: Input) -> str | None:
    """Return the one tensor that a model stores of a tied pair, if the other's name is unknown."""
    tensors = entry.checkpoint.tensors
    if head := _lone_head(entry):
        return head
    embeddings = [name for name in tensors if name.endswith(EMBEDDINGS)]
    if any(map(is_head, tensors)) or len(embeddings) != 1 or head_of(embeddings[0]):
        return None
    return embeddings[0] if may_have_head(_config(entry)) and ties_head(_config(entry)) else None


def lacks_tied_head(entry: Input, name: str) -> bool:
    """Tell whether a tensor that a model lacks is a head that its config ties."""
    return is_head(name) and ties_head(_config(entry)) is True


def match_tied(inputs: tuple[Input, ...], *, config_of: Input, wanted: bool | None) -> Tied:
    """Give the tied tensors of every model the output's names.

    Args:
        inputs: the models, the reference first.
        config_of: the model whose config the output has.
        wanted: whether the output ties its head, if the spec says so; else None.

    Raises:
        OutlierMergeError: a model has a separately trained head that the output's config ties to
            the embeddings, or the models do not allow what the spec asks for.
    """
    matching = _Matching(inputs, config_of, wanted)
    for original, copies in _families(inputs, derive=wanted is False).items():
        matching.add(original, copies)
    return matching.result()


class _Matching:
    def __init__(self, inputs: tuple[Input, ...], config_of: Input, wanted: bool | None) -> None:
        self.inputs, self.config_of, self.wanted = inputs, config_of, wanted
        self.tensors = [dict(entry.checkpoint.tensors) for entry in inputs]
        self.followers: dict[str, str] = {}
        self.copies: list[TiedCopy] = []
        self.notes: list[str] = []
        self.parted: list[str] = []

    def result(self) -> Tied:
        if self.parted:
            raise OutlierMergeError(
                "heads were trained apart from the embeddings that "
                f"{self.config_of.reference} ties them to:\n{listing(self.parted)}\n{WAYS_OUT}"
            )
        inputs = tuple(
            replace(entry, checkpoint=replace(entry.checkpoint, tensors=held))
            for entry, held in zip(self.inputs, self.tensors, strict=True)
        )
        copies = (*self.copies, *self._alike())
        return Tied(inputs, self.followers, copies, tuple(self.notes))

    def _alike(self) -> list[TiedCopy]:
        """Return what adapters need equal, without heads that the spec leaves out by tying."""
        known = {copy.sources for copy in self.copies}
        return [
            TiedCopy(number, *alike, is_stray=False)
            for number, entry in enumerate(self.inputs)
            for alike in entry.alike
            if not self.wanted and alike[2] not in known
        ]

    def add(self, original: str, copies: Sequence[str]) -> None:
        """Match the tensors that may be stored under an original's name or its copies' names."""
        if not any(name in self.tensors[0] for name in (original, *copies)):
            return  # a policy applies to it, or it is not tied
        if self._are_untied_biases((original, *copies)):
            return
        heads = [name for name in copies if is_head(name)]
        embeddings = [original, *(name for name in copies if name not in heads)]
        own = [{h for h in heads if self._is_own(e, h, embeddings)} for e in self.inputs]
        ties = {head: self._output_ties(head, is_own=head in own[0]) for head in heads}
        apart = [h for h in heads if not ties[h] and (h in self.tensors[0] or h not in own[0])]
        written = [name for name in (original, *copies) if name in self.tensors[0]]
        if original not in written:  # transformers 4 needs the original
            written = [original, *(name for name in written if name in apart)]
        written = list(dict.fromkeys((*written, *apart)))
        follows = [name for name in written if name not in (original, *apart)]
        self.followers |= dict.fromkeys(follows, original)
        for number, untied in enumerate(own):
            # If the reference should have a head and does not store it, other models' heads are
            # extra.
            heads = [head for head in heads if ties[head] or head in apart]
            tied = [name for name in (*embeddings, *heads) if name not in untied]
            untied &= set(heads)
            self._give(number, tied, untied, written, follows)

    def _are_untied_biases(self, names: Sequence[str]) -> bool:
        """Tell whether every model stores a bias of an untied head under all of its names.

        transformers 5 ties a head's bias only together with its weight, and trains one of the two.
        """
        return all(name.endswith(".bias") for name in names) and all(
            ties_head(_config(entry)) is False and held.keys() >= set(names)
            for entry, held in zip(self.inputs, self.tensors, strict=True)
            if not held.keys().isdisjoint(names)
        )

    def _is_own(self, entry: Input, head: str, embeddings: Sequence[str]) -> bool:
        """Tell whether a model's head is its own, or may be if the spec unties the output."""
        tensors = entry.checkpoint.tensors
        stores_both = head in tensors and any(name in tensors for name in embeddings)
        return (self.wanted is False and stores_both) or not _ties(entry, head, embeddings)

    def _output_ties(self, head: str, *, is_own: bool) -> bool:
        """Tell whether the output's head is tied to its embeddings.

        Args:
            head: the head's name in the output.
            is_own: the reference does not tie the head.
        """
        is_adapted = head in self.inputs[0].parted
        if self.wanted and is_own and head in self.tensors[0] and not is_adapted:
            raise OutlierMergeError(
                f"`tie_word_embeddings: true`: {self.inputs[0].reference} does not tie its "
                f"{shown(head)}, "
                "which the output cannot do without"
            )
        ties = ties_head(_config(self.config_of)) if self.wanted is None else self.wanted
        return not is_own if ties is None else ties

    def _give(
        self,
        number: int,
        tied: Sequence[str],
        untied: set[str],
        written: Sequence[str],
        follows: Sequence[str],
    ) -> None:
        """Give a model its tied tensor under the output's names.

        Args:
            number: the model's number.
            tied: the names under which the model uses the tensor.
            untied: the names of heads that the model does not tie.
            written: the names that the output has.
            follows: those names in `written` that the output ties to the original.
        """
        held, reference = self.tensors[number], self.inputs[number].reference
        source = next((name for name in tied if name in held), None)
        if source is None:
            return
        value = held[source]
        # Heads for which the model's config or the spec decides, whatever their values are.
        chosen = {*untied, *(name for name in tied if self.wanted and is_head(name))}
        for name in written:
            own = held.get(name)
            if own is value or (name in untied and (own is None or name not in follows)):
                continue
            if own is None:
                what = f"{shown(name)} to {shown(source)}"
                self.notes.append(f"{shown(reference)} ties {what}, which stands for it")
            elif name not in chosen or self._may_follow(number, name):
                self._compare(number, name, source, value)
            held[name] = value
        for name in [name for name in (*tied, *untied) if name in held and name not in written]:
            is_chosen = name in chosen and held[name] is not value
            if is_chosen and not self._may_follow(number, name):
                del held[name]
            elif number or held[name] is not value:
                self._compare(number, name, source, value, is_stray=number > 0)
            if number == 0:
                what = f"{shown(name)} of {shown(reference)}"
                self.notes.append(f"{what} is written as {shown(written[0])}")
                del held[name]

    def _compare(
        self, number: int, name: str, original: str, value: Source, *, is_stray: bool = False
    ) -> None:
        """Register two tensors of a model to be compared before the merge; compare shapes now."""
        own = self.tensors[number][name]
        if own.shape == value.shape:
            self.copies.append(TiedCopy(number, name, original, (own, value), is_stray))
        elif not is_stray:
            raise OutlierMergeError(
                f"{shown(self.inputs[number].reference)}: {shown(name)} {list(own.shape)} is tied "
                f"to {shown(original)} "
                f"{list(value.shape)}, but is of another shape"
            )

    def _may_follow(self, number: int, head: str) -> bool:
        """Tell whether a model's own head may equal its embeddings, as the output's head does."""
        entry = self.inputs[number]
        if self.wanted:
            self.notes.append(
                f"{shown(head)} of {shown(entry.reference)} is left out, as the output ties it"
            )
        elif head in entry.parted:
            self.parted.append(f"{shown(head)} of {shown(entry.reference)}")
        else:
            return True
        return False


def _families(inputs: Sequence[Input], *, derive: bool) -> dict[str, list[str]]:
    """Return for each original the other names under which some model may store it.

    Args:
        derive: derive the name of a head if no model stores one.
    """
    known: dict[str, Source] = {}
    for entry in inputs:
        for name, source in entry.checkpoint.tensors.items():
            known.setdefault(name, source)
    families: dict[str, list[str]] = {}
    heads = [name for name in known if is_head(name)]
    if len(heads) == 1 and original_of(heads[0], known) is None:
        # Saved by safetensors' save_model, which keeps one of the two and may choose the head.
        families |= {name: heads for name in [embeddings_of(heads[0], known)] if name}
    for name in known:
        if original := original_of(name, known):
            # A copy of a head equals the head, whether the head is tied or not.
            outer = None if is_head(original) else original_of(original, known)
            families.setdefault(outer or original, []).append(name)
    if derive and not any(map(is_head, known)):
        embeddings = [n for n in known if n.endswith(EMBEDDINGS) and not original_of(n, known)]
        head = head_of(embeddings[0]) if len(embeddings) == 1 else None
        if head is None:
            raise OutlierMergeError(
                "`tie_word_embeddings: false` needs a head, but no model stores one, and its name "
                f"cannot be told from {', '.join(embeddings) or 'the names of the tensors'}"
            )
        families.setdefault(embeddings[0], []).append(head)
    return dict(sorted(families.items(), key=lambda family: is_head(family[0])))


def _ties(entry: Input, head: str, embeddings: Sequence[str]) -> bool:
    """Tell whether a model's head is tied to its embeddings.

    Args:
        entry: the model.
        head: the head's name.
        embeddings: names of the embeddings.
    """
    if head in entry.parted:
        return False
    tensors, config = entry.checkpoint.tensors, _config(entry)
    others = [name for name in tensors if name != head and component(name) == component(head)]
    if head in tensors:
        # The model may have the embeddings under a name that is not recognised.
        shape = tensors[head].shape
        is_alone = not any(name in tensors for name in embeddings)
        if is_alone and any(n.endswith(EMBEDDINGS) and tensors[n].shape == shape for n in others):
            return False
        return ties_head(config) is True
    if any(map(is_head, others)):
        return False
    # Only the embeddings are stored: they are the head as well, unless the config says that it is
    # not tied.
    return ties_head(config) is not False


def _config(entry: Input) -> Mapping[str, Any]:
    return read_json(entry.home / "config.json")
