"""What must be equal for a merge to be right is compared once, by all parts and `join` together."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket_server import BucketServer
from checkpoints import save_tensors
from outputs_elsewhere import bucket_served

import outliermerge
from outliermerge.errors import OutlierMergeError
from outliermerge.execution.jobs import JobRunner
from outliermerge.output.journal import Journal
from outliermerge.planning.plan import Plan

NAMES, NUM_PARTS = ("base", "one", "two"), 2
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Models that store a head, which their configs tie to the embeddings."""
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        weights = {f"model.layers.{n}.w": torch.randn(20, 8, generator=generator) for n in range(6)}
        save(tmp_path / name, weights, torch.randn(30, 8, generator=generator))
    return tmp_path


def save(folder: Path, weights: dict[str, torch.Tensor], rows: torch.Tensor) -> None:
    vocabulary = {"model.embed_tokens.weight": rows, "lm_head.weight": rows.clone()}
    save_tensors(folder, weights | vocabulary)
    (folder / "config.json").write_text(json.dumps(CONFIG))


def spec_of(models: Path) -> dict[str, Any]:
    tasks = [{"model": str(models / name)} for name in NAMES[1:]]
    return {"merge_method": "ties", "base_model": str(models / NAMES[0]), "models": tasks}


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checks that are done, by the models that they are of."""
    found: list[str] = []
    check = JobRunner.check_equal

    def noted(self: JobRunner, job: Any) -> Any:
        found.append(job.reason)
        return check(self, job)

    monkeypatch.setattr(JobRunner, "check_equal", noted)
    return found


def write(plan: Plan, output: Path | str) -> None:
    for part in range(1, NUM_PARTS + 1):
        outliermerge.run_part(plan, output, part, NUM_PARTS)


def reasons(plan: Plan) -> list[str]:
    assert len(plan.checks) > NUM_PARTS
    return sorted(check.reason for check in plan.checks)


def test_parts_share_the_comparing_and_join_does_none(models: Path, compared: list[str]) -> None:
    plan = outliermerge.plan(spec_of(models))
    write(plan, models / "out")
    assert sorted(compared) == reasons(plan)
    write(plan, models / "out")  # again, with nothing left to be done
    outliermerge.join(plan, models / "out")
    assert sorted(compared) == reasons(plan)


def test_parts_in_a_store_share_it_too(
    models: Path, compared: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    plan = outliermerge.plan(spec_of(models), shard_size="2kB")
    server: BucketServer
    with bucket_served(models / "served", monkeypatch) as server:
        write(plan, "s3://bucket/out")
        write(plan, "s3://bucket/out")
        outliermerge.join(plan, "s3://bucket/out")
        assert not any("equal" in name for name in server.objects("out/"))
    assert sorted(compared) == reasons(plan)


@pytest.mark.parametrize("lost", ["line", "file"])
def test_join_compares_what_no_part_has_compared_as_it_is_now(
    models: Path, compared: list[str], lost: str
) -> None:
    plan, output = outliermerge.plan(spec_of(models)), models / "out"
    write(plan, output)
    done = reasons(plan)
    if lost == "file":  # copied anew, with the same bytes and times
        path = models / "two" / "model.safetensors"
        status = path.stat()
        copy = path.with_name("copy")
        copy.write_bytes(path.read_bytes())
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
        copy.replace(path)
        plan = outliermerge.plan(spec_of(models))
        again = done
    else:
        journal = Journal(output, "1-of-2")
        lines = [line for line in journal.lines if "equal" not in line]
        assert len(lines) == len(journal.lines) - 1
        assert journal.identity is not None
        journal.begin(journal.identity)
        for line in lines:
            journal.add(line)
        journal.close()
        again = [check.reason for check in plan.checks[::NUM_PARTS]]
    outliermerge.join(plan, output)
    assert sorted(compared) == sorted([*done, *again])


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_a_difference_is_found_by_one_part_and_nothing_is_joined(models: Path, number: int) -> None:
    tensors = outliermerge.plan(spec_of(models)).inputs[number].checkpoint.tensors
    meta = tensors["lm_head.weight"]
    with (models / NAMES[number] / "model.safetensors").open("r+b") as file:
        file.seek(meta.offset)
        file.write(b"\x01\x02")
    plan, output = outliermerge.plan(spec_of(models)), models / "out"
    refused = 0
    for part in (1, 2, 1, 2):
        try:
            outliermerge.run_part(plan, output, part, NUM_PARTS)
        except OutlierMergeError as error:
            assert "They are not" in str(error)
            refused += 1
    assert refused == 2  # one part, both times
    with pytest.raises(OutlierMergeError, match="is not whole, 1 of 2 parts are not done"):
        outliermerge.join(plan, output)
    assert not output.exists()
