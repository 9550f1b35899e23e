"""Decides for each tensor whether it is merged, compared or copied, and from which models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from outliermerge.checkpoint.layout import OutputTensor
from outliermerge.checkpoint.sources import DTYPES, DType, Source
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.methods.statistics.base import scope_of
from outliermerge.planning.advice import Unpaired, advise
from outliermerge.planning.architectures import CANNOT, verdict_on
from outliermerge.planning.buffers import is_buffer, is_computed, is_frequencies, maps_rows
from outliermerge.planning.class_labels import leave_out_heads
from outliermerge.planning.parameters import Parameters
from outliermerge.planning.plan import Input, Job
from outliermerge.planning.policies import Policies
from outliermerge.planning.slices import Part
from outliermerge.planning.tied import Tied, TiedCopy, lacks_tied_head
from outliermerge.spec.check import MergeSpec

_MISFIT = "of another shape or kind"
Numbered = tuple[int, Source]
Draft = tuple[
    str, Literal["merge", "copy", "equal"], tuple[Numbered, ...], dict[str, Any], DType, str
]
"""A tensor's name, action, sources, parameters, stored dtype, and why it is not merged."""


@dataclass
class Findings:
    """What is found while drafts are made.

    Attributes:
        problems: by kind, tensors that do not fit together.
        unpaired: by model, names that no policy covers.
        misfits: names and models of tensors of another shape or kind.
        dropped: tensors that are left out.
        lacking: by model the tensors that it lacks while another task model has them.
        computed: buffers that a model's class computes, and that not all models have.
        notes: notes for the user.
        checks: tensors that must be equal for the merge to be right.
    """

    problems: dict[str, list[str]] = field(default_factory=dict)
    unpaired: dict[int, Unpaired] = field(default_factory=dict)
    misfits: list[tuple[str, int]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    lacking: dict[str, list[str]] = field(default_factory=dict)
    computed: dict[str, None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    checks: list[Job] = field(default_factory=list)

    def problem(self, kind: str, message: str) -> None:
        """Take up a tensor that does not fit."""
        self.problems.setdefault(kind, []).append(message)

    def refuse(self, inputs: Sequence[Input], names: Sequence[str]) -> None:
        """Raise OutlierMergeError, with advice, if tensors do not fit together."""
        if not self.problems:
            return
        advice = advise(inputs, self.unpaired)
        unfit = {number for _, number in self.misfits}
        parts = verdict_on(inputs, unfit, {*self.unpaired}, cannot=CANNOT in advice)
        cannot = parts[0] == CANNOT
        for kind, items in self.problems.items():
            parts.append(f"{len(items)} tensor(s) {kind}:\n{listing(items, limit=4)}")
        if _MISFIT in self.problems:
            parts += [] if cannot else ["Such models cannot be merged as they are."]
            misfits = dict(self.misfits)
            others = [name for name in names if name not in misfits]
            parts += leave_out_heads(inputs, self.misfits, others=others)
        parts += [each for each in advice if each != CANNOT]
        raise OutlierMergeError("\n".join(parts))


class Drafter:
    """Drafts the tensors of a merge of models.

    Args:
        spec: the spec.
        part: the models, and which tensors of the output they are merged into.
        tied: what is tied in the output and in the models.
        policies, parameters: as the spec sets them for these models.
        found: takes up what is found.
    """

    def __init__(
        self,
        spec: MergeSpec,
        part: Part,
        *,
        tied: Tied,
        policies: Policies,
        parameters: Parameters,
        found: Findings,
    ) -> None:
        self.spec, self.method, self.part, self.inputs = spec, spec.method, part, part.inputs
        self.model_numbers, self.first = list(part.numbers), part.first
        self.reference: Mapping[str, Source] = part.inputs[part.first].checkpoint.tensors
        self._held = [(n, part.inputs[n].checkpoint.tensors) for n in self.model_numbers]
        self.tied, self.policies, self.parameters, self.found = tied, policies, parameters, found

    def draft(self, name: str) -> Draft | None:
        """Return the draft of a tensor; None if it is left out or does not fit."""
        found = tuple([(number, own[name]) for number, own in self._held if name in own])
        holders = [number for number, _ in found]
        if name not in self.reference:
            return self._draft_extra(name, holders)
        first = self.reference[name]
        held = [first, *(source for _, source in found)]
        if _are_weights(name, held):
            is_whole = self._may_be_lacked(name, holders)
            return self._draft_weight(name, (self.first, first), found) if is_whole else None
        no_floats = not any(source.dtype.is_float for source in held)
        is_rope = is_frequencies(name, held)
        no_weight = no_floats or is_buffer(held) or is_rope
        free = no_weight and not maps_rows(name, first, self.reference)
        if free and self.policies.word("unequal", name) == "base":
            kinds = " or ".join(dict.fromkeys(source.dtype.name for source in held))
            reason = f"{kinds} buffer, the base model's"
            return name, "copy", ((self.first, first),), {}, first.out_dtype, reason
        for number, source in found:
            both_float = source.dtype.is_float and first.dtype.is_float
            if source.shape != first.shape or not (both_float or is_buffer(held)):
                self.found.misfits.append((name, number))
                self.found.problem(
                    _MISFIT,
                    f"{shown(name)}: {_describe(first)} in {self._place(name, self.first)}, "
                    f"{_describe(source)} in {self._place(name, number)}",
                )
                return None
        if not self._may_be_lacked(name, holders):
            return None
        own = (self.first, first)
        if is_buffer(held) or is_rope:
            if not self._may_lack(name, [n for n in self.model_numbers if n not in holders]):
                return None
            draft = self._draft_unmergeable(name, own, found)
            return (*draft[:5], "RoPE's frequencies, which models differ in") if is_rope else draft
        return self._draft_weight(name, own, found)

    def _draft_weight(self, name: str, own: Numbered, found: tuple[Numbered, ...]) -> Draft | None:
        """Return the draft of a tensor that has one shape in all models, and floats."""
        holders = [number for number, _ in found]
        dtype = self._stored(own[1])
        if not holders:
            return name, "copy", (own,), {}, dtype, "in no task model"
        if len(found) < len(self._held) and self._takes_all(name, len(found)):
            found = tuple((n, held[name]) if name in held else own for n, held in self._held)
            holders = list(self.model_numbers)
        parameters = self.parameters.of(name, holders)
        if len(found) == 1 and self.method.idempotent(parameters):
            return name, "copy", found, {}, dtype, "one model, unchanged by the method"
        if self.method.uses_base:
            found = (own, *found)
        one_source = len(found) > 1 and all(source == found[0][1] for _, source in found[1:])
        if one_source and (self.method.uses_base or self.method.idempotent(parameters)):
            return name, "copy", found[:1], {}, dtype, "the same tensor in every model"
        return name, "merge", found, parameters, dtype, ""

    def _takes_all(self, name: str, num_holders: int) -> bool:
        """Tell whether models that lack a tensor are merged, too, with the base's in its place."""
        if self.method.space == "weight" or num_holders < self.method.min_models:
            return True
        needs = self.method.needs.values()
        parameters = self.parameters.of(name, self.model_numbers) if needs else {}
        # In a model that is measured as a whole, what it lacks counts as it counts in the base.
        return any(scope_of(need, parameters) == "model" for need in needs)

    def _draft_unmergeable(self, name: str, own: Numbered, found: tuple[Numbered, ...]) -> Draft:
        sources = tuple(dict.fromkeys([own, *found]))
        dtypes = {self.inputs[n].reference: source.dtype.name for n, source in sources}
        kinds = " or ".join(dict.fromkeys(dtypes.values()))
        if len(set(dtypes.values())) > 1:
            where = ", ".join(f"{dtype} in {model}" for model, dtype in dtypes.items())
            self.found.notes.append(
                f"{shown(name)}: {where}; a buffer, which is copied as it is in "
                f"{self.inputs[self.first].reference} if all have the same values (else "
                "`unequal` decides)"
            )
        action: Literal["copy", "equal"] = "equal" if len(sources) > 1 else "copy"
        # Keep its own dtype: a smaller one would round indices.
        return name, action, sources, {}, own[1].out_dtype, f"{kinds} buffer"

    def _draft_extra(self, name: str, holders: list[int]) -> Draft | None:
        copied = []
        for number in holders:
            word = self.policies.word("extra", name, number)
            tied = next((t for t in self.tied.copies if (t.number, t.name) == (number, name)), None)
            if word == "copy":
                copied.append(number)
            elif word is None and tied is not None:
                self.found.checks.append(check_tied(self.spec, self.inputs, tied))
            elif word is None and is_computed(name, self.inputs[number].checkpoint.tensors[name]):
                continue
            elif word != "drop":
                where, first = self._place(name, number), self.inputs[self.first].reference
                own = self.part.own_name(number, name)
                self.found.problem("extra", f"{shown(name)}: in {where}, not in {first}")
                self.found.unpaired.setdefault(number, Unpaired()).extra.append(own)
        found = tuple((n, self.inputs[n].checkpoint.tensors[name]) for n in copied)
        if not found:
            if holders:
                self.found.dropped.append(name)
            return None
        held = [source for _, source in found]
        if len({(source.shape, source.dtype) for source in held}) > 1 and not is_buffer(held):
            places = ", ".join(self.inputs[n].reference for n in copied)
            self.found.problem(_MISFIT, f"{name}: differs between {places}")
            return None
        action: Literal["copy", "equal"] = "equal" if len(found) > 1 else "copy"
        dtype = held[0].out_dtype if is_buffer(held) else self._stored(held[0])
        return name, action, found, {}, dtype, "extra, copied"

    def _may_be_lacked(self, name: str, holders: Sequence[int]) -> bool:
        """Tell whether the models that do not hold a tensor may lack it."""
        lacking = [n for n in self.model_numbers if n not in holders]
        return not lacking or self._may_lack(name, lacking)

    def _may_lack(self, name: str, lacking: list[int]) -> bool:
        allowed = True
        for number in lacking:
            word = self.policies.word("missing", name, number)
            if word is None and is_computed(name, self.reference[name]):
                self.found.computed[name] = None
            elif word != "base":
                own = self.part.own_name(self.first, name)
                self.found.problem("missing", f"{name}: not in {self.inputs[number].reference}")
                self.found.unpaired.setdefault(number, Unpaired()).missing.append(own)
                allowed = False
            elif lacks_tied_head(self.inputs[number], name):
                raise OutlierMergeError(
                    f"{name}: not in {self.inputs[number].reference}, whose config ties it to "
                    "embeddings that cannot be told. With `missing: base` the base's head would "
                    "stand beside other embeddings: save that model with its head."
                )
            elif len(lacking) < len(self.model_numbers):
                self.found.lacking.setdefault(self.inputs[number].reference, []).append(name)
        return allowed

    def _place(self, name: str, number: int) -> str:
        """Return a model, with the tensor's name there if the output has another one."""
        own, reference = self.part.own_name(number, name), self.inputs[number].reference
        return reference if own == name else f"{reference} (there {shown(own)})"

    def _stored(self, meta: Source) -> DType:
        document = self.spec.document
        wanted = document.out_dtype or document.dtype
        return DTYPES[wanted] if wanted and meta.dtype.is_float else meta.out_dtype


def check_tied(spec: MergeSpec, inputs: Sequence[Input], tied: TiedCopy) -> Job:
    """Return the job that compares a tied copy with its original."""
    entry = inputs[tied.number]
    copy, original = tied.sources
    reason = (
        f"the output ties {shown(tied.name)} to {shown(tied.original)}, so that of "
        f"{shown(entry.reference)} is left out, which is right only where they are equal in that "
        "model"
    )
    unwritten = OutputTensor(tied.name, copy.dtype, copy.shape, "", 0)
    sources = ((tied.number, copy), (tied.number, original))
    return Job("equal", spec.method.name, {}, sources, unwritten, reason=reason)


def _are_weights(name: str, held: Sequence[Source]) -> bool:
    """Tell whether a tensor has floats, and one shape, in all models; most have."""
    shape = held[0].shape
    for source in held:
        if not source.dtype.is_float or source.shape != shape:
            return False
    return not name.endswith("inv_freq")


def _describe(source: Source) -> str:
    return f"{source.dtype.name} {list(source.shape)}"
