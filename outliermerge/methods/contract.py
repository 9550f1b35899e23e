"""What a merge method is: a pure function on blocks, with its needs and parameters declared."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from outliermerge.errors import SpecError, suggest
from outliermerge.methods.kernel_call import Kernel
from outliermerge.methods.parameter import Parameter, declared
from outliermerge.methods.statistics.base import Statistic

if TYPE_CHECKING:
    from torch import Tensor

Space: TypeAlias = Literal["delta", "weight", "both", "merged"]
Cut: TypeAlias = Literal["element", "row", "tensor"]
BaseAs: TypeAlias = Literal["reference", "first", "model"]
COARSEST_FIRST: tuple[Cut, ...] = ("tensor", "row", "element")


@dataclass(frozen=True)
class MergeMethod:
    """A merge method: its function and everything the planner must know of it.

    Attributes:
        name: as in a spec.
        function: (M, E) → (E,), or a pair with a dict of values for the manifest: integer
            tensors are counts, added up over blocks; others are of the whole tensor.
        space: what it gets. `weight`: weights. `delta`: task vectors, and the base is added to
            what it returns. `both`: as `delta`, with the base's block as keyword `base`.
            `merged`: the task vector that another method has merged; it is a modifier.
        cut: how finely a tensor may be split: `element` (M, E), `row` (M, R, C), `tensor`.
        needs: statistics of a whole tensor or model; each arrives as a float64 keyword tensor.
        parameters: by YAML name.
        auxiliary: keywords of tensors beside each model's own, such as Fisher diagonals, in the
            model's names and shapes; each arrives as a block like the models' (M, …).
        takes_context: whether it has the keyword `context`.
        workspace: how many tensors of a block's size the function takes at most, besides the
            block, for a number of sources: the models, and the base where it uses one.
        idempotent: tells, for resolved parameters (per-model ones as tuples), whether models
            that are all equal come back as they are.
        check: raises ValueError for resolved parameters that do not go together.
        min_models, max_models: how many models it takes.
        paper: where it is from.
        kernel: a fused kernel that computes the same, on backends that have it, or None.
        base_as: what a spec's base model is to a method on weights. `reference`: nothing but the
            reference for names and shapes. `first`: needed, and the first model. `model`: one of
            the models, whether the spec lists it among them or not.
        with_base: the method that takes its place where there is a base model, or None.
        variant: returns the method that takes its place for resolved parameters, or None; it
            gets those that it declares.
    """

    name: str
    function: Callable[..., Any]
    space: Space
    cut: Cut
    needs: Mapping[str, Statistic]
    parameters: Mapping[str, Parameter]
    auxiliary: tuple[str, ...]
    takes_context: bool
    workspace: Callable[[int], int]
    idempotent: Callable[[Mapping[str, Any]], bool]
    check: Callable[[Mapping[str, Any]], None]
    min_models: int
    max_models: int | None
    paper: str
    kernel: Kernel | None
    base_as: BaseAs
    with_base: MergeMethod | None
    variant: Callable[[Mapping[str, Any]], MergeMethod | None]

    def __reduce__(self) -> tuple[Callable[[str], MergeMethod], tuple[str]]:
        return import_method, (self.path,)

    @property
    def path(self) -> str:
        """Where it can be imported from: `package.module:function`."""
        return f"{self.function.__module__}:{self.function.__qualname__}"

    @property
    def uses_base(self) -> bool:
        """Whether it works on differences from a base model."""
        return self.space in ("delta", "both")

    @property
    def needs_base(self) -> bool:
        """Whether there must be a base model."""
        return self.uses_base or self.base_as == "first"

    def of(self, parameters: Mapping[str, Any]) -> MergeMethod:
        """Return the method that merges a tensor with these resolved parameters."""
        return self.variant(parameters) or self

    @property
    def summary(self) -> str:
        return self.documentation.split("\n", 1)[0]

    @property
    def documentation(self) -> str:
        return inspect.cleandoc(self.function.__doc__ or self.name)

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        """Return how often a tensor is read as a rule, for resolved parameters."""
        return 1 + max((need.num_passes(parameters) for need in self.needs.values()), default=0)

    def resolve(self, num_models: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return every parameter by YAML name, per-model ones as tuples of num_models values.

        Raises:
            SpecError: an unknown name, or a value of the wrong type, count or range.
        """
        values = {name.removesuffix("_"): value for name, value in given.items()}
        for name in values:
            if name not in self.parameters:
                raise SpecError(
                    f"{self.name}: unknown parameter {name!r}. {suggest(name, self.parameters)}"
                )
        resolved: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            value = values.get(name, parameter.default)
            several = isinstance(value, (list, tuple)) and parameter.per_model
            try:
                if several and len(value) != num_models:
                    raise ValueError(f"found {len(value)} values, expected {num_models}")
                checked = [parameter.check(item) for item in (value if several else [value])]
            except ValueError as error:
                raise SpecError(f"{self.name}: parameter {name!r}: {error}") from error
            if parameter.per_model:
                resolved[name] = tuple(checked if several else checked * num_models)
            else:
                resolved[name] = checked[0]
        try:
            self.check(resolved)
        except ValueError as error:
            raise SpecError(f"{self.name}: {error}") from error
        return resolved

    def __call__(self, block: Tensor, **given: Any) -> Any:
        """Apply the method to a block; parameters not given have their defaults.

        Args:
            block: task vectors or weights, shape (M, …).
            **given: what it declares of needs, auxiliary tensors, `base` and `context`, and any
                parameters.
        """
        others = (*self.needs, *self.auxiliary, "base", "context")
        declared = {name: given.pop(name) for name in others if name in given}
        resolved = self.resolve(len(block), given)
        return self.function(block, **declared, **self.arguments(resolved, like=block))

    def arguments(self, resolved: Mapping[str, Any], *, like: Tensor) -> dict[str, Any]:
        """Return resolved parameters as the function takes them, on a block's device."""
        return {
            parameter.python_name: like.new_tensor(resolved[name])
            if parameter.per_model
            else resolved[name]
            for name, parameter in self.parameters.items()
        }


def _never(parameters: Mapping[str, Any]) -> bool:
    return False


def _accept(parameters: Mapping[str, Any]) -> None:
    return None


def _itself(parameters: Mapping[str, Any]) -> MergeMethod | None:
    return None


def _usual_workspace(num_sources: int) -> int:
    return 5 * num_sources + 4  # as methods of this package were measured


def merge_method(
    *,
    space: Space,
    cut: Cut = "element",
    needs: Mapping[str, Statistic] | None = None,
    auxiliary: tuple[str, ...] = (),
    workspace: Callable[[int], int] = _usual_workspace,
    idempotent: Callable[[Mapping[str, Any]], bool] = _never,
    check: Callable[[Mapping[str, Any]], None] = _accept,
    min_models: int = 1,
    max_models: int | None = None,
    paper: str = "",
    kernel: Kernel | None = None,
    name: str = "",
    base_as: BaseAs = "reference",
    with_base: MergeMethod | None = None,
    variant: Callable[[Mapping[str, Any]], MergeMethod | None] = _itself,
) -> Callable[[Callable[..., Any]], MergeMethod]:
    """Make a merge method of a function on blocks.

    The function's keywords are the declared needs and the method's parameters: annotated
    `float`, `int`, `bool`, `str` or `PerModel`, each with a default, and
    `Annotated[…, Interval(ge=…, le=…)]` for a range.

    Args:
        space: `delta` for task vectors (the base is added back), `both` for these and the base,
            `weight` for weights, `merged` for a modifier of what another method has merged.
        cut: `element`, `row` or `tensor`: how finely a tensor may be split.
        needs: statistics by keyword.
        auxiliary: keywords of tensors that each model has beside its own.
        workspace: tensors of a block's size that the function takes, for a number of sources.
        idempotent: tells whether equal models come back unchanged with given parameters.
        check: raises ValueError for parameters that do not go together.
        min_models: the fewest models it takes.
        max_models: the most models it takes, or None.
        paper: where it is from.
        kernel: a fused kernel that computes the same; torch computes where there is none.
        name: as in a spec; the function's by default.
        base_as: what a base model is to a method on weights; see MergeMethod.
        with_base: the method that takes its place where there is a base model.
        variant: returns the method that takes its place for resolved parameters, or None.

    Raises:
        TypeError: the signature does not fit these rules.

    >>> @merge_method(space="delta")
    ... def add(deltas, *, scale: float = 1.0):
    ...     "Add task vectors."
    ...     return deltas.sum(0) * scale
    >>> add.parameters["scale"].default
    1.0
    """

    def decorate(function: Callable[..., Any]) -> MergeMethod:
        keywords = list(inspect.signature(function).parameters.values())[1:]
        names = [keyword.name for keyword in keywords]
        given = {"need": [*(needs or {})], "auxiliary tensor": [*auxiliary]}
        given |= {"base": ["base"]} if space == "both" else {}
        for kind, wanted in given.items():
            for one in wanted:
                if one not in names:
                    raise TypeError(
                        f"{function.__name__}: the {kind} {one!r} is not a keyword of it"
                    )
        for one, need in (needs or {}).items():
            if space == "weight" and getattr(need, "with_base", False):
                raise TypeError(f"{function.__name__}: {one!r} needs a base; weights have none")
        if space == "merged" and (needs or auxiliary):
            raise TypeError(f"{function.__name__}: a modifier has neither needs nor auxiliaries")
        others = {one for wanted in given.values() for one in wanted} | {"context"}
        parameters = [
            declared(function, keyword) for keyword in keywords if keyword.name not in others
        ]
        return MergeMethod(
            name=name or function.__name__,
            function=function,
            space=space,
            cut=cut,
            needs=dict(needs or {}),
            auxiliary=auxiliary,
            takes_context="context" in names,
            workspace=workspace,
            parameters={parameter.name: parameter for parameter in parameters},
            idempotent=idempotent,
            check=check,
            min_models=min_models,
            max_models=max_models,
            paper=paper,
            kernel=kernel,
            base_as=base_as,
            with_base=with_base,
            variant=variant,
        )

    return decorate


def import_method(path: str) -> MergeMethod:
    """Return the merge method that `package.module:function` names.

    Raises:
        SpecError: it cannot be imported or is not a merge method.
    """
    module_name, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise SpecError(f"method {path!r}: no module {error.name!r} can be imported") from error
    except AttributeError as error:
        raise SpecError(f"method {path!r}: {module_name} has no {attribute!r}") from error
    except Exception as error:
        raise SpecError(f"method {path!r}: importing it failed: {error}") from error
    if not isinstance(found, MergeMethod):
        raise SpecError(
            f"method {path!r}: {attribute} is a {type(found).__name__}, expected a function "
            "decorated with @outliermerge.merge_method"
        )
    return found
