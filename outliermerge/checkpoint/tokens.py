"""The tokens in a model folder's tokenizer files, with the ids that a loader gives them."""

from __future__ import annotations

import base64
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError, quoted, shown
from outliermerge.storage.files import small_bytes
from outliermerge.storage.json_text import parse_json
from outliermerge.storage.lfs import refuse_lfs_pointer
from outliermerge.storage.stamps import is_there, same_bytes

# The first file found is used. spiece.model and sentencepiece.bpe.model are not in the list: their
# tokenizers shift the numbers of the pieces.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
_ADDED = ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
_CHARSMAP = re.compile(rb'"precompiled_charsmap"\s*:\s*"([A-Za-z0-9+/=]+)"')
# The largest vocabulary of a published model has a million tokens (XLM-V), and few special ones.
_MAX_IDS, _MAX_SPECIAL = 1 << 21, 20_000
# How many characters a normalizer may make of all added tokens, and of a text of one character.
_MAX_CHARACTERS, _MAX_GROWTH = 10**8, 10**4
# In a tokenizer.json: a normalizer that makes texts longer, or an escape that hides its name.
_GROWS = re.compile(rb'"type"\s*:\s*"(?:Replace|Prepend|Precompiled)"|\\u00[2-7]')
TOKEN_FILES = frozenset((*_VOCABULARIES, *_ADDED))
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def token_files(root: Path) -> tuple[Path, ...]:
    """Return the files of a model folder that `read_tokens` reads; empty if it has none."""
    main = next((root / name for name in _VOCABULARIES if is_there(root / name)), None)
    if main is None:
        return ()
    return (main, *(root / name for name in _ADDED if is_there(root / name)))


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
    fast = ours[0].name == "tokenizer.json"
    return _beside(_read(ours[1:]), root, fast) == _beside(_read(theirs[1:]), other, fast)


def read_tokens(root: Path) -> dict[int, str] | None:
    """Return the token of each id; None if the folder has no tokenizer files.

    tokenizer.json is read if there is one, else vocab.json, vocab.txt or tokenizer.model. Tokens in
    added_tokens.json, tokenizer_config.json and special_tokens_map.json are added.

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
    tokens = _load(files, root)
    if (last := max(tokens, default=0)) >= _MAX_IDS:
        main = next(name for name in _VOCABULARIES if name in files)
        raise OutlierMergeError(
            f"{root / main}: {quoted(tokens[last])} has the id {quoted(last)}, expected ids below "
            f"{_MAX_IDS:,}. Fetch it again."
        )
    return tokens


def _load(files: Mapping[str, bytes], root: Path) -> dict[int, str]:
    main = next(name for name in _VOCABULARIES if name in files)
    numbered, named = _beside(files, root, main == "tokenizer.json")
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
        return tokens
    with _Named(root / main):
        tokens = _READERS[main](files[main])
    tokens |= numbered
    known = set(tokens.values())
    for token in named:
        if token not in known:
            tokens[max(tokens, default=-1) + 1] = token
    return tokens


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
    for token in others:
        if tokenizer.token_to_id(token) is None:
            tokenizer.add_tokens([AddedToken(token, special=True)])
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
    tokenizer = _object(data)
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
    files: Mapping[str, bytes], root: Path, fast: bool
) -> tuple[dict[int, str], tuple[str, ...]]:
    """Return tokens that the files beside a vocabulary add: those with an id, and those without.

    As in transformers, ids in the older files are ignored if there is a tokenizer.json, and a
    tokenizer_config.json with an added_tokens_decoder.
    """
    contents: dict[str, dict[str, Any]] = {}
    for name in _ADDED:
        if name in files:
            with _Named(root / name):
                contents[name] = _object(files[name])
    config = contents.get("tokenizer_config.json", {})
    numbered: dict[int, str] = {}
    old = not (fast and "added_tokens_decoder" in config)
    if old:
        with _Named(root / "added_tokens.json"):
            numbered |= _inverted(contents.get("added_tokens.json", {}))
    with _Named(root / "tokenizer_config.json"):
        numbered |= _decoder(config)
    special = config | (contents.get("special_tokens_map.json", {}) if old else {})
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
    return dict(_checked(pair) for pair in contents.items())


def _special(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the special tokens in a tokenizer's config, with or without an id."""
    found = [config.get(f"{word}_token") for word in _SPECIAL]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    found += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
    if len(found) > _MAX_SPECIAL:
        raise ValueError(f"it has {len(found):,} special tokens, expected at most {_MAX_SPECIAL:,}")
    contents = [_content(entry, plain=True) for entry in found]
    return tuple(dict.fromkeys(token for token in contents if token))


def _content(entry: Any, *, plain: bool) -> str | None:
    """Return the text of a token that is written as an object or, if allowed, as a string."""
    if isinstance(entry, dict):
        entry = entry.get("content")
        plain = True
    return entry if plain and isinstance(entry, str) else None


def _token_ids(data: bytes) -> dict[int, str]:
    return _inverted(_object(data))


def _lines(data: bytes) -> dict[int, str]:
    lines = data.decode("utf-8").replace("\r\n", "\n").split("\n")
    return dict(enumerate(lines if lines[-1] else lines[:-1]))


def _object(data: bytes) -> dict[str, Any]:
    value = parse_json(data, unique=False)
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def _inverted(ids: Mapping[str, Any]) -> dict[int, str]:
    return dict(_checked((id_, token)) for token, id_ in ids.items())


def _checked(pair: tuple[Any, Any]) -> tuple[int, str]:
    id_, token = pair
    if type(id_) is not int or id_ < 0 or not isinstance(token, str):
        raise ValueError(f"{quoted(token)} with id {quoted(id_)} is not a token")
    return id_, token


def _pieces(data: bytes) -> dict[int, str]:
    """Return the pieces of a sentencepiece model by number, which is their id.

    A ModelProto repeats `pieces` as field 1; a piece's text is its field 1
    (github.com/google/sentencepiece, src/sentencepiece_model.proto).
    """
    pieces: list[str] = []
    for number, value in _fields(data):
        if number == 1:
            texts = [text for inner, text in _fields(value) if inner == 1]
            if not texts:
                raise ValueError(f"piece {len(pieces)} has no text")
            pieces.append(texts[-1].decode("utf-8"))
    if not pieces:
        raise ValueError("no sentencepiece model: it has no pieces")
    return dict(enumerate(pieces))


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of a message's length-delimited fields.

    The wire format is described at protobuf.dev/programming-guides/encoding: varints (0), 8 bytes
    (1), a length and that many bytes (2), 4 bytes (5). sentencepiece models have no groups (3, 4).
    """
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            _, position = _varint(data, position)
            continue
        if wire_type == 2:
            length, position = _varint(data, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"no sentencepiece model: wire type {wire_type} at byte {position}")
        if position + length > len(data):
            raise ValueError("no sentencepiece model: it ends within a field")
        if wire_type == 2:
            yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("no sentencepiece model: it ends within a number")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("no sentencepiece model: a number is too long")


_READERS = {
    "vocab.json": _token_ids,
    "vocab.txt": _lines,
    "tokenizer.model": _pieces,
}
