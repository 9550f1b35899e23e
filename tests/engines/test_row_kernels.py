"""Kernels that merge every row by what it is: NuSLERP and Model Stock by rows, and Arcee Fusion."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_blocks import MODULES, NAMES, block_of, draw, raw
from torch import Tensor

from outliermerge.checkpoint.sources import DTYPES
from outliermerge.engines.torch import keywords, merge_block
from outliermerge.methods.context import Context
from outliermerge.methods.nuslerp import nuslerp
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS
from outliermerge.methods.statistics.importance import Quartiles
from outliermerge.methods.table import find_method
from outliermerge.methods.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(), (1,), (2,), (77,), (5, 1), (50, 17), (5, 1000), (1, CHUNK_ELEMENTS + 3), (3, 9, 64),
          (2, 300, 3, 3)]  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nuslerp": ("nuslerp", {"nuslerp_flatten": False, "weight": [0.3, 0.9]}),
    "nuslerp of no sum": ("nuslerp", {"nuslerp_flatten": False, "weight": [0.5, -0.5]}),
    "nuslerp of weights": ("nuslerp", {"nuslerp_flatten": False, "weight": [0.3, 0.9]}),
    "model_stock": ("model_stock", {"filter_wise": True}),
    "model_stock of mergekit": ("model_stock", {"filter_wise": True, "compat": "mergekit"}),
    "arcee_fusion": ("arcee_fusion", {}),
}


def task_of(case: str, num_models: int, codes: str, shape: tuple[int, ...]) -> Task:
    name, given = CASES[case]
    method = find_method(name)
    if case == "nuslerp of weights":
        method = nuslerp
    elif method.with_base is not None:
        method = method.with_base
    parameters = method.resolve(num_models, given)
    context = Context("w", shape, seed=1)
    method = method.of(parameters, context)
    return Task(
        method=method, parameters={key: parameters[key] for key in method.parameters},
        out_dtype=DTYPES["float32"], dtypes=tuple(DTYPES[NAMES[code]] for code in codes),
        compute_dtype="float32", shape=shape, context=context,
    )  # fmt: skip


def needs_of(task: Task, sources: list[Tensor], module: Any) -> dict[str, Any]:
    """Return what a task needs, measured on whole tensors by kernels, or by torch if None."""
    if "quartiles" not in task.method.needs:
        return {}
    num = len(sources[0])
    state: Any = Quartiles().start(2, num, task.parameters, context=task.context)
    codes = "".join(code for dtype in task.dtypes for code in NAMES if NAMES[code] == dtype.name)
    while not isinstance(state, list):
        if module is None:
            block_ME = torch.stack([source.float() for source in sources])
            state.add(state.measure(block_ME, start=0))
        else:
            block = block_of(codes, sources, is_delta=False)
            state.add(state.measure_raw(module, block, start=0))
        state = state.finish()
    return {"quartiles": state}


def merged(module: Any, task: Task, needs: Any, block: Any, start: int = 0) -> bytes:
    call = task.method.kernel(task.parameters, needs, task.context)
    out = bytearray(4 * block[2])
    module.merge(block, ((*call.arguments(), "f", out, b"", start, *call.rows),))
    return bytes(out)


def floats(raw_bytes: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw_bytes), dtype=torch.float32)


def by_torch(task: Task, sources: list[Tensor], needs: Any) -> Tensor:
    block_SE = torch.stack([source.float() for source in sources])
    found, _ = merge_block(task, block_SE, keywords(task, needs, block_SE))
    return found


def sources_of(case: str, num_models: int, shape: tuple[int, ...], kind: str) -> list[Tensor]:
    is_delta = case not in ("nuslerp of weights", "arcee_fusion")
    codes = (kind * 5)[: num_models + is_delta]
    return draw(codes, math.prod(shape))


def codes_of(sources: list[Tensor]) -> str:
    letters = {torch.bfloat16: "b", torch.float16: "e", torch.float32: "f"}
    return "".join(letters[source.dtype] for source in sources)


@pytest.mark.parametrize("kind", ["f", "bfe"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_that_of_torch_on_all_processors(case, shape, kind):
    for num_models in (2, 3, 5) if "model_stock" in case else (2,):
        sources = sources_of(case, num_models, shape, kind)
        check(case, num_models, shape, sources)


def check(
    case: str, num_models: int, shape: tuple[int, ...], sources: list[Tensor], *, rel: float = 0
) -> None:
    codes = codes_of(sources)
    task = task_of(case, num_models, codes, shape)
    needs = needs_of(task, sources, None)
    wanted = by_torch(task, sources, needs)
    block = block_of(codes, sources, is_delta=task.is_delta)
    found = {merged(module, task, needs, block) for module in MODULES}
    assert len(found) == 1
    got = floats(found.pop())
    size = max(float(source.float().nan_to_num(0, 0, 0).abs().max()) for source in sources)
    assert got.isnan().equal(wanted.isnan())
    limit = 0 if case == "arcee_fusion" else (num_models + 2) * 2**-24 * size
    assert float((got - wanted).nan_to_num(0, 0, 0).abs().max()) <= limit
    measured = [needs_of(task, sources, module) for module in MODULES]
    assert measured == measured[:1] * len(measured)
    for name, wanted_needs in needs.items():
        assert measured[0][name] == pytest.approx(wanted_needs, rel=rel, abs=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["zeros", "one model is zero", "equal", "opposite", "tiny"])
def test_special_rows_are_merged_as_by_torch(case, kind):
    num_models = 2 if "model_stock" not in case else 3
    sources = sources_of(case, num_models, (6, 40), "f")
    first = len(sources) - num_models
    before = sources[0].view(6, 40) if first else torch.zeros(6, 40)
    models = [source.view(6, 40) for source in sources[first:]]
    for row in (1, 4):
        if kind == "zeros":
            for model in models:
                model[row] = before[row]
        elif kind == "one model is zero":
            models[1][row] = before[row]
        elif kind == "equal":
            models[1][row] = models[0][row]
        elif kind == "opposite":
            models[1][row] = before[row] - (models[0][row] - before[row])
        else:
            for model in models:
                model[row] = before[row] + (model[row] - before[row]) * 1e-3
    # Of so small changes, rounding to float64 is seen in divergences.
    check(case, num_models, (6, 40), sources, rel=1e-6 if kind == "tiny" else 0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_in_any_source(case, value):
    num_models = 2 if "model_stock" not in case else 3
    for number in range(len(sources_of(case, num_models, (6, 40), "f"))):
        sources = sources_of(case, num_models, (6, 40), "f")
        task = task_of(case, num_models, codes_of(sources), (6, 40))
        needs = needs_of(task, sources, None)
        sources[number][97] = value
        by_definition = by_torch(task, sources, needs)
        assert not by_definition.isfinite().all()
        block = block_of(codes_of(sources), sources, is_delta=task.is_delta)
        for module in MODULES:
            out = torch.frombuffer(
                bytearray(merged(module, task, needs, block)), dtype=torch.float32
            )
            assert out.isfinite().equal(by_definition.isfinite())


@pytest.fixture(params=[(40, 3001), (7, CHUNK_ELEMENTS + 5), (23, 40, 3, 3)], ids=str)
def shape(request: Any) -> tuple[int, ...]:
    found: tuple[int, ...] = request.param
    return found


@pytest.fixture
def in_files(tmp_path: Path) -> Iterator[Any]:
    """Return a function that writes sources to files and returns it for a span of them."""
    files: list[int] = []

    def save(sources: list[Tensor]) -> Any:
        for number, source in enumerate(sources):
            (tmp_path / str(number)).write_bytes(b"x" * number + bytes(raw(source)))
            files.append(os.open(tmp_path / str(number), os.O_RDONLY))

        def span(start: int, stop: int, *, is_delta: bool) -> Any:
            places = [
                (file, number + start * source.element_size())
                for number, (file, source) in enumerate(zip(files, sources, strict=True))
            ]
            return codes_of(sources).encode(), tuple(places), stop - start, is_delta

        return span

    yield save
    for file in files:
        os.close(file)


@pytest.mark.parametrize("case", CASES)
def test_pieces_of_files_give_what_the_whole_gives(case, shape, in_files):
    num_models = 2 if "model_stock" not in case else 3
    sources = sources_of(case, num_models, shape, "fbe")
    codes, num = codes_of(sources), len(sources[0])
    task = task_of(case, num_models, codes, shape)
    needs = needs_of(task, sources, MODULES[0])
    wanted = merged(MODULES[0], task, needs, block_of(codes, sources, is_delta=task.is_delta))
    span = in_files(sources)
    for module in MODULES:
        for step in (num, CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS):
            starts = range(0, num, step)
            parts = [span(i, min(i + step, num), is_delta=task.is_delta) for i in starts]
            pairs = list(zip(starts, parts, strict=True))
            assert b"".join(merged(module, task, needs, b, i) for i, b in pairs) == wanted
            if needs:
                state: Any = Quartiles().start(2, num, task.parameters, context=task.context)
                while not isinstance(state, list):
                    for i, block in reversed(pairs):
                        state.add(state.measure_raw(module, block, start=i))
                    state = state.finish()
                assert state == needs["quartiles"]


def test_wrong_arguments_of_importance_are_refused():
    block = block_of("ff", draw("ff", 40), is_delta=False)
    bins = bytearray(24)
    for module in MODULES:
        for other, row, lows, shift, counts, message in [
            (block, 7, (0,), 0, (bins,), "does not hold whole rows"),
            (block, 0, (0,), 0, (bins,), "no such number"),
            (block, -5, (0,), 0, (bins,), "two models"),
            (block, 5, (0, 0), 0, (bins,), "two models"),
            (block, 5, (0,) * 4, 0, (bins,) * 4, "two models"),
            (block, 5, (0,), 17, (bins,), "no such window"),
            (block_of("fff", draw("fff", 40), is_delta=True), 5, (0,), 0, (bins,), "two models"),
        ]:
            with pytest.raises(ValueError, match=message):
                module.importance(other, 0, row, lows, shift, counts)
