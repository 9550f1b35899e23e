"""What documents say of the code, read from the code: spec keys, methods and commands.

    python docs/reference.py            # print all
    python docs/reference.py --write    # put it into README.md and the pages of docs/reference/

What a page takes stands between `<!-- reference:NAME -->` and `<!-- /reference -->`.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

from outliermerge.cli.main import load, make_parser
from outliermerge.cli.terminal import value_text
from outliermerge.evaluation.paper import paper_rows
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.parameter import Parameter
from outliermerge.methods.table import EVERY, METHODS, MODIFIERS, WITH_DATA
from outliermerge.spec.moe import ExpertEntry, MoeDocument
from outliermerge.spec.schema import json_schema

DOCS = Path(__file__).parent
PAGES = (DOCS.parent / "README.md", *sorted((DOCS / "reference").glob("*.md")))
_IN_ONE_ROW = (
    "iso_c", "iso_cts", "tsv_m", "wudi", "swudi", "aswudi", "resmerge", "pcb", "consensus_ta",
    "metagpt",
)  # fmt: skip
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def _cell(text: str) -> str:
    """Return a text for a cell of a table, which may hold no bar and no line break."""
    return " ".join(text.split()).replace("|", "\\|")


def _table(*rows: list[str]) -> str:
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest))


def _linked(paper: str | None) -> str:
    return _ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\1)", _cell(paper or "–"))


def _setting(parameter: Parameter) -> str:
    each = "ᵐ" if parameter.per_model else ""
    return f"`{parameter.name}`{each} {value_text(parameter.default)}"


def methods_table() -> str:
    """One row a method; a parameter with ᵐ may be set for each model."""
    rows = [
        [
            f"`{method.name}`",
            _cell(method.summary).rstrip("."),
            ", ".join(map(_setting, method.parameters.values())) or "–",
            _linked(method.paper),
        ]
        for method in METHODS.values()
        if method.name not in _IN_ONE_ROW
    ]
    links = [f"[`{name}`](docs/reference/methods.md#{name})" for name in _IN_ONE_ROW]
    with_data = ", ".join(f"`{name}`" for name in WITH_DATA)
    said = f"From papers; not in mergekit. [With data](docs/howto/measure.md): {with_data}"
    rows.append([" ".join(links), said, "by method", "papers"])
    return _table(["`merge_method`", "what it does", "parameters and defaults", "from"], *rows)


def commands_table() -> str:
    """One row a command."""
    rows = [[f"`{name}`", _cell(command.summary)] for name, command in load().items()]
    return _table(["`outliermerge …`", "what it does"], *rows)


def methods() -> str:
    """Every method with its documentation and the ranges of its parameters."""
    return "\n\n".join(map(_method, EVERY.values()))


def modifiers() -> str:
    """Every modifier, as methods are documented."""
    return "\n\n".join(map(_method, MODIFIERS.values()))


def _method(method: MergeMethod) -> str:
    rows = [
        [
            f"`{parameter.name}`",
            value_text(parameter.default),
            _cell(parameter.range or parameter.type.__name__),
            "each model" if parameter.per_model else "the merge",
        ]
        for parameter in method.parameters.values()
    ]
    parts = [
        f"## `{method.name}`",
        f"```text\n{method.spec_documentation}\n```",
        _table(["parameter", "default", "range", "of"], *rows) if rows else "",
        f"From {_linked(method.paper)}." if method.paper else "",
    ]
    return "\n\n".join(filter(None, parts))


def spec_keys() -> str:
    """Every key of a spec with its form, by the JSON schema."""
    schema = json_schema()
    of_model = schema["$defs"]["ModelEntry"]
    parts = [_keys(schema), "## Keys of a model\n\n" + _keys(of_model)]
    others = set(schema["$defs"]) - {"ModelEntry"}
    for name in sorted(others):
        entry = schema["$defs"][name]
        title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower().removesuffix(" entry")
        parts.append(f"## Keys of a {title}\n\n{_cell(entry.get('description', ''))}\n\n"
                     + _keys(entry))  # fmt: skip
    return "\n\n".join(parts)


def moe_keys() -> str:
    """Every key of a mixture of experts."""
    of_file, of_expert = (kind.model_json_schema() for kind in (MoeDocument, ExpertEntry))
    return f"{_keys(of_file)}\n\n## Keys of an expert\n\n{_keys(of_expert)}"


def _keys(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        [
            f"`{name}`" + (" (required)" if name in required else ""),
            _cell(_form(key)),
            _cell(key.get("description", "")),
        ]
        for name, key in schema["properties"].items()
    ]
    return _table(["key", "form", "meaning"], *rows)


def _form(schema: dict[str, Any]) -> str:
    """Say in words what values a schema takes, without what every key takes.

    >>> _form({"anyOf": [{"type": "integer"}, {"type": "null"}]}), _form({"enum": ["a", "b"]})
    ('integer', '`a` | `b`')
    """
    if "$ref" in schema:
        return "mapping"
    if "enum" in schema:
        words = [value for value in schema["enum"] if not value.startswith("torch.")]
        return " | ".join(f"`{word}`" for word in words)
    if "const" in schema:
        return f"`{schema['const']}`"
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(filter(None, map(_form, choices))))
    kind = {"object": "mapping", "array": "list", "null": "", "string": "text"}
    found = schema.get("type", "")
    return kind.get(found, found) if isinstance(found, str) else "text"


def commands() -> str:
    """Every command with what its `--help` prints."""
    loaded = load()
    subparsers = next(
        action
        for action in make_parser(loaded)._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    with mock.patch.dict(os.environ, COLUMNS="100"):  # the width of the texts
        helps = {name: subparsers.choices[name].format_help().strip() for name in loaded}
    return "\n\n".join(
        f"## `outliermerge {name}`\n\n```text\n{text}\n```" for name, text in helps.items()
    )


def paper_table() -> str:
    """Table 4 of arXiv 2501.10661, as printed."""
    rows = paper_rows()
    columns = list(rows[-1].cells)
    cells = [
        [
            row.name.removesuffix(" (paper)"),
            *(f"{row.cells[name].value:.1f}" if name in row.cells else "–" for name in columns),
        ]
        for row in rows
    ]
    return _table(["model", *columns], *cells)


PARTS = {
    "methods": methods,
    "modifiers": modifiers,
    "spec-keys": spec_keys,
    "moe-keys": moe_keys,
    "commands": commands,
    "methods-table": methods_table,
    "commands-table": commands_table,
    "paper-table": paper_table,
}


def inserted(text: str) -> str:
    """Return a page with what its markers name behind them."""
    return re.sub(
        r"<!-- reference:(\S+) -->\n(?:.*?<!-- /reference -->)?",
        lambda match: f"<!-- reference:{match[1]} -->\n{PARTS[match[1]]()}\n<!-- /reference -->",
        text,
        flags=re.S,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help="write it into the pages")
    if not parser.parse_args().write:
        print("\n\n".join(part() for part in PARTS.values()))
        return
    for page in PAGES:
        text = page.read_text()
        if (new := inserted(text)) != text:
            page.write_text(new)


if __name__ == "__main__":
    main()
