"""How far elements are from 0: the statistics of min-σ besides the standard deviation.

Shape suffixes: M models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from outliermerge.methods.statistics.base import Pass, Scope, StandardDeviation, scope_of
from outliermerge.methods.statistics.trim import Search, Select, num_searches, sampled_first

GAUSSIAN = 1.4826
"""σ of a Gaussian divided by the median of its magnitudes."""


@dataclass(frozen=True)
class MedianDeviation:
    """1.4826 times the median magnitude of each model's elements, shape (M,).

    The median is found exactly, as by `Trim`; of an even number of elements it is the lower one of
    the two in the middle. It is about 0, not about the mean.

    Attributes:
        scope_parameter: the method's parameter that says whether the elements are those of one
            tensor or of all merged tensors of a model; empty if `scope` says so.
    """

    depends_on: tuple[str, ...] = ()
    scope: Scope = "tensor"
    scope_parameter: str = ""
    kernels: ClassVar = ("histogram",)

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        return num_searches(self, parameters)

    def num_ranks(self, num_models: int, parameters: Mapping[str, Any]) -> int:
        return num_models

    def start(
        self, num_models: int, num_elements: int, parameters: Mapping[str, Any]
    ) -> Pass | list[Any]:
        if num_elements == 0:
            return [0.0] * num_models
        ranks = (num_elements // 2 + 1,) * num_models
        whole = Search(num_models, ranks, (0.0,) * num_models)
        sampled = scope_of(self, parameters) == "tensor"
        return _Median(sampled_first(whole, num_elements) if sampled else whole)


class _Median(Select):
    def again(self, search: Search) -> Select:
        return _Median(search)

    def finish(self) -> Pass | list[Any]:
        found = super().finish()
        return [GAUSSIAN * median for median in found[0]] if isinstance(found, list) else found


@dataclass(frozen=True)
class Deviation:
    """The standard deviation, or what `scale: mad` puts in its place, shape (M,)."""

    depends_on: tuple[str, ...] = ("scale",)
    scope: Scope = "tensor"
    scope_parameter: str = ""
    kernels: ClassVar = ("moments", "histogram")

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        return self._chosen(parameters).num_passes(parameters)

    def num_ranks(self, num_models: int, parameters: Mapping[str, Any]) -> int:
        return num_models if parameters["scale"] == "mad" else 0

    def start(
        self, num_models: int, num_elements: int, parameters: Mapping[str, Any]
    ) -> Pass | list[Any]:
        return self._chosen(parameters).start(num_models, num_elements, parameters)

    def _chosen(self, parameters: Mapping[str, Any]) -> MedianDeviation | StandardDeviation:
        kind = MedianDeviation if parameters["scale"] == "mad" else StandardDeviation
        return kind(scope=scope_of(self, parameters))
