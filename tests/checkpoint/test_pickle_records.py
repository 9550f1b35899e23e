"""A pickled tensor is of the bytes of its own record, and of no more elements than a file holds."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from outliermerge.checkpoint.formats.pytorch_file import load_strided, read_file
from outliermerge.errors import OutlierMergeError
from outliermerge.storage.stamps import open_file


def _saved(path: Path, **tensors: torch.Tensor) -> Path:
    torch.save(tensors, path)
    return path


def _rewritten(path: Path, change: Callable[[str, bytes], Iterator[bytes]]) -> Path:
    """Write an archive again, each record as often and with what bytes a function says."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            for data in change(name.partition("/")[2], old.read(name)):
                new.writestr(name, data)
    path.write_bytes(buffer.getvalue())
    return path


def test_a_record_that_is_too_short_is_refused_by_its_tensor(tmp_path):
    path = _saved(tmp_path / "m.bin", a=torch.ones(5), b=torch.ones(5))

    def cut(name: str, data: bytes) -> Iterator[bytes]:
        yield data[:12] if name == "data/0" else data

    for read in (read_file, _load):
        with pytest.raises(OutlierMergeError, match=r"'a' needs 20 bytes .* has fewer"):
            read(_rewritten(path, cut))


def _load(path: Path) -> None:
    with open_file(path) as file:
        load_strided(path, file.fileno())


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("twice", ["data/0", "data.pkl"])
def test_two_records_of_one_name_are_refused(tmp_path, twice):
    path = _saved(tmp_path / "m.bin", a=torch.ones(5))

    def double(name: str, data: bytes) -> Iterator[bytes]:
        yield data
        if name == twice:
            yield bytes(len(data))

    with pytest.raises(OutlierMergeError, match="two records of one name"):
        read_file(_rewritten(path, double))


def test_a_tensor_of_more_elements_than_the_file_has_is_refused(tmp_path):
    path = _saved(tmp_path / "m.bin", a=torch.zeros(1).expand(1 << 40))
    told = r"'a' of shape .* has 4 bytes in the file and is of 4,398,046,511,104, more"
    with pytest.raises(OutlierMergeError, match=told):
        read_file(path)


def test_views_of_one_record_and_small_expanded_buffers_are_read(tmp_path):
    values = torch.arange(10.0)
    path = _saved(
        tmp_path / "m.bin",
        a=values[3:5],
        b=values[::5],
        c=torch.zeros(1).expand(1000),
        d=torch.zeros(0),
        e=values,
    )
    metas, _, _ = read_file(path)
    assert [meta.shape for meta in metas] == [(2,), (2,), (1000,), (0,), (10,)]


def test_a_long_name_of_what_is_called_and_a_large_pickle_are_refused(tmp_path):
    path = _saved(tmp_path / "m.bin", a=torch.ones(5))
    for data, what in (
        (b"c" + b"o" * 10**6 + b"\nx\n.", "calls ooo"),
        (bytes(4 << 20), "pickle has"),
    ):

        def put(name: str, old: bytes, data: bytes = data) -> Iterator[bytes]:
            yield data if name == "data.pkl" else old

        with pytest.raises(OutlierMergeError, match=what):
            read_file(_rewritten(path, put))


def test_the_pickle_of_ten_thousand_tensors_is_read(tmp_path):
    names = (f"model.layers.{number}.mlp.experts.7.down_proj.weight" for number in range(10_000))
    path = _saved(tmp_path / "m.bin", **{name: torch.ones(1) for name in names})
    assert len(read_file(path)[0]) == 10_000
