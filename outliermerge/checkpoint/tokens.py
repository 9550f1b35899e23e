"""The tokens in a model folder's tokenizer files, with the ids that a loader gives them."""

from __future__ import annotations

import base64
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.vocabulary_files import (
    NUMBERED_BY_CLASS,
    READERS,
    TIKTOKEN,
    by_id,
    checked,
    is_known,
    is_tiktoken,
    json_object,
    read_vocabulary,
    special_of_class,
)
from outliermerge.errors import OutlierMergeError, quoted, shown
from outliermerge.storage.files import small_bytes
from outliermerge.storage.lfs import refuse_lfs_pointer
from outliermerge.storage.stamps import is_there, same_bytes

_VOCABULARIES = ("tokenizer.json", *READERS)  # the first that is found is used
_CONFIG = "tokenizer_config.json"
_ADDED = ("added_tokens.json", _CONFIG, "special_tokens_map.json")
_CHARSMAP = re.compile(rb'"precompiled_charsmap"\s*:\s*"([A-Za-z0-9+/=]+)"')
TOKEN_FILES = frozenset((*_VOCABULARIES, *NUMBERED_BY_CLASS, *_ADDED))
_MAX_SPECIAL, _MAX_LENGTH = 20_000, 10_000  # published models have few special tokens, short ones
# How many characters a normalizer may make of all added tokens, and of a text of one character.
_MAX_CHARACTERS, _MAX_GROWTH = 10**8, 10**4
# In a tokenizer.json: a normalizer that makes texts longer, or an escape that hides its name.
_GROWS = re.compile(rb'"type"\s*:\s*"(?:Replace|Prepend|Precompiled)"|\\u00[2-7]')
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def token_files(root: Path) -> tuple[Path, ...]:
    """Return the files of a model folder that `read_tokens` reads; empty if it has none."""
    main = _vocabulary_of(root)
    if main is None:
        return ()
    return (main, *(root / name for name in _ADDED if is_there(root / name)))


def _vocabulary_of(root: Path) -> Path | None:
    for name in _VOCABULARIES:
        if is_there(root / name):
            return root / name
    if ranks := sorted(root.glob(f"*{TIKTOKEN}")):
        return ranks[0]
    known = (root / n for n in NUMBERED_BY_CLASS if is_there(root / n) and is_vocabulary(n, root))
    return next(known, None)


def is_vocabulary(name: str, root: Path) -> bool:
    """Tell whether it is known which ids a loader gives the tokens in a file of a folder."""
    if name in NUMBERED_BY_CLASS:
        return is_known(name, read_json(root / _CONFIG))
    return name in _VOCABULARIES or name.endswith(TIKTOKEN)


def same_token_files(root: Path, other: Path) -> bool:
    """Return whether two folders have the same vocabulary file and equal files beside it."""
    ours, theirs = token_files(root), token_files(other)
    if [path.name for path in ours[:1]] != [path.name for path in theirs[:1]]:
        return False
    if ours and not same_bytes(ours[0], theirs[0]):
        return False
    if [path.name for path in ours] == [path.name for path in theirs] and all(
        same_bytes(a, b) for a, b in zip(ours, theirs, strict=True)
    ):
        return True
    main = ours[0].name
    return _beside(_read(ours[1:]), root, main) == _beside(_read(theirs[1:]), other, main)


def read_tokens(root: Path) -> dict[int, str] | None:
    """Return the token of each id; None if the folder has no tokenizer files.

    tokenizer.json is read if there is one, else vocab.json, vocab.txt, or a model of SentencePiece
    or tiktoken. Tokens in added_tokens.json, tokenizer_config.json and special_tokens_map.json are
    added.

    Raises:
        OutlierMergeError: a tokenizer file is broken.
    """
    files = token_files(root)
    return load_tokens(_read(files), root) if files else None


def load_tokens(files: Mapping[str, bytes], root: Path) -> dict[int, str]:
    """Return the token of each id that a loader gives for tokenizer files with these contents.

    The ids in tokenizer.json do not count, because the tokenizers library numbers added tokens
    itself. transformers then adds further tokens from tokenizer_config.json and the older files.

    Args:
        root: the folder to name in messages.

    Raises:
        OutlierMergeError: a file is broken.
    """
    main = next(name for name in files if name not in _ADDED)
    numbered, named = _beside(files, root, main)
    if main == "tokenizer.json":
        own = [token for _, token in sorted(numbered.items())]
        with _Named(root / main, "the tokenizers library cannot load it"):
            ids = _loaded(files[main], [*own, *named])
        tokens = {id_: token for token, id_ in sorted(ids.items(), key=lambda pair: pair[1])}
        if len(tokens) < len(ids):
            token, id_ = next((t, i) for t, i in ids.items() if tokens[i] != t)
            raise OutlierMergeError(
                f"{root / main}: the tokenizers library gives {quoted(token)} and "
                f"{quoted(tokens[id_])} one id, {id_}, as its vocabulary leaves ids out. Give each "
                "token an id of its own."
            )
        with _Named(root / main):
            checked(max(tokens.items(), default=(0, "")))
        return tokens
    with _Named(root / main):
        config = json_object(files[_CONFIG]) if _CONFIG in files else {}
        tokens = read_vocabulary(main, files[main], config)
    if not is_tiktoken(main, files[main]):  # of which loaders fill gaps
        _refuse_gaps(tokens, numbered, root / main)
    tokens |= numbered
    known = set(tokens.values())
    for token in named:
        if token not in known:
            tokens[max(tokens, default=-1) + 1] = token
    return tokens


def _refuse_gaps(tokens: Mapping[int, str], numbered: Mapping[int, str], path: Path) -> None:
    """Refuse added tokens with ids that transformers 5 does not give them.

    It numbers them in the order of their ids, from the first id behind the vocabulary on.
    """
    first, known = max(tokens, default=-1) + 1, set(tokens.values())
    new = [(id_, t) for id_, t in sorted(numbered.items()) if id_ >= first and t not in known]
    for place, (id_, token) in enumerate(new, start=first):
        if id_ != place:
            raise OutlierMergeError(
                f"{path.parent}: the added token {quoted(token)} has the id {id_:,}, and no token "
                f"has {place:,}: transformers 5 gives it {place:,}, earlier versions {id_:,}. Name "
                "tokens for the ids between in added_tokens.json, or make a tokenizer.json in "
                "which all have their ids."
            )


class _Named:
    """Turns an error about a file's content into one that names the file."""

    def __init__(self, path: Path, what: str = "not a tokenizer file that can be read") -> None:
        self.path, self.what = path, what

    def __enter__(self) -> None:
        return

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # A panic of the tokenizers library is not a subclass of Exception.
        is_panic = type(error).__name__ == "PanicException"
        is_error = isinstance(error, Exception) and not isinstance(error, OutlierMergeError)
        if is_error or is_panic:
            raise OutlierMergeError(
                f"{self.path}: {self.what}: {error}. Fetch it again."
            ) from error


def _read(paths: Iterable[Path]) -> dict[str, bytes]:
    contents = {}
    for path in paths:
        refuse_lfs_pointer(path)
        contents[path.name] = small_bytes(path)
    return contents


def _loaded(data: bytes, others: Iterable[str]) -> dict[str, int]:
    """Return the ids of a tokenizer.json's tokens, and after them ids of other tokens it lacks."""
    from tokenizers import AddedToken, Tokenizer

    _check_charsmap(data)
    _check_growth(data)
    tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    new = [token for token in dict.fromkeys(others) if tokenizer.token_to_id(token) is None]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in new])
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return ids


def _check_charsmap(data: bytes) -> None:
    """Raise ValueError for a character map that is shorter than its stated length.

    The tokenizers library allocates the stated length, and ends the process if that fails.
    """
    for match in _CHARSMAP.finditer(data):
        (num_bytes,) = struct.unpack("<I", base64.b64decode(match[1][:8])[:4].ljust(4, b"\xff"))
        if num_bytes > len(match[1]) * 3 // 4 - 4:
            raise ValueError("its precompiled_charsmap is cut off")


def check_texts(root: Path, num_characters: int) -> None:
    """Refuse a folder whose tokenizer files are broken, or whose tokenizer makes texts too long.

    Args:
        num_characters: of the texts that it is to cut.

    Raises:
        OutlierMergeError: a file is broken, or makes too much of so many characters.
    """
    read_tokens(root)
    if is_there(path := root / "tokenizer.json"):
        with _Named(path, "its tokenizer is not one that can be used"):
            _check_growth(small_bytes(path), num_characters)


def _check_growth(data: bytes, num_characters: int = 0) -> None:
    """Raise ValueError if a normalizer makes texts so long that memory or time do not suffice.

    The tokenizers library normalizes added tokens when it loads them.
    """
    if not _GROWS.search(data):
        return
    tokenizer = json_object(data)
    added = tokenizer.get("added_tokens") or []
    num_characters += sum(
        len(entry["content"])
        for entry in added
        if isinstance(entry, dict) and isinstance(entry.get("content"), str)
    )
    growth = _growth(tokenizer.get("normalizer"))
    if growth > _MAX_GROWTH or growth * num_characters > _MAX_CHARACTERS:
        raise ValueError(f"its normalizer makes texts {shown(growth)} times as long")


def _growth(normalizer: Any) -> int:
    """Return how many times as long a text can become."""
    if not isinstance(normalizer, dict):
        return 1
    if isinstance(inner := normalizer.get("normalizers"), list):
        return math.prod(map(_growth, inner))
    if isinstance(charsmap := normalizer.get("precompiled_charsmap"), str):
        decoded = base64.b64decode(charsmap)
        (num_bytes,) = struct.unpack("<I", decoded[:4].ljust(4, b"\0"))
        return max(1, *map(len, decoded[4 + num_bytes :].split(b"\0")))
    content, pattern = normalizer.get("content"), normalizer.get("pattern")
    if isinstance(content, str):
        found = pattern.get("String") if isinstance(pattern, dict) else None
        shortest = len(found) if isinstance(found, str) else 0
        return max(1, -(-len(content) // shortest)) if shortest else 1 + len(content)
    prepended = normalizer.get("prepend")
    return 1 + len(prepended) if isinstance(prepended, str) else 1


def _beside(
    files: Mapping[str, bytes], root: Path, main: str
) -> tuple[dict[int, str], tuple[str, ...]]:
    """Return tokens that the files beside a vocabulary add: those with an id, and those without.

    As in transformers, ids in the older files are ignored if there is a tokenizer.json, and a
    tokenizer_config.json with an added_tokens_decoder.

    Args:
        files: the contents of the files beside.
        root: their folder.
        main: the name of the vocabulary's file.
    """
    contents: dict[str, dict[str, Any]] = {}
    for name in _ADDED:
        if name in files:
            with _Named(root / name):
                contents[name] = json_object(files[name])
    config = contents.get(_CONFIG, {})
    numbered: dict[int, str] = {}
    old = not (main == "tokenizer.json" and "added_tokens_decoder" in config)
    if old:
        with _Named(root / "added_tokens.json"):
            numbered |= by_id(contents.get("added_tokens.json", {}))
    with _Named(root / _CONFIG):
        numbered |= _decoder(config)
    special = (
        {**special_of_class(main, config)}
        | config
        | (contents.get("special_tokens_map.json", {}) if old else {})
    )
    with _Named(root / "tokenizer_config.json"):
        return numbered, _special(special)


def _decoder(config: Mapping[str, Any]) -> dict[int, str]:
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError("added_tokens_decoder is not an object")
    for entry in decoder.values():  # loaders print keys that they do not know
        if isinstance(entry, dict) and not all(map(str.isprintable, entry)):
            raise ValueError("added_tokens_decoder has keys with control characters")
    contents = {int(id_): _content(entry, plain=False) for id_, entry in decoder.items()}
    return dict(checked(pair) for pair in contents.items())


def _special(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the special tokens in a tokenizer's config, with or without an id."""
    found = [config.get(f"{word}_token") for word in _SPECIAL]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    found += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
    if len(found) > _MAX_SPECIAL:
        raise ValueError(f"it has {len(found):,} special tokens, expected at most {_MAX_SPECIAL:,}")
    contents = [_content(entry, plain=True) for entry in found]
    if any(token and len(token) > _MAX_LENGTH for token in contents):
        raise ValueError(f"it has a special token of more than {_MAX_LENGTH:,} characters")
    return tuple(dict.fromkeys(token for token in contents if token))


def _content(entry: Any, *, plain: bool) -> str | None:
    """Return the text of a token that is written as an object or, if allowed, as a string."""
    if isinstance(entry, dict):
        entry = entry.get("content")
        plain = True
    return entry if plain and isinstance(entry, str) else None
