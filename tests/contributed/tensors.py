"""`tensors`: list the tensors of a model, from the headers of its files."""

from __future__ import annotations

import argparse

from outliermerge.cli.parts import EXIT_DONE, Command, add_json, print_json
from outliermerge.cli.terminal import open_console, plain_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a file or a hub id")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print them."""
    from outliermerge.checkpoint.folders.folder import open_checkpoint
    from outliermerge.checkpoint.folders.hub import resolve

    tensors = open_checkpoint(resolve(options.model)).tensors
    if options.json:
        print_json({n: {"dtype": t.dtype.name, "shape": t.shape} for n, t in tensors.items()})
        return EXIT_DONE
    table = plain_table("tensor", "dtype", "shape")
    for name, tensor in tensors.items():
        table.add_row(name, tensor.dtype.name, " × ".join(map(str, tensor.shape)))
    open_console(soft_wrap=True).print(table)
    return EXIT_DONE


COMMAND = Command(
    summary="list the tensors of a model",
    examples=("outliermerge tensors models/base", "outliermerge tensors models/base --json"),
    add_arguments=add_arguments,
    run=run,
)
