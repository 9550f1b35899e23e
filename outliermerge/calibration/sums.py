"""Adds up statistics of a model's modules while it runs over samples.

Sums are float64. Products of one sample's inputs are float32, as the model's own are.

Shape suffixes: T tokens, C columns (inputs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from outliermerge.calibration.data import Sample
from outliermerge.calibration.model import Feeder, Loaded
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.rng import uniform

if TYPE_CHECKING:
    from torch import Tensor, nn

Fisher: TypeAlias = Literal["empirical", "sampled"]


@dataclass(frozen=True)
class Unit:
    """A module, and what is measured of it.

    Attributes:
        inputs: the name of the tensor whose inputs are summed; None for a module that is no linear
            layer, or shares its weight with another.
        num_inputs: how many each of them has.
        parameters: the module's own parameters whose Fisher information is summed, by their
            tensors' names.
    """

    module: nn.Module
    inputs: str | None
    num_inputs: int
    parameters: Mapping[str, nn.Parameter]

    def num_bytes(self, kinds: Sequence[str]) -> int:
        """Return the memory of its sums, and of gradients."""
        size = self.num_inputs if self.inputs else 0
        total = 8 * size * size if "gram" in kinds else 0
        total += 8 * size if "mean" in kinds else 0
        # Sums in float64, a gradient and its square in float32.
        return total + sum(16 * one.numel() for one in self.parameters.values())


def units_of(loaded: Loaded, kinds: Sequence[str]) -> list[Unit]:
    """Return the modules of a model that are measured, in its order."""
    import torch

    shared: dict[int, int] = {}
    for module in loaded.module.modules():
        for parameter in module.parameters(recurse=False):
            shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    by_id = {id(one): loaded.names.get(name) for name, one in loaded.module.named_parameters()}
    found, taken = [], set[int]()
    for module in loaded.module.modules():
        own = {}
        for parameter in module.parameters(recurse=False):
            name = by_id.get(id(parameter))
            if "fisher" in kinds and name and id(parameter) not in taken:
                own[name] = parameter
            taken.add(id(parameter))
        inputs, num_inputs = None, 0
        if type(module) is torch.nn.Linear and shared[id(module.weight)] == 1:
            inputs, num_inputs = by_id.get(id(module.weight)), module.in_features
        if {"gram", "mean"}.isdisjoint(kinds):
            inputs = None
        if own or inputs:
            found.append(Unit(module, inputs, num_inputs, own))
    return found


def in_groups(units: Sequence[Unit], kinds: Sequence[str], memory_bytes: int) -> list[list[Unit]]:
    """Divide modules into groups whose sums fit in memory; one that does not is alone."""
    groups: list[list[Unit]] = []
    free = 0
    for unit in units:
        needed = unit.num_bytes(kinds)
        if not groups or needed > free:
            groups.append([])
            free = memory_bytes
        groups[-1].append(unit)
        free -= needed
    return groups


@dataclass
class Sums:
    """The sums of some modules over the samples so far.

    Attributes:
        tensors: by kind and the tensor's name, as `gram/NAME`; and counts, as `tokens/NAME`.
        num_samples, num_tokens: what was read.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    num_samples: int = 0
    num_tokens: int = 0

    def add(self, name: str, value: Tensor, shape: Sequence[int]) -> None:
        """Add a value to a sum, in float64."""
        import torch

        if name not in self.tensors:
            self.tensors[name] = torch.zeros([*shape], dtype=torch.float64, device=value.device)
        self.tensors[name] += value

    def means(self, unit: Unit, kinds: Sequence[str]) -> dict[tuple[str, str], Tensor]:
        """Return the statistics of a module, by kind and name, in float32."""
        import torch

        found: dict[tuple[str, str], Tensor] = {}
        name = unit.inputs
        for kind in kinds:
            if kind == "fisher":
                for own, parameter in unit.parameters.items():
                    total = self.tensors.get(f"fisher/{own}")
                    mean = parameter.new_zeros(()).double() if total is None else total
                    mean = (mean / max(1, self.num_samples)).float().cpu()
                    found[kind, own] = mean.expand(parameter.shape).contiguous()
            elif name is not None:
                shape = [unit.num_inputs] * (2 if kind == "gram" else 1)
                total = self.tensors.get(f"{kind}/{name}", torch.zeros(shape))
                num = float(self.tensors.get(f"tokens/{name}", torch.ones(())))
                found[kind, name] = (total / max(1.0, num)).float().cpu().contiguous()
        return found


class Summing:
    """Adds the statistics of samples to sums.

    Args:
        loaded: the model.
        feeder: makes its inputs.
        units: the modules that are measured.
        kinds: what is measured.
        fisher: whose labels the Fisher information is of: the data's, or drawn by the model.
        seed: of drawn labels.
        sums: what was added up before.
    """

    def __init__(
        self,
        loaded: Loaded,
        feeder: Feeder,
        units: Sequence[Unit],
        kinds: Sequence[str],
        *,
        fisher: Fisher,
        seed: int,
        sums: Sums,
    ) -> None:
        self._loaded, self._feeder, self._units, self._kinds = loaded, feeder, units, kinds
        self._fisher, self._seed, self.sums = fisher, seed, sums
        self._last: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Have the modules add up their inputs, and take gradients of their parameters only."""
        handles = [
            unit.module.register_forward_pre_hook(self._hook(unit))
            for unit in self._units
            if unit.inputs is not None
        ]
        for parameter in self._loaded.module.parameters():
            parameter.requires_grad_(False)
        for unit in self._units:
            for parameter in unit.parameters.values():
                parameter.requires_grad_(True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, sample: Sample, number: int) -> None:
        """Add a sample.

        Raises:
            OutlierMergeError: the model fails, or predicts nothing that Fisher information is of.
        """
        import torch

        with torch.set_grad_enabled("fisher" in self._kinds):
            output, given, num_prompt = self._feeder.run(sample)
        self._last = None
        self.sums.num_samples += 1
        ids = given.get("input_ids", torch.zeros(1, 0, dtype=torch.int64))
        self.sums.num_tokens += ids.shape[-1]
        if "fisher" in self._kinds:
            total: Any = self._likelihood(output, ids, num_prompt, sample, number)
            total.backward()
            for unit in self._units:
                for name, parameter in unit.parameters.items():
                    if parameter.grad is not None:
                        square = parameter.grad.float().square()
                        self.sums.add(f"fisher/{name}", square, square.shape)
                        parameter.grad = None

    def _hook(self, unit: Unit) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            name, inputs = unit.inputs, arguments[0]
            x_TC = inputs.detach().reshape(-1, unit.num_inputs).float()
            if "gram" in self._kinds:
                # Layers beside one another, such as q, k and v, get the same inputs.
                if self._last is None or self._last[0] is not inputs:
                    self._last = inputs, x_TC.mT @ x_TC
                product_CC = self._last[1]
                self.sums.add(f"gram/{name}", product_CC, product_CC.shape)
            if "mean" in self._kinds:
                self.sums.add(f"mean/{name}", x_TC.double().sum(0), x_TC.shape[1:])
            self.sums.add(f"tokens/{name}", x_TC.new_tensor(float(len(x_TC))), ())

        return hook

    def _likelihood(
        self, output: Any, ids: Tensor, num_prompt: int, sample: Sample, number: int
    ) -> Tensor:
        """Return the log-likelihood of the labels: next tokens, or the class."""
        import torch

        logits, labels = getattr(output, "logits", None), None
        if logits is None:
            raise OutlierMergeError(
                f"{shown(self._loaded.reference)}: gives no logits, so that there is no likelihood "
                "whose Fisher information could be measured"
            )
        if logits.ndim == 2:
            if sample.label is not None:
                labels = torch.tensor([sample.label], device=logits.device)
            what = "a class as its `label`"
        else:
            if not _predicts_next(self._loaded.module):
                raise OutlierMergeError(
                    f"{shown(self._loaded.reference)}: does not predict next tokens, so that texts "
                    "have no likelihood whose Fisher information could be measured"
                )
            first = max(0, num_prompt - 1)
            logits, labels, what = logits[0, first:-1], ids[0, first + 1 :], "two tokens"
        if self._fisher == "sampled":
            labels = self._drawn(logits, number)
        if labels is None or not len(labels):
            raise OutlierMergeError(f"the sample {shown(sample.text)} has not {what}")
        total: Tensor = logits.float().log_softmax(-1).gather(-1, labels[:, None]).sum()
        return total

    def _drawn(self, logits: Tensor, number: int) -> Tensor:
        """Return labels that the model draws."""
        import torch

        with torch.no_grad():
            ends = logits.double().softmax(-1).cumsum(-1)
            drawn = uniform(self._seed, f"fisher\n{number}", 0, len(logits), logits.device)
            places = torch.searchsorted(ends, drawn[:, None] * ends[:, -1:], right=True)
            return places[:, 0].clamp(max=logits.shape[-1] - 1)


def _predicts_next(module: nn.Module) -> bool:
    """Tell whether a model's logits for tokens are of the next ones."""
    return any(word in type(module).__name__ for word in ("CausalLM", "LMHead", "Conditional"))


def norm_of(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm of tensors together."""
    return math.sqrt(math.fsum(float(one.double().square().sum()) for one in tensors.values()))
