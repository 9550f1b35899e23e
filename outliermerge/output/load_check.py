"""The proof that an output loads: transformers or diffusers builds the model and finds all tensors.

They run in another process beside the merge, because this takes seconds: see load_worker.
Tensors that the base itself lacks or has in excess are no fault of the merge; they are noted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

from outliermerge.checkpoint.config import counts_as_predicted, read_json
from outliermerge.checkpoint.folders.folder import PIPELINE_NAME
from outliermerge.checkpoint.layout import component_of
from outliermerge.checkpoint.model_types import has_transformers
from outliermerge.errors import OutlierMergeError, argument, listing, shown
from outliermerge.output.load_findings import Findings, KeptFindings, Pair
from outliermerge.output.parted import find_parted, refuse_parted
from outliermerge.planning.plan import Plan
from outliermerge.planning.sidecars import sidecar_contents
from outliermerge.storage.files import small_bytes

Shapes: TypeAlias = Mapping[str, Sequence[int]]

_REFUSED = "the output does not load, as the base does not"
_LEFT = "is left: the same command without the check goes on with it; else remove it."
_KINDS = ("missing", "unexpected", "mismatched")
TIMEOUT_SECONDS = 600
# "" is the working directory; a file of a model there must not be imported as a module.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from outliermerge.output.load_worker import main; main()"
)
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Verdict:
    """The result of the check whether an output loads.

    Attributes:
        status: `loads`, `does not load`, `does not load, as the base does not`, or `not checked`.
        by: the library, its version and the class, for each part that loads.
        problems: why it does not load.
        notes: what was not checked, and problems that the base has as well.
        as_base: by component's folder the problems that the base has as well: tensors or the error.
        checked: the folders of the components whose class could be built.
        num_rows: by component's folder the rows of the input embeddings that the class builds.
        tied: pairs of the output's tensors that the class ties.
        parted: those of them that the merge does not treat as one, in words.
        was_known: an earlier check had asked the same, so that nothing was asked now.
        is_kept: the next check of the same has nothing to ask.
    """

    status: str
    by: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    as_base: Mapping[str, Findings] = field(default_factory=dict)
    checked: tuple[str, ...] = ()
    num_rows: Mapping[str, int] = field(default_factory=dict)
    tied: tuple[tuple[str, str], ...] = ()
    parted: tuple[str, ...] = ()
    was_known: bool = False
    is_kept: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return {
            "status": self.status,
            "by": list(self.by),
            "problems": list(self.problems),
            "notes": list(self.notes),
            "as_base": {folder: dict(found) for folder, found in self.as_base.items()},
        }

    def raise_if_bad(self, left: Path | str | None = None) -> None:
        """Raise OutlierMergeError if the output does not load, or not with the values merged.

        A run says which folder is left.
        """
        refuse_parted(self.parted)
        if self.problems:
            raise OutlierMergeError(
                "the output would not load:\n"
                + "\n".join(self.problems)
                + "\nIts config.json and its tensors do not fit: `config_source` takes the config "
                f"of another model. Without this check ({argument('load_check', False)}) it is "
                "written as it is." + (f"\n{left} {_LEFT}" if left is not None else "")
            )


@dataclass(frozen=True)
class Part:
    """A model that is loaded by itself: the output, or one component of a pipeline.

    Attributes:
        found_in_base: the findings for the same part of the base, if they are known already.
        base: otherwise the same part of the base, which is then checked, too.
    """

    folder: str
    library: str
    class_name: str
    config: Mapping[str, Any]
    shapes: Shapes
    base: Part | None = None
    found_in_base: Findings | None = None

    def request(self) -> dict[str, Any]:
        """Return the part in the form that load_worker.check_part takes."""
        return {
            "library": self.library,
            "class": self.class_name,
            "config": self.config,
            "tensors": self.shapes,
        }


def find_parts(
    shapes: Shapes, components: Sequence[str], read: Callable[[str], Mapping[str, Any]]
) -> tuple[dict[str, Part], list[str]]:
    """Return by folder the parts that name their class, and why others are not checked.

    Args:
        shapes: the shapes of all tensors, by name.
        components: the parts' folders; "" for a model that is not a pipeline.
        read: returns the JSON object in a file of the model, an empty one if there is no file.
    """
    index = read(PIPELINE_NAME)
    parts, notes = {}, []
    for folder in components:
        start = f"{folder}/" if folder else ""
        config = read(f"{start}config.json")
        named = index.get(folder) if folder else None
        architectures = config.get("architectures")
        if isinstance(named, list) and len(named) == 2 and all(isinstance(n, str) for n in named):
            library, class_name = named
        elif isinstance(config.get("_class_name"), str):
            library, class_name = "diffusers", config["_class_name"]
        elif isinstance(architectures, list) and architectures and config.get("model_type"):
            library, class_name = "transformers", str(architectures[0])
        else:
            what = "names no architectures and model_type" if config else "is not there"
            notes.append(_not_checked(folder, f"config.json {what}"))
            continue
        own = {
            name.removeprefix(start): shape
            for name, shape in shapes.items()
            if component_of(name, components) == folder
        }
        parts[folder] = Part(folder, library, class_name, config, own)
    return parts, notes


def _not_checked(folder: str, why: str) -> str:
    return f"not checked that {folder or 'the output'} loads: {why}"


def _parts_of_plan(plan: Plan) -> tuple[list[Part], list[str]]:
    """Return the parts of a plan's output, each with the same part of the reference."""
    if plan.is_one_file:
        return [], ["a single file has no config beside it: nothing says what loads it"]
    if plan.spec.document.format == "gguf":
        return [], [_not_checked("", "this check knows no GGUF files")]
    contents = sidecar_contents(plan)
    reference = plan.inputs[0]
    components = list(plan.components)

    def read(name: str) -> Mapping[str, Any]:
        try:
            content = contents.get(name, b"{}")
            value = json.loads(content if isinstance(content, bytes) else small_bytes(content))
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    parts, notes = find_parts({job.name: job.output.shape for job in plan.jobs}, components, read)
    stored = _stored_shapes(plan)
    theirs, _ = find_parts(stored, components, lambda name: read_json(reference.home / name))
    found = [replace(p, base=theirs.get(f) if stored else None) for f, p in parts.items()]
    return found, notes


def _stored_shapes(plan: Plan) -> Shapes:
    """Return the shapes of the reference's stored tensors; empty if they are not known.

    Tensors whose rows the merge changes are left out: the plan has only their output shapes.
    """
    tensors = plan.inputs[0].checkpoint.tensors
    unchanged = {n: source for n, source in tensors.items() if n not in plan.proof.resized}
    if not plan.inputs[0].renamed:
        return {name: source.shape for name, source in unchanged.items()}
    if any(source.stored != (source,) for source in unchanged.values()):
        return {}
    shapes = {}
    for name, source in unchanged.items():
        folder = component_of(name, plan.components)
        shapes[f"{folder}/{source.name}" if folder else source.name] = source.shape
    return shapes if len(shapes) == len(unchanged) else {}  # some are parts of one tensor


class LoadCheck:
    """A check in another process, of outputs that are planned or written."""

    def __init__(
        self,
        outputs: Sequence[tuple[Sequence[Part], Sequence[str]]],
        plans: Sequence[Plan | None] = (),
    ) -> None:
        self._outputs = outputs
        self._plans = plans or [None] * len(outputs)
        self._kept = KeptFindings()
        self._verdicts: list[Verdict] | None = None
        self._lock = threading.Lock()
        self._files = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._why_none = "transformers is not installed"
        requests = dict.fromkeys(_pair(part) for parts, _ in outputs for part in parts)
        self._known = self._kept.find(requests) if has_transformers() else {}
        self._requests = [request for request in requests if request not in self._known]
        if self._requests and has_transformers():
            try:
                self._start()
            except OSError as error:
                self._why_none = f"no process can be started for it: {error.strerror}"

    @classmethod
    def of_plans(cls, plans: Sequence[Plan]) -> LoadCheck:
        """Start to check the outputs that plans describe."""
        return cls([_parts_of_plan(plan) for plan in plans], plans)

    def _start(self) -> None:
        self._answer: IO[bytes] = self._files.enter_context(tempfile.TemporaryFile())
        self._errors: IO[bytes] = self._files.enter_context(tempfile.TemporaryFile())
        with tempfile.TemporaryFile() as request:
            request.write(f"[{','.join(self._requests)}]".encode())
            request.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps([p for p in sys.path if p])],
                stdin=request,
                stdout=self._answer,
                stderr=self._errors,
                env={**os.environ, **ENVIRONMENT},
            )

    def __enter__(self) -> LoadCheck:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._files.close()

    def raise_if_bad(self, left: Sequence[Path | str]) -> None:
        """Raise OutlierMergeError if the check has already found that an output does not load."""
        if self._process is None or self._process.poll() is not None:
            for verdict, folder in zip(self.verdicts(), left, strict=True):
                verdict.raise_if_bad(folder)

    def verdicts(self) -> list[Verdict]:
        """Wait for the check, and return the verdict on each output."""
        with self._lock:  # several threads of a merge may ask at once
            if self._verdicts is None:
                kept, was_known = {*self._known}, not self._requests
                answers = self._known | dict(zip(self._requests, self._answers(), strict=True))
                kept |= {r for r in self._requests if self._kept.keep(r, answers[r])}
                self._verdicts = []
                for (parts, notes), plan in zip(self._outputs, self._plans, strict=True):
                    verdict = _judge([(p, *answers[_pair(p)]) for p in parts], notes)
                    parted = find_parted(plan, verdict.tied) if plan else []
                    verdict = replace(verdict, parted=tuple(parted), was_known=was_known)
                    is_kept = all(_pair(part) in kept for part in parts)
                    self._verdicts.append(replace(verdict, is_kept=is_kept))
            return self._verdicts

    def _answers(self) -> Sequence[Pair]:
        if self._process is None:
            return [({"unknown": self._why_none}, None)] * len(self._requests)
        try:
            code = self._process.wait(TIMEOUT_SECONDS)
            self._answer.seek(0)
            if code == 0:
                answers: list[Pair] = json.load(self._answer)
                return answers
            self._errors.seek(0)
            said = self._errors.read().decode("utf-8", "replace").split("\n")
            last = next((line.strip() for line in reversed(said) if line.strip()), "")
            why = f"the process that asks transformers ended with code {code}: {last[:300]}"
        except subprocess.TimeoutExpired:
            self._process.kill()
            why = f"transformers did not answer within {TIMEOUT_SECONDS} s"
        return [({"unknown": why}, None)] * len(self._requests)


def _pair(part: Part) -> str:
    return json.dumps([part.request(), part.base and part.base.request()])


def _judge(
    found: Sequence[tuple[Part, Findings, Findings | None]], notes: Sequence[str]
) -> Verdict:
    """Return the verdict for the findings on an output, compared with those on the base."""
    by, problems, said = [], [], list(notes)
    as_base: dict[str, Findings] = {}
    for part, ours, theirs in found:
        theirs = part.found_in_base or theirs or {}
        if "unknown" in ours:
            said.append(_not_checked(part.folder, ours["unknown"]))
            continue
        if "error" in ours:
            why = f"{part.class_name} refuses it: {ours['error']}"
            if word := next((w for w in ("error", "unknown") if w in theirs), None):
                excuse = _in(part, f"{_REFUSED}: {why}")
                said.append(excuse if word == "error" else _not_checked(part.folder, why))
                as_base[part.folder] = {word: ours["error"]}
            else:
                problems.append(_in(part, why))
            continue
        shared = {
            kind: [_name(entry) for entry in ours[kind]
                   if _name(entry) in set(map(_name, theirs.get(kind, ())))]
            for kind in _KINDS
        }  # fmt: skip
        shared = {kind: names for kind, names in shared.items() if names}
        if "mismatched" not in shared:
            by.append(f"{ours['by']}, {part.class_name}")
        if shared:
            as_base[part.folder] = shared
        said += [_in(part, _excused(*entry, part.class_name)) for entry in shared.items()]
        for kind in _KINDS:
            new = [e for e in ours[kind] if _name(e) not in shared.get(kind, ())]
            if kind == "unexpected":
                more = [name for name in new if counts_as_predicted(name, part.config)]
                new = [name for name in new if name not in more]
                if more:
                    text = f"{part.class_name} passes over {len(more)} tensor(s) of layers that "
                    said.append(_in(part, f"{text}predict more tokens, which the config counts"))
            if new:
                problems.append(_in(part, _problem(kind, new, part.class_name)))
    refused = any(one.keys() & {"error", "mismatched"} for one in as_base.values())
    status = "does not load, as the base does not" if refused else "loads" if by else "not checked"
    status = "does not load" if problems else status
    rows = {part.folder: ours["num_rows"] for part, ours, _ in found if ours.get("num_rows")}
    checked = tuple(part.folder for part, ours, _ in found if "by" in ours)
    tied = tuple(
        (f"{part.folder}/{name}", f"{part.folder}/{other}") if part.folder else (name, other)
        for part, ours, _ in found
        for name, other in ours.get("tied", ())
    )
    return Verdict(status, tuple(by), tuple(problems), tuple(said), as_base, checked, rows, tied)


def _name(entry: Any) -> str:
    return str(entry if isinstance(entry, str) else entry[0])


def _in(part: Part, text: str) -> str:
    return f"{part.folder}: {text}" if part.folder else text


def _problem(kind: str, entries: Sequence[Any], class_name: str) -> str:
    if kind == "mismatched":
        rows = [
            f"{shown(name)}: {list(found)}, {class_name} expects {list(expected)} by its config"
            if found else name
            for name, found, expected in entries
        ]  # fmt: skip
        return f"{len(rows)} tensor(s) of another shape:\n{listing(rows)}"
    what = {
        "missing": f"that {class_name} has and the output lacks; they would be drawn at random",
        "unexpected": f"that {class_name} does not know; what was trained in them would be lost",
    }[kind]
    return f"{len(entries)} tensor(s) {what}:\n{listing(entries)}"


def _excused(kind: str, names: Sequence[str], class_name: str) -> str:
    what = {
        "missing": f"lacks {len(names)} tensor(s) of {class_name}, which loading draws at random",
        "unexpected": f"has {len(names)} tensor(s) that {class_name} passes over",
        "mismatched": f"{len(names)} tensor(s) have another shape than its config says",
    }[kind]
    start = f"{_REFUSED}:" if kind == "mismatched" else "as the base, the output"
    return f"{start} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
