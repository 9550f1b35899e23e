"""Imports optional packages when a function needs them."""

from __future__ import annotations

import importlib
from typing import Any

from outliermerge.errors import OutlierMergeError


def require(module: str, what: str) -> Any:
    """Return a module that the extra `weights` installs.

    Args:
        module: the module's name.
        what: what needs the module, for the message.

    Raises:
        OutlierMergeError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise OutlierMergeError(f"{what} needs {package}: pip install {package}") from error
