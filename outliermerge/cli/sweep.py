"""`sweep`: merge with several values of settings."""

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
from outliermerge.errors import SpecError, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the values, and the flags of a merge."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="values of merge_method, dtype, out_dtype, a parameter, or models.N.PARAMETER; "
        "several --set are combined",
    )
    add_running(parser)


def run(options: argparse.Namespace) -> int:
    """Merge with several settings, and print what was done."""
    from outliermerge.search import sweeps

    settings = {}
    for option in options.set:
        key, values = sweeps.parse_values(option)
        if key in settings:
            raise SpecError(f"--set {shown(key)}: is given twice: write {key}=VALUE,VALUE,…")
        settings[key] = values
    variants = sweeps.plan_sweep(options.spec, settings, shard_size=options.shard_size)
    notes = list(dict.fromkeys(note for variant in variants for note in variant.plan.notes))
    print_notes(notes, options)
    total = sweeps.work_bytes(variants)
    with progress_bar("merging") as bar:
        task = bar.add_task("merging", total=total)
        chosen = run_options(
            options,
            on_progress=lambda num_bytes: bar.advance(task, num_bytes),
            on_waiting=lambda: bar.update(task, description=WAITING),
        )
        results = sweeps.sweep(variants, output=options.output, options=chosen)
        bar.update(task, completed=total)
    said = [note for result in results if result.load_check for note in result.load_check.notes]
    more = [note for note in dict.fromkeys(said) if note not in notes]
    print_notes(more, options)
    notes += more
    if options.json:
        pairs = zip(variants, results, strict=True)
        outputs = [{"settings": dict(v.settings)} | result.as_dict() for v, result in pairs]
        print_json({"outputs": outputs, "notes": notes})
    else:
        for result in results:
            print_result(result)
    return 0


COMMAND = Command(
    summary="merge with several values of settings, from one reading of the models",
    examples=(
        "outliermerge sweep merge_configs/minilm_min_sigma.yaml --set t=2,2.5,3 --output merged/t",
        "outliermerge sweep spec.yaml --set merge_method=linear,task_arithmetic --output merged",
        "outliermerge sweep spec.yaml --set models.1.weight=0.3,0.5 --set lambda=0.8,1 --output m",
    ),
    overview="outliermerge sweep merge_configs/minilm_min_sigma.yaml --set t=2,2.5,3 "
    "--output merged/sweep",
    add_arguments=add_arguments,
    run=run,
    goes_on=True,
)
