"""Packed experts one by one, as servers load quantised ones: transformers' rules, the other way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from outliermerge.checkpoint.layout import OutputTensor
from outliermerge.checkpoint.rearranged import cut, one_of
from outliermerge.checkpoint.sources import Source
from outliermerge.planning.known_conversions import Rule, known_of
from outliermerge.planning.plan import Job


@dataclass(frozen=True)
class Expert:
    """A matrix of one expert.

    Attributes:
        job: of the matrix alone.
        number: of the expert.
        first, last: its rows in the packed matrix of the expert; the last is excluded.
    """

    job: Job
    number: int
    first: int
    last: int

    def of(self, packed: Source) -> Source:
        """Return the matrix as a part of packed experts."""
        return cut(one_of(packed, self.number), 0, self.first, self.last)


def experts_apart(config: Mapping[str, Any], jobs: Sequence[Job]) -> dict[str, list[Expert]]:
    """Return the matrices of all packed experts, by the names of these.

    Returns:
        nothing if transformers knows of some packed experts no rule that only stacks and joins.
    """
    rules = [rule for rule in known_of(config).rules if _only_stacks(rule)]
    packed = [job for job in jobs if is_packed(job)]
    found = {job.name: _apart(job, rules) for job in packed}
    return found if all(found.values()) else {}


def is_packed(job: Job) -> bool:
    """Tell whether a tensor looks like packed experts: a matrix for each."""
    return len(job.output.shape) == 3 and "expert" in job.name


def _only_stacks(rule: Rule) -> bool:
    steps = [(step.name, step.given.get("dim")) for step in rule.steps]
    joins = [("Concatenate", 1)] if len(rule.sources) > 1 else []
    return steps == [("MergeModulelist", 0), *joins] and len(rule.targets) == 1


def _apart(job: Job, rules: Sequence[Rule]) -> list[Expert]:
    rule = next((r for r in rules if job.name.endswith(r.targets[0].rstrip("$"))), None)
    num_experts, rows, columns = job.output.shape
    if rule is None or rows % len(rule.sources):
        return []
    start = job.name.removesuffix(rule.targets[0])
    height = rows // len(rule.sources)
    made = []
    for number in range(num_experts):
        for place, text in enumerate(rule.sources):
            name = start + text.replace("*", str(number))
            output = OutputTensor(name, job.output.dtype, (height, columns), "", 0)
            one = Expert(job, number, place * height, (place + 1) * height)
            sources = tuple((owner, one.of(source)) for owner, source in job.sources)
            made.append(replace(one, job=replace(job, output=output, sources=sources)))
    return made
