"""A transplant against mergekit-tokensurgeon 0.1.5: its functions, and whole models."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import load_folder
from transplants import EMBEDDINGS, HEAD, pairing
from vocabularies import save_model

import outliermerge
from outliermerge.checkpoint.tokens import read_tokens
from outliermerge.execution.pursuit import interpolate, pursue

ROWS = (EMBEDDINGS, HEAD)


@pytest.fixture(scope="module")
def surgeon():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mergekit.scripts.tokensurgeon as script
        import mergekit.tokensurgeon as functions
    return functions, script


@pytest.fixture(scope="module")
def points() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(24, 24, generator=generator)
    return tuple(torch.randn(n, 24, generator=generator) @ mixed for n in (60, 200))


@pytest.mark.parametrize("k", [1, 4, 12, 24])
def test_matching_pursuit_chooses_what_mergekits_does(k, points, surgeon):
    targets, atoms = points
    ours, weights = pursue(targets.double(), atoms, k)
    theirs, coefficients = surgeon[0].batch_omp(targets.double(), atoms.double(), k)
    assert torch.equal(ours, theirs)
    assert torch.allclose(weights, coefficients, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("k", [1, 5, 32])
def test_interpolation_is_mergekits(k, points, surgeon):
    targets, atoms = points
    ours, weights = interpolate(targets.double(), atoms, k)
    theirs, coefficients = surgeon[0].common_interp_approximate(
        targets.double(), atoms.double(), k=k
    )
    assert torch.equal(ours, theirs)
    assert torch.allclose(weights, coefficients, rtol=1e-9)


def test_atoms_that_the_chosen_ones_can_replace_have_no_weight():
    """Targets that three atoms add up to, among copies of atoms: weights stay small."""
    generator = torch.Generator().manual_seed(1)
    atoms = torch.randn(6, 10, generator=generator)
    atoms = torch.cat([atoms, atoms, 2 * atoms])
    targets = torch.randn(8, 3, generator=generator).double() @ atoms[:3].double()
    chosen, weights = pursue(targets, atoms, 9)
    made = torch.einsum("bk,bkc->bc", weights, atoms[chosen].double())
    assert torch.allclose(made, targets, atol=1e-9)
    assert weights.abs().max() < 10 and (weights != 0).sum(1).max() <= 6
    assert all(len(set(row)) == 9 for row in chosen.tolist())


@pytest.fixture(scope="module")
def transplant_by_mergekit(surgeon) -> Callable[..., dict[str, torch.Tensor]]:
    from click.testing import CliRunner

    def make(model: Path, donor: Path, out: Path, *flags: str) -> dict[str, torch.Tensor]:
        words = [str(model), str(donor), str(out), *flags]
        level = logging.root.level
        done = CliRunner().invoke(surgeon[1].main, words, catch_exceptions=False)
        logging.root.setLevel(level)
        assert done.exit_code == 0, done.output
        return load_folder(out)

    return make


NAMES = {"omp": "omp", "interpolate": "common_interpolation", "subtokens": "subword",
         "mean": "mean", "zero": "zero"}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", NAMES)
def test_whole_models_have_mergekits_rows(method, transplant_by_mergekit, tmp_path):
    """Both models spell by bytes, as mergekit takes all tokenizers to do that it does not know.

    mergekit's basis has the special token as well, and it cuts the letters of bytes as if they were
    text: so sums are compared where that token is not among them, and pieces in ASCII.
    """
    model = save_model(tmp_path / "model", "byte-level BPE")
    donor = save_model(tmp_path / "donor", "byte-level BPE", "other", seed=2)
    flags = ("--approximation-method", NAMES[method], "--k", "4")
    theirs = transplant_by_mergekit(model, donor, tmp_path / "theirs", *flags)
    outliermerge.transplant(model, donor, output=tmp_path / "ours", method=method, k=4)
    ours = load_folder(tmp_path / "ours")
    tokens, found = read_tokens(donor), pairing(model, donor)
    missing = [row for row in tokens if row not in found.rows]
    assert ours.keys() == theirs.keys() and missing
    for name in ours:
        if name not in ROWS:
            assert torch.equal(ours[name], theirs[name])
            continue
        shared = [*found.rows]
        assert torch.equal(ours[name][shared], theirs[name][shared])
        equal = [
            row for row in missing if torch.allclose(ours[name][row], theirs[name][row], atol=1e-4)
        ]
        if method in ("mean", "zero"):
            assert equal == missing
        elif method == "subtokens":
            assert {row for row in missing if tokens[row].lstrip("Ġ").isascii()} <= {*equal}
        else:
            assert len(equal) > 0.8 * len(missing)
