"""Scores models of text without labels: how sure they are, or how they agree with the parents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from outliermerge.errors import OutlierMergeError, SpecError, as_path, quoted, shown
from outliermerge.optional import require_torch
from outliermerge.search.questions import Answers
from outliermerge.search.scorer import LoadedModel
from outliermerge.search.workplace import Merged
from outliermerge.storage.files import read_bytes
from outliermerge.storage.json_text import parse_json

KINDS = ("entropy", "agreement")
_MOST_TOKENS = 512  # of a text
_MAX_BYTES = 1 << 28


class UnlabelledScorer:
    """Scores by the next tokens that a model expects in texts; a question is a text.

    `entropy` is the mean entropy of the distributions, with the other sign: more is surer (as in
    AdaMerging, arXiv 2310.02575). `agreement` is the share of places where the likeliest token is
    that of a parent, the mean over the parents without the base. Neither says that it is right.

    Args:
        kind: `entropy` or `agreement`.
        path: a file with a JSON object a line, with a `text`.
        models: loads them; several scorers may share one.

    Raises:
        SpecError: there is no such file, or a line is wrong.
    """

    suites: tuple[str, ...] = ()

    def __init__(self, kind: str, path: str, models: LoadedModel) -> None:
        require_torch(f"a search by {kind}")
        self._kind, self._texts = kind, _texts(as_path(path))
        self.learns = kind == "agreement"
        self._path = path
        self._models, self.device = models, models.device
        self._tokens: dict[str, Any] = {}
        self._parents: dict[str, dict[str, Any]] = {}

    def identity(self) -> Mapping[str, Any]:
        """Return the kind and the texts."""
        digest = xxhash.xxh3_64_hexdigest("\n".join(self._texts.values()).encode())
        return {"kind": self._kind, "texts": digest}

    def learn(self, name: str, parent: Merged) -> None:
        """Take up what a parent expects."""
        self._parents[name] = {
            text: logits.argmax(-1) for text, logits in self._expected(parent, list(self._texts))
        }

    def score(self, model: Merged, questions: Mapping[str, Sequence[str]] | None) -> Answers:
        """Return a score for each text.

        Raises:
            OutlierMergeError: the model does not load, or is none of texts.
        """
        names = list(self._texts) if questions is None else questions[self._kind]
        found: dict[str, float] = {}
        for name, logits in self._expected(model, names):
            if self._kind == "entropy":
                logs = logits.float().log_softmax(-1)
                found[name] = float((logs.exp() * logs).sum(-1).mean())
            else:
                said = logits.argmax(-1)
                parents = self._parents.values()
                shares = [float((own[name] == said).float().mean()) for own in parents]
                found[name] = sum(shares) / len(shares)
            if not math.isfinite(found[name]):
                raise OutlierMergeError(
                    f"{self._kind} of text {name} is {found[name]}: the model's outputs are no "
                    "numbers"
                )
        return {self._kind: found}

    def close(self) -> None:
        """Let go of the model."""
        self._models.forget()

    def _expected(self, model: Merged, names: Sequence[str]) -> Any:
        import torch

        loaded = self._models.load(model)
        if isinstance(loaded, dict):
            raise OutlierMergeError(
                f"{self._kind} needs models that transformers loads, with texts"
            )
        tokens = self._tokens or self._tokenized(model.path)
        with torch.inference_mode():
            for name in names:
                ids = tokens[name].to(loaded.device)
                try:
                    logits = loaded(input_ids=ids[None]).logits[0]
                except Exception as error:
                    raise OutlierMergeError(f"{self._kind}: the model failed: {error}") from error
                yield name, logits.cpu()

    def _tokenized(self, folder: Path) -> dict[str, Any]:
        """Return the texts' tokens, the same for all models: by the first one's tokenizer."""
        import torch
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            raise OutlierMergeError(f"the model's tokenizer does not load: {error}") from error
        for name, text in self._texts.items():
            ids = tokenizer(text)["input_ids"][:_MOST_TOKENS]
            if not ids:
                raise OutlierMergeError(f"{self._path}:{name}: the text has no tokens")
            self._tokens[name] = torch.tensor(ids)
        return self._tokens


def _texts(path: Path) -> dict[str, str]:
    """Return the texts of a file by the numbers of their lines."""
    data = read_bytes(path, max_bytes=_MAX_BYTES)
    if data is None:
        raise SpecError(f"{path}: no such file of texts")
    found = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = parse_json(line)["text"]
        except (ValueError, TypeError, KeyError) as error:
            raise SpecError(f'{path}:{number}: expected {{"text": "…"}}: {shown(error)}') from error
        if not isinstance(text, str) or not text:
            raise SpecError(f"{path}:{number}: text: found {quoted(text)}, expected a text")
        found[str(number)] = text
    if not found:
        raise SpecError(f"{path}: has no texts")
    return found
