"""What merges have scored, in files: a merge that was scored is not made again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from outliermerge.api import plan
from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation.formats import load
from outliermerge.search.questions import Answers
from outliermerge.search.scorer import Scorer
from outliermerge.search.workplace import Merged, Workplace
from outliermerge.storage.files import write_whole

Questions = Mapping[str, Sequence[str]]


class Ledger:
    """Scores specs, and keeps the answers under a hash of the spec.

    Args:
        folder: for the files.
        workplace: where merges are made.
        scorer: scores them.
    """

    def __init__(self, folder: Path, workplace: Workplace, scorer: Scorer) -> None:
        self._folder, self._workplace, self._scorer = folder, workplace, scorer
        self._here: tuple[str, Merged] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def known(self, document: Mapping[str, Any]) -> Answers:
        """Return the answers that a spec has given so far."""
        answers: Answers = self._read(document).get("answers", {})
        return answers

    def checksum(self, document: Mapping[str, Any]) -> str:
        """Return the checksum of a merge's tensors; empty if it was not made."""
        return str(self._read(document).get("checksum", ""))

    def ask(self, document: Mapping[str, Any], questions: Questions | None) -> Answers:
        """Return the answers of a spec's merge, which is asked what it was not asked before.

        Args:
            questions: by task; None for all that the scorer has.

        Raises:
            OutlierMergeError: it cannot be merged or scored.
        """
        found = self._read(document)
        answers: dict[str, dict[str, float]] = found.get("answers", {})
        if questions is None and found.get("is_whole"):
            return answers
        lacking: dict[str, list[str]] = {}
        for task, own in (questions or {}).items():
            if new := [name for name in own if name not in answers.get(task, ())]:
                lacking[task] = new
        if questions is not None and not lacking:
            return answers
        merged = self.merge(document)
        for task, scores in self._scorer.score(merged, lacking or None).items():
            answers.setdefault(task, {}).update(scores)
        found |= {
            "spec": dict(document),
            "checksum": merged.checksum,
            "answers": answers,
            "is_whole": questions is None or found.get("is_whole", False),
        }
        text = json.dumps(found, ensure_ascii=False, allow_nan=False)
        write_whole(self._path(document), text.encode("utf-8", "backslashreplace"))
        return answers

    def merge(self, document: Mapping[str, Any]) -> Merged:
        """Make a spec's merge, if it is not the one that is there."""
        key = key_of(document)
        if self._here is None or self._here[0] != key:
            self._here = None
            self._here = key, self._workplace.merge(plan(dict(document)))
        return self._here[1]

    def _read(self, document: Mapping[str, Any]) -> dict[str, Any]:
        try:
            found = load(self._path(document))
        except OutlierMergeError:  # there is none, or it is damaged: it is asked again
            found = None
        return found if isinstance(found, dict) else {}

    def _path(self, document: Mapping[str, Any]) -> Path:
        return self._folder / f"{key_of(document)}.json"


def key_of(document: Mapping[str, Any]) -> str:
    """Return a hash of a spec."""
    text = json.dumps(document, sort_keys=True, default=str)
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "backslashreplace"))
