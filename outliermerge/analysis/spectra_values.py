"""The largest singular values of matrices, and cosine distances between rows of such values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias

from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Source
from outliermerge.errors import OutlierMergeError
from outliermerge.execution.threads import torch_threads
from outliermerge.storage.machine import free_memory_bytes, num_threads

if TYPE_CHECKING:
    from torch import Tensor

Sources: TypeAlias = tuple[Source, ...]
"""A matrix, or the base's and the model's matrix, whose difference is measured."""
Spectrum: TypeAlias = tuple[tuple[float, ...], float]
"""The largest singular values, in descending order, and the σ of the elements."""

_BLOCK_ELEMENTS = 1 << 24


def matrix_spectra(
    matrices: Sequence[Sources],
    *,
    num_values: int,
    device: str,
    threads: int,
    on_progress: Callable[[int], None],
) -> list[Spectrum]:
    """Return the spectrum of each matrix; all dimensions after the first form the columns.

    Raises:
        OutlierMergeError: a matrix cannot be read, or has values that are infinite or NaN.
    """
    # Several threads do not speed up eigenvalues of small matrices, and slow them down much if
    # other programs use the processors. So each matrix gets one thread.
    with (
        Reader() as reader,
        torch_threads() as compute_alone,
        ThreadPoolExecutor(
            _num_workers(matrices, device, threads), initializer=compute_alone
        ) as pool,
    ):

        def measure(matrix: Sources) -> Spectrum:
            found = _spectrum(reader, matrix, num_values, device)
            reader.release(enumerate(matrix))
            on_progress(_num_bytes(matrix))
            return found

        reader.read_ahead(map(enumerate, matrices))
        return list(pool.map(measure, matrices))


def _num_workers(matrices: Sequence[Sources], device: str, threads: int) -> int:
    if device != "cpu":
        return 1
    wanted, free = num_threads(threads), free_memory_bytes()
    if threads or free is None:
        return wanted
    return max(1, min(wanted, free // 2 // max(map(_most_bytes, matrices))))


def _most_bytes(matrix: Sources) -> int:
    shape = matrix[-1].shape
    num_small = min(shape[0], math.prod(shape[1:]))
    return _num_bytes(matrix) + 3 * 8 * num_small**2 + 3 * 8 * _BLOCK_ELEMENTS


def _num_bytes(matrix: Sources) -> int:
    return sum(source.num_bytes for source in matrix)


def _spectrum(reader: Reader, matrix: Sources, num_values: int, device: str) -> Spectrum:
    import torch

    rows, num_elements = matrix[-1].shape[0], matrix[-1].num_elements
    stored = [reader.values(source, 0, num_elements).view(rows, -1).to(device) for source in matrix]
    gram_SS, std = _gram(stored)
    if not torch.isfinite(gram_SS).all():
        raise OutlierMergeError(
            f"{matrix[-1].name}: found values that are infinite, NaN or too large to be squared, "
            "expected others: the matrix has no singular values"
        )
    squares_S = torch.linalg.eigvalsh(gram_SS)
    # Smaller values cannot be distinguished from 0, such as most of a low-rank task vector's.
    squares_S[squares_S <= squares_S[-1] * len(squares_S) * torch.finfo(squares_S.dtype).eps] = 0.0
    values = squares_S.flip(0)[:num_values].sqrt().tolist()
    return tuple(values), std


def _gram(stored: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Return the smaller Gram matrix and the σ of a matrix, or of last minus first if two."""
    import torch

    last = stored[-1]
    dim = 1 if last.shape[0] <= last.shape[1] else 0
    num_small = last.shape[1 - dim]
    gram_SS = last.new_zeros((num_small, num_small), dtype=torch.float64)
    # Deviations are from an element, not from 0, because the mean may be large compared with σ.
    shift = float(last[0, 0]) - (float(stored[0][0, 0]) if len(stored) > 1 else 0.0)
    total = squares = 0.0
    step = max(1, _BLOCK_ELEMENTS // num_small)
    for start in range(0, last.shape[dim], step):
        length = min(step, last.shape[dim] - start)
        *base, block = (each.narrow(dim, start, length).double() for each in stored)
        if base:
            block -= base[0]
        gram_SS += block @ block.T if dim else block.T @ block
        away = block - shift
        total += float(away.sum())
        squares += float(away.square_().sum())
    num_elements = last.numel()
    variance = squares / num_elements - (total / num_elements) ** 2
    return gram_SS, math.sqrt(max(variance, 0.0))


def cosine_distances(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return 1 - cos of all pairs of rows, beginning with rows 0 and 1.

    Example:
        >>> [round(distance, 12) for distance in cosine_distances([(2, 0), (3, 0), (1, 1)])]
        [0.0, 0.292893218813, 0.292893218813]
    """
    import torch

    rows_LK = torch.tensor(rows, dtype=torch.float64)
    units_LK = rows_LK / torch.linalg.vector_norm(rows_LK, dim=1, keepdim=True)
    # 1 - cos is half the square of this distance; computed as a difference from 1 it would lose
    # digits.
    distances: list[float] = (torch.pdist(units_LK).square() / 2).tolist()
    return tuple(distances)
