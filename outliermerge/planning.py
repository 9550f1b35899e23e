"""From a spec and the checkpoints' headers to a plan; no tensor is read."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from outliermerge.checkpoint.folder import open_checkpoint
from outliermerge.checkpoint.hub import resolve
from outliermerge.checkpoint.layout import plan_layout
from outliermerge.checkpoint.meta import DTYPES, DType, Source
from outliermerge.errors import OutlierMergeError, SpecError, listing
from outliermerge.jobs import Input, Job, Plan
from outliermerge.method import MergeMethod
from outliermerge.settings import Layer, SpecPath, find_layers
from outliermerge.spec import MergeSpec

DEFAULT_SHARD_BYTES = 5 * 10**9
DEFAULT_MEMORY_BYTES = 2**30


def make_plan(spec: MergeSpec, *, shard_bytes: int = DEFAULT_SHARD_BYTES) -> Plan:
    """Plan a merge from a spec and the headers of its models.

    Raises:
        SpecError: a filter that no tensor matches, or parameters that do not go together.
        OutlierMergeError: a model is absent or broken, or the models do not fit together; the
            message lists the tensors.
    """
    return _Planner(spec).plan(shard_bytes)


class _Planner:
    def __init__(self, spec: MergeSpec) -> None:
        self.spec = spec
        self.method: MergeMethod = spec.method
        self.inputs, self.model_numbers = _open_inputs(spec)
        self.reference = self.inputs[0].checkpoint.tensors
        self.has_base = self.inputs[0].role == "base"
        self.problems: dict[str, list[str]] = {}
        self.notes: list[str] = []
        self.dropped: list[str] = []
        self.used_filters: set[SpecPath] = set()
        self.any_resolved = False

    def plan(self, shard_bytes: int) -> Plan:
        names = dict.fromkeys(name for entry in self.inputs for name in entry.checkpoint.tensors)
        self.layers = find_layers(names)
        drafts = [draft for name in names if (draft := self._draft(name)) is not None]
        self._raise_problems()
        self._check_filters()
        shards, placed = plan_layout(
            ((name, dtype, sources[0][1].shape) for name, _, sources, _, dtype, _ in drafts),
            shard_bytes=shard_bytes,
        )
        jobs = tuple(
            Job(
                action,
                self.spec.document.merge_method,
                parameters,
                sources,
                placed[name],
                self._compute_dtype(sources),
                why,
            )
            for name, action, sources, parameters, _, why in drafts
        )
        self._note_what_is_unusual(jobs)
        checkpoint = self.inputs[0].checkpoint
        return Plan(
            spec=self.spec,
            inputs=self.inputs,
            jobs=jobs,
            shards=tuple(shards),
            sidecars=checkpoint.sidecars,
            gradients=self._gradients(jobs),
            dropped=tuple(self.dropped),
            notes=tuple(self.notes),
        )

    def _draft(self, name: str) -> _Draft | None:
        holders = [
            number
            for number in self.model_numbers
            if name in self.inputs[number].checkpoint.tensors
        ]
        if name not in self.reference:
            return self._draft_extra(name, holders)
        first = self.reference[name]
        for number in holders:
            meta = self.inputs[number].checkpoint.tensors[name]
            same_kind = meta.dtype == first.dtype or (meta.dtype.is_float and first.dtype.is_float)
            if meta.shape != first.shape or not same_kind:
                self._problem(
                    "of another shape or kind",
                    f"{name}: {_describe(first)} in {self.inputs[0].reference}, "
                    f"{_describe(meta)} in {self.inputs[number].reference}",
                )
                return None
        lacking = [number for number in self.model_numbers if number not in holders]
        if lacking and not self._may_lack(name, lacking):
            return None
        own = (0, first)
        found = tuple((n, self.inputs[n].checkpoint.tensors[name]) for n in holders)
        dtype = self._stored(first)
        if not first.dtype.is_float:
            sources = dict.fromkeys([own, *found])
            action: Literal["copy", "equal"] = "equal" if len(sources) > 1 else "copy"
            return name, action, tuple(sources), {}, dtype, f"{first.dtype.name} buffer"
        if not holders:
            return name, "copy", (own,), {}, dtype, "in no task model"
        if self.method.space == "weight":
            found = tuple(
                (n, self.inputs[n].checkpoint.tensors[name]) if n in holders else own
                for n in self.model_numbers
            )
            holders = list(self.model_numbers)
        parameters = self._parameters(name, holders)
        if len(found) == 1 and self.method.idempotent(parameters):
            return name, "copy", found, {}, dtype, "one model, unchanged by the method"
        if self.method.space == "delta":
            found = (own, *found)
        return name, "merge", found, parameters, dtype, ""

    def _draft_extra(self, name: str, holders: list[int]) -> _Draft | None:
        found = tuple((n, self.inputs[n].checkpoint.tensors[name]) for n in holders)
        where = ", ".join(self.inputs[n].reference for n in holders)
        if self.spec.document.extra == "error":
            self._problem("extra", f"{name}: in {where}, not in {self.inputs[0].reference}")
            return None
        if self.spec.document.extra == "drop":
            self.dropped.append(name)
            return None
        if len({(meta.shape, meta.dtype) for _, meta in found}) > 1:
            self._problem("of another shape or kind", f"{name}: differs between {where}")
            return None
        action: Literal["copy", "equal"] = "equal" if len(found) > 1 else "copy"
        return name, action, found, {}, self._stored(found[0][1]), "extra, copied"

    def _may_lack(self, name: str, lacking: list[int]) -> bool:
        if self.spec.document.missing == "base" and self.has_base:
            return True
        for number in lacking:
            self._problem("missing", f"{name}: not in {self.inputs[number].reference}")
        return False

    def _compute_dtype(self, sources: tuple[tuple[int, Source], ...]) -> str:
        wide = any(meta.dtype.name == "float64" for _, meta in sources)
        return "float64" if wide or self.spec.document.dtype == "float64" else "float32"

    def _stored(self, meta: Source) -> DType:
        document = self.spec.document
        wanted = document.out_dtype or document.dtype
        return DTYPES[wanted] if wanted and meta.dtype.is_float else meta.out_dtype

    def _parameters(self, name: str, holders: list[int]) -> dict[str, Any]:
        layer = self.layers.get(name)
        position = layer.position if layer else 0.0
        given: dict[str, Any] = {}
        self.any_resolved = True
        for parameter in self.method.parameters.values():
            if parameter.per_model:
                given[parameter.name] = [
                    self._value(name, parameter.name, position, parameter.default, number)
                    for number in holders
                ]
            else:
                given[parameter.name] = self._value(
                    name, parameter.name, position, parameter.default, None
                )
        try:
            return self.method.resolve(len(holders), given)
        except SpecError as error:
            raise SpecError(f"{self.spec.source.file}: tensor {name!r}: {error}") from error

    def _value(
        self, tensor: str, parameter: str, position: float, default: Any, number: int | None
    ) -> Any:
        levels = [self.spec.settings]
        if number is not None:
            levels.insert(0, self.spec.models[self.model_numbers.index(number)].settings)
        for settings in levels:
            setting = settings.get(parameter)
            entry = setting.entry_for(tensor) if setting else None
            if entry is not None:
                self.used_filters.add(entry.path)
                return entry.at(position)
        return default

    def _problem(self, kind: str, message: str) -> None:
        self.problems.setdefault(kind, []).append(message)

    def _raise_problems(self) -> None:
        if not self.problems:
            return
        advice = {
            "missing": "`missing: base` in the spec takes a model as unchanged where it lacks a "
            "tensor (it needs a base_model).",
            "extra": "`extra: copy` in the spec copies such tensors, `extra: drop` leaves them "
            "out.",
            "of another shape or kind": "Such models cannot be merged as they are.",
        }
        parts = [
            f"{len(items)} tensor(s) {kind}:\n{listing(items)}\n{advice[kind]}"
            for kind, items in self.problems.items()
        ]
        raise OutlierMergeError("the models do not hold the same tensors\n" + "\n".join(parts))

    def _check_filters(self) -> None:
        if not self.any_resolved:
            return
        levels = [self.spec.settings, *(model.settings for model in self.spec.models)]
        for settings in levels:
            for setting in settings.values():
                takes_all = False
                for entry in setting.entries:
                    unused = entry.filter is not None and entry.path not in self.used_filters
                    if unused or takes_all:
                        shadowed = any(entry.matches(name) for name in self.reference)
                        why = (
                            "is never reached: entries above take all of its tensors"
                            if shadowed
                            else "is in no merged tensor's name"
                        )
                        what = f"the filter {entry.filter!r}" if entry.filter else "this entry"
                        raise self.spec.source.error(entry.path, f"{what} {why}")
                    takes_all = takes_all or entry.filter is None

    def _gradients(self, jobs: tuple[Job, ...]) -> dict[str, dict[str, list[Any]]]:
        """Return values by layer of what varies over a stack and is one value in each layer."""
        seen: dict[str, dict[str, dict[int, set[Any]]]] = {}
        for job in jobs:
            layer: Layer | None = self.layers.get(job.name)
            if job.action != "merge" or layer is None:
                continue
            for name, value in job.parameters.items():
                values = seen.setdefault(name, {}).setdefault(layer.stack, {})
                values.setdefault(layer.index, set()).add(value)
        result: dict[str, dict[str, list[Any]]] = {}
        for name, stacks in seen.items():
            for stack, layers in stacks.items():
                if len(set.union(*layers.values())) > 1:
                    rows = [sorted(layers[index]) for index in sorted(layers)]
                    result.setdefault(name, {})[stack] = [
                        row[0] if len(row) == 1 else row for row in rows
                    ]
        return result

    def _note_what_is_unusual(self, jobs: tuple[Job, ...]) -> None:
        weighted = [bool(model.settings.get("weight")) for model in self.spec.models]
        if any(weighted) and not all(weighted) and "weight" not in self.spec.settings:
            names = [
                m.reference for m, own in zip(self.spec.models, weighted, strict=True) if not own
            ]
            self.notes.append(f"no `weight` for {', '.join(names)}: 1 is used")
        mixed = [
            f"{job.name}: {', '.join(meta.dtype.name for _, meta in job.sources)}"
            for job in jobs
            if len({meta.dtype for _, meta in job.sources}) > 1
        ]
        if mixed:
            self.notes.append(f"dtypes differ between models:\n{listing(mixed, limit=5)}")
        narrowed = Counter(
            (job.sources[0][1].dtype.name, job.output.dtype.name)
            for job in jobs
            if job.output.dtype.num_bytes < max(m.dtype.num_bytes for _, m in job.sources)
        )
        for (loaded, stored), count in narrowed.items():
            self.notes.append(f"{count} tensors are loaded as {loaded} and stored as {stored}")
        if self.spec.document.dtype in ("bfloat16", "float16"):
            self.notes.append(
                f"dtype: {self.spec.document.dtype} sets how the output is stored; "
                "arithmetic stays in float32"
            )
        for reason in ("in no task model", "extra, copied"):
            names = [job.name for job in jobs if job.reason == reason]
            if names:
                self.notes.append(f"{len(names)} tensors {reason}:\n{listing(names, limit=5)}")
        partly = [
            job.name for job in jobs
            if job.action == "merge" and self.method.space == "delta"
            and len(job.sources) <= len(self.model_numbers)
        ]  # fmt: skip
        if partly:
            self.notes.append(
                f"{len(partly)} tensors are not in every task model:\n{listing(partly, limit=5)}"
            )
        if self.dropped:
            self.notes.append(
                f"{len(self.dropped)} extra tensors are dropped:\n{listing(self.dropped, limit=5)}"
            )
        checkpoint = self.inputs[0].checkpoint
        if "config.json" not in checkpoint.sidecars:
            self.notes.append(f"{checkpoint.root} has no config.json: transformers cannot load it")
        left_behind = [name for name in checkpoint.left_behind if name != "README.md"]
        if left_behind:
            left = listing(left_behind, limit=5)
            self.notes.append(f"files of the base model that are not carried over:\n{left}")


_Draft = tuple[
    str,
    Literal["merge", "copy", "equal"],
    tuple[tuple[int, Source], ...],
    dict[str, Any],
    DType,
    str,
]


def _describe(meta: Source) -> str:
    return f"{meta.dtype.name} {list(meta.shape)}"


def _open_inputs(spec: MergeSpec) -> tuple[tuple[Input, ...], list[int]]:
    """Open every model once; return them and the numbers of those that are merged, in order."""
    opened: dict[Path, int] = {}
    inputs: list[Input] = []

    def number_of(reference: str, role: Literal["base", "model"], path: SpecPath) -> int:
        try:
            root = resolve(reference)
            if root.resolve() not in opened:
                opened[root.resolve()] = len(inputs)
                inputs.append(Input(reference, role, open_checkpoint(root)))
        except OutlierMergeError as error:
            located = spec.source.error(path, str(error))
            raise OutlierMergeError(str(located)) from error
        return opened[root.resolve()]

    if spec.document.base_model is not None:
        number_of(spec.document.base_model, "base", ("base_model",))
    elif spec.document.missing == "base":
        raise spec.source.error(("missing",), "`missing: base` needs a `base_model`", at_key=True)
    numbers = [number_of(model.reference, "model", (*model.path, "model")) for model in spec.models]
    return tuple(inputs), numbers


def free_disk_bytes(folder: Path) -> int:
    """Return the free space of the disk that a folder, perhaps not yet made, is on."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
