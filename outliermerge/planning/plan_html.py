"""A plan as tables, for notebooks."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from outliermerge.checkpoint.sources import TensorMeta
from outliermerge.display import html_table, html_words, human_bytes
from outliermerge.errors import noted
from outliermerge.planning.job import Input, Job
from outliermerge.spec.check import MergeSpec


class Shown(Protocol):
    """What is shown of a plan."""

    @property
    def spec(self) -> MergeSpec: ...
    @property
    def inputs(self) -> Sequence[Input]: ...
    @property
    def jobs(self) -> Sequence[Job]: ...
    @property
    def weight_jobs(self) -> list[tuple[Job, Job]]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def num_read_bytes(self) -> int: ...
    @property
    def num_written_bytes(self) -> int: ...
    def merged_by(self, job: Job) -> tuple[str, str] | None: ...


def plan_as_html(plan: Shown) -> str:
    """Return the models of a plan, what happens to their tensors, and its spec."""
    models = []
    for entry in plan.inputs:
        models.append(
            _model_row(entry.reference, entry.role, len(entry.checkpoint.tensors), entry.stored)
        )
        models += [
            _model_row(one.reference, f"its {one.kind}", len(one.stored), one.stored)
            for one in entry.beside
        ]
    groups: dict[tuple[str, str], list[Job]] = {}
    written = {id(job): writes.output.dtype.name for job, writes in plan.weight_jobs}
    for job, _ in plan.weight_jobs:
        action = "merge" if plan.merged_by(job) else job.action
        groups.setdefault((action, job.reason), []).append(job)
    actions = [
        (
            {"merge": "merged", "copy": "copied", "equal": "copied if equal"}[action],
            reason,
            len(jobs),
            f"{sum(job.num_elements for job in jobs):,}",
            _counts(Counter(written[id(job)] for job in jobs)),
        )
        for (action, reason), jobs in groups.items()
    ]
    return (
        html_words(
            f"{plan.spec.in_a_line}; reads {human_bytes(plan.num_read_bytes)}, writes "
            f"{human_bytes(plan.num_written_bytes)}"
        )
        + html_table(("model", "role", "tensors", "size", "dtypes"), models)
        + html_table(("what happens", "why", "tensors", "parameters", "stored as"), actions)
        + f"<pre>{html.escape(plan.spec.as_yaml())}</pre>"
        + "".join(html_words(noted(note)) for note in plan.notes)
    )


def _model_row(
    reference: str, role: str, num: int, stored: Sequence[TensorMeta]
) -> tuple[str, str, int, str, str]:
    size = human_bytes(sum(meta.num_bytes for meta in stored))
    return reference, role, num, size, _counts(Counter(meta.dtype.name for meta in stored))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ×{count}" for name, count in counts.items())
