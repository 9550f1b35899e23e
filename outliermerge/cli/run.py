"""`run`: merge models into a new folder."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from outliermerge.cli.in_parts import (
    add_keep,
    add_part,
    add_ray,
    carried_out,
    check_ray,
    resolved,
    run_one_part,
)
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
from outliermerge.errors import OutlierMergeError, argument

if TYPE_CHECKING:
    from outliermerge.planning.plan import Options, Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a merge, and mergekit-yaml's."""
    add_running(parser)
    add_keep(parser)
    parser.add_argument(
        "--delete-inputs-as-read",
        dest="stream",
        action="store_const",
        const="only",
        help="as --stream, and refuse what would need the inputs on the disk: models in folders, "
        "of which nothing is deleted, and methods that read the whole models twice",
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

    if options.cuda and options.device == "cpu":
        options.device = "cuda"
    output = named_output(options)
    spec = read_spec(options)
    if options.random_seed is not None:
        spec = spec.with_seed(options.random_seed)
    planned = merge.plan(spec, shard_size=options.shard_size)
    if options.stream == "only":
        _refuse_reading_twice(planned)
    if options.verbose:
        say(_in_a_line(planned, resolved(options, planned)), file=sys.stderr)
    check_ray(options)
    plans = merge.plans_of(planned, output, options.keep)
    if options.part:
        return run_one_part(plans, options, notes=note_of(options))
    work_bytes = sum(each.work_bytes for each, _ in plans)
    # What is not here, or does not fit in memory, is said before a bar is drawn.
    computing = resolved(options, *(each for each, _ in plans))
    on_ray = options.executor_name == "ray"
    with MergeBar(
        work_bytes,
        len(plans),
        quiet=options.quiet,
        on_ray=on_ray,
        is_converted=planned.conversion is not None,
    ) as bar:
        chosen = run_options(options, on_progress=bar.advance, on_waiting=bar.wait)
        result, *kept = carried_out(plans, chosen, options)
        bar.done()
    slow = slowness_note(computing, kernels=chosen.kernels)
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


def _refuse_reading_twice(planned: Plan) -> None:
    """Refuse a method that measures whole models before it merges: all of them would be kept."""
    from outliermerge.execution.passes import needs_of
    from outliermerge.planning.merged import merge_of

    inside = [merge_of(source) for job in planned.jobs for _, source in job.sources]
    tasks = [job.task for job in planned.jobs if job.action == "merge"]
    for task in (*tasks, *(merge.task for merge in inside if merge)):
        if measured := needs_of(task, "model"):
            raise OutlierMergeError(
                f"{task.method.name}: measures {', '.join(measured)} of the whole models before it "
                "merges, so that all is read twice: leave out "
                f"{argument('delete_inputs_as_read')}. With {argument('stream')}, "
                f"{argument('cache_size')} bounds the disk."
            )


def _in_a_line(planned: Plan, options: Options) -> str:
    """Return in a line what is about to be merged, and how."""
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
