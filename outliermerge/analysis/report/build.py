"""Builds the report of models, of task vectors, or of a merge with its drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from outliermerge.analysis.compare import compare_weights
from outliermerge.analysis.moved_layers import moved_layers_note
from outliermerge.analysis.report.data import Shown, payload, short_titles
from outliermerge.analysis.report.figures import check_matplotlib, draw_figures
from outliermerge.analysis.report.merged import measure_merge
from outliermerge.analysis.report.origins import mixture_text
from outliermerge.analysis.report.page import plotly_script, render_page
from outliermerge.analysis.stats import weight_stats
from outliermerge.analysis.table import WeightStats
from outliermerge.arguments import checked, nothing
from outliermerge.checkpoint.folders.hub import resolve
from outliermerge.errors import ArgumentError, OutlierMergeError, argument, as_path
from outliermerge.notebook import with_bar
from outliermerge.output.manifest_file import read_manifest
from outliermerge.output.names import as_local, manifest_path
from outliermerge.output.replaceable import writable
from outliermerge.storage.addresses import is_address
from outliermerge.storage.files import write_whole

_MAX_TITLES = 5


@checked
@with_bar("the report")
def build_report(
    models: str | Path | Sequence[str | Path],
    *,
    base: str | None = None,
    output: str | Path,
    png: str | Path | None = None,
    t: float = 2.0,
    filter: float = 3.0,
    device: str = "cpu",
    threads: int = 0,
    on_total: Callable[[int], None] = nothing,
    on_progress: Callable[[int], None] = nothing,
) -> Path:
    """Write one page that shows the distributions of models' weights, and needs no network.

    If the only model is the output of a merge, the page also shows its manifest and its drift from
    the merged models.

    Args:
        models: a model or a list of them, named as in a spec.
        base: the base model of task vectors; for a merge, its own base by default.
        output: the path of the page, which is written as a whole or not at all. Of what is there,
            only an earlier page is replaced.
        png: a folder for figures for a paper.
        t: the initial threshold in the view of min-σ, 1 to 5.
        filter: skewness and kurtosis are of the elements within this many σ of the mean.
        device, threads: see `weight_stats`.
        on_total: called before each reading with its number of bytes.
        on_progress: called with the number of bytes just read, by any thread. In a notebook a bar
            shows both if neither is given.

    Returns:
        The path of the page.

    Raises:
        ArgumentError: an option is wrong.
        OutlierMergeError: a model is absent or broken, or a package is missing.
        OSError: the page cannot be written.
    """
    named = [str(each) for each in ([models] if isinstance(models, (str, Path)) else models)]
    named = [str(resolve(each)) if is_address(each) else each for each in named]
    output = as_local(output, "a page is written to this machine")
    png = None if png is None else as_local(png, "figures are drawn into a folder of this machine")
    if not 1 <= t <= 5:
        raise ArgumentError(f"{argument('t')}: found {t}, expected a number from 1 to 5")
    if not named:
        raise OutlierMergeError("no model to report on")
    plotly_script()
    if png is not None:
        check_matplotlib()
        if png.exists() and not png.is_dir():
            raise OutlierMergeError(f"{png}: is a file, expected a folder for figures")
    output = writable(output, "page")
    how: dict[str, Any] = {
        "device": device, "threads": threads, "on_total": on_total, "on_progress": on_progress
    }  # fmt: skip
    measure: Callable[..., WeightStats] = partial(weight_stats, filter=filter, **how)
    compare = partial(compare_weights, t=t, **how)
    merged = as_path(named[0]) if len(named) == 1 else None
    manifest = None
    if merged is not None and manifest_path(merged).is_file():
        manifest = read_manifest(merged)
    mixture = mixture_text(manifest["spec"]) if manifest is not None else ""
    if manifest is not None and not mixture:
        subjects, extra = measure_merge(named[0], manifest, base, measure, compare)
    else:
        subjects = _measure(named, base, measure)
        extra = {} if base is None else {"base": measure(base)}
        notes = [mixture] if mixture else []
        if base is None and len(named) > 1:  # the note of each pair, where there is a base
            moved = (moved_layers_note(each, as_path(each)) for each in named)
            notes += [note for note in moved if note]
        extra |= {"notes": notes}
    titles = list(dict.fromkeys(shown.title for shown in subjects if shown.role != "task"))
    if len(titles) > _MAX_TITLES:
        titles[_MAX_TITLES - 1 :] = [f"{len(titles) - _MAX_TITLES + 1} more"]
    page = render_page(
        ", ".join(titles),
        payload(subjects, t=t, **extra),
        kind="The mixture" if mixture else "The merge" if "merge" in extra else "Weights of",
    )
    if png is not None:
        draw_figures(subjects, png)
    write_whole(output, page)
    return output


def _measure(
    models: Sequence[str], base: str | None, measure: Callable[..., WeightStats]
) -> list[Shown]:
    bases = [None] if base is None else [None, base]
    return [
        Shown(title, "model", measure(model, base=each))
        for model, title in zip(models, short_titles(models), strict=True)
        for each in bases
    ]
