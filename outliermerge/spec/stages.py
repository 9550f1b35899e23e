"""Merges in several stages: which merge of a file is the output, and which uses which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from outliermerge.errors import as_path, nearest, quoted, shown
from outliermerge.spec.modules import MODULES
from outliermerge.spec.settings import SpecPath
from outliermerge.spec.text import Mistakes, SpecText
from outliermerge.spec.validation import describe

STAGES, NAME = "stages", "name"
MAX_CHAIN = 50  # merges that are made of one another
_MAX_STAGES = 1000


def one_document(
    documents: Sequence[tuple[dict[str, Any], SpecText]],
) -> tuple[dict[str, Any], SpecText]:
    """Return a file's merges as one: that of the output, with the others as its `stages`.

    A file has several YAML documents, or a list `stages` that ends with the output's merge, or both
    keys of the output's merge and `stages`.

    Raises:
        SpecError: it cannot be told which merge is the output's.
    """
    (raw, source), *others = documents
    _refuse_many(others, source)
    if others:
        return _with_stages(documents, _output_of(documents))
    entries = raw.get(STAGES)
    if set(raw) != {STAGES} or not isinstance(entries, list) or not entries:
        return raw, source
    if not all(isinstance(entry, dict) for entry in entries):
        return raw, source
    _refuse_many(entries, source)
    merges = [(entry, source.part((STAGES, index))) for index, entry in enumerate(entries)]
    return _with_stages(merges, _output_of(merges))


def _refuse_many(stages: Sequence[Any], source: SpecText) -> None:
    if len(stages) > _MAX_STAGES:
        said = f"found {len(stages):,} stages, expected at most {_MAX_STAGES:,}"
        raise source.error((STAGES,), said, at_key=True)


def _with_stages(
    merges: Sequence[tuple[dict[str, Any], SpecText]], output: int
) -> tuple[dict[str, Any], SpecText]:
    raw, text = merges[output]
    keys, values = dict(text.keys), dict(text.values)
    others = [merge for index, merge in enumerate(merges) if index != output]
    for index, (_, other) in enumerate(others):
        moved = other.at((STAGES, index))
        keys |= moved.keys
        values |= moved.values
    whole = replace(text, keys=keys, values=values)
    if STAGES in raw:
        raise text.error(
            (STAGES,), "a stage has no stages: write them one after another", at_key=True
        )
    return {**raw, STAGES: [entry for entry, _ in others]}, whole


def _output_of(merges: Sequence[tuple[dict[str, Any], SpecText]]) -> int:
    """Return the number of the merge that has no name, or else of the only one that none uses."""
    unnamed = [index for index, (raw, _) in enumerate(merges) if NAME not in raw]
    if len(unnamed) > 1:
        raise merges[unnamed[1]][1].error(
            (), "a second merge without a `name`: name each but that of the output"
        )
    if unnamed:
        return unnamed[0]
    used = {name for raw, _ in merges for _, name in models_named(raw)}
    names = [raw[NAME] for raw, _ in merges]
    unused = [index for index, name in enumerate(names) if name not in used]
    if len(unused) == 1:
        return unused[0]
    last = merges[-1][1]
    if not unused:
        raise last.error((NAME,), "every merge is used by another, so that none is the output")
    listed = ", ".join(quoted(str(names[index])) for index in unused)
    raise merges[unused[0]][1].error(
        (NAME,), f"no merge uses {listed}, so that it cannot be told which is the output: "
        "leave out the `name` of that one"
    )  # fmt: skip


def models_named(raw: Mapping[str, Any]) -> Iterator[tuple[SpecPath, str]]:
    """Yield the models that a merge names, and where."""
    base, slices = raw.get("base_model"), raw.get("slices")
    if isinstance(base, str):
        yield ("base_model",), base
    elif isinstance(base, dict) and isinstance(base.get("model"), str):
        yield ("base_model", "model"), base["model"]
    lists: list[tuple[SpecPath, Any]] = [(("models",), raw.get("models"))]
    for index, entry in enumerate(slices if isinstance(slices, list) else ()):
        if isinstance(entry, dict):
            lists.append((("slices", index, "sources"), entry.get("sources")))
            if isinstance(entry.get("base_model"), str):
                yield ("slices", index, "base_model"), entry["base_model"]
    modules = raw.get(MODULES)
    for name, module in modules.items() if isinstance(modules, dict) else ():
        if isinstance(module, dict):
            yield from (((MODULES, name, *at), found) for at, found in models_named(module))
    for path, entries in lists:
        for index, entry in enumerate(entries if isinstance(entries, list) else ()):
            if isinstance(entry, dict) and isinstance(entry.get("model"), str):
                yield (*path, index, "model"), entry["model"]


def stage_of(reference: str, names: Mapping[str, Any]) -> str | None:
    """Return the stage that a reference names, alone or with adapters after a `+`; else None."""
    name = reference.partition("+")[0]
    return reference if reference in names else name if name in names else None


def in_order(raw: Mapping[str, Any], mistakes: Mistakes) -> list[tuple[str, int]]:
    """Return the names and places of a merge's stages, each after those that it uses.

    What is wrong with names, stages that nothing uses and circles are gathered.
    """
    entries, source = raw.get(STAGES, []), mistakes.source
    if not isinstance(entries, list):
        said = f"found {describe(entries)}, expected a list of merges"
        mistakes.add(source.error((STAGES,), said))
        return []
    _refuse_many(entries, source)
    places: dict[str, int] = {}
    for index, entry in enumerate(entries):
        path: SpecPath = (STAGES, index)
        if not isinstance(entry, dict):
            mistakes.add(source.error(path, f"found {describe(entry)}, expected a merge"))
        elif NAME not in entry:
            mistakes.add(source.error(path, "`name` is missing: other merges use a stage by it"))
        elif not isinstance(name := entry[NAME], str) or not name or "+" in name:
            said = f"found {describe(name)}, expected a text without `+`"
            mistakes.add(source.error((*path, NAME), said))
        elif name in places:
            said = f"{quoted(name)} is the name of stages[{places[name]}], too"
            mistakes.add(source.error((*path, NAME), said))
        else:
            places[name] = index
    return _sorted(raw, places, mistakes)


def _sorted(
    raw: Mapping[str, Any], places: Mapping[str, int], mistakes: Mistakes
) -> list[tuple[str, int]]:
    source, done, entries = mistakes.source, dict[str, None](), raw.get(STAGES, [])

    def visit(merge: Mapping[str, Any], path: SpecPath, open_: tuple[str, ...]) -> None:
        for at, reference in models_named(merge):
            name = stage_of(reference, places)
            if name is None or name in done:
                continue
            if len(open_) == MAX_CHAIN:
                said = f"a chain of more than {MAX_CHAIN} stages: merge some of them by themselves"
                raise source.error((*path, *at), said)
            if name in open_:
                chain = " → ".join(shown(each) for each in (*open_[open_.index(name) :], name))
                said = f"a circle: {chain}. A stage cannot use what is made of it"
                mistakes.add(source.error((*path, *at), said))
                continue
            visit(entries[places[name]], (STAGES, places[name]), (*open_, name))
            done[name] = None

    visit(raw, (), ())
    merges = [raw, *(entries[index] for index in places.values())]
    others = {found for each in merges for _, found in models_named(each)} - places.keys()
    for name in places.keys() - done.keys():
        near = nearest(name, [other for other in others if not as_path(other).exists()])
        advice = "Use or remove it" if near is None else f"Is it meant by {quoted(near)}?"
        said = f"no merge uses the stage {quoted(name)}. {advice}"
        mistakes.add(source.error((STAGES, places[name], NAME), said))
    return [(name, places[name]) for name in done]
