"""The metadata in the output's headers: the reference's, as far as it stays true."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from outliermerge.errors import listing
from outliermerge.planning.plan import Input

# Hashes and sizes of the file, its dtype and its quantisation: they do not hold for the output.
_UNTRUE = re.compile(
    r"hash|^sshs_|quant|fp8|nf4|(^|[._])(dtype|precision|total_size)$", re.IGNORECASE
)
_TRAINING = "ss_"  # keys about the training; hashes among them are of other files
_QUANTISED = re.compile(r'"[^"]*quantiz|"quant_|"weight_dtype"|float8_e[45]m|"(nf4|fp4|fp8)"')
_MEANING = re.compile(r"^modelspec\.(architecture|prediction_type|implementation|encoder_layer)$")
_MAX_BYTES = 2**20


def kept_metadata(inputs: Sequence[Input]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the metadata of the output's headers, by component, and notes on it.

    It is the metadata of the first model's files (for an adapter, of its base's files), without the
    keys that hold only for those files. Headers stay small: of long values, only as many are kept
    as fit into a megabyte.
    """
    first = inputs[0].checkpoint
    kept: dict[str, dict[str, str]] = {}
    lost: list[str] = []
    for component, found in first.metadata.items():
        kept[component], left = _true_part(found)
        lost += left
    notes = []
    names = list(dict.fromkeys(name for texts in kept.values() for name in texts))
    if names:
        notes.append(
            f"the header's metadata is that of {inputs[0].reference}:\n{listing(names, limit=5)}"
        )
    if lost:
        notes.append(
            f"metadata of {inputs[0].reference} that is not true of the output, or too long, is "
            f"left out:\n{listing(list(dict.fromkeys(lost)), limit=5)}"
        )
    return kept, [*notes, *_differing(inputs)]


def _true_part(found: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    kept: dict[str, str] = {}
    lost = []
    num_bytes = 0
    for name, text in sorted(found.items(), key=lambda item: (len(item[1]), item[0])):
        if name == "format":
            continue
        size = len(name.encode("utf-8", "replace")) + len(text.encode("utf-8", "replace"))
        untrue = not name.startswith(_TRAINING) and _UNTRUE.search(name)
        if untrue or _QUANTISED.search(text) or not _is_unicode(name + text):
            lost.append(name)
        elif num_bytes + size > _MAX_BYTES:
            lost.append(name)
        else:
            kept[name] = text
            num_bytes += size
    return dict(sorted(kept.items())), sorted(lost)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _differing(inputs: Sequence[Input]) -> list[str]:
    """Return a note if the headers say that the models' weights have different meanings."""
    said: list[dict[str, str]] = []
    for entry in inputs:
        texts = [item for found in entry.checkpoint.metadata.values() for item in found.items()]
        said.append({name: text for name, text in texts if _MEANING.match(name)})
    lines = []
    for name in sorted({name for texts in said for name in texts}):
        found: dict[str | None, str] = {}
        for entry, known in zip(inputs, said, strict=True):
            found.setdefault(known.get(name), entry.reference)
        if len(found) > 1:
            words = (f"{repr(t) if t else 'nothing'} in {model}" for t, model in found.items())
            lines.append(f"{name}: {', '.join(words)}")
    return [f"the headers say that the models differ:\n{listing(lines)}"] if lines else []
