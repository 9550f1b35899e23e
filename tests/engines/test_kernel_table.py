"""Kernels are in a table of each backend: what one lacks, torch computes or measures."""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gpu_oracles
import pytest
import torch
from checkpoints import load_folder, save_tensors
from kernel_methods import ALL, BY_NAME, MEASURED, Largest, c_only
from torch import Tensor

import outliermerge
from outliermerge.checkpoint.checksum import piece_digests
from outliermerge.checkpoint.sources import DTYPES
from outliermerge.engines import kernels as cpu_kernels
from outliermerge.engines import triton
from outliermerge.engines.cpu import KernelEngine
from outliermerge.execution.threads import choose_options
from outliermerge.methods.kernel_call import Kernel, KernelCall
from outliermerge.methods.statistics.base import (
    CHUNK_ELEMENTS,
    StandardDeviation,
    is_measured_by,
    raw_pass,
)
from outliermerge.methods.table import METHODS
from outliermerge.methods.task import Task
from outliermerge.storage.stamps import Watched

NUM_ELEMENTS = 2 * CHUNK_ELEMENTS + 1003


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have plans find the methods of kernel_methods.py by their names."""
    for name, method in ALL.items():
        monkeypatch.setitem(METHODS, name, method)


class Extended:
    """The compiled kernels with one more method, which is their weighted sum."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __dir__(self) -> list[str]:
        return dir(self._module)

    def methods(self) -> tuple[tuple[str, int, int], ...]:
        return (*self._module.methods(), ("c_only", 0, 1))

    def merge(self, block: Any, variants: Any, *scratch: Any) -> Any:
        self.num_calls += sum(variant[0] == "c_only" for variant in variants)
        named = [("weighted_sum" if v[0] == "c_only" else v[0], *v[1:]) for v in variants]
        return self._module.merge(block, tuple(named), *scratch)


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels of every part of the package are these."""
    found = Extended(cpu_kernels.find_kernels())
    real = importlib.import_module

    def import_extended(name: str, *package: Any) -> Any:
        is_kernels = name.startswith("outliermerge.engines._kernels")
        return found if is_kernels else real(name, *package)

    monkeypatch.setattr(importlib, "import_module", import_extended)
    cpu_kernels.find_kernels.cache_clear()
    yield found
    monkeypatch.undo()
    cpu_kernels.find_kernels.cache_clear()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models of a large tensor and a small one."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    shapes = {"large.weight": (NUM_ELEMENTS,), "small.weight": (7, 9), "tiny.bias": (3,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    states = [base] + [
        {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        for _ in range(2)
    ]
    return [
        save_tensors(folder / str(i), {n: t.bfloat16() for n, t in state.items()})
        for i, state in enumerate(states)
    ]


def spec_of(method: str, models: list[Path], **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(models[0]),
        "models": [{"model": str(model)} for model in models[1:]],
        "parameters": parameters,
    }


def results(method: Any, models: list[Path], folder: Path) -> list[dict[str, Tensor]]:
    """The outputs of runs with and without kernels, and of tensors in memory."""
    spec = spec_of(method.name, models)
    found = []
    for kernels in (True, False):
        output = folder / str(kernels)
        outliermerge.run(spec, output=output, kernels=kernels, memory="64MB")
        assert outliermerge.verify(output) == []
        found.append(load_folder(output))
    base, *others = map(load_folder, models)
    return [*found, outliermerge.merge_state_dicts(others, base=base, method=method.name)]


def assert_equal(found: list[dict[str, Tensor]]) -> None:
    for tensors in found[1:]:
        assert tensors.keys() == found[0].keys()
        assert all(torch.equal(tensors[name], found[0][name]) for name in tensors)


# Merges.


def test_a_kernel_of_the_cpu_alone_is_used_there_and_nowhere_else(extended, models, tmp_path):
    assert "c_only" in cpu_kernels.names()
    assert_equal(results(c_only, models, tmp_path))
    assert extended.num_calls > 0
    assert not task_of(c_only).fits_kernels(triton.KERNELS)


@pytest.mark.parametrize("name", ["c_only", "triton_only", "unknown"])
def test_where_a_kernel_is_missing_torch_computes(name, models, tmp_path, monkeypatch):
    monkeypatch.setitem(triton.KERNELS, "triton_only", (0, 1))
    method = BY_NAME[name]
    planned = outliermerge.plan(spec_of(method.name, models))
    options = choose_options(device="cpu", memory="1GB", threads=1, kernels=True)
    assert not any(options.uses_kernels(job) for job in planned.jobs)
    assert all(options.uses_torch(job) for job in planned.jobs)
    assert_equal(results(method, models, tmp_path))
    assert task_of(method).fits_kernels(triton.KERNELS) == (name == "triton_only")


def test_copies_are_done_by_kernels_whatever_the_method(models):
    planned = outliermerge.plan(spec_of("linear", models[:2]) | {"base_model": None})
    options = choose_options(device="cpu", memory="1GB", threads=1, kernels=True)
    copies = [dataclasses.replace(job, action="copy", method="c_only") for job in planned.jobs]
    assert all(options.uses_kernels(job) and not options.uses_torch(job) for job in copies)


def test_backends_have_what_our_methods_call_and_agree_on_what_it_takes():
    called = {method.kernel.name for name, method in METHODS.items() if method.kernel}
    called -= {method.kernel.name for method in BY_NAME.values()}  # of kernel_methods.py
    table = {name: numbers for name, *numbers in cpu_kernels.find_kernels().methods()}
    assert called <= table.keys() | triton.KERNELS.keys()
    for name in table.keys() & triton.KERNELS.keys():
        assert tuple(table[name]) == triton.KERNELS[name]


def test_a_call_of_another_kernel_than_is_declared_is_an_error():
    with pytest.raises(AssertionError, match="b is called where a is declared"):
        Kernel("a", lambda parameters, needs: KernelCall("b"))({}, {})


def task_of(method: Any) -> Task:
    dtype = DTYPES["bfloat16"]
    return Task(
        method=method,
        parameters=method.resolve(2, {}),
        dtypes=(dtype,) * 3,
        out_dtype=dtype,
        compute_dtype="float32",
        shape=(NUM_ELEMENTS,),
    )


# Statistics.


@pytest.mark.parametrize(
    ("need", "parameters"),
    [
        (StandardDeviation(), {}),
        (outliermerge.Trim(), {"density": [0.3, 0.5], "rescale": True}),
        (outliermerge.Gram(), {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_statistic_tells_what_its_passes_call(need, parameters):
    assert is_measured_by(need, cpu_kernels.statistics())
    values_ME, called = torch.randn((2, 1000)), set()
    state = need.start(2, 1000, parameters)
    while not isinstance(state, list):
        assert raw_pass(state, cpu_kernels.find_kernels()) is state
        called.add(state.kernel)
        state.add(state.measure(values_ME))
        state = state.finish()
    assert called == set(need.kernels)


@pytest.mark.parametrize("name", MEASURED)
def test_what_only_torch_measures_feeds_a_kernel(name, models, tmp_path):
    method = MEASURED[name]
    planned = outliermerge.plan(spec_of(name, models))
    options = choose_options(device="cpu", memory="1GB", threads=1, kernels=True)
    assert all(options.uses_kernels(job) and options.uses_torch(job) for job in planned.jobs)
    Largest.threads.clear()
    assert_equal(results(method, models, tmp_path))
    assert Largest.threads == {1}  # each thread computes for itself
    manifests = [outliermerge.verify(tmp_path / str(kernels)) for kernels in (True, False)]
    assert manifests == [[], []]


@pytest.mark.parametrize("name", MEASURED)
def test_threads_and_memory_change_no_byte_of_it(name, models, tmp_path):
    spec = spec_of(name, models)
    outputs = []
    for threads, memory in [(1, "8MB"), (2, "1GB"), (4, "30MB")]:
        output = tmp_path / f"{threads}"
        result = outliermerge.run(spec, output=output, threads=threads, memory=memory)
        statistics = {n: t.get("statistics") for n, t in result.manifest["tensors"].items()}
        outputs.append((load_folder(output), statistics))
    assert_equal([tensors for tensors, _ in outputs])
    assert all(statistics == outputs[0][1] for _, statistics in outputs)


def test_memory_for_what_torch_measures_is_planned(models):
    options = choose_options(device="cpu", memory="1GB", threads=2, kernels=True)
    peaks = {
        name: outliermerge.plan(spec_of(name, models)).peak_memory_bytes(options)
        for name in ("task_arithmetic", "by_torch", "by_both")
    }
    assert peaks["by_torch"] == peaks["by_both"] > 2 * peaks["task_arithmetic"]


@pytest.mark.parametrize("name", MEASURED)
def test_files_are_measured_like_buffers_and_digested_as_they_are_read(name, tmp_path):
    sources = [torch.randn(NUM_ELEMENTS) for _ in range(3)]
    task = dataclasses.replace(task_of(MEASURED[name]), dtypes=(DTYPES["float32"],) * 3)
    raws = [memoryview(source.view(torch.uint8).numpy()) for source in sources]
    files, places = [], []
    for number, raw in enumerate(raws):
        (tmp_path / str(number)).write_bytes(b"x" * number + bytes(raw))
        files.append((tmp_path / str(number)).open("rb"))
        places.append((files[-1].fileno(), number))
    engine, found, digests = KernelEngine(cpu_kernels.find_kernels()), [], []
    needs = task.method.needs

    def started() -> dict[str, Any]:
        return {key: need.start(2, NUM_ELEMENTS, task.parameters) for key, need in needs.items()}

    for measure in (
        lambda: engine.measure(task, started(), raws, NUM_ELEMENTS),
        lambda: engine.measure_places(task, started(), places, NUM_ELEMENTS, digests.append),
    ):
        found.append(measure())
    assert found[0] == found[1]
    assert set(map(tuple, digests)) == {tuple(bytes(piece_digests(raw, 4)) for raw in raws)}

    (tmp_path / "1").write_bytes(bytes(raws[1])[:-1])  # the second source ends early
    with pytest.raises(EOFError) as caught:
        engine.measure_places(task, started(), places, NUM_ELEMENTS, digests.append)
    assert caught.value.args[1] == 1
    files[2].close()
    (tmp_path / "1").write_bytes(b"x" + bytes(raws[1]))
    with pytest.raises(OSError) as failed:
        engine.measure_places(task, started(), places, NUM_ELEMENTS, digests.append)
    assert failed.value.filename == 2
    for file in files[:2]:
        file.close()


def test_another_reading_that_gives_other_bytes_is_noticed(models, tmp_path, monkeypatch):
    folders = [save_tensors(tmp_path / str(i), load_folder(m)) for i, m in enumerate(models)]
    planned = outliermerge.plan(spec_of("by_torch", folders))
    (path,) = folders[1].glob("*.safetensors")
    real = KernelEngine.prepare

    def prepare(engine: KernelEngine, task: Task, needs: Any, wholes: Any) -> Any:
        if task.shape == (NUM_ELEMENTS,):
            with path.open("r+b") as file:
                file.seek(-NUM_ELEMENTS, 2)  # its middle
                file.write(bytes(range(1, 9)))
        return real(engine, task, needs, wholes)

    monkeypatch.setattr(KernelEngine, "prepare", prepare)
    monkeypatch.setattr(Watched, "note", lambda *_: None)  # no stamp tells
    with pytest.raises(outliermerge.OutlierMergeError, match="a second reading gave other bytes"):
        outliermerge.run(planned, output=tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


# GPUs: in Triton's interpreter.


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """A process where kernels are interpreted."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=gpu_oracles.interpret) as pool:
        yield pool


@pytest.mark.parametrize("name", ["triton_only", "by_torch", "by_both", "by_gram"])
def test_triton_has_a_table_and_fallbacks_of_its_own(name, interpreted):
    found, expected = interpreted.submit(gpu_oracles.merged_of_a_test, name).result()
    assert found == expected
