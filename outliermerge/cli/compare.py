"""`compare`: make the table of finished evaluations."""

from __future__ import annotations

import argparse

from outliermerge.cli.parts import Command, add_baseline, add_json, print_json
from outliermerge.errors import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the scores and for the output."""
    parser.add_argument(
        "scores",
        metavar="SCORES",
        nargs="+",
        help="scores.json of an evaluation, or the folder that it is in",
    )
    parser.add_argument(
        "--paper", action="store_true", help="add Table 4 of arXiv 2501.10661 below"
    )
    parser.add_argument("--markdown", metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--chart", metavar="FILE", help="draw a bar chart of the scores as PNG")
    add_baseline(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Put finished evaluations into one table."""
    from outliermerge.evaluation.chart import draw
    from outliermerge.evaluation.paper import with_paper
    from outliermerge.evaluation.scores import load_scores
    from outliermerge.evaluation.table import make_table
    from outliermerge.output.replaceable import writable
    from outliermerge.storage.files import write_whole

    markdown = writable(options.markdown, "markdown") if options.markdown else None
    chart = writable(options.chart, "png") if options.chart else None
    scores = [load_scores(path) for path in options.scores]
    table = make_table(scores, baseline=options.baseline)
    if options.paper:
        table = with_paper(table)
    if markdown is not None:
        write_whole(markdown, (table.as_markdown() + "\n").encode())
    if chart is not None:
        draw(table, chart)
    if options.json:
        print_json(table.as_dict())
    else:
        print(printable(table.as_markdown()))
    return 0


COMMAND = Command(
    summary="make the table of finished evaluations",
    examples=(
        "outliermerge compare scores/scores.json --paper",
        "outliermerge compare scores other/scores.json --chart both.png --json",
    ),
    overview="outliermerge compare scores --paper",
    add_arguments=add_arguments,
    run=run,
)
