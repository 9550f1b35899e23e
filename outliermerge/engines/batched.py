"""Merges of tensors of equal shape in one call, for methods on whole matrices.

A decomposition of a matrix of a few thousand rows leaves most of a GPU idle, and a model has
hundreds of equal shape. Tensors that are stacked must be equal in everything but their values.

Shape suffixes: T tensors of a batch, S sources (the base, where there is one, then the models),
E elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from outliermerge.engines.torch import keywords, merge_block
from outliermerge.engines.triton import TensorMerge
from outliermerge.methods.task import Task

if TYPE_CHECKING:
    from torch import Tensor

_COPIES = 4  # of the sources: the stack, and what a method makes of it


def batches(merges: Sequence[TensorMerge], *, memory_bytes: int) -> list[list[TensorMerge]]:
    """Group the merges that `merge_batch` can do at once, in their order.

    Left out are merges by methods that get less than a whole tensor, and by methods with needs,
    because needs are measured tensor by tensor.

    Args:
        memory_bytes: the limit for the sources of a batch and the tensors computed from them. A
            tensor that does not fit is a batch of its own.
    """
    groups: dict[object, list[TensorMerge]] = {}
    for merge in merges:
        task = merge.task
        if task.cut == "tensor" and _is_alone(task) and merge.num_elements:
            place = tuple(tensor.device for tensor in (*merge.sources, merge.result))
            what = tuple(sorted(task.parameters.items())), task.shape, task.dtypes, task.out_dtype
            groups.setdefault((task.method.name, what, place), []).append(merge)
    found = []
    for group in groups.values():
        size = _bytes(group[0])
        most = max(1, memory_bytes // size)
        found += [group[i : i + most] for i in range(0, len(group), most)]
    return found


def _is_alone(task: Task) -> bool:
    """Tell whether a method gets only the values: no needs, auxiliary tensors or context."""
    method = task.method
    return not (method.needs or method.auxiliary or method.takes_context or task.modifiers)


def _bytes(merge: TensorMerge) -> int:
    item = 8 if merge.task.compute_dtype == "float64" else 4
    return _COPIES * len(merge.sources) * merge.num_elements * item


def merge_batch(merges: Sequence[TensorMerge]) -> bool:
    """Fill the results of one of `batches` by a vectorised call of their method.

    Returns:
        Whether the call worked. It cannot for a method that branches on values, draws random
        numbers or fails. Then the results are not filled.
    """
    import torch

    first = merges[0]
    task = first.task
    dtype, device = getattr(torch, task.compute_dtype), first.result.device
    block_TSE = torch.empty(
        (len(merges), len(first.sources), first.num_elements), dtype=dtype, device=device
    )
    for block_SE, merge in zip(block_TSE, merges, strict=True):
        for row_E, source in zip(block_SE, merge.sources, strict=True):
            row_E.copy_(source.detach().reshape(-1))

    def merged(block_SE: Tensor) -> Tensor:
        return merge_block(task, block_SE, keywords(task, {}, block_TSE))[0]

    try:
        merged_TE = torch.vmap(merged)(block_TSE)
    except (RuntimeError, ValueError):  # said again where each is merged alone
        return False
    for merged_E, merge in zip(merged_TE, merges, strict=True):
        merge.result.view(-1).copy_(merged_E)
    return True
