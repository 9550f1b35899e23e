"""Claims, which back locks on disks that several machines share; machines are made up here."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import save_tensors

import outliermerge
from outliermerge import OutlierMergeError, RunOptions
from outliermerge.output import claims, journal
from outliermerge.output.claims import Claim, ClaimedError, is_own_disk
from outliermerge.output.journal import BusyError, Journal
from outliermerge.output.parts import run_part


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every disk be one that other machines may use, and all times be short."""
    monkeypatch.setattr(claims, "is_own_disk", lambda folder: False)
    monkeypatch.setattr(claims, "RENEWED_SECONDS", 0.05)
    monkeypatch.setattr(claims, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(claims, "_POLL_SECONDS", 0.02)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What lets this process be on another machine from then on, which knows no locks of others."""

    def move() -> None:
        monkeypatch.setattr(claims, "machine", lambda: "another machine")
        monkeypatch.setattr(journal, "lock", lambda descriptor: True)

    return move


def each_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every claim be made and looked at on a machine of its own."""
    monkeypatch.setattr(claims, "machine", lambda: str(time.monotonic_ns()))


def test_what_another_machine_works_on_is_held(
    tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    held = Journal(tmp_path / "out")
    held.begin({}, process={"pid": 7, "host": "node7", "began": 0})
    elsewhere()
    with pytest.raises(BusyError, match="process 7 on node7"):
        Journal(tmp_path / "out")
    held.close()
    Journal(tmp_path / "out").close()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial.journal"]


def test_what_is_begun_is_held_before_its_holder_has_said_so(
    tmp_path: Path, elsewhere: Callable[[], None]
) -> None:
    held = Journal(tmp_path / "out")
    elsewhere()
    with pytest.raises(BusyError, match=f"process {os.getpid()} on "):
        Journal(tmp_path / "out")
    held.close()


def test_a_claim_that_is_not_renewed_is_taken_over_and_its_holder_stops(
    tmp_path: Path, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "RENEWED_SECONDS", 2.0)  # as if it was stopped for that long
    held = Journal(tmp_path / "out")
    held.begin({})
    monkeypatch.setattr(claims, "RENEWED_SECONDS", 0.05)
    elsewhere()
    began = time.monotonic()
    other = Journal(tmp_path / "out")
    assert time.monotonic() - began >= claims.STALE_SECONDS
    held._claim._thread.join()
    with pytest.raises(OutlierMergeError, match="another process has taken over"):
        held.add({"a": 1})
    held._claim = None
    other.add({"b": 2})
    other.close()
    held.close()
    after = Journal(tmp_path / "out")
    assert after.lines[-1] == {"b": 2}
    assert {"a": 1} not in after.lines
    after.close()


def test_a_claim_of_this_machine_is_as_good_as_its_lock(tmp_path: Path) -> None:
    """The lock was had, so who made the claim has ended."""
    path = tmp_path / "out.partial.journal.claim"
    claims._make(path, "token")
    began = time.monotonic()
    Journal(tmp_path / "out").close()
    assert time.monotonic() - began < claims.STALE_SECONDS
    assert not path.exists()


def test_a_torn_claim_is_waited_for_and_taken_over(tmp_path: Path) -> None:
    (tmp_path / "locked.claim").write_bytes(b'{"machine"')
    claim = Claim.of(tmp_path / "locked")
    assert claim is not None
    claim.release()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_claim_at_once_one_has_it(
    tmp_path: Path, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is on a machine of its own; the claim of a machine that is gone is there before."""
    monkeypatch.setattr(claims, "RENEWED_SECONDS", 1.0)  # eight threads share two processors
    monkeypatch.setattr(claims, "STALE_SECONDS", 3.0)
    claims._make(tmp_path / "locked.claim", "of a machine that is gone")
    elsewhere()
    won, lost, others = [], [], []

    def try_it() -> None:
        try:
            won.append(Claim.of(tmp_path / "locked"))
        except ClaimedError:
            lost.append(1)
        except BaseException as error:
            others.append(error)

    each_its_own(monkeypatch)
    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert others == []
    assert (len(won), len(lost)) == (1, 7)
    won[0].release()
    assert list(tmp_path.iterdir()) == []


def test_parts_on_machines_without_common_locks_write_one_output(
    tmp_path: Path, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "task"):
        tensors = {f"w{n}": torch.randn(20, 30, generator=generator) for n in range(12)}
        save_tensors(tmp_path / name, tensors)
    planned = outliermerge.plan(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(tmp_path / "base"),
            "models": [{"model": str(tmp_path / "task"), "parameters": {"weight": 0.5}}],
        }
    )
    elsewhere()
    each_its_own(monkeypatch)
    found: list[object] = []

    def write(part: int) -> None:
        try:
            found.append(run_part(planned, tmp_path / "out", part, 4, RunOptions(threads=1)))
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=write, args=(part,)) for part in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(number, int) for number in found), found
    assert sum(found) == 12
    result = outliermerge.join(planned, tmp_path / "out")
    outliermerge.run(planned, output=tmp_path / "whole")
    whole, joined = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out"))
    assert (result.num_resumed, joined) == (12, whole)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"base", "task", "out", "whole"}


MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /mnt/nfs rw,relatime shared:1 - nfs4 server:/ rw,local_lock=none
31 30 0:41 / /mnt/nfs/scratch rw - tmpfs tmpfs rw
32 22 0:42 / /mnt/with\\040space rw - beegfs beegfs rw
"""


@pytest.mark.parametrize(
    ("folder", "is_own"),
    [
        ("/home", True),
        ("/mnt", True),
        ("/mnt/nfs", False),
        ("/mnt/nfs/models", False),
        ("/mnt/nfsx", True),
        ("/mnt/nfs/scratch/a", True),
        ("/mnt/with space/a", False),
    ],
)
def test_disks_of_one_machine_are_told_by_their_file_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, is_own: bool
) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    monkeypatch.setattr(claims, "_MOUNTS", tmp_path / "mountinfo")
    assert is_own_disk(Path(folder)) == is_own


def test_a_disk_of_which_nothing_is_known_may_be_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_MOUNTS", tmp_path / "absent")
    assert not is_own_disk(tmp_path)
