"""`run`: merge models into a new folder."""

from __future__ import annotations

import argparse

from outliermerge.cli.parts import (
    WAITING,
    Command,
    add_running,
    print_json,
    print_notes,
    run_options,
)
from outliermerge.cli.terminal import print_result, progress_bar


def run(options: argparse.Namespace) -> int:
    """Merge models, and print what was done."""
    from outliermerge import api as merge

    planned = merge.plan(options.spec, shard_size=options.shard_size)
    print_notes(planned.notes, options)
    with progress_bar("merging") as bar:
        task = bar.add_task("merging", total=planned.work_bytes)
        chosen = run_options(
            options,
            on_progress=lambda num_bytes: bar.advance(task, num_bytes),
            on_waiting=lambda: bar.update(task, description=WAITING),
        )
        result = merge.run(planned, output=options.output, options=chosen)
        bar.update(task, completed=planned.work_bytes)
    notes = result.load_check.notes if result.load_check else ()
    print_notes(notes, options)
    if options.json:
        print_json(result.as_dict() | {"notes": [*planned.notes, *notes]})
    else:
        print_result(result)
    return 0


COMMAND = Command(
    summary="merge models into a new folder; a killed run goes on when started again",
    examples=(
        "outliermerge run merge_configs/minilm_min_sigma.yaml",
        "outliermerge run merge_configs/llava_math.yaml --output merged/llava_math",
        "outliermerge run merge_configs/minilm_ties.yaml --output merged --overwrite --memory 2GiB",
    ),
    overview="outliermerge run merge_configs/minilm_min_sigma.yaml --output merged",
    add_arguments=add_running,
    run=run,
    goes_on=True,
)
