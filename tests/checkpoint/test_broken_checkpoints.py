"""Checkpoints that are broken, dangerous or do not fit together: refused before any work."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import load_folder, save_tensors
from every_method import SEVERAL
from safetensors.torch import save_file

from outliermerge.cli import main as cli
from outliermerge.methods.table import METHODS

GOOD = {"a.weight": torch.ones(4, 2), "b.weight": torch.ones(3)}
SIZES = "BOOL, U8, I8, U16, I16, U32, I32, U64, I64, C64, F8_E4M3, F8_E5M2, F16, BF16, F32, F64"
SIZES += ", F8_E8M0"


def _spec(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text.replace("DIR", str(folder)), "utf-8")
    return path


def _run(folder: Path, capsys, text: str, *options: str) -> tuple[int, str]:
    """Run a merge into DIR/out; return the exit code and what is said of an error."""
    spec = _spec(folder, text)
    code = cli.main(["run", str(spec), "--output", str(folder / "out"), *options])
    said = capsys.readouterr().err.replace(str(folder), "DIR")
    return code, said[said.index("error: ") :] if "error: " in said else ""


def _assert_nothing_was_written(folder: Path) -> None:
    assert not (folder / "out").exists()
    assert not (folder / "out.partial").exists()


# One broken model.

LINEAR = "merge_method: linear\nmodels:\n  - model: DIR/good\n  - model: DIR/bad\n"


def _bytes(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _file(contents: bytes | dict, *, num_data_bytes: int = 8) -> Callable[[Path], None]:
    """Return what writes model.safetensors: raw bytes, or a header by tensor name."""

    def write(bad: Path) -> None:
        raw = contents
        if isinstance(raw, dict):
            raw = _bytes(json.dumps(raw).encode(), bytes(num_data_bytes))
        (bad / "model.safetensors").write_bytes(raw)

    return write


def _tensor(**entry: object) -> Callable[[Path], None]:
    return _file({"w": _entry(**entry)})


def _nothing(bad: Path) -> None:
    pass


def _absent(bad: Path) -> None:
    bad.rmdir()


def _is_file(bad: Path) -> None:
    bad.rmdir()
    bad.write_text("weights")


def _other_files(bad: Path) -> None:
    (bad / "config.json").write_text("{}")
    (bad / "training_args.bin").write_bytes(b"")


def _adapter(bad: Path) -> None:
    (bad / "adapter_config.json").write_text("{}")
    save_file(GOOD, bad / "adapter_model.safetensors")


def _two_shards(bad: Path) -> None:
    for number, (name, tensor) in enumerate(GOOD.items(), start=1):
        save_file({name: tensor}, bad / f"model-0000{number}-of-00002.safetensors")


def _index(weight_map: object) -> Callable[[Path], None]:
    def write(bad: Path) -> None:
        _two_shards(bad)
        index = {"metadata": {}, "weight_map": weight_map}
        (bad / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def _index_text(text: bytes) -> Callable[[Path], None]:
    def write(bad: Path) -> None:
        _two_shards(bad)
        (bad / "model.safetensors.index.json").write_bytes(text)

    return write


def _truncated_shard(bad: Path) -> None:
    _index({n: f"model-0000{i}-of-00002.safetensors" for i, n in enumerate(GOOD, 1)})(bad)
    shard = bad / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])


def _longer_file(bad: Path) -> None:
    save_file(GOOD, bad / "model.safetensors")
    with (bad / "model.safetensors").open("ab") as file:
        file.write(b"more")


def _missing_shard(bad: Path) -> None:
    _two_shards(bad)
    (bad / "model-00002-of-00002.safetensors").unlink()


def _same_tensor_twice(bad: Path) -> None:
    _two_shards(bad)
    save_file(GOOD, bad / "model-00002-of-00002.safetensors")


def _pickle(value: object, **options: object) -> Callable[[Path], None]:
    return lambda bad: torch.save(value, bad / "pytorch_model.bin", **options)


def _truncated_pickle(bad: Path) -> None:
    torch.save(GOOD, bad / "pytorch_model.bin")
    path = bad / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _sparse(bad: Path) -> None:
    torch.save({"w": torch.eye(2).to_sparse()}, bad / "pytorch_model.bin")


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FILE, INDEX, BIN = "/model.safetensors", "/model.safetensors.index.json", "/pytorch_model.bin"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"
NO_JSON = "/model.safetensors: the header is not valid JSON: "

BROKEN = {
    # The folder.
    "absent": (
        _absent,
        "model 'DIR/bad': no such file or folder (DIR/bad), and not a hub id (org/name or "
        "org/name@revision)",
    ),
    "a file": (
        _is_file,
        "DIR/bad: is a file, expected a model folder or a file of weights (.safetensors, .bin, "
        ".pt, .pth, .ckpt, .gguf)",
    ),
    "empty": (_nothing, "DIR/bad: no weights (*.safetensors, *.bin, *.pt, *.pth): it is empty."),
    "no weights": (
        _other_files,
        "DIR/bad: no weights (*.safetensors, *.bin, *.pt, *.pth): it has:\n"
        "  config.json\n  training_args.bin",
    ),
    "adapter": (
        _adapter,
        "DIR/bad: an adapter that names no base: write `base+adapter` as the model",
    ),
    "adapter without weights": (
        lambda bad: (bad / "adapter_config.json").write_text("{}"),
        "DIR/bad: a PEFT adapter without its weights: expected adapter_model.safetensors or "
        "adapter_model.bin beside adapter_config.json. Fetch it again.",
    ),
    # A safetensors file.
    "empty file": (
        _file(b""),
        f"DIR/bad{FILE}: not a safetensors file: 0 bytes, expected at least the 8 bytes of the "
        "header's length. Fetch it again.",
    ),
    "7 bytes": (
        _file(b"\0" * 7),
        f"DIR/bad{FILE}: not a safetensors file: 7 bytes, expected at least the 8 bytes of the "
        "header's length. Fetch it again.",
    ),
    "Git LFS pointer": (
        _file(LFS),
        f"DIR/bad{FILE}: a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`.",
    ),
    "header beyond the file": (
        _file(_bytes(b"{}", length=1000)),
        f"DIR/bad{FILE}: truncated: the header needs 1008 bytes, the file has 10. Fetch it again.",
    ),
    "header above 100 MB": (
        _file(_bytes(b"{}", length=100_000_001)),
        f"DIR/bad{FILE}: the header claims 100000001 bytes, more than the 100000000 allowed: "
        "not a safetensors file.",
    ),
    "header of 2⁶⁴ - 1 bytes": (
        _file(b"\xff" * 8 + b"{}"),
        f"DIR/bad{FILE}: the header claims 18446744073709551615 bytes, more than the 100000000 "
        "allowed: not a safetensors file.",
    ),
    "header that is no JSON": (
        _file(_bytes(b"{'w': 1}")),
        f"DIR/bad{NO_JSON}Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)",
    ),
    "empty header": (
        _file(_bytes(b"")),
        f"DIR/bad{NO_JSON}Expecting value: line 1 column 1 (char 0)",
    ),
    "header that is no UTF-8": (
        _file(_bytes(b'{"\xff": 1}')),
        f"DIR/bad{NO_JSON}'utf-8' codec can't decode byte 0xff in position 2: invalid start byte",
    ),
    "header that is no object": (
        _file(_bytes(b"[]")),
        f"DIR/bad{FILE}: the header is not a JSON object",
    ),
    "no tensors": (_file(_bytes(b"{}")), "DIR/bad: its weight files hold no tensors"),
    "tensor twice in the header": (
        _file(_bytes(b'{"w": 1, "w": 2}')),
        f"DIR/bad{FILE}: the header names 'w' twice",
    ),
    "entry that is no object": (
        _file({"w": 1}),
        f"DIR/bad{FILE}: tensor 'w': its header entry needs dtype, shape and data_offsets",
    ),
    "entry without shape": (
        _file({"w": {"dtype": "F32", "data_offsets": [0, 8]}}),
        f"DIR/bad{FILE}: tensor 'w': its header entry needs dtype, shape and data_offsets",
    ),
    "scales of float8": (
        _tensor(dtype="F8_E8M0", shape=[8]),
        f"DIR/bad{FILE}: tensor 'w' (F8_E8M0) holds exponents, the scales of quantised weights, "
        "but no layout that can be read has it. Name the model that it was quantised from instead.",
    ),
    "unknown dtype": (
        _tensor(dtype="FOO"),
        f"DIR/bad{FILE}: tensor 'w': unknown dtype 'FOO'. Supported: {SIZES}",
    ),
    "dtype that is no text": (
        _tensor(dtype=["F32"]),
        f"DIR/bad{FILE}: tensor 'w': unknown dtype ['F32']. Supported: {SIZES}",
    ),
    "negative shape": (
        _tensor(shape=[-2]),
        f"DIR/bad{FILE}: tensor 'w': shape [-2] is not a list of sizes",
    ),
    "float shape": (
        _tensor(shape=[2.0]),
        f"DIR/bad{FILE}: tensor 'w': shape [2.0] is not a list of sizes",
    ),
    "bool shape": (
        _tensor(shape=[True, 2]),
        f"DIR/bad{FILE}: tensor 'w': shape [True, 2] is not a list of sizes",
    ),
    "shape that is no list": (
        _tensor(shape=2),
        f"DIR/bad{FILE}: tensor 'w': shape 2 is not a list of sizes",
    ),
    "one offset": (
        _tensor(offsets=[8]),
        f"DIR/bad{FILE}: tensor 'w': data_offsets [8] are not two positions",
    ),
    "negative offset": (
        _tensor(offsets=[-8, 0]),
        f"DIR/bad{FILE}: tensor 'w': data_offsets [-8, 0] are not two positions",
    ),
    "offsets that run backwards": (
        _tensor(offsets=[8, 0]),
        f"DIR/bad{FILE}: tensor 'w': data_offsets span -8 bytes, but float32 of shape [2] needs 8",
    ),
    "offsets that do not fit the shape": (
        _tensor(shape=[3]),
        f"DIR/bad{FILE}: tensor 'w': data_offsets span 8 bytes, but float32 of shape [3] needs 12",
    ),
    "overlapping tensors": (
        _file({"v": _entry(), "w": _entry(offsets=(4, 12))}, num_data_bytes=12),
        f"DIR/bad{FILE}: tensor 'w' overlaps the tensor before it: it starts at byte "
        "{4}, expected {8}",
    ),
    "hole before a tensor": (
        _file({"v": _entry(), "w": _entry(offsets=(12, 20))}, num_data_bytes=20),
        f"DIR/bad{FILE}: tensor 'w' follows a hole: it starts at byte {{12}}, expected {{8}}",
    ),
    "hole at the start": (
        _file({"w": _entry(offsets=(4, 12))}, num_data_bytes=12),
        f"DIR/bad{FILE}: tensor 'w' follows a hole: it starts at byte {{4}}, expected {{0}}",
    ),
    "trailing bytes": (
        _file({"w": _entry()}, num_data_bytes=9),
        f"DIR/bad{FILE}: longer than its tensors: its tensors end at byte {{8}}, the file has "
        "{9}. Fetch it again.",
    ),
    "truncated file": (
        _file({"w": _entry()}, num_data_bytes=3),
        f"DIR/bad{FILE}: truncated: its tensors end at byte {{8}}, the file has {{3}}. "
        "Fetch it again.",
    ),
    # Shards and their index.
    "truncated shard": (
        _truncated_shard,
        f"DIR/bad/{SHARDS[1]}: truncated: its tensors end at byte 84, the file has 79. "
        "Fetch it again.",
    ),
    "missing shard": (
        _missing_shard,
        f"DIR/bad: shards are missing:\n  {SHARDS[1]}\nFetch the model again.",
    ),
    "tensor in two shards": (
        _same_tensor_twice,
        f"DIR/bad: tensors stored twice:\n  a.weight in {SHARDS[0]} and {SHARDS[1]}",
    ),
    "index that is no JSON": (
        _index_text(b"<html>"),
        f"DIR/bad{INDEX}: is a web page, not the file itself. Fetch it again.",
    ),
    "index that is no UTF-8": (
        _index_text(b'{"weight_map": {"\xff": "x"}}'),
        f"DIR/bad{INDEX}: byte 17 (0xff) is no UTF-8. Fetch it again, or save it as UTF-8.",
    ),
    "index without weight_map": (
        _index_text(b"{}"),
        f"DIR/bad{INDEX}: not an index: no valid JSON weight_map",
    ),
    "index that is a list": (
        _index_text(b"[]"),
        f"DIR/bad{INDEX}: not an index: no valid JSON weight_map",
    ),
    "index of nothing": (
        _index({}),
        f"DIR/bad{INDEX}: not an index: weight_map names no tensor",
    ),
    "index with a list for a file": (
        _index({"a.weight": [SHARDS[0]]}),
        f"DIR/bad{INDEX}: tensor 'a.weight': ['{SHARDS[0]}'] is not a file name",
    ),
    "index that names a missing file": (
        _index({"a.weight": SHARDS[0], "b.weight": "model-3.safetensors"}),
        f"DIR/bad{INDEX}: names files that are not in the folder:\n  model-3.safetensors\n"
        "Fetch the model again.",
    ),
    "index that leaves the folder": (
        _index({"a.weight": "../good/model.safetensors"}),
        f"DIR/bad{INDEX}: tensor 'a.weight': '../good/model.safetensors' is outside the folder: "
        "refused",
    ),
    "index with an absolute path": (
        _index({"a.weight": "/etc/passwd"}),
        f"DIR/bad{INDEX}: tensor 'a.weight': '/etc/passwd' is outside the folder: refused",
    ),
    "index with a Windows path": (
        _index({"a.weight": "..\\good\\model.safetensors"}),
        f"DIR/bad{INDEX}: tensor 'a.weight': '..\\\\good\\\\model.safetensors' is outside the "
        "folder: refused",
    ),
    "index that disagrees with the shards": (
        _index({"a.weight": SHARDS[1], "b.weight": SHARDS[0], "c": SHARDS[0]}),
        f"DIR/bad{INDEX}: disagrees with the shards:\n"
        f"  a.weight: the index says {SHARDS[1]}, it is in {SHARDS[0]}\n"
        f"  b.weight: the index says {SHARDS[0]}, it is in {SHARDS[1]}\n"
        "Fetch the model again, or save it again where it was made.",
    ),
    # PyTorch files.
    "pickle that is a list": (
        _pickle([torch.ones(2)]),
        f"DIR/bad{BIN}: holds a list, expected a dict of tensors",
    ),
    "pickle with other entries": (
        _pickle(GOOD | {"epoch": 3}),
        f"DIR/bad{BIN}: 'epoch' is a int, expected a tensor. Save the model's state_dict() alone.",
    ),
    "pickle of a dict under an unknown name": (
        _pickle({"net": dict(GOOD), "epoch": 3}),
        f"DIR/bad{BIN}: 'net' is a dict, expected a tensor. Save the model's state_dict() alone.",
    ),
    "pickle of the old format": (
        _pickle(GOOD, _use_new_zipfile_serialization=False),
        f"DIR/bad{BIN}: saved in the format before PyTorch 1.6, which cannot be read in pieces. "
        "Rewrite it once: torch.save(torch.load(path, weights_only=True), path)",
    ),
    "sparse tensor": (
        _sparse,
        f"DIR/bad{BIN}: tensor 'w': sparse, nested or quantised (torch.float32, "
        "torch.sparse_coo), expected a dense one",
    ),
    "complex128 tensor": (
        _pickle({"w": torch.ones(2, dtype=torch.complex128)}),
        f"DIR/bad{BIN}: tensor 'w': unknown dtype torch.complex128. Supported: bool, uint8, int8, "
        "uint16, int16, uint32, int32, uint64, int64, complex64, float8_e4m3fn, float8_e5m2, "
        "float16, bfloat16, float32, float64",
    ),
    "empty pickle": (_pickle({}), "DIR/bad: its weight files hold no tensors"),
}


def _data_start(bad: Path) -> int:
    path = bad / "model.safetensors"
    raw = path.read_bytes() if path.is_file() else b""
    return 8 + struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else 0


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_with_this_message(case, tmp_path, capsys):
    break_it, message = BROKEN[case]
    save_tensors(tmp_path / "good", GOOD)
    bad = tmp_path / "bad"
    bad.mkdir()
    break_it(bad)
    for position in (0, 3, 4, 8, 9, 12):  # {8} in a message is byte 8 of the tensors' data
        message = message.replace(f"{{{position}}}", str(_data_start(bad) + position))

    told = _run(tmp_path, capsys, LINEAR)

    assert told == (1, f"error: DIR/spec.yaml:4:12: models[1].model: {message}\n")
    _assert_nothing_was_written(tmp_path)


def test_the_checkpoint_beside_the_broken_ones_is_good(tmp_path, capsys):
    save_tensors(tmp_path / "good", GOOD)
    bad = tmp_path / "bad"
    bad.mkdir()
    _two_shards(bad)

    assert _run(tmp_path, capsys, LINEAR) == (0, "")
    for name, tensor in load_folder(tmp_path / "out").items():
        torch.testing.assert_close(tensor, GOOD[name])


class _RunsCode:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "old"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(new_format, tmp_path, capsys):
    save_tensors(tmp_path / "good", GOOD)
    bad = tmp_path / "bad"
    bad.mkdir()
    value = GOOD | {"c": _RunsCode(tmp_path / "ran")}
    torch.save(value, bad / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)

    code, message = _run(tmp_path, capsys, LINEAR)

    assert not (tmp_path / "ran").exists()
    _assert_nothing_was_written(tmp_path)
    assert code == 1
    start = "error: DIR/spec.yaml:4:12: models[1].model: DIR/bad/pytorch_model.bin: "
    assert message.startswith(start)
    if new_format:
        assert message[len(start) :] == (
            "refused: the pickle holds more than tensors and could run code: it calls "
            "posix.system. Convert it to safetensors where you trust it.\n"
        )
    # It is a real attack: an unguarded load does run it.
    torch.load(bad / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_truncated_pickle_is_told_as_broken(tmp_path, capsys):
    save_tensors(tmp_path / "good", GOOD)
    (tmp_path / "bad").mkdir()
    _truncated_pickle(tmp_path / "bad")

    code, message = _run(tmp_path, capsys, LINEAR)

    assert code == 1
    assert message.startswith(
        "error: DIR/spec.yaml:4:12: models[1].model: DIR/bad/pytorch_model.bin: broken or "
        "truncated: "
    )
    assert message.endswith(". Fetch it again.\n")
    _assert_nothing_was_written(tmp_path)


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x80", LFS, b"no pickle", b"\x80\x02K\x01."],
    ids=["empty", "one byte", "Git LFS pointer", "text", "a number"],
)
def test_bytes_that_are_no_pytorch_file_are_told_in_one_message(raw, tmp_path, capsys):
    save_tensors(tmp_path / "good", GOOD)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "pytorch_model.bin").write_bytes(raw)

    code, message = _run(tmp_path, capsys, LINEAR)

    assert code == 1
    assert message.startswith(
        "error: DIR/spec.yaml:4:12: models[1].model: DIR/bad/pytorch_model.bin: "
    )
    # Such a file is broken, not an attack.
    assert "could run code" not in message
    if raw == LFS:
        assert "git lfs pull" in message
    _assert_nothing_was_written(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"w": 1' + b"1" * 5000 + b"}",
        b'{"w\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [0, 1' + b"0" * 30 + b'], "data_offsets": [0, 0]}}',
        b'{"a":' * 100_000,
    ],
    ids=["long number", "half a character", "size beyond 64 bits", "deep"],
)
def test_json_that_python_takes_but_the_format_does_not_is_refused(header, tmp_path, capsys):
    save_tensors(tmp_path / "good", GOOD)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(_bytes(header, bytes(8)))

    code, message = _run(tmp_path, capsys, LINEAR)

    assert code == 1
    start = "error: DIR/spec.yaml:4:12: models[1].model: DIR/bad/model.safetensors: "
    assert message.startswith(start)
    # What is wrong is the header, and not that tensors are left over or lacking.
    assert "longer than its tensors" not in message
    _assert_nothing_was_written(tmp_path)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["of another device", "nested", "under a number"])
def test_an_entry_of_a_pickle_that_cannot_be_read_is_refused_by_name(kind, tmp_path, capsys):
    save_tensors(tmp_path / "good", GOOD)
    (tmp_path / "bad").mkdir()
    entry = {
        "of another device": lambda: {"w": torch.empty(2, device="meta")},
        "nested": lambda: {"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        "under a number": lambda: {7: torch.ones(2)},
    }[kind]()
    torch.save(GOOD | entry, tmp_path / "bad" / "pytorch_model.bin")

    code, message = _run(tmp_path, capsys, LINEAR)

    assert code == 1
    assert message.startswith(
        "error: DIR/spec.yaml:4:12: models[1].model: DIR/bad/pytorch_model.bin: "
    )
    assert ("7" if kind == "under a number" else "'w'") in message
    _assert_nothing_was_written(tmp_path)


@pytest.mark.parametrize("file", ["x" * 5000, "a\0b", "\ud800"], ids=["long", "nul", "half"])
def test_an_index_that_names_what_no_file_can_be_named_is_refused(file, tmp_path, capsys):
    save_tensors(tmp_path / "good", GOOD)
    (tmp_path / "bad").mkdir()
    _index({"a.weight": file})(tmp_path / "bad")

    code, message = _run(tmp_path, capsys, LINEAR)

    assert code == 1
    assert message.startswith(
        "error: DIR/spec.yaml:4:12: models[1].model: DIR/bad/model.safetensors.index.json: "
    )
    _assert_nothing_was_written(tmp_path)


# Models that do not fit together.

TASK = """\
merge_method: task_arithmetic
base_model: DIR/base
models:
  - model: DIR/a
  - model: DIR/b
parameters:
  weight: 0.5
"""


def _task(method: str) -> str:
    """Return the spec for another method, without a weight where it takes none."""
    text = TASK.replace("task_arithmetic", method)
    return text if "weight" in METHODS[method].parameters else text.partition("parameters:")[0]


BASE = {
    "w.weight": torch.zeros(2, 2),
    "x.weight": torch.zeros(3),
    "position_ids": torch.arange(4),
}
A = BASE | {"w.weight": torch.full((2, 2), 2.0), "x.weight": torch.ones(3)}
B = BASE | {"w.weight": torch.full((2, 2), 4.0), "x.weight": torch.full((3,), 3.0)}


def _without(tensors: dict, *names: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _save(folder: Path, *, base: dict = BASE, a: dict = A, b: dict = B) -> None:
    for name, tensors in (("base", base), ("a", a), ("b", b)):
        save_tensors(folder / name, tensors)


def test_tensors_missing_in_a_model_are_all_listed(tmp_path, capsys):
    _save(tmp_path, a=_without(A, "w.weight"), b=_without(B, "w.weight", "position_ids"))
    # What a model class computes may be missing; see test_buffers.

    assert _run(tmp_path, capsys, TASK) == (
        1,
        "error: the models do not hold the same tensors\n"
        "2 tensor(s) missing:\n"
        "  w.weight: not in DIR/a\n"
        "  w.weight: not in DIR/b\n"
        "`missing: base` in the spec takes a model as unchanged where it lacks a tensor (it needs "
        "a base_model).\n",
    )
    _assert_nothing_was_written(tmp_path)


def test_tensors_that_the_base_lacks_are_all_listed(tmp_path, capsys):
    _save(tmp_path, a=A | {"y": torch.ones(1), "z": torch.ones(1)}, b=B | {"z": torch.ones(1)})

    assert _run(tmp_path, capsys, TASK) == (
        1,
        "error: the models do not hold the same tensors\n"
        "3 tensor(s) extra:\n"
        "  y: in DIR/a, not in DIR/base\n"
        "  z: in DIR/a, not in DIR/base\n"
        "  z: in DIR/b, not in DIR/base\n"
        "`extra: copy` in the spec copies such tensors, `extra: drop` leaves them out. "
        "What is left out is lost: these weights will not be in the output.\n",
    )
    _assert_nothing_was_written(tmp_path)


def test_tensors_of_another_shape_or_kind_are_all_listed(tmp_path, capsys):
    a = A | {"w.weight": torch.ones(2, 3), "position_ids": torch.arange(5).float()}
    _save(tmp_path, a=a, b=B | {"x.weight": torch.ones(4).int()})

    assert _run(tmp_path, capsys, TASK) == (
        1,
        "error: the models do not hold the same tensors\n"
        "3 tensor(s) of another shape or kind:\n"
        "  position_ids: int64 [4] in DIR/base, float32 [5] in DIR/a\n"
        "  w.weight: float32 [2, 2] in DIR/base, float32 [2, 3] in DIR/a\n"
        "  x.weight: float32 [3] in DIR/base, int32 [4] in DIR/b\n"
        "Such models cannot be merged as they are.\n",
    )
    _assert_nothing_was_written(tmp_path)


def test_every_kind_of_difference_is_told_at_once(tmp_path, capsys):
    a = _without(A, "x.weight") | {"y": torch.ones(1), "w.weight": torch.ones(5)}
    _save(tmp_path, a=a)

    code, message = _run(tmp_path, capsys, TASK)

    assert code == 1
    for row in (
        "  x.weight: not in DIR/a\n",
        "  y: in DIR/a, not in DIR/base\n",
        "  w.weight: float32 [2, 2] in DIR/base, float32 [5] in DIR/a\n",
    ):
        assert row in message


def test_a_long_list_of_tensors_is_cut_and_counted(tmp_path, capsys):
    extra = {f"y{number:02}": torch.ones(1) for number in range(25)}
    _save(tmp_path, a=A | extra)

    code, message = _run(tmp_path, capsys, TASK)

    assert code == 1
    assert "25 tensor(s) extra:\n" in message
    num_listed = message.count("not in DIR/base")  # fewer where the folders' names are long
    assert 3 <= num_listed <= 20
    assert f"  … and {25 - num_listed} more\n" in message


def test_missing_base_takes_a_model_as_unchanged(tmp_path, capsys):
    _save(tmp_path, a=_without(A, "x.weight", "position_ids"))

    assert _run(tmp_path, capsys, TASK + "missing: base\n") == (0, "")

    merged = load_folder(tmp_path / "out")
    torch.testing.assert_close(merged["w.weight"], torch.full((2, 2), 3.0))
    torch.testing.assert_close(merged["x.weight"], torch.full((3,), 1.5))
    torch.testing.assert_close(merged["position_ids"], torch.arange(4))


def test_missing_base_takes_the_base_in_a_mean_of_weights(tmp_path, capsys):
    base = BASE | {"x.weight": torch.full((3,), 9.0)}
    _save(tmp_path, base=base, a=_without(A, "x.weight"))
    text = TASK.replace("task_arithmetic", "linear")

    assert _run(tmp_path, capsys, text + "missing: base\n") == (0, "")

    torch.testing.assert_close(load_folder(tmp_path / "out")["x.weight"], torch.full((3,), 6.0))


def test_extra_copy_copies_and_extra_drop_leaves_out(tmp_path, capsys):
    only_a, both = torch.tensor([1.5, -2.0]), torch.tensor([7], dtype=torch.int64)
    _save(tmp_path, a=A | {"y": only_a, "z": both}, b=B | {"z": both})

    assert _run(tmp_path, capsys, TASK + "extra: copy\n") == (0, "")
    merged = load_folder(tmp_path / "out")
    assert set(merged) == {*BASE, "y", "z"}
    assert torch.equal(merged["y"], only_a)
    assert torch.equal(merged["z"], both)

    assert _run(tmp_path, capsys, TASK + "extra: drop\n", "--overwrite") == (0, "")
    assert set(load_folder(tmp_path / "out")) == set(BASE)


def test_extra_copy_stops_where_two_models_disagree(tmp_path, capsys):
    _save(tmp_path, a=A | {"y": torch.ones(2)}, b=B | {"y": torch.zeros(2)})

    assert _run(tmp_path, capsys, TASK + "extra: copy\n") == (
        1,
        "error: tensor 'y' (float32, extra, copied) cannot be merged, only copied, but it differs "
        "between:\n  DIR/a\n  DIR/b\n"
        "Give `extra: copy` to one of them and `extra: drop` to the others.\n",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2, 2), torch.ones(2, 2).char()),
    ],
    ids=["shape", "dtype", "kind"],
)
def test_extra_copy_stops_where_two_models_hold_another_kind_before_any_work(
    a, b, tmp_path, capsys
):
    _save(tmp_path, a=A | {"y": a}, b=B | {"y": b})

    code, message = _run(tmp_path, capsys, TASK + "extra: copy\n")

    assert code == 1
    assert "y: differs between DIR/a, DIR/b" in message
    _assert_nothing_was_written(tmp_path)


def test_integer_buffers_that_differ_stop_the_merge(tmp_path, capsys):
    _save(tmp_path, b=B | {"position_ids": torch.arange(4) + 1})

    assert _run(tmp_path, capsys, TASK) == (
        1,
        "error: tensor 'position_ids' (int64, int64 buffer) cannot be merged, only copied, but it "
        "differs between:\n  DIR/base\n  DIR/a\n  DIR/b\n"
        "`unequal: base` takes the base model's, or make it equal.\n",
    )
    assert not (tmp_path / "out").exists()


def test_integer_buffers_of_another_integer_type_that_differ_stop_the_merge(tmp_path, capsys):
    _save(tmp_path, b=B | {"position_ids": torch.arange(4).int() + 1})

    assert _run(tmp_path, capsys, TASK) == (
        1,
        "error: tensor 'position_ids' (int64, int64 or int32 buffer) cannot be merged, only "
        "copied, but its dtype and its values differ between:\n"
        "  DIR/base (int64)\n  DIR/a (int64)\n  DIR/b (int32)\n"
        "`unequal: base` takes the base model's, or make it equal.\n",
    )
    assert not (tmp_path / "out").exists()


# Values that are not finite.

NON_FINITE = "Check that model; --allow-non-finite goes on and lists such tensors.\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", SEVERAL)
def test_a_value_that_is_not_finite_is_told_by_tensor_and_model(value, method, tmp_path, capsys):
    broken = A["w.weight"].clone()
    broken[1, 0] = value
    _save(tmp_path, a=A | {"w.weight": broken})

    assert _run(tmp_path, capsys, _task(method)) == (
        1,
        "error: tensor 'w.weight' has values that are infinite or NaN in DIR/a. " + NON_FINITE,
    )
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_not_finite_stops_a_copy_too(tmp_path, capsys):
    broken = {"w.weight": torch.tensor([1.0, float("nan")])}
    _save(tmp_path, a=broken)

    text = "merge_method: passthrough\nmodels:\n  - model: DIR/a\n"
    assert _run(tmp_path, capsys, text) == (
        1,
        "error: tensor 'w.weight' has values that are infinite or NaN in DIR/a. " + NON_FINITE,
    )


def test_every_model_with_such_values_is_named(tmp_path, capsys):
    broken = BASE | {"w.weight": torch.full((2, 2), float("inf"))}
    _save(tmp_path, base=broken, b=broken | {"w.weight": -broken["w.weight"]})

    code, message = _run(tmp_path, capsys, TASK)

    assert code == 1
    assert "infinite or NaN in DIR/base and in DIR/b." in message


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_a_sum_that_overflows_the_output_is_told(method, tmp_path, capsys):
    large = {"w.weight": torch.full((2, 2), 60000.0, dtype=torch.float16)}
    zero = {"w.weight": torch.zeros(2, 2, dtype=torch.float16)}
    _save(tmp_path, base=zero, a=large, b={"w.weight": large["w.weight"] / 2})
    text = TASK.replace("task_arithmetic", method).replace("0.5", "1")
    text += "  normalize: false\n"

    assert _run(tmp_path, capsys, text) == (
        1,
        "error: tensor 'w.weight' has values that are infinite or NaN in the output (float16). "
        "Check that model; --allow-non-finite goes on and lists such tensors.\n",
    )
    assert not (tmp_path / "out").exists()


def test_a_copy_that_overflows_a_narrower_output_blames_the_output(tmp_path, capsys):
    save_tensors(tmp_path / "a", {"w.weight": torch.tensor([1e6])})
    text = "merge_method: passthrough\nmodels:\n  - model: DIR/a\nout_dtype: float16\n"

    code, message = _run(tmp_path, capsys, text)

    assert code == 1
    assert "infinite or NaN in the output (float16)" in message


@pytest.mark.parametrize("method", SEVERAL)
def test_allow_non_finite_goes_on_and_lists_such_tensors(method, tmp_path, capsys):
    broken = A["w.weight"].clone()
    broken[1, 0] = float("nan")
    _save(tmp_path, a=A | {"w.weight": broken})
    spec = _spec(tmp_path, _task(method))
    arguments = ["run", str(spec), "--output", str(tmp_path / "out")]

    assert cli.main([*arguments, "--allow-non-finite", "--json"]) == 0

    listed = json.loads(capsys.readouterr().out)["non_finite"]
    assert listed == {"w.weight": [f"in {tmp_path / 'a'}", "in the output (float32)"]}
    manifest = json.loads((tmp_path / "out" / "outliermerge.json").read_text())
    tensors = manifest["tensors"]
    assert tensors["w.weight"]["non_finite"] == listed["w.weight"]
    assert "non_finite" not in tensors["x.weight"]
    merged = load_folder(tmp_path / "out")
    assert not merged["w.weight"].isfinite().all()
    assert merged["x.weight"].isfinite().all()
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


# Hub ids.


def _resolve(reference: str, tmp_path: Path, capsys) -> tuple[int, str]:
    return _run(tmp_path, capsys, f"merge_method: linear\nmodels:\n  - model: {reference!r}\n")


@pytest.mark.parametrize(
    ("reference", "command"),
    [
        ("no-such-org/no-such-model", "hf download no-such-org/no-such-model"),
        ("no-such-org/m@v1.0", "hf download no-such-org/m --revision v1.0"),
    ],
)
def test_a_hub_model_that_is_not_in_the_cache_is_told_with_the_command(
    reference, command, tmp_path, capsys, monkeypatch
):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)

    assert _resolve(reference, tmp_path, capsys) == (
        1,
        f"error: DIR/spec.yaml:3:12: models[0].model: model {reference!r}: the hub is not asked, "
        "as HF_HUB_OFFLINE is set.\n"
        f"Looked for DIR/{reference}, then in the hub's cache {constants.HF_HUB_CACHE}.\n"
        f"To fetch it: {command}\n",
    )
    _assert_nothing_was_written(tmp_path)


@pytest.mark.parametrize(
    ("reference", "folder"),
    [
        ("./no-such-org/model", "DIR/no-such-org/model"),
        ("../no-such-model", "ABOVE/no-such-model"),
        ("just-a-name", "DIR/just-a-name"),
        ("a/b/c", "DIR/a/b/c"),
        ("org/name@", "DIR/org/name@"),
        ("org/na me", "DIR/org/na me"),
    ],
)
def test_a_reference_that_is_no_hub_id_is_looked_for_on_disk_alone(
    reference, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = folder.replace("ABOVE", str(tmp_path.parent))

    assert _resolve(reference, tmp_path, capsys) == (
        1,
        f"error: DIR/spec.yaml:3:12: models[0].model: model {reference!r}: no such file or "
        f"folder ({folder}), and not a hub id (org/name or org/name@revision)\n",
    )
    _assert_nothing_was_written(tmp_path)


@pytest.mark.parametrize("reference", ["org/..", "-org/name-", "org/a--b", "org/name.git"])
def test_a_name_that_the_hub_does_not_allow_is_told_in_one_message(
    reference, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    code, message = _resolve(reference, tmp_path, capsys)

    assert code == 1
    assert message.startswith("error: DIR/spec.yaml:3:12: models[0].model: ")
    assert reference in message
