"""Random specs through outliermerge and mergekit: a sample of what `make parity` compares."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from parity.both import assert_same_answers, by_mergekit, logits_of
from parity.models import family_of
from parity.report import compare_all
from parity.specs import KINDS, PARAMETERS

import outliermerge

pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit, transformers and hypothesis


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.mark.parametrize("method", PARAMETERS)
def test_a_sample_of_specs_agrees_with_mergekit(method: str, models: Path) -> None:
    found = compare_all(method, 2, models)

    assert found.num_specs == 2
    assert found.num_elements > 10_000
    assert found.failures == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_outputs_of_both_answer_alike(kind: str, models: Path, tmp_path: Path) -> None:
    family = family_of(kind, "float32", models)
    spec = {
        "merge_method": "linear",
        "models": [
            {"model": str(family / name), "parameters": {"weight": weight}}
            for name, weight in (("base", 0.5), ("m0", 0.3), ("m1", 0.2))
        ],
        "dtype": "float32",
    }
    by_mergekit(copy.deepcopy(spec), tmp_path / "theirs")
    outliermerge.run(spec, output=tmp_path / "ours", load_check=False)
    tokens = [2, 9, 17, 5, 11, 3, 8]
    ours, theirs, base = (
        logits_of(folder, tokens)
        for folder in (tmp_path / "ours", tmp_path / "theirs", family / "base")
    )
    assert_same_answers(ours, theirs)
    assert not torch.allclose(ours, base, atol=1e-4)
