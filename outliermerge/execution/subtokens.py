"""Texts as a tokenizer's own pieces, without what it does to texts before."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError, argument, shown
from outliermerge.planning.spelling import Spelled
from outliermerge.planning.tokenizer_files import TOKENIZER, how_to_convert
from outliermerge.storage.files import small_bytes
from outliermerge.storage.stamps import is_there

_NEVER = -1e9  # the score of a piece that is left out


class Cutter:
    """Cuts texts into the pieces of a model's tokenizer.

    Args:
        name: the model, for messages.
        root: the folder of its tokenizer.
        spelled: what its tokens spell.
        without: pieces that are not to be used.

    Raises:
        OutlierMergeError: it has no tokenizer.json.
    """

    def __init__(
        self, name: str, root: Path, spelled: Spelled, *, without: Collection[str] = ()
    ) -> None:
        from tokenizers import Tokenizer

        path = root / TOKENIZER
        if not is_there(path):
            raise OutlierMergeError(
                f"{shown(name)} has no {TOKENIZER}, which {argument('method', 'subtokens')} needs. "
                + how_to_convert(root)
            )
        content = json.loads(small_bytes(path))
        self._unknown = content["model"].get("unk_token")
        if content["model"].get("unk_id") is not None:
            self._unknown = content["model"]["vocab"][content["model"]["unk_id"]][0]
        _leave_out(content["model"], frozenset(without))
        self._model: Any = Tokenizer.from_str(json.dumps(content)).model
        self._spelled, self._rows = spelled, set(spelled.ids.values())

    def cut(self, text: bytes) -> list[int]:
        """Return the ids of a text's pieces; empty if it has none that has a row."""
        try:
            written = self._spelled.write(text)
        except UnicodeDecodeError:
            return self._spelled.byte_ids(text)
        pieces = self._model.tokenize(written)
        return [p.id for p in pieces if p.value != self._unknown and p.id in self._rows]


def _leave_out(model: dict[str, Any], pieces: frozenset[str]) -> None:
    """Change a tokenizer's model so that it never gives some of its pieces."""
    if not pieces:
        return
    if isinstance(model["vocab"], list):  # the place of a piece is its id
        model["vocab"] = [[p, _NEVER if p in pieces else score] for p, score in model["vocab"]]
        return
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if pieces.isdisjoint(_parts(m))]
    for piece in pieces:
        model["vocab"].pop(piece, None)


def _parts(merge: str | Sequence[str]) -> tuple[str, str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right
