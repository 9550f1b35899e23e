"""The facts of a plan in words: time, memory, parameters, what loads the output."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from outliermerge.cli.lines import human_bytes
from outliermerge.errors import shown

if TYPE_CHECKING:
    from outliermerge.output.estimate import Estimate
    from outliermerge.output.load_check import Verdict
    from outliermerge.planning.plan import Options, Plan

_KNOWN = "a run takes this answer over"
_ASKED = "a run asks it again, with 0.5 GB more of memory; --no-load-check leaves it out"


class Took(NamedTuple):
    """Seconds that a plan took and that a run will take again."""

    planning: float
    load_check: float = 0.0
    asked: float = 0.0
    """What this plan waited for an answer that a run takes over."""

    def with_merge(self, seconds: float) -> float:
        """Return the time of a whole run: the output is checked while it is merged."""
        return self.planning + max(seconds, self.load_check)


def loads_in_words(verdict: Verdict, took: Took) -> str:
    """Return what loads the output, how long it took to ask, and what that is to a run."""
    seconds = took.asked or took.load_check
    asked = "checked before" if verdict.was_known else f"checked in {duration(seconds)}"
    return f"{'; '.join(verdict.by)} ({asked}; {_KNOWN if verdict.is_kept else _ASKED})"


def time_in_words(estimate: Estimate, took: Took) -> str:
    """Return the time that a run will take, of what, and what that rests on."""
    merging = estimate.seconds
    then = f", then {estimate.then} for a time that is not known" if estimate.then else ""
    if merging is None:
        least = took.planning + took.load_check
        more = f", at least {duration(least)}" if least >= 1 else ""
        return f"not known{more}{then} ({estimate.basis})"
    parts = [f"{duration(took.planning)} to plan"] if took.planning >= 1 else []
    parts.append(f"{duration(merging)} to merge")
    if took.load_check:
        parts[-1] += f" and meanwhile {duration(took.load_check)} to check that it loads"
    words = ", ".join(parts)
    if took.load_check or len(parts) > 1:
        words = f"{duration(took.with_merge(merging))}: {words}"
    else:
        words = duration(merging)
    return f"{'' if words.startswith('less') else 'about '}{words}{then} ({estimate.basis})"


def duration(seconds: float) -> str:
    """Return in words how long something takes."""
    if seconds < 1:
        return "less than a second"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min" + (f" {rest} s" if minutes < 10 else "")
    return f"{seconds:.2g} s"


def memory_in_words(estimate: Estimate, options: Options) -> str:
    """Return the memory that the whole process will take."""
    plural = "" if options.threads == 1 else "s"
    blocks = f"{human_bytes(estimate.block_bytes)} for {options.threads} thread{plural}, device "
    blocks += options.device
    if estimate.process_bytes is None or estimate.program_bytes is None:
        return f"about {blocks}, besides the program"
    whole, program = human_bytes(estimate.process_bytes), human_bytes(estimate.program_bytes)
    return f"about {whole}: {program} for the program, {blocks}"


def proof_in_words(plan: Plan) -> str:
    """Return in words how the output's tensors compare with the reference's."""
    proof, reference = plan.proof, plan.inputs[0].reference
    parts = [
        f"{what} {len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (
            ("added", proof.added), ("left out", proof.removed), ("other rows in", proof.resized)
        )
        if names
    ]  # fmt: skip
    same = "those of the slices" if plan.stacked else f"those of {reference}"
    same += f", but {'; '.join(parts)}" if parts else ""
    difference = plan.num_parameters - proof.num_reference_parameters
    change = f" ({difference:+,})" if difference else ""
    return f"{plan.num_parameters:,}{change} in {len(plan.jobs)} tensors, {same}"


def ids_in_words(plan: Plan) -> str:
    """Return the token ids in configs that change, by file and key."""
    return "; ".join(
        f"{file}: {'.'.join(keys)} {shown(json.dumps(value))}"
        for file, values in plan.ids.items()
        for keys, value in values.items()
    )
