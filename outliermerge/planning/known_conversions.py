"""How transformers converts the tensors of published models, read from its own table.

The table is a module of transformers that makes objects of a few classes. It is run here with
classes that only keep what they were given, because the real ones import torch, which takes
seconds. Nothing of transformers is imported.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_MODULE, _BUILD = "conversion_mapping", "_build_checkpoint_conversion_mapping"
_START = r"(?:^|(?<=\.))"  # where a part of a name begins


@dataclass(frozen=True)
class Step:
    """An operation on tensors: its name in transformers, and what it was given."""

    name: str
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Renaming:
    """Regular expressions and what takes the place of what they match.

    Attributes:
        pairs: of each name the first pair that matches it counts.
        inside: names that begin with this lose it before they are matched, and get it back.
        guarded: it is for models only of which the first expression matches a name.
    """

    pairs: tuple[tuple[re.Pattern[str], str], ...]
    inside: str = ""
    guarded: bool = False

    def __call__(self, name: str) -> str:
        start = self.inside if self.inside and name.startswith(self.inside) else ""
        rest = name.removeprefix(start)
        for pattern, new in self.pairs:
            if found := pattern.search(rest):
                own = found.group(1) if r"\1" in new else ""
                return start + rest.replace(found.group(0), new.replace(r"\1", own), 1)
        return name


@dataclass(frozen=True)
class Rule:
    """Tensors that are others put together, cut or turned.

    Attributes:
        label: for messages.
        sources: texts in the names of the stored tensors; `*` stands for a number.
        targets: what takes their place in the names of the converted tensors.
        steps: how these are made, one after another.
    """

    label: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    steps: tuple[Step, ...]
    patterns: tuple[re.Pattern[str], ...]

    def match(self, name: str) -> tuple[int, str, tuple[int, ...]] | None:
        """Return which of the sources a name has, the name of the whole, and its numbers."""
        for number in sorted(range(len(self.sources)), key=lambda n: -len(self.sources[n])):
            if found := self.patterns[number].search(name):
                whole = name.replace(found.group(0), self.targets[0], 1)
                return number, whole, tuple(map(int, found.groups()))
        return None


@dataclass(frozen=True)
class Known:
    """What is known of how a model's tensors are converted."""

    renamings: tuple[Renaming, ...] = ()
    rules: tuple[Rule, ...] = ()


class _Kept:
    """Stands for a class of transformers: keeps what an object was made of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def given(self, *names: str) -> dict[str, Any]:
        """Return what it was given, by the names of the parameters."""
        return dict(zip(names, self.args, strict=False)) | self.kwargs

    @property
    def kind(self) -> str:
        return type(self).__name__

    @property
    def source_patterns(self) -> list[str]:
        return _texts(self.given("source_patterns", "target_patterns")["source_patterns"])

    @property
    def target_patterns(self) -> list[str]:
        return _texts(self.given("source_patterns", "target_patterns")["target_patterns"])


class _Classes:
    """Stands for a module of transformers: all that is imported from it is such a class."""

    def __getattr__(self, name: str) -> type[_Kept]:
        return type(name, (_Kept,), {})


def _import(name: str, *args: Any) -> Any:
    """Import a module; those of transformers are only stood for."""
    relative = len(args) > 3 and args[3] > 0
    return _Classes() if relative else builtins.__import__(name, *args)


@lru_cache(maxsize=1)
def table() -> Mapping[str, list[Any]]:
    """Return transformers' table by model types and classes; empty where it cannot be read."""
    try:
        found = find_spec("transformers")
    except ImportError:  # a hook refuses it
        found = None
    if found is None or found.origin is None:
        return {}
    path = Path(found.origin).parent / f"{_MODULE}.py"
    try:
        code = SourceFileLoader(_MODULE, str(path)).get_code(_MODULE)
        assert code is not None
        space: dict[str, Any] = {
            "__name__": f"transformers.{_MODULE}",
            "__package__": "transformers",
            "__builtins__": {**vars(builtins), "__import__": _import},
        }
        exec(code, space)
        made: Mapping[str, list[Any]] = space[_BUILD]()
    except Exception:  # another version may be written in any way
        return {}
    return made


def known_of(config: Mapping[str, Any]) -> Known:
    """Return what transformers knows of a model by its config."""
    renamings: list[Renaming] = []
    rules: list[Rule] = []
    for label, own, inside in _entries(config):
        for entry in own:
            if entry.kind == "WeightConverter":
                rules.append(_rule(label, entry))
            else:
                renamings += _renaming(entry, inside)
    return Known(tuple(renamings), tuple(rules))


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, list[Any], str | None]]:
    """Yield the entries of the table for a model and its parts, with where their names begin.

    None stands for the beginning of any part of a name: where a part of a model is, its config
    does not say.
    """
    known, seen = table(), set[int]()
    plain = {key.lower().replace("_", ""): key for key in known}

    def of(*keys: object) -> str | None:
        return next((key for key in keys if isinstance(key, str) and key in known), None)

    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    if key := of(name, config.get("model_type")):
        seen.add(id(known[key]))
        yield key, known[key], ""
    if isinstance(name, str) and "For" in name and (key := of(f"{name.partition('For')[0]}Model")):
        yield key, known[key], "model."
    pending = [config]
    while pending:
        level = pending.pop()
        for part in (value for value in level.values() if isinstance(value, dict)):
            pending.append(part)
            own = part.get("model_type")
            if not isinstance(own, str):
                continue
            flat = own.lower().replace("_", "")
            key = of(plain.get(flat), plain.get(f"{flat}model"), own)
            if key is not None and id(known[key]) not in seen:
                seen.add(id(known[key]))
                yield key, known[key], None


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _renaming(entry: _Kept, inside: str | None) -> list[Renaming]:
    if entry.kind == "PrefixChange":
        given = entry.given("prefix_to_add", "prefix_to_remove", "model_prefix")
        start = rf"{re.escape(given['model_prefix'])}\." if given.get("model_prefix") else ""
        kept = start.replace("\\", "")
        if given.get("prefix_to_remove") is not None:
            pairs = [(rf"^{start}{given['prefix_to_remove']}\.(.+)", rf"{kept}\1")]
        else:
            added = given["prefix_to_add"]
            pairs = [(rf"^{start}(?!{added}\.)(.+)", rf"{kept}{added}.\1")]
    elif entry.kind in ("WeightRenaming", "GroupWeightRename"):
        targets = [_plain(target) for target in entry.target_patterns]
        if len(targets) == 1:
            targets *= len(entry.source_patterns)
        pairs = list(zip(entry.source_patterns, targets, strict=True))
    else:
        return []
    made = tuple((_compiled(old, inside), new) for old, new in pairs)
    return [Renaming(made, inside or "", guarded=entry.kind == "GroupWeightRename")]


def _plain(target: str) -> str:
    return target.removeprefix("^").replace(r"\.", ".")


def _compiled(text: str, inside: str | None) -> re.Pattern[str]:
    """Return the expression of a text as transformers understands it."""
    pattern = text.replace("*.", r".*\.")
    if inside is None and pattern.startswith("^"):
        pattern = _START + pattern[1:]
    if re.search(r"[a-zA-Z0-9]$", pattern):
        pattern += r"(?!\w)"
    return re.compile(pattern)


def _rule(label: str, entry: _Kept) -> Rule:
    given = entry.given("source_patterns", "target_patterns", "operations")
    sources = tuple(_texts(given["source_patterns"]))
    return Rule(
        label=label,
        sources=sources,
        targets=tuple(map(_plain, _texts(given["target_patterns"]))),
        steps=tuple(_step(step) for step in given["operations"]),
        patterns=tuple(_numbered(source) for source in sources),
    )


def _numbered(source: str) -> re.Pattern[str]:
    """Return the expression of a source, with a group for each number in it."""
    pattern = source.replace("*", r"(\d+)")
    return re.compile(pattern + (r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else ""))


_PARAMETERS: Mapping[str, Sequence[str]] = {
    "Transpose": ("dim0", "dim1", "check_dims"),
    "PermuteForRope": ("subconfig_key", "permute_layer_names", "inverse"),
    "Interleave": ("dim", "inverse"),
}


def _step(entry: _Kept) -> Step:
    names = _PARAMETERS.get(entry.kind, ("dim", "num_shards_attribute"))
    return Step(entry.kind, entry.given(*names))
