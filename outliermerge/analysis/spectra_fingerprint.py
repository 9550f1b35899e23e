"""A model's fingerprint: σ as a function of depth, for each type of projection.

The idea is from arXiv 2509.19122, which describes a model by one normalised σ for each type of
projection and finds that models of one family are similar. Our own additions are σ over depth, the
common names of projections, and the distance.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from outliermerge.arguments import checked, wrong

NUM_POINTS = 32
"""The depths that a profile is resampled to, so that models of any depths can be compared."""

_PROJECTIONS = {
    "q": r"q_proj|query|q_lin|to_q|wq|q",
    "k": r"k_proj|key|k_lin|to_k|wk|k",
    "v": r"v_proj|value|v_lin|to_v|wv|v",
    "o": r"o_proj|out_proj|out_lin|attention\.output\.dense|attn\.c_proj|attention\.wo|o",
    "gate": r"gate_proj|w1|wi_0",
    "up": r"up_proj|intermediate\.dense|fc1|lin1|c_fc|w3|wi_1|wi",
    "down": r"down_proj|output\.dense|fc2|lin2|mlp\.c_proj|w2|wo",
}
"""The names of the same projection in different architectures; the first match counts."""


class LayerStd(NamedTuple):
    """The σ of one matrix: its type of module, its layer's numbers, and its elements."""

    module: str
    depth: tuple[int, ...]
    num_elements: int
    std: float


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The σ of each projection over depth.

    Attributes:
        model: the name that the caller gave.
        stack: the stack of layers with the most elements, such as `model.layers`.
        profiles: for each projection σ at NUM_POINTS depths, from the first layer to the last.
            Projections are `q`, `k`, `v`, `o`, `gate`, `up`, `down`, or have the model's own name.
    """

    model: str
    stack: str
    profiles: Mapping[str, tuple[float, ...]]


def make_fingerprint(model: str, matrices: Iterable[LayerStd]) -> Fingerprint:
    """Return the fingerprint of a model's largest stack of layers; every σ must be above 0."""
    stacks: dict[str, list[LayerStd]] = {}
    for matrix in matrices:
        stacks.setdefault(matrix.module.partition(".*.")[0], []).append(matrix)
    stack = max(stacks, key=lambda name: sum(matrix.num_elements for matrix in stacks[name]))
    runs: dict[str, list[float]] = {}
    for matrix in sorted(stacks[stack], key=lambda matrix: matrix.depth):
        runs.setdefault(matrix.module.partition(".*.")[2], []).append(matrix.std)
    names = {module: _projection(module) for module in runs}
    taken = list(names.values())
    return Fingerprint(
        model=model,
        stack=stack,
        profiles={
            # If two modules have the same common name, as in self- and cross-attention, both keep
            # their own names.
            names[module] if taken.count(names[module]) == 1 else module: _resample(stds)
            for module, stds in runs.items()
        },
    )


def _projection(module: str) -> str:
    matches = (
        name for name, ends in _PROJECTIONS.items() if re.search(rf"(^|\.)({ends})$", module)
    )
    return next(matches, module)


def _resample(stds: Sequence[float]) -> tuple[float, ...]:
    """Return the values at NUM_POINTS evenly spaced depths, interpolated in the logarithm."""
    logs = [math.log(std) for std in stds]
    found = []
    for number in range(NUM_POINTS):
        place = number / (NUM_POINTS - 1) * (len(logs) - 1)
        left = min(int(place), len(logs) - 2) if len(logs) > 1 else 0
        right = min(left + 1, len(logs) - 1)
        found.append(math.exp(logs[left] + (place - left) * (logs[right] - logs[left])))
    return tuple(found)


@checked
def fingerprint_distance(a: Fingerprint, b: Fingerprint) -> float:
    """Return the distance of two fingerprints, which does not depend on the scale of weights.

    It is the standard deviation of ln(σ_A / σ_B) over all depths of the projections that both have.
    It is 0 if one model's σ are a multiple of the other's, and about 0.1 if they differ by 10%
    after the scale is removed.

    Returns:
        The distance; NaN if they have no projection in common.

    Example:
        >>> from dataclasses import replace
        >>> a = make_fingerprint("a", [LayerStd("l.*.q", (n,), 9, s) for n, s in enumerate((1, 2))])
        >>> b = replace(a, profiles={"q": tuple(3 * std for std in a.profiles["q"])})
        >>> round(fingerprint_distance(a, b), 12)
        0.0
    """
    for name, given in (("a", a), ("b", b)):
        if not isinstance(given, Fingerprint):
            raise wrong(name, given, "the `fingerprint` of what layer_spectra() returns")
    common = [name for name in a.profiles if name in b.profiles]
    ratios = [
        math.log(ours / theirs)
        for name in common
        for ours, theirs in zip(a.profiles[name], b.profiles[name], strict=True)
    ]
    return statistics.pstdev(ratios) if ratios else math.nan
