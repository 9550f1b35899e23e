"""What can be measured of task vectors before a merge, tensor by tensor."""

from __future__ import annotations

import math
import statistics
import tempfile
from pathlib import Path

from safetensors.torch import save_file

import outliermerge
from evals.evidence.training import State

FACTS = ("kurtosis", "outliers", "cosine", "sign_conflicts", "outlier_conflicts", "distance")


def facts(base: State, models: list[State]) -> dict[str, dict[str, float]]:
    """Measure the task vectors of each matrix, and their mean weighted by elements as `""`.

    `kurtosis` is of all elements, the mean of the models' (a Gaussian: 3); `outliers` the share
    that min-σ keeps whole at t = 2; `cosine`, `sign_conflicts` and `outlier_conflicts` (of all
    elements, those that are outliers of opposite signs) means over pairs; `distance` the mean of
    ‖ΔW‖ / ‖W‖. A matrix that a model left as it was is not among them.
    """
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.safetensors") for number in range(len(models) + 1)]
        for path, state in zip(paths, [base, *models], strict=True):
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        pairs = outliermerge.compare_weights(paths[1:], base=paths[0], t=2.0, threads=1).tensors
    for name, tensor in base.items():
        own = [pair for pair in pairs if pair.name == name]
        if tensor.dim() < 2 or any(math.isnan(pair.cosine) for pair in own):
            continue
        deltas = [model[name] - tensor for model in models]
        each = {
            "kurtosis": [
                outliermerge.stats_of_tensor(delta, name=name).kurtosis_before for delta in deltas
            ],
            "outliers": [r for pair in own for r in (pair.outlier_ratio_a, pair.outlier_ratio_b)],
            "cosine": [pair.cosine for pair in own],
            "sign_conflicts": [pair.sign_conflict_ratio for pair in own],
            "outlier_conflicts": [pair.conflict_ratio for pair in own],
            "distance": [(delta.norm() / tensor.norm()).item() for delta in deltas],
        }
        found[name] = {fact: statistics.fmean(values) for fact, values in each.items()}
    sizes = {name: base[name].numel() for name in found}
    found[""] = {
        fact: sum(found[name][fact] * size for name, size in sizes.items()) / sum(sizes.values())
        for fact in FACTS
    }
    return found
