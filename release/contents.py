"""What is in a wheel and in an sdist: nothing is missing, nothing is there that does not belong."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

SUFFIX = r"\.(?:cpython-\d+\w*|abi3)[\w-]*\.so"
KERNELS = ("_kernels", "_kernels_v3", "_kernels_v4")
# Made by the build itself.
_OF_WHEEL = (
    r"outliermerge-[\w.]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|top_level\.txt"
)
_OF_WHEEL += r"|licenses/LICENSE)"
_OF_SDIST = r"PKG-INFO|setup\.cfg|outliermerge\.egg-info/.*"
_BESIDE = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "SECURITY.md"}
_BESIDE |= {"pyproject.toml", "setup.py"}
_SHIPPED = re.compile(r"merge_configs/[^/]+\.yaml|evals/[^/]+\.yaml|evals/tasks/[^/]+/.+")
_CLONE_ONLY = re.compile("tiny|minilm")  # needs models or data that only a clone can make


def read_members(path: Path) -> dict[str, bytes]:
    """Return the files of a wheel, or of an sdist without its top folder, by name."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if name[-1] != "/"}
    found = {}
    with tarfile.open(path) as sdist:
        for member in sdist.getmembers():
            file = sdist.extractfile(member) if member.isfile() else None
            if file is not None:
                found[member.name.partition("/")[2]] = file.read()
    return found


def wrong_wheel(
    names: Iterable[str], tracked: Iterable[str], *, kernels: Iterable[str]
) -> list[str]:
    """Return what is missing in a wheel, or too much in it.

    Args:
        names: of the files in the wheel.
        tracked: the files of the clone.
        kernels: the names of the compiled modules that it must have.
    """
    own = {re.sub(SUFFIX, ".so", name) for name in names if not re.fullmatch(_OF_WHEEL, name)}
    wanted = {name for name in tracked if name.startswith("outliermerge/")}
    wanted -= {name for name in wanted if name.endswith((".c", ".h"))}
    wanted |= {_place(name) for name in _shipped(tracked)}
    wanted |= {f"outliermerge/engines/{name}.so" for name in kernels}
    return _differences("the wheel", own, wanted)


def wrong_sdist(names: Iterable[str], tracked: Iterable[str]) -> list[str]:
    """Return what is missing in an sdist, or too much in it."""
    own = {name for name in names if not re.fullmatch(_OF_SDIST, name)}
    wanted = {name for name in tracked if name.startswith("outliermerge/") or name in _BESIDE}
    return _differences("the sdist", own, wanted | _shipped(tracked))


def foreign_paths(members: dict[str, bytes], paths: Iterable[str]) -> list[str]:
    """Return the files that name a folder of the machine that they were built on."""
    return [
        f"{name} holds the path {path}"
        for name, data in members.items()
        for path in paths
        if path.encode() in data
    ]


def _shipped(tracked: Iterable[str]) -> set[str]:
    """Return the clone's specs, suites and tasks that are in the package."""
    fitting = {name for name in tracked if _SHIPPED.fullmatch(name)} | {"evals/data/README.md"}
    return {name for name in fitting if not _CLONE_ONLY.search(name)}


def _place(name: str) -> str:
    """Return where a shipped file is in the package."""
    folder, _, rest = name.partition("/")
    kind = {"merge_configs": "specs", "evals": "suites"}[folder]
    return f"outliermerge/shipped/{kind}/{rest}"


def _differences(what: str, own: set[str], wanted: set[str]) -> list[str]:
    return [
        *(f"{what} lacks {name}" for name in sorted(wanted - own)),
        *(f"{what} has {name}, which does not belong there" for name in sorted(own - wanted)),
    ]
