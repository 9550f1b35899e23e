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
from outliermerge.cli.parts import (
    Command,
    add_lenient,
    add_planning,
    print_json,
    print_notes,
    run_options,
    say,
)
from outliermerge.cli.specs import named_output, read_spec
from outliermerge.cli.tables import NamedTable, print_facts, print_words, short_references
from outliermerge.cli.terminal import check_loading, open_console, text
from outliermerge.errors import as_path, shown

if TYPE_CHECKING:
    from rich.console import Console

    from outliermerge.output.estimate import Estimate
    from outliermerge.output.load_check import Verdict
    from outliermerge.planning.plan import Input, Options, Plan

# What a run takes besides its work; measured: 5 s of processor time, 0.5 GB.
_ASKED = " (a run asks it again meanwhile: some 5 s and 0.5 GB more; --no-load-check leaves it out)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a merge, and what is to be printed of its plan."""
    add_planning(parser)
    add_lenient(parser)
    parser.add_argument(
        "--tensors", action="store_true", help="list every tensor too, and what happens to it"
    )


def run(options: argparse.Namespace) -> int:
    """Print what a run would do."""
    from outliermerge import api as merge
    from outliermerge.execution.computing import slowness_note, why_none
    from outliermerge.output.estimate import estimate_run
    from outliermerge.output.names import free_disk_bytes
    from outliermerge.output.run import output_path

    output_name = named_output(options)
    planned = merge.plan(read_spec(options), shard_size=options.shard_size)
    chosen = run_options(options).on_this_machine()
    named = output_name or planned.spec.document.output
    output = output_path(planned, named) if named else None
    free = free_disk_bytes(output or Path.cwd())
    planned.peak_memory_bytes(chosen)  # refuses a budget that is too small
    estimate = estimate_run(planned, chosen, output)
    verdict = check_loading(planned, quiet=options.quiet) if options.load_check else None
    if verdict is not None:
        planned = replace(planned, notes=(*planned.notes, *verdict.notes))
    why_not = why_none(planned, chosen)
    slow = slowness_note(chosen, kernels=not options.no_kernels)
    if slow and not why_not:
        planned = replace(planned, notes=(*planned.notes, slow))
    if options.json:
        print_json(_as_json(planned, named, chosen, estimate, free, verdict, options.tensors))
    else:
        print_plan(
            planned,
            output=output,
            options=chosen,
            estimate=estimate,
            free_bytes=free,
            loads_in=verdict.by if verdict else (),
            with_tensors=options.tensors,
        )
    print_notes(planned.notes, options)
    if why_not:
        say(f"warning: a run here would fail: {why_not}", file=sys.stderr)
    if planned.num_written_bytes > free:
        print(
            f"warning: the disk has {free:,} bytes free, the output needs "
            f"{planned.num_written_bytes:,}",
            file=sys.stderr,
        )
    return 0


def _as_json(
    plan: Plan,
    output: str | None,
    options: Options,
    estimate: Estimate,
    free_bytes: int,
    verdict: Verdict | None,
    with_tensors: bool,
) -> dict[str, Any]:
    """Return a plan as JSON values: what a person asks first, then the rest."""
    from outliermerge.planning.settings_used import used_settings

    details = plan.as_dict(tensors=with_tensors)
    summary = {
        "method": plan.spec.method.name,
        "base": plan.spec.base.reference if plan.spec.base else None,
        "models": [model.reference for model in plan.spec.models],
        "output": output,
        "num_tensors": len(plan.jobs),
        "num_parameters": plan.num_parameters,
        "actions": details["actions"],
        "input_bytes": plan.num_read_bytes,
        "write_bytes": plan.num_written_bytes,
        "free_disk_bytes": free_bytes,
        "seconds": estimate.as_dict()["seconds"],
        "process_memory_bytes": estimate.process_bytes,
        "num_notes": len(plan.notes),
    }
    return {
        "summary": summary,
        "output": output,
        "threads": options.threads,
        "device": options.device,
        "kernels": bool(options.kernels),
        "estimate": estimate.as_dict(),
        "peak_memory_bytes": plan.peak_memory_bytes(options),
        "free_disk_bytes": free_bytes,
        "settings": [setting.as_dict() for setting in used_settings(plan)],
        **({"load_check": verdict.as_dict()} if verdict else {}),
        **details,
    }


def print_plan(
    plan: Plan,
    *,
    output: Path | None,
    options: Options,
    estimate: Estimate,
    free_bytes: int,
    loads_in: Sequence[str] = (),
    with_tensors: bool = False,
) -> None:
    """Print a plan as tables that a person reads in a minute."""
    console = open_console()
    method = plan.spec.method
    print_words(console, f"{method.name}: {method.summary}", "bold")
    _print_models(console, plan)
    _print_pairing(console, plan)
    _print_actions(console, plan)
    _print_parameters(console, plan)
    facts = [
        ("reads", human_bytes(plan.num_read_bytes)),
        (
            "writes",
            f"{human_bytes(plan.num_written_bytes)} in {len(plan.shards)} file(s), "
            f"{human_bytes(free_bytes)} free on the disk",
        ),
        ("parameters", _proof(plan)),
        *([("loads in", f"{'; '.join(loads_in)}{_ASKED}")] if loads_in else []),
        ("time", _time(estimate)),
        ("peak memory", _memory(estimate, options)),
        ("output", str(output) if output else "not named yet: give --output"),
        ("files carried over", ", ".join(shown(file.name) for file in plan.sidecars) or "none"),
    ]
    print_facts(console, facts)
    if with_tensors:
        console.print()
        _print_tensors(console, plan)


def _print_models(console: Console, plan: Plan) -> None:
    table = NamedTable("model", "role", "tensors", "size", "dtypes loaded", "from", justify="left")
    places = []
    for entry in plan.inputs:
        metas, root = entry.stored, entry.checkpoint.root
        table.add_row(
            entry.reference,
            _role(plan, entry),
            str(len(entry.checkpoint.tensors)),
            human_bytes(sum(meta.num_bytes for meta in metas)),
            _counts(meta.dtype.name for meta in metas),
            _format(entry),
        )
        if not as_path(entry.reference).exists():
            places.append((entry.reference, root))
    table.print(console)
    for reference, root in places:
        console.print(text(f"{shown(reference)} is in {shown(str(root))}"), soft_wrap=True)
    console.print()


def _print_pairing(console: Console, plan: Plan) -> None:
    """Print how names are changed, if they are."""
    for entry in plan.inputs:
        for rule, (count, before, after) in entry.renamed.items():
            words = f"{shown(rule)} renames {count} tensors of {shown(entry.reference)}, such as"
            print_words(console, f"{words}\n  {shown(before)}\n  to {shown(after)}\n")


def _print_actions(console: Console, plan: Plan) -> None:
    table = NamedTable(
        "what happens", "tensors", "parameters", "loaded", "computed", "stored", justify="left"
    )
    groups: dict[str, list[Any]] = {}
    for job in plan.jobs:
        what = {"merge": f"merged by {plan.spec.method.name}", "copy": "copied"}
        reason = f" ({job.reason})" if job.reason else ""
        groups.setdefault(what.get(job.action, "copied if equal") + reason, []).append(job)
    for what_happens, jobs in groups.items():
        merged = jobs[0].action == "merge"
        stored = {m.dtype.name for job in jobs for _, s in job.sources for m in s.stored}
        table.add_row(
            what_happens,
            str(len(jobs)),
            f"{sum(job.num_elements for job in jobs):,}",
            ", ".join(sorted(stored)),
            ", ".join(sorted({job.compute_dtype for job in jobs})) if merged else "–",
            ", ".join(sorted({job.output.dtype.name for job in jobs})),
        )
    table.print(console)
    console.print()


def _print_parameters(console: Console, plan: Plan) -> None:
    """Print a row for each parameter, model and filter."""
    from outliermerge.planning.settings_used import used_settings

    if not any(job.action == "merge" for job in plan.jobs):
        return
    table = NamedTable("parameter", "value", "tensors", "model", "filter", justify="left")
    short = short_references([model.reference for model in plan.spec.models])
    filtered = set()
    for setting in used_settings(plan):
        own = setting.parameter, setting.models
        otherwise = "all others" if own in filtered else "–"
        if setting.filter is not None:
            filtered.add(own)
        models = ", ".join(short[reference] for reference in setting.models)
        table.add_row(
            setting.parameter,
            setting.text + (" over the layers" if len(setting.values) > 1 else ""),
            str(setting.num_tensors),
            "every model" if len(setting.models) == len(short) > 1 else models or "–",
            otherwise if setting.filter is None else setting.filter,
        )
    table.print(console)
    console.print()


def _print_tensors(console: Console, plan: Plan) -> None:
    table = NamedTable("tensor", "what", "dtype", "shape", "file", justify="left")
    for job in plan.jobs:
        shape = "×".join(map(str, job.output.shape)) or "scalar"
        table.add_row(job.name, job.action, job.output.dtype.name, shape, job.output.file)
    table.print(console)


def _time(estimate: Estimate) -> str:
    """Return the time that a run will take, and what that rests on."""
    if estimate.seconds is None:
        return f"not known: {estimate.basis}"
    minutes, seconds = divmod(round(estimate.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours or minutes >= 10:
        about = f"about {hours} h {minutes} min" if hours else f"about {minutes} min"
    elif minutes:
        about = f"about {minutes} min {seconds} s"
    else:
        about = f"about {estimate.seconds:.2g} s" if estimate.seconds >= 1 else "less than a second"
    return f"{about} ({estimate.basis})"


def _memory(estimate: Estimate, options: Options) -> str:
    """Return the memory that the whole process will take."""
    blocks = f"{human_bytes(estimate.block_bytes)} for {options.threads} threads, device "
    blocks += options.device
    if estimate.process_bytes is None or estimate.program_bytes is None:
        return f"about {blocks}, besides the program"
    whole, program = human_bytes(estimate.process_bytes), human_bytes(estimate.program_bytes)
    return f"about {whole} for the whole process: {program} for the program, {blocks}"


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
    return f"{len(files)} × {files[0].path.suffix.lstrip('.')}"


COMMAND = Command(
    summary="show what a run would do and take, from the models' headers and a trial of a moment",
    examples=(
        "outliermerge plan merge.yaml",
        "outliermerge plan llava_math --json",
        "outliermerge plan merge.yaml --json --tensors",
    ),
    overview="outliermerge plan merge.yaml --json",
    add_arguments=add_arguments,
    run=run,
)
