"""Tables of weight statistics for people at a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from outliermerge.analysis.places import short_names
from outliermerge.analysis.table import Group, WeightStats, spread
from outliermerge.cli.render import open_console, plain_table
from outliermerge.errors import printable

if TYPE_CHECKING:
    from outliermerge.analysis.compare import Comparison, PairStats
    from outliermerge.analysis.simulate import Simulation
    from outliermerge.analysis.spectra import LayerSpectra
    from outliermerge.analysis.spectra_fit import PowerLawFit

_COLUMNS = (
    ("σ", "std", "{:.2g}"),
    ("kept %", "kept_ratio", "{:.2%}"),
    ("skew", "skewness", "{:.2f}"),
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
_WIDE, _NAME_WIDTH = 130, 18  # characters of a terminal, and of its first column


def print_stats(stats: WeightStats, *, by: str) -> None:
    """Print the statistics of a model: by type of module, by layer, or tensor by tensor."""
    console = open_console()
    what = stats.model if stats.base is None else f"{stats.model} − {stats.base}"
    num_elements = sum(tensor.num_elements for tensor in stats.tensors)
    console.print(_text(f"{what}: {len(stats.tensors)} tensors, {num_elements:,} elements", "bold"))
    columns = _WIDE_COLUMNS if console.width >= _WIDE else _COLUMNS
    first = ("tensor", "shape") if by == "tensor" else (by, "of")
    table = plain_table(*first, *(title for title, _, _ in columns), "label")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    table.columns[0].min_width = _NAME_WIDTH
    table.columns[-1].justify = "left"
    if by == "tensor":
        for tensor in stats.tensors:
            cells = (_number(getattr(tensor, name), form) for _, name, form in columns)
            table.add_row(
                _text(tensor.name), "×".join(map(str, tensor.shape)), *cells, tensor.label or "–"
            )
    else:
        names = stats.short_names
        for group in stats.modules if by == "module" else stats.layers:
            shown = names.get(group.name, group.name)
            table.add_row(_text(shown), str(group.num_tensors), *_group_cells(group, columns))
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
        console.print(_text(f"note: {note}"))


_PAIR_COLUMNS = (
    ("cosine", "cosine", "{:.4f}"),
    ("distance", "distance", "{:.3g}"),
    ("|Δσ|", "std_difference", "{:.2g}"),
    ("sign %", "sign_agreement", "{:.1%}"),
    ("shared %", "outlier_overlap", "{:.1%}"),
    ("conflict %", "conflict_ratio", "{:.3%}"),
)


def print_comparison(found: Comparison, *, by: str) -> None:
    """Print how models compare: pairs of them as wholes, or by module, layer or tensor."""
    console = open_console()
    what = "weights" if found.base is None else f"task vectors against {found.base}"
    console.print(_text(f"{what} of:", "bold"))
    letters = _letters(len(found.models))
    for letter, model in zip(letters, found.models, strict=True):
        console.print(_text(f"  {letter}  {model}"))
    if by == "model" and len(found.models) > 2:
        for title, column, form in _PAIR_COLUMNS:
            console.print(_matrix_table(found, title, column, form, letters))
    else:
        console.print(_pair_table(found, by, letters))
    console.print(
        f"sign: the same in both. Of outliers beyond {found.t:g}σ, shared: at the same places; "
        "conflict: share of all elements where both are kept whole by min-σ, and cancel.",
        style="dim",
    )
    for note in found.notes:
        console.print(_text(f"note: {note}"))


def _pair_table(found: Comparison, by: str, letters: Sequence[str]) -> Table:
    several = by == "model" or len(found.pairs) > 1
    first = [*(["models"] if several else []), *([] if by == "model" else [by])]
    table = plain_table(*first, *(title for title, _, _ in _PAIR_COLUMNS))
    for column in table.columns[len(first) :]:
        column.justify, column.no_wrap = "right", True
    for name, (a, b), rows in _pair_groups(found, by):
        cells = (
            _number(spread(getattr(row, column) for row in rows).mean, form)
            for _, column, form in _PAIR_COLUMNS
        )
        named = [] if by == "model" else [_text(name)]
        pair = [f"{letters[a]} {letters[b]}"] if several else []
        table.add_row(*pair, *named, *cells)
    return table


def _letters(num: int) -> list[str]:
    return [chr(ord("A") + number) if num <= 26 else str(number + 1) for number in range(num)]


def _pair_groups(
    found: Comparison, by: str
) -> Iterator[tuple[str, tuple[int, int], Sequence[PairStats]]]:
    """Yield groups of rows: their name, the pair of models, and the rows to take means of."""
    groups: dict[tuple[str, tuple[int, int]], list[PairStats]] = {}
    for row in found.pairs if by == "model" else found.tensors:
        name = {"module": row.module, "layer": row.layer}.get(by, row.name)
        if name is not None:
            groups.setdefault((name, (row.a, row.b)), []).append(row)
    short = short_names(name for name, _ in groups) if by == "module" else {}
    for (name, pair), rows in groups.items():
        yield short.get(name, name), pair, rows


def _matrix_table(
    found: Comparison, title: str, column: str, form: str, letters: Sequence[str]
) -> Table:
    table = plain_table(title, *letters)
    for letter, row in zip(letters, found.matrix(column), strict=True):
        table.add_row(letter, *(_number(value, form) for value in row))
    return table


def print_layers(found: Sequence[LayerSpectra], distances: Sequence[Sequence[float]]) -> None:
    """Print what is known of layers' distances, and how far models' fingerprints are apart."""
    console = open_console()
    for spectra in found:
        what = spectra.model if spectra.base is None else f"{spectra.model} − {spectra.base}"
        console.print(_text(f"{what}: {spectra.num_values} singular values of a layer", "bold"))
        is_wide = console.width >= _WIDE
        against = ("against exponential", "against log-normal") if is_wide else ()
        table = plain_table("module", "of", "distance", "alpha", *against, "verdict")
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        table.columns[0].min_width = _NAME_WIDTH
        names = spectra.short_names
        for module in spectra.modules:
            table.add_row(
                _text(names[module.module]),
                str(len(module.layers)),
                *_fit_cells(module.distances, module.fit, is_wide),
            )
        together = [distance for module in spectra.modules for distance in module.distances]
        table.add_section()
        table.add_row("all types together", "", *_fit_cells(together, spectra.fit, is_wide))
        console.print(table)
        for note in spectra.notes:
            console.print(_text(f"note: {note}"))
    console.print(
        "distance: the median of 1 - cos between two layers' singular values; alpha: of a power "
        "law; verdict: against an exponential and a log-normal, as if distances were independent, "
        "which those of the same layers are not. Our reading of arXiv 2509.00046's abstract.",
        style="dim",
    )
    if len(found) > 1:
        letters = _letters(len(found))
        console.print(Text("distance of σ fingerprints (0: alike but for scale)", style="bold"))
        for letter, spectra in zip(letters, found, strict=True):
            console.print(_text(f"  {letter}  {spectra.model}"))
        table = plain_table("", *letters)
        for letter, row in zip(letters, distances, strict=True):
            table.add_row(letter, *(_number(value, "{:.4f}") for value in row))
        console.print(table)


def _fit_cells(distances: Sequence[float], fit: PowerLawFit | None, is_wide: bool) -> list[str]:
    middle = f"{median(distances):.2g}"
    if fit is None:
        return [middle, "–", *(["–", "–"] if is_wide else []), "no fit"]
    others = (fit.exponential, fit.lognormal) if is_wide else ()
    against = [f"{each.ratio:.1f}, p={each.p:.2g}" for each in others]
    return [middle, f"{fit.alpha:.2f}±{fit.standard_error:.2f}", *against, fit.verdict]


def print_simulation(found: Simulation) -> None:
    """Print the statistics and shapes of simulated weights."""
    console = open_console()
    console.print(
        Text(
            f"{found.num_points:,} points, seed {found.seed}: {found.num_non_zero:,} optimal "
            f"weights are not zero, {found.num_outliers:,} of them outliers",
            style="bold",
        )
    )
    table = plain_table("noise", *(title for title, _, _ in _COLUMNS), "label", "the paper says")
    for column in table.columns:
        column.justify = "right"
    for each in found.weights:
        cells = (_number(getattr(each.stats, name), form) for _, name, form in _COLUMNS)
        table.add_row(f"{each.noise:g}", *cells, each.stats.label or "–", each.expected or "–")
    console.print(table)


def _group_cells(group: Group, columns: Sequence[tuple[str, str, str]]) -> list[str]:
    cells = []
    for _, name, form in columns:
        spread = group.spreads[name]
        cells.append(_number(spread.mean, form))
        if "kurtosis" in name and group.num_tensors > 1:
            cells[-1] += f"±{_number(spread.std, form)}"
    most = max(group.labels, key=lambda label: group.labels[label], default=None)
    # A table without edges that has to shrink loses its last character.
    return [*cells, f"{most} {group.labels[most]}/{group.num_tensors} " if most else "–"]


def _text(text: str, style: str = "") -> Text:
    """Return a name or a note as it is shown, whatever is in it."""
    return Text(printable(text), style)


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else form.format(value).removesuffix("%")
