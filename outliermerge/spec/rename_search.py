"""Finds a rename that turns a model's tensor names into those of another model."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from itertools import islice
from typing import Any

from outliermerge.spec.rename_maps import MAP_NAMES, by_map

Fits = Callable[[str, str], bool]
_MAX_RULES = 5
# This many names show how names differ; in a large model every layer repeats them.
_MAX_SAMPLED, _MAX_COMPARED, _MAX_TRIED = 3000, 64, 12
_PART = re.compile(r"[^./]*[./]|[^./]+$")
_START = "(?<![^./])"  # where a part of a name begins


@dataclass(frozen=True)
class _Step:
    """A rule as an item of a YAML list, and what it does."""

    text: str
    change: Callable[[str], str]
    replaces: bool = False


@dataclass(frozen=True)
class FoundRename:
    """Rules that turn names into those of another model.

    Attributes:
        text: the rules as YAML, for a spec's `rename`.
        names: for every name, the new name.
        num_paired: how many new names are names of the other model.
    """

    text: str
    names: Mapping[str, str]
    num_paired: int


def best_rename(names: Iterable[str], wanted: Mapping[str, Any]) -> tuple[str, int] | None:
    r"""Return the rename, as YAML, that turns the most names into wanted ones, and how many.

    None if no rename pairs more names than match already.

    >>> best_rename(["model.a.b", "model.c"], {"a.b": 1, "c": 1})
    ('[{from: "^model\\\\.", to: ""}]', 2)
    """
    found = find_rename(names, wanted)
    return (found.text, found.num_paired) if found else None


def find_rename(
    names: Iterable[str], wanted: Iterable[str], fits: Fits = lambda old, new: True
) -> FoundRename | None:
    """Return the rules, or the built-in map, that turn the most names into wanted ones.

    Rules are derived from the differences between names with the same numbers in them. None if no
    rename pairs more names than match already.

    Args:
        fits: tells for a name and a wanted name whether their tensors can be the same.
    """
    names, wanted = list(names), set(wanted)
    current = {name: name for name in _sample(names)}
    num_names = len(current)
    steps: list[_Step] = []
    count = best = _num_paired(current, wanted, fits)
    while len(steps) < _MAX_RULES and count < num_names:
        chosen: Sequence[_Step] = ()
        num_lost = num_names
        for tried in _candidates(current, wanted, fits):
            changed = _changed(current, tried)
            if len(set(changed.values())) < len(changed):
                continue  # two names would become one
            number = _num_paired(changed, wanted, fits)
            if number - count <= _num_misfits(current, changed, wanted, fits):
                continue
            # If two pair equally many, take the one that changes fewer of the other names.
            lost = sum(new != current[old] and new not in wanted for old, new in changed.items())
            if number > best or (chosen and number == best and lost < num_lost):
                chosen, best, num_lost = tried, number, lost
        if not chosen:
            break
        for step in chosen:
            changed = _changed(current, [step])
            if changed != current:  # a spec may not have a rule that matches nothing
                steps.append(step)
                current = changed
        count = best
    renamed = _changed({name: name for name in names}, steps)
    if not steps or len(set(renamed.values())) < len(names):
        return None
    text = ", ".join(step.text for step in steps)
    is_map = len(steps) == 1 and text in MAP_NAMES
    return FoundRename(text if is_map else f"[{text}]", renamed, _num_paired(renamed, wanted, fits))


def _sample(names: Sequence[str]) -> Sequence[str]:
    """Return names that show all differences: those outside layers, and some of the others."""
    if len(names) <= _MAX_SAMPLED:
        return names
    inside = [name for name in names if re.search(r"\d", name)]
    chosen = {*inside[:: len(inside) // _MAX_SAMPLED + 1], *names[:1], *names[-1:]}
    return [name for name in names if name in chosen or not re.search(r"\d", name)]


def _num_paired(current: Mapping[str, str], wanted: set[str], fits: Fits) -> int:
    return sum(new in wanted and fits(old, new) for old, new in current.items())


def _num_misfits(
    before: Mapping[str, str], after: Mapping[str, str], wanted: set[str], fits: Fits
) -> int:
    """Count names that become wanted names of other tensors, as accidental rules do."""
    return sum(
        new in wanted and new != before[old] and not fits(old, new) for old, new in after.items()
    )


def _changed(current: Mapping[str, str], steps: Sequence[_Step]) -> dict[str, str]:
    result = dict(current)
    for step in steps:
        result = {old: step.change(new) for old, new in result.items()}
    return result


def _candidates(
    current: Mapping[str, str], wanted: set[str], fits: Fits
) -> Iterator[Sequence[_Step]]:
    for map_name in MAP_NAMES:
        yield [_Step(map_name, partial(by_map, map_name))]
    new_names = list(current.values())
    paired = [name for name in new_names if name in wanted]
    for prefix in _prefixes(new_names):
        kept = [name.removeprefix(prefix) for name in paired if name.startswith(prefix)]
        yield [_rule(f"^{re.escape(prefix)}{_unless(kept)}", "")]
    for prefix in _prefixes(sorted(wanted)):
        yield [_rule(f"^{_unless(paired)}", prefix)]
    yield from _by_differences(current, wanted, fits)


def _rule(pattern: str, new: str, groups: str = "") -> _Step:
    """Return a rule that replaces a pattern by its groups and a text after them."""
    replacement = groups + new.replace("\\", "\\\\")
    # A JSON string is also a valid YAML string.
    text = f"{{from: {json.dumps(pattern)}, to: {json.dumps(replacement)}}}"
    replaces = bool(new) and not groups and pattern[:2] != "^(" and pattern != "^"
    return _Step(text, partial(re.compile(pattern).sub, replacement), replaces)


def _prefixes(names: Sequence[str]) -> list[str]:
    """Return the prefixes, up to a dot or slash, of the first and the last name."""
    ends = [*names[:1], *names[-1:]]
    return list(
        dict.fromkeys(n[: i + 1] for n in ends for i, sign in enumerate(n[:-1]) if sign in "./")
    )


def _unless(names: Iterable[str]) -> str:
    """Return a lookahead that excludes names with some beginnings, if a few words suffice."""
    parts = dict.fromkeys(parts[0] for name in names if (parts := _PART.findall(name)))
    return f"(?!{'|'.join(map(re.escape, parts))})" if 0 < len(parts) <= 4 else ""


def _by_differences(
    current: Mapping[str, str], wanted: set[str], fits: Fits
) -> Iterator[Sequence[_Step]]:
    """Yield the steps that turn names into similar wanted names, the most frequent first."""
    lost = {old: new for old, new in current.items() if new not in wanted}
    taken = set(current.values())
    alike: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for name in sorted(wanted - taken):
        parts = _PART.findall(name)
        alike[_numbers(parts)].append(parts)
    stride = max(1, len(lost) // _MAX_COMPARED)
    seen: Counter[tuple[str, ...]] = Counter()
    rivals: dict[tuple[str, ...], list[tuple[str, list[str]]]] = defaultdict(list)
    for old, new in lost.items():
        rivals[_numbers(parts := _PART.findall(new))].append((old, parts))
    modules: dict[str, set[str]] = defaultdict(set)
    found: dict[tuple[str, ...], Sequence[_Step]] = {}
    for old in list(lost)[::stride]:
        parts = _PART.findall(lost[old])
        others = [other for other in alike[_numbers(parts)] if fits(old, "".join(other))]
        likeness = {id(o): SequenceMatcher(None, parts, o, False).ratio() for o in others}
        others = [other for other in others if likeness[id(other)] > 0]
        others.sort(key=lambda other: -likeness[id(other)])
        mine = rivals[_numbers(parts)]
        for other in others[:3]:
            same = [its for rival, its in mine if rival != old and fits(rival, "".join(other))]
            if _is_guess(parts, other, same, others):
                continue
            if steps := _steps(parts, other):
                key = tuple(step.text for step in steps)
                seen[key] += 1
                found[key] = steps
                for step in steps:
                    modules[step.text].add("".join(parts[:-1]))
    # If only one module differs in one word, the other name is a different module, such as a new
    # head.
    trusted = (
        key
        for key, _ in seen.most_common()
        if all(len(modules[step.text]) > 1 for step in found[key] if step.replaces)
    )
    yield from (found[key] for key in islice(trusted, _MAX_TRIED))


def _is_guess(
    parts: Sequence[str],
    other: Sequence[str],
    rivals: Iterable[Sequence[str]],
    others: Iterable[Sequence[str]],
) -> bool:
    """Tell whether other names would fit equally well, as those of gate and up do.

    Args:
        parts, other: the parts of a name, and of the name that it may become.
        rivals: other names whose shapes allow them to become the same name.
        others: other names that the name may become, by their shapes.
    """
    for kind, a, b, c, d in SequenceMatcher(None, parts, other, False).get_opcodes():
        if kind != "replace":
            continue
        word, its = _words(parts[a:b]), _words(other[c:d])
        instead = [(_between(rival, parts, a, b), its) for rival in rivals if rival != parts]
        instead += [(word, _between(o, other, c, d)) for o in others if o != other]
        for left, right in instead:
            if left and right and (not _akin(word, its) or _akin(left, right)):
                return True
    return False


def _between(name: Sequence[str], like: Sequence[str], start: int, stop: int) -> set[str]:
    """Return a name's words in place of parts of `like`; none if the two differ elsewhere."""
    rest = len(like) - stop
    end = len(name) - rest
    if name[:start] != like[:start] or end <= start or name[end:] != like[stop:]:
        return set()
    return _words(name[start:end])


def _words(parts: Iterable[str]) -> set[str]:
    return set(re.split(r"[._/]", "".join(parts))) - {""}


def _akin(one: set[str], other: set[str]) -> bool:
    return one <= other or other <= one


def _numbers(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(number for part in parts if (number := part.rstrip("./")).isdigit())


def _steps(parts: Sequence[str], other: Sequence[str]) -> list[_Step]:
    """Return the rules that turn one name into another; none if their numbers differ."""
    steps = []
    for kind, a, b, c, d in SequenceMatcher(None, parts, other, False).get_opcodes():
        if kind == "equal":
            continue
        old, new = parts[a:b], other[c:d]
        if _numbers(old) or _numbers(new):
            return []
        end = "$" if old and b == len(parts) else ""
        start = _START if a else "^"
        if not old and not a:
            steps.append(_rule(f"^(?={re.escape(parts[0])})", "".join(new)))
            continue
        if old:
            text = re.escape("".join(old))
            elsewhere = any(list(parts[i : i + b - a]) == list(old) for i in range(a))
            if a and not new and elsewhere and not _numbers(parts[a - 1 : a]):
                # Only after the same preceding text, because the pattern also occurs elsewhere.
                steps.append(_rule(f"{_START}({re.escape(parts[a - 1])}){text}{end}", "", r"\1"))
            else:
                steps.append(_rule(f"{start}{text}{end}", "".join(new)))
            continue
        # Text is inserted: the preceding text gives the position.
        before = parts[max(0, a - 2) : a] if _numbers(parts[a - 1 : a]) else parts[a - 1 : a]
        where = "".join(
            r"\d+" + re.escape(p[-1]) if _numbers([p]) else re.escape(p) for p in before
        )
        steps.append(_rule(f"{_START}({where})", "".join(new), groups=r"\1"))
    return steps
