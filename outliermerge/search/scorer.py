"""The interface of what scores the models of a search, and how a scorer loads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from outliermerge.checkpoint.formats.safetensors_file import read_header
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.execution.threads import choose_device
from outliermerge.search.questions import Answers
from outliermerge.search.workplace import Merged
from outliermerge.storage.files import load_json


class InProcess(Protocol):
    """Scores models question by question, in the process that calls it."""

    learns: bool
    """Whether it is to be shown the parents first."""
    device: str
    """Where models are loaded, as an option names it."""
    suites: tuple[str, ...]
    """The names of several suites, whose tasks are called SUITE/TASK; none where there is one."""

    def identity(self) -> Mapping[str, Any]:
        """Return what the scores depend on besides the model, as JSON values."""

    def learn(self, name: str, parent: Merged) -> None:
        """Take up what a parent says, before any model is scored."""

    def score(self, model: Merged, questions: Mapping[str, Sequence[str]] | None) -> Answers:
        """Return the scores of a model on some questions by task; None for all."""

    def close(self) -> None:
        """End what it has started."""


class Scorer(InProcess, Protocol):
    """Scores models question by question, by a process that can be ended where that is needed."""

    def start(self) -> None:
        """Start that process, so that its start is not counted."""

    def score(
        self,
        model: Merged,
        questions: Mapping[str, Sequence[str]] | None,
        seconds: float | None = None,
    ) -> Answers:
        """Return the scores of a model.

        Args:
            seconds: that it may take; None for as long as it takes.

        Raises:
            LateError: it takes longer.
        """


class LoadedModel:
    """The model that was loaded last.

    Args:
        device: cpu, cuda, cuda:N, or auto.
    """

    def __init__(self, device: str) -> None:
        self.device, self._checksum, self._model = device, "", None

    def load(self, model: Merged) -> Any:
        """Return a model, loaded if it is not the last one.

        Raises:
            OutlierMergeError: it does not load.
        """
        if self._checksum != model.checksum:
            self.forget()  # its memory is needed
            self._model = load_model(model.path, device=choose_device(self.device))
            self._checksum = model.checksum
        return self._model

    def forget(self) -> None:
        """Let go of the model."""
        self._model, self._checksum = None, ""


def load_model(path: Path, *, device: str = "cpu") -> Any:
    """Return what transformers loads from a folder, else the tensors by their names.

    Raises:
        OutlierMergeError: it does not load, or lacks weights.
    """
    config = path / "config.json"
    names = load_json(config).get("architectures") if config.is_file() else None
    if not names:
        return _tensors(path, device)
    try:
        import transformers
    except ImportError as error:
        said = "transformers is not installed: pip install transformers"
        raise OutlierMergeError(said) from error
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, str(names[0]), None)
    if kind is None:
        raise OutlierMergeError(
            f"transformers {transformers.__version__} has no {shown(names[0])}, which the model's "
            "config names"
        )
    dtype = "float32" if device == "cpu" else "auto"
    try:
        model, info = kind.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise OutlierMergeError(f"the model does not load: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise OutlierMergeError(
            f"the model does not load: its files lack {len(missing)} tensors: "
            f"{', '.join(missing[:5])}"
        )
    return model.to(device).eval()


def _tensors(path: Path, device: str) -> dict[str, Any]:
    import torch

    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    found = {}
    for file in files:
        data = bytearray(file.read_bytes())
        for meta in read_header(file):
            assert meta.offset is not None
            dtype = getattr(torch, meta.dtype.name)
            if not meta.num_elements:
                tensor = torch.empty(0, dtype=dtype)
            else:
                tensor = torch.frombuffer(
                    data, dtype=dtype, count=meta.num_elements, offset=meta.offset
                )
            found[meta.name] = tensor.reshape(meta.shape).to(device)
    return found
