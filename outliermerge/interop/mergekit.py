"""The methods in mergekit's own table, so that its configs can name them.

mergekit reads the models, resolves the parameters (of each model, by filter, by layer) and writes
the output. A method gets one tensor of all models at a time, on mergekit's device and in its dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from annotated_types import Interval
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    PerInputValues,
    TensorGroup,
)

from outliermerge.errors import SpecError
from outliermerge.methods.contract import MergeMethod, import_method
from outliermerge.methods.parameter import Parameter
from outliermerge.methods.table import METHODS
from outliermerge.tensors import merge_tensors

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "outliermerge_"


def register() -> None:
    """Put all methods into mergekit's table, with `outliermerge_` before their names.

    Those that mergekit does not have can be named without it, too; what mergekit has stays as it
    is. A second call does nothing.
    """
    for name, method in METHODS.items():
        for one in (name, PREFIX + name):
            if one not in names():
                registry.register(MethodInMergekit(one, method))


def register_own(path: str) -> None:
    """Put a method that `package.module:function` names into mergekit's table, under that name.

    Raises:
        SpecError: it cannot be imported or is not a merge method.
    """
    method = import_method(path)
    if path not in names():
        registry.register(MethodInMergekit(path, method))


def names() -> set[str]:
    """Return the names in mergekit's table."""
    return {method.spec.name for method in registry.registered_methods()}


@dataclass(frozen=True)
class CheckedParameter(ParameterSpec):  # type: ignore[misc]  # mergekit has no type information
    """A parameter that checks its values itself, as mergekit plans, with its own message.

    Attributes:
        method: the method's name, for the message.
        check: returns a value in the parameter's type, or raises ValueError.
    """

    method: str = ""
    check: Callable[[object], Any] = lambda value: value

    def validate(self, value: Any) -> Any:
        """Return a value in the parameter's type, or raise SpecError."""
        try:
            return self.check(value)
        except ValueError as error:
            raise SpecError(f"{self.method}: parameter {self.name!r}: {error}") from error


class MethodInMergekit(GroupMergeMethod):  # type: ignore[misc]  # mergekit has no type information
    """A method of this package as one of mergekit's."""

    def __init__(self, name: str, method: MergeMethod) -> None:
        self._method = method
        parameters = [*method.parameters.values()]
        if method.takes_context:
            parameters.append(Parameter("seed", int, 0, per_model=False, bounds=Interval()))
        arxiv = re.search(r"arXiv (\d+\.\d+)", method.paper)
        self.spec = MergeMethodSpec(
            name=name,
            pretty_name=f"{method.name} of outliermerge",
            reference_url=f"https://arxiv.org/abs/{arxiv[1]}" if arxiv else None,
            contract=_contract(method),
            parameters=tuple(_parameter(name, parameter) for parameter in parameters),
        )

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Raise SpecError if these models, or this base, are not for this method."""
        if base_id is not None and self.spec.contract.base == BasePolicy.FORBIDDEN:
            raise SpecError(
                f"{self.spec.name} takes no base model, and mergekit would merge it as one more: "
                "leave out `base_model`"
            )
        try:
            super().validate_inputs(input_ids, base_id, group_name=group_name)
        except ValueError as error:
            raise SpecError(f"{self.spec.name}: {error}") from error

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor of all models."""
        given = {
            name: value.values_for(group.non_base) if isinstance(value, PerInputValues) else value
            for name, value in parameters.items()
        }
        return merge_tensors(
            [entry.tensor for entry in group.non_base],
            base=group.base.tensor if group.base else None,
            method=self._method,
            name=group.metadata.name or "",
            **given,
        )


def _parameter(method: str, parameter: Parameter) -> CheckedParameter:
    return CheckedParameter(
        parameter.name,
        Any,
        ParameterScope.NON_BASE if parameter.per_model else ParameterScope.SHARED,
        default=parameter.default,
        method=method,
        check=parameter.check,
    )


def _contract(method: MergeMethod) -> InputContract:
    """Return which models mergekit may give to a method."""
    if method.needs_base:
        policy = BasePolicy.REQUIRED
    elif method.with_base or method.base_as == "model":
        policy = BasePolicy.OPTIONAL
    else:
        policy = BasePolicy.FORBIDDEN
    # Is the base one of the models that a method counts?
    counted = "non_base" if method.base_as == "reference" else "inputs"
    limits = {f"min_{counted}": method.min_models, f"max_{counted}": method.max_models}
    return InputContract(base=policy, **limits)
