"""Packages that only some of the functions need, imported when they do."""

from __future__ import annotations

import importlib
from typing import Any

from outliermerge.errors import OutlierMergeError


def require(module: str, what: str) -> Any:
    """Return a module of the extra `weights`.

    Args:
        module: its name.
        what: needs it, for the message.

    Raises:
        OutlierMergeError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise OutlierMergeError(
            f"{what} needs {package}: pip install 'outliermerge[weights]'"
        ) from error
