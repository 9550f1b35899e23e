"""`sweep`: merge with several values of settings."""

from __future__ import annotations

import argparse

from outliermerge.cli.parts import (
    BAR_EXPLAINED,
    Command,
    add_running,
    print_json,
    print_notes,
    run_options,
)
from outliermerge.cli.specs import named_output, read_spec
from outliermerge.cli.terminal import MergeBar, print_result
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

    output = named_output(options)
    settings = {}
    for option in options.set:
        key, values = sweeps.parse_values(option)
        if key in settings:
            raise SpecError(f"--set {shown(key)}: is given twice: write {key}=VALUE,VALUE,…")
        settings[key] = values
    spec = read_spec(options)
    variants = sweeps.plan_sweep(spec, settings, shard_size=options.shard_size)
    total = sweeps.work_bytes(variants)
    with MergeBar(total, len(variants), quiet=options.quiet) as bar:
        chosen = run_options(options, on_progress=bar.advance, on_waiting=bar.wait)
        results = sweeps.sweep(variants, output=output, options=chosen)
        bar.done()
    said = [note for variant in variants for note in variant.plan.notes]
    said += [note for result in results if result.load_check for note in result.load_check.notes]
    notes = list(dict.fromkeys(said))
    if options.json:
        pairs = zip(variants, results, strict=True)
        outputs = [{"settings": dict(v.settings)} | result.as_dict() for v, result in pairs]
        print_json({"outputs": outputs, "notes": notes})
    elif not options.quiet:
        for result in results:
            print_result(result)
    print_notes(notes, options)
    return 0


COMMAND = Command(
    summary="merge with several values of settings, from one reading of the models",
    examples=(
        "outliermerge sweep merge.yaml --set t=2,2.5,3 --output merged/t",
        "outliermerge sweep merge.yaml --set merge_method=linear,task_arithmetic --output merged",
        "outliermerge sweep merge.yaml --set models.1.weight=0.3,0.5 --set lambda=0.8,1 --output m",
    ),
    overview="outliermerge sweep merge.yaml --set t=2,2.5,3 --output merged/sweep",
    add_arguments=add_arguments,
    run=run,
    goes_on=True,
    explanation=BAR_EXPLAINED,
)
