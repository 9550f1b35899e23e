"""Compares models, or their task vectors: how alike they are, and what conflicts in a merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

from outliermerge.analysis.compare_torch import (
    Counts,
    PairMeasurer,
    Sums,
    fold_counts,
    fold_sums,
)
from outliermerge.analysis.models import Subject, open_subject
from outliermerge.analysis.moved_layers import moved_layers_note
from outliermerge.analysis.pairs import PairStats as PairStats
from outliermerge.analysis.places import ModulePlace, find_places
from outliermerge.analysis.verdict import verdict_of
from outliermerge.arguments import checked, nothing
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Source
from outliermerge.display import html_table, html_words, short_repr
from outliermerge.errors import (
    ArgumentError,
    OutlierMergeError,
    argument,
    as_path,
    listing,
    suggest,
)
from outliermerge.execution.rounds import Steps, run_all
from outliermerge.execution.threads import choose_device, torch_threads
from outliermerge.notebook import with_bar
from outliermerge.optional import require_torch
from outliermerge.spec.rename import best_rename
from outliermerge.storage.machine import keep_freed_memory, num_threads

MATRIX_DIAGONAL = {
    "cosine": 1.0,
    "distance": 0.0,
    "relative_distance": 0.0,
    "std_difference": 0.0,
    "sign_agreement": 1.0,
    "sign_conflict_ratio": 0.0,
    "outlier_overlap": 1.0,
    "conflict_ratio": 0.0,
}
"""The columns that have a matrix, and the value of a model compared with itself."""


_MEASURED = [field.name for field in fields(PairStats)][7:]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of models, or of their task vectors, with one another.

    Attributes:
        models, base: the names that the caller gave.
        t: the threshold of outliers in units of σ.
        tensors: every pair of models for each tensor that all models have, in the models' order.
        pairs: every pair of whole models: all finite tensors joined to one vector.
        notes: notes for the user, such as tensors that were left out.
    """

    models: tuple[str, ...]
    base: str | None
    t: float
    tensors: tuple[PairStats, ...]
    pairs: tuple[PairStats, ...]
    notes: tuple[str, ...] = ()

    def matrix(self, column: str) -> list[list[float]]:
        """Return a column of the whole models as (M, M).

        All matrices are symmetric except `relative_distance`, whose rows are divided by the norm of
        the row's model.

        Raises:
            ArgumentError: the column has no matrix; MATRIX_DIAGONAL lists those that have one.
        """
        if column not in MATRIX_DIAGONAL:
            raise ArgumentError(f"no matrix of {column!r}. {suggest(column, MATRIX_DIAGONAL)}")
        found = [[MATRIX_DIAGONAL[column]] * len(self.models) for _ in self.models]
        for pair in self.pairs:
            found[pair.a][pair.b] = found[pair.b][pair.a] = getattr(pair, column)
            if column == "relative_distance":
                found[pair.b][pair.a] = _ratio(pair.distance, pair.norm_b)
        return found

    def __repr__(self) -> str:
        against = "" if self.base is None else f", against {self.base}"
        cosines = ", ".join(f"{pair.cosine:.4f}" for pair in self.pairs[:10])
        return short_repr(
            self,
            f"{', '.join(self.models)}{against}",
            f"{len(self.pairs)} pair(s), cosine {cosines}",
            ".verdict says what will conflict in a merge",
        )

    def _repr_html_(self) -> str:
        """Show the pairs of whole models as a table in a notebook."""
        rows = [
            (
                self.models[pair.a],
                self.models[pair.b],
                f"{pair.cosine:.4f}",
                f"{pair.distance:.3g}",
                f"{pair.sign_agreement:.1%}",
                f"{pair.outlier_overlap:.1%}",
                # Of weights nothing conflicts: they are not added up.
                *([f"{pair.conflict_ratio:.3%}"] if self.base is not None else []),
            )
            for pair in self.pairs
        ]
        columns = ["model", "and", "cosine", "distance", "equal signs", "shared outliers"]
        if self.base is not None:
            columns.append("conflicts")
        return html_table(columns, rows) + html_words(self.verdict)

    @property
    def verdict(self) -> str:
        """What a merge has to expect, in a sentence: what will conflict, and where."""
        return verdict_of(self.models, self.pairs, self.tensors, has_base=self.base is not None)

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the matrices, which repeat the pairs; NaN stays NaN."""
        return {
            "models": list(self.models),
            "base": self.base,
            "t": self.t,
            "verdict": self.verdict,
            "pairs": [pair.as_dict() for pair in self.pairs],
            "tensors": [pair.as_dict() for pair in self.tensors],
            "notes": list(self.notes),
        }


@checked
@with_bar("the comparison")
def compare_weights(
    models: Sequence[str | Path | Subject],
    *,
    base: str | Path | None = None,
    t: float = 2.0,
    rename: str | None = None,
    device: str = "cpu",
    threads: int = 0,
    on_total: Callable[[int], None] = nothing,
    on_progress: Callable[[int], None] = nothing,
) -> Comparison:
    """Compare all pairs of models, or of task vectors, tensor by tensor and as whole models.

    Every tensor is read twice, from all models at once, in bounded memory. The result is the same
    for any number of threads.

    Args:
        models: two or more models, named as in a spec: folders, files, hub ids, adapters. Or
            results of `open_subject`, all with the same base.
        base: the base model of the task vectors; None compares weights.
        t: the threshold of outliers in units of σ, 0 or more.
        rename: from the models' tensor names to the base's; without a base, from the other models'
            names to those of the first.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        threads: worker threads; 0 chooses by the machine.
        on_total: called once, before reading, with the number of bytes to read.
        on_progress: called with the number of bytes just read, by any thread. In a notebook a bar
            shows both if neither is given.

    Raises:
        ArgumentError: an option is wrong, or a model is given twice.
        OutlierMergeError: a model is absent or broken, or no tensor is in all models.
    """
    if len(models) < 2:
        raise ArgumentError(f"found {len(models)} model(s) to compare, expected two or more")
    if not 0 <= t < math.inf:
        raise ArgumentError(f"{argument('t')}: found {t}, expected a number of 0 or more")
    require_torch("a comparison of weights")
    device = choose_device(device)
    subjects = [
        open_subject(model, base, rename=rename if base is not None or number else None)
        for number, model in enumerate(models)
    ]
    bases = {subject.base for subject in subjects}
    if len(bases) > 1:
        raise ArgumentError(
            f"found models of several bases: {sorted(map(str, bases))}, expected one"
        )
    (base,) = bases
    _refuse_twins(subjects)
    tensors, notes = _common(subjects)
    found: dict[str, tuple[Sums, Counts]] = {}
    sources = {id(source): source for each in tensors.values() for source in each}
    on_total(2 * sum(source.num_bytes for source in sources.values()))
    keep_freed_memory()
    with Reader() as reader, torch_threads() as prepare:
        measurer = PairMeasurer(reader, device, base is not None, t, on_progress)

        def measure(name: str) -> Steps[None]:
            found[name] = yield from measurer.measure(tensors[name])
            reader.release(enumerate(tensors[name]))

        reader.read_ahead(map(enumerate, tensors.values()))
        run_all(map(measure, tensors), threads=num_threads(threads), prepare=prepare)
    places = find_places(tensors)
    pairs = list(combinations(range(len(models)), 2))
    finite = {
        name: sums
        for name, (sums, _) in found.items()
        if all(sums.is_finite(model) for model in range(len(models)))
    }
    if broken := [name for name in tensors if name not in finite]:
        shown = listing(f"{name}: {_broken(subjects, found[name][0])}" for name in broken)
        notes.append(
            "left out of whole models, and NaN where that is, since they hold infinite values, "
            f"NaN, or too large ones to be squared:\n{shown}"
        )
    whole = fold_sums([finite[name] for name in tensors if name in finite], len(models))
    counts = fold_counts([found[name][1] for name in finite], len(models))
    nowhere = ModulePlace(None, (), "")
    return Comparison(
        tuple(subject.reference for subject in subjects),
        base,
        t,
        tuple(
            _pair(name, places[name], tensors[name][0].shape, pair, number, *found[name])
            for name in tensors
            for number, pair in enumerate(pairs)
        ),
        tuple(
            _pair("", nowhere, (), pair, number, whole, counts) for number, pair in enumerate(pairs)
        ),
        tuple(dict.fromkeys(notes)),
    )


def _refuse_twins(subjects: Sequence[Subject]) -> None:
    """Refuse two models, or a model and the base, that have the same files."""
    seen: dict[frozenset[Path], str] = {}
    bases = {subject.base for subject in subjects}
    if len(bases) > 1:
        raise ArgumentError(
            f"found models of several bases: {sorted(map(str, bases))}, expected one"
        )
    (base,) = bases
    if base is not None:
        seen[_files(pair[0] for pair in subjects[0].tensors.values())] = base
    for subject in subjects:
        files = _files(sources[-1] for sources in subject.tensors.values())
        if files in seen:
            raise ArgumentError(
                f"{subject.reference!r} is the same model as {seen[files]!r}: leave one out"
            )
        seen[files] = subject.reference


def _files(sources: Iterable[Source]) -> frozenset[Path]:
    paths = {meta.path for source in sources for meta in source.stored}
    return frozenset(path.resolve() for path in paths)


def _common(subjects: Sequence[Subject]) -> tuple[dict[str, tuple[Source, ...]], list[str]]:
    """Return the sources of tensors that all models have in one shape, and notes on others.

    The base, where there is one, is the first source.
    """
    first, *others = subjects
    notes = [note for subject in subjects for note in subject.notes]
    if first.base is None:
        notes += filter(None, (moved_layers_note(s.reference, as_path(s.reference))
                               for s in subjects))  # fmt: skip
    names = list(dict.fromkeys(name for subject in subjects for name in subject.tensors))
    common = [name for name in names if all(name in subject.tensors for subject in subjects)]
    shapes = {
        name: list(dict.fromkeys(subject.tensors[name][-1].shape for subject in subjects))
        for name in common
    }
    if lacking := [name for name in names if name not in shapes]:
        notes.append(f"left out, since not all models have them:\n{listing(lacking)}")
    if resized := [name for name in common if len(shapes[name]) > 1]:
        shown = (f"{name}: {' and '.join(str([*s]) for s in shapes[name])}" for name in resized)
        notes.append(f"left out, since their shapes differ:\n{listing(shown)}")
    changed = {name for subject in subjects for name in subject.changed().tensors}
    if same := [name for name in common if name not in changed]:
        notes.append(f"left out, since no adapter changes them: {len(same)} tensors")
    tensors = {
        name: (*first.tensors[name][:-1], *(subject.tensors[name][-1] for subject in subjects))
        for name in common
        if name not in resized and name in changed
    }
    if not tensors:
        ours = list(others[0].tensors)
        best = best_rename(ours, first.tensors)
        advice = f" `{argument('rename', best[0])}` pairs {best[1]} of {len(ours)}." if best else ""
        raise OutlierMergeError(
            "the models have no tensor of one name and shape in common: "
            + ", ".join(
                f"{s.reference} has {name!r} {list(s.tensors[name][-1].shape)}"
                for s in subjects
                for name in (resized or list(s.tensors))[:1]
            )
            + f".{advice}"
        )
    return tensors, notes


def _broken(subjects: Sequence[Subject], sums: Sums) -> str:
    """Return the models whose values of a tensor are not all finite."""
    bases = {subject.base for subject in subjects}
    if len(bases) > 1:
        raise ArgumentError(
            f"found models of several bases: {sorted(map(str, bases))}, expected one"
        )
    (base,) = bases
    if base is not None and not math.isfinite(sums.base):
        return base
    return ", ".join(s.reference for m, s in enumerate(subjects) if not sums.is_finite(m))


def _pair(
    name: str,
    place: ModulePlace,
    shape: tuple[int, ...],
    pair: tuple[int, int],
    number: int,
    sums: Sums,
    counts: Counts,
) -> PairStats:
    a, b = pair
    num = sums.num_elements
    if num and sums.is_finite(a) and sums.is_finite(b):
        columns = _columns(a, b, number, sums, counts)
    else:
        columns = dict.fromkeys(_MEASURED, math.nan)
    return PairStats(name, place.layer, place.module, shape, num, a, b, **columns)


def _columns(a: int, b: int, number: int, sums: Sums, counts: Counts) -> dict[str, float]:
    num, std_a, std_b = sums.num_elements, sums.std(a), sums.std(b)
    norm_a, norm_b = math.sqrt(sums.gram[a][a]), math.sqrt(sums.gram[b][b])
    distance = math.sqrt(sums.distances[number])
    cosine = _ratio(_ratio(sums.gram[a][b], norm_a), norm_b)
    if cosine > 0.5:  # for nearly equal vectors only the difference is accurate
        apart = _ratio(distance, norm_a) * _ratio(distance, norm_b)
        cosine = 1 - (apart - (norm_a - norm_b) ** 2 / norm_a / norm_b) / 2
    both, own = counts.both_outliers[a][b], counts.own_outliers
    disagreeing = (counts.non_zero[a][b] - counts.signs[a][b]) // 2
    return {
        "cosine": min(max(cosine, -1.0), 1.0),
        "distance": distance,
        "relative_distance": _ratio(distance, norm_a),
        "norm_a": norm_a,
        "norm_b": norm_b,
        "std_a": std_a,
        "std_b": std_b,
        "std_difference": abs(std_a - std_b),
        "sign_agreement": _ratio(counts.non_zero[a][b] - disagreeing, counts.non_zero[a][b]),
        "sign_conflict_ratio": disagreeing / num,
        "outlier_overlap": _ratio(own[a][b], own[a][a] + own[b][b] - own[a][b]),
        "outlier_ratio_a": counts.outliers[a][b] / num,
        "outlier_ratio_b": counts.outliers[b][a] / num,
        "both_outliers_ratio": both / num,
        "conflict_ratio": (both - counts.outlier_signs[a][b]) / 2 / num,
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
