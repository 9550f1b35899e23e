"""What a search has found: rows of scores, the winner, and how much of its gain is luck."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outliermerge.errors import shown
from outliermerge.evaluation.table import paired_stderr
from outliermerge.search.questions import Answers, Sample, Suite, mean, mean_of
from outliermerge.search.trials import Trial
from outliermerge.spec.text import as_yaml

DEFAULTS = "the defaults"
_SEPARATED = 2.0  # standard errors
_MOST_DECIMALS = 6
_MAX_SETTINGS = 120  # characters


@dataclass(frozen=True)
class Candidate:
    """A merge, or a model that is known before the search, with its answers to all questions.

    Attributes:
        name: in the table.
        kind: `parent`, `defaults` or `trial`.
        document: its spec.
        point: what a trial was given by the sampler.
    """

    name: str
    kind: str
    document: Mapping[str, Any]
    answers: Answers
    point: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Row:
    """A candidate's scores, each the mean over tasks, or over suites that are scaled.

    Attributes:
        asked: estimated from the questions that trials are asked.
        searched: on all questions of the half that these are from.
        held_out: on the other half; `tasks` has it by task.
        gain, stderr: on that half, minus the defaults, with the standard error of the pairs.
    """

    name: str
    kind: str
    settings: str
    asked: float
    searched: float
    held_out: float
    tasks: Mapping[str, float]
    gain: float
    stderr: float | None


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        rows: the parents, the defaults, and the best trials, the best first.
        best: the name of the best row among the defaults and the trials, by `searched`.
        document, checksum: its spec, and the checksum of its tensors.
        questions: how many there are by task: asked, searched and held out.
        trials: all of them.
        front: numbers of trials that none is better than in all tasks or suites, if these are
            objectives.
        settings: of the search.
        notes: what a reader needs to know besides.
        suites: of several suites each with its tasks and its scale.
    """

    rows: tuple[Row, ...]
    best: str
    document: Mapping[str, Any]
    checksum: str
    questions: Mapping[str, Mapping[str, int]]
    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    suites: Mapping[str, Suite] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """Return a row by its name."""
        return next(row for row in self.rows if row.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "settings": dict(self.settings),
            "questions": self.questions,
            "best": {"name": self.best, "spec": dict(self.document), "checksum": self.checksum},
            "rows": [vars(row) for row in self.rows],
            "trials": [vars(trial) for trial in self.trials],
            "front": list(self.front),
            "objectives": list(self.suites or self.questions),
            "suites": {name: vars(suite) for name, suite in self.suites.items()},
            "verdict": self.verdict,
            "notes": list(self.notes),
        }

    @property
    def verdict(self) -> str:
        """What the held-out questions say of the winner, in words."""
        if self.best == DEFAULTS:
            return (
                "No trial is better than the defaults on the questions of the search: best.yaml "
                "is the spec as it was."
            )
        row, digits = self.row(self.best), self._decimals
        defaults = self.row(DEFAULTS)
        error = "" if row.stderr is None else f" ± {row.stderr:.{digits}f}"
        said = (
            f"Winner's curse: {self.best} was chosen because it scored best on the questions of "
            f"the search, {row.asked - defaults.asked:+.{digits}f} over the defaults on those that "
            f"trials are asked; on held-out questions it is {row.gain:+.{digits}f}{error}."
        )
        parents = [each for each in self.rows if each.kind == "parent"]
        better = [each.name for each in parents if each.held_out > row.held_out]
        said += f" {', '.join(better)} alone scores more there." if better else ""
        if row.stderr is None:
            return said
        if row.gain > _SEPARATED * row.stderr:
            return f"{said} It beats the defaults by more than two standard errors."
        if row.gain < -_SEPARATED * row.stderr:
            return f"{said} It is worse than the defaults by more than two standard errors."
        return f"{said} That does not separate it from the defaults (two standard errors)."

    @property
    def _decimals(self) -> int:
        """How many decimals tell the smallest standard error."""
        known = [row.stderr for row in self.rows if row.stderr]
        if not known:
            return 3
        return min(_MOST_DECIMALS, max(1, 1 - math.floor(math.log10(min(known)))))

    def as_markdown(self) -> str:
        """Return the table with the verdict and notes."""
        digits = self._decimals
        names = list(self.suites)
        lines = [["model", "asked", "searched", "held out", "gain", *names, "settings"]]
        for row in self.rows:
            gain = f"{row.gain:+.{digits}f}"
            if row.kind == "defaults":
                gain = "–"
            elif row.stderr is not None:
                gain += f" ± {row.stderr:.{digits}f}"
            name = f"**{row.name}**" if row.name == self.best else row.name
            scores = (row.asked, row.searched, row.held_out)
            own = [mean({task: row.tasks[task] for task in s.tasks}) for s in self.suites.values()]
            cells = [*(f"{score:.{digits}f}" for score in scores), gain]
            lines.append([name, *cells, *(f"{score:.4g}" for score in own), row.settings])
        lines = [[shown(cell, 200).replace("|", "\\|") for cell in line] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rules = [":" + "-" * (widths[0] - 1), *("-" * (w - 1) + ":" for w in widths[1:-1])]
        lines.insert(1, [*rules, ":" + "-" * (widths[-1] - 1)])
        table = []
        for first, *middle, last in lines:
            cells = [first.ljust(widths[0]), *map(str.rjust, middle, widths[1:-1])]
            table.append(f"| {' | '.join([*cells, last.ljust(widths[-1])])} |")
        states = [trial.state for trial in self.trials]
        counts = ", ".join(
            f"{states.count(state)} {state}"
            for state in ("done", "stopped", "failed")
            if state in states
        )
        asked, searched, held_out = (
            sum(one[key] for one in self.questions.values())
            for key in ("asked", "searched", "held_out")
        )
        facts = (
            f"{len(self.trials)} trials ({counts}). asked: estimated from {asked} questions, which "
            f"trials are asked; searched: all {searched} that these are from, by which the best is "
            f"chosen; held out: {held_out} others, which no trial was asked; gain: held out, minus "
            "the defaults, ± one standard error of the pairs."
        )
        if self.suites:
            facts += (
                " Of each suite, 0 is what the worst and 1 what the best of the models scores that "
                "were known before; asked, searched, held out and gain are means over the suites, "
                f"{', '.join(self.suites)} the held-out scores in their own units."
            )
        notes = [f"- {shown(note, 1000)}" for note in self.notes]
        return "\n".join([*table, "", facts, "", self.verdict, *([""] if notes else []), *notes])

    def best_yaml(self) -> str:
        """Return the winner's spec as a file that `run` takes."""
        row = self.row(self.best)
        return (
            f"# {self.best} of `outliermerge search`"
            + (f": {row.settings}" if row.settings else "")
            + f"\n# checksum of its tensors: {self.checksum}\n"
            + as_yaml(self.document)
        )


def make_rows(candidates: Sequence[Candidate], sample: Sample) -> list[Row]:
    """Return the scores of candidates; one of them is the defaults."""
    base = next(each for each in candidates if each.kind == "defaults")
    held_out = sample.overall(mean_of(base.answers, sample.held_out))
    rows = []
    for each in candidates:
        tasks = mean_of(each.answers, sample.held_out)
        own, theirs = (_held_out(one, sample) for one in (each, base))
        errors = {task: paired_stderr(own[task], theirs[task]) for task in sample.held_out}
        rows.append(
            Row(
                name=each.name,
                kind=each.kind,
                settings=settings_text(each.point or {}),
                asked=sample.value(each.answers),
                searched=sample.overall(mean_of(each.answers, sample.searched)),
                held_out=sample.overall(tasks),
                tasks=tasks,
                gain=sample.overall(tasks) - held_out,
                stderr=None if each is base else sample.stderr(errors),
            )
        )
    return rows


def _held_out(candidate: Candidate, sample: Sample) -> dict[str, dict[str, float]]:
    return {
        task: {name: candidate.answers[task][name] for name in names}
        for task, names in sample.held_out.items()
    }


def settings_text(point: Mapping[str, Any]) -> str:
    """Return the values of a trial for a person.

    >>> settings_text({"t": 2.123456, "merge_method": "ties"})
    't=2.123, merge_method=ties'
    """
    values = (
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in point.items()
    )
    return shown(", ".join(values), _MAX_SETTINGS)
