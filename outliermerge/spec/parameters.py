"""The parameters of a method, as a spec sets them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from outliermerge.errors import nearest, quoted, suggest
from outliermerge.methods.contract import MergeMethod
from outliermerge.spec.settings import Setting, SettingError, SpecPath, parse_setting
from outliermerge.spec.text import Mistakes


def parameter_settings(
    raw: Mapping[str, object],
    method: MergeMethod,
    path: SpecPath,
    mistakes: Mistakes,
    *,
    of_model: bool,
) -> dict[str, Setting]:
    """Return the settings of a method's parameters.

    Args:
        mistakes: takes up unknown parameters and wrong values.
        of_model: they are of one model, which has only some of them.
    """
    settings: dict[str, Setting] = {}
    for name, value in raw.items():
        where = (*path, name)
        parameter = method.parameters.get(name)
        if parameter is None or (of_model and not parameter.per_model):
            mistakes.add(_no_parameter(name, value, method, where, of_model=of_model))
            continue
        read = partial(parse_setting, value, parameter, where, mistakes.add)
        setting = mistakes.attempt(read, None)
        if setting is not None:
            settings[name] = setting
    return settings


class _AnyValue:
    """Stands in for a parameter, to tell whether a value has the form of a setting."""

    def check(self, value: object) -> object:
        return value


def _no_parameter(
    name: str, value: object, method: MergeMethod, path: SpecPath, *, of_model: bool
) -> SettingError:
    """Return the error for a parameter that the method does not have, or not for one model.

    mergekit passes over it if its value has the form of a setting.
    """
    try:
        parse_setting(value, _AnyValue(), path, lambda unknown_key: None)
        passed_over: SpecPath | None = path
    except SettingError:
        passed_over = None
    if name in method.parameters:
        said = (
            f"{name!r} is of the whole merge, not of one model: "
            "move it to the top-level `parameters`"
        )
        return SettingError(path, said, at_key=True, passed_over=passed_over, meant=name)
    known = [p.name for p in method.parameters.values() if p.per_model or not of_model]
    return SettingError(
        path,
        f"{method.name} has no parameter {quoted(name)}. {suggest(name, known)}",
        at_key=True,
        passed_over=passed_over,
        meant=nearest(name, known),
    )
