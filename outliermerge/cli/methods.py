"""`methods`: list merge methods and their parameters."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from outliermerge.cli.parts import EXIT_DONE, Command, add_json, print_json
from outliermerge.cli.terminal import open_console, plain_table, text, value_text

if TYPE_CHECKING:
    from rich.table import Table

    from outliermerge.methods.contract import MergeMethod


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the name of a method."""
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="show this one, with its formula and what its parameters mean",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print methods."""
    from outliermerge.methods.table import EVERY, MODIFIERS, find_method

    chosen = [find_method(options.name)] if options.name else list(EVERY.values())
    if options.json:
        print_json([_describe(method) for method in chosen])
        return EXIT_DONE
    if options.name:
        print_method(chosen[0])
    else:
        print_methods(chosen)
        print(f"Modifiers of what a method has merged: {', '.join(MODIFIERS)}")
    return EXIT_DONE


def _describe(method: MergeMethod) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "documentation": method.spec_documentation,
        "paper": method.paper,
        "space": method.space,
        "cut": method.cut,
        "parameters": [
            {
                "name": parameter.name,
                "type": parameter.type.__name__,
                "default": parameter.default,
                "per_model": parameter.per_model,
                "range": parameter.range,
            }
            for parameter in method.parameters.values()
        ],
    }


def print_methods(methods: Iterable[MergeMethod]) -> None:
    """Print every method with its parameters."""
    from rich.padding import Padding
    from rich.text import Text

    console = open_console(soft_wrap=True)
    for method in methods:
        console.print(Text.assemble((method.name, "bold"), f"  {method.summary}"))
        if method.paper:
            console.print(text(f"  {method.paper}", style="dim"))
        console.print(Padding(_parameter_table(method), (0, 0, 1, 2)))
    console.print("One of them with its formula: outliermerge methods NAME")


def _parameter_table(method: MergeMethod) -> Table:
    table = plain_table("parameter", "default", "range", "of")
    for parameter in method.parameters.values():
        table.add_row(
            parameter.name,
            value_text(parameter.default),
            parameter.range or parameter.type.__name__,
            "each model" if parameter.per_model else "the merge",
        )
    return table


def print_method(method: MergeMethod) -> None:
    """Print a method's documentation."""
    console = open_console(soft_wrap=True)
    console.print(text(method.name, style="bold"))
    console.print(text(method.spec_documentation))
    if method.space == "merged":
        console.print(
            text(f"\nA modifier: a spec names it under `modifiers`: `- modifier: {method.name}`.")
        )
    console.print()
    console.print(_parameter_table(method))
    if method.paper:
        console.print(text(method.paper))


COMMAND = Command(
    summary="list merge methods and their parameters",
    examples=(
        "outliermerge methods",
        "outliermerge methods min_sigma",
        "outliermerge methods --json",
    ),
    overview="outliermerge methods min_sigma",
    add_arguments=add_arguments,
    run=run,
)
