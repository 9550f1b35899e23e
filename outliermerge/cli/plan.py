"""`plan`: show what a run would do."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.cli.in_parts import print_parts
from outliermerge.cli.parts import (
    Command,
    add_lenient,
    add_planning,
    count,
    flag,
    print_json,
    print_notes,
    run_options,
    say,
)
from outliermerge.cli.plan_facts import Took
from outliermerge.cli.plan_tables import print_plan
from outliermerge.cli.specs import named_output, read_spec
from outliermerge.cli.terminal import check_loading
from outliermerge.errors import OutlierMergeError

if TYPE_CHECKING:
    from outliermerge.output.cost import Cost
    from outliermerge.output.estimate import Estimate
    from outliermerge.output.load_check import Verdict
    from outliermerge.output.names import Final
    from outliermerge.planning.plan import Options, Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a merge, and what is to be printed of its plan."""
    add_planning(parser)
    add_lenient(parser)
    parser.set_defaults(stream="headers")  # a plan needs no more of models
    parser.add_argument(
        "--tensors", action="store_true", help="also list every tensor, and what happens to it"
    )
    parser.add_argument(
        "--parts",
        type=count,
        metavar="N",
        help="show what each of N parts takes, which `run --part K/N` writes",
    )


def run(options: argparse.Namespace) -> int:
    """Print what a run would do."""
    from outliermerge import api as merge

    began = time.perf_counter()
    planned = merge.plan(read_spec(options), shard_size=options.shard_size)
    took = Took(time.perf_counter() - began)
    show_plan(planned, options, took, with_tensors=options.tensors, num_parts=options.parts)
    return 0


def show_plan(
    planned: Plan,
    options: argparse.Namespace,
    took: Took,
    *,
    with_tensors: bool = False,
    num_parts: int | None = None,
    further: Sequence[tuple[str, str]] = (),
) -> None:
    """Print what a run of a plan would do and take, its notes, and what would stop it.

    Args:
        options: those of `add_planning`, or of `add_running`.
        took: what planning took.
        with_tensors: list every tensor.
        num_parts: also show what each of so many parts takes.
        further: facts, each a label and words.
    """
    from outliermerge.execution.computing import slowness_note, why_none
    from outliermerge.output.cost import in_words
    from outliermerge.output.division import part_costs
    from outliermerge.output.estimate import estimate_run
    from outliermerge.output.names import free_disk_bytes
    from outliermerge.output.run import output_path

    chosen = run_options(options).on_this_machine(planned)
    named = named_output(options) or planned.spec.document.output
    output = output_path(planned, named) if named else None
    is_here = not isinstance(output, str)
    free = free_disk_bytes(Path(output) if output and is_here else Path.cwd())
    estimate = estimate_run(planned, chosen, output)
    began = time.perf_counter()
    verdict = check_loading(planned, quiet=options.quiet) if options.load_check else None
    if verdict is not None:
        waited = time.perf_counter() - began
        took = took._replace(**{"asked" if verdict.is_kept else "load_check": waited})
        planned = replace(planned, notes=(*planned.notes, *verdict.notes))
    if output is not None:
        planned = replace(planned, notes=(*planned.notes, *_taken(planned, output)))
    why_not = why_none(planned, chosen)
    slow = slowness_note(chosen, kernels=not options.no_kernels)
    if slow and not why_not:
        planned = replace(planned, notes=(*planned.notes, slow))
    costs = []
    if num_parts:
        costs = part_costs(planned, num_parts, chosen, estimate, whole_files=not is_here)
    fetching = list(_costs_elsewhere(planned, chosen))
    if fetching:
        further = [*further, ("elsewhere", in_words(fetching))]
    if options.json:
        said = _as_json(planned, named, chosen, estimate, took, free, verdict, with_tensors)
        in_parts = {"parts": [cost.as_dict() for cost in costs]} if costs else {}
        elsewhere = {"elsewhere": [cost.as_dict() for cost in fetching]} if fetching else {}
        print_json(said | in_parts | elsewhere)
    else:
        print_plan(
            planned,
            output=output,
            options=chosen,
            estimate=estimate,
            took=took,
            free_bytes=free,
            verdict=verdict,
            with_tensors=with_tensors,
            further=further,
        )
        print_parts(costs)
    print_notes(planned.notes, options)
    if why_not:
        say(f"warning: a run here would fail: {why_not}", file=sys.stderr)
    needed = planned.num_written_bytes
    needed += planned.conversion.num_bytes if planned.conversion else 0
    if is_here and needed > free:
        print(
            f"warning: the disk has {free:,} bytes free, the output needs {needed:,}",
            file=sys.stderr,
        )


def _costs_elsewhere(planned: Plan, options: Options) -> Iterator[Cost]:
    """Yield what the plan takes on one machine and on many, if models are elsewhere."""
    from outliermerge.output.cost import Machine, cost_of, is_elsewhere

    if is_elsewhere(planned):
        machine = Machine(cache_bytes=options.cache_bytes)
        yield from (cost_of(planned, number, machine) for number in (1, 64))


def _taken(planned: Plan, output: Final) -> Iterator[str]:
    """Yield what a run would find under an output's name."""
    from outliermerge.output.names import journal_path, partial_folder, real_output
    from outliermerge.output.run import refuse_taken

    if isinstance(output, Path) and os.path.lexists(journal_path(real_output(output))):
        yield f"{partial_folder(output)} is there: a run of the same merge goes on with it"
    try:
        refuse_taken(planned, output, overwrite=False)
    except OutlierMergeError as error:
        yield f"a run would stop: {error.text(flag)}"


def _as_json(
    plan: Plan,
    output: str | None,
    options: Options,
    estimate: Estimate,
    took: Took,
    free_bytes: int,
    verdict: Verdict | None,
    with_tensors: bool,
) -> dict[str, Any]:
    """Return a plan as JSON values: what a person asks first, then the rest."""
    from outliermerge.planning.settings_used import used_settings

    details = plan.as_dict(tensors=with_tensors)
    summary = {
        "method": plan.spec.title,
        "base": plan.spec.base.reference if plan.spec.base else None,
        "models": [model.reference for model in plan.spec.models],
        "output": output,
        "num_tensors": len(plan.jobs),
        "num_parameters": plan.num_parameters,
        "actions": details["actions"],
        "input_bytes": plan.num_read_bytes,
        "write_bytes": plan.num_written_bytes,
        "free_disk_bytes": free_bytes,
        "seconds": None
        if estimate.seconds is None or estimate.then
        else round(took.with_merge(estimate.seconds), 2),
        "planning_seconds": round(took.planning, 2),
        "load_check_seconds": round(took.load_check, 2),
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


COMMAND = Command(
    summary="show what a run would do and take, from the models' headers and a trial of a moment",
    examples=(
        "outliermerge plan merge.yaml",
        "outliermerge plan llava_math --json",
        "outliermerge plan merge.yaml --json --tensors",
        "outliermerge plan merge.yaml --parts 16",
    ),
    overview="outliermerge plan merge.yaml --json",
    add_arguments=add_arguments,
    run=run,
)
