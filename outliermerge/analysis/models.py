"""Opens the subject of an analysis: a model's weights, or its task vectors against a base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from outliermerge.analysis.moved_layers import moved_layers_note
from outliermerge.arguments import wrong
from outliermerge.checkpoint.sources import Source
from outliermerge.errors import (
    ArgumentError,
    OutlierMergeError,
    argument,
    direct_reference,
    listing,
    quoted,
    shown,
)
from outliermerge.planning.architectures import compare_architectures
from outliermerge.planning.inputs import open_model
from outliermerge.planning.plan import Input
from outliermerge.spec.rename import Rename, best_rename, parse_rename
from outliermerge.spec.settings import SettingError
from outliermerge.spec.text import plain_yaml
from outliermerge.storage.addresses import without_secrets


@dataclass(frozen=True)
class Subject:
    """A model's tensors, or the pairs of tensors whose difference is a task vector.

    Attributes:
        reference, base: the names that the caller gave.
        tensors: the tensors by name, in the order of the base (without a base, of the model):
            (base, model) for a task vector, else (model,).
        notes: notes on tensors that are left out, and on how the models were read.
    """

    reference: str
    base: str | None
    tensors: dict[str, tuple[Source, ...]]
    notes: tuple[str, ...]

    def changed(self) -> Subject:
        """Return the subject without the tensors that an adapter does not change."""
        tensors = {
            name: each
            for name, each in self.tensors.items()
            if len(each) == 1 or each[0] is not each[1]
        }
        num_same = len(self.tensors) - len(tensors)
        if not tensors or not num_same:
            return self
        note = f"left out, since the adapter does not change them: {num_same} tensors"
        return replace(self, tensors=tensors, notes=(*self.notes, note))

    @property
    def num_bytes(self) -> int:
        """The bytes that one reading of all tensors reads."""
        return sum(source.num_bytes for each in self.tensors.values() for source in each)


def open_subject(
    model: str | Path | Subject, base: str | Path | None = None, *, rename: str | None = None
) -> Subject:
    """Open a model as specs name one: a folder, a file, a hub id, an adapter, `base+adapter`.

    Args:
        model: the model's name, or a subject, which already has its base and is returned.
        base: the base model of its task vectors.
        rename: from the model's tensor names to the base's: a named map, or rules as YAML.

    Raises:
        ArgumentError: the rename is unknown or does not fit the names, or a base is given for a
            subject.
        OutlierMergeError: a model is absent or broken, or the two have no tensor in common.
    """
    if isinstance(model, Subject):
        if base is not None or rename is not None:
            raise ArgumentError(
                f"{shown(model.reference)}: is open already: give its base to open_subject"
            )
        return model
    for name, given in (("model", model), ("base", base)):
        if not isinstance(given, (str, Path)) and (given is not None or name == "model"):
            raise wrong(name, given, "a folder, a file or a hub id")
    model = direct_reference(without_secrets(str(model)))
    base = None if base is None else direct_reference(without_secrets(str(base)))
    try:
        rules = parse_rename(_parsed(rename), ("rename",))
        opened_base = open_model(base, Rename(), "base", None) if base is not None else None
        opened = open_model(model, rules, "model", opened_base)
    except SettingError as error:
        raise ArgumentError(f"{argument('rename')}: {error}") from error
    notes = [*(opened_base.checkpoint.notes if opened_base else ()), *opened.checkpoint.notes]
    found: dict[str, tuple[Source, ...]]
    found = {name: (source,) for name, source in opened.checkpoint.tensors.items()}
    if opened_base is None:
        return _subject(opened, None, found, notes)
    notes += filter(None, (moved_layers_note(model, opened.checkpoint.root),))
    return _subject(opened, base, _pairs(opened_base, opened, notes), notes)


def _parsed(rename: str | None) -> object:
    try:
        return plain_yaml(rename) if rename is not None else None
    except ValueError as error:
        raise ArgumentError(
            f"{argument('rename')}: {quoted(rename)} is not YAML: {error}"
        ) from error


def _subject(
    model: Input, base: str | None, found: dict[str, tuple[Source, ...]], notes: list[str]
) -> Subject:
    floats = {name: each for name, each in found.items() if all(s.dtype.is_float for s in each)}
    if others := [name for name in found if name not in floats]:
        notes.append(f"left out, since they are not floats:\n{listing(others)}")
    if not floats:
        raise OutlierMergeError(f"{shown(model.reference)}: holds no tensor of floats")
    return Subject(model.reference, base, floats, tuple(dict.fromkeys(notes)))


def _pairs(base: Input, model: Input, notes: list[str]) -> dict[str, tuple[Source, ...]]:
    ours, theirs = model.checkpoint.tensors, base.checkpoint.tensors
    common = [name for name in theirs if name in ours]
    for entry, other, names in (
        (model, base, [name for name in ours if name not in theirs]),
        (base, model, [name for name in theirs if name not in ours]),
    ):
        if names:
            has = f"only in {shown(entry.reference)}, not in {shown(other.reference)}"
            notes.append(f"left out, since they are {has}:\n{listing(names)}")
    resized = [name for name in common if ours[name].shape != theirs[name].shape]
    if resized:
        rows = listing(
            f"{name}: {list(theirs[name].shape)} in the base, {list(ours[name].shape)}"
            for name in resized
        )
        notes.append(f"left out, since their shapes differ:\n{rows}")
    if resized or len(common) < max(len(ours), len(theirs)):
        notes += (
            f"what is compared may be no fine-tune: {line}"
            for line in compare_architectures((base, model), [1])
        )
    pairs: dict[str, tuple[Source, ...]]
    pairs = {name: (theirs[name], ours[name]) for name in common if name not in resized}
    if not pairs:
        best = best_rename(list(ours), theirs)
        advice = f" `{argument('rename', best[0])}` pairs {best[1]} of {len(ours)}." if best else ""
        name, expected = (resized[0],) * 2 if resized else (next(iter(ours)), next(iter(theirs)))
        kinds = "".join(f"\n{line}" for line in compare_architectures((base, model), [1]))
        raise OutlierMergeError(
            f"{shown(model.reference)}: no tensor has the name and shape of one of "
            f"{shown(base.reference)}: found for example {name!r} {list(ours[name].shape)}, "
            f"expected {expected!r} {list(theirs[expected].shape)}.{advice}{kinds}"
        )
    return pairs
