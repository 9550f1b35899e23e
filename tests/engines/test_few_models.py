"""Blocks of few models, merged in registers, and random numbers by their first bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_blocks import MODULES, NAMES, block_of, draw, dtype_of, raw

from outliermerge.checkpoint.sources import DTYPES
from outliermerge.engines.torch import keywords, merge_block
from outliermerge.methods.context import Context
from outliermerge.methods.kernel_call import packed_keys
from outliermerge.methods.table import find_method
from outliermerge.methods.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")

# The first is told by 31 bits, the second is not, and the others are of no chance at all.
DENSITIES = (0.3, 0.0011, 1.0, 0.0, 0.5)
WEIGHTS = ([1.0, 1.0, 2.0], [0.5, 0.5, 0.5], [0.7, -0.3, 0.4], [2.0, 0.0, 1.0])
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("dare_linear", {}),
    "linear mean": ("dare_linear", {"normalize": True, "lambda": 0.7}),
    "elected": ("dare_ties", {"lambda": -1.5}),
    "elected mean": ("dare_ties", {"normalize": True, "rescale": False}),
    "counted": ("dare_ties", {"consensus": "count", "normalize": True}),
}


@pytest.mark.parametrize("densities", [(d,) * 3 for d in DENSITIES] + [DENSITIES[:3]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_dare_is_that_of_torch_for_any_dtypes_weights_and_densities(case, densities):
    name, given = CASES[case]
    method, num, start = find_method(name), 1041, 7
    for num_models in (1, 2, 3):
        for weights in WEIGHTS:
            of_models = {"weight": weights[:num_models], "density": densities[:num_models]}
            parameters = method.resolve(num_models, given | of_models)
            context = Context("w", (2 * num,), seed=5, start=start)
            needs = {"scale": [1.0] * num_models}
            for codes in ("bbbb", "eeee", "ffff", "fbef"):
                check(method, parameters, context, needs, codes[: 1 + num_models], num)


def check(method: Any, parameters: Any, context: Any, needs: Any, codes: str, num: int) -> None:
    num_models = len(codes) - 1
    sources = draw(codes, num)
    task = Task(
        method=method, parameters=parameters, out_dtype=DTYPES["float32"],
        dtypes=tuple(DTYPES[NAMES[code]] for code in codes),
        compute_dtype="float32", shape=(num,), context=context,
    )  # fmt: skip
    block_SE = torch.stack([source.float() for source in sources])
    wanted, _ = merge_block(task, block_SE, keywords(task, needs, block_SE), start=context.start)
    call = method.kernel(parameters, needs, context)
    keys = packed_keys([context.keys(model) for model in range(num_models)])
    for module in MODULES:
        out = torch.empty(num, dtype=dtype_of("f"))
        variant = (*call.arguments(), "f", raw(out), keys, context.start)
        module.merge(block_of(codes, sources, is_delta=True), (variant,))
        assert torch.equal(out, wanted), (num_models, parameters, codes, module.__name__)


def test_two_models_with_even_votes_and_zeros_are_merged_as_by_torch():
    base = torch.tensor([0.0, -0.0, 1.0, 0.0, 2.0, -0.0, 0.5, -1.0])
    moves = torch.tensor(
        [[1.0, -1.0, 0.5, 0.0, -0.5, -0.0, 3.0, 2.0], [-1.0, 1.0, -0.5, -0.0, 0.5, 0.0, 3.0, -4.0]]
    )
    sources = [base, *(base + moves)]
    for name in ("ties", "breadcrumbs_ties", "task_arithmetic", "sce"):
        method = find_method(name)
        parameters = method.resolve(2, {})
        needs = {
            "limits": [[0.0] * 2, *([[float("inf")] * 2] * (name != "ties")), [1.0] * 2],
            "selected": [0.0, 0.5, 0.5],
        }
        task = Task(
            method=method, parameters=parameters, out_dtype=DTYPES["float32"],
            dtypes=(DTYPES["float32"],) * 3, compute_dtype="float32", shape=(8,),
        )  # fmt: skip
        block_SE = torch.stack(sources)
        own = {key: needs[key] for key in method.needs}
        wanted, _ = merge_block(task, block_SE, keywords(task, own, block_SE))
        call = method.kernel(parameters, own)
        for module in MODULES:
            out = torch.empty(8)
            module.merge(
                block_of("fff", sources, is_delta=True), ((*call.arguments(), "f", raw(out)),)
            )
            assert torch.equal(out, wanted), (name, module.__name__)
            assert torch.equal(out.signbit(), wanted.signbit()), (name, module.__name__)
