"""The parameters of a method, as its function's signature declares them."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Le, Lt

_PER_MODEL = "one value per model"
_LARGEST = (2 - 2.0**-23) * 2.0**127  # of float32, in which merges compute

MOST_STEPS = 1_000_000
"""The most steps or directions that a parameter may ask for."""

AT_MOST_MODELS = "at most as many as there are models"
"""Annotates a number of models, which is at most that of the models of the merge."""

PerModel: TypeAlias = Annotated[Any, _PER_MODEL]
"""Annotates a parameter that each model may set for itself; the function gets shape (M,)."""

Compat: TypeAlias = Literal["none", "mergekit"]
"""Whether a method computes what is right, or what mergekit computes in its place."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: the name in YAML (`lambda_` in Python is `lambda` there).
        type: float, int, bool or str; for a per-model parameter the type of each value.
        default: the value if the spec gives none.
        per_model: whether each model may have its own.
        bounds: the range of valid values.
        choices: the valid texts; empty where every text is valid.
        python_name: the function's keyword.
        counts_models: whether it is a number of models, at most those of the merge.
    """

    name: str
    type: type
    default: Any
    per_model: bool
    bounds: Interval
    choices: tuple[str, ...] = ()
    python_name: str = ""
    counts_models: bool = False

    @property
    def range(self) -> str:
        """The range in words, empty where every value is valid."""
        if self.choices:
            return " or ".join(self.choices)
        limits = (
            ("≥", self.bounds.ge), (">", self.bounds.gt),
            ("≤", self.bounds.le), ("<", self.bounds.lt),
        )  # fmt: skip
        said = [f"{sign} {limit}" for sign, limit in limits if limit is not None]
        return ", ".join([*said, *(["≤ the number of models"] if self.counts_models else [])])

    def check(self, value: object) -> Any:
        """Return one value, converted to the parameter's type.

        Raises:
            ValueError: it has another type or is out of range; the message says what is expected.
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
        if self.type is bool and type(value) in (int, float) and value in (0, 1):
            converted = bool(value)  # as mergekit takes it
        if type(converted) is not self.type:
            raise ValueError(f"found {value!r}, expected {kind[self.type]}")
        if self.choices and converted not in self.choices:
            raise ValueError(f"found {value!r}, expected {self.range}")
        number: Any = converted
        if self.type is float and not math.isfinite(number):
            raise ValueError(f"found {value!r}, expected a finite number")
        if self.type is float and abs(number) > _LARGEST:
            raise ValueError(f"found {value!r}, expected a number of at most {_LARGEST:.3g}")
        low = (self.bounds.ge is not None and not number >= self.bounds.ge) or (
            self.bounds.gt is not None and not number > self.bounds.gt
        )
        high = (self.bounds.le is not None and not number <= self.bounds.le) or (
            self.bounds.lt is not None and not number < self.bounds.lt
        )
        if low or high:
            raise ValueError(f"found {value!r}, expected {kind[self.type]} {self.range}")
        return converted

    def check_count(self, value: Any, num_models: int) -> None:
        """Raise ValueError for a number of models that is larger than that of a merge."""
        if self.counts_models and value > num_models:
            raise ValueError(
                f"found {value} with {num_models} model(s), expected at most as many as there are "
                "models"
            )


def declared(function: Callable[..., Any], keyword: inspect.Parameter) -> Parameter:
    """Return the parameter that a keyword of a method's function declares.

    Raises:
        TypeError: it has no default, or a type that parameters cannot have.
    """
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
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    kind = type(keyword.default) if per_model or choices else annotation
    if kind not in (float, int, bool, str) or type(keyword.default) is not kind:
        raise TypeError(
            f"{where} must be float, int, bool, str, a Literal or PerModel, like its default"
        )
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
        choices=choices,
        python_name=keyword.name,
        counts_models=AT_MOST_MODELS in metadata,
    )
