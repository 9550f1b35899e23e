"""`convert-config`: print a merge file of mergekit's in our form."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.cli.parts import EXIT_DONE, EXIT_FAILED, Command, add_json, print_json, say
from outliermerge.cli.specs import STANDARD_INPUT, read_standard_input
from outliermerge.errors import SpecError, printable

if TYPE_CHECKING:
    from outliermerge.cli.mergekit_files import Converted

# As a person reads a spec.
_ORDER = ("base_model", "models", "slices", "merge_method", "parameters")
_TOP_KEY = re.compile(r"([A-Za-z_]\w*):(\s|$)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the file."""
    parser.add_argument(
        "file", metavar="FILE", help="a merge file of mergekit's, or - for the standard input"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the file in our form, and beside it what will be different.

    Returns 1 if it cannot be run here.
    """
    from outliermerge.cli.mergekit_files import convert
    from outliermerge.spec.check import parse_spec
    from outliermerge.spec.stages import one_document
    from outliermerge.spec.text import SpecText, as_mapping, parse_documents, read_text

    if options.file == STANDARD_INPUT:
        name, text = "standard input", read_standard_input()
    else:
        name, text = options.file, read_text(Path(options.file), absent="no such file")
    documents = parse_documents(text, file=name)
    for raw, source in documents or [(None, SpecText(name))]:
        as_mapping(raw, source, "merge_method")
    raw, _ = one_document(documents)
    found = convert(raw)
    # Of stages only the values are kept, without comments.
    written = as_yaml(found.document, raw, text if len(documents) == 1 else "")
    if not found.obstacles:
        try:
            parse_spec(written, file="converted")
        except SpecError as error:
            found.obstacles.append(re.sub(r"(?m)^converted(:\d+:\d+)?: ", "", str(error)))
    if options.json:
        print_json(_as_json(name, written, found))
    else:
        sys.stdout.write(printable(written) if sys.stdout.isatty() else written)
        for label, lines in (
            ("left out", found.left_out if not options.quiet else []),
            ("differs", found.differences if not options.quiet else []),
            ("cannot be run", found.obstacles),
        ):
            for line in lines:
                say(f"{label}: {line}", file=sys.stderr)
    return EXIT_FAILED if found.obstacles else EXIT_DONE


def _as_json(name: str, written: str, found: Converted) -> dict[str, Any]:
    return {
        "file": name,
        "can_be_run": not found.obstacles,
        "spec": found.document,
        "yaml": written,
        "left_out": found.left_out,
        "differences": found.differences,
        "obstacles": found.obstacles,
    }


def as_yaml(document: dict[str, Any], raw: dict[str, Any], text: str) -> str:
    """Return a document as YAML; what is as it was keeps its text, with its comments.

    Args:
        raw: the document that `text` holds.
    """
    import yaml

    def dumped(part: dict[str, Any]) -> str:
        return yaml.safe_dump(part, sort_keys=False, allow_unicode=True)

    head, parts = _parts(text)
    lines = [head]
    order = [*[key for key in parts if key in document], *document]
    if not document.keys() <= raw.keys():  # a key that is new has no place of its own
        order.sort(key=lambda key: _ORDER.index(key) if key in _ORDER else len(_ORDER))
    for key in dict.fromkeys(order):
        part = parts.pop(key, None)
        if part is not None and raw[key] == document[key] and _anchors(part) == 0:
            lines.append(part)
        elif part is not None or key not in raw:
            lines.append(_comments(part or "") + dumped({key: document[key]}))
    written = "".join(lines)
    try:
        if yaml.safe_load(written) == document:
            return written
    except yaml.YAMLError:
        pass
    return dumped(document)


def _parts(text: str) -> tuple[str, dict[str, str]]:
    """Return the comment that a file begins with, and each top-level key with its lines.

    Comments before a key are its own, but for the first key's, which are the file's.
    """
    head, comments, parts, key = "", "", {}, None
    for line in text.splitlines(keepends=True):
        found = _TOP_KEY.match(line)
        if found:
            if key is None:
                head, comments = comments, ""
            key = found[1]
            parts[key] = comments + line
            comments = ""
        elif line.startswith("#") or not line.strip():
            comments += line
        elif key is not None:
            parts[key] += comments + line
            comments = ""
    return head, {
        name: part if part.endswith("\n") else part + "\n" for name, part in parts.items()
    }


def _comments(part: str) -> str:
    lines = part.splitlines(keepends=True)
    kept = []
    for line in lines:
        if not line.startswith("#"):
            break
        kept.append(line)
    return "".join(kept)


def _anchors(part: str) -> int:
    """Count what may point from one part of a file to another."""
    return len(re.findall(r"(?:^|[\s\[{,:-])[&*][A-Za-z_]", part))


COMMAND = Command(
    summary="print a merge file of mergekit's in our form, and what will be different",
    examples=(
        "outliermerge convert-config mergekit.yaml > merge.yaml",
        "outliermerge convert-config mergekit.yaml --json",
    ),
    overview="outliermerge convert-config mergekit.yaml > merge.yaml",
    add_arguments=add_arguments,
    run=run,
)
