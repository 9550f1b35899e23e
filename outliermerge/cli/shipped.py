"""The specs and suites that ship with the package, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from outliermerge.errors import SpecError, suggest

Kind = Literal["spec", "suite"]
_PACKAGE = Path(__file__).parents[1]
# In a wheel setup.py puts them into the package; in a clone they are in folders of its root.
_FOLDERS = {"spec": ("specs", "merge_configs"), "suite": ("suites", "evals")}


def shipped(kind: Kind) -> dict[str, Path]:
    """Return the files that ship, by their names without ending."""
    inside, in_clone = _FOLDERS[kind]
    folder = _PACKAGE / "shipped" / inside
    if not folder.is_dir():
        folder = _PACKAGE.parent / in_clone
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_file(word: str, kind: Kind) -> str:
    """Return the file that an argument names; a shipped one only where there is no such file.

    A word with a folder or an ending is a path and nothing else.

    Raises:
        SpecError: the word is neither a file nor a name.
    """
    if "/" in word or "\\" in word or "." in word or Path(word).exists():
        return word
    names = shipped(kind)
    if word not in names:
        raise SpecError(
            f"{word}: no such file, and no {kind} of that name ships. {suggest(word, names)}"
        )
    return str(names[word])


def summary(path: Path) -> str:
    """Return the first sentence of the comment that a file begins with."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words.append(line.lstrip("# ").strip())
    return " ".join(words).partition(". ")[0].rstrip(".:")
