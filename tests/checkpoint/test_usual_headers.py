"""A header that is written as usual is read by one pattern, with what JSON gives."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from outliermerge.checkpoint.formats import safetensors_file as file_of_tensors
from outliermerge.errors import OutlierMergeError

USUAL = (
    '{"__metadata__":{"format":"pt"},'
    '"a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    '"none":{"dtype":"BF16","shape":[0,7],"data_offsets":[24,24]},'
    '"b":{"dtype":"I64","shape":[],"data_offsets":[24,32]}}'
)
OTHERS = [
    USUAL.replace(":{", ": {"),
    USUAL.replace("a.weight", "ä.weight"),
    USUAL.replace("a.weight", r"a\u002eweight"),
    USUAL.replace("a.weight", "n" * 1001),
    USUAL.replace("a.weight", ""),
    USUAL.replace("a.weight", "b"),
    USUAL.replace("a.weight", "__metadata__"),
    USUAL.replace("a.weight", "a}.{weight"),
    USUAL.replace('"pt"', '"pt","format":"tf"'),
    USUAL.replace('"pt"', "1"),
    USUAL.replace('"pt"', '"{}"'),
    USUAL.replace('{"format":"pt"}', "null"),
    USUAL.replace('"__metadata__":{"format":"pt"},', ""),
    USUAL.replace('"F32"', '"F33"'),
    USUAL.replace('"F32"', '"F64"'),
    USUAL.replace("[2,3]", "[02,3]"),
    USUAL.replace("[2,3]", "[2,3,]"),
    USUAL.replace("[2,3]", "[" + ",".join("1" * 65) + "]"),
    USUAL.replace("[0,24]", "[00,24]"),
    USUAL.replace("[0,24]", f"[{2**70},{2**70 + 24}]"),
    USUAL.replace("[0,24]", "[24,0]"),
    USUAL.replace("[0,24]", "[8,32]"),
    USUAL.replace("]},", "]}},"),
    USUAL.replace("]},", "]}"),
    USUAL.replace("]},", "]},,"),
    USUAL.replace("]}}", "]},}"),
    USUAL.replace("]}}", "]}}}"),
    USUAL.replace("]}}", "]}"),
    USUAL + " \n",
    " " + USUAL,
    USUAL[1:],
    "{}",
    "[]",
]


def outcome(path: Path, text: str) -> Any:
    raw = text.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(32))
    try:
        return file_of_tensors.read_header_and_metadata(path)
    except OutlierMergeError as error:
        return str(error)


def same(path: Path, text: str) -> Any:
    """Return what a header gives, which must be the same without the pattern."""
    found = outcome(path, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_of_tensors, "_read_usual", lambda *arguments: None)
        assert found == outcome(path, text)
    return found


def test_usual_headers_need_no_json(tmp_path, monkeypatch):
    tensors = {"x.weight": torch.ones(3, 2), "x.bias": torch.ones(3), "n": torch.zeros(())}
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    monkeypatch.setattr(file_of_tensors, "_read_any", None)
    metas, metadata = file_of_tensors.read_header_and_metadata(tmp_path / "file")
    assert {meta.name: meta.shape for meta in metas} == {n: t.shape for n, t in tensors.items()}
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize("text", [USUAL, USUAL + "   ", *OTHERS])
def test_a_pattern_gives_what_json_gives(tmp_path, text):
    same(tmp_path / "file", text)


@given(
    at=st.integers(0, len(USUAL) - 1),
    removed=st.integers(0, 2),
    added=st.text('{}[]",:\\0a1 \n', max_size=2),
)
def test_changed_characters_do_not_mislead_it(tmp_path_factory, at, removed, added):
    text = USUAL[:at] + added + USUAL[at + removed :]
    same(tmp_path_factory.getbasetemp() / "changed", text)


def test_what_is_usual_is_read():
    raw = USUAL.encode()
    found = file_of_tensors._read_usual(Path("file"), raw, 8)
    assert found is not None
    assert [meta.name for _, _, meta in found[0]] == [*json.loads(USUAL)][1:]
    assert found == file_of_tensors._read_any(Path("file"), raw, 8)
