"""The contract of a merge method: a pure function on blocks that declares needs and parameters."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from outliermerge.arguments import checked, named
from outliermerge.display import short_repr
from outliermerge.errors import SpecError, suggest
from outliermerge.methods.context import Context
from outliermerge.methods.kernel_call import Kernel
from outliermerge.methods.parameter import Parameter, declared
from outliermerge.methods.prepared import Prepared
from outliermerge.methods.statistics.base import Statistic
from outliermerge.optional import INSTALL_TORCH

if TYPE_CHECKING:
    from torch import Tensor

Space: TypeAlias = Literal["delta", "weight", "both", "merged"]
Cut: TypeAlias = Literal["element", "row", "tensor"]
BaseAs: TypeAlias = Literal["reference", "first", "model"]
COARSEST_FIRST: tuple[Cut, ...] = ("tensor", "row", "element")


@dataclass(frozen=True)
class MergeMethod:
    """A merge method: its function and everything that the planner must know about it.

    Attributes:
        name: the name of the method in a spec.
        function: maps a block (M, E) to (E,). It may return a pair of that and a dict of values for
            the manifest. Integer tensors in the dict are counts, which are added up over blocks;
            other values describe the whole tensor.
        space: what the function gets. `weight`: weights. `delta`: task vectors; the base is added
            to the result. `both`: as `delta`, and the base's block as keyword `base`. `merged`: the
            task vector that another method has merged; such a method is a modifier.
        cut: how finely a tensor may be split: `element` (M, E), `row` (M, R, C), `tensor`.
        needs: statistics of a whole tensor or model. The function gets each as a keyword, a float64
            tensor.
        parameters: the method's parameters by YAML name.
        auxiliary: keywords for further tensors of each model, such as Fisher diagonals, which have
            the names and shapes of its weights. The function gets each as a block like the models'
            (M, …). Those of `prepared` come last.
        prepared: those that are taken whole and have shapes of their own, such as Gram matrices.
        takes_context: whether the function has the keyword `context`.
        takes_deltas: whether it is a modifier with the keyword `deltas`, the task vectors (M, …).
        workspace: returns, for a number of sources (the models, and the base where it uses one),
            the largest number of tensors of a block's size that the function allocates.
        idempotent: tells, for resolved parameters (per-model ones as tuples), whether the merge of
            equal models is the same model.
        check: raises ValueError for resolved parameters that contradict one another.
        min_models, max_models: the least and greatest number of models it takes; None is no limit.
        paper: the source of the method, such as an arXiv id.
        kernel: a fused kernel that computes the same on backends that have it, or None.
        base_as: what a spec's base model is to a method on weights. `reference`: only the reference
            for names and shapes. `first`: needed, and the first model. `model`: one of the models,
            whether the spec lists it among them or not.
        with_base: the method that takes its place if there is a base model, or None.
        variant: returns the method that takes its place for some resolved parameters, or None. That
            method gets the parameters that it declares.
        for_tensor: returns the method that takes its place for some tensors, or None; it gets the
            parameters that it declares.
        in_float64: whether it computes in float64 whatever the spec's dtype is.
    """

    name: str
    function: Callable[..., Any]
    space: Space
    cut: Cut
    needs: Mapping[str, Statistic]
    parameters: Mapping[str, Parameter]
    auxiliary: tuple[str, ...]
    prepared: Mapping[str, Prepared]
    takes_context: bool
    takes_deltas: bool
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
    for_tensor: Callable[[Context], MergeMethod | None]
    in_float64: bool

    def __repr__(self) -> str:
        return short_repr(
            self,
            f"{self.name}: {self.summary}",
            f"parameters: {', '.join(self.parameters) or 'none'}",
        )

    def __reduce__(self) -> tuple[Callable[[str], MergeMethod], tuple[str]]:
        return import_method, (self.path,)

    @property
    def path(self) -> str:
        """Where it can be imported from: `package.module:function`."""
        return f"{self.function.__module__}:{self.function.__qualname__}"

    @property
    def in_blocks(self) -> tuple[str, ...]:
        """The auxiliary tensors that the function gets block by block."""
        return self.auxiliary[: len(self.auxiliary) - len(self.prepared)]

    @property
    def uses_base(self) -> bool:
        """Whether the method works on differences from a base model."""
        return self.space in ("delta", "both")

    @property
    def needs_base(self) -> bool:
        """Whether there must be a base model."""
        return self.uses_base or self.base_as == "first"

    def of(self, parameters: Mapping[str, Any], context: Context) -> MergeMethod:
        """Return the method that merges a tensor with these resolved parameters."""
        return self.for_tensor(context) or self.variant(parameters) or self

    def computes_in(self, dtype: str) -> str:
        """Return the dtype of its arithmetic where the spec asks for one."""
        return "float64" if self.in_float64 else dtype

    @property
    def summary(self) -> str:
        return self.documentation.split("\n", 1)[0]

    @property
    def documentation(self) -> str:
        return inspect.cleandoc(self.function.__doc__ or self.name)

    @property
    def spec_documentation(self) -> str:
        """The documentation for authors of specs: of the arguments only what a spec can set."""
        text, _, arguments = self.documentation.partition("\n\nArgs:\n")
        arguments, _, rest = arguments.partition("\n\n")
        words = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", arguments, re.MULTILINE))
        named = ((one.name, words.get(one.python_name)) for one in self.parameters.values())
        lines = [f"    {name}: {said}" for name, said in named if said]
        parts = [text, "\n".join(["Parameters:", *lines]) if lines else "", rest]
        return "\n\n".join(filter(None, parts))

    def num_passes(self, parameters: Mapping[str, Any]) -> int:
        """Return how often a tensor is usually read, for resolved parameters."""
        return 1 + max((need.num_passes(parameters) for need in self.needs.values()), default=0)

    def resolve(
        self, num_models: int, given: Mapping[str, Any], *, of: int | None = None
    ) -> dict[str, Any]:
        """Return all parameters by YAML name, per-model ones as tuples of num_models values.

        Args:
            num_models: how many models have the tensor.
            given: the values by name.
            of: how many models are merged, where some lack the tensor.

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
            value = value.tolist() if hasattr(value, "tolist") else value  # numpy, torch
            several = isinstance(value, (list, tuple)) and parameter.per_model
            try:
                if several and len(value) != num_models:
                    raise ValueError(f"found {len(value)} values, expected {num_models}")
                checked = [parameter.check(item) for item in (value if several else [value])]
                parameter.check_count(checked[0], num_models if of is None else of)
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
        """Apply the method to a block; parameters that are not given have their defaults.

        Args:
            block: task vectors or weights, shape (M, …).
            **given: the needs, auxiliary tensors, `base` and `context` that the method declares,
                and any parameters.
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


@named
def _never(parameters: Mapping[str, Any]) -> bool:
    return False


@named
def _accept(parameters: Mapping[str, Any]) -> None:
    return None


@named
def _itself(parameters: Mapping[str, Any]) -> MergeMethod | None:
    return None


@named
def _for_all(context: Context) -> MergeMethod | None:
    return None


@named
def _usual_workspace(num_sources: int) -> int:
    return 5 * num_sources + 4  # measured for the methods of this package


@checked
def merge_method(
    *,
    space: Space,
    cut: Cut = "element",
    needs: Mapping[str, Statistic] | None = None,
    auxiliary: tuple[str, ...] = (),
    prepared: Mapping[str, Prepared] | None = None,
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
    for_tensor: Callable[[Context], MergeMethod | None] = _for_all,
    in_float64: bool = False,
) -> Callable[[Callable[..., Any]], MergeMethod]:
    """Make a merge method from a function on blocks.

    The function's keywords are the declared needs and the method's parameters. Each parameter has a
    default and is annotated `float`, `int`, `bool`, `str` or `PerModel`, or `Annotated[…,
    Interval(ge=…, le=…)]` for a range.

    Args:
        space: `delta` for task vectors (the base is added back), `both` for task vectors and the
            base, `weight` for weights, `merged` for a modifier of the merged task vector.
        cut: `element`, `row` or `tensor`: how finely a tensor may be split.
        needs: the statistics that the function needs, by keyword.
        auxiliary: keywords for further tensors that each model has besides its weights.
        prepared: keywords for those that are taken whole, with what is made of them.
        workspace: returns how many tensors of a block's size the function allocates, for a number
            of sources.
        idempotent: tells for given parameters whether the merge of equal models is the same model.
        check: raises ValueError for parameters that contradict one another.
        min_models: the fewest models it takes.
        max_models: the most models it takes, or None.
        paper: the source of the method, such as an arXiv id.
        kernel: a fused kernel that computes the same; torch computes where there is none.
        name: as in a spec; the function's by default.
        base_as: what a base model is to a method on weights; see MergeMethod.
        with_base: the method that takes its place where there is a base model.
        variant: returns the method that takes its place for resolved parameters, or None.
        for_tensor: returns the method that takes its place for some tensors, or None.
        in_float64: whether it computes in float64 whatever the spec's dtype is, as a plan says.

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
        further = (*auxiliary, *(prepared or {}))
        given = {"need": [*(needs or {})], "auxiliary tensor": [*further]}
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
        for word, kinds in ((space, get_args(Space)), (cut, get_args(Cut))):
            if word not in kinds:
                raise TypeError(f"{function.__name__}: found {word!r}, expected {', '.join(kinds)}")
        if space == "merged" and (needs or further):
            raise TypeError(f"{function.__name__}: a modifier has neither needs nor auxiliaries")
        if kernel is not None and (further or space == "merged"):
            raise TypeError(f"{function.__name__}: a kernel takes only the models and the base")
        others = {one for wanted in given.values() for one in wanted} | {"context"}
        others |= {"deltas"} if space == "merged" else set()
        parameters = [
            declared(function, keyword) for keyword in keywords if keyword.name not in others
        ]
        return MergeMethod(
            name=name or function.__name__,
            function=function,
            space=space,
            cut=cut,
            needs=dict(needs or {}),
            auxiliary=further,
            prepared=dict(prepared or {}),
            takes_context="context" in names,
            takes_deltas=space == "merged" and "deltas" in names,
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
            for_tensor=for_tensor,
            in_float64=in_float64,
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
        way_out = f". {INSTALL_TORCH}" if error.name == "torch" else ""
        raise SpecError(
            f"method {path!r}: no module {error.name!r} can be imported{way_out}"
        ) from error
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
