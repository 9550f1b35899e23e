"""`run`: merge models into a new folder."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from outliermerge.cli.in_parts import add_part, add_ray, check_ray, run_one_part
from outliermerge.cli.lines import human_bytes
from outliermerge.cli.mergekit_flags import add_mergekit_flags, note_of
from outliermerge.cli.parts import (
    BAR_EXPLAINED,
    Command,
    add_lenient,
    add_running,
    print_json,
    print_notes,
    run_options,
    say,
)
from outliermerge.cli.specs import named_output, read_spec
from outliermerge.cli.terminal import MergeBar, print_result
from outliermerge.errors import ArgumentError, argument

if TYPE_CHECKING:
    from outliermerge.output.options import RunOptions
    from outliermerge.planning.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a merge, and mergekit-yaml's."""
    add_running(parser)
    parser.add_argument(
        "--keep",
        metavar="NAME",
        action="append",
        default=[],
        help="also write this stage of the merge, beside the output as OUTPUT-NAME; repeatable",
    )
    add_part(parser)
    add_ray(parser)
    add_lenient(parser)
    add_mergekit_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Merge models, and print what was done.

    Notes are printed when it is done: they are no part of an error, which is to be read last.
    """
    from outliermerge import api as merge
    from outliermerge.execution.computing import slowness_note
    from outliermerge.output.run import run_plans

    if options.cuda and options.device == "cpu":
        options.device = "cuda"
    output = named_output(options)
    spec = read_spec(options)
    if options.random_seed is not None:
        spec = spec.with_seed(options.random_seed)
    planned = merge.plan(spec, shard_size=options.shard_size)
    if options.verbose:
        say(_in_a_line(planned, run_options(options)), file=sys.stderr)
    check_ray(options)
    if options.part:
        return run_one_part(planned, output, options, notes=note_of(options))
    plans = merge.plans_of(planned, output, options.keep)
    work_bytes = sum(each.work_bytes for each, _ in plans)
    if options.executor_name != "ray":
        run_options(options).on_this_machine()  # what it lacks is said before a bar is drawn
    with MergeBar(work_bytes, len(plans), quiet=options.quiet) as bar:
        chosen = run_options(options, on_progress=bar.advance, on_waiting=bar.wait)
        if options.executor_name == "ray":
            from outliermerge.output.ray import run_on_ray

            address, num_parts = options.address, options.parts
            ((_, path),) = plans
            if isinstance(path, str):
                raise ArgumentError(
                    f"output {path}: parts on a Ray cluster are written to a folder. To a store, "
                    f"write them each by {argument('part', 'K/N')}"
                )
            one = run_on_ray(planned, path, chosen, address=address, num_parts=num_parts)
            result, *kept = [one]
        else:
            result, *kept = run_plans(plans, chosen)
        bar.done()
    slow = slowness_note(chosen.on_this_machine(), kernels=chosen.kernels)
    notes = [
        *note_of(options),
        *([slow] if slow else []),
        *planned.notes,
        *(result.load_check.notes if result.load_check else ()),
    ]
    if options.json:
        stages = {"kept": [each.as_dict() for each in kept]} if kept else {}
        print_json(result.as_dict() | {"notes": notes} | stages)
    elif not options.quiet:
        for each in (result, *kept):
            print_result(each)
    print_notes(notes, options)
    return 0


def _in_a_line(planned: Plan, chosen: RunOptions) -> str:
    """Return in a line what is about to be merged, and how."""
    options = chosen.on_this_machine()
    spec = planned.spec
    what = ", ".join(model.reference for model in spec.models)
    if spec.modules:
        what = spec.in_a_line
    elif spec.base:
        what = f"{what} onto {spec.base.reference}"
    return (
        f"{spec.title}: {what}; {len(planned.jobs)} tensors, reads "
        f"{human_bytes(planned.num_read_bytes)}, writes {human_bytes(planned.num_written_bytes)}; "
        f"{options.threads} threads, device {options.device}, at most "
        f"{human_bytes(planned.peak_memory_bytes(options))} of memory"
    )


COMMAND = Command(
    summary="merge models into a new folder; a killed run goes on when started again",
    examples=(
        "outliermerge run merge.yaml merged",
        "outliermerge run llava_math --output merged/llava_math",
        "outliermerge run merge.yaml merged --overwrite --memory 2GiB --device cuda",
        "outliermerge run merge.yaml merged --part 3/16",
        "outliermerge run merge.yaml -o s3://bucket/merged",
        "outliermerge run merge.yaml merged --executor ray --address auto",
        "outliermerge merge.yaml merged --cuda",
    ),
    overview="outliermerge run merge.yaml merged",
    add_arguments=add_arguments,
    run=run,
    goes_on=True,
    explanation=BAR_EXPLAINED
    + "The flags of mergekit-yaml and mergekit-multi are taken too; those without effect here are "
    "named in a note.",
)
