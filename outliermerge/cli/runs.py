"""The commands that merge, run, plan and sweep: parse, call, print; nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.cli.parts import AddCommand, add_machine, print_json, say
from outliermerge.errors import SpecError, shown

if TYPE_CHECKING:
    from outliermerge.output.load_check import Verdict
    from outliermerge.planning.plan import Plan

LOAD_CHECK_VARIABLE = "OUTLIERMERGE_LOAD_CHECK"
_MAX_NOTES = 50
_WAITING = "checking that transformers loads it"


def add_runs(add: AddCommand, count: Callable[[str], int]) -> None:
    """Add the parsers of `run`, `plan` and `sweep`."""
    run = add(
        "run",
        "merge models into a new folder; a killed run goes on when started again",
        "outliermerge run merge_configs/minilm_min_sigma.yaml",
        "outliermerge run merge_configs/llava_math.yaml --output merged/llava_math",
        "outliermerge run merge_configs/minilm_ties.yaml --output merged --overwrite --memory 2GiB",
    )
    plan = add(
        "plan",
        "show what a run would do, from the models' headers alone",
        "outliermerge plan merge_configs/minilm_ties.yaml",
        "outliermerge plan merge_configs/minilm_ties.yaml --json",
    )
    sweep = add(
        "sweep",
        "merge with several values of settings, from one reading of the models",
        "outliermerge sweep merge_configs/minilm_min_sigma.yaml --set t=2,2.5,3 --output merged/t",
        "outliermerge sweep spec.yaml --set merge_method=linear,task_arithmetic --output merged",
        "outliermerge sweep spec.yaml --set models.1.weight=0.3,0.5 --set lambda=0.8,1 --output m",
    )
    sweep.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="values of merge_method, dtype, out_dtype, a parameter, or models.N.PARAMETER; "
        "several --set are combined",
    )
    for command in (run, plan, sweep):
        command.add_argument("spec", metavar="SPEC", help="a YAML file")
        command.add_argument("--output", metavar="DIR", help="what to write (or `output:`)")
        add_machine(command, count)
        command.add_argument(
            "--memory", default="1GiB", metavar="SIZE", help="budget for blocks (default 1GiB)"
        )
        command.add_argument(
            "--no-kernels", action="store_true", help="compute by torch, as methods are defined"
        )
        command.add_argument("--shard-size", metavar="SIZE", help="largest file (default 5GB)")
        command.add_argument(
            "--load-check",
            action=argparse.BooleanOptionalAction,
            default=os.environ.get(LOAD_CHECK_VARIABLE) != "0",
            help="prove that transformers or diffusers, where installed, loads the output "
            f"(default, unless {LOAD_CHECK_VARIABLE}=0)",
        )
        command.add_argument("--json", action="store_true", help="print JSON for scripts")
    for command in (run, sweep):
        command.add_argument(
            "--overwrite", action="store_true", help="replace an existing output when done"
        )
        command.add_argument(
            "--fresh", action="store_true", help="start over instead of going on with a killed run"
        )
        command.add_argument(
            "--allow-non-finite", action="store_true", help="go on over infinite or NaN values"
        )


def run_run(options: argparse.Namespace) -> int:
    """Merge models, and print what was done."""
    from outliermerge import api as merge
    from outliermerge.cli import render

    planned = merge.plan(options.spec, shard_size=options.shard_size)
    _print_notes(planned.notes, options)
    with render.progress_bar("merging") as bar:
        task = bar.add_task("merging", total=planned.work_bytes)
        result = merge.run(
            planned,
            on_progress=lambda num_bytes: bar.advance(task, num_bytes),
            on_waiting=lambda: bar.update(task, description=_WAITING),
            **_run_options(options),
        )
        bar.update(task, completed=planned.work_bytes)
    notes = result.load_check.notes if result.load_check else ()
    _print_notes(notes, options)
    if options.json:
        print_json(result.as_dict() | {"notes": [*planned.notes, *notes]})
    else:
        render.print_result(result)
    return 0


def run_sweep(options: argparse.Namespace) -> int:
    """Merge with several settings, and print what was done."""
    from outliermerge.cli import render
    from outliermerge.search import sweeps

    settings = {}
    for option in options.set:
        key, values = sweeps.parse_values(option)
        if key in settings:
            raise SpecError(f"--set {shown(key)}: is given twice: write {key}=VALUE,VALUE,…")
        settings[key] = values
    variants = sweeps.plan_sweep(options.spec, settings, shard_size=options.shard_size)
    notes = list(dict.fromkeys(note for variant in variants for note in variant.plan.notes))
    _print_notes(notes, options)
    total = sweeps.work_bytes(variants)
    with render.progress_bar("merging") as bar:
        task = bar.add_task("merging", total=total)
        results = sweeps.sweep(
            variants,
            on_progress=lambda num_bytes: bar.advance(task, num_bytes),
            on_waiting=lambda: bar.update(task, description=_WAITING),
            **_run_options(options),
        )
        bar.update(task, completed=total)
    said = [note for result in results if result.load_check for note in result.load_check.notes]
    more = [note for note in dict.fromkeys(said) if note not in notes]
    _print_notes(more, options)
    notes += more
    if options.json:
        pairs = zip(variants, results, strict=True)
        outputs = [{"settings": dict(v.settings)} | result.as_dict() for v, result in pairs]
        print_json({"outputs": outputs, "notes": notes})
    else:
        for result in results:
            render.print_result(result)
    return 0


def _print_notes(notes: Sequence[str], options: argparse.Namespace) -> None:
    if not options.json:
        for note in notes[:_MAX_NOTES]:
            say(f"note: {note}", file=sys.stderr)
        if len(notes) > _MAX_NOTES:
            say(f"note: {len(notes) - _MAX_NOTES} more notes, with --json", file=sys.stderr)


def _run_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "output": options.output,
        "device": options.device,
        "memory": options.memory,
        "threads": options.threads,
        "overwrite": options.overwrite,
        "fresh": options.fresh,
        "kernels": not options.no_kernels,
        "allow_non_finite": options.allow_non_finite,
        "load_check": options.load_check,
    }


def run_plan(options: argparse.Namespace) -> int:
    """Print what a run would do."""
    from outliermerge import api as merge
    from outliermerge.cli import render
    from outliermerge.execution.threads import choose_options
    from outliermerge.output.names import free_disk_bytes
    from outliermerge.output.run import output_path

    planned = merge.plan(options.spec, shard_size=options.shard_size)
    chosen = choose_options(
        device=options.device,
        memory=options.memory,
        threads=options.threads,
        kernels=not options.no_kernels,
    )
    named = options.output or planned.spec.document.output
    output = output_path(planned, named) if named else None
    free = free_disk_bytes(output or Path.cwd())
    peak = planned.peak_memory_bytes(chosen)
    verdict = _checked(planned) if options.load_check else None
    if verdict is not None:
        planned = replace(planned, notes=(*planned.notes, *verdict.notes))
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
        render.print_plan(
            planned,
            output=output,
            options=chosen,
            free_bytes=free,
            loads_in=verdict.by if verdict else (),
        )
    if planned.num_written_bytes > free:
        print(
            f"warning: the disk has {free:,} bytes free, the output needs "
            f"{planned.num_written_bytes:,}",
            file=sys.stderr,
        )
    return 0


def _checked(planned: Plan) -> Verdict:
    """Return what transformers says of a plan's output.

    Raises:
        OutlierMergeError: the output would not load.
    """
    from outliermerge.cli import render
    from outliermerge.output.load_check import LoadCheck

    with LoadCheck.of_plans([planned]) as check, render.status(_WAITING):
        (verdict,) = check.verdicts()
    verdict.raise_if_bad()
    return verdict
