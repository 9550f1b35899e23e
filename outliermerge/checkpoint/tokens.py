"""The tokens that a model folder's tokenizer files name."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.meta import refuse_lfs_pointer
from outliermerge.errors import OutlierMergeError

# tokenizer.json holds added tokens itself; the others have them in files beside. The first found
# is used. Not spiece.model and sentencepiece.bpe.model: their models shift the pieces' numbers.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
_ADDED = ("added_tokens.json", "tokenizer_config.json")


def token_files(root: Path) -> tuple[Path, ...]:
    """Return the files of a model folder that `read_tokens` reads, none where it has none."""
    main = next((root / name for name in _VOCABULARIES if (root / name).is_file()), None)
    if main is None:
        return ()
    beside = () if main.name == "tokenizer.json" else _ADDED
    return (main, *(root / name for name in beside if (root / name).is_file()))


def same_token_files(root: Path, other: Path) -> bool:
    """Return whether two model folders have the same tokenizer files, byte for byte."""
    ours, theirs = token_files(root), token_files(other)
    return [path.name for path in ours] == [path.name for path in theirs] and all(
        filecmp.cmp(a, b, shallow=False) for a, b in zip(ours, theirs, strict=True)
    )


def read_tokens(root: Path) -> dict[int, str] | None:
    """Return the token of each id; None where the folder has no tokenizer files.

    tokenizer.json is read where there is one, else vocab.json, vocab.txt or tokenizer.model, each
    with added_tokens.json and the added_tokens_decoder of tokenizer_config.json.

    Raises:
        OutlierMergeError: a tokenizer file is broken.
    """
    files = token_files(root)
    tokens: dict[int, str] = {}
    for path in files:
        refuse_lfs_pointer(path)
        try:
            tokens.update(_READERS[path.name](path.read_bytes()))
        except OSError as error:
            raise OutlierMergeError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise OutlierMergeError(
                f"{path}: not a tokenizer file that can be read: {error}. Fetch it again."
            ) from error
    return tokens if files else None


def _tokenizer_json(data: bytes) -> dict[int, str]:
    content = _object(data)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [piece, score] by id
        pieces = [entry[0] if isinstance(entry, list) and entry else None for entry in vocabulary]
        tokens = dict(_checked(pair) for pair in enumerate(pieces))
    elif isinstance(vocabulary, dict):
        tokens = _inverted(vocabulary)
    else:
        raise ValueError("it has no model.vocab")
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise ValueError("added_tokens is not a list")
    for entry in added:
        if not isinstance(entry, dict):
            raise ValueError(f"{entry!r} is not an added token")
        tokens.update([_checked((entry.get("id"), entry.get("content")))])
    return tokens


def _tokenizer_config(data: bytes) -> dict[int, str]:
    decoder = _object(data).get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError("added_tokens_decoder is not an object")
    contents = {
        int(id_): entry.get("content") if isinstance(entry, dict) else None
        for id_, entry in decoder.items()
    }
    return dict(_checked(pair) for pair in contents.items())


def _token_ids(data: bytes) -> dict[int, str]:
    return _inverted(_object(data))


def _lines(data: bytes) -> dict[int, str]:
    lines = data.decode("utf-8").replace("\r\n", "\n").split("\n")
    return dict(enumerate(lines if lines[-1] else lines[:-1]))


def _object(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def _inverted(ids: dict[str, Any]) -> dict[int, str]:
    return dict(_checked((id_, token)) for token, id_ in ids.items())


def _checked(pair: tuple[Any, Any]) -> tuple[int, str]:
    id_, token = pair
    if type(id_) is not int or id_ < 0 or not isinstance(token, str):
        raise ValueError(f"{token!r} with id {id_!r} is not a token")
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
    """Yield number and bytes of a message's length-delimited fields.

    The wire format is that of protobuf.dev/programming-guides/encoding: varints (0), 8 bytes (1),
    a length and as many bytes (2), 4 bytes (5); groups (3, 4) are in no sentencepiece model.
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
    "tokenizer.json": _tokenizer_json,
    "vocab.json": _token_ids,
    "vocab.txt": _lines,
    "tokenizer.model": _pieces,
    "added_tokens.json": _token_ids,
    "tokenizer_config.json": _tokenizer_config,
}
