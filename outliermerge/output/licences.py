"""The ids on the hub and the licences of an output's models, as their model cards give them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from outliermerge.checkpoint.folders.beside import CARD_NAME
from outliermerge.checkpoint.folders.hub import is_hub_id
from outliermerge.errors import OutlierMergeError, as_path, shown
from outliermerge.planning.inputs import is_combined, split_reference
from outliermerge.planning.plan import Input
from outliermerge.storage.files import read_bytes
from outliermerge.storage.hub_cache import repository_of

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_MAX_FRONT = 1 << 16
_MAX_LICENCE = 100


@dataclass(frozen=True)
class Licence:
    """A licence as a card's front matter names it.

    Attributes:
        key: the hub's name of the licence, such as apache-2.0 or other.
        name: of one that the hub does not know, with its address.
    """

    key: str
    name: str = ""
    link: str = ""

    def __str__(self) -> str:
        return f"{self.key} ({self.name})" if self.name else self.key


def hub_ids(entry: Input) -> list[str]:
    """Return the hub's ids of a model, and of the adapter on it; none of what is only here."""
    reference = entry.reference
    parts = split_reference(reference) if is_combined(reference) else [reference]
    found = []
    for part in parts:
        path = as_path(part)
        if path.exists():
            found.append(repository_of(path))
        elif is_hub_id(name := part.removeprefix("hf://")):
            found.append(name.partition("@")[0])
    return [name for name in found if name]


def licences_of(entry: Input) -> list[Licence]:
    """Return the licences in the cards of a model, and of the base that it is an adapter to."""
    roots = dict.fromkeys((entry.checkpoint.root, entry.home))
    found = [_licence(root) for root in roots if root.is_dir()]
    known = [licence for licence in found if licence is not None]
    return list(dict.fromkeys(known)) if known and len(known) == len(found) else []


def licence_lines(models: Sequence[Input]) -> list[str]:
    """Return what a card's front matter says of the licence: that of all, `other`, or nothing."""
    found = [licences_of(entry) for entry in models]
    if not all(found):
        return []
    different = {licence for each in found for licence in each}
    if len(different) > 1:
        return ["license: other"]
    (licence,) = different
    lines = [f"license: {_yaml(licence.key)}"]
    lines += [f"license_name: {_yaml(licence.name)}"] if licence.name else []
    return lines + ([f"license_link: {_yaml(licence.link)}"] if licence.link else [])


def licence_note(models: Sequence[Input]) -> str:
    """Return what a reader must know of the models' licences; "" where all have one."""
    found = [licences_of(entry) for entry in models]
    unknown = sum(not each for each in found)
    different = {licence for each in found for licence in each}
    if unknown:
        which = "any model" if unknown == len(found) else f"{unknown} of the {len(found)} models"
        more = ", and the others differ" if len(different) > 1 else ""
        return (
            f"The licence of {which} is not known here{more}, so this card names none. Look it up "
            "before you pass this model on."
        )
    if len(different) > 1:
        return (
            "The models have different licences, so this card says `other`. Whether they go "
            "together, and which terms hold for the merge, is for you to find out before you pass "
            "it on."
        )
    return ""


def front_matter(text: str) -> dict[str, Any]:
    r"""Return the values at the start of a model card; {} if there are none that can be read.

    >>> front_matter("---\nlicense: mit\n---\n# A model")
    {'license': 'mit'}
    """
    match = _FRONT.match(text[:_MAX_FRONT])
    try:
        found = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _licence(root: Path) -> Licence | None:
    try:
        data = read_bytes(root / CARD_NAME)
    except OutlierMergeError:  # no merge fails for a card
        return None
    front = front_matter((data or b"").decode("utf-8", "replace"))
    key, name, link = (
        _text(front.get(each)) for each in ("license", "license_name", "license_link")
    )
    if not key or max(map(len, (key, name))) > _MAX_LICENCE:
        return None
    repository = repository_of(root)
    if link and "://" not in link:  # a file beside that card
        link = f"https://huggingface.co/{repository}/blob/main/{link}" if repository else ""
    return Licence(shown(key), shown(name), shown(link))


def _text(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return ", ".join(str(each) for each in values if each is not None)


def _yaml(text: str) -> str:
    return yaml.safe_dump(text, allow_unicode=True, width=1 << 20).removesuffix("...\n").strip()
