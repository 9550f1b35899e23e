"""`stats`: show how weights are distributed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from outliermerge.cli.lines import human_bytes
from outliermerge.cli.parts import Command, add_machine, print_notes
from outliermerge.cli.tables import NamedTable, print_words
from outliermerge.cli.terminal import open_console, reading_bar
from outliermerge.cli.weights import (
    MOMENTS,
    WIDE,
    add_base,
    add_filter,
    add_rename,
    add_table_files,
    check_files,
    number_text,
    write_files,
)

if TYPE_CHECKING:
    from outliermerge.analysis.table import Group, WeightStats

_WIDE_COLUMNS = (
    *MOMENTS,
    ("small %", "small_ratio", "{:.1%}"),
    ("kurtosis without", "kurtosis_without_small", "{:.2f}"),
    (">2σ %", "outside_2_ratio", "{:.2%}"),
    (">3σ %", "outside_3_ratio", "{:.2%}"),
    (">4σ %", "outside_4_ratio", "{:.2%}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the model and for the measures."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model: a folder, a file, a hub id, an adapter, or BASE+ADAPTER",
    )
    parser.add_argument(
        "--small",
        type=float,
        default=1e-3,
        metavar="X",
        help="count elements with |x| < X as small (default 0.001)",
    )
    parser.add_argument(
        "--by",
        choices=("module", "layer", "tensor"),
        default="module",
        help="what the table has a row for (default: module, a type of module over all layers)",
    )
    parser.add_argument(
        "--no-kernels",
        action="store_true",
        help="measure by torch instead of the C kernels: slower",
    )
    add_filter(parser)
    add_base(parser)
    add_rename(parser)
    add_machine(parser)
    add_table_files(parser)


def run(options: argparse.Namespace) -> int:
    """Measure and print the distribution of a model's weights."""
    from outliermerge.analysis.models import open_subject
    from outliermerge.analysis.stats import weight_stats

    check_files(options)
    subject = open_subject(options.model, options.base, rename=options.rename)
    started = time.perf_counter()
    with reading_bar(quiet=options.quiet) as callbacks:
        stats = weight_stats(
            subject,
            filter=options.filter,
            small=options.small,
            device=options.device,
            threads=options.threads,
            kernels=not options.no_kernels,
            **callbacks,
        )
    seconds = time.perf_counter() - started
    rows = [tensor.as_dict() for tensor in stats.tensors]
    if write_files(options, stats.as_dict() | {"seconds": round(seconds, 4)}, rows):
        print_stats(stats, by=options.by)
        read = human_bytes(subject.num_bytes)
        print(f"{read} in {seconds:.2f} s")
    print_notes(stats.notes, options)
    return 0


def print_stats(stats: WeightStats, *, by: str) -> None:
    """Print the statistics of a model: by type of module, by layer, or tensor by tensor."""
    from outliermerge.analysis.places import natural

    console = open_console()
    what = stats.model if stats.base is None else f"{stats.model} − {stats.base}"
    num_elements = sum(tensor.num_elements for tensor in stats.tensors)
    print_words(console, f"{what}: {len(stats.tensors)} tensors, {num_elements:,} elements", "bold")
    columns = _WIDE_COLUMNS if console.width >= WIDE else MOMENTS
    first = ("tensor", "shape") if by == "tensor" else (by, "of")
    table = NamedTable(*first, *(title for title, _, _ in columns), "label").left("label")
    if by == "tensor":
        for tensor in sorted(stats.tensors, key=lambda tensor: natural(tensor.name)):
            cells = (number_text(getattr(tensor, name), form) for _, name, form in columns)
            shape = "×".join(map(str, tensor.shape))
            table.add_row(tensor.name, shape, *cells, tensor.label or "–")
    else:
        names = stats.short_names
        for group in stats.modules if by == "module" else stats.layers:
            shown = names.get(group.name, group.name)
            table.add_row(shown, str(group.num_tensors), *_group_cells(group, columns))
        whole = stats.whole
        table.add_row("all matrices", str(whole.num_tensors), *_group_cells(whole, columns))
    table.print(console)
    print_words(console, _footnote(stats, by=by, is_wide=columns is _WIDE_COLUMNS), "dim")


def _footnote(stats: WeightStats, *, by: str, is_wide: bool) -> str:
    """Say what stands in the columns that are printed."""
    words = f"kept: within {stats.filter:g}σ of the mean; skew and kurtosis are of these. "
    if is_wide:
        words += (
            f"small: elements with |x| < {stats.small:g}, of all; kurtosis without: of the kept "
            "elements without the small ones. "
        )
    if by != "tensor":
        words = "mean±deviation over matrices. " + words
        words += "label: the most frequent shape of the histograms, and how many matrices have it. "
    else:
        words += "label: the shape of the histogram. "
    return words + "An exact Gaussian by 3σ: 99.73% kept, kurtosis 2.83."


def _group_cells(group: Group, columns: Sequence[tuple[str, str, str]]) -> list[str]:
    cells = []
    for _, name, form in columns:
        spread = group.spreads[name]
        cells.append(number_text(spread.mean, form))
        if "kurtosis" in name and group.num_tensors > 1:
            cells[-1] += f"±{number_text(spread.std, form)}"
    most = max(group.labels, key=lambda label: group.labels[label], default=None)
    return [*cells, f"{most} {group.labels[most]}/{group.num_tensors}" if most else "–"]


COMMAND = Command(
    summary="show how a model's weights, or its task vectors, are distributed",
    examples=(
        "outliermerge stats models/minilm",
        "outliermerge stats models/tuned --base models/minilm --by layer",
        "outliermerge stats models/minilm --by tensor --json stats.json --csv stats.csv",
    ),
    overview="outliermerge stats merged",
    add_arguments=add_arguments,
    run=run,
)
