"""Whether packages are installed that only some of the work needs, and what to say if not."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from outliermerge.errors import OutlierMergeError

INSTALL_TORCH = (
    "Install it: pip install torch --index-url https://download.pytorch.org/whl/cpu "
    "(for a GPU: pip install torch)"
)


def is_installed(module: str) -> bool:
    """Tell whether a module can be found; it is not imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def require_torch(what: str) -> None:
    """Refuse what needs torch, before it begins.

    Args:
        what: what needs torch, for the message.

    Raises:
        OutlierMergeError: torch is not installed.
    """
    if not is_installed("torch"):
        raise OutlierMergeError(f"{what} needs torch, which is not installed. {INSTALL_TORCH}")


def require_package(package: str, what: str, extra: str) -> None:
    """Refuse what needs a package, before it begins.

    Args:
        package: its name, and its module's.
        what: what needs it, for the message.
        extra: the extra of this package that brings it.

    Raises:
        OutlierMergeError: it is not installed.
    """
    if not is_installed(package):
        raise OutlierMergeError(
            f"{what} needs the package {package}, which is not installed: "
            f"pip install 'outliermerge[{extra}]'"
        )


def require_ray(what: str) -> None:
    """Refuse what needs Ray, before it begins.

    Args:
        what: what needs Ray, for the message.

    Raises:
        OutlierMergeError: Ray is not installed.
    """
    if not is_installed("ray"):
        raise OutlierMergeError(
            f"{what} needs Ray, which is not installed. Install it on every machine of the "
            "cluster: pip install 'outliermerge[ray]'"
        )


def require_search() -> None:
    """Refuse a search before it begins, where its packages are not installed.

    Raises:
        OutlierMergeError: they are not.
    """
    absent = [name for name in ("optuna", "cmaes") if not is_installed(name)]
    if absent:
        raise OutlierMergeError(
            f"a search needs {' and '.join(absent)}, not installed here: "
            "pip install 'outliermerge[search]'"
        )
