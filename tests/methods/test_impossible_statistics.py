"""Statistics that no data can have, which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import outliermerge
from outliermerge import OutlierMergeError
from outliermerge.checkpoint.measured import Statistics


def ones(**kinds: Tensor) -> dict[str, Any]:
    """Return what merges a model of ones with one of threes, by statistics of the second."""
    (value,) = kinds.values()
    models = [{"w": torch.ones(2, 3)}, {"w": torch.full((2, 3), 3.0)}]
    right = torch.eye(3) if "gram" in kinds else torch.ones(2, 3)
    more = {kind: [{"w": right}, {"w": value}] for kind in kinds}
    return {"models": models, "auxiliary": more}


@pytest.mark.parametrize("method", ["regmean", "mats"])
@pytest.mark.parametrize(
    ("gram", "said"),
    [
        (-torch.eye(3), "values below 0 on the diagonal"),
        (torch.eye(3) + torch.tensor([[0, 0.1, 0], [0, 0, 0], [0, 0, 0]]), "are not symmetric"),
        (2 - torch.eye(3), "values larger than those on its diagonal allow"),
    ],
)
def test_what_can_be_no_gram_matrix_is_refused(method, gram, said):
    with pytest.raises(OutlierMergeError, match=rf"auxiliary\['gram'\]\[1\]: has .*{said}"):
        outliermerge.merge_state_dicts(method=method, **ones(gram=gram))
    half = torch.ones(3, 3).half() + torch.rand(3, 3).half() / 2048  # rounding is let pass
    outliermerge.merge_state_dicts(method=method, **ones(gram=half))


@pytest.mark.parametrize("method", ["fisher", "mats_fisher"])
def test_what_can_be_no_fisher_information_is_refused(method):
    wrong = torch.ones(2, 3)
    wrong[1, 2] = -1e-9
    said = "Fisher information of w of model 2 has values that are below 0, infinite or NaN. Measur"
    with pytest.raises(OutlierMergeError, match=said):
        outliermerge.merge_state_dicts(method=method, **ones(fisher=wrong))


@pytest.mark.parametrize("tolerance", [0.0, 1e38])
def test_a_tensor_of_no_information_is_averaged_from_zero_too(tolerance):
    given = ones(fisher=torch.zeros(2, 3))
    given["auxiliary"]["fisher"][0]["w"] = torch.zeros(2, 3)
    more: dict[str, Any] = {"init": "zero", "tolerance": tolerance}
    merged = outliermerge.merge_state_dicts(method="mats_fisher", **given, **more)
    assert merged["w"].equal(torch.full((2, 3), 2.0))


@pytest.mark.parametrize(
    "edited",
    [
        {"turned": None},
        {"turned": [3]},
        {"no_tokens": [1]},
        {"no_tokens": {"w": 5}},
        {"no_tokens": {"w": [[1]]}},
    ],
)
def test_a_manifest_of_other_types_is_told(edited: dict[str, Any], tmp_path: Path) -> None:
    whole = {
        "format": 1,
        "statistics": {"gram": {}},
        "tensors": {"w": "0"},
        "no_tokens": {"w": [1]},
    }
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(whole))
    assert Statistics(tmp_path).manifest == whole
    path.write_text(json.dumps(whole | edited))
    with pytest.raises(OutlierMergeError, match=r"statistics\.json: not statistics of format 1"):
        Statistics(tmp_path)
