"""The tables of real weights beside the paper's, and the command that makes them."""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from demo.fetch import fetch  # noqa: E402
from evals.weights import paper, render, tables  # noqa: E402
from evals.weights.fetch import read_pickle  # noqa: E402

RESULTS = json.loads(tables.RESULTS.read_text())


def filtered(values: torch.Tensor) -> np.ndarray:
    """Return what is within 3σ of the mean."""
    x = values.double().numpy().ravel()
    return x[abs(x - x.mean()) <= 3 * x.std()]


def kurtosis(x: np.ndarray) -> float:
    return float(((x - x.mean()) ** 4).mean() / ((x - x.mean()) ** 2).mean() ** 2)


@dataclass(frozen=True)
class Family:
    """A model of five layers and a tuned one, with what the command says of them."""

    base: dict[str, torch.Tensor]
    tuned: dict[str, torch.Tensor]
    stats: dict[str, Any]
    delta_stats: dict[str, Any]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    generator = torch.Generator().manual_seed(5)

    def matrix(std: float) -> torch.Tensor:
        return std * torch.randn(40, 50, generator=generator)

    base = {f"layers.{n}.up.weight": matrix(0.1 / (1 + n)) for n in range(5)}
    base["layers.3.up.weight"][:38] *= 1e-3  # a line
    base |= {"norm.weight": torch.ones(50), "frozen.weight": matrix(1.0)}
    tuned = {name: each.clone() for name, each in base.items()}
    for n in range(5):
        tuned[f"layers.{n}.up.weight"] += matrix(0.01 * (1 + n) ** 2)
    folder = tmp_path_factory.mktemp("family")
    files = [folder / f"{name}.safetensors" for name in ("tuned", "base")]
    for file, tensors in zip(files, (tuned, base), strict=True):
        save_file(tensors, file)
    return Family(base, tuned, tables.measure(files[1]), tables.measure(*files))


def test_the_readme_has_the_tables_of_the_results():
    text = tables.README.read_text()
    assert render.fill(text, RESULTS) == text


def test_a_row_is_what_numpy_finds_over_the_matrices(family):
    found = tables.row(family.stats)
    expected = [kurtosis(filtered(each)) for each in family.base.values() if each.dim() > 1]
    assert found["num_tensors"] == 6
    assert found["kurtosis_mean"] == pytest.approx(statistics.fmean(expected), rel=1e-6)
    assert found["kurtosis_std"] == pytest.approx(statistics.pstdev(expected), rel=1e-6)
    assert found["kurtosis_median"] == pytest.approx(statistics.median(expected), rel=1e-6)
    assert sum(found["labels"].values()) == 6
    assert "relative_norm" not in found


def test_a_task_vectors_row_leaves_out_what_did_not_change(family):
    base, tuned = family.base, family.tuned
    found = tables.row(family.delta_stats, family.stats)
    names = [name for name in base if name.startswith("layers")]
    deltas = [tuned[name].double() - base[name].double() for name in names]
    assert found["num_tensors"] == 5
    kept = [filtered(each).size / each.numel() for each in deltas]
    assert found["kept_ratio_mean"] == pytest.approx(statistics.fmean(kept), rel=1e-6)
    norms = [torch.cat([each.flatten() for each in part]).double().norm() for part in (
        deltas, [base[name] for name in names])]  # fmt: skip
    assert found["relative_norm"] == pytest.approx(float(norms[0] / norms[1]), rel=1e-6)


def test_matrices_with_a_spike_are_listed(family):
    (found,) = tables.spikes(family.stats)
    assert (found["name"], found["label"]) == ("layers.3.up.weight", "line")


def test_depth_is_the_order_of_layers_by_type_of_module(family):
    ((module, found),) = tables.depth({"tensors": family.stats["tensors"][::-1]}).items()
    assert (module, found["layers"]) == ("layers.*.up", 5)
    assert found["first"] == pytest.approx(
        family.base["layers.0.up.weight"].std(correction=0).item()
    )
    # By σ, from the first layer: 5th, 4th, 3rd, 1st, 2nd.
    assert found["spearman"] == pytest.approx(-0.9)


@pytest.mark.parametrize("small", [0.0, 0.3])
def test_a_cut_gaussians_kurtosis_is_that_of_its_quantiles(small):
    normal = NormalDist()
    x = np.array([normal.inv_cdf((n + 0.5) / 200_000) for n in range(200_000)])
    cut = x[(abs(x) < 3) & (abs(x) > small)]
    assert render.gaussian_kurtosis(small) == pytest.approx(kurtosis(cut), rel=1e-3)


def test_correlations_of_known_pairs():
    assert render.correlations([(1, 1), (2, 4), (3, 9), (4, 16)])["spearman"] == pytest.approx(1)
    found = render.correlations([(1, 1), (1, 2), (3, 3), (4, 0)])
    ranks = np.corrcoef([1.5, 1.5, 3, 4], [2, 3, 4, 1])[0, 1]
    assert found["spearman"] == pytest.approx(ranks)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 1, 3, 4], [1, 2, 3, 0])[0, 1])


def test_the_papers_figures_are_in_one_piece():
    one = {name: kurtosis for name, (_, kurtosis, _) in paper.PAPER_1.items()}
    assert list(one.values()) == [3.02, 3.06, 3.27, 3.26, 3.33, 3.12, 3.12, 2.83, 3.10]
    assert [ratio for ratio, _, _ in paper.PAPER_1.values()] == [
        99.51, 99.49, 99.36, 99.26, 99.18, 99.39, 99.39, 99.73, 99.40
    ]  # fmt: skip
    assert [std for _, _, std in paper.PAPER_1.values()] == [
        0.24, 0.44, 1.32, 0.47, 0.44, 0.38, 0.36, 0.00, 0.22
    ]  # fmt: skip
    assert [len(row) for row in paper.PAPER_5] == [36, 36]
    # Table 5's layer 10, where the two filters are furthest apart, and layer 16, where they cross.
    assert [row[20:22] for row in paper.PAPER_5] == [(4.34, 4.50), (2.85, 2.97)]
    assert [row[32:34] for row in paper.PAPER_5] == [(2.91, 2.98), (3.05, 2.95)]
    # The gaps that section A.2 speaks of: equal at r=32, and DoRA far behind at r=4.
    assert {rank: round(dash - dora, 1) for rank, (dash, dora, _) in paper.PAPER_7.items()} == {
        4: 13.8, 8: -1.0, 16: -2.5, 32: 0.0, 64: -0.4
    }  # fmt: skip
    falls = [kurtosis for title, (_, kurtosis, _) in paper.PAPER_6.items() if "DoRA" in title]
    assert falls == sorted(falls, reverse=True)


def test_the_results_are_what_the_command_finds_today(tmp_path):
    found = tables.row(tables.measure(fetch(tmp_path)[tables.MINILM]))
    written = RESULTS["weights"][tables.MODELS[tables.MINILM]]
    assert found.pop("labels") == written["labels"]
    assert found == pytest.approx({name: written[name] for name in found}, rel=1e-6)


class Runs:
    """Pickles as a call of os.getcwd."""

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return os.getcwd, ()


def pickled(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def test_a_pickle_that_would_run_code_is_not_read():
    with pytest.raises(Exception, match="getcwd"):
        read_pickle(pickled({"model": {"w": torch.ones(2)}, "more": Runs()}), ("model",))


def test_of_a_pickle_only_the_state_dict_is_read():
    state = {"a": {"w": torch.ones(2)}, "statistics": np.ones(3, np.float32)}
    assert read_pickle(pickled(state), ("a",)) == {"w": pytest.approx(torch.ones(2))}


def test_an_e3nn_networks_vectors_become_rows_and_its_constants_are_left_out():
    flat = torch.arange(1024.0)
    state = {
        "0 self interaction 2.linear.weight": flat,
        "reducing nn hidden to energy.linear.weight": torch.ones(64),
        "1_convolution.weight_nn.layer0.weight": torch.ones(8, 64),
        "1_convolution.convolution.weight": torch.ones(0),
        "1_convolution.convolution._w3j_1_1_1": torch.ones(3, 3, 3),
    }
    found = read_pickle(pickled({"s": state}), ("s",), flat=True)
    assert {name: tuple(each.shape) for name, each in found.items()} == {
        "layers.0.self_interaction_2.linear.weight": (32, 32),
        "reduce_hidden_to_energy.linear.weight": (64,),
        "layers.1.convolution.weight_nn.layer0.weight": (8, 64),
    }
    assert torch.equal(next(iter(found.values())).flatten(), flat)
