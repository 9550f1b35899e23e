"""`plan`: show what a run would do."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.cli.lines import human_bytes
from outliermerge.cli.parts import WAITING, Command, add_planning, print_json, run_options, say
from outliermerge.cli.specs import named_output, read_spec
from outliermerge.cli.terminal import (
    open_console,
    plain_table,
    status,
    text,
    value_text,
)
from outliermerge.errors import MAX_NOTE, readable, shown

if TYPE_CHECKING:
    from rich.console import Console

    from outliermerge.output.load_check import Verdict
    from outliermerge.planning.plan import Input, Options, Plan


def run(options: argparse.Namespace) -> int:
    """Print what a run would do."""
    from outliermerge import api as merge
    from outliermerge.execution.computing import slowness_note, why_none
    from outliermerge.output.names import free_disk_bytes
    from outliermerge.output.run import output_path

    output_name = named_output(options)
    planned = merge.plan(read_spec(options), shard_size=options.shard_size)
    chosen = run_options(options).on_this_machine()
    named = output_name or planned.spec.document.output
    output = output_path(planned, named) if named else None
    free = free_disk_bytes(output or Path.cwd())
    peak = planned.peak_memory_bytes(chosen)
    verdict = _checked(planned, quiet=options.quiet) if options.load_check else None
    if verdict is not None:
        planned = replace(planned, notes=(*planned.notes, *verdict.notes))
    why_not = why_none(planned, chosen)
    slow = slowness_note(chosen, kernels=not options.no_kernels)
    if slow and not why_not:
        planned = replace(planned, notes=(*planned.notes, slow))
    if options.json:
        print_json(
            planned.as_dict()
            | ({"load_check": verdict.as_dict()} if verdict else {})
            | {
                "output": named,
                "threads": chosen.threads,
                "device": chosen.device,
                "kernels": bool(chosen.kernels),
                "peak_memory_bytes": peak,
                "free_disk_bytes": free,
            }
        )
    else:
        print_plan(
            planned,
            output=output,
            options=chosen,
            free_bytes=free,
            loads_in=verdict.by if verdict else (),
            with_notes=not options.quiet,
        )
    if why_not:
        say(f"warning: a run here would fail: {why_not}", file=sys.stderr)
    if planned.num_written_bytes > free:
        print(
            f"warning: the disk has {free:,} bytes free, the output needs "
            f"{planned.num_written_bytes:,}",
            file=sys.stderr,
        )
    return 0


def _checked(planned: Plan, *, quiet: bool) -> Verdict:
    """Return the result of transformers' check of a plan's output.

    Raises:
        OutlierMergeError: the output would not load.
    """
    from outliermerge.output.load_check import LoadCheck

    with LoadCheck.of_plans([planned]) as check, status(WAITING, quiet=quiet):
        (verdict,) = check.verdicts()
    verdict.raise_if_bad()
    return verdict


def print_plan(
    plan: Plan,
    *,
    output: Path | None,
    options: Options,
    free_bytes: int,
    loads_in: Sequence[str] = (),
    with_notes: bool = True,
) -> None:
    """Print a plan as tables that a person reads in a minute."""
    console = open_console()
    method = plan.spec.method
    console.print(text(f"{method.name}: {method.summary}", style="bold"))
    models = plain_table("model", "role", "tensors", "size", "dtypes loaded", "from")
    for entry in plan.inputs:
        metas = entry.stored
        models.add_row(
            text(entry.reference),
            _role(plan, entry),
            str(len(entry.checkpoint.tensors)),
            human_bytes(sum(meta.num_bytes for meta in metas)),
            _counts(meta.dtype.name for meta in metas),
            text(_format(entry)),
        )
    console.print(models)
    console.print()
    _print_pairing(console, plan)
    actions = plain_table("what happens", "tensors", "parameters", "loaded", "computed", "stored")
    groups: dict[str, list[Any]] = {}
    for job in plan.jobs:
        what = {"merge": f"merged by {method.name}", "copy": "copied", "equal": "copied if equal"}
        reason = f" ({job.reason})" if job.reason else ""
        groups.setdefault(what[job.action] + reason, []).append(job)
    for what_happens, jobs in groups.items():
        merged = jobs[0].action == "merge"
        actions.add_row(
            text(what_happens),
            str(len(jobs)),
            f"{sum(job.num_elements for job in jobs):,}",
            ", ".join(
                sorted({m.dtype.name for job in jobs for _, s in job.sources for m in s.stored})
            ),
            ", ".join(sorted({job.compute_dtype for job in jobs})) if merged else "–",
            ", ".join(sorted({job.output.dtype.name for job in jobs})),
        )
    console.print(actions)
    console.print()
    _print_parameters(console, plan)
    peak = human_bytes(plan.peak_memory_bytes(options))
    facts = plain_table("", "")
    facts.show_header = False
    facts.add_row("reads", human_bytes(plan.num_read_bytes))
    facts.add_row(
        "writes",
        f"{human_bytes(plan.num_written_bytes)} in {len(plan.shards)} file(s), "
        f"{human_bytes(free_bytes)} free on the disk",
    )
    facts.add_row("parameters", text(_proof(plan)))
    if loads_in:
        facts.add_row("loads in", text("; ".join(loads_in)))
    facts.add_row("peak memory", f"{peak} on {options.threads} threads, device {options.device}")
    facts.add_row("output", text(str(output) if output else "not named yet: give --output"))
    facts.add_row(
        "files carried over", text(", ".join(shown(file.name) for file in plan.sidecars) or "none")
    )
    console.print(facts)
    for note in plan.notes if with_notes else ():
        console.print(text(readable(f"note: {note}", MAX_NOTE)))


def _print_pairing(console: Console, plan: Plan) -> None:
    """Print how names are changed, if they are."""
    table = plain_table("renamed in", "rule", "tensors", "for example", "becomes")
    for entry in plan.inputs:
        for rule, (count, before, after) in entry.renamed.items():
            table.add_row(text(entry.reference), text(rule), str(count), text(before), text(after))
    if table.row_count:
        console.print(table)
        console.print()


def _proof(plan: Plan) -> str:
    """Return in words how the output's tensors compare with the reference's."""
    proof, reference = plan.proof, plan.inputs[0].reference
    parts = [
        f"{what} {len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (
            ("added", proof.added), ("left out", proof.removed), ("other rows in", proof.resized)
        )
        if names
    ]  # fmt: skip
    same = f"the tensors of {reference}" + (": " + "; ".join(parts) if parts else ", all of them")
    difference = plan.num_parameters - proof.num_reference_parameters
    change = f" ({difference:+,})" if difference else ""
    return f"{plan.num_parameters:,}{change} in {len(plan.jobs)} tensors: {same}"


def _role(plan: Plan, entry: Input) -> str:
    merged = any(model.reference == entry.reference for model in plan.spec.models)
    return "base, model" if entry.role == "base" and merged else entry.role


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ×{count}" for name, count in Counter(names).most_common())


def _format(entry: Input) -> str:
    files = entry.checkpoint.weight_files
    return f"{len(files)} × {files[0].path.suffix.lstrip('.')}, {entry.checkpoint.root}"


def _print_parameters(console: Console, plan: Plan) -> None:
    merged = [job for job in plan.jobs if job.action == "merge"]
    if not merged:
        return
    table = plain_table("parameter", "where", "values", title="parameters as resolved")
    for name in merged[0].parameters:
        stacks = plan.gradients.get(name, {})
        for stack, values in stacks.items():
            table.add_row(name, text(f"{stack}0–{len(values) - 1}"), text(_short(values)))
        counts = Counter(
            job.parameters[name]
            for job in merged
            if not any(job.name.startswith(stack) for stack in stacks)
        )
        for value, count in counts.most_common(6):
            where = "every tensor" if count == len(merged) else f"{count} tensors"
            table.add_row(name, where, text(value_text(value)))
    console.print(table)
    console.print()


def _short(values: list[Any]) -> str:
    texts = [value_text(value) for value in values]
    if len(texts) > 16:
        texts = [*texts[:8], "…", *texts[-7:]]
    return "  ".join(texts)


COMMAND = Command(
    summary="show what a run would do, from the models' headers alone",
    examples=(
        "outliermerge plan merge.yaml",
        "outliermerge plan llava_math --json",
    ),
    overview="outliermerge plan merge.yaml --json",
    add_arguments=add_planning,
    run=run,
)
