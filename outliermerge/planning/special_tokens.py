"""Special tokens for which one model's config and another model's tokenizer disagree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json, text_config
from outliermerge.checkpoint.tokens import read_tokens
from outliermerge.errors import shown
from outliermerge.planning.plan import Input

_WORDS = ("bos", "eos", "pad")


def special_tokens_that_differ(config: Input, tokenizer: Input) -> Iterator[str]:
    """Yield a note for each token id in a config that another model's tokenizer does not confirm.

    Generation uses the ids in config.json and generation_config.json to begin, pad and stop.
    """
    home = tokenizer.tokenizer_home
    if home == config.home or (tokens := read_tokens(home)) is None:
        return
    ids = {token: number for number, token in tokens.items()}
    meant = {f"{word}_token_id": special_token(home, f"{word}_token") for word in _WORDS}
    files: dict[tuple[str, str], list[str]] = {}  # by what they have, and what they should have
    for file in ("config.json", "generation_config.json"):
        said = read_json(config.home / file)
        for key, token in meant.items():
            value = said.get(key, text_config(said).get(key))
            wanted = ids.get(token) if token is not None else None
            if value is None or wanted is None:
                continue
            listed = value if isinstance(value, list) else [value]
            if wanted not in listed:
                listing = ", ".join(f"{n} ({tokens.get(n, 'no token')!r})" for n in listed)
                pair = f"{key} {shown(listing)}", f"{wanted} ({token!r})"
                files.setdefault(pair, []).append(file)
    for (found, expected), names in files.items():
        has = "have" if names[1:] else "has"
        yield (
            f"{' and '.join(names)} of {shown(config.reference)} {has} {found}, "
            f"but the tokenizer of {shown(tokenizer.reference)} has {expected}"
        )


def special_token(home: Path, key: str) -> str | None:
    """Return the text of a special token in a tokenizer's files."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        value: Any = read_json(home / file).get(key)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            return content
    return None
