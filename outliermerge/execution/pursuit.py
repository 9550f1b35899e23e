"""Rows as weighted sums of a few of many others: the arithmetic of transplants.

The candidates are found by products in float32, and chosen among by distances and products in
float64: so the number of threads does not change which ones are chosen, unless two are equally good
to about 1e-15, and changes weights in their last bits at most.

Legend: B targets, N atoms (the rows to choose from), C columns, K chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_NUM_CLOSE = 8  # candidates by float32 that are compared in float64
_BLOCK_BYTES = 1 << 27
_SAME = 1e-7  # of an atom's length: what is left of one that the chosen ones can replace


def block_rows(columns: int, k: int) -> int:
    """Return how many targets are worked on at a time."""
    return max(1, min(256, _BLOCK_BYTES // (8 * columns * (k + _NUM_CLOSE))))


def pursue(
    targets_BC: Tensor, atoms_NC: Tensor, k: int, *, is_out_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose atoms by orthogonal matching pursuit (arXiv 2506.06607).

    The atom that has the largest product with what is left of a target is chosen, and the target is
    projected onto all chosen ones; k times.

    Args:
        targets_BC: in float64.
        atoms_NC: in float32.
        k: at most N, without those that are out.
        is_out_N: atoms that are not to be chosen.

    Returns:
        The numbers of the chosen atoms (B, K), and their weights in float64. A target that fewer
        atoms add up to has the weight 0 for the others.
    """
    import torch

    num, columns = targets_BC.shape
    chosen = torch.zeros(num, k, dtype=torch.int64, device=targets_BC.device)
    axes = targets_BC.new_zeros(num, k, columns)  # an orthonormal basis of the chosen atoms
    triangle = targets_BC.new_zeros(num, k, k)  # the atoms in this basis
    along = targets_BC.new_zeros(num, k)  # the targets in this basis
    is_taken = torch.zeros(num, len(atoms_NC), dtype=torch.bool, device=targets_BC.device)
    if is_out_N is not None:
        is_taken |= is_out_N
    left = targets_BC.clone()
    least = 1e-12 * targets_BC.norm(dim=1)
    for step in range(k):
        new = _most_alike(left, atoms_NC, is_taken)
        chosen[:, step] = new
        is_taken[torch.arange(num, device=new.device), new] = True
        atom = atoms_NC[new].double()
        length = atom.norm(dim=1)
        for _ in range(2):  # a second time, for what rounding has left
            shares = torch.einsum("bkc,bc->bk", axes[:, :step], atom)
            triangle[:, :step, step] += shares
            atom = atom - torch.einsum("bkc,bk->bc", axes[:, :step], shares)
        rest = atom.norm(dim=1)
        is_new = (rest > _SAME * length) & (left.norm(dim=1) > least)
        triangle[:, step, step] = torch.where(is_new, rest, torch.ones_like(rest))
        axis = torch.where(is_new[:, None], atom / rest.clamp(min=1e-300)[:, None], 0.0)
        axes[:, step] = axis
        along[:, step] = (axis * left).sum(1)
        left = left - along[:, step, None] * axis
    weights = torch.linalg.solve_triangular(triangle, along[:, :, None], upper=True)
    return chosen, weights[:, :, 0]


def _most_alike(left_BC: Tensor, atoms_NC: Tensor, is_taken_BN: Tensor) -> Tensor:
    """Return for each target the free atom that has the largest product with it."""
    products = (left_BC.float() @ atoms_NC.T).abs_().masked_fill_(is_taken_BN, -1.0)
    close = products.topk(min(_NUM_CLOSE, len(atoms_NC)), dim=1).indices.sort(dim=1).values
    exact = (atoms_NC[close].double() @ left_BC[:, :, None]).squeeze(2).abs()
    exact.masked_fill_(is_taken_BN.gather(1, close), -1.0)
    found: Tensor = close.gather(1, exact.argmax(1, keepdim=True)).squeeze(1)
    return found


def interpolate(
    targets_BC: Tensor, atoms_NC: Tensor, k: int, *, is_out_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the k nearest atoms, with weights in proportion to 1/distance that add up to 1.

    Args:
        targets_BC: in float64.
        atoms_NC: in float32.
        k: at most N, without those that are out.
        is_out_N: atoms that are not to be chosen.

    Returns:
        The numbers of the chosen atoms (B, K), the nearest first, and their weights in float64.
    """
    import torch

    squares_BN = (atoms_NC.norm(dim=1) ** 2) - 2 * (targets_BC.float() @ atoms_NC.T)
    if is_out_N is not None:
        squares_BN.masked_fill_(is_out_N, torch.inf)
    num_close = min(k + _NUM_CLOSE, len(atoms_NC))
    close = squares_BN.topk(num_close, dim=1, largest=False).indices.sort(dim=1).values
    distances = (atoms_NC[close].double() - targets_BC[:, None]).norm(dim=2)
    if is_out_N is not None:
        distances.masked_fill_(is_out_N[close], torch.inf)
    distances, order = distances.sort(dim=1, stable=True)
    weights = 1 / distances[:, :k].clamp(min=1e-6)
    return close.gather(1, order[:, :k]), weights / weights.sum(1, keepdim=True)
