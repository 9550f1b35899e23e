"""Random specs through outliermerge and mergekit: a sample of what `make parity` compares."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity.report import compare_all
from parity.specs import PARAMETERS

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
