"""Inner products of models: by torch, by the kernels, and by numpy in float64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import load_folder, save_tensors
from kernel_blocks import MODULES, block_of, by_torch, draw, raw, values_of
from torch import Tensor

import outliermerge
from outliermerge.engines.torch import measure_block
from outliermerge.methods.kernel_call import Kernel, KernelCall
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS
from outliermerge.methods.statistics.gram import Gram
from outliermerge.methods.table import METHODS

SIZES = [1, 15, 16, 17, 255, 257, 1023, 1025, CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS + 77]


def measured(
    need: Gram, num_models: int, num_elements: int, share: Callable[..., Any], *, chunks: int = 1
) -> list[list[float]]:
    """Return the statistic, measured some chunks at a time."""
    state: Any = need.start(num_models, num_elements, {})
    step = chunks * CHUNK_ELEMENTS
    for start in range(0, num_elements, step):
        state.add(share(state, slice(start, min(start + step, num_elements))))
    found: list[list[float]] = state.finish()
    return found


def by_kernels(
    module: Any, codes: str, sources: list[Tensor], need: Gram, *, is_delta: bool, chunks: int = 1
) -> list[list[float]]:
    def share(state: Any, part: slice) -> Any:
        block = block_of(codes, [source[part] for source in sources], is_delta=is_delta)
        return state.measure_raw(module, block)

    num_models = len(sources) - is_delta
    return measured(need, num_models, len(sources[0]), share, chunks=chunks)


def rows_of(sources: list[Tensor], need: Gram, *, is_delta: bool) -> Tensor:
    """Return the rows (R, E) that are multiplied."""
    values_ME = values_of(sources, is_delta=is_delta)
    return torch.cat([sources[0].float()[None], values_ME]) if need.with_base else values_ME


def assert_close(found: list[list[float]], rows_RE: Tensor) -> None:
    rows = rows_RE.double().numpy()
    expected, size = rows @ rows.T, abs(rows) @ abs(rows).T
    assert (abs(np.array(found) - expected) <= 1e-13 * size).all()
    assert (np.array(found) == np.array(found).T).all()


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("num_models", [1, 2, 3, 4, 5, 8, 16])
def test_products_are_those_of_float64(num_models, with_base):
    need = Gram(with_base=with_base)
    for num_elements in SIZES:
        for kind in ("b", "e", "f", "fbe") if num_elements in (17, 1025) else ("fbe",):
            codes = (kind * 17)[: num_models + 1]
            sources = draw(codes, num_elements)
            rows_RE = rows_of(sources, need, is_delta=True)
            found = [by_kernels(module, codes, sources, need, is_delta=True) for module in MODULES]
            assert_close(found[0], rows_RE)
            assert found == found[:1] * len(found)  # the same bits by all levels
            assert_close(measured(need, num_models, num_elements, by_torch(rows_RE)), rows_RE)


@pytest.mark.parametrize("num_models", [1, 3, 16])
def test_products_of_weights_are_those_of_float64(num_models):
    codes = ("bef" * 6)[:num_models]
    sources = draw(codes, CHUNK_ELEMENTS + 333)
    for module in MODULES:
        found = by_kernels(module, codes, sources, Gram(), is_delta=False)
        assert_close(found, values_of(sources, is_delta=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("with_base", [False, True])
def test_blocks_change_no_bit(with_base, dtype):
    need = Gram(with_base=with_base)
    sources = draw("fbe", 5 * CHUNK_ELEMENTS + 77)
    rows_RE = rows_of(sources, need, is_delta=True).to(dtype)
    for share in (
        lambda chunks: by_kernels(MODULES[-1], "fbe", sources, need, is_delta=True, chunks=chunks),
        lambda chunks: measured(need, 2, rows_RE.shape[1], by_torch(rows_RE), chunks=chunks),
    ):
        assert share(1) == share(2) == share(6)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 70_000])
def test_what_is_not_finite_makes_its_products_nan(at, value):
    sources = draw("fff", CHUNK_ELEMENTS + 5_000)
    sources[1][at] = value
    expected = [[True, True], [True, False]]
    rows_RE = rows_of(sources, Gram(), is_delta=True)
    found = [by_kernels(module, "fff", sources, Gram(), is_delta=True) for module in MODULES]
    found.append(measured(Gram(), 2, len(sources[0]), by_torch(rows_RE)))
    for gram in found:
        assert np.isnan(gram).tolist() == expected


@pytest.mark.parametrize("value", [3e38, -1e-38, 1e-45])
def test_the_extremes_of_float32_are_multiplied_exactly(value):
    sources = [torch.tensor([0.0, value]), torch.tensor([0.0, 2 / 3])]
    first, second = (float(source[1]) for source in sources)
    expected = [[first * first, first * second], [first * second, second * second]]
    for module in MODULES:
        assert by_kernels(module, "ff", sources, Gram(), is_delta=False) == expected


def test_an_empty_tensor_has_products_of_0():
    state: Any = Gram(with_base=True).start(2, 0, {})
    assert state.finish() == [[0.0] * 3] * 3
    for module in MODULES:
        assert module.gram((b"ff", (b"", b""), 0, True), True) == b""


def test_files_give_what_buffers_give(tmp_path):
    sources = draw("fbe", CHUNK_ELEMENTS + 1003)
    files, places = [], []
    for number, source in enumerate(sources):
        (tmp_path / str(number)).write_bytes(b"x" * number + bytes(raw(source)))
        files.append(os.open(tmp_path / str(number), os.O_RDONLY))
        places.append((files[-1], number))
    try:
        for module in MODULES:
            memory = block_of("fbe", sources, is_delta=True)
            block = (b"fbe", tuple(places), len(sources[0]), True)
            assert module.gram(block, True) == module.gram(memory, True)
            with pytest.raises(EOFError):
                module.gram((b"fbe", tuple(places), len(sources[0]) + 1, True), False)
    finally:
        for file in files:
            os.close(file)


def test_a_base_is_needed_where_it_is_asked_for():
    for module in MODULES:
        with pytest.raises(ValueError, match="there is no base"):
            module.gram((b"ff", (bytes(8), bytes(8)), 2, False), True)
    with pytest.raises(TypeError, match="'gram' needs a base; weights have none"):

        @outliermerge.merge_method(space="weight", needs={"gram": Gram(with_base=True)})
        def function(weights, *, gram):
            """Do nothing."""


# A method by it.


def _share(gram: Any) -> float:
    """Return the weight of the first model of two, by their lengths; 2 parts in 3 if undefined."""
    first, second = (math.sqrt(gram[i][i]) if gram[i][i] > 0 else 0.0 for i in (1, 2))
    return round(64 * first / (first + second)) / 64 if first + second > 0 else 0.625


@outliermerge.merge_method(
    space="delta",
    needs={"gram": Gram(with_base=True)},
    min_models=2,
    max_models=2,
    kernel=Kernel(
        "weighted_sum",
        lambda parameters, needs: KernelCall(
            "weighted_sum", vectors=([_share(needs["gram"]), 1 - _share(needs["gram"])],)
        ),
    ),
)
def by_length(deltas_ME: Tensor, *, gram: Tensor) -> Tensor:
    """Weigh two task vectors by their lengths, in 64ths."""
    share = _share(gram.tolist())
    return deltas_ME[0] * share + deltas_ME[1] * (1 - share)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    shapes = {"large.weight": (5, CHUNK_ELEMENTS + 3), "small.weight": (7, 9), "empty": (0, 4)}
    dtypes = {"large.weight": torch.bfloat16, "small.weight": torch.float16}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    states = [base] + [
        {n: t + scale * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        for scale in (0.1, 0.3)
    ]
    return [
        save_tensors(folder / str(i), {n: t.to(dtypes.get(n, t.dtype)) for n, t in state.items()})
        for i, state in enumerate(states)
    ]


def test_a_method_by_it_gives_the_same_bytes_however_it_is_run(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "by_length", by_length)
    base, *models = folders
    spec = {
        "merge_method": "by_length",
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
    }
    outputs, grams = [], []
    for kernels, threads, memory in [
        (True, 1, "8MB"), (True, 2, "1GB"), (True, 4, "30MB"),
        (False, 1, "30MB"), (False, 4, "1GB"),
    ]:  # fmt: skip
        output = tmp_path / f"{kernels}-{threads}"
        result = outliermerge.run(
            spec, output=output, kernels=kernels, threads=threads, memory=memory
        )
        assert outliermerge.verify(output) == []
        outputs.append(load_folder(output))
        tensors = result.manifest["tensors"]
        grams.append(
            {n: t["statistics"]["gram"] for n, t in tensors.items() if t.get("statistics")}
        )
    first, *others = map(load_folder, folders)
    outputs.append(outliermerge.merge_state_dicts(others, base=first, method="by_length"))
    for tensors in outputs[1:]:
        assert all(torch.equal(tensors[name], outputs[0][name]) for name in outputs[0])
    assert grams[0] == grams[1] == grams[2]  # by the kernels
    assert grams[3] == grams[4]  # by torch
    for name, gram in grams[0].items():
        np.testing.assert_allclose(gram, grams[3][name], rtol=1e-12)
        rows = [first[name].float(), *(t[name].float() - first[name].float() for t in others)]
        assert_close(gram, torch.stack([row.reshape(-1) for row in rows]))


def test_torch_is_given_the_base_where_a_pass_asks_for_it():
    block_SE = torch.tensor([[1.0, 2.0], [4.0, 4.0], [0.0, 2.0]])
    task: Any = type("Task", (), {"is_delta": True})()
    states: Any = {n: Gram(with_base=n == "S").start(2, 2, {}) for n in "MS"}
    shares = measure_block(task, block_SE, states)
    assert shares["M"].tolist() == [13.0, -3.0, 1.0]
    assert shares["S"].tolist() == [5.0, 7.0, -1.0, 13.0, -3.0, 1.0]
