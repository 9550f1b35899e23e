"""Fused kernels from file to file: their errors, whole runs with and without them, and rounds."""

from __future__ import annotations

import errno
import importlib
import math
import os
import struct
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import as_many_as, family, load_folder, save_tensors
from every_method import BY_ANGLES, WITH_KERNELS
from kernel_blocks import MODULES, block_of, draw, raw

import outliermerge
from outliermerge.engines.cpu import KernelEngine
from outliermerge.engines.kernels import find_kernels
from outliermerge.execution.rounds import Round, Steps, run_all
from outliermerge.methods.averaging import weighted_sum
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS
from outliermerge.output.writer import OutputWriter

# Files.


@pytest.fixture
def stored(tmp_path):
    """Three sources in files, at positions that no dtype is aligned to."""
    sources = draw("fbe", CHUNK_ELEMENTS + 1003)
    files, places = [], []
    for number, source in enumerate(sources):
        path = tmp_path / str(number)
        path.write_bytes(b"x" * (2 * number + 1) + bytes(raw(source)))
        files.append(os.open(path, os.O_RDWR))
        places.append((files[-1], 2 * number + 1))
    yield sources, tuple(places)
    for file in files:
        os.close(file)


SCRATCH = bytearray(1 << 24)
SUM = weighted_sum([0.5, 0.25]).arguments()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_files_give_what_buffers_give(stored, module, tmp_path):
    sources, places = stored
    num_elements = len(sources[0])
    memory = block_of("fbe", sources, is_delta=True)
    files = (b"fbe", places, num_elements, True)
    assert module.moments(files) == module.moments(memory)
    thresholds = struct.pack("2f", 0.01, 0.02)
    assert module.magnitudes(files, thresholds) == module.magnitudes(memory, thresholds)
    counts = np.zeros((2, 2, 1 << 15), np.uint64)
    for own, block in zip(counts, (files, memory), strict=True):
        module.histogram(block, (0, 0), 16, tuple(own))
    assert counts[0].sum() == 2 * num_elements
    assert (counts[0] == counts[1]).all()
    out = bytearray(2 * num_elements)
    target = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    try:
        expected = module.merge(memory, ((*SUM, "e", out),))
        assert module.merge(files, ((*SUM, "e", (target, 5)),), SCRATCH) == expected
        assert (tmp_path / "out").read_bytes()[5:] == out
        copied = module.copy("b", places[1], num_elements, (target, 3), SCRATCH)
        assert copied == module.copy("b", raw(sources[1]), num_elements, out)
        assert (tmp_path / "out").read_bytes()[3 : 3 + len(out)] == out
    finally:
        os.close(target)


@pytest.mark.parametrize("position", [0, 5, 4096, 8190])
@pytest.mark.parametrize("num_bytes", [1 << 18, (1 << 18) + 4096, (1 << 18) + 12_345 * 2])
def test_whole_pages_are_written_through_the_descriptor_for_them(num_bytes, position, tmp_path):
    data = np.random.default_rng(0).bytes(num_bytes)
    paths = [tmp_path / "some", tmp_path / "pages"]
    files = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
    copy = weighted_sum([1.0]).arguments()
    source = torch.frombuffer(bytearray(data), dtype=torch.uint8) % 64  # no NaN
    data = source.numpy().tobytes()
    block = (b"b", (data,), num_bytes // 2, False)
    head = -position % 4096
    pages = (num_bytes - head) // 4096 * 4096 if num_bytes >= head + (1 << 18) else 0
    try:
        for module in MODULES:
            for write in (
                lambda to, module=module: module.merge(block, ((*copy, "b", to),), SCRATCH),
                lambda to, module=module: module.copy("b", data, num_bytes // 2, to, SCRATCH),
            ):
                for path in paths:
                    os.truncate(path, 0)
                write((files[0], position, files[1]))
                written, direct = (path.read_bytes()[position:] for path in paths)
                assert direct[head:] == data[head : head + pages]
                assert written[:head] + direct[head:] + written[head + pages :] == data
                assert not any(written[head : head + pages])
                assert not any(direct[:head])
                write((files[0], position, -1))
                assert paths[0].read_bytes()[position:] == data
    finally:
        for file in files:
            os.close(file)


def calls_on(module: Any, block: Any) -> list[Callable[[], Any]]:
    num_elements = block[2]
    return [
        lambda: module.moments(block),
        lambda: module.magnitudes(block, struct.pack("2f", 0, 0)),
        lambda: module.histogram(block, (0, 0), 16, (bytearray(1 << 18), None)),
        lambda: module.merge(block, ((*SUM, "f", bytearray(4 * num_elements)),)),
        lambda: module.copy("e", block[1][2], num_elements, bytearray(2 * num_elements)),
    ]


def test_a_file_that_ends_early_is_an_error(stored):
    sources, places = stored
    os.truncate(places[2][0], 5 + 2 * (CHUNK_ELEMENTS + 1002))
    for module in MODULES:
        for call in calls_on(module, (b"fbe", places, len(sources[0]), True)):
            with pytest.raises(EOFError, match="the file ends early"):
                call()


def test_a_descriptor_that_is_not_open_is_an_error(stored):
    sources, places = stored
    gone = os.dup(places[0][0])
    os.close(gone)
    for module in MODULES:
        for call in calls_on(module, (b"fbe", (*places[:2], (gone, 0)), len(sources[0]), True)):
            with pytest.raises(OSError, match="Bad file descriptor"):
                call()


def test_a_full_disk_is_an_error(stored):
    sources, places = stored
    full = os.open("/dev/full", os.O_RDWR)
    try:
        for module in MODULES:
            for call in (
                lambda module=module: module.merge(
                    (b"fbe", places, len(sources[0]), True), ((*SUM, "b", (full, 0)),), SCRATCH
                ),
                lambda module=module: module.copy("f", places[0], 1000, (full, 0), SCRATCH),
            ):
                with pytest.raises(OSError) as caught:
                    call()
                assert caught.value.errno == errno.ENOSPC
    finally:
        os.close(full)


TWO = (b"ff", (bytes(8), bytes(8)), 2, True)
TIES = bytes(8), bytes(12)  # scalars, and vectors of one model


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    ("function", "arguments", "error"),
    [
        ("moments", ((b"ff", (bytes(8), bytes(7)), 2, True),), "a buffer is too short"),
        ("moments", ((b"fx", (bytes(8), bytes(8)), 2, True),), "an unknown dtype"),
        ("moments", ((b"f", (bytes(8),), 2, True),), "a source for each code"),
        ("moments", ((b"ff", (bytes(8),), 2, False),), "a source for each code"),
        ("moments", ((b"f", (bytes(8),), -1, False),), "a source for each code"),
        ("magnitudes", (TWO, bytes(8)), "a threshold for each model"),
        ("histogram", (TWO, (0, 0), 0, (bytearray(16),)), "counts for each model"),
        ("histogram", (TWO, (0,), 17, (bytearray(16),)), "no such window"),
        ("histogram", (TWO, (0,), 0, (bytearray(15),)), "no such window"),
        ("histogram", (TWO, (0x7FFFFFFF,), 0, (bytearray(24),)), "no such window"),
        ("merge", (TWO, (("none", *TIES, "f", bytearray(8)),)), "no method is called none"),
        ("merge", (TWO, (("ties", bytes(4), TIES[1], "f", bytearray(8)),)), "takes 2 scalars"),
        ("merge", (TWO, (("ties", TIES[0], bytes(8), "f", bytearray(8)),)), "3 vectors of 1"),
        ("merge", (TWO, (("ties", *TIES, "d", bytearray(8)),)), "an unknown dtype"),
        ("merge", (TWO, (("ties", *TIES, "f", bytearray(7)),)), "too short"),
        ("copy", ("f", bytes(8), 2, bytearray(7)), "too short"),
        ("all_finite", ("f", bytes(8), 3), "too short"),
        ("all_finite", ("x", bytes(8), 1), "unknown dtype"),
    ],
)
def test_wrong_arguments_are_refused(function, arguments, error, module):
    with pytest.raises(ValueError, match=error):
        getattr(module, function)(*arguments)


# Whole runs.

METHODS: dict[str, dict[str, Any]] = {name: {} for name in WITH_KERNELS} | {
    "min_sigma": {"t": 1.5, "weight": 0.7},
    "linear": {"weight": 0.4, "normalize": False},
    "passthrough": {"scale": 0.5},
    "task_arithmetic": {"weight": 0.4, "lambda": 0.9},
    "ties": {"density": 0.3, "lambda": 0.7},
    "breadcrumbs_ties": {"density": 0.3, "lambda": 0.7},
    "dare_ties": {"density": 0.3, "lambda": 0.7},
    **BY_ANGLES,
}


def spec_of(method: str, base: Path, models: list[Path]) -> dict[str, Any]:
    name = method.partition(" ")[0]
    models = as_many_as(name, models)
    spec = {
        "merge_method": name,
        "models": [{"model": str(model)} for model in models],
        "parameters": METHODS[method],
    }
    return spec | ({"base_model": str(base)} if has_base(method) else {})


def has_base(method: str) -> bool:
    return method not in ("linear", "passthrough") and "of weights" not in method


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> tuple[Path, list[Path]]:
    return family("llama", tmp_path_factory.mktemp("llamas"), dtype=torch.bfloat16)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sampled(2)
def test_a_run_by_kernels_gives_the_values_of_one_by_torch(method, llamas, tmp_path):
    spec = spec_of(method, *llamas)
    if method == "ties":
        spec["parameters"] = spec["parameters"] | {"rescale": True}
    by_kernels = outliermerge.run(spec, output=tmp_path / "kernels").manifest
    by_torch = outliermerge.run(spec, output=tmp_path / "torch", kernels=False).manifest
    assert (by_kernels["kernels"], by_torch["kernels"]) == (True, False)
    assert [entry["checksum"] for entry in by_kernels["inputs"]] == [
        entry["checksum"] for entry in by_torch["inputs"]
    ]
    defined = load_folder(tmp_path / "torch")
    for name, tensor in load_folder(tmp_path / "kernels").items():
        assert torch.equal(tensor, defined[name]), name
        found, expected = (
            manifest["tensors"][name].get("statistics", {}) for manifest in (by_kernels, by_torch)
        )
        assert found.keys() == expected.keys()
        for key, value in found.items():
            rel = 1e-12 if key in ("sigma", "threshold") else 0
            flat, same = ([*map(float, np.ravel(each))] for each in (value, expected[key]))
            assert flat == pytest.approx(same, rel=rel or 1e-14, abs=0), (name, key)
            assert key != "outliers" or value == expected[key]
    assert outliermerge.verify(tmp_path / "kernels") == []


@pytest.mark.parametrize("begun_with", [True, False])
def test_a_run_begun_by_one_engine_is_not_finished_by_another(begun_with, tmp_path):
    base, models = large_models(tmp_path, torch.float32)
    spec = spec_of("task_arithmetic", base, models)

    def stop(num_bytes: int) -> None:
        if (tmp_path / "out.partial.journal").read_bytes().count(b'{"tensor"') >= 1:
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"output": tmp_path / "out", "threads": 1}
    with pytest.raises(KeyboardInterrupt):
        outliermerge.run(spec, kernels=begun_with, on_progress=stop, **arguments)
    with pytest.raises(outliermerge.OutlierMergeError, match=r"what computes .* changed since"):
        outliermerge.run(spec, kernels=not begun_with, **arguments)
    assert outliermerge.run(spec, kernels=begun_with, **arguments).num_resumed == 1


SIZE = CHUNK_ELEMENTS + 1003


def large_models(
    folder: Path, dtype: torch.dtype, spoil: Callable[[list[torch.Tensor]], None] = lambda _: None
) -> tuple[Path, list[Path]]:
    """Save a base and two models of two tensors each; `spoil` changes what is in the second."""
    generator = torch.Generator().manual_seed(0)
    states: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for name in ("first", "second"):
        drawn = torch.randn((3, SIZE), generator=generator)
        for state, row in zip(states, drawn.to(dtype), strict=True):
            state[name] = row.clone()
    spoil([state["second"] for state in states])
    base, *models = (
        save_tensors(folder / name, state)
        for name, state in zip(("base", "m0", "m1"), states, strict=True)
    )
    return base, models


BAD = [(0, math.nan), (SIZE // 2, math.inf), (SIZE - 1, -math.inf)]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> Callable[..., tuple[Path, list[Path]]]:
    """Give a base and two models; in one of them (`row`) is one of the bad values."""

    @cache
    def made(dtype: torch.dtype, row: int, number: int) -> tuple[Path, list[Path]]:
        place, value = BAD[number]

        def spoil(tensors: list[torch.Tensor]) -> None:
            tensors[row][place] = value

        return large_models(tmp_path_factory.mktemp("spoiled"), dtype, spoil)

    return made


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_value_that_is_not_finite_stops_a_run(method, dtype, spoiled, tmp_path):
    last = len(as_many_as(method.partition(" ")[0], [1, 2]))
    rows = {0 if has_base(method) else 1, last}
    for row in rows:
        for number in range(len(BAD)):
            base, models = spoiled(dtype, row, number)
            out = tmp_path / f"{row}-{number}"
            with pytest.raises(outliermerge.OutlierMergeError) as caught:
                outliermerge.run(spec_of(method, base, models), output=out)
            model = (base, *models)[row]
            assert f"tensor 'second' has values that are infinite or NaN in {model}. " in str(
                caught.value
            )


@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_allowed_not_to_be_finite_are_listed_alike(method, tmp_path):
    def spoil(tensors: list[torch.Tensor]) -> None:
        tensors[1][SIZE - 1] = math.nan
        if has_base(method):
            tensors[0][0] = math.inf

    base, models = large_models(tmp_path, torch.float16, spoil)
    spec = spec_of(method, base, models)
    results = [
        outliermerge.run(
            spec, output=tmp_path / str(kernels), kernels=kernels, allow_non_finite=True
        )
        for kernels in (True, False)
    ]
    assert results[0].non_finite == results[1].non_finite
    assert f"in {models[0]}" in results[0].non_finite["second"]
    assert (f"in {base}" in results[0].non_finite["second"]) == ("base_model" in spec)
    assert list(results[0].non_finite) == ["second"]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_file_cut_short_after_the_plan_is_named(method, kernels, tmp_path):
    base, models = large_models(tmp_path, torch.float32)
    planned = outliermerge.plan(spec_of(method, base, models))
    path = models[0] / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(outliermerge.OutlierMergeError) as caught:
        outliermerge.run(planned, output=tmp_path / "out", kernels=kernels)
    assert f"{path}: its size changed from" in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_disk_that_is_full_is_named(method, tmp_path, monkeypatch):
    base, models = large_models(tmp_path, torch.float32)
    full = os.open("/dev/full", os.O_RDWR)
    monkeypatch.setattr(OutputWriter, "place", lambda self, tensor, start: (full, 0, -1))
    try:
        with pytest.raises(
            outliermerge.OutlierMergeError,
            match=r"out\.partial/model\.safetensors: tensor '\w+': cannot be written: No space",
        ):
            outliermerge.run(spec_of(method, base, models), output=tmp_path / "out")
    finally:
        os.close(full)


# Without kernels.


def hide(monkeypatch: pytest.MonkeyPatch, modules: list[str]) -> None:
    real = importlib.import_module

    def import_others(name: str) -> Any:
        if name in modules:
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_others)
    find_kernels.cache_clear()


@pytest.mark.parametrize("method", METHODS)
def test_where_kernels_are_not_compiled_torch_computes(method, tmp_path, monkeypatch):
    base, models = large_models(tmp_path, torch.bfloat16)
    spec = spec_of(method, base, models)
    states = [load_folder(folder) for folder in (base, *models[: len(spec["models"])])]
    needs = {"method": method.partition(" ")[0], **METHODS[method]}
    if has_base(method) or method in ("linear", "passthrough"):
        needs["base"] = states[0]
    by_kernels = outliermerge.merge_state_dicts(states[1:], **needs)

    hide(monkeypatch, [module.__name__ for module in MODULES])
    try:
        assert find_kernels() is None
        in_memory = outliermerge.merge_state_dicts(states[1:], **needs)
        result = outliermerge.run(spec, output=tmp_path / "out")
    finally:
        monkeypatch.undo()
        find_kernels.cache_clear()
    assert result.manifest["kernels"] is False
    written = load_folder(tmp_path / "out")
    for name, tensor in by_kernels.items():
        assert torch.equal(in_memory[name], tensor)
        assert torch.equal(written[name], tensor)


@pytest.mark.parametrize("num_missing", range(len(MODULES)))
def test_the_newest_kernels_that_are_compiled_are_taken(num_missing, monkeypatch):
    hide(monkeypatch, [module.__name__ for module in MODULES[len(MODULES) - num_missing :]])
    try:
        assert find_kernels() is MODULES[-1 - num_missing]
    finally:
        find_kernels.cache_clear()


# Rounds.


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rounds_give_results_in_order_on_any_number_of_threads(threads):
    results: dict[int, list[list[int]]] = {}
    prepared = []

    def steps(number: int) -> Steps[None]:
        found = []
        for size in (3, 0, 1, 7, 1, 0, 2)[number % 3 :]:
            found.append((yield Round(lambda item: item * number, range(size))))
        results[number] = found

    run_all(map(steps, range(20)), threads=threads, prepare=lambda: prepared.append(1))
    assert results == {
        number: [[item * number for item in range(size)] for size in sizes]
        for number in range(20)
        for sizes in [(3, 0, 1, 7, 1, 0, 2)[number % 3 :]]
    }
    assert 1 <= len(prepared) <= threads


def test_threads_share_a_round_and_begin_the_next_generator():
    both = threading.Barrier(2, timeout=600)

    def shared() -> Steps[None]:
        yield Round(lambda item: both.wait(), range(2))

    def lone(item: int) -> Steps[None]:
        yield Round(lambda item: both.wait(), [item])

    run_all([shared(), lone(0), lone(1)], threads=2)
    assert not both.broken


@pytest.mark.parametrize("threads", [1, 3])
def test_generators_without_rounds_are_run(threads):
    seen = []

    def steps(number: int) -> Steps[None]:
        seen.append(number)
        return
        yield

    run_all(map(steps, range(9)), threads=threads)
    run_all([], threads=threads)
    assert sorted(seen) == list(range(9))


def failing(place: str) -> Iterator[Steps[None]]:
    """Give endless work that fails somewhere early."""

    def fail(item: int) -> None:
        if item == 1:
            raise LookupError(place)

    def steps(number: int) -> Steps[None]:
        if place == "generator" and number == 3:
            raise LookupError(place)
        yield Round(str, range(3))
        if place == "item" and number == 3:
            yield Round(fail, range(4))
        if place == "lone item" and number == 3:
            yield Round(fail, [1])
        if place == "after a round" and number == 3:
            raise LookupError(place)

    number = 0
    while True:
        if place == "source" and number == 3:
            raise LookupError(place)
        yield steps(number)
        number += 1


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("place", ["item", "lone item", "generator", "after a round", "source"])
def test_a_failure_anywhere_ends_all_work(place, threads):
    with pytest.raises(LookupError, match=place):
        run_all(failing(place), threads=threads)


def test_an_interrupt_in_an_item_ends_all_work():
    def interrupt(item: int) -> None:
        raise KeyboardInterrupt

    def steps() -> Steps[None]:
        yield Round(interrupt, range(2))

    with pytest.raises(KeyboardInterrupt):
        run_all((steps() for _ in iter(int, 1)), threads=2)


@pytest.mark.parametrize("weights", [[1.0, 2e-8, -1.0], [0.1, 0.2, -0.3]])
def test_weights_that_add_up_to_nearly_nothing_are_taken_as_by_torch(weights, monkeypatch):
    models = [torch.full((4,), float(i)) for i in range(len(weights))]

    def merged() -> torch.Tensor:
        return outliermerge.merge_tensors(
            models, base=torch.ones(4), method="task_arithmetic", weight=weights, normalize=True
        )

    found = merged()
    hide(monkeypatch, [module.__name__ for module in MODULES])
    try:
        expected = merged()
    finally:
        find_kernels.cache_clear()
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("weights", [[0.1, 0.2, -0.3], [1e-46, 1e-46]])
def test_a_mean_by_weights_that_add_up_to_0_in_float32_is_refused(weights):
    models = [torch.full((4,), float(i)) for i in range(len(weights))]
    with pytest.raises(outliermerge.ArgumentError, match="add up to 0, so there is no mean"):
        outliermerge.merge_tensors(models, method="linear", weight=weights)


@pytest.mark.parametrize("order", [["float32", "bfloat16"], ["bfloat16", "float32"]])
def test_a_sweep_over_dtypes_has_true_checksums_of_short_last_pieces(order, tmp_path):
    tensors = draw("fff", CHUNK_ELEMENTS + 80)
    base, *models = (save_tensors(tmp_path / str(i), {"w": t}) for i, t in enumerate(tensors))
    spec = spec_of("task_arithmetic", base, models)
    for result in outliermerge.sweep(spec, {"out_dtype": order}, output=tmp_path / "out"):
        assert outliermerge.verify(result.output) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_file_that_is_gone_after_the_plan_is_named(method, tmp_path):
    base, models = large_models(tmp_path, torch.float32)
    planned = outliermerge.plan(spec_of(method, base, models))
    (models[0] / "model.safetensors").unlink()
    with pytest.raises(outliermerge.OutlierMergeError, match=r"m0/model\.safetensors"):
        outliermerge.run(planned, output=tmp_path / "out")


@pytest.mark.parametrize("kernels", [True, False])
def test_ties_rescaled_blames_the_model_with_an_infinite_value(kernels, tmp_path):
    def spoil(tensors: list[torch.Tensor]) -> None:
        tensors[1][SIZE - 1] = math.inf

    base, models = large_models(tmp_path, torch.float32, spoil)
    spec = spec_of("ties", base, models)
    spec["parameters"] = spec["parameters"] | {"rescale": True}
    with pytest.raises(outliermerge.OutlierMergeError, match=f"in {models[0]}"):
        outliermerge.run(spec, output=tmp_path / "out", threads=1, kernels=kernels)


@pytest.mark.parametrize("place", [(-1, 0), (-5, 0), (0, -1)])
def test_negative_places_are_refused(place):
    for module in MODULES:
        with pytest.raises(ValueError, match="is negative"):
            module.copy("b", place, 4, bytearray(8))


def test_a_count_below_zero_is_refused():
    for module in MODULES:
        with pytest.raises(ValueError, match="is negative"):
            module.copy("f", b"", -3, bytearray())


def test_a_window_beyond_all_bits_is_refused():
    block = (b"f", (bytes(16),), 4, False)
    for module in MODULES:
        with pytest.raises(ValueError, match="no such window"):
            module.histogram(block, (2**64 - 1,), 0, (bytearray(24),))


def test_a_wrong_later_argument_releases_the_sources():
    for module in MODULES:
        data = bytearray(64)
        with pytest.raises(TypeError):
            module.histogram((b"f", (data,), 16, False), [0], 0, ())
        data.append(0)  # not while a buffer of it is held


def test_a_read_that_fails_for_a_moment_counts_nothing_twice(tmp_path, monkeypatch):
    base, models = large_models(tmp_path, torch.float32)
    spec = spec_of("ties", base, models)
    real, failed = KernelEngine.measure_places, []

    def measure(*arguments: Any) -> Any:
        shares = real(*arguments)
        if not failed:
            failed.append(arguments)  # all is counted by then
            raise OSError(errno.EIO, "Input/output error")
        return shares

    whole = outliermerge.run(spec, output=tmp_path / "whole").manifest["tensors"]
    monkeypatch.setattr(KernelEngine, "measure_places", measure)
    with pytest.raises(outliermerge.OutlierMergeError, match="cannot be read: Input/output error"):
        outliermerge.run(spec, output=tmp_path / "out")
    assert outliermerge.run(spec, output=tmp_path / "out").manifest["tensors"] == whole
