"""`compare-weights`: show how alike models are, and what conflicts in a merge."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from outliermerge.cli.parts import Command, add_machine, print_notes
from outliermerge.cli.tables import NamedTable, letters_of, print_words
from outliermerge.cli.terminal import open_console, reading_bar
from outliermerge.cli.weights import (
    add_base,
    add_rename,
    add_table_files,
    check_files,
    number_text,
    write_files,
)

if TYPE_CHECKING:
    from outliermerge.analysis.compare import Comparison
    from outliermerge.analysis.pairs import PairStats

_PAIR_COLUMNS = (
    ("cosine", "cosine", "{:.4f}"),
    ("distance", "distance", "{:.3g}"),
    ("|Δσ|", "std_difference", "{:.2g}"),
    ("sign %", "sign_agreement", "{:.1%}"),
    ("shared %", "outlier_overlap", "{:.1%}"),
    ("conflict %", "conflict_ratio", "{:.3%}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the models and for the comparison."""
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="two or more models: folders, files, hub ids, adapters",
    )
    parser.add_argument(
        "--t",
        type=float,
        default=2.0,
        metavar="T",
        help="count elements beyond Tσ as outliers (default 2)",
    )
    parser.add_argument(
        "--by",
        choices=("model", "module", "layer", "tensor"),
        default="model",
        help="what the table has a row for (default: model, a pair of models)",
    )
    add_base(parser)
    add_rename(parser)
    add_machine(parser)
    add_table_files(parser)


def run(options: argparse.Namespace) -> int:
    """Compare models or their task vectors, and print what conflicts."""
    from outliermerge.analysis.compare import compare_weights

    check_files(options)
    with reading_bar(quiet=options.quiet) as callbacks:
        found = compare_weights(
            options.models,
            base=options.base,
            t=options.t,
            rename=options.rename,
            device=options.device,
            threads=options.threads,
            **callbacks,
        )
    if write_files(options, found.as_dict(), [pair.as_dict() for pair in found.tensors]):
        print_comparison(found, by=options.by)
    print_notes(found.notes, options)
    return 0


def print_comparison(found: Comparison, *, by: str) -> None:
    """Print how models compare: pairs of whole models, or by module, layer or tensor."""
    console = open_console()
    what = "weights" if found.base is None else f"task vectors against {found.base}"
    print_words(console, f"{what} of:", "bold")
    columns = _PAIR_COLUMNS if found.base is not None else _PAIR_COLUMNS[:-1]
    letters = letters_of(len(found.models))
    for letter, model in zip(letters, found.models, strict=True):
        print_words(console, f"  {letter}  {model}")
    if by == "model" and len(found.models) > 2:
        for title, column, form in columns:
            _matrix_table(found, title, column, form, letters).print(console)
    else:
        _pair_table(found, by, letters, columns).print(console)
    words = "distance: of the two, in L2 norm. |Δσ|: by how much their σ differ. sign: elements of "
    words += f"one sign in both. shared: of the outliers beyond {found.t:g}σ, those at the same "
    words += "places."
    if found.base is not None:
        words += " conflict: share of all elements that min-σ would keep whole of both in a merge "
        words += "of these two alone, with opposite signs, so that they cancel."
    print_words(console, words, "dim")
    print_words(console, found.verdict, "bold")


def _pair_table(
    found: Comparison, by: str, letters: Sequence[str], columns: Sequence[tuple[str, str, str]]
) -> NamedTable:
    from outliermerge.analysis.table import spread

    several = by == "model" or len(found.pairs) > 1
    first = [*([] if by == "model" else [by]), *(["models"] if several else [])]
    table = NamedTable(*first, *(title for title, _, _ in columns)).left(*first)
    for name, (a, b), rows in _pair_groups(found, by):
        cells = (
            number_text(spread(getattr(row, column) for row in rows).mean, form)
            for _, column, form in columns
        )
        named = [] if by == "model" else [name]
        pair = [f"{letters[a]} {letters[b]}"] if several else []
        table.add_row(*named, *pair, *cells)
    return table


def _pair_groups(
    found: Comparison, by: str
) -> Iterator[tuple[str, tuple[int, int], Sequence[PairStats]]]:
    """Yield groups of rows: a name, a pair of models, and the rows to average."""
    from outliermerge.analysis.places import natural, short_names

    groups: dict[tuple[str, tuple[int, int]], list[PairStats]] = {}
    for row in found.pairs if by == "model" else found.tensors:
        name = {"module": row.module, "layer": row.layer}.get(by, row.name)
        if name is not None:
            groups.setdefault((name, (row.a, row.b)), []).append(row)
    short = short_names(name for name, _ in groups) if by == "module" else {}
    order = natural if by in ("layer", "tensor") else lambda name: 0
    for (name, pair), rows in sorted(groups.items(), key=lambda item: order(item[0][0])):
        yield short.get(name, name), pair, rows


def _matrix_table(
    found: Comparison, title: str, column: str, form: str, letters: Sequence[str]
) -> NamedTable:
    table = NamedTable(title, *letters, justify="left")
    for letter, row in zip(letters, found.matrix(column), strict=True):
        table.add_row(letter, *(number_text(value, form) for value in row))
    return table


COMMAND = Command(
    summary="show how alike models or their task vectors are, and what conflicts in a merge",
    examples=(
        "outliermerge compare-weights models/a models/b",
        "outliermerge compare-weights models/a models/b models/c --base models/base --by module",
        "outliermerge compare-weights models/a models/b --base models/base --csv pairs.csv",
    ),
    overview="outliermerge compare-weights models/a models/b --base models/base",
    add_arguments=add_arguments,
    run=run,
)
