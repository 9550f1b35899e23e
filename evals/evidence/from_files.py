"""Merges that the library makes of files: by modifiers, and by what runs models over data."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file

from evals.every_method import by_files
from evals.every_method.by_files import Files
from evals.evidence.training import State, World

MODIFIERS: dict[str, dict[str, Any]] = {
    "task_arithmetic+lines": by_files.SPACES["task_arithmetic+lines"],
    "task_arithmetic+svc": by_files.SPACES["task_arithmetic+svc"],
    "average+svc": {"alpha": (0.1, 1.0)},
}
# With nothing to choose: every setting would run the models over the data again.
OVER_DATA: dict[str, dict[str, Any]] = {"regmean++": {}, "adamerging": {}}
SPACES = MODIFIERS | OVER_DATA


class MeasuredWorld(World, Protocol):
    """A world of models that the library itself can run over data."""

    def samples(self, task: str) -> list[dict[str, Any]]:
        """Return training examples as `outliermerge measure` takes them, `image` as a PNG's bytes.

        They are the first of `examples`.
        """
        ...

    def save(self, state: State, folder: Path) -> None:
        """Write a model into a new folder as transformers opens it, with what reads samples."""
        ...

    def opened(self, folder: Path) -> State:
        """Return the tensors of a merge of such models."""
        ...


@dataclass
class Folders:
    """Task models as files, which are written into `place` when a merge is made of them.

    Attributes:
        world: a `MeasuredWorld` where a method of `OVER_DATA` merges.
    """

    world: World
    base: State
    models: Sequence[State]
    tasks: Sequence[str]
    place: Path

    def merged(self, method: str, parameters: Mapping[str, Any]) -> State:
        """Merge by the library, from folder to folder."""
        with tempfile.TemporaryDirectory(dir=self.place) as work:
            if method in OVER_DATA:
                found = by_files.merged(method, self._whole, parameters, Path(work))
                return self.world.opened(found)
            if method == "average+svc":  # the mean of task vectors is a multiple of their sum
                method = "task_arithmetic+svc"
                parameters = {"lambda": 1 / len(self.models), **parameters}
            found = by_files.merged(method, self._tensors, parameters, Path(work))
            tensors = load_file(found / "model.safetensors")
            return {name: tensors[self.world.stored_as(name)] for name in self.base}

    @cached_property
    def _tensors(self) -> Files:
        """Only what is merged, which is enough for modifiers."""

        def save(state: State, name: str) -> Path:
            folder = self.place / "tensors" / name
            folder.mkdir(parents=True)
            stored = {self.world.stored_as(n): each.contiguous() for n, each in state.items()}
            save_file(stored, folder / "model.safetensors")
            return folder

        return self._files(save, [])

    @cached_property
    def _whole(self) -> Files:
        """Models that transformers opens, and training examples of their tasks."""

        def save(state: State, name: str) -> Path:
            folder = self.place / "whole" / name
            self.world.save(state, folder)
            return folder

        return self._files(save, [self._samples(task) for task in self.tasks])

    def _files(self, save: Callable[[State, str], Path], data: list[Path]) -> Files:
        models = [save(state, task) for state, task in zip(self.models, self.tasks, strict=True)]
        return Files(save(self.base, "base"), models, data)

    def _samples(self, task: str) -> Path:
        folder = self.place / "samples" / task
        folder.mkdir(parents=True)
        lines = []
        for number, sample in enumerate(self.world.samples(task)):
            if "image" in sample:
                (folder / f"{number}.png").write_bytes(sample["image"])
                sample = {"image": f"{number}.png"}
            lines.append(json.dumps(sample) + "\n")
        (folder / "samples.jsonl").write_text("".join(lines))
        return folder / "samples.jsonl"
