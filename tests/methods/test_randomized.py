"""Singular vectors from a random start, against LAPACK's SVD in float64."""

from __future__ import annotations

import pytest
import torch
from checkpoints import load_folder, save_tensors
from torch import Tensor

import outliermerge
from outliermerge.engines.batched import batches, merge_batch
from outliermerge.engines.triton import TensorMerge
from outliermerge.methods.context import Context
from outliermerge.methods.matrices import decomposed

PLACES = torch.arange(1, 121, dtype=torch.float64)
SPECTRA = {
    "falls quickly": 0.7**PLACES,
    "falls slowly": PLACES**-0.5,
    "equal": PLACES**0,
}
METHODS = ["tsv_m", "iso_cts", "resmerge"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=drawn, dtype=torch.float64)


def with_values(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    u, _, v = torch.linalg.svd(noise(rows, columns, seed=seed), full_matrices=False)
    return (u * values) @ v


def rest(matrix: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> float:
    left, values, right = found
    return float((matrix - (left * values) @ right).norm())


@pytest.mark.parametrize("num", [1, 7, 20])
@pytest.mark.parametrize("shape", [(120, 200), (200, 120), (120, 120)])
@pytest.mark.parametrize("case", [*SPECTRA, "noise"])
def test_they_are_as_exact_as_is_said(case, shape, num):
    matrix = noise(*shape) if case == "noise" else with_values(SPECTRA[case], *shape)
    found = decomposed(matrix, num, randomized=True)
    left, values, right = found
    one = torch.eye(num, dtype=torch.float64)
    assert torch.allclose(left.T @ left, one, rtol=0, atol=1e-12)
    assert torch.allclose(right @ right.T, one, rtol=0, atol=1e-9)
    true = torch.linalg.svdvals(matrix)
    assert (values <= true[:num] * (1 + 1e-12)).all()
    assert (values >= true[:num] * 0.9).all()
    assert rest(matrix, found) <= 1.03 * true[num:].norm()
    if case == "falls quickly":
        assert torch.allclose(values, true[:num], rtol=1e-6, atol=0)


def test_they_are_not_those_of_the_gram_matrix():
    matrix = noise(120, 200)
    by_gram = decomposed(matrix, 7)
    assert rest(matrix, decomposed(matrix, 7, randomized=True)) > rest(matrix, by_gram) * 1.0001
    # More than a quarter is wanted, or all: these are exact.
    for num in (21, None):
        pairs = zip(decomposed(matrix, num, randomized=True), decomposed(matrix, num), strict=True)
        assert all(found.equal(exact) for found, exact in pairs)


@pytest.mark.parametrize("size", [1e-100, 1e-30, 1.0, 1e30, 1e100])
def test_a_matrix_of_low_rank_is_exact_whatever_its_length(size):
    matrix = noise(120, 9) @ noise(9, 160, seed=1) * size
    found = decomposed(matrix, 9, randomized=True)
    assert rest(matrix / size, (found[0], found[1] / size, found[2])) < 1e-9
    assert torch.allclose(found[1] / size, torch.linalg.svdvals(matrix / size)[:9], rtol=1e-12)


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    matrix = with_values(SPECTRA["falls slowly"], 120, 200)
    found = decomposed(matrix.cuda(), 7, randomized=True)
    left, values, right = decomposed(matrix, 7, randomized=True)
    assert torch.allclose(found[1].cpu(), values, rtol=1e-5, atol=0)
    products = ((found[0] * found[1]) @ found[2]).cpu(), (left * values) @ right
    assert torch.allclose(*products, rtol=0, atol=1e-4)


def test_directions_of_0_and_broken_values():
    left, values, right = decomposed(torch.zeros(90, 80).double(), 3, randomized=True)
    assert not values.any() and not left.any() and not right.any()
    thin = noise(90, 2) @ noise(2, 80, seed=1)
    assert (decomposed(thin, 5, randomized=True)[1] > 0).tolist() == [True] * 2 + [False] * 3
    for broken in (float("nan"), float("inf")):
        thin[4, 4] = broken
        assert not decomposed(thin, 3, randomized=True)[1].isfinite().any()


def merged(method: str, taus: list[Tensor], *, randomized: bool, name: str = "w") -> Tensor:
    base = torch.zeros_like(taus[0])
    models = [{name: tau} for tau in taus]
    return outliermerge.merge_state_dicts(
        models, base={name: base}, method=method, randomized=randomized
    )[name]


@pytest.mark.parametrize("shape", [(130, 120), (120, 130)])
@pytest.mark.parametrize("method", METHODS)
def test_merges_agree_with_those_of_the_gram_matrix(method, shape):
    """As far as the directions that are taken stand out; if none does, in length."""
    # Iso-CTS takes what is left beside 96 directions: there must be something.
    share, allowed = (0.9, 1e-2) if method == "iso_cts" else (0.7, 1e-8)
    taus = [with_values(share**PLACES, *shape, seed=n) for n in range(8)]
    exact, found = (merged(method, taus, randomized=which) for which in (False, True))
    assert (found - exact).norm() < allowed * exact.norm()
    taus = [noise(*shape, seed=n) for n in range(8)]
    exact, found = (merged(method, taus, randomized=which) for which in (False, True))
    assert abs(found.norm() / exact.norm() - 1) < 0.02
    is_exact = method == "iso_cts" and shape[0] < shape[1]  # of 24 rows each model has 3
    assert found.equal(exact) == is_exact


@pytest.mark.parametrize("method", METHODS)
def test_they_depend_on_values_alone(method):
    """Neither on the tensor's name nor on the run; so do experts and files."""
    taus = [noise(3, 130, 120, seed=n).float() for n in range(8)]
    first = merged(method, taus, randomized=True, name="experts.w")
    assert first.equal(merged(method, taus, randomized=True, name="experts.w"))
    alone = merged(method, [tau[1] for tau in taus], randomized=True, name="other")
    if method != "resmerge":  # there the name tells which β
        assert torch.allclose(first[1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_of_files_do_not_depend_on_threads(method, tmp_path):
    for number in range(9):
        tensors = {f"w{each}": noise(130, 120, seed=9 * each + number).float() for each in range(3)}
        save_tensors(tmp_path / f"m{number}", tensors)
    spec = {
        "merge_method": method,
        "base_model": str(tmp_path / "m0"),
        "models": [{"model": str(tmp_path / f"m{number}")} for number in range(1, 9)],
        "parameters": {"randomized": True},
    }
    for threads in (1, 3):
        outliermerge.run(spec, output=tmp_path / f"by-{threads}", threads=threads)
    first, second = (load_folder(tmp_path / f"by-{threads}") for threads in (1, 3))
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("method", ["tsv_m", "iso_cts"])
def test_they_are_found_for_many_matrices_in_one_call(method):
    found = outliermerge.find_method(method)
    parameters = found.resolve(8, {"randomized": True})
    context = Context("w", (130, 120))
    sources = [[noise(130, 120, seed=10 * m + n).float() for n in range(9)] for m in range(2)]
    merges = []
    for base, *models in sources:
        task = outliermerge.tensors._prepared(models, base, found, parameters, context, {}).task
        merges.append(TensorMerge(task, (base, *models), torch.empty_like(base)))
    (batch,) = batches(merges, memory_bytes=2**30)
    assert len(batch) == 2 and merge_batch(batch)
    for merge, (base, *models) in zip(merges, sources, strict=True):
        alone = outliermerge.merge_tensors(models, base=base, method=method, randomized=True)
        assert torch.allclose(merge.result, alone, rtol=1e-4, atol=1e-4)
