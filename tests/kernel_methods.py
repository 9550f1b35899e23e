"""Methods that have a kernel or a need in one backend and none in another."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

import outliermerge
from outliermerge.methods.kernel_call import Kernel, KernelCall
from outliermerge.methods.statistics.base import StandardDeviation


def scaled_by(name: str) -> Kernel:
    return Kernel(
        name, lambda parameters, needs: KernelCall(name, vectors=([parameters["scale"]] * 2,))
    )


def scaled_sum(name: str) -> Any:
    @outliermerge.merge_method(space="delta", kernel=scaled_by(name))
    def function(deltas_ME: Tensor, *, scale: float = 0.5) -> Tensor:
        """Add task vectors, each times a scale."""
        return (deltas_ME * scale).sum(0)

    return function


c_only, triton_only, unknown = (
    dataclasses.replace(scaled_sum(name), name=name)
    for name in ("c_only", "triton_only", "nobody's")
)
BY_NAME = {"c_only": c_only, "triton_only": triton_only, "unknown": unknown}


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest magnitude of each model; only torch measures it."""

    depends_on: tuple[str, ...] = ()
    threads: ClassVar[set[int]] = set()

    def num_passes(self, parameters: Any) -> int:
        return 1

    def start(self, num_models: int, num_elements: int, parameters: Any) -> Any:
        return LargestPass(num_models)


class LargestPass:
    chunks = None

    def __init__(self, num_models: int) -> None:
        self.found = [0.0] * num_models

    def measure(self, block_ME: Tensor) -> list[float]:
        Largest.threads.add(torch.get_num_threads())
        return block_ME.abs().amax(1).tolist()

    def add(self, share: list[float]) -> None:
        self.found = list(map(max, self.found, share))

    def finish(self) -> list[float]:
        return self.found


class OnGpusOnly(Largest):
    """A statistic that some other backend has kernels for."""

    kernels = ("largest_of_a_gpu",)


def by_largest(parameters: Any, needs: Any) -> KernelCall:
    return KernelCall("weighted_sum", vectors=([2.0 ** -round(x) for x in needs["largest"]],))


def measured(needs: dict[str, Any]) -> Any:
    def decorate(function: Any) -> Any:
        kernel = Kernel("weighted_sum", by_largest)
        return outliermerge.merge_method(space="delta", needs=needs, kernel=kernel)(function)

    return decorate


@measured({"largest": Largest()})
def by_torch(deltas_ME: Tensor, *, largest: Tensor) -> Tensor:
    """Add task vectors by powers of two that the largest magnitudes tell."""
    return (deltas_ME * 2.0 ** -largest.round().to(deltas_ME.dtype)[:, None]).sum(0)


@measured({"largest": Largest(), "sigma": StandardDeviation()})
def by_both(deltas_ME: Tensor, *, largest: Tensor, sigma: Tensor) -> Tensor:
    """The same, with a need that kernels measure."""
    return by_torch.function(deltas_ME, largest=largest)


@measured({"largest": OnGpusOnly()})
def by_gpus(deltas_ME: Tensor, *, largest: Tensor) -> Tensor:
    """The same, with a need that kernels of another backend measure."""
    return by_torch.function(deltas_ME, largest=largest)


def by_lengths(parameters: Any, needs: Any) -> KernelCall:
    lengths = [math.sqrt(row[i]) for i, row in enumerate(needs["gram"]) if i]
    return KernelCall("weighted_sum", vectors=([2.0 ** -round(length) for length in lengths],))


@outliermerge.merge_method(
    space="delta",
    needs={"gram": outliermerge.Gram(with_base=True)},
    kernel=Kernel("weighted_sum", by_lengths),
)
def by_gram(deltas_ME: Tensor, *, gram: Tensor) -> Tensor:
    """Add task vectors by powers of two that their lengths tell."""
    lengths = gram.diagonal()[1:].sqrt()
    return (deltas_ME * 2.0 ** -lengths.round().to(deltas_ME.dtype)[:, None]).sum(0)


MEASURED = {method.name: method for method in (by_torch, by_both, by_gpus)}
ALL = {method.name: method for method in (*BY_NAME.values(), *MEASURED.values(), by_gram)}
