"""The scores in Table 4 of arXiv 2501.10661, to be shown below one's own."""

from __future__ import annotations

from dataclasses import replace

from outliermerge.evaluation.cells import AVG, GAIN, Cell, Row, Table

PAPER_TITLES = ("MathVista", "MMStar", "MMMU", "WeMath", "AI2D", "DynaMath", "GeoQA")

# Titles, avg and gain are as printed. The scores of the base, LLaVA-v1.5-13B, are cited there from
# Duan et al. (2024).
_SCORES: dict[str, tuple[float | None, ...]] = {
    "LLaVA-v1.5-13B": (34.3, 37.0, 27.7, None, 61.1, None, None, None, None),
    "LLaVA-1.6-13B": (33.6, 40.2, 42.6, 30.1, 67.9, 20.3, 23.9, 36.9, None),
    "Math-LLaVA": (45.8, 42.8, 42.0, 33.9, 66.7, 22.9, 46.6, 43.0, None),
    "average": (43.7, 42.5, 43.0, 35.2, 69.3, 22.6, 41.2, 42.5, None),
    "min-σ, t=3": (44.4, 42.3, 44.0, 38.2, 71.2, 24.7, 41.4, 43.7, 1.2),
    "min-σ, t=2": (46.0, 43.5, 44.0, 38.4, 70.1, 25.6, 44.2, 44.5, 2.0),
}


def paper_rows() -> tuple[Row, ...]:
    """Return the rows of Table 4 of arXiv 2501.10661, in its order, without standard errors."""
    columns = (*PAPER_TITLES, AVG, GAIN)
    return tuple(
        Row(
            f"{name} (paper)",
            "paper",
            {
                column: Cell(value)
                for column, value in zip(columns, values, strict=True)
                if value is not None
            },
        )
        for name, values in _SCORES.items()
    )


def with_paper(table: Table) -> Table:
    """Return the table with the rows of Table 4 of arXiv 2501.10661 below its own.

    The paper's rows use the table's columns with the same titles; other columns are added. They are
    never marked as best, and their gain is the printed one, over the paper's own average.
    """
    notes = [
        "(paper): printed in Table 4 of arXiv 2501.10661, not measured here; its gain is over its "
        "own average. Its task models were evaluated in 8 bit; the row LLaVA-v1.5-13B is cited "
        "there from Duan et al. (2024)."
    ]
    if set(table.averaged) != set(PAPER_TITLES):
        notes.append(f"The avg of (paper) is over other tasks: {', '.join(PAPER_TITLES)}.")
    return replace(
        table,
        titles=(*table.titles, *(title for title in PAPER_TITLES if title not in table.titles)),
        rows=(*table.rows, *paper_rows()),
        notes=(*table.notes, *notes),
    )
