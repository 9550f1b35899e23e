"""The licences of all packages that outliermerge brings, and whether they fit Apache-2.0."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PERMISSIVE = re.compile(
    r"\b(MIT|MIT-0|MIT-CMU|BSD|[0-3]BSD|BSD-[23]-Clause|Apache|ISC|PSF|PSFL|Python-2\.0|CNRI|HPND|Zlib"
    r"|Unlicense|Unicode|CC0|Public Domain|Python Software Foundation|Historical Permission)\b",
    re.IGNORECASE,
)
# Their terms bind changes to their own files; to depend on them asks nothing of us.
WEAK = re.compile(r"\b(MPL|Mozilla Public)", re.IGNORECASE)
COPYLEFT = re.compile(r"\b[AL]?GPL|Affero|GNU|Lesser General", re.IGNORECASE)
_MAX_LICENCE = 60  # longer ones are the whole text


@dataclass(frozen=True)
class Row:
    """A package, its licence, the kind of that, and the extra that brings it."""

    name: str
    version: str
    licence: str
    kind: str
    extra: str


def licence_of(package: Distribution) -> str:
    """Return a package's licence as its metadata names it: expression, classifiers, or field."""
    data: Any = package.metadata
    if expression := data.get("License-Expression"):
        return str(expression)
    classified = [
        value.rpartition(" :: ")[2]
        for value in data.get_all("Classifier") or ()
        if value.startswith("License ::") and not value.endswith("OSI Approved")
    ]
    if classified:
        return " and ".join(classified)
    field = str(data.get("License") or "").strip()
    return field.partition("\n")[0][:_MAX_LICENCE]


def kind_of(licence: str) -> str:
    """Tell whether a licence is `permissive`, `weak`, `copyleft` or `unknown`.

    A choice (`OR`) is as permissive as its best part, all else as its strictest.

    >>> kind_of("MIT OR GPL-3.0-only"), kind_of("MPL-2.0 AND MIT"), kind_of("LGPLv3"), kind_of("?")
    ('permissive', 'weak', 'copyleft', 'unknown')
    """
    order = ["permissive", "weak", "unknown", "copyleft"]
    return min((_strictest(part) for part in re.split(r"\bOR\b", licence)), key=order.index)


def _strictest(licence: str) -> str:
    for kind, pattern in (("copyleft", COPYLEFT), ("weak", WEAK), ("permissive", PERMISSIVE)):
        if pattern.search(licence):
            return kind
    return "unknown"


def table(
    package: str, extras: Iterable[str] = (), find: Callable[[str], Distribution] = distribution
) -> list[Row]:
    """Return all packages that a package brings, and those that its extras bring, if installed.

    Args:
        extras: of the package itself; what each adds is listed under its name.
        find: returns the metadata of an installed package.
    """
    rows: dict[str, Row] = {}
    for extra in ("", *extras):
        for name in _brought(package, extra, find):
            if name not in rows:
                found = find(name)
                licence = licence_of(found)
                rows[name] = Row(name, found.version, licence, kind_of(licence), extra)
    return sorted(rows.values(), key=lambda row: (row.extra, row.name))


def _brought(package: str, extra: str, find: Callable[[str], Distribution]) -> set[str]:
    """Return the names of all packages that must be installed for a package, one level or more."""
    seen, names = set[tuple[str, str]](), set[str]()
    pending = [(package, extra)]
    while pending:
        name, wanted = pending.pop()
        at = canonicalize_name(name), wanted
        if at in seen:
            continue
        seen.add(at)
        try:
            needs = find(at[0]).requires or []
        except PackageNotFoundError:
            continue  # not of this system, or of an extra that is not installed
        names.add(at[0])
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": at[1]}):
                pending += [(need.name, more) for more in ("", *need.extras)]
    return names - {canonicalize_name(package)}


def wrong_licences(rows: Iterable[Row]) -> list[str]:
    """Return the required packages whose licence is unknown, or would bind this package."""
    return [
        f"{row.name} {row.version} is required, and its licence is {row.kind}: {row.licence or '–'}"
        for row in rows
        if not row.extra and row.kind in ("unknown", "copyleft")
    ]
