"""Outputs in the base's format, and as GGUF: in parts, stopped and killed, with the same bytes."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forms import assert_same, num_tensors, save_models
from quantizing import PLAIN, checkpoint
from stopping import stopping_after
from stored_forms import KINDS, NAME, SHAPE
from waiting import LIMIT_SECONDS, held, stopped

import outliermerge
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.quantized.opened import dequantize
from outliermerge.checkpoint.reader import Reader
from outliermerge.output.parts import join, run_part

GGUFS: dict[str, dict[str, Any]] = {
    "gguf of F16": {"out_dtype": "float16"},
    "gguf of BF16": {"out_dtype": "bfloat16"},
    "gguf of F32": {"out_dtype": "float32"},
    "gguf of Q8_0": {"quantize": "q8_0"},
}
FORM = pytest.mark.parametrize("form", [*KINDS, *GGUFS])
NUM_LAYERS = 3


def _stored(form: str) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the weights of three layers as a format stores them, and the config."""
    stored, config = {}, None
    for layer in range(NUM_LAYERS):
        torch.manual_seed(layer)
        own, config = KINDS[form](torch.randn(SHAPE) * 0.02)
        stored |= {f"layers.{layer}.{name}": tensor for name, tensor in own.items()}
    return stored, config


def _save(form: str, root: Path) -> dict[str, Any]:
    """Save what a form's merge reads; return its spec.

    Of the task model one layer is as the base's, one is moved in half of its rows, one whole.
    """
    stored, config = _stored(form)
    checkpoint(root / "base", PLAIN | stored, config, dtype="float32")
    opened = dequantize(open_checkpoint(root / "base"))
    tensors = {"norm.weight": torch.zeros(6)}
    with Reader() as reader:
        for layer in range(NUM_LAYERS):
            name = f"layers.{layer}.{NAME}"
            source = opened.tensors[name]
            weight = reader.values(source, 0, source.num_elements).view(source.shape).float()
            moved = layer * len(weight) // 2
            weight[:moved] += torch.randn(weight[:moved].shape) * weight.std() * 0.5
            tensors[name] = weight
    checkpoint(root / "task", tensors, dtype="float32")
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / "task")}],
        "parameters": {"weight": 0.5},
        "quantize": "as-base",
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("as_base")


_MADE: dict[str, tuple[dict[str, Any], Path]] = {}


@pytest.fixture
def made(form: str, root: Path, own_cache: Path) -> tuple[dict[str, Any], Path]:
    """Return a spec, and the output of an undisturbed run; both are made once."""
    if form not in _MADE:
        place = root / form.replace(" ", "-")
        if form in KINDS:
            spec = _save(form, place)
        else:
            if not (models := root / "models").exists():
                save_models(models)
            spec = {
                "merge_method": "task_arithmetic",
                "base_model": str(models / "base"),
                "models": [{"model": str(models / "one")}],
                "parameters": {"weight": 0.5},
                "format": "gguf",
            } | GGUFS[form]
        outliermerge.run(spec, output=place / "out", threads=1)
        _MADE[form] = spec, place / "out"
    return _MADE[form]


@FORM
@pytest.mark.sampled(4)
def test_a_stopped_run_goes_on_with_other_threads_and_memory(
    form: str, made: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, whole = made
    for number in range(1, num_tensors(whole), 2):
        output = tmp_path / "out"
        with stopping_after(monkeypatch, number), pytest.raises(KeyboardInterrupt):
            outliermerge.run(spec, output=output, threads=1)
        assert not output.exists()
        options = outliermerge.RunOptions(threads=3, memory="32MiB")
        done = outliermerge.run(spec, output=output, options=options)
        assert done.num_resumed == number
        assert_same(output, whole)
        shutil.rmtree(output)


@FORM
@pytest.mark.sampled(4)
def test_parts_that_were_stopped_are_joined_to_the_bytes_of_a_run(
    form: str, made: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, whole = made
    with stopping_after(monkeypatch, 1), pytest.raises(KeyboardInterrupt):
        run_part(outliermerge.plan(spec), tmp_path / "out", 2, 3)
    for part in (3, 2, 1):
        run_part(outliermerge.plan(spec), tmp_path / "out", part, 3)
    join(outliermerge.plan(spec), tmp_path / "out")
    assert_same(tmp_path / "out", whole)


@FORM
@pytest.mark.sampled(4)
def test_a_run_takes_over_what_parts_have_written(
    form: str, made: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    spec, whole = made
    run_part(outliermerge.plan(spec), tmp_path / "out", 2, 2)
    done = outliermerge.run(spec, output=tmp_path / "out")
    assert 0 < done.num_resumed < num_tensors(whole)
    assert_same(tmp_path / "out", whole)


@FORM
@pytest.mark.sampled(12)
def test_killed_runs_and_parts_go_on(
    form: str, made: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    spec, whole = made
    file = tmp_path / "specs" / "spec.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(spec))
    for name, more in (("run", ()), ("parts", ("--part", "1/2"))):
        output = tmp_path / name / "out"
        line = ["run", str(file), "-o", str(output), "--threads", "1", "-q", *more]
        process = subprocess.Popen(held(2, "after", *line), stderr=subprocess.DEVNULL)
        try:
            assert stopped(process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=LIMIT_SECONDS)
        assert process.returncode == -signal.SIGKILL and not output.exists()
        if more:
            for part in (1, 2):
                run_part(outliermerge.plan(spec), output, part, 2)
            join(outliermerge.plan(spec), output)
        else:
            assert outliermerge.run(spec, output=output).num_resumed == 2
        assert_same(output, whole)
