"""What a run takes from the machine: threads, memory, the page cache, direct writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from checkpoints import load_folder, save_tensors

import outliermerge
from outliermerge.execution import threads as execute
from outliermerge.storage import machine, system


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000\n", 6), ("400000 100000\n", 4), ("150000 100000\n", 2), ("1000 100000\n", 1),
     ("900000 100000\n", 6), ("", 6)],
    ids=["none", "four", "one and a half", "little", "more than there are", "unreadable"],
)  # fmt: skip
def test_a_containers_quota_limits_the_threads(quota, expected, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    assert machine.num_processors() == expected
    assert machine.num_threads(0) == expected + 2
    assert machine.num_threads(5) == 5


def test_a_containers_limit_is_its_memory(tmp_path, monkeypatch):
    free = machine.free_memory_bytes()
    assert free is not None and free > 1 << 20
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1048576\n")
    assert machine.free_memory_bytes() == 1 << 20
    (tmp_path / "memory.current").write_text("1000000\n")
    assert machine.free_memory_bytes() == 48_576
    cached = "anon 300000\nfile 700000\ninactive_file 500000\nactive_file 100000\nshmem 100000\n"
    (tmp_path / "memory.stat").write_text(cached)
    assert machine.free_memory_bytes() == 648_576
    (tmp_path / "memory.current").write_text("1900000\n")
    assert machine.free_memory_bytes() == 0


V2, V1 = "0::/job\n", "4:cpu,cpuacct:/job/step\n3:memory:/job/step\n0::/\n"


@pytest.mark.parametrize("place", ["", "job", "job/step"])
def test_limits_of_version_1_count_wherever_the_group_is(place, tmp_path, monkeypatch):
    """Docker shows a container its own group as the root; Slurm gives it a name below."""
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    memory, cpu = root / "memory" / place, root / "cpu" / place
    for folder in (memory, cpu, proc / "self"):
        folder.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (proc / "self/cgroup").write_text(V1)
    monkeypatch.setattr(machine, "_CGROUP", root)
    monkeypatch.setattr(machine, "_PROC", proc)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    (memory / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (cpu / "cpu.cfs_quota_us").write_text("-1\n")
    (cpu / "cpu.cfs_period_us").write_text("100000\n")
    assert (machine.free_memory_bytes(), machine.num_processors()) == (8000 * 1024, 6)
    (memory / "memory.limit_in_bytes").write_text("1048576\n")
    (memory / "memory.usage_in_bytes").write_text("1000000\n")
    (memory / "memory.stat").write_text(
        "active_file 9\ntotal_inactive_file 500000\ntotal_active_file 100000\n"
    )
    (cpu / "cpu.cfs_quota_us").write_text("150000\n")
    assert (machine.free_memory_bytes(), machine.num_processors()) == (648_576, 2)


def test_the_limits_of_all_groups_around_a_process_count(tmp_path, monkeypatch):
    proc, job = tmp_path / "proc", tmp_path / "job"
    (proc / "self").mkdir(parents=True)
    job.mkdir()
    (proc / "self/cgroup").write_text(V2)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_PROC", proc)
    assert machine.free_memory_bytes() is None
    (job / "memory.max").write_text("3000000\n")
    assert machine.free_memory_bytes() == 3_000_000
    (tmp_path / "memory.max").write_text("2000000\n")
    assert machine.free_memory_bytes() == 2_000_000
    (proc / "self/cgroup").write_text("0::/../../job\n")  # seen from a namespace beside it
    assert machine.free_memory_bytes() == 2_000_000


def is_cached(path: Path, position: int) -> bool:
    """Tell whether a byte of a file can be read without waiting for the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], position, os.RWF_NOWAIT) == 1
    except OSError as error:
        assert error.errno == errno.EAGAIN
        return False
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("is_large", [False, True])
def test_a_merge_larger_than_memory_leaves_the_page_cache(is_large, tmp_path, monkeypatch):
    tensors = {"w": torch.randn(4, 300_000), "v": torch.randn(4, 300_000)}
    folders = [
        save_tensors(tmp_path / str(n), {name: t * (1 + n / 100) for name, t in tensors.items()})
        for n in range(3)
    ]
    for folder in folders:  # what is still to be written to the disk cannot be given up
        with (folder / "model.safetensors").open("rb") as file:
            os.fsync(file.fileno())
    monkeypatch.setattr(execute, "free_memory_bytes", lambda: 1 << (20 if is_large else 40))
    spec = {
        "merge_method": "min_sigma",
        "base_model": str(folders[0]),
        "models": [{"model": str(folder)} for folder in folders[1:]],
    }
    outliermerge.run(spec, output=tmp_path / "out")
    for folder in folders:
        path = folder / "model.safetensors"
        places = range(1 << 16, path.stat().st_size, 1 << 20)
        assert {is_cached(path, place) for place in places} == {not is_large}


def test_files_in_memory_are_not_written_past_the_page_cache():
    path = Path("/dev/shm") / f"outliermerge-test-{os.getpid()}"
    path.write_bytes(b"x")
    try:
        assert system.open_direct(path) == -1
    finally:
        path.unlink()


@pytest.mark.parametrize("is_direct", [False, True])
def test_outputs_are_the_same_however_they_are_written(is_direct, tmp_path, monkeypatch):
    shapes = {"odd": (70_001,), "pages": (512, 1024), "large": (3, 700_000), "small": (5,)}
    base = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    other = {name: tensor + 0.5 for name, tensor in base.items()}
    models = [save_tensors(tmp_path / "base", base), save_tensors(tmp_path / "other", other)]
    opened = []

    def open_direct(path: Path) -> int:
        opened.append(system.open_direct(path) if is_direct else -1)
        return opened[-1]

    monkeypatch.setattr("outliermerge.output.writer.open_direct", open_direct)
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(models[0]),
        "models": [{"model": str(models[1]), "parameters": {"weight": 1.0}}],
    }
    result = outliermerge.run(spec, output=tmp_path / "out")
    assert len(opened) == 1
    assert outliermerge.verify(result.output) == []
    merged = load_folder(result.output)
    for name, tensor in base.items():
        delta = other[name].float() - tensor.float()
        assert torch.equal(merged[name], (tensor.float() + delta).bfloat16())


def test_a_folder_that_cannot_be_listed_is_told_when_its_files_are_removed(tmp_path, monkeypatch):
    folder, listed, scandir = tmp_path / "old", [], os.scandir
    folder.mkdir()
    (folder / "ours").touch()

    def fail_again(path):
        listed.append(path)
        if len(listed) == 2:  # the files are gone, and the folder is to go
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail_again)
        with pytest.raises(OSError, match="Input/output error"):
            system.remove_files(folder, {"ours"})
    system.remove_files(folder, {"ours"})
    assert not folder.exists()
