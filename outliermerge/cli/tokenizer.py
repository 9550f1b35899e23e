"""`tokenizer transplant`: give a model the tokenizer of another one."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from outliermerge.cli.lines import human_bytes
from outliermerge.cli.parts import (
    BAR_EXPLAINED,
    Command,
    add_running,
    count,
    print_json,
    print_notes,
    run_options,
)
from outliermerge.cli.plan import show_plan
from outliermerge.cli.plan_facts import Took
from outliermerge.cli.specs import named_output
from outliermerge.cli.tables import NamedTable, print_words
from outliermerge.cli.terminal import MergeBar, open_console, print_result, reading_bar
from outliermerge.errors import ArgumentError, quoted

if TYPE_CHECKING:
    from rich.console import Console

    from outliermerge.planning.transplant import Transplant

_METHODS = ("omp", "interpolate", "subtokens", "mean", "zero")
_SUMMARY = "give a model the tokenizer of another one, with rows for the tokens that it lacks"
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
    began = time.perf_counter()
    planned = api.planned_transplant(spec, shard_size=options.shard_size)
    if options.dry_run:
        took = Took(time.perf_counter() - began)
        show_plan(planned.plan, options, took, further=[*_facts(planned)])
        return 0
    chosen = run_options(options).on_this_machine(planned.plan)
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


def _facts(planned: Transplant) -> Iterator[tuple[str, str]]:
    """Yield what is true of a transplant besides what is of every plan."""
    shared, spec = len(planned.pairing.shared), planned.spec
    number = sum(row in planned.tokens for row in planned.missing)
    yield "tensors", ", ".join(target.name for target in planned.targets)
    yield "in common", f"{shared:,} spelt alike, of which rows can be made"
    donors = {id(t.donor): t.donor for t in planned.targets if t.donor is not None}
    if donors:
        columns = max(donor.shape[-1] for donor in donors.values())
        k = min(spec.k, shared, *([columns] if spec.approximation == "omp" else []))
        yield "k", f"{k:,} of the tokens in common make up a new row"
        passes = k if spec.approximation == "omp" else 1
        operations = 2 * number * shared * passes * sum(d.shape[-1] for d in donors.values())
        yield (
            "new rows",
            f"computed first, in about {operations:.1e} operations and "
            f"{human_bytes(4 * shared * columns)} of memory for the donor's rows of the tokens in "
            "common; time and peak memory above are without this",
        )


def _print_report(console: Console, report: Mapping[str, Any], *, verbose: bool) -> None:
    """Print what became of the tokens, and the errors of what was approximated."""
    by_role = ", ".join(f"{quoted(a)} as {quoted(b)}" for a, b in report["copied_by_role"].items())
    tensors = report["tensors"]
    num_means = max((of["num_without_basis"] for of in tensors.values()), default=0)
    means = f", {num_means:,} of them the mean of all rows" if num_means else ""
    print_words(
        console,
        f"{report['num_tokens']:,} tokens: {report['num_copied']:,} copied, "
        f"{report['num_approximated']:,} approximated by {report['method']}{means}",
        "bold",
    )
    if by_role:
        print_words(console, f"copied as special tokens for the same use: {by_role}")
    table = NamedTable(
        "rows of", "error in donor", "90%", "held out", "90%", "cosine", "error of mean"
    )
    for name, of in tensors.items():
        inside, held = of["reconstruction"], of["held_out"]
        cells = [_number(inside, "median"), _number(inside, "p90")]
        held_error, of_mean = (held or {}).get("error"), (held or {}).get("error_of_mean")
        cells += [_number(held_error, "median"), _number(held_error, "p90")]
        cells += [_number((held or {}).get("cosine"), "median"), _number(of_mean, "median")]
        table.add_row(name, *cells)
    helds = [of["held_out"] for of in tensors.values() if of["held_out"]]
    if not helds and not any(of["reconstruction"] for of in tensors.values()):
        print_words(console, "No tokens were held out, so no errors are known.")
        return
    table.print(console)
    said = "Errors are relative to the rows' length, medians and 90% of the tokens."
    if helds:
        said += (
            f" Held out: {helds[0]['num_tokens']} tokens in common (a quarter of them, at most "
            "256), made as if the model lacked them, against its own rows. Where its error is not "
            "below that of the mean of all rows, the new rows are no better than that mean."
        )
    print_words(console, said)
    for name, of in tensors.items():
        worst = of["worst"] if verbose else of["worst"][:_EVERY_WORST]
        if worst:
            tokens = ", ".join(f"{quoted(w['text'])} {w['error']:.2f}" for w in worst)
            more = "" if verbose or len(of["worst"]) <= _EVERY_WORST else " (-v: ten)"
            print_words(console, f"worst of {name}: {tokens}{more}")


def _number(values: Mapping[str, float] | None, key: str) -> str:
    return "–" if values is None else f"{values[key]:.3f}"


COMMAND = Command(
    summary=_SUMMARY,
    examples=(
        "outliermerge tokenizer transplant MODEL DONOR both",
        "outliermerge tokenizer transplant MODEL DONOR both --method subtokens",
        "outliermerge tokenizer transplant MODEL DONOR both --k 16 --device cuda --json",
        "outliermerge tokenizer transplant MODEL DONOR --dry-run",
    ),
    add_arguments=add_arguments,
    run=run,
    goes_on=True,
    parts={"transplant": _SUMMARY},
    explanation="""\
It needs torch. DONOR's rows of the tokens in common are held in memory in float32, and MODEL's in
their dtype; --memory does not count them.
"""
    + BAR_EXPLAINED,
)
