"""What a merge method is: a pure function on blocks, with its needs and parameters declared."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Le, Lt

from outliermerge.checkpoint.sources import DType
from outliermerge.errors import SpecError, suggest
from outliermerge.methods.kernel_call import CODES, Kernel
from outliermerge.methods.statistics.base import Statistic

if TYPE_CHECKING:
    from torch import Tensor

Space: TypeAlias = Literal["delta", "weight"]
Cut: TypeAlias = Literal["element", "row", "tensor"]

_PER_MODEL = "one value per model"
PerModel: TypeAlias = Annotated[Any, _PER_MODEL]
"""Annotates a parameter that every model may set for itself; it arrives with shape (M,)."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method, as its signature declares it.

    Attributes:
        name: as written in YAML (`lambda_` in Python is `lambda` there).
        type: float, int, bool or str; of one value where the parameter is per model.
        default: the value where the spec gives none.
        per_model: whether each model may have its own.
        bounds: the range of valid values.
    """

    name: str
    type: type
    default: Any
    per_model: bool
    bounds: Interval

    @property
    def python_name(self) -> str:
        return self.name + "_" if self.name == "lambda" else self.name

    @property
    def range(self) -> str:
        """The range in words, empty where every value is valid."""
        limits = (
            ("≥", self.bounds.ge), (">", self.bounds.gt),
            ("≤", self.bounds.le), ("<", self.bounds.lt),
        )  # fmt: skip
        return ", ".join(f"{sign} {limit}" for sign, limit in limits if limit is not None)

    def check(self, value: object) -> Any:
        """Return one value in the parameter's type.

        Raises:
            ValueError: it is of another type or out of range; the message says what is expected.
        """
        kind = {float: "a number", int: "an integer", bool: "true or false", str: "a text"}
        converted: Any = value
        if self.type in (float, int) and isinstance(value, str):
            try:  # YAML reads 1e-3 as a text; mergekit takes it as a number
                converted = float(value)
            except ValueError:
                pass
        if self.type is float and isinstance(converted, int) and not isinstance(converted, bool):
            try:
                converted = float(converted)
            except OverflowError:
                converted = math.inf
        if self.type is int and isinstance(converted, float) and converted.is_integer():
            converted = int(converted)
        if type(converted) is not self.type:
            raise ValueError(f"found {value!r}, expected {kind[self.type]}")
        number: Any = converted
        if self.type is float and not math.isfinite(number):
            raise ValueError(f"found {value!r}, expected a finite number")
        low = (self.bounds.ge is not None and not number >= self.bounds.ge) or (
            self.bounds.gt is not None and not number > self.bounds.gt
        )
        high = (self.bounds.le is not None and not number <= self.bounds.le) or (
            self.bounds.lt is not None and not number < self.bounds.lt
        )
        if low or high:
            raise ValueError(f"found {value!r}, expected {kind[self.type]} {self.range}")
        return converted


@dataclass(frozen=True)
class MergeMethod:
    """A merge method: its function and everything the planner must know of it.

    Attributes:
        name: as in a spec.
        function: (M, E) → (E,), or a pair with a dict of values for the manifest: integer
            tensors are counts, added up over blocks; others are of the whole tensor.
        space: `delta` gets task vectors and has the base added back; `weight` gets weights.
        cut: how finely a tensor may be split: `element` (M, E), `row` (M, R, C), `tensor`.
        needs: whole-tensor statistics; each arrives as a float64 keyword tensor.
        parameters: by YAML name.
        idempotent: tells, for resolved parameters (per-model ones as tuples), whether models
            that are all equal come back as they are.
        check: raises ValueError for resolved parameters that do not go together.
        min_models, max_models: how many models it takes.
        paper: where it is from.
        kernel: a fused kernel that computes the same, on backends that have it, or None.
    """

    name: str
    function: Callable[..., Any]
    space: Space
    cut: Cut
    needs: Mapping[str, Statistic]
    parameters: Mapping[str, Parameter]
    idempotent: Callable[[Mapping[str, Any]], bool]
    check: Callable[[Mapping[str, Any]], None]
    min_models: int
    max_models: int | None
    paper: str
    kernel: Kernel | None

    def __reduce__(self) -> tuple[Callable[[str], MergeMethod], tuple[str]]:
        return import_method, (f"{self.function.__module__}:{self.function.__qualname__}",)

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
            **given: the declared needs, and any parameters.
        """
        needs = {name: given.pop(name) for name in self.needs}
        resolved = self.resolve(len(block), given)
        return self.function(block, **needs, **self.arguments(resolved, like=block))

    def arguments(self, resolved: Mapping[str, Any], *, like: Tensor) -> dict[str, Any]:
        """Return resolved parameters as the function takes them, on a block's device."""
        return {
            parameter.python_name: like.new_tensor(resolved[name])
            if parameter.per_model
            else resolved[name]
            for name, parameter in self.parameters.items()
        }


@dataclass(frozen=True)
class Task:
    """How one tensor is merged, whoever computes it.

    Attributes:
        parameters: resolved for this tensor, per-model ones as tuples.
        dtypes: as the sources' values are stored.
        out_dtype: as the result is stored.
        compute_dtype: of the arithmetic.
        shape: of the whole tensor.
    """

    method: MergeMethod
    parameters: Mapping[str, Any]
    dtypes: tuple[DType, ...]
    out_dtype: DType
    compute_dtype: str
    shape: tuple[int, ...]

    @property
    def is_delta(self) -> bool:
        return self.method.space == "delta"

    @property
    def num_models(self) -> int:
        return len(self.dtypes) - self.is_delta

    def fits_kernels(self, names: Container[str]) -> bool:
        """Tell whether a backend with kernels of these names computes it, by its dtypes too."""
        dtypes = {dtype.name for dtype in (*self.dtypes, self.out_dtype)}
        return (
            self.method.kernel is not None
            and self.method.kernel.name in names
            and self.compute_dtype == "float32"
            and dtypes <= CODES.keys()
        )


def _never(parameters: Mapping[str, Any]) -> bool:
    return False


def _accept(parameters: Mapping[str, Any]) -> None:
    return None


def merge_method(
    *,
    space: Space,
    cut: Cut = "element",
    needs: Mapping[str, Statistic] | None = None,
    idempotent: Callable[[Mapping[str, Any]], bool] = _never,
    check: Callable[[Mapping[str, Any]], None] = _accept,
    min_models: int = 1,
    max_models: int | None = None,
    paper: str = "",
    kernel: Kernel | None = None,
) -> Callable[[Callable[..., Any]], MergeMethod]:
    """Make a merge method of a function on blocks.

    The function's keywords are the declared needs and the method's parameters: annotated
    `float`, `int`, `bool`, `str` or `PerModel`, each with a default, and
    `Annotated[…, Interval(ge=…, le=…)]` for a range.

    Args:
        space: `delta` for task vectors (the base is added back), `weight` for weights.
        cut: `element`, `row` or `tensor`: how finely a tensor may be split.
        needs: whole-tensor statistics by keyword.
        idempotent: tells whether equal models come back unchanged with given parameters.
        check: raises ValueError for parameters that do not go together.
        min_models: the fewest models it takes.
        max_models: the most models it takes, or None.
        paper: where it is from.
        kernel: a fused kernel that computes the same; torch computes where there is none.

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
        declared = dict(needs or {})
        keywords = list(inspect.signature(function).parameters.values())[1:]
        for name in declared:
            if name not in [keyword.name for keyword in keywords]:
                raise TypeError(f"{function.__name__}: the need {name!r} is not a keyword of it")
            if space == "weight" and getattr(declared[name], "with_base", False):
                raise TypeError(f"{function.__name__}: {name!r} needs a base; weights have none")
        parameters = [
            _declared(function, keyword) for keyword in keywords if keyword.name not in declared
        ]
        return MergeMethod(
            name=function.__name__,
            function=function,
            space=space,
            cut=cut,
            needs=declared,
            parameters={parameter.name: parameter for parameter in parameters},
            idempotent=idempotent,
            check=check,
            min_models=min_models,
            max_models=max_models,
            paper=paper,
            kernel=kernel,
        )

    return decorate


def _declared(function: Callable[..., Any], keyword: inspect.Parameter) -> Parameter:
    where = f"{function.__name__}: parameter {keyword.name!r}"
    if keyword.kind is not inspect.Parameter.KEYWORD_ONLY or keyword.default is keyword.empty:
        raise TypeError(f"{where} must be keyword-only with a default")
    annotation = keyword.annotation
    if isinstance(annotation, str):
        annotation = eval(annotation, vars(sys.modules[function.__module__]))
    metadata: tuple[Any, ...] = ()
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata += tuple(more)
    per_model = _PER_MODEL in metadata
    kind = type(keyword.default) if per_model else annotation
    if kind not in (float, int, bool, str) or type(keyword.default) is not kind:
        raise TypeError(f"{where} must be float, int, bool, str or PerModel, like its default")
    bounds: dict[str, Any] = {}
    for item in metadata:
        for bound, kinds in (("ge", (Ge, Interval)), ("gt", (Gt, Interval)),
                             ("le", (Le, Interval)), ("lt", (Lt, Interval))):  # fmt: skip
            if isinstance(item, kinds) and getattr(item, bound) is not None:
                bounds[bound] = getattr(item, bound)
    return Parameter(
        name=keyword.name.removesuffix("_"),
        type=kind,
        default=keyword.default,
        per_model=per_model,
        bounds=Interval(**bounds),
    )


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
