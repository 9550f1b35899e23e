"""The page of a search: what was tried, what mattered, and what came of it. It needs no network."""

from __future__ import annotations

import html
import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import optuna

from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation.formats import load
from outliermerge.output.replaceable import GENERATOR, writable
from outliermerge.search.search import BEST_NAME, RESULT_NAME
from outliermerge.search.trials import STUDY, storage_of
from outliermerge.storage.files import small_bytes, write_whole

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 860, 320, 64, 40
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
svg { width: 100%; height: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; font-size: 12px; }
svg text { fill: var(--soft); } svg .axis { stroke: var(--line); }
svg .done { fill: var(--accent); } svg .stopped { fill: none; stroke: var(--accent); }
svg .best { fill: none; stroke: var(--fit); stroke-width: 2; }
svg .known { stroke: var(--limit); stroke-dasharray: 4 4; } svg .bar { fill: var(--fill); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .7rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child, td:last-child, th:last-child { text-align: left; }
pre { background: var(--card); border: 1px solid var(--line); padding: .75rem; overflow: auto; }
.wide { overflow-x: auto; }
"""


def write_page(folder: Path, output: str | Path) -> Path:
    """Write the page of a search.

    Raises:
        OutlierMergeError: the search is not finished, its files are damaged, or something else is
            at the output.
    """
    page_path = writable(output, "page")
    if not (folder / RESULT_NAME).is_file():
        raise OutlierMergeError(f"{folder}: the search has no result yet: let it finish")
    result = load(folder / RESULT_NAME)
    try:
        page = _page(folder.resolve().name, result, importances(folder), _best(folder))
    except (KeyError, TypeError, StopIteration) as error:
        raise OutlierMergeError(
            f"{folder / RESULT_NAME}: is not what `outliermerge search` wrote ({error})"
        ) from error
    write_whole(page_path, page.encode("utf-8", "replace"))
    return page_path


def importances(folder: Path) -> dict[str, float]:
    """Return how much of what makes trials good each value explains (PED-ANOVA, 2304.10255)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few trials, which the page tells, too
        study = optuna.load_study(study_name=STUDY, storage=storage_of(folder))
        several = len(study.directions) > 1
        try:
            found = optuna.importance.get_param_importances(
                study,
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                # It explains what makes a target low.
                target=(lambda trial: -sum(trial.values)) if several else None,
            )
        except (ValueError, RuntimeError):  # too few trials, or all alike
            return {}
    return {name: float(value) for name, value in found.items() if value == value}


def _best(folder: Path) -> str:
    return small_bytes(folder / BEST_NAME).decode("utf-8", "replace")


def _page(name: str, result: Any, weights: Mapping[str, float], best: str) -> str:
    css = resources.files("outliermerge.analysis.report").joinpath("page.css").read_text("utf-8")
    parts = [
        f"<p id=sentence>{html.escape(result['verdict'])}</p>",
        "<section><h2>Scores</h2>" + _rows(result["rows"], result["best"]["name"]) + "</section>",
        "<section><h2>History</h2><p>The score of each trial; hollow where it was stopped after a "
        "part of the questions. The line is the best so far, the dashes are the defaults.</p>"
        + _history(result)
        + "</section>",
    ]
    if weights:
        parts.append(
            "<section><h2>What matters</h2><p>How much each value explains of what makes trials "
            "good (PED-ANOVA). With few trials a rough figure.</p>" + _bars(weights) + "</section>"
        )
    if result["front"]:
        parts.append("<section><h2>Front</h2>" + _front(result) + "</section>")
    parts += [
        f"<section><h2>best.yaml</h2><pre>{html.escape(best)}</pre></section>",
        "<section><details><summary>All trials</summary>" + _all(result["trials"]) + "</details>"
        "</section>",
    ]
    title = html.escape(name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="generator" content="{GENERATOR}">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>Search {title}</title><style>{css}{_STYLE}</style></head><body>"
        f"<header><h1>Search <span>{title}</span></h1></header><main>{''.join(parts)}</main>"
        "</body></html>\n"
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope=col>{html.escape(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class=wide tabindex=0 role=region aria-label="table">{table}</div>'


def _rows(rows: Sequence[Mapping[str, Any]], best: str) -> str:
    cells = []
    for row in rows:
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.3g}"
        gain = "–" if row["kind"] == "defaults" else f"{row['gain']:+.3g}{error}"
        name = row["name"] + (" (best)" if row["name"] == best else "")
        scores = [f"{row[key]:.4g}" for key in ("asked", "searched", "held_out")]
        cells.append([name, *scores, gain, row["settings"]])
    return _table(["model", "asked", "searched", "held out", "gain", "settings"], cells)


def _value(trial: Mapping[str, Any]) -> float | None:
    if trial["values"]:
        return float(sum(trial["values"])) / len(trial["values"])
    return float(trial["steps"][-1]) if trial["steps"] else None


def _history(result: Mapping[str, Any]) -> str:
    trials = [trial for trial in result["trials"] if _value(trial) is not None]
    defaults = next(row["asked"] for row in result["rows"] if row["kind"] == "defaults")
    values = [_value(trial) or 0.0 for trial in trials]
    all_values = [*values, defaults]
    scale = _Scale((0, len(result["trials"]) + 1), (min(all_values), max(all_values)))
    drawn, line = [], list[str]()
    best: float | None = None
    for trial, value in zip(trials, values, strict=True):
        title = html.escape(f"trial {trial['number']}: {value:.4g}")
        drawn.append(
            f"<circle class={trial['state']} cx={scale.x(trial['number'])} cy={scale.y(value)} r=4>"
            f"<title>{title}</title></circle>"
        )
        if trial["values"]:
            best = value if best is None else max(best, value)
        if best is not None:
            line.append(f"{scale.x(trial['number'])},{scale.y(best)}")
    height = scale.y(defaults)
    known = f"<line class=known x1={_LEFT} x2={_WIDTH} y1={height} y2={height} />"
    path = f'<polyline class=best points="{" ".join(line)}" />'
    return scale.svg("Score of each trial", "trial", "score", known + path + "".join(drawn))


def _bars(weights: Mapping[str, float]) -> str:
    height = 24 * len(weights) + 8
    bars = "".join(
        f"<text x=210 y={24 * i + 20} text-anchor=end>{html.escape(name[:34])}</text>"
        f"<rect class=bar x=218 y={24 * i + 8} height=16 width={max(1, value * 560):.1f} />"
        f"<text x={226 + value * 560:.1f} y={24 * i + 20}>{value:.2f}</text>"
        for i, (name, value) in enumerate(weights.items())
    )
    label = html.escape(", ".join(f"{name} {value:.2f}" for name, value in weights.items()), True)
    return f'<svg role=img aria-label="{label}" viewBox="0 0 {_WIDTH} {height}">{bars}</svg>'


def _front(result: Mapping[str, Any]) -> str:
    tasks = result["objectives"]
    done = [trial for trial in result["trials"] if trial["values"]]
    front = set(result["front"])
    best = [trial for trial in done if trial["number"] in front]
    rows = [
        [f"trial {trial['number']}", *(f"{value:.4g}" for value in trial["values"]),
         ", ".join(f"{k}={v}" for k, v in trial["point"].items())]
        for trial in sorted(best, key=lambda trial: -trial["values"][0])
    ]  # fmt: skip
    xs, ys = ([trial["values"][i] for trial in done] for i in (0, 1))
    scale = _Scale((min(xs), max(xs)), (min(ys), max(ys)))
    drawn = "".join(
        f"<circle class={'done' if trial['number'] in front else 'stopped'} "
        f"cx={scale.x(trial['values'][0])} cy={scale.y(trial['values'][1])} r=4>"
        f"<title>trial {trial['number']}</title></circle>"
        for trial in done
    )
    text = "<p>Filled: trials that no other is better than in all objectives"
    text += ", shown by the first two of them" if len(tasks) > 2 else ""
    return (
        f"{text}.</p>"
        + scale.svg("The front", html.escape(tasks[0]), html.escape(tasks[1]), drawn)
        + _table(["trial", *tasks, "settings"], rows)
    )


def _all(trials: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for trial in trials:
        value = _value(trial)
        settings = ", ".join(f"{key}={value}" for key, value in trial["point"].items())
        shown = "–" if value is None else f"{value:.4g}"
        rows.append([str(trial["number"]), trial["state"], shown, trial["reason"] or settings])
    return _table(["trial", "state", "score", "settings, or why it failed"], rows)


class _Scale:
    """Turns values into places of a drawing."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self._xs, self._ys = xs, ys

    def x(self, value: float) -> str:
        return f"{_LEFT + self._share(value, self._xs) * (_WIDTH - _LEFT - 20):.1f}"

    def y(self, value: float) -> str:
        return f"{_HEIGHT - _BOTTOM - self._share(value, self._ys) * (_HEIGHT - _BOTTOM - 36):.1f}"

    @staticmethod
    def _share(value: float, ends: tuple[float, float]) -> float:
        return (value - ends[0]) / (ends[1] - ends[0]) if ends[1] > ends[0] else 0.5

    def svg(self, label: str, across: str, up: str, drawn: str) -> str:
        low, high = self._ys
        marks = "".join(
            f"<text x={_LEFT - 8} y={self.y(value)} text-anchor=end>{value:.4g}</text>"
            f"<line class=axis x1={_LEFT} x2={_WIDTH} y1={self.y(value)} y2={self.y(value)} />"
            for value in dict.fromkeys((low, (low + high) / 2, high))
        )
        left, right = self._xs
        ends = (
            f"<text x={_LEFT} y={_HEIGHT - 12}>{left:.4g}</text>"
            f"<text x={_WIDTH - 20} y={_HEIGHT - 12} text-anchor=end>{right:.4g}</text>"
            f"<text x={_WIDTH / 2} y={_HEIGHT - 12} text-anchor=middle>{across}</text>"
            f"<text x=8 y=14>{up}</text>"
        )
        return (
            f'<svg role=img aria-label="{html.escape(label)}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
            f"{marks}{ends}{drawn}</svg>"
        )
