"""The page of a report: one file that needs no other files and no network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

from outliermerge.analysis.extras import require

SCRIPTS = (
    "math.js",
    "plots.js",
    "views.js",
    "merge.js",
    "layers.js",
    "tables.js",
    "lead.js",
    "main.js",
)


def plotly_script() -> str:
    """Return plotly.js from the package plotly.

    Raises:
        OutlierMergeError: plotly is not installed.
    """
    script: str = require("plotly.offline", "a report").get_plotlyjs()
    return script


def render_page(title: str, payload: Mapping[str, Any], *, kind: str = "Weights of") -> bytes:
    """Return the HTML page that draws a payload; `kind` says of what, before the title.

    The page runs only scripts whose hashes it lists, and requests nothing else. So a tensor's name
    cannot become code, and no picture or font is fetched.
    """
    scripts = [plotly_script(), "\n".join(_resource(name) for name in SCRIPTS)]
    # plotly sets styles on what it draws, so styles cannot be listed by hash.
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "KIND": html.escape(kind),
        "TITLE": html.escape(title),
        "POLICY": policy,
        "STYLE": _resource("page.css"),
        "DATA": embedded_json(payload),
        "PLOTLY": _packed(scripts[0]),
        "SCRIPT": scripts[1],
    }
    template = _resource("page.html")
    page = re.sub(r"\{\{([A-Z]+)\}\}", lambda match: parts[match[1]], template)
    # File names may contain bytes that are not valid text.
    return page.encode("utf-8", "replace")


def embedded_json(payload: Mapping[str, Any]) -> str:
    r"""Return JSON that cannot end the HTML script element in which it is embedded.

    >>> embedded_json({"name": "</script>é"})
    '{"name":"\\u003c/script>\\u00e9"}'
    """
    text = json.dumps(payload, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c")


@lru_cache(maxsize=1)  # packing it takes most of the time of a small page
def _packed(script: str) -> str:
    """Return plotly.js two fifths as large; the page unpacks it to the script of that hash."""
    return base64.b64encode(gzip.compress(script.encode(), 6, mtime=0)).decode()


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _resource(name: str) -> str:
    return resources.files("outliermerge.analysis.report").joinpath(name).read_text("utf-8")
