"""What a process of its own does with the GPU kernels: interprets them, or compiles them.

Triton looks at TRITON_INTERPRET when it is imported, so this cannot be done where tests run.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
from kernel_methods import ALL
from torch import Tensor

from outliermerge.checkpoint.sources import DTYPES
from outliermerge.engines import triton as gpu_engine
from outliermerge.engines.triton import TensorMerge
from outliermerge.methods.table import METHODS, find_method
from outliermerge.methods.task import Task

DTYPE_CODES = {"b": torch.bfloat16, "e": torch.float16, "f": torch.float32}


PART_ELEMENTS = 1 << 14


def interpret() -> None:
    """Have kernels interpreted, in larger parts than on a device: a program takes a while."""
    os.environ["TRITON_INTERPRET"] = "1"
    from outliermerge.engines import triton_kernels as gpu_kernels

    gpu_kernels.BLOCK = type(gpu_kernels.PIECE)(PART_ELEMENTS)


def work(method: str, sources: list[Tensor], out: torch.dtype, **given: Any) -> TensorMerge:
    """A tensor's merge, the base first where the method takes one."""
    found = find_method(method)
    task = Task(
        method=found,
        parameters=found.resolve(len(sources) - (found.space == "delta"), given),
        dtypes=tuple(DTYPES[str(source.dtype).removeprefix("torch.")] for source in sources),
        out_dtype=DTYPES[str(out).removeprefix("torch.")],
        compute_dtype="float32",
        shape=tuple(sources[0].shape),
    )
    return TensorMerge(task, tuple(sources), torch.empty(sources[0].shape, dtype=out))


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def merged(method: str, tensors: list[list[Tensor]], out: torch.dtype, **given: Any) -> list[bytes]:
    """Results of all tensors at once."""
    works = [work(method, sources, out, **given) for sources in tensors]
    gpu_engine.merge_on_gpu(works)
    return [bytes_of(each.result) for each in works]


def merged_in_large_parts(method: str, sources: list[Tensor], **given: Any) -> bytes:
    """The result for one tensor by fewer programs, which take the interpreter less time."""
    from outliermerge.engines import triton_kernels as gpu_kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_kernels, "BLOCK", gpu_kernels.PIECE)
        (found,) = merged(method, [sources], sources[0].dtype, **given)
    return found


def deviations(sources: list[Tensor]) -> list[float]:
    (batch,) = gpu_engine._batches([work("min_sigma", sources, torch.float32)])
    (found,) = gpu_engine._deviations(batch, batch.task.method.needs["sigma"])
    return found


def differ_early(tensors: list[list[Tensor]]) -> list[bool]:
    return gpu_engine.differ_early([work("min_sigma", each, each[0].dtype) for each in tensors])


def compiled(kernel: str, capability: int, **constants: Any) -> dict[str, Any]:
    """What a kernel becomes for a device: memory accesses of 16 bytes, contractions, the cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from outliermerge.engines import triton_kernels as gpu_kernels

    types = {
        "addresses": "*i64", "pieces": "*i32", "parameters": "*fp32", "partials": "*fp64",
        "firsts": "*i64", "sizes": "*i64", "thresholds": "*fp32", "lows": "*i32",
        "counts": "*i32", "shift": "i32", "num_bins": "i32",
        "out": "*i32" if kernel == "heads_differ" else "*fp64",
    }  # fmt: skip
    function = getattr(gpu_kernels, kernel)
    values = {
        (position,): constants[name]
        for position, name in enumerate(function.arg_names)
        if name in constants
    }
    signature = {
        name: "constexpr" if name in constants else types[name] for name in function.arg_names
    }
    done = triton.compile(
        ASTSource(function, signature, values),
        target=GPUTarget("cuda", capability, 32),
        options=dict(gpu_kernels.OPTIONS),
    )
    code = done.asm["ptx"]
    return {
        "wide_loads": len(re.findall(r"ld\.global[.\w]*\.v4\.b32", code)),
        "wide_stores": len(re.findall(r"st\.global[.\w]*\.v4\.b32", code)),
        "contractions": code.count("fma.rn.f32"),
        "flushes": code.count(".ftz"),
        "divisions": sorted(set(re.findall(r"div\.\w+\.f32", code))),
        "cubin": len(done.asm["cubin"]),
    }


def merged_of_a_test(name: str) -> tuple[list[bytes], list[bytes]]:
    """Results of a method of kernel_methods.py by Triton's kernels, and by torch."""
    import outliermerge
    from outliermerge.engines import triton_kernels

    METHODS[name] = ALL[name]
    if name == "triton_only":
        triton_kernels.triton_only = triton_kernels.weighted_sum
        gpu_engine.KERNELS[name] = (0, 1)
    generator = torch.Generator().manual_seed(1)
    tensors = [
        [torch.randn(shape, generator=generator).bfloat16() for _ in range(3)]
        for shape in [(1,), (0, 3), (3, 5, 7), (65_537,)]
    ]
    expected = [
        outliermerge.merge_tensors(models, base=base, method=name) for base, *models in tensors
    ]
    return merged(name, tensors, torch.bfloat16), [bytes_of(tensor) for tensor in expected]
