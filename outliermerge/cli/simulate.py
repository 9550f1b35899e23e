"""`simulate`: simulate weights as the paper does."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from outliermerge.cli.parts import Command, count, say
from outliermerge.cli.terminal import open_console, plain_table, reading_bar, text
from outliermerge.cli.weights import (
    MOMENTS,
    add_json_file,
    check_files,
    number_text,
    write_files,
)

if TYPE_CHECKING:
    from outliermerge.analysis.simulate import Simulation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the simulation and for the files to write."""
    parser.add_argument(
        "--points",
        type=count,
        default=10_000_000,
        metavar="N",
        help="how many points to draw (default 10,000,000)",
    )
    parser.add_argument(
        "--seed", type=int, default=42, metavar="S", help="the random seed (default 42)"
    )
    parser.add_argument("--png", metavar="FILE", help="draw Fig. 7 of the paper")
    add_json_file(parser)


def run(options: argparse.Namespace) -> int:
    """Simulate weights, and print their statistics and shapes."""
    from outliermerge.analysis.simulate import draw, simulate

    check_files(options)
    with reading_bar("simulating", quiet=options.quiet) as callbacks:
        found = simulate(seed=options.seed, num_points=options.points, **callbacks)
    if options.png:
        draw(found, options.png)
        say(f"wrote {options.png}", file=sys.stderr)
    if write_files(options, found.as_dict(), []):
        print_simulation(found)
    return 0


def print_simulation(found: Simulation) -> None:
    """Print the statistics and shapes of simulated weights."""
    console = open_console()
    console.print(
        text(
            f"{found.num_points:,} points, seed {found.seed}: {found.num_non_zero:,} optimal "
            f"weights are not zero, {found.num_outliers:,} of them outliers",
            style="bold",
        )
    )
    table = plain_table("noise", *(title for title, _, _ in MOMENTS), "label", "the paper says")
    for column in table.columns:
        column.justify = "right"
    for each in found.weights:
        cells = (number_text(getattr(each.stats, name), form) for _, name, form in MOMENTS)
        table.add_row(f"{each.noise:g}", *cells, each.stats.label or "–", each.expected or "–")
    console.print(table)


COMMAND = Command(
    summary="simulate weights as the paper does (arXiv 2501.10661, sections B.2 and C.6)",
    examples=(
        "outliermerge simulate --png fig7.png",
        "outliermerge simulate --points 1000000 --seed 7 --json -",
    ),
    add_arguments=add_arguments,
    run=run,
)
