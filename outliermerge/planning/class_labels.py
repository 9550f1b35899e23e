"""Checks that the rows of a classification head are for the same classes in all models.

Only the config (id2label) tells the class of a row. Shapes do not show it if rows of different
classes would be added up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.layout import component_of
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.planning.plan import Input, Job
from outliermerge.spec.check import MergeSpec

_HEAD = re.compile(
    r"(class(?!_(token|emb))|score|logits|predict|(^|[._])(heads?|fc|cls|out|output)\.)"
    r".*\b(weight|bias)$"
)
_INNER = re.compile(r"\.\d+\.|emb|norm|pooler|(^|[._])wte\.")
_UNNAMED = re.compile(r"(label|class)?[_ ]?\d+", re.IGNORECASE)


def check_labels(spec: MergeSpec, inputs: Sequence[Input], jobs: Iterable[Job]) -> list[str]:
    """Refuse heads whose rows stand for different classes in the merged models.

    Returns:
        Notes on classes that a model does not name, and on names that the output does not have.

    Raises:
        OutlierMergeError: a row is for different classes in two models.
    """
    notes: list[str] = []
    jobs = tuple(jobs)
    wanted = spec.document.config_source
    owner = next((entry for entry in inputs if entry.reference == wanted), inputs[0])
    for folder in owner.checkpoint.components:
        labels = {entry.reference: _labels(entry, folder) for entry in inputs}
        if all(named is None for named in labels.values()):
            continue
        heads: dict[tuple[str, ...], list[str]] = {}
        for job in jobs:
            inside = component_of(job.name, owner.checkpoint.components) == folder
            if inside and _is_head(job, labels):
                used = tuple(dict.fromkeys(inputs[n].reference for n in _used(job)))
                heads.setdefault(used, []).append(job.name)
        for used, names in heads.items():
            notes += _check_head(names, {model: labels[model] for model in used}, owner, labels)
        taken = {model for used in heads for model in used}
        ours = labels[owner.reference]
        for model, named in labels.items():
            if model not in taken and ours and named and not _are_same(ours, named):
                notes.append(
                    f"{model} has other classes (id2label) than {owner.reference}, whose names the "
                    "output has; none of its tensors that looks like their head is taken"
                )
    return notes


def _labels(entry: Input, folder: str) -> tuple[str, ...] | None:
    """Return the names of the classes in a model's config, in order; None if it has none."""
    config = read_json(entry.home / folder / "config.json")
    ids = config.get("label2id")
    inverse = {id_: label for label, id_ in ids.items()} if isinstance(ids, Mapping) else None
    # First the keys that loaders prefer; the last ones are timm's.
    for found in (config.get("id2label"), inverse, config.get("label_names")):
        if (named := _in_order(found)) is not None:
            return named
    return None


def _in_order(found: Any) -> tuple[str, ...] | None:
    """Return the names of classes in order; None if they are only numbers, or not texts."""
    if isinstance(found, Mapping):
        try:
            by_id = {int(id_): label for id_, label in found.items()}
        except (TypeError, ValueError):
            return None
        found = [by_id.get(id_) for id_ in range(max(by_id, default=-1) + 1)]
    if not isinstance(found, list) or all(_UNNAMED.fullmatch(str(label)) for label in found):
        return None
    return tuple(map(str, found))


def leave_out_heads(
    inputs: Sequence[Input], misfits: Iterable[tuple[str, int]], *, others: Iterable[str]
) -> list[str]:
    """Return how to leave heads with other numbers of rows out of a merge, a line for each model.

    Args:
        misfits: names of tensors whose shapes differ, and the number of the input that differs.
        others: the names of all other tensors.
    """
    reference = inputs[0]
    heads: dict[int, list[str]] = {}
    for name, number in misfits:
        shapes = [e.checkpoint.tensors[name].shape for e in (reference, inputs[number])]
        alike = len(shapes[0]) == len(shapes[1]) and shapes[0][1:] == shapes[1][1:]
        if alike and shapes[0] and _HEAD.search(name):
            heads.setdefault(number, []).append(name)
    kept = list(others)
    lines = []
    for number, names in heads.items():
        module = next(iter({name.rpartition(".")[0] for name in names}))
        prefix = f"{module}."
        if not all(n.startswith(prefix) for n in names) or any(prefix in n for n in kept):
            continue
        entry = inputs[number]
        away = f"left_out.{prefix}"
        own = "Added to its own, " if entry.renamed else ""
        base = "" if reference.role == "base" else f" (with `base_model: {reference.reference}`)"
        lines.append(
            f"{own}`rename: [{{from: '^{re.escape(prefix)}', to: '{away}'}}]`, "
            f"`extra: [{{filter: '{away}', value: drop}}, {{value: error}}]` and "
            f"`missing: [{{filter: '{prefix}', value: base}}, {{value: error}}]`{base} on "
            f"{entry.reference} leave its head out, which loses what was trained in it, and keep "
            f"that of {reference.reference}."
        )
    return lines


def _is_head(job: Job, labels: Mapping[str, tuple[str, ...] | None]) -> bool:
    source = job.sources[0][1]
    if not source.dtype.is_float or not source.shape:
        return False
    sizes = {len(named) for named in labels.values() if named}
    by_name = _HEAD.search(job.name) is not None
    if by_name and source.shape[0] - 1 in sizes and "class" in job.name:
        return True  # detectors have a last row for "no object"
    is_outer = job.name.endswith(("weight", "bias")) and not _INNER.search(job.name)
    return (by_name or is_outer) and source.shape[0] in sizes


def _used(job: Job) -> list[int]:
    """Return the numbers of the models whose weight in a tensor is not 0."""
    numbers = [number for number, _ in job.sources]
    if job.action == "copy":
        return numbers[:1]
    weights = job.parameters.get("weight")
    if not isinstance(weights, tuple) or len(weights) > len(numbers):
        return numbers
    base = numbers[: len(numbers) - len(weights)]
    models = numbers[len(base) :]
    return [*base, *(n for n, weight in zip(models, weights, strict=True) if weight != 0)]


def _check_head(
    names: Sequence[str],
    used: Mapping[str, tuple[str, ...] | None],
    owner: Input,
    labels: Mapping[str, tuple[str, ...] | None],
) -> list[str]:
    """Return notes on a head, given by its tensors, that is merged from the models `used`."""
    ours = labels[owner.reference]
    everyone = {owner.reference: ours, **used}
    named = {model: found for model, found in everyone.items() if found}
    if not named:
        return []
    first, *others = named
    differing = [model for model in others if not _are_same(named[first], named[model])]
    if not differing:
        unnamed = [model for model in everyone if model not in named]
        if not unnamed:
            return []
        return [
            f"{', '.join(unnamed)} does not name its classes (id2label, label2id): the rows of "
            f"{', '.join(names[:3])} are taken for those of {shown(first)} in the same order"
        ]
    inner = [named[model] for model in used if model in named]
    if all(_are_same(inner[0], found) for found in inner):
        sources = [model for model in used if model in named]
        way_out = f"`config_source: {sources[0]}` gives the output its names."
    else:
        way_out = _way_out(first, named[first], {m: named[m] for m in differing}, names)
    rows = []
    for row in range(max(len(named[model]) for model in (first, *differing))):
        said = [f"{_at(named[model], row)} in {model}" for model in (first, *differing)]
        if len({_at(named[model], row).casefold() for model in (first, *differing)}) > 1:
            rows.append(f"row {row}: {', '.join(said)}")
    raise OutlierMergeError(
        "a classification head has rows that stand for other classes (id2label of config.json) in "
        f"the models, so that to merge them would mix classes:\n{listing(names, limit=5)}\n"
        f"{listing(rows, limit=10)}\n{way_out}"
    )


def _way_out(
    first: str,
    ours: tuple[str, ...],
    others: Mapping[str, tuple[str, ...]],
    names: Sequence[str],
) -> str:
    models = ", ".join(others)
    if all(
        _plain(found, ordered=False) == _plain(ours, ordered=False) for found in others.values()
    ):
        advice = (
            f"The classes are the same in another order: bring the rows of these tensors in "
            f"{shown(models)}, and its id2label and label2id, into the order of {shown(first)}."
        )
    else:
        advice = (
            "Where they are the same classes by other names, write the same id2label and label2id "
            "into both config.json files."
        )
    module = names[0].rpartition(".")[0] or names[0]
    weight = f"weight: [{{filter: {module}, value: 0}}, {{value: 1}}]"
    return (
        f"{advice} To leave the heads of {shown(models)} out, and keep that of {shown(first)}: "
        f"`parameters: {{{weight}}}` on each of those."
    )


def _plain(labels: Sequence[str], *, ordered: bool = True) -> list[str]:
    plain = [label.strip().casefold() for label in labels]
    return plain if ordered else sorted(plain)


def _are_same(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    return _plain(ours) == _plain(theirs)


def _at(labels: Sequence[str], row: int) -> str:
    return repr(labels[row]) if row < len(labels) else "nothing"
