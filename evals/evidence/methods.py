"""The merge methods that are compared: their defaults, and where their parameters are searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import outliermerge
from evals.evidence.training import State, Statistics

BUDGET = 9  # merges scored on validation data for a method: its defaults and eight others

_SCALE = (0.1, 1.2)  # of what is a sum over models
_WIDE = (0.3, 2.0)  # of what is a mean over models, or about as long as a task vector
_ITERATIONS = [2, 4, 8, 16, 32, 64]
_START = ["sum", "mean", "zero"]
# From least to most; of a list, one is taken. Those whose range starts at 1e-6 or below are drawn
# by their logarithm.
SPACES: dict[str, dict[str, Any]] = {
    "min_sigma": {"t": (0.5, 4.0), "lambda": _SCALE},
    "linear": {},
    "task_arithmetic": {"lambda": _SCALE},
    "ties": {"density": (0.1, 1.0), "lambda": _WIDE},
    "dare_linear": {"density": (0.1, 1.0), "lambda": _SCALE},
    "dare_ties": {"density": (0.1, 1.0), "lambda": _SCALE},
    "breadcrumbs": {"density": (0.1, 1.0), "lambda": _SCALE, "gamma": (0.0, 0.1)},
    "breadcrumbs_ties": {"density": (0.1, 1.0), "lambda": _SCALE, "gamma": (0.0, 0.1)},
    "della": {"density": (0.2, 0.8), "lambda": _WIDE},
    "della_linear": {"density": (0.2, 0.8), "lambda": _SCALE},
    "sce": {"select_topk": (0.05, 1.0)},
    "ram": {"epsilon": (1e-6, 1e-2)},
    "ramplus_tl": {"r": (0.0, 1.0), "alpha": (0.0, 1.0), "epsilon": (1e-6, 1e-2)},
    "multislerp": {},
    "karcher": {},
    "model_stock": {"filter_wise": [True]},
    "iso_c": {"lambda": _WIDE},
    "iso_cts": {"lambda": _WIDE, "common_space_fraction": (0.3, 0.95)},
    "tsv_m": {"lambda": _WIDE},
    "swudi": {"lambda": _WIDE, "start": _START, "rank_ratio": (0.3, 1.0)},
    "aswudi": {"lambda": _WIDE, "start": _START},
    "resmerge": {"lambda": _WIDE, "head_ratio": (0.0, 1.0)},
    "pcb": {"lambda": _WIDE, "density": (0.05, 0.5)},
    "consensus_ta": {"lambda": _SCALE, "tall_mask_lambda": (0.1, 0.7)},
    "metagpt": {"lambda": _WIDE},
    # With statistics of each task's training data.
    "regmean": {"reduce": (0.0, 1.0)},
    "fisher": {"epsilon": (1e-12, 1e-3)},
    "mats": {"iterations": _ITERATIONS},
    "mats_fisher": {"iterations": _ITERATIONS},
    # Of two models only, the first of which takes the base's place in all but nuslerp.
    "nuslerp": {"nuslerp_flatten": [False]},
    "slerp": {"t": (0.0, 1.0)},
    "nearswap": {"t": (1e-6, 1e-1)},
    "arcee_fusion": {},
}
# Options of min-σ that the paper has not, each a row of its own.
VARIANTS = {
    "min_sigma_row": {"sigma": "row"},
    "min_sigma_model": {"sigma": "model"},
    "min_sigma_mad": {"scale": "mad"},
    "min_sigma_elect": {"conflict": "elect"},
}
SPACES |= {name: SPACES["min_sigma"] for name in VARIANTS}
LEFT_OUT = ("wudi",)  # its 300 steps for each merge are hours; swudi and aswudi solve the same
WITHOUT_BASE = ("linear", "karcher")  # a base would be one of the models, or only give the names
PAIRS = ("slerp", "nearswap", "arcee_fusion")


def methods_of(num_models: int) -> list[str]:
    """Return the methods that merge so many task models."""
    pairs = ("nuslerp", *PAIRS)
    return [name for name in SPACES if num_models == 2 or name not in pairs]


def candidates(space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parameters that are tried for a method; the first are its defaults."""
    tried: list[dict[str, Any]] = [{}]
    for number in range(1, BUDGET if space else 1):
        drawn = {
            name: _place(value, _halton(number, base))
            for (name, value), base in zip(space.items(), (2, 3, 5), strict=False)
        }
        if drawn not in tried:
            tried.append(drawn)
    return tried


def _place(value: Any, share: float) -> Any:
    if isinstance(value, list):
        return value[int(share * len(value))]
    least, most = value
    if 0 < least <= 1e-6:
        return least * (most / least) ** share
    return least + share * (most - least)


def _halton(number: int, base: int) -> float:
    """Return a number of Halton's sequence, which fills [0, 1) evenly."""
    share, digit = 0.0, 1.0
    while number:
        digit /= base
        number, rest = divmod(number, base)
        share += digit * rest
    return share


def merged(
    method: str,
    base: State,
    models: list[State],
    parameters: Mapping[str, Any],
    seed: int,
    statistics: Callable[[], Sequence[Statistics]],
) -> State:
    """Merge task models in memory by the library."""
    if method in PAIRS:
        base, models = models[0], models[1:]
    start = None if method in WITHOUT_BASE else base
    given = {name + "_" * (name == "lambda"): value for name, value in parameters.items()}
    if method in VARIANTS:
        method, given = "min_sigma", {**given, **VARIANTS[method]}
    kinds = outliermerge.find_method(method).auxiliary
    auxiliary = {kind: [own[kind] for own in statistics()] for kind in kinds}
    return outliermerge.merge_state_dicts(
        models, base=start, method=method, seed=seed, auxiliary=auxiliary, **given
    )
