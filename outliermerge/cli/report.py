"""`report`: write a page that shows weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from outliermerge.cli.parts import Command, add_machine, say
from outliermerge.cli.terminal import reading_bar
from outliermerge.cli.weights import add_base, add_filter
from outliermerge.optional import require_search

_TRIALS_NAME = "trials.sqlite"  # of a search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the models and for the files to write."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="models: folders, files, hub ids, adapters; one that is an output of `run` is shown "
        "with its recipe, and how far it moved; or the folder of a search",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="the page to write, such as report.html: one file, which needs no network",
    )
    parser.add_argument(
        "--png", metavar="DIR", help="also draw figures for papers, at 300 dpi, into this folder"
    )
    parser.add_argument(
        "--t",
        type=float,
        default=2.0,
        metavar="T",
        help="threshold of min-σ that the page begins with, 1 to 5 (default 2)",
    )
    add_filter(parser)
    add_base(parser)
    add_machine(parser)


def run(options: argparse.Namespace) -> int:
    """Write the page, and figures if they are asked for."""
    searched = Path(options.models[0])
    if len(options.models) == 1 and (searched / _TRIALS_NAME).is_file():
        require_search()
        from outliermerge.search.page import write_page

        say(f"wrote {write_page(searched, options.output)}")
        return 0
    from outliermerge.analysis.report.build import build_report

    with reading_bar(quiet=options.quiet) as callbacks:
        page = build_report(
            options.models,
            base=options.base,
            output=options.output,
            png=options.png or None,
            t=options.t,
            filter=options.filter,
            device=options.device,
            threads=options.threads,
            **callbacks,
        )
    say(f"wrote {page}" + (f" and {options.png}" if options.png else ""))
    return 0


COMMAND = Command(
    summary="write a page that shows the distributions of weights, or of a merge and its drift",
    examples=(
        "outliermerge report models/minilm -o report.html",
        "outliermerge report models/a models/b --base models/base -o report.html --png figures",
        "outliermerge report merged -o merged.html",
        "outliermerge report found -o search.html",
    ),
    overview="outliermerge report merged -o merged.html",
    add_arguments=add_arguments,
    run=run,
)
