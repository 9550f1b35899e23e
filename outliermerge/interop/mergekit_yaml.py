"""The command `outliermerge-mergekit`: mergekit-yaml with this package's methods in its table."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.errors import (
    ArgumentError,
    OutlierMergeError,
    SpecError,
    quoted,
    shown,
    suggest,
)
from outliermerge.spec.inert import INERT_PARAMETERS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run mergekit-yaml with arguments, by default those of the command line.

    Returns:
        1 or 2 after a mistake in what this package adds. In all other cases mergekit ends the
        process as it does without this package.
    """
    try:
        command = copy.copy(_mergekit_yaml())
        command.callback = _after_check(command.callback)
        command.main(arguments, prog_name="outliermerge-mergekit")
    except OutlierMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (SpecError, ArgumentError)) else 1
    return 0


def _mergekit_yaml() -> Any:
    """Return mergekit's command; this package's methods are then in mergekit's table."""
    try:
        from mergekit.scripts import run_yaml

        from outliermerge.interop import mergekit
    except ImportError as error:
        raise OutlierMergeError(
            f"mergekit cannot be used: {error}. Install it: pip install 'mergekit>=0.1.5'"
        ) from error
    mergekit.register()
    return run_yaml.main


def _after_check(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a command calls, to be called when its config has been checked."""

    @functools.wraps(callback)
    def check_and_run(*, config_file: str, **others: Any) -> Any:
        _check_names(Path(config_file))
        return callback(config_file=config_file, **others)

    return check_and_run


def _check_names(path: Path) -> None:
    """Raise SpecError for names in a config that mergekit would stumble over or pass over.

    mergekit ignores parameters that a method does not have, and so misspelt ones.
    """
    import yaml
    from mergekit.merge_methods import registry

    from outliermerge.interop.mergekit import MethodInMergekit, names, register_own

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"{shown(path)}: {error}") from error
    name = config.get("merge_method") if isinstance(config, Mapping) else None
    if not isinstance(name, str):
        return  # mergekit says what is wrong
    if ":" in name:
        register_own(name)
    elif name not in names():
        raise SpecError(
            f"{shown(path)}: unknown merge method {quoted(name)}. {suggest(name, names())} "
            "A method of your own is named package.module:function."
        )
    spec = registry.get(name).spec
    if isinstance(registry.get(name), MethodInMergekit):
        valid = {parameter.name for parameter in spec.parameters}
        for given in _parameters(config):
            if given not in valid and given not in INERT_PARAMETERS:
                raise SpecError(
                    f"{shown(path)}: {name} has no parameter {quoted(given)}. "
                    f"{suggest(str(given), valid)}"
                )


def _parameters(config: Any) -> Iterator[Any]:
    """Yield the names of all parameters that are set anywhere in a config."""
    if isinstance(config, list):
        for item in config:
            yield from _parameters(item)
    elif isinstance(config, Mapping):
        for key, value in config.items():
            if key == "parameters" and isinstance(value, Mapping):
                yield from value
            else:
                yield from _parameters(value)


if __name__ == "__main__":
    sys.exit(main())
