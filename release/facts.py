"""What a release says of itself in several files: the version, the changelog, the citation."""

from __future__ import annotations

import re
from pathlib import Path


def version_of(root: Path) -> str:
    """Return the version in pyproject.toml."""
    found = re.search(r'^version = "(.+)"$', (root / "pyproject.toml").read_text(), re.MULTILINE)
    return found[1] if found else ""


def wrong_facts(root: Path, *, final: bool) -> list[str]:
    """Return what does not agree with the version in pyproject.toml.

    Args:
        final: also what must be so only when the release is made: the changelog's date.
    """
    version = version_of(root)
    problems = [] if re.fullmatch(r"\d+\.\d+\.\d+\w*", version) else [f"no version: {version!r}"]
    top = next(
        iter(re.findall(r"^## (.+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)), ""
    )
    name, _, date = top.partition(" ")
    if name != version:
        problems.append(f"CHANGELOG.md begins with {top!r}, expected {version}")
    elif final and not re.fullmatch(r"\(\d{4}-\d{2}-\d{2}\)", date):
        problems.append(f"CHANGELOG.md: {top!r} has no date: write '{version} (YYYY-MM-DD)'")
    cited = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    if not cited or cited[1] != version:
        problems.append(f"CITATION.cff says {cited and cited[1]}, expected {version}")
    return problems
