"""Which layers of which models the layers of the output, of its stages and of its modules are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from outliermerge.errors import shown
from outliermerge.planning.layers import Stack, stacks_of
from outliermerge.planning.plan import Job, LayersOf, Plan
from outliermerge.spec.settings import find_layers

OUTPUT = "the output"


def layer_map(plan: Plan) -> tuple[LayersOf, ...]:
    """Return the layers of the output, then of the stages, the last one first.

    Empty for a merge of whole models, whose layers are all merged of the same layers.
    """
    if not (plan.stacked or plan.modules or plan.spec.all_stages):
        return ()
    found = {row.merge: entry.layers for entry in plan.all_inputs for row in entry.layers}
    stages = [f"stage {shown(name)}" for name in reversed(plan.spec.all_stages)]
    of_stages = [row for stage in stages for row in found.get(stage, ())]
    return (*layers_of_merge(OUTPUT, plan), *of_stages)


def layers_of_merge(merge: str, plan: Plan) -> tuple[LayersOf, ...]:
    """Return the layers of what a plan makes; of modules first, in the order of the modules.

    Args:
        merge: what they are layers of.
    """
    stacks = {stack.prefix: stack for stack in stacks_of(job.name for job in plan.jobs)}
    of_modules = {name for module in plan.modules for name in module.names}
    jobs = [job for job in plan.jobs if job.name not in of_modules]
    rows = [row for module in plan.modules for row in module.layers]
    for stack in stacks.values():
        rows += _of_stack(merge, stack, jobs, plan)
    return tuple(replace(row, stack=stacks[row.prefix].name) for row in rows)


def _of_stack(merge: str, stack: Stack, jobs: Sequence[Job], plan: Plan) -> Iterator[LayersOf]:
    named = [entry.reference for entry in plan.inputs]
    if plan.stacked is not None and plan.stacked.prefix == stack.prefix:
        for one in plan.stacked.slices:
            sources = tuple((named[number], *layers) for number, layers in one.ranges.items())
            method = plan.spec.method.name
            yield LayersOf(merge, stack.prefix, one.start, one.stop, method, sources)
        return
    used: dict[int, dict[int, None]] = {}
    merged: set[int] = set()
    layers = find_layers(job.name for job in jobs)
    for job in jobs:
        layer = layers.get(job.name)
        if layer is None or layer.stack != stack.prefix:
            continue
        used.setdefault(layer.index, {}).update(dict.fromkeys(n for n, _ in job.sources))
        if job.action == "merge":
            merged.add(layer.index)
    start = None
    for index in sorted(used):
        here = sorted(used[index]), index in merged
        after = index + 1
        if after in used and (sorted(used[after]), after in merged) == here:
            start = index if start is None else start
            continue
        start = index if start is None else start
        method = plan.spec.method.name if here[1] else ""
        sources = tuple((named[number], start, after) for number in here[0])
        yield LayersOf(merge, stack.prefix, start, after, method, sources)
        start = None
