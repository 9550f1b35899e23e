"""Lines of a journal that are whole and of another form than this version's count for nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hostile.cases import LINEAR, pair

import outliermerge
from outliermerge.errors import OutlierMergeError
from outliermerge.output import run as runs

ODD = [None, 1, -1, 1.5, "x", "\ud800", [], [1], {}, {"a": 1}, True]
RESULT = ["tensor", "action", "checksum", "read", "read_bytes", "statistics", "non_finite"]


class Killed(Exception):
    """What ends a run before its output has its name."""


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Leave a run that ended before the last step, and return what its journal says."""
    pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/a").write_text("mine")
    Path("spec.yaml").write_text(LINEAR)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(runs, "name_all", killed)
        with pytest.raises(Killed):
            outliermerge.run("spec.yaml", output="out")
    raw = Path("out.partial.journal").read_bytes().splitlines()
    return [json.loads(line.rpartition(b"\t")[0]) for line in raw]


def _write(lines: list[dict[str, Any]]) -> None:
    texts = [json.dumps(line).encode() for line in lines]
    Path("out.partial.journal").write_bytes(
        b"".join(t + b"\t" + xxhash.xxh3_64_hexdigest(t).encode() + b"\n" for t in texts)
    )


def _run_again(lines: list[dict[str, Any]]) -> int:
    """Return how many tensors were taken over; -1 where the run is refused."""
    _write(lines)
    try:
        num_resumed = outliermerge.run("spec.yaml", output="out").num_resumed
    except OutlierMergeError as error:
        assert "holds something else" in str(error)
        return -1
    finally:
        assert Path("victim/a").read_text() == "mine"
    assert outliermerge.verify("out") == []
    return num_resumed


def test_as_it_was_written_it_is_taken_over(lines):
    assert _run_again(lines) == 2


@pytest.mark.parametrize("key", RESULT)
def test_a_tensor_of_another_form_is_made_again(lines, key):
    index = next(number for number, line in enumerate(lines) if "tensor" in line)
    for value in ODD:
        fits = isinstance(value, type(lines[index][key])) and value is not True
        changed = [*lines[:index], lines[index] | {key: value}, *lines[index + 1 :]]
        if not fits or value == "\ud800":
            _resumed_in_a_copy(changed, 1)
    _resumed_in_a_copy([*lines[:index], lines[index] | {"more": 1}, *lines[index + 1 :]], 1)
    del lines[index][key]
    assert _run_again(lines) in (1, 2)  # 2: a line that names no tensor is none of a tensor


def _resumed_in_a_copy(lines: list[dict[str, Any]], expected: int) -> None:
    """Run again, and leave what the killed run left for the next call."""
    shutil.copytree("out.partial", "kept")
    number = Path("kept").stat().st_ino
    assert _run_again(lines) == expected
    shutil.rmtree("out")
    Path("kept").rename("out.partial")
    for line in lines:
        if "folder" in line:
            line["folder"] = number


@pytest.mark.parametrize("key", ["shards", "marks", "folder", "process", "files", "naming"])
@pytest.mark.parametrize("value", ODD)
@pytest.mark.sampled(4)
def test_other_lines_of_another_form_end_in_no_traceback(lines, key, value):
    found = [line | {key: value} if key in line else line for line in lines]
    assert _run_again(found if found != lines else [*lines, {key: value}]) in (-1, 2)


@pytest.mark.parametrize("source", ["", "../victim", "/etc", ".."])
def test_a_journal_moves_nothing_of_others(lines, source):
    move = {"source": source, "new": Path("victim").stat().st_ino, "old": None}
    assert _run_again([*lines, {"naming": [move]}]) == 2


@pytest.mark.parametrize("number", [1, 3])
def test_a_journal_of_another_version_is_left_alone(lines, number):
    raw = Path("out.partial.journal").read_bytes()
    raw = raw.replace(b'"outliermerge journal": 2', b'"outliermerge journal": %d' % number)
    Path("out.partial.journal").write_bytes(raw)
    with pytest.raises(OutlierMergeError, match="is of another version of outliermerge"):
        outliermerge.run("spec.yaml", output="out")
    assert Path("out.partial.journal").read_bytes() == raw
