"""An old output that cannot be removed costs nothing of the new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hostile.cases import LINEAR, pair

import outliermerge
from outliermerge.errors import OutlierMergeError
from outliermerge.output import naming, ownership
from outliermerge.storage import system


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(LINEAR)
    outliermerge.run("spec.yaml", output="out")
    return tmp_path


def test_an_old_output_without_rights_is_refused_before_the_merge(monkeypatch):
    def access(path: str, mode: int) -> bool:
        return not (mode & os.W_OK and Path(path).name == "out")

    monkeypatch.setattr(ownership.os, "access", access)
    with pytest.raises(OutlierMergeError, match="you have no right to remove its files"):
        outliermerge.run("spec.yaml", output="out", overwrite=True)
    assert not list(Path().glob("out.*"))
    assert outliermerge.verify("out") == []


def test_where_the_old_output_stays_the_new_one_is_whole_and_said_to_be(monkeypatch):
    before = Path("out").stat().st_ino

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "out.partial/README.md")

    with monkeypatch.context() as context:
        context.setattr(naming, "remove_files", refuse)
        with pytest.raises(OutlierMergeError, match=r"README.md: cannot be removed.*out is made"):
            outliermerge.run("spec.yaml", output="out", overwrite=True)
        assert Path("out").stat().st_ino != before
        assert outliermerge.verify("out") == []
    assert outliermerge.run("spec.yaml", output="out", overwrite=True).num_resumed == 2
    assert not list(Path().glob("out.*"))


def test_a_folder_that_may_not_be_listed_is_synced_with_the_disk(monkeypatch, tmp_path):
    def refuse(*_: object) -> None:
        raise PermissionError

    synced = []
    monkeypatch.setattr(system.os, "open", refuse)
    monkeypatch.setattr(system.os, "sync", lambda: synced.append(True))
    system.sync_folder(tmp_path)
    assert synced
