"""`tokenizer transplant`: give a model the tokenizer of another one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from outliermerge.cli.parts import (
    BAR_EXPLAINED,
    Command,
    add_running,
    count,
    print_json,
    print_notes,
    run_options,
)
from outliermerge.cli.specs import named_output
from outliermerge.cli.tables import NamedTable, print_facts, print_words
from outliermerge.cli.terminal import (
    MergeBar,
    check_loading,
    open_console,
    print_result,
    reading_bar,
)
from outliermerge.errors import ArgumentError, quoted

if TYPE_CHECKING:
    from rich.console import Console

    from outliermerge.planning.transplant import Transplant

_METHODS = ("omp", "interpolate", "subtokens", "mean", "zero")
_EVERY_WORST = 3  # of the worst tokens, without -v


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a merge, and those of a transplant."""
    parser.add_argument("action", metavar="transplant", choices=("transplant",))
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id or model+adapter")
    parser.add_argument(
        "donor", metavar="DONOR", help="the model with the tokenizer; or a folder with only that"
    )
    parser.add_argument("folder", metavar="DIR", nargs="?", help="what to write (or --output)")
    add_running(parser, has_spec=False)
    parser.add_argument(
        "--method",
        default="omp",
        metavar="NAME",
        help=f"how rows are made for tokens that MODEL lacks: {', '.join(_METHODS)} (default omp)",
    )
    parser.add_argument(
        "--k",
        type=count,
        default=64,
        metavar="N",
        help="how many tokens in common make up a row, for omp and interpolate (default 64)",
    )
    parser.add_argument(
        "--pad-to-multiple-of", type=count, metavar="N", help="add rows up to a multiple of N"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be made; no row is computed"
    )


def run(options: argparse.Namespace) -> int:
    """Make the model, and print how good its new rows are."""
    from outliermerge import api
    from outliermerge.execution.transplant import add_rows
    from outliermerge.output.run import output_path, refuse_taken, run_plans
    from outliermerge.spec.transplant import transplant_spec

    output = named_output(options)
    if output is None and not options.dry_run:
        raise ArgumentError("no output: name the folder to write after DONOR")
    spec = transplant_spec(
        options.model,
        options.donor,
        method=options.method,
        k=options.k,
        pad_to_multiple_of=options.pad_to_multiple_of,
    )
    planned = api.planned_transplant(spec, shard_size=options.shard_size)
    chosen = run_options(options).on_this_machine()
    planned.plan.peak_memory_bytes(chosen)  # refuses a budget that is too small
    if options.dry_run:
        verdict = None
        if options.load_check:
            verdict = check_loading(planned.plan, quiet=options.quiet)
        notes = [*planned.plan.notes, *(verdict.notes if verdict else ())]
        if options.json:
            checked = {"load_check": verdict.as_dict()} if verdict else {}
            facts = planned.plan.as_dict(tensors=False)
            print_json({"output": output} | checked | facts | {"notes": notes})
        else:
            _print_plan(open_console(), planned)
        print_notes(notes, options)
        return 0
    path = output_path(planned.plan, output)
    refuse_taken(planned.plan, path, overwrite=options.overwrite)
    with reading_bar("approximating rows", quiet=options.quiet) as advance:
        made = add_rows(planned, device=chosen.device, **advance)
    plan = made.plan
    with MergeBar(plan.work_bytes, 1, quiet=options.quiet) as bar:
        asked = run_options(options, on_progress=bar.advance, on_waiting=bar.wait)
        (result,) = run_plans([(plan, path)], asked)
        bar.done()
    notes = [*plan.notes, *(result.load_check.notes if result.load_check else ())]
    if options.json:
        print_json(result.as_dict() | {"transplant": plan.transplant, "notes": notes})
    elif not options.quiet and plan.transplant is not None:
        print_result(result)
        _print_report(open_console(), plan.transplant, verbose=bool(options.verbose))
    print_notes(notes, options)
    return 0


def _print_plan(console: Console, planned: Transplant) -> None:
    tokenizer = planned.plan.tokenizer
    assert tokenizer is not None
    print_words(console, planned.spec.summary, "bold")
    in_common = f"{len(planned.pairing.shared):,} spelt alike, of which rows can be made"
    changed = [
        f"{file}: {'.'.join(keys)} {value}"
        for file, values in tokenizer.ids.items()
        for keys, value in values.items()
    ]
    print_facts(
        console,
        [
            ("tokenizer", tokenizer.in_words()),
            ("rows", tokenizer.models[0].in_words()),
            ("in common", in_common),
            *([("ids", "; ".join(changed))] if changed else []),
            ("tensors", ", ".join(target.name for target in planned.targets)),
        ],
    )


def _print_report(console: Console, report: Mapping[str, Any], *, verbose: bool) -> None:
    """Print what became of the tokens, and the errors of what was approximated."""
    by_role = report["num_copied_by_role"]
    named = f" ({by_role:,} special, under another name)" if by_role else ""
    print_words(
        console,
        f"{report['num_tokens']:,} tokens: {report['num_copied']:,} copied{named}, "
        f"{report['num_approximated']:,} approximated by {report['method']}",
        "bold",
    )
    table = NamedTable(
        "rows of", "error in donor", "90%", "held out", "90%", "cosine", "error of mean"
    )
    for name, of in report["tensors"].items():
        inside, held = of["reconstruction"], of["held_out"]
        cells = [_number(inside, "median"), _number(inside, "p90")]
        held_error, of_mean = (held or {}).get("error"), (held or {}).get("error_of_mean")
        cells += [_number(held_error, "median"), _number(held_error, "p90")]
        cells += [_number((held or {}).get("cosine"), "median"), _number(of_mean, "median")]
        table.add_row(name, *cells)
    table.print(console)
    helds = [of["held_out"] for of in report["tensors"].values() if of["held_out"]]
    said = "Errors are relative to the rows' length, medians and 90% of the tokens."
    if helds:
        said += (
            f" Held out: {helds[0]['num_tokens']} tokens in common, made as if the model lacked "
            "them, against its own rows."
        )
    print_words(console, said)
    for name, of in report["tensors"].items():
        worst = of["worst"] if verbose else of["worst"][:_EVERY_WORST]
        if worst:
            tokens = ", ".join(f"{quoted(w['token'])} {w['error']:.2f}" for w in worst)
            more = "" if verbose or len(of["worst"]) <= _EVERY_WORST else " (-v: ten)"
            print_words(console, f"worst of {name}: {tokens}{more}")


def _number(values: Mapping[str, float] | None, key: str) -> str:
    return "–" if values is None else f"{values[key]:.3f}"


COMMAND = Command(
    summary="give a model the tokenizer of another one, with rows for the tokens that it lacks",
    examples=(
        "outliermerge tokenizer transplant MODEL DONOR both",
        "outliermerge tokenizer transplant MODEL DONOR both --method subtokens",
        "outliermerge tokenizer transplant MODEL DONOR both --k 16 --device cuda --json",
        "outliermerge tokenizer transplant MODEL DONOR --dry-run",
    ),
    add_arguments=add_arguments,
    run=run,
    goes_on=True,
    explanation="""\
It needs torch. DONOR's rows of the tokens in common are held in memory in float32, and MODEL's in
their dtype; --memory does not count them.
"""
    + BAR_EXPLAINED,
)
