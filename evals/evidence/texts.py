"""Short English texts with classes, from packages: six tasks for an encoder."""

from __future__ import annotations

import gzip
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable

from evals.evidence.packages import debian
from evals.peft.study import fetch_texts, read_rated

SECTIONS = (
    *("utils", "net", "science", "admin", "games", "x11"),
    *("text", "sound", "graphics", "mail", "web", "math"),
)


def sentiment() -> Iterable[tuple[str, str]]:
    """Yield tweets, reviews and editorials that people rated as clearly good or bad in tone."""
    for _, rating, text in read_rated(fetch_texts()):
        if abs(rating) > 0.5:
            yield text, "good" if rating > 0 else "bad"


def source() -> Iterable[tuple[str, str]]:
    """Yield the same texts with where they are from."""
    for where, _, text in read_rated(fetch_texts()):
        yield text, where


def glosses(part: str) -> Iterable[tuple[str, str]]:
    """Yield WordNet's definitions of nouns or verbs with the lexicographer's file they are in."""
    path = debian("wordnet-base") / "usr" / "share" / "wordnet" / f"data.{part}"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            head, _, gloss = line.partition(" | ")
            yield gloss.partition(";")[0].strip(), head.split()[1]


def subject() -> Iterable[tuple[str, str]]:
    """Yield the first sentences of FOLDOC, a dictionary of computing, with the first subject."""
    path = debian("dict-foldoc") / "usr" / "share" / "dictd" / "foldoc.dict.dz"
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    for entry in re.finditer(r"^   <([a-z ]+)[^>]*> (.+?)(?:\.\s|\n\n)", text, re.M | re.S):
        yield " ".join(entry[2].translate(str.maketrans("", "", "{}")).split()), entry[1]


def section() -> Iterable[tuple[str, str]]:
    """Yield the summaries of Debian's packages with the section, as the package index has them."""
    command = ["apt-cache", "dumpavail"]
    index = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for entry in index.split("\n\n"):
        fields = dict(re.findall(r"^(Section|Description(?:-en)?): (.+)$", entry, re.M))
        text = fields.get("Description-en") or fields.get("Description")
        if text and fields.get("Section") in SECTIONS:
            # Packages of one program differ in what is in brackets.
            yield text.partition(" (")[0], fields["Section"]


# How each task's texts are found, and how many of the most frequent classes are kept.
TASKS: dict[str, tuple[Callable[[], Iterable[tuple[str, str]]], int]] = {
    "sentiment": (sentiment, 2),
    "noun": (lambda: glosses("noun"), 10),
    "subject": (subject, 6),
    "section": (section, 12),
    "source": (source, 4),
    "verb": (lambda: glosses("verb"), 10),
}


def read(task: str) -> list[tuple[str, int]]:
    """Return a task's texts, each once, with the numbers of their classes."""
    find, most = TASKS[task]
    found: dict[str, str] = {}
    for text, name in find():
        if len(text.split()) > 2:
            found.setdefault(text, name)
    common = [name for name, _ in Counter(found.values()).most_common(most)]
    return [(text, common.index(name)) for text, name in found.items() if name in common]
