"""Initial values of the factor A of a low-rank adapter, from a seed and a layer's name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from outliermerge.errors import OutlierMergeError
from outliermerge.rng import standard_normal, uniform


def kaiming(shape: tuple[int, int], *, seed: int, name: str) -> Tensor:
    """Return A (r, inputs), uniform within ±1 / √inputs, in float32.

    peft initialises LoRA's A in the same way: Kaiming's uniform distribution with a = √5.
    """
    rows, columns = shape
    values = uniform(seed, f"{name}/kaiming", 0, rows * columns)
    return values.mul_(2).sub_(1).div_(math.sqrt(columns)).float().view(shape)


def gaussian(shape: tuple[int, int], *, seed: int, name: str) -> Tensor:
    """Return A (r, inputs) of N(0, 1 / r²), as peft's init_lora_weights="gaussian", in float32."""
    rows, columns = shape
    return standard_normal(seed, f"{name}/gaussian", 0, rows * columns).view(shape) / rows


def gp_pareto(
    shape: tuple[int, int],
    *,
    seed: int,
    name: str,
    length_scale: float = 8.0,
    alpha: float = 3.0,
) -> Tensor:
    """Return A (r, inputs) from a Gaussian process and a Pareto distribution, in float32.

    aᵢ = c · τᵢ · gᵢ, with gᵢ a Gaussian process over the columns of covariance
    exp(−(j − k)² / (2 · length_scale²)), τᵢ of a Pareto distribution, P(τ > x) = x^−alpha for
    x ≥ 1, and c such that the mean square of A is that of `kaiming`, 1 / (3 · inputs).

    The abstract of arXiv 2509.00046 (the only part that was read) says that distances between the
    weights of layers follow a power law, and that LoRA is trained from weights drawn from a
    Gaussian process and a Pareto distribution. The rest is our reading: the process runs along a
    row, its covariance, the Pareto factor of whole rows, the defaults, and c.

    Args:
        shape: r and the number of inputs.
        seed, name: these determine the random numbers.
        length_scale: the correlation length of the Gaussian process, in columns; > 0.
        alpha: the exponent of the Pareto distribution, 0.1 or more; smaller gives heavier tails.
    """
    if not (0 < length_scale < math.inf and 0.1 <= alpha < math.inf):
        raise OutlierMergeError(
            f"gp_pareto: found length_scale {length_scale!r}, alpha {alpha!r}; expected > 0, >= 0.1"
        )
    rows, columns = shape
    # White noise smoothed by a Gaussian of width w has covariance exp(−d² / (4w²)): no matrix of
    # inputs × inputs is needed.
    reach = math.ceil(6 * length_scale / math.sqrt(2))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    smoothing = torch.exp(-((offsets / length_scale) ** 2))
    white = standard_normal(seed, f"{name}/process", 0, rows * (columns + 2 * reach)).double()
    smooth = torch.nn.functional.conv1d(white.view(rows, 1, -1), smoothing.view(1, 1, -1))
    scales = (1 - uniform(seed, f"{name}/pareto", 0, rows)) ** (-1 / alpha)
    values = smooth.view(shape) * scales[:, None]
    return (values * (1 / (3 * columns) / values.square().mean()).sqrt()).float()


INITIAL: dict[str, Callable[..., Tensor]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "gp_pareto": gp_pareto,
}
