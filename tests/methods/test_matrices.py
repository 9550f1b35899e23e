"""Methods on whole matrices, against their formulas with LAPACK's SVD in float64."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from checkpoints import load_folder, save_tensors
from torch import Tensor

import outliermerge
from outliermerge.engines.batched import batches, merge_batch
from outliermerge.engines.triton import TensorMerge
from outliermerge.methods.matrices import (
    decomposed,
    gram,
    orthogonal,
    orthogonal_beside,
    orthogonal_rows,
)

SHAPES = {
    "layers.0.self_attn.q_proj.weight": (24, 24),
    "layers.0.mlp.up_proj.weight": (37, 20),
    "layers.0.mlp.down_proj.weight": (20, 53),
    "layers.0.norm.weight": (31,),
    "embed_tokens.weight": (40, 12),
    "position_embedding.weight": (9, 12),
    "patch.weight": (6, 3, 2, 2),
    "layers.0.experts.gate": (3, 8, 15),
    "scalar": (),
}
AVERAGED = [n for n in SHAPES if n.partition(".")[0] in ("embed_tokens", "patch", "scalar")]
AVERAGED.append("layers.0.norm.weight")
WEIGHTS = [1.0, 0.5, 1.5]


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


def iso_c(taus: list[Tensor], p: dict[str, Any], name: str) -> Tensor:
    u, s, v = svd(sum(taus))
    return u @ torch.diag(s.mean().expand(len(s))) @ v


def iso_cts(taus: list[Tensor], p: dict[str, Any], name: str) -> Tensor:
    k, n = min(taus[0].shape), len(taus)
    left = k - int(k * p.get("common_space_fraction", 0.8))
    common = k - min(round(left / n), k // n) * n
    each = (k - common) // n
    u, s, v = svd(sum(taus))
    us, ss, vs = [u[:, :common]], [s[:common]], [v[:common]]
    for tau in taus:
        own = svd(tau - u[:, :common] @ u[:, :common].T @ tau)
        us, ss, vs = [*us, own[0][:, :each]], [*ss, own[1][:each]], [*vs, own[2][:each]]
    a, _, b = svd(torch.cat(us, 1))
    c, _, d = svd(torch.cat(vs))
    return torch.cat(ss).mean() * (a @ b @ c @ d)


def tsv_m(taus: list[Tensor], p: dict[str, Any], name: str) -> Tensor:
    each = min(taus[0].shape) // len(taus)
    us, ss, vs = zip(*(svd(tau) for tau in taus), strict=True)
    a, _, b = svd(torch.cat([u[:, :each] for u in us], 1))
    c, _, d = svd(torch.cat([v[:each] for v in vs]))
    return a @ b @ torch.diag(torch.cat([s[:each] for s in ss])) @ c @ d


def solved(taus: list[Tensor], p: dict[str, Any], filtered: Any) -> Tensor:
    c = sum(tau.T @ tau / tau.square().sum() for tau in taus)
    d = sum(tau @ tau.T @ tau / tau.square().sum() for tau in taus)
    values, vectors = torch.linalg.eigh(c)
    values = values.clamp(min=1e-8)
    f = filtered(values)
    theta = {"sum": sum(taus), "mean": sum(taus) / len(taus), "zero": 0 * taus[0]}[
        p.get("start", "sum")
    ]
    kept = vectors @ torch.diag(f) @ vectors.T
    return theta - theta @ kept + d @ vectors @ torch.diag(f / values) @ vectors.T


def wudi(taus: list[Tensor], p: dict[str, Any], name: str) -> Tensor:
    start = {"sum": sum(taus), "mean": sum(taus) / len(taus), "zero": 0 * taus[0]}
    x = torch.nn.Parameter(start[p.get("start", "sum")].clone())
    adam = torch.optim.Adam([x], lr=p.get("learning_rate", 1e-5))
    for _ in range(p.get("iterations", 300)):
        adam.zero_grad()
        sum(((x - tau) @ tau.T).square().sum() / tau.square().sum() for tau in taus).backward()
        adam.step()
    return x.detach()


def swudi(taus: list[Tensor], p: dict[str, Any], name: str) -> Tensor:
    def filtered(values: Tensor) -> Tensor:
        num = math.ceil(p.get("rank_ratio", 0.65) * len(values))
        last = torch.arange(len(values)) >= len(values) - num
        return (1 - torch.exp(-p.get("time", 300) * values)) * last

    return solved(taus, p, filtered)


def aswudi(taus: list[Tensor], p: dict[str, Any], name: str) -> Tensor:
    def filtered(values: Tensor) -> Tensor:
        y = values.sqrt()
        if p.get("rank") != "gavish_donoho":
            num = math.ceil(y.sum() ** 2 / y.square().sum())
        else:
            b = min(taus[0].shape) / max(taus[0].shape)
            middle = math.sqrt((1 - b) ** 2 + b) if b < 1 else math.sqrt(2 + math.sqrt(3))
            star = math.sqrt(2 * (b + 1) + 8 * b / (b + 1 + math.sqrt(b * b + 14 * b + 1)))
            num = max(1, int((y > star / middle * y.median()).sum()))
        return (torch.arange(len(values)) >= len(values) - num).double()

    return solved(taus, p, filtered)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


def resmerge(taus: list[Tensor], p: dict[str, Any], name: str) -> Tensor:
    heads, n = [], len(taus)
    for u, s, v in map(svd, taus):
        rank = p.get("rank", 1)
        heads.append(u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank])
    rests = [tau - head for tau, head in zip(taus, heads, strict=True)]
    q = sum(rest / rest.norm() for rest in rests)
    q = q / q.norm()
    s = sum(cosine(a, b) for a, b in combinations(rests, 2)) / math.comb(n, 2)
    c = sum(cosine(rest, q) for rest in rests) / n
    low, high = p.get("beta_min", 0.7), p.get("beta_max", 1.0)
    inside = "self_attn" in name or "mlp" in name
    beta = high - (high - low) * (((s + 1) / 2 + (c + 1) / 2) / 2 if inside else 0)
    merged = q * c**beta * sum(rest.norm() for rest in rests) / n
    if c <= 1 / math.sqrt(n):
        merged = sum(rests) / n
    agreement = sum(max(0, cosine(a, b)) for a, b in combinations(heads, 2)) / math.comb(n, 2)
    head = sum(heads)
    return merged + head / head.norm() * p.get("head_ratio", 0.2) * agreement * merged.norm()


ORACLES = {f.__name__: f for f in (iso_c, iso_cts, tsv_m, wudi, swudi, aswudi, resmerge)}
CASES: dict[str, dict[str, Any]] = {
    "iso_c": {},
    "iso_c lambda": {"lambda_": 0.7},
    "iso_cts": {},
    "iso_cts of models alone": {"common_space_fraction": 0.0, "lambda_": 0.7},
    "iso_cts of the sum": {"common_space_fraction": 1.0},
    "tsv_m": {},
    "tsv_m lambda": {"lambda_": 0.7},
    "swudi": {},
    "swudi mean": {"start": "mean", "time": 10.0, "rank_ratio": 1.0, "lambda_": 0.7},
    "swudi zero": {"start": "zero", "rank_ratio": 0.3},
    "wudi": {"iterations": 30, "lambda_": 0.7},
    "wudi from zero": {"iterations": 20, "learning_rate": 0.01, "start": "zero"},
    "aswudi": {"lambda_": 0.7},
    "aswudi by the median": {"rank": "gavish_donoho", "start": "mean"},
    "resmerge": {},
    "resmerge rank": {"rank": 3, "head_ratio": 0.5, "beta_min": 0.2, "lambda_": 0.7},
}


@pytest.fixture(scope="module")
def states() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(7)

    def drawn() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    base, common = drawn(), drawn()
    tuned = [drawn() for _ in WEIGHTS]
    return base, [{n: base[n] + common[n] / 2 + own[n] for n in base} for own in tuned]


@pytest.mark.parametrize("num_models", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_formula(case, num_models, states):
    base, models = states[0], states[1][:num_models]
    weights, method = WEIGHTS[:num_models], case.partition(" ")[0]
    merged = outliermerge.merge_state_dicts(
        models, base=base, method=method, weight=weights, **CASES[case]
    )
    lambda_ = CASES[case].get("lambda_", 1)
    for name, tensor in merged.items():
        taus = [
            w * (model[name] - base[name]).double()
            for w, model in zip(weights, models, strict=True)
        ]
        if name in AVERAGED:
            change = sum(taus) / num_models
        elif "experts" in name:
            each = zip(*(tau.unbind() for tau in taus), strict=True)
            change = torch.stack([ORACLES[method](list(one), CASES[case], name) for one in each])
        else:
            change = ORACLES[method](taus, CASES[case], name)
        wanted = base[name].double() + lambda_ * change
        assert torch.allclose(tensor.double(), wanted, rtol=1e-5, atol=3e-6), name


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (60, 60)])
def test_singular_vectors_are_as_exact_as_is_said(shape):
    generator = torch.Generator().manual_seed(1)
    u, _, v = svd(torch.randn(shape, generator=generator, dtype=torch.float64))
    for decades in (2, 4, 6):
        values = torch.logspace(0, -decades, 60, dtype=torch.float64)
        matrix = (u * values) @ v
        left, found, right = decomposed(matrix)
        allowed = 10 * 2.0**-52 * 10.0 ** (2 * decades)
        assert ((found - values).abs() / values).max() < 2.0**-52 * 10.0 ** (2 * decades)
        assert (left @ right - u @ v).abs().max() < allowed
        assert ((left * found) @ right - matrix).abs().max() < 1e-14
        assert ((left.T @ left).diagonal() - 1).abs().max() < 1e-13


@pytest.mark.parametrize("size", [1, 2, 5, 8, 61])
def test_a_gram_matrix_is_whole_below_its_diagonal(size):
    rows = torch.randn(size, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.allclose(gram(rows).tril(), (rows @ rows.T).tril(), rtol=0, atol=1e-12)


def rows_of(num: int, seed: int) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(50, num, generator=drawn, dtype=torch.float64))[0].T


ALL = rows_of(40, 9)
SETS = {
    "one": [ALL[:9]],
    "two": [rows_of(12, 1), rows_of(12, 2)],
    "two of all directions": [rows_of(25, 1), rows_of(25, 2)],
    "two that share some": [ALL[:12], torch.cat([ALL[4:9], -ALL[20:27]])],
    "two that are equal": [ALL[:12], ALL[:12]],
    "two that share none": [ALL[:12], ALL[12:24]],
    "two that share next to nothing": [ALL[:2], ALL[2:4] + 1e-7 * ALL[:2]],
    "two with rows of 0": [rows_of(6, 1).index_fill(0, torch.tensor([4, 5]), 0), rows_of(6, 2)],
    "three": [rows_of(9, 1), rows_of(9, 2), rows_of(9, 3)],
}


def nearest(matrix: Tensor) -> Tensor:
    u, s, v = svd(matrix)
    return u @ torch.diag((s > 1e-6).double()) @ v


@pytest.mark.parametrize("case", SETS)
def test_orthonormal_rows_are_made_orthogonal_to_each_other(case):
    found = orthogonal_rows(SETS[case])
    # The least singular values of the case "of all directions" are about 0.003.
    assert torch.allclose(found, nearest(torch.cat(SETS[case])), rtol=0, atol=1e-9)


@pytest.mark.parametrize("num", [3, 12, 30])
def test_others_are_made_orthogonal_beside_orthonormal_rows(num):
    drawn = torch.Generator().manual_seed(4)
    others = torch.randn(num, 50, generator=drawn, dtype=torch.float64)
    others[1] = ALL[3] + ALL[5]  # nothing but what the rows have already
    others[2] = 0
    for rows in (ALL[:20], ALL[:20].index_fill(0, torch.tensor([0, 7, 19]), 0)):
        found = orthogonal_beside(rows, others)
        assert torch.allclose(found, nearest(torch.cat([rows, others])), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", sorted(ORACLES))
def test_bytes_of_files_do_not_depend_on_threads(method, states, tmp_path):
    base, models = states
    for name, state in {"base": base, "m0": models[0], "m1": models[1]}.items():
        save_tensors(tmp_path / name, state)
    spec = {
        "merge_method": method,
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / name)} for name in ("m0", "m1")],
        "parameters": {"iterations": 20} if method == "wudi" else {},
    }
    for threads in (1, 3):
        outliermerge.run(spec, output=tmp_path / f"by-{threads}", threads=threads)
    first, second = (load_folder(tmp_path / f"by-{threads}") for threads in (1, 3))
    assert all(first[name].equal(second[name]) for name in first)


def test_directions_of_0_stay_0():
    generator = torch.Generator().manual_seed(2)
    u, s, v = svd(torch.randn(20, 30, generator=generator, dtype=torch.float64))
    s[7:] = 0
    left, values, right = decomposed((u * s) @ v)
    assert torch.allclose(values[:7], s[:7]) and not values[7:].any()
    assert not left[:, 7:].any() and not right[7:].any()
    assert torch.allclose(orthogonal((u * s) @ v), u[:, :7] @ v[:7], atol=1e-12)
    assert not orthogonal(torch.zeros(3, 4, dtype=torch.float64)).any()
    merged = outliermerge.merge_tensors(
        [((u * s) @ v).float(), torch.zeros(20, 30)], base=torch.zeros(20, 30), method="iso_c"
    )
    assert torch.allclose(merged.double(), s.mean() * u[:, :7] @ v[:7], atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_what_rounding_leaves_of_a_task_vector_is_no_direction(shape):
    drawn = torch.Generator().manual_seed(6)
    left, *rights = (
        torch.randn(size, generator=drawn, dtype=torch.float64)
        for size in [(shape[0], 3), (3, shape[1]), (3, shape[1])]
    )
    models, base = [left @ right for right in rights], torch.zeros(shape, dtype=torch.float64)
    merged = outliermerge.merge_tensors(models, base=base, method="iso_cts")
    # Nothing is left of a model beside the three directions of the sum.
    wanted = outliermerge.merge_tensors(models, base=base, method="iso_c")
    assert torch.allclose(merged, wanted, rtol=0, atol=1e-12)


def test_a_matrix_with_fewer_rows_than_models_is_averaged_by_tsv_m():
    models = [torch.full((2, 9), float(n)) for n in (1, 2, 6)]
    merged = outliermerge.merge_tensors(models, base=torch.zeros(2, 9), method="tsv_m")
    assert torch.equal(merged, torch.full((2, 9), 3.0))


@pytest.mark.parametrize(
    "method", ["wudi", "swudi", "aswudi", "resmerge", "tsv_m", "iso_c", "iso_cts"]
)
def test_changes_of_nothing_or_next_to_nothing_merge_to_as_little(method):
    base, tiny = torch.ones(4, 5, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)
    tiny[1, 2] = 1e-9
    merged = outliermerge.merge_tensors([base, base + tiny], base=base, method=method)
    assert (merged - base).abs().max() <= 1.01e-9


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m"])
def test_matrices_of_one_shape_are_merged_in_one_call(method, states):
    base, models = states
    name = "layers.0.mlp.up_proj.weight"
    found = outliermerge.methods.table.find_method(method)
    sources = [[state[name] * (1 + n) for state in (base, *models)] for n in range(3)]
    merges = []
    for each in sources:
        task = outliermerge.tensors._prepared(
            each[1:], each[0], found, found.resolve(3, {}),
            outliermerge.methods.context.Context(name, each[0].shape), {},
        ).task  # fmt: skip
        merges.append(TensorMerge(task, tuple(each), torch.empty_like(each[0])))
    (batch,) = batches(merges, memory_bytes=2**30)
    assert len(batch) == 3 and merge_batch(batch)
    for merge, (own, *others) in zip(merges, sources, strict=True):
        alone = outliermerge.merge_tensors(others, base=own, method=method, name=name)
        assert torch.allclose(merge.result, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "swudi", "aswudi", "resmerge"])
def test_infinite_values_are_passed_through(method):
    """LAPACK fails on them; a merge of files names the tensor."""
    states = [{"w": torch.eye(4)}, {"w": torch.full((4, 4), torch.inf)}]
    base = {"w": torch.zeros(4, 4)}
    merged = outliermerge.merge_state_dicts(states, base=base, method=method, allow_non_finite=True)
    assert not merged["w"].isfinite().all()


def test_resmerge_refuses_betas_in_the_wrong_order():
    ones = torch.ones(2, 2)
    with pytest.raises(outliermerge.ArgumentError, match=r"beta_min is 0\.9, expected at most"):
        outliermerge.merge_tensors([ones], base=ones, method="resmerge", beta_min=0.9, beta_max=0.5)
