"""The parameters of a method, as a spec sets them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from outliermerge.errors import quoted, suggest
from outliermerge.methods.contract import MergeMethod
from outliermerge.spec.settings import Setting, SettingError, SpecPath, all_of, parse_setting


def parameter_settings(
    raw: Mapping[str, Any], method: MergeMethod, path: SpecPath, *, of_model: bool
) -> dict[str, Setting]:
    """Return the settings of a method's parameters.

    Args:
        of_model: they are of one model, which has only some of them.

    Raises:
        SettingError: a parameter is unknown, or a value is wrong; it holds all mistakes.
    """
    read = partial(_setting, method=method, path=path, of_model=of_model)
    return dict(zip(raw, all_of(partial(read, *item) for item in raw.items()), strict=True))


def _setting(
    name: str, value: object, method: MergeMethod, path: SpecPath, *, of_model: bool
) -> Setting:
    parameter = method.parameters.get(name)
    if parameter is None:
        known = [p.name for p in method.parameters.values() if p.per_model or not of_model]
        raise SettingError(
            (*path, name),
            f"{method.name} has no parameter {quoted(name)}. {suggest(name, known)}",
            at_key=True,
        )
    if of_model and not parameter.per_model:
        raise SettingError(
            (*path, name),
            f"{name!r} is of the whole merge, not of one model: "
            "move it to the top-level `parameters`",
            at_key=True,
        )
    return parse_setting(value, parameter, (*path, name))
