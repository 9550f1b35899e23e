"""Loads a model to run it over data, and finds the tensors of its files in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.calibration.data import Sample
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.folders.hub import resolve
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Checkpoint, Source
from outliermerge.engines.torch import is_finite
from outliermerge.errors import OutlierMergeError, argument, shown
from outliermerge.execution.layerwise import require_transformers
from outliermerge.storage.files import load_json

if TYPE_CHECKING:
    from torch import Tensor, nn

_COMPARED = 4096  # elements by which a loaded tensor is known for the one in the files


@dataclass(frozen=True)
class Loaded:
    """A model in transformers.

    Attributes:
        reference: as it was named.
        checkpoint: its files.
        module: the model.
        names: by a parameter of the module the tensor of its files.
        unknown: parameters that are no tensors of its files as they are.
    """

    reference: str
    checkpoint: Checkpoint
    module: nn.Module
    names: Mapping[str, str]
    unknown: tuple[str, ...]
    device: str


def load(reference: str, *, device: str, what: str) -> Loaded:
    """Return a model with all its weights; float32 on the CPU, as stored elsewhere.

    Args:
        reference: a folder or a hub id.
        device: where it computes.
        what: what needs it, for messages.

    Raises:
        OutlierMergeError: it does not load, or is of a kind that is not for this.
    """
    import torch

    root, checkpoint, kind = class_of(reference, what)
    with quiet():
        try:
            module, info = kind.from_pretrained(
                root, dtype="float32" if device == "cpu" else "auto", output_loading_info=True
            )
        except Exception as error:  # of many kinds
            raise OutlierMergeError(f"{shown(reference)}: does not load: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise OutlierMergeError(
            f"{shown(reference)}: its files lack {len(missing)} tensors: {', '.join(missing[:5])}"
        )
    module = module.to(torch.device(device)).eval()
    pairs, unknown = _paired(module, checkpoint)
    return Loaded(reference, checkpoint, module, pairs, tuple(unknown), device)


def class_of(reference: str, what: str) -> tuple[Path, Checkpoint, Any]:
    """Return a model's folder, its files and its class in transformers.

    Args:
        reference: a folder or a hub id.
        what: what needs it, for messages.

    Raises:
        OutlierMergeError: it is of a kind that is not for this.
    """
    require_transformers(what)
    import transformers

    root = resolve(reference)
    checkpoint = open_checkpoint(root)
    said = load_json(root / "config.json") if (root / "config.json").is_file() else {}
    names = said.get("architectures") if isinstance(said, dict) else None
    if not names:
        raise OutlierMergeError(
            f"{shown(reference)}: no config.json that names a class of transformers, by which "
            f"{what} could run it. An adapter must be merged into its base first."
        )
    kind = getattr(transformers, str(names[0]), None)
    if kind is None:
        raise OutlierMergeError(
            f"{shown(reference)}: transformers {transformers.__version__} has no {shown(names[0])}"
        )
    if said.get("is_encoder_decoder"):
        raise OutlierMergeError(
            f"{shown(reference)}: {shown(names[0])} has an encoder and a decoder, expected a model "
            f"of one of them: {what} cannot feed it"
        )
    if "quantization_config" in said:
        raise OutlierMergeError(
            f"{shown(reference)}: its weights are quantised; {what} needs those that are merged"
        )
    return root, checkpoint, kind


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers print no warnings and bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _paired(module: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """Return the tensor of the files for each parameter, by its name and some of its values.

    transformers renames tensors of some models when it loads them: then the longest common end of
    the names decides. Values are compared, so that no tensor is taken for another.
    """
    found: dict[str, str] = {}
    unknown, taken = [], set[str]()
    with Reader() as reader:
        for name, parameter, candidates in candidates_of(module, checkpoint):
            fitting = [
                each
                for each in candidates
                if each not in taken and _holds(checkpoint.tensors[each], parameter.data, reader)
            ]
            reader.release((0, checkpoint.tensors[each]) for each in candidates)
            if len(fitting) == 1:
                found[name] = fitting[0]
                taken.add(fitting[0])
            else:
                unknown.append(name)
    return found, unknown


def candidates_of(
    module: nn.Module, checkpoint: Checkpoint
) -> Iterator[tuple[str, nn.Parameter, list[str]]]:
    """Yield each parameter with the tensors that have its name, or else the longest end of it."""
    by_end: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            by_end.setdefault(".".join(parts[start:]), []).append(name)
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        ends = (by_end.get(".".join(parts[start:]), []) for start in range(len(parts)))
        candidates = [name] if name in checkpoint.tensors else next(filter(None, ends), [])
        yield name, parameter, candidates


def _holds(source: Source, values: Tensor, reader: Reader) -> bool:
    import torch

    if source.shape != tuple(values.shape):
        return False
    num = min(_COMPARED, values.numel())
    stored = reader.values(source, 0, num).to(values.device, values.dtype)
    return torch.equal(stored.nan_to_num(), values.reshape(-1)[:num].nan_to_num())


class Several:
    """The tensors of models of one kind, and the module that takes them.

    Args:
        loaded: one of them, or their base.
        references: the models.

    Raises:
        OutlierMergeError: a model has other tensors.
    """

    def __init__(self, loaded: Loaded, references: Sequence[str]) -> None:
        self._loaded, self._references = loaded, references
        self._checkpoints = [open_checkpoint(resolve(reference)) for reference in references]
        named = dict(loaded.module.named_parameters())
        self._parameters = {tensor: named[name] for name, tensor in loaded.names.items()}
        for reference, checkpoint in zip(references, self._checkpoints, strict=True):
            for name, parameter in self._parameters.items():
                source = checkpoint.tensors.get(name)
                if source is None or source.shape != tuple(parameter.shape):
                    what = "is not in it" if source is None else f"is {[*source.shape]}"
                    raise OutlierMergeError(
                        f"{shown(reference)}: {shown(name)} {what}, expected "
                        f"{[*parameter.shape]}, as {shown(loaded.reference)} has it"
                    )

    @property
    def names(self) -> list[str]:
        return list(self._parameters)

    def loaded(self, number: int) -> Loaded:
        """Return the module as one of the models."""
        return replace(
            self._loaded,
            reference=self._references[number],
            checkpoint=self._checkpoints[number],
        )

    def read(self, name: str) -> list[Tensor]:
        """Return a tensor of each model, in float32."""
        with Reader() as reader:
            sources = [checkpoint.tensors[name] for checkpoint in self._checkpoints]
            return [
                reader.values(source, 0, source.num_elements)
                .view(source.shape)
                .to(self._loaded.device)
                .float()
                for source in sources
            ]

    def parameter(self, name: str) -> nn.Parameter:
        """Return the module's parameter for a tensor."""
        return self._parameters[name]

    def put(self, name: str, value: Tensor) -> None:
        """Put a tensor into the module.

        Raises:
            OutlierMergeError: it has values that are infinite, NaN or too large for the module.
        """
        import torch

        parameter = self._parameters[name]
        with torch.no_grad():
            parameter.copy_(value)
        if not is_finite(parameter.detach()):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise OutlierMergeError(
                f"{shown(name)} has values that are infinite, NaN or too large for {kind}, which "
                "the model computes in"
            )


class Feeder:
    """Makes a model's inputs of samples.

    Args:
        loaded: the model.
        with_images: some samples have images, so that its processor is needed.
        max_tokens: of a sample; the rest is left out.

    Raises:
        OutlierMergeError: it has no tokenizer or processor that loads.
    """

    def __init__(self, loaded: Loaded, *, with_images: bool, max_tokens: int) -> None:
        from transformers import AutoProcessor, AutoTokenizer

        self._loaded, self._max_tokens = loaded, max_tokens
        kind: Any = AutoProcessor if with_images else AutoTokenizer
        try:
            with quiet():
                self._reads: Any = kind.from_pretrained(loaded.checkpoint.root)
        except Exception as error:  # of many kinds
            what = "processor" if with_images else "tokenizer"
            raise OutlierMergeError(
                f"{shown(loaded.reference)}: its {what} does not load: {error}"
            ) from error
        self._with_images = with_images

    def inputs(self, sample: Sample) -> tuple[dict[str, Any], int]:
        """Return a sample as the model takes it, and how many tokens of it are the prompt's.

        Raises:
            OutlierMergeError: it has no tokens, or an image cannot be read.
        """
        import torch

        if self._with_images:
            return self._of_images(sample)
        before = self._reads(sample.prompt)["input_ids"] if sample.prompt else []
        behind = self._reads(sample.text, add_special_tokens=not before)["input_ids"]
        ids = [*before, *behind][: self._max_tokens]
        if not ids:
            raise OutlierMergeError(f"the sample {shown(sample.text)} has no tokens")
        return {"input_ids": torch.tensor([ids], device=self._loaded.device)}, len(before)

    def _of_images(self, sample: Sample) -> tuple[dict[str, Any], int]:
        from PIL import Image

        images = []
        for path in sample.images:
            try:
                with Image.open(path) as image:
                    images.append(image.convert("RGB"))
            except OSError as error:
                raise OutlierMergeError(f"{path}: is no image that can be read: {error}") from error
        more = {"images": images} if images else {}
        try:
            whole = {"text": sample.prompt + sample.text} if sample.prompt + sample.text else {}
            found = self._reads(return_tensors="pt", **whole, **more)
            num = self._reads(text=sample.prompt, **more)["input_ids"] if sample.prompt else []
        except Exception as error:  # of many kinds: a text with other places than images
            raise OutlierMergeError(
                f"the processor does not take the sample {shown(sample.text)}: {error}"
            ) from error
        num_prompt = len(num[0] if len(num) and not isinstance(num[0], int) else num)
        return {key: value.to(self._loaded.device) for key, value in found.items()}, num_prompt

    def run(self, sample: Sample) -> tuple[Any, dict[str, Any], int]:
        """Return the model's output for a sample, what it was given, and the prompt's tokens.

        Raises:
            OutlierMergeError: it fails.
        """
        given, num_prompt = self.inputs(sample)
        try:
            return self._loaded.module(**given), given, num_prompt
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            said = str(error).partition("\n")[0]
            if isinstance(error, AttributeError):  # of an input that is None
                said = f"it was given {' and '.join(given)} alone ({said})"
            config: Any = self._loaded.module.config
            num = given["input_ids"].shape[-1]
            if num > (most := getattr(config.get_text_config(), "max_position_embeddings", num)):
                said = (
                    f"it has {num} tokens, and the model is made for {most}: give "
                    f"{argument('max_tokens', most)}"
                )
            raise OutlierMergeError(
                f"{shown(self._loaded.reference)}: the model fails on the sample "
                f"{shown(sample.text)}: {said}"
            ) from error
