"""What may have been meant by a path that leads to no model."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from outliermerge.checkpoint.formats.table import SUFFIXES
from outliermerge.errors import listing, nearest

_GUIDES = ("config.json", "model_index.json", "adapter_config.json", "modules.json")
_MAX_LISTED = 2000  # of a folder; in a larger one nothing is looked for
_HUB_PAGE = re.compile(
    r"^(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)(?:models/)?"
    r"(?P<id>[\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+))?"
)


def is_model(path: Path) -> bool:
    """Tell whether a path looks like a model: weights, or a folder that has them or a config."""
    if path.suffix in SUFFIXES:
        return path.is_file()
    return any(name in _GUIDES or name.endswith(SUFFIXES) for name in names_of(path))


def names_of(folder: Path) -> list[str]:
    """Return the names in a folder without hidden ones; none if it cannot be listed, or is huge."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in islice(entries, _MAX_LISTED + 1) if e.name[:1] != "."]
    except OSError:
        return []
    return sorted(names) if len(names) <= _MAX_LISTED else []


def models_in(folder: Path) -> list[Path]:
    """Return the folders inside a folder that look like models."""
    inside = (folder / name for name in names_of(folder))
    return [path for path in inside if path.is_dir() and is_model(path)]


def meant_inside(found: Sequence[Path], what: str) -> str:
    """Return the end of a message on a folder that is not itself what others in it are.

    >>> meant_inside([Path("runs/a")], "model")
    'but a model is in it: did you mean runs/a?'
    """
    here = Path.cwd()
    names = [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in found]
    if len(found) == 1:
        article = "an" if what[0] in "aeiou" else "a"
        return f"but {article} {what} is in it: did you mean {names[0]}?"
    return f"but {len(found)} {what}s are in it. Name one of them:\n{listing(names, limit=10)}"


def path_meant(path: Path) -> Path | None:
    """Return the existing path that differs from an absent one in one name, and only a little."""
    present = next((parent for parent in path.parents if parent.is_dir()), None)
    if present is None:
        return None
    name, *rest = path.relative_to(present).parts
    # An ending that two names share says nothing of how like they are.
    ending = Path(name).suffix
    others = names_of(present)
    stems = {o.removesuffix(ending): o for o in others if ending and o.endswith(ending)}
    stem = nearest(name.removesuffix(ending), stems, cutoff=0.7)
    left = [other for other in others if other not in stems.values()]
    near = stems[stem] if stem is not None else nearest(name, left, cutoff=0.7)
    found = present.joinpath(near, *rest) if near is not None else None
    return found if found is not None and found.exists() else None


def is_slip(name: str, other: str) -> bool:
    """Tell whether two names differ by a slip of the keys, not as two versions of a model do.

    >>> is_slip("llama-caht", "llama-chat"), is_slip("Qwen2-7B", "Qwen2-0.5B")
    (True, False)
    """
    numbers = [re.findall(r"\d+", text) for text in (name, other)]
    return numbers[0] == numbers[1] and nearest(name, [other], cutoff=0.85) is not None


def hub_id_of(reference: str) -> str | None:
    """Return the hub id that the address of a page of the hub stands for.

    >>> hub_id_of("https://huggingface.co/org/name/tree/main")
    'org/name@main'
    """
    page = _HUB_PAGE.match(reference)
    if page is None:
        return None
    return page["id"] + (f"@{page['revision']}" if page["revision"] else "")
