"""Of Sphinx, which `make docs` calls."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ["COLUMNS"] = "100"  # the width of the commands' help

import reference

import outliermerge

for public in outliermerge.__all__:  # which are imported when they are first used
    setattr(outliermerge, public, getattr(outliermerge, public))

project = "outliermerge"
author = "the authors of outliermerge"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "outliermerge"
html_show_sphinx = False
html_copy_source = False
autodoc_member_order = "alphabetical"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "show-inheritance": True}
# One signature a line: the long ones have a dozen arguments.
maximum_signature_line_length = 80


def insert_reference(app: Any, name: str, source: list[str]) -> None:
    """Put what comes from the code into the pages of the reference."""
    source[0] = reference.inserted(source[0])


def as_rst(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring, which is plain text with code in single backticks."""
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
    """Register both; docstrings are made ready before napoleon reads them (its priority is 500)."""
    app.connect("source-read", insert_reference)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
