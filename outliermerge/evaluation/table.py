"""Scores as a table laid out like Table 4 of arXiv 2501.10661: parents, average, other merges."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from outliermerge.errors import OutlierMergeError, suggest
from outliermerge.evaluation.cells import AVG, GAIN, Cell, Row, Table
from outliermerge.evaluation.scores import Failure, ModelScores, Score, Scores, check_names

_SETTINGS = {
    "limit": "limit",
    "device": "device",
    "dtype": "dtype",
    "load_in_8bit": "8 bit",
    "num_fewshot": "examples",
    "apply_chat_template": "chat template",
    "system_instruction": "system instruction",
    "fewshot_as_multiturn": "examples as turns",
    "model_type": "model type",
    "image_backend": "image backend",
}


def make_table(runs: Sequence[Scores], *, baseline: str | None = None) -> Table:
    """Return the scores of one or several runs as one table (arXiv 2501.10661, Table 4).

    Parents come first, then the average, then other merges, then min-σ by descending t.
    For the K tasks on which all models have a score s_k with standard error e_k, without those of
    which lower scores are better if there are others::

        avg      = Σ s_k / K                    its error  √(Σ e_k²) / K
        gain     = avg − avg of the baseline    its error  √(Σ p_k²) / K

    Here p_k is the standard error of task k's paired differences. For the n observations u that
    both models have, d_u = units[u] − baseline units[u], and p_k = std(d, ddof=1) / √n.

    Args:
        baseline: the row that gains are differences from; the one linear merge if not given.

    Raises:
        OutlierMergeError: there is no model or no such baseline, or names are ambiguous.
    """
    models = sorted(_models(runs), key=_rank)
    if not models:
        raise OutlierMergeError("there are no models to make a table of")
    titles = tuple(dict.fromkeys(title for run in runs for title in run.titles))
    for column in {AVG, GAIN} & set(titles):
        raise OutlierMergeError(f"a task cannot be titled {column!r}: the table has such a column")
    complete = [t for t in titles if all(isinstance(m.tasks.get(t), Score) for m in models)]
    losses = _losses(models)
    averaged = tuple(t for t in complete if t not in losses) or tuple(complete)
    if averaged and losses.issuperset(averaged):
        losses |= {AVG, GAIN}
    facts, notes = _facts(runs)
    notes += _unsealed_notes(runs) + _metric_notes(models, titles)
    chosen, baseline_notes = _baseline(models, baseline)
    notes += _averaged_notes(titles, averaged, complete) + baseline_notes
    rows = []
    for model in models:
        cells = {title: _cell(model.tasks[title]) for title in titles if title in model.tasks}
        notes += [
            f"{model.name}, {title}: failed: {' '.join(cell.failure.split())}"
            for title, cell in cells.items()
            if cell.failure is not None
        ]
        if averaged:
            cells[AVG] = _average([cells[title] for title in averaged])
        if averaged and chosen is not None:
            cells[GAIN], gain_notes = _gain(model, chosen, averaged)
            notes += gain_notes
        rows.append(Row(model.name, "merged" if model.merge else "parent", cells))
    return Table(
        suite=" + ".join(dict.fromkeys(run.suite for run in runs)),
        titles=titles,
        averaged=averaged,
        rows=tuple(rows),
        baseline=chosen.name if chosen else None,
        notes=tuple(notes),
        facts=tuple(facts),
        losses=losses,
    )


def _losses(models: Sequence[ModelScores]) -> frozenset[str]:
    results = (task for model in models for task in model.tasks.items())
    return frozenset(
        title for title, found in results if isinstance(found, Score) and found.lower_is_better
    )


def _models(runs: Sequence[Scores]) -> list[ModelScores]:
    """Return all models; a model of two comparable runs gets the tasks of both."""
    found: list[tuple[int, ModelScores]] = []
    for number, run in enumerate(runs, 1):
        for model in run.models:
            for index, (other, earlier) in enumerate(found):
                same_settings = _settings(runs[other - 1]) == _settings(run)
                if other != number and same_settings and _same(earlier, model):
                    joined = replace(earlier, tasks={**earlier.tasks, **model.tasks})
                    found[index] = (other, joined)
                    break
            else:
                found.append((number, model))
    counts = Counter(model.name for _, model in found)
    for number in range(1, len(runs) + 1):
        check_names([model.name for run, model in found if run == number])
    models = [
        replace(model, name=f"{model.name} (run {number})") if counts[model.name] > 1 else model
        for number, model in found
    ]
    check_names([model.name for model in models])
    return models


def _same(first: ModelScores, second: ModelScores) -> bool:
    return (
        first.name == second.name
        and first.fingerprint == second.fingerprint != ""
        and all(
            _finding(first.tasks[title]) == _finding(second.tasks[title])
            for title in first.tasks.keys() & second.tasks.keys()
        )
    )


def _finding(result: Score | Failure) -> Score | Failure:
    return result if isinstance(result, Failure) else replace(result, seconds=0.0, record="")


def _rank(model: ModelScores) -> tuple[int, float]:
    if model.merge is None:
        return 0, 0.0
    match model.merge.get("method"):
        case "linear":
            return 1, 0.0
        case "min_sigma":
            t = (model.merge.get("parameters") or {}).get("t", 2.0)  # the method's own default
            return 3, -t if isinstance(t, (int, float)) else math.inf
    return 2, 0.0


def _baseline(
    models: Sequence[ModelScores], name: str | None
) -> tuple[ModelScores | None, list[str]]:
    if name is not None:
        for model in models:
            if model.name == name:
                return model, []
        raise OutlierMergeError(
            f"the baseline {name!r} is not a model of the table. "
            + suggest(name, (model.name for model in models))
        )
    linear = [model for model in models if model.merge and model.merge.get("method") == "linear"]
    if len(linear) == 1:
        return linear[0], []
    found = "none of the models is a linear merge"
    if linear:
        found = f"{', '.join(model.name for model in linear)} are all linear merges"
    return None, [f"No gain: {found}, and no other baseline was chosen."]


def _cell(result: Score | Failure) -> Cell:
    if isinstance(result, Failure):
        return Cell(failure=result.reason)
    return Cell(result.score, result.stderr)


def _average(cells: Sequence[Cell]) -> Cell:
    values = [cell.value for cell in cells if cell.value is not None]
    return Cell(math.fsum(values) / len(values), pooled_stderr([cell.stderr for cell in cells]))


def pooled_stderr(stderrs: Sequence[float | None]) -> float | None:
    """Return the standard error of a mean of independent numbers: √(Σ e²) / K."""
    known = [stderr for stderr in stderrs if stderr is not None]
    return math.hypot(*known) / len(known) if len(known) == len(stderrs) else None


def _gain(model: ModelScores, base: ModelScores, titles: Sequence[str]) -> tuple[Cell, list[str]]:
    if model is base:
        return Cell(0.0), []
    differences: list[float] = []
    stderrs: list[float | None] = []
    unpaired: list[str] = []
    for title in titles:
        ours, theirs = model.tasks[title], base.tasks[title]
        assert isinstance(ours, Score) and isinstance(theirs, Score)
        differences.append(ours.score - theirs.score)
        if ours.units.keys() == theirs.units.keys():
            stderrs.append(paired_stderr(ours.units, theirs.units))
        else:
            unpaired.append(title)
    note = (
        f"{model.name}: its gain has no standard error: its questions of {', '.join(unpaired)} "
        f"are not those of {base.name} (another limit, or other data)."
    )
    stderr = None if unpaired else pooled_stderr(stderrs)
    return Cell(math.fsum(differences) / len(titles), stderr), [note] if unpaired else []


def paired_stderr(units: Mapping[str, float], base: Mapping[str, float]) -> float | None:
    """Return std(d, ddof=1) / √n of the differences d, None for fewer than two."""
    differences = [units[name] - base[name] for name in units]
    if len(differences) < 2:
        return None
    return statistics.stdev(differences) / math.sqrt(len(differences))


def _settings(run: Scores) -> dict[str, str]:
    """Return as text the settings that must be equal for two runs to be comparable."""
    values = {label: run.settings.get(key) for key, label in _SETTINGS.items()}
    if not run.settings.get("apply_chat_template"):
        del values[_SETTINGS["fewshot_as_multiturn"]]  # there are turns only in a chat
    versions = run.settings.get("versions") or {}
    values |= {package.replace("_", "-"): version for package, version in versions.items()}
    words = {True: "yes", False: "no"}
    return {
        label: words[value] if isinstance(value, bool) else str(value)
        for label, value in values.items()
        if value not in (None, "")
    }


def _facts(runs: Sequence[Scores]) -> tuple[list[str], list[str]]:
    facts = ["Suite " + " / ".join(dict.fromkeys(run.suite for run in runs))]
    settings = [_settings(run) for run in runs]
    differing = []
    for label in dict.fromkeys(label for known in settings for label in known):
        values = list(dict.fromkeys(known.get(label, "none") for known in settings))
        facts.append(f"{label} {' / '.join(values)}")
        if len(values) > 1:
            differing.append(facts[-1])
    dates = dict.fromkeys(str(run.settings["date"]) for run in runs if run.settings.get("date"))
    facts += [" / ".join(dates)] if dates else []
    if not differing:
        return facts, []
    return facts, [f"The scores are of runs that differ: {', '.join(differing)}."]


def _unsealed_notes(runs: Sequence[Scores]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.unsealed)
    note = (
        f"{', '.join(names)}: of an earlier version, which wrote no checksums: whether the scores "
        "are those that eval wrote cannot be told."
    )
    return [note] if names else []


def _metric_notes(models: Sequence[ModelScores], titles: Sequence[str]) -> list[str]:
    notes = []
    for title in titles:
        names: dict[str, list[str]] = {}
        for model in models:
            result = model.tasks.get(title)
            if isinstance(result, Score):
                names.setdefault(f"{result.task} {result.metric}", []).append(model.name)
        if len(names) > 1:
            differing = "; ".join(f"{metric} ({', '.join(who)})" for metric, who in names.items())
            notes.append(f"{title} is not the same score in all rows: {differing}.")
    return notes


def _averaged_notes(
    titles: Sequence[str], averaged: Sequence[str], complete: Sequence[str]
) -> list[str]:
    if not averaged:
        return ["No avg: there is no task on which all models have a score."]
    absent = [title for title in titles if title not in complete]
    losses = [title for title in complete if title not in averaged]
    reasons = [f"not all models have a score on {', '.join(absent)}"] if absent else []
    reasons += [f"lower is better in {', '.join(losses)}"] if losses else []
    return [f"avg is over {', '.join(averaged)}; {'; '.join(reasons)}."] if reasons else []
