"""Adds up statistics of a model's modules while it runs over samples.

Sums are float64. Products of one sample's inputs are float32, as the model's own are.

Shape suffixes: T tokens, C columns (inputs), E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from outliermerge.calibration.data import Sample
from outliermerge.calibration.experts import Note, watched
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
        num_inputs: how many each of them has; of experts how many at most.
        parameters: the module's own parameters whose Fisher information is summed, by their
            tensors' names.
        turned: whether the tensor is stored as (inputs, outputs).
        packed: the module's parameter that holds the matrices of experts; "" for a linear layer.
        num_experts: how many these are.
    """

    module: nn.Module
    inputs: str | None
    num_inputs: int
    parameters: Mapping[str, nn.Parameter]
    turned: bool = False
    packed: str = ""
    num_experts: int = 0

    def num_bytes(self, kinds: Sequence[str]) -> int:
        """Return the memory of its sums, and of gradients."""
        size = self.num_inputs if self.inputs else 0
        total = 8 * size * size if "gram" in kinds else 0
        total += 8 * size if "mean" in kinds else 0
        total *= max(1, self.num_experts)
        # Sums in float64, a gradient and its square in float32.
        return total + sum(16 * one.numel() for one in self.parameters.values())


def units_of(loaded: Loaded, kinds: Sequence[str]) -> list[Unit]:
    """Return the modules of a model that are measured, in its order.

    Experts of one tensor are made to compute one after the other, so that their inputs can be seen.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    shared: dict[int, int] = {}
    for module in loaded.module.modules():
        for parameter in module.parameters(recurse=False):
            shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    by_id = {id(one): loaded.names.get(name) for name, one in loaded.module.named_parameters()}
    found, taken = list[Unit](), set[int]()
    sees_inputs = not {"gram", "mean"}.isdisjoint(kinds)
    for module in loaded.module.modules():
        own = {}
        for parameter in module.parameters(recurse=False):
            name = by_id.get(id(parameter))
            if "fisher" in kinds and name and id(parameter) not in taken:
                own[name] = parameter
            taken.add(id(parameter))
        for each, parameter in module.named_parameters(recurse=False):
            name = by_id.get(id(parameter))
            if not sees_inputs or name is None or shared[id(parameter)] > 1:
                continue
            if each == "weight" and type(module) in (torch.nn.Linear, Conv1D):
                turned = type(module) is Conv1D
                num_inputs = parameter.shape[0 if turned else 1]
                found.append(Unit(module, name, num_inputs, own, turned))
                own = {}
            elif parameter.ndim == 3 and "expert" in name:
                num_experts, *sizes = parameter.shape
                found.append(
                    Unit(module, name, max(sizes), own, packed=each, num_experts=num_experts)
                )
                own = {}
        if own:
            found.append(Unit(module, None, 0, own))
    choose: Any = getattr(loaded.module, "set_experts_implementation", None)
    if choose is not None and any(unit.packed for unit in found):
        choose("eager")
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
        tensors: by kind and the tensor's name, as `gram/NAME`; counts, as `tokens/NAME`, for
            experts one of each; and `turned/NAME` for experts, whose first dimension are inputs.
        num_samples, num_tokens: what was read.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    num_samples: int = 0
    num_tokens: int = 0

    def add(self, name: str, value: Tensor, shape: Sequence[int], at: Any = ...) -> None:
        """Add a value to a sum, or to a place in it, in float64."""
        import torch

        if name not in self.tensors:
            self.tensors[name] = torch.zeros([*shape], dtype=torch.float64, device=value.device)
        self.tensors[name][at] += value

    def turned(self, unit: Unit) -> bool:
        """Tell whether a module's tensor is stored as (inputs, outputs)."""
        return unit.turned or bool(self.tensors.get(f"turned/{unit.inputs}", 0))

    def without_tokens(self, unit: Unit) -> list[int | str]:
        """Return the experts that were given no tokens; "all" where no inputs were seen."""
        counts = self.tensors.get(f"tokens/{unit.inputs}")
        return ["all"] if counts is None else (counts == 0).nonzero().flatten().tolist()

    def means(self, unit: Unit, kinds: Sequence[str]) -> dict[tuple[str, str], Tensor]:
        """Return the statistics of a module, by kind and name, in float32."""
        import torch

        found: dict[tuple[str, str], Tensor] = {}
        name = unit.inputs
        counts = self.tensors.get(f"tokens/{name}", torch.ones(()))
        for kind in kinds:
            if kind == "fisher":
                for own, parameter in unit.parameters.items():
                    total = self.tensors.get(f"fisher/{own}")
                    mean = parameter.new_zeros(()).double() if total is None else total
                    mean = (mean / max(1, self.num_samples)).float().cpu()
                    found[kind, own] = mean.expand(parameter.shape).contiguous()
            elif name is not None and (f"{kind}/{name}" in self.tensors or not unit.packed):
                shape = [unit.num_inputs] * (2 if kind == "gram" else 1)
                total = self.tensors.get(f"{kind}/{name}", torch.zeros(shape))
                num = counts.clamp(min=1).view(-1, *[1] * len(shape)) if unit.packed else counts
                found[kind, name] = (total / num).float().cpu().contiguous()
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
        ends = [
            watched(unit.module, unit.packed, self._note(unit))
            if unit.packed
            else unit.module.register_forward_pre_hook(self._hook(unit)).remove
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
            for end in reversed(ends):
                end()

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

    def _note(self, unit: Unit) -> Note:
        """Return what adds up the inputs of a packed tensor's experts."""

        def note(expert: int, inputs_TC: Tensor, turned: bool) -> None:
            name, num = unit.inputs, unit.num_experts
            x_TC = inputs_TC.float()
            size = x_TC.shape[1]
            if "gram" in self._kinds:
                self.sums.add(f"gram/{name}", x_TC.mT @ x_TC, (num, size, size), expert)
            if "mean" in self._kinds:
                self.sums.add(f"mean/{name}", x_TC.double().sum(0), (num, size), expert)
            self.sums.add(f"tokens/{name}", x_TC.new_tensor(float(len(x_TC))), (num,), expert)
            self.sums.tensors[f"turned/{name}"] = x_TC.new_tensor(float(turned))

        return note

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
        if logits.ndim == 2 and not 0 <= int(labels[0]) < logits.shape[-1]:
            raise OutlierMergeError(
                f"the sample {shown(sample.text)} has the label {int(labels[0])}, expected a class "
                f"from 0 to {logits.shape[-1] - 1}"
            )
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
