"""Of Sphinx, which `make docs` calls."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import reference

import outliermerge

for public in outliermerge.__all__:  # which are imported when they are first used
    setattr(outliermerge, public, getattr(outliermerge, public))

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Files of the repository that pages of the site take in.
PAGES = {
    ROOT / "README.md": DOCS / "index.md",
    ROOT / "CHANGELOG.md": DOCS / "changelog.md",
    ROOT / "CONTRIBUTING.md": DOCS / "contributing.md",
    ROOT / "SECURITY.md": DOCS / "security.md",
    **{
        ROOT / "evals" / name / "README.md": DOCS / "studies" / f"{name}.md"
        for name in ("family", "evidence", "weights", "peft")
    },
}

project = "outliermerge"
author = "the authors of outliermerge"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
smartquotes = False  # which would make a dash of the two before a flag
html_theme = "furo"
html_title = "outliermerge"
html_show_sphinx = False
html_copy_source = False
autodoc_member_order = "alphabetical"
autodoc_typehints = "none"
napoleon_use_ivar = True  # attributes have their place in the text of their class
autodoc_default_options = {"members": True, "show-inheritance": True}
# One signature a line: the long ones have a dozen arguments.
maximum_signature_line_length = 80


def insert_reference(app: Any, name: str, source: list[str]) -> None:
    """Put what comes from the code into the pages of the reference."""
    source[0] = within_site(reference.inserted(source[0]), DOCS / name, DOCS / name)


def of_included(app: Any, path: Path, page: str, content: list[str]) -> None:
    """Do the same for the links of a file that a page takes in."""
    # `page` has no folder here (myst_parser 5.2).
    content[0] = within_site(content[0], DOCS / path, DOCS / app.env.docname)


def within_site(text: str, file: Path, page: Path) -> str:
    """Return a text with its links as they are on the site, which has some files as pages."""

    def replaced(match: re.Match[str]) -> str:
        path, hash_sign, anchor = match[1].partition("#")
        target = Path(os.path.normpath(file.parent / path))
        target = PAGES.get(target, target)
        return f"]({os.path.relpath(target, page.parent)}{hash_sign}{anchor})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", replaced, text)


def as_rst(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring, which is plain text with code in single backticks."""
    # A list of arguments that goes on in the next line, which napoleon takes for another.
    text = re.sub(r"^( +)([\w, ]+,)\n\1(?=\w)", r"\1\2 ", "\n".join(lines), flags=re.M)
    lines[:] = text.split("\n")
    in_example = False
    for number, line in enumerate(lines):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        if not in_example:
            parts = re.split(r"(``.+?``|`[^`]+`)", line)
            lines[number] = "".join(map(_part, parts))


def _part(text: str) -> str:
    if text.startswith("``"):
        return text
    if text.startswith("`") and len(text) > 1:
        return f"`{text}`"
    return re.sub(r"(?<=\w)_(?!\w)|[|*]", r"\\\g<0>", text)


def setup(app: Any) -> None:
    """Register them; docstrings are made ready before napoleon reads them (its priority is 500)."""
    app.connect("source-read", insert_reference)
    app.connect("include-read", of_included)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
