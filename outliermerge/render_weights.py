"""Tables of weight statistics for people at a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from outliermerge.render import open_console, plain_table

if TYPE_CHECKING:
    from outliermerge.weights.table import Group, WeightStats

_COLUMNS = (
    ("σ", "std", "{:.2g}"),
    ("kept %", "kept_ratio", "{:.2%}"),
    ("skewness", "skewness", "{:.2f}"),
    ("kurtosis", "kurtosis", "{:.2f}"),
)
_WIDE_COLUMNS = (
    *_COLUMNS,
    ("small %", "small_ratio", "{:.1%}"),
    ("kurtosis without", "kurtosis_without_small", "{:.2f}"),
    (">2σ %", "outside_2_ratio", "{:.2%}"),
    (">3σ %", "outside_3_ratio", "{:.2%}"),
    (">4σ %", "outside_4_ratio", "{:.2%}"),
)
_WIDE, _NAME_WIDTH = 130, 26  # characters of a terminal, and of its first column


def print_stats(stats: WeightStats, *, by: str) -> None:
    """Print the statistics of a model: by type of module, by layer, or tensor by tensor."""
    console = open_console()
    what = stats.model if stats.base is None else f"{stats.model} − {stats.base}"
    num_elements = sum(tensor.num_elements for tensor in stats.tensors)
    console.print(Text(f"{what}: {len(stats.tensors)} tensors, {num_elements:,} elements", "bold"))
    columns = _WIDE_COLUMNS if console.width >= _WIDE else _COLUMNS
    first = ("tensor", "shape") if by == "tensor" else (by, "of")
    table = plain_table(*first, *(title for title, _, _ in columns), "label")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    table.columns[0].min_width = _NAME_WIDTH
    if by == "tensor":
        for tensor in stats.tensors:
            cells = (_number(getattr(tensor, name), form) for _, name, form in columns)
            table.add_row(
                Text(tensor.name), "×".join(map(str, tensor.shape)), *cells, tensor.label or "–"
            )
    else:
        for group in stats.modules if by == "module" else stats.layers:
            shown = stats.short_names.get(group.name, group.name)
            table.add_row(Text(shown), str(group.num_tensors), *_group_cells(group, columns))
        whole = stats.whole
        table.add_section()
        table.add_row("all matrices", str(whole.num_tensors), *_group_cells(whole, columns))
    console.print(table)
    console.print(
        f"mean±deviation over matrices; kept within {stats.filter:g}σ; small: below "
        f"{stats.small:g}. An exact Gaussian by 3σ: 99.73% kept, kurtosis 2.83.",
        style="dim",
    )
    for note in stats.notes:
        console.print(Text(f"note: {note}"))


def _group_cells(group: Group, columns: Sequence[tuple[str, str, str]]) -> list[str]:
    cells = []
    for _, name, form in columns:
        spread = group.spreads[name]
        cells.append(_number(spread.mean, form))
        if form == "{:.2f}" and group.num_tensors > 1:
            cells[-1] += f"±{_number(spread.std, form)}"
    most = max(group.labels, key=lambda label: group.labels[label], default=None)
    return [*cells, f"{most} {group.labels[most]}/{group.num_tensors}" if most else "–"]


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else form.format(value).removesuffix("%")
