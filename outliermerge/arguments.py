"""Checks of what the library's functions are given, before they read anything."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, cast

from outliermerge.errors import ArgumentError, argument, nearest, quoted

_Called = TypeVar("_Called", bound=Callable[..., Any])
_DEVICE = re.compile(r"cpu|auto|cuda(:[0-9]{1,9})?")
_Kind = tuple[Callable[[Any], bool], str]


ONE_OR_MORE = "str | Path | Sequence[str | Path]"
"""The annotation of an argument that is a list, or one of what may be in it."""


class _Named:
    """A function that shows its name, and no address, where it is a default."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __call__(self, *positional: Any, **keywords: Any) -> Any:
        return self._function(*positional, **keywords)

    def __repr__(self) -> str:
        return self._function.__name__

    def __reduce__(self) -> str:  # it travels by its name, as functions do
        return self._function.__name__


def named(function: _Called) -> _Called:
    """Let help() show a function by its name where it is the default of an argument."""
    return cast(_Called, _Named(function))


@named
def nothing(*news: object) -> None:
    """Do nothing: the default of a function that is called with news."""


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_one(value: object) -> bool:
    return isinstance(value, (str, Path))


def _is_settings(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    return all(isinstance(key, str) and _is_list(each) for key, each in value.items())


_SWITCH: _Kind = lambda value: isinstance(value, bool), "True or False"
_FUNCTION: _Kind = callable, "a function"
_PATH: _Kind = lambda value: value is None or isinstance(value, (str, Path)), "a path"
_NUMBER: _Kind = (
    lambda value: isinstance(value, Real) and not isinstance(value, bool),
    "a number",
)
_WHOLE: _Kind = (
    lambda value: isinstance(value, Integral) and not isinstance(value, bool),
    "a whole number",
)
_COUNT: _Kind = lambda value: _WHOLE[0](value) and value >= 0, "a whole number of 0 or more"
_POSITIVE: _Kind = lambda value: _WHOLE[0](value) and value >= 1, "a whole number of 1 or more"
# An argument of one name is of one kind in all functions.
_KINDS: dict[str, _Kind] = {
    **dict.fromkeys(
        (
            "kernels",
            "overwrite",
            "fresh",
            "by_layer",
            "allow_non_finite",
            "load_check",
            "load",
            "lenient",
            "routing",
            "factor_embeddings",
            "partial",
            "randomized",
            "core",
        ),
        _SWITCH,
    ),
    **dict.fromkeys(("on_progress", "on_waiting", "on_total", "executor"), _FUNCTION),
    **dict.fromkeys(("output", "folder", "png"), _PATH),
    **dict.fromkeys(("t", "filter", "small"), _NUMBER),
    **dict.fromkeys(("seed", "num_points", "num_values"), _WHOLE),
    "rate": _NUMBER,
    "by": (lambda value: value in ("model", "layer", "tensor"), "model, layer or tensor"),
    "fisher": (lambda value: value in ("empirical", "sampled"), "empirical or sampled"),
    **dict.fromkeys(("steps", "batch", "max_tokens", "save_every"), _POSITIVE),
    "samples": (lambda value: value is None or _POSITIVE[0](value), "a whole number of 1 or more"),
    "rank": (lambda value: value is None or _WHOLE[0](value), "a whole number"),
    **dict.fromkeys(
        ("energy", "error"), (lambda value: value is None or _NUMBER[0](value), "a number")
    ),
    "threads": _COUNT,
    "device": (
        lambda value: isinstance(value, str) and _DEVICE.fullmatch(value) is not None,
        "cpu, cuda, cuda:N or auto",
    ),
    "memory": (
        lambda value: value is None or isinstance(value, (int, float, str)),
        'a size such as "2GiB"',
    ),
    "models": (_is_list, "a list"),
    **dict.fromkeys(
        ("include", "exclude"),
        (
            lambda value: _is_list(value) and all(isinstance(part, str) and part for part in value),
            "a list of parts of names",
        ),
    ),
    "noises": (lambda value: _is_list(value) and all(map(_NUMBER[0], value)), "a list of numbers"),
    "rename": (lambda value: value is None or isinstance(value, str), "a text"),
    "name": (lambda value: isinstance(value, str), "a text"),
    "settings": (
        lambda value: value is None or _is_settings(value),
        'lists of values by key, such as {"t": [2, 3]}',
    ),
}


def wrong(name: str, value: object, expected: str) -> ArgumentError:
    """Return the error of an argument that is not what is expected.

    >>> print(wrong("threads", "2", "a whole number of 0 or more"))
    threads: found '2', expected a whole number of 0 or more
    """
    return ArgumentError(f"{argument(name)}: found {quoted(value)}, expected {expected}")


def check_arguments(given: Mapping[str, object]) -> None:
    """Refuse arguments, by name, that are of a wrong kind.

    Raises:
        ArgumentError: one is.
    """
    for name, value in given.items():
        is_right, expected = _KINDS.get(name, (lambda value: True, ""))
        if not is_right(value):
            raise wrong(name, value, expected)


def unexpected(function: str, name: str, known: Sequence[str]) -> TypeError:
    """Return the error of a keyword that a function does not have, as Python says it.

    >>> unexpected("run", "memroy", ["memory", "threads"])
    TypeError("run() got an unexpected keyword argument 'memroy'. Did you mean 'memory'? It takes \
memory, threads.")
    """
    near = nearest(name, known)
    meant = f" Did you mean {near!r}?" if near else ""
    takes = f"It takes {', '.join(known)}." if known else "It takes none."
    return TypeError(f"{function}() got an unexpected keyword argument {name!r}.{meant} {takes}")


def checked(called: _Called) -> _Called:
    """Let a function or a class refuse arguments of a wrong kind, and say which it takes."""
    check = _checker(called.__name__, inspect.signature(called))
    if isinstance(called, type):
        init: Callable[..., None] = called.__init__  # type: ignore[misc]

        @functools.wraps(init)
        def begin(self: object, *positional: Any, **keywords: Any) -> None:
            check(positional, keywords)
            init(self, *positional, **keywords)

        called.__init__ = begin  # type: ignore[misc]
        return called

    @functools.wraps(called)
    def call(*positional: Any, **keywords: Any) -> Any:
        check(positional, keywords)
        return called(*positional, **keywords)

    return cast(_Called, call)


def _checker(
    function: str, signature: inspect.Signature
) -> Callable[[Sequence[Any], Mapping[str, Any]], None]:
    known = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    is_needed = {p.name: p.default is p.empty for p in signature.parameters.values()}
    by_place = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    or_one = [n for n, p in signature.parameters.items() if str(p.annotation) == ONE_OR_MORE]
    takes_more = len(known) < len(signature.parameters)

    def check(positional: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        for name in keywords if not takes_more else ():
            if name not in known:
                raise unexpected(function, name, known)
        if len(positional) > len(by_place):
            if by_place == ["models"]:
                raise TypeError(f"{function}() takes a list of models: write [a, b]")
            raise TypeError(
                f"{function}() takes {len(by_place)} argument(s) without a name "
                f"({', '.join(by_place)}), found {len(positional)}: name the others, such as "
                f"{known[len(by_place)]}=…"
            )
        try:
            given = signature.bind(*positional, **keywords).arguments
        except TypeError as error:
            raise TypeError(f"{function}(): {error}") from None
        for name, value in given.items():
            if value is None and name in _KINDS and is_needed[name]:
                raise wrong(name, value, _KINDS[name][1])
        check_arguments({n: v for n, v in given.items() if not (n in or_one and _is_one(v))})

    return check
