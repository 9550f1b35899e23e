"""Methods that drop elements of task vectors, against their formulas, written here in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder, save_tensors
from stopping import stopping_after
from torch import Tensor

import outliermerge
from outliermerge import ArgumentError, OutlierMergeError
from outliermerge.methods.context import Context
from outliermerge.methods.statistics.base import CHUNK_ELEMENTS
from outliermerge.methods.statistics.trim import Middle
from outliermerge.methods.table import METHODS
from outliermerge.spec.schema import json_schema

DARE, CRUMBS, DELLA = (
    ("dare_linear", "dare_ties"),
    ("breadcrumbs", "breadcrumbs_ties"),
    ("della_linear", "della"),
)
DRAWN = (*DARE, *DELLA)
ALL = (*DRAWN, *CRUMBS, "sce", "ram", "ramplus_tl")
SHAPES = [(), (1,), (7,), (5, 1), (1, 6), (40, 30), (6, 3, 5, 2)]
# Powers of two, so that float32 sees the same sign of a sum.
WEIGHTS = [0.5, 1.5, 0.25]


def drawn(shape: tuple[int, ...], num_models: int = 3, scale: float = 0.01) -> list[Tensor]:
    """Return a base and models, in float64 with few digits: differences are exact."""
    generator = torch.Generator().manual_seed(len(shape) + num_models)
    base, *deltas = (
        (torch.randn(shape, generator=generator, dtype=torch.float64) * 2**30).round() / 2**30
        for _ in range(num_models + 1)
    )
    return [base, *(base + (delta * scale * 2**30).round() / 2**30 for delta in deltas)]


def merged(method: str, tensors: list[Tensor], **parameters: Any) -> Tensor:
    base, *models = tensors
    return outliermerge.merge_tensors(models, base=base, method=method, **parameters) - base


# The formulas.


def rescaled(delta: Tensor, kept: Tensor) -> Tensor:
    before, after = delta.abs().sum(), kept.abs().sum()
    return kept if min(before, after) < 1e-7 else kept * (before / after)


def elected(values: list[Tensor], count: bool = False) -> Tensor:
    votes = [torch.sign(value) for value in values] if count else values
    return 2 * (sum(votes) >= 0).double() - 1


def put_together(kept: list[Tensor], sign: bool, p: dict[str, Any]) -> Tensor:
    weighted = [w * x for w, x in zip(p["weight"], kept, strict=True)]
    if sign:
        majority = elected(weighted, p.get("consensus") == "count")
        agrees = [(torch.sign(x) == majority).double() for x in weighted]
        divisor = sum(w * a for w, a in zip(p["weight"], agrees, strict=True))
        divisor = torch.where(divisor == 0, 1.0, divisor)
        total = sum(x * a for x, a in zip(weighted, agrees, strict=True))
    else:
        total, divisor = sum(weighted), sum(p["weight"])
        divisor = 1.0 if abs(divisor) < 1e-8 else divisor
    total = total / divisor if p["normalize"] else total
    return p.get("lambda_", 1) * total


def middle(delta: Tensor, density: float, gamma: float) -> Tensor:
    if density >= 1:
        return delta
    order = delta.abs().flatten().sort().values
    kept, top = int(density * len(order)), int(gamma * len(order))
    bottom = max(0, len(order) - kept - top)
    if kept == 0:
        return torch.zeros_like(delta)
    low, high = order[bottom], order[bottom + kept - 1]
    return torch.where((delta.abs() >= low) & (delta.abs() <= high), delta, 0.0)


def chances(method: str, delta: Tensor, density: float, epsilon: float) -> Tensor:
    if method in DARE or not 0 < density < 1:
        return torch.full_like(delta, density)
    rows = delta.reshape(1, -1) if delta.ndim < 2 else delta
    if rows.shape[1] == 1:
        return torch.full_like(delta, density)
    rank = rows.abs().argsort(dim=1, stable=True).argsort(dim=1).double()
    share = rank / (rows.shape[1] - 1)
    return (density - epsilon + share * 2 * epsilon).reshape(delta.shape)


def sparse(method: str, tensors: list[Tensor], p: dict[str, Any]) -> Tensor:
    base, *models = tensors
    kept = []
    for number, model in enumerate(models):
        delta, density = model - base, p["density"][number]
        if method in CRUMBS:
            own = middle(delta, density, p["gamma"][number])
            kept.append(rescaled(delta, own) if p["rescale"] else own)
            continue
        chance = chances(method, delta, density, p.get("epsilon", 0.15))
        own = delta * (Context("", tuple(base.shape)).uniform(delta, model=number) < chance)
        if p["rescale"] and p["rescale_by"] == "l1" and 0 < density < 1:
            own = rescaled(delta, own)
        elif p["rescale"] and p["rescale_by"] == "probability" and density > 0:
            own = own / chance
        kept.append(own)
    return put_together(kept, method.endswith("ties") or method == "della", p)


def sce(tensors: list[Tensor], topk: float, compat: str = "none") -> Tensor:
    deltas = torch.stack([model - tensors[0] for model in tensors[1:]])
    spread = deltas.var(0, unbiased=False)
    if topk < 1:
        wanted = int(topk * int(spread.count_nonzero()))
        limit = spread.flatten().sort(descending=True).values[wanted - 1] if wanted else math.inf
        deltas = torch.where(spread >= limit, deltas, 0.0)
    squares = deltas.reshape(len(deltas), -1).square().mean(1)
    alike = squares.sum() <= (1e-6 if compat == "mergekit" else 0)
    weight = torch.full_like(squares, 1 / len(squares)) if alike else squares / squares.sum()
    agrees = (torch.sign(deltas) == elected(list(deltas))).double()
    weights = agrees * weight.view(-1, *[1] * (deltas.ndim - 1))
    total = weights.sum(0)
    total = total.clamp(min=1e-6) if compat == "mergekit" else torch.where(total == 0, 1.0, total)
    return (deltas * weights).sum(0) / total


def ram(
    tensors: list[Tensor], epsilon: float, r: float | None = None, alpha: float = 0.2
) -> Tensor:
    deltas = [model - tensors[0] for model in tensors[1:]]
    active = [delta.abs() > epsilon for delta in deltas]
    count = sum(a.double() for a in active)
    total = torch.zeros_like(tensors[0])
    for delta, own in zip(deltas, active, strict=True):
        unique, shared = own & (count == 1), own & (count > 1)
        ratio = int(shared.sum()) / max(1, int(unique.sum()))
        factor = 1 if r is None else 1 + r * min(max(ratio, 0), alpha)
        total += torch.where(unique, delta * factor, 0.0)
        total += torch.where(shared, delta / count.clamp(min=1), 0.0)
    return total


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


PARAMETERS: dict[str, dict[str, Any]] = {
    "half": {"density": [0.5] * 3},
    "mixed": {"density": [0.2, 1.0, 0.7], "lambda_": -0.5},
    "none": {"density": [0.0] * 3},
    "all": {"density": [1.0] * 3},
    "swapped": {"density": [0.4, 0.3, 0.6], "normalize": True, "rescale": "other"},
    "divided": {"density": [0.4, 0.3, 0.6], "rescale_by": "probability", "consensus": "count"},
    "norm": {"density": [0.4, 0.3, 0.6], "rescale_by": "l1", "normalize": False},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("method", [*DRAWN, *CRUMBS])
def test_what_is_dropped_and_put_together_is_the_formulas(method, case, shape):
    known = METHODS[method].parameters
    given = {k: v for k, v in PARAMETERS[case].items() if k.removesuffix("_") in known}
    if given.get("rescale") == "other":
        given["rescale"] = not known["rescale"].default
    defaults = {name: known[name].default for name in known}
    p = {**defaults, "weight": WEIGHTS, **given}
    if method in CRUMBS:
        given["gamma"] = p["gamma"] = [0.1, 0.0, 0.5]
    if method in DELLA:
        given["epsilon"] = p["epsilon"] = 0.125
    tensors = drawn(shape)
    assert_near(merged(method, tensors, weight=WEIGHTS, **given), sparse(method, tensors, p))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("topk", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("compat", ["none", "mergekit"])
@pytest.mark.parametrize("scale", [0.5, 1e-4])
def test_sce_is_its_formula(scale, compat, topk, shape):
    tensors = drawn(shape, scale=scale)
    found = merged("sce", tensors, select_topk=topk, compat=compat)
    assert_near(found, sce(tensors, topk, compat))


def test_sce_weighs_small_task_vectors_by_their_size_unless_as_mergekit():
    base = torch.zeros(1, dtype=torch.float64)
    tensors = [base, base + 3e-4, base + 1e-4]
    assert_near(merged("sce", tensors), torch.tensor([2.8e-4], dtype=torch.float64))
    alike = merged("sce", tensors, compat="mergekit")
    assert_near(alike, torch.tensor([2e-4], dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("epsilon", [0, 0.008, 0.02, 9.0])
def test_ram_and_ram_plus_are_their_formulas(epsilon, shape):
    tensors = drawn(shape)
    assert_near(merged("ram", tensors, epsilon=epsilon), ram(tensors, epsilon))
    found = merged("ramplus_tl", tensors, epsilon=epsilon, r=0.3, alpha=0.9)
    assert_near(found, ram(tensors, epsilon, 0.3, 0.9))


@pytest.mark.parametrize("method", ALL)
def test_models_like_the_base_give_the_base(method):
    base = torch.tensor([[0.5, -0.0], [3.0, -1.0]])
    same = outliermerge.merge_tensors([base, base.clone()], base=base, method=method)
    assert same.equal(base)
    halves = {"density": 0.5} if "density" in METHODS[method].parameters else {}
    moved = base.clone()
    moved[0, 0] += 1e-3
    found = outliermerge.merge_tensors([base, moved], base=base, method=method, **halves)
    assert found.isfinite().all() and found.flatten()[1:].equal(base.flatten()[1:])


@pytest.mark.parametrize("method", [*DARE, *CRUMBS, *DELLA])
@pytest.mark.parametrize("density", [0, 1])
def test_a_density_of_0_is_the_base_and_of_1_keeps_all(method, density):
    tensors = drawn((30, 40), num_models=1)
    found = merged(method, tensors, density=density)
    assert_near(found, (tensors[1] - tensors[0]) * density)


# How many, and which, are kept at random.


def deviation(chance: Tensor | float, num: int) -> Any:
    """Return five standard deviations of a share of `num` draws."""
    return 5 * (torch.as_tensor(chance * (1 - chance)) / num) ** 0.5


@pytest.mark.parametrize("density", [0.01, 0.3, 0.9])
def test_dare_keeps_its_share_independently_and_keeps_the_mean(density):
    num = 200_000
    base = torch.zeros(num)
    models = [base + 1, base + 1]
    first, second = (
        merged("dare_linear", [base, *models], density=density, weight=weight)
        for weight in ([1, 0], [0, 1])
    )
    for found in (first, second):
        assert abs((found != 0).double().mean() - density) < deviation(density, num)
        assert found[found != 0].allclose(torch.tensor(1 / density))
        assert abs(found.double().mean() - 1) < deviation(density, num) / density
    both = ((first != 0) & (second != 0)).double().mean()
    assert abs(both - density**2) < deviation(density**2, num)
    pairs = ((first[1:] != 0) & (first[:-1] != 0)).double().mean()
    assert abs(pairs - density**2) < 2 * deviation(density**2, num)


@pytest.mark.parametrize("rescale_by", ["probability", "l1"])
def test_dare_brings_the_l1_norm_back(rescale_by):
    base, model = drawn((500, 400), num_models=1)
    found = merged("dare_linear", [base, model], density=0.2, rescale_by=rescale_by)
    ratio = float(found.abs().sum() / (model - base).abs().sum())
    assert abs(ratio - 1) < (1e-9 if rescale_by == "l1" else 0.02)


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.2), (0.6, 0.0), (0.5, -0.1)])
def test_della_keeps_each_rank_with_its_probability(density, epsilon):
    num_rows, columns = 20_000, 9
    order = torch.stack([torch.randperm(columns) for _ in range(50)]).repeat(num_rows // 50, 1)
    delta = (order + 1.0) * torch.where(order % 2 == 0, 1.0, -1.0)
    base = torch.zeros_like(delta)
    found = merged("della_linear", [base, delta], density=density, epsilon=epsilon, rescale=False)
    for rank in range(columns):
        chance = density - epsilon + 2 * epsilon * rank / (columns - 1)
        share = (found[order == rank] != 0).double().mean()
        assert abs(share - chance) < deviation(chance, num_rows), rank


@pytest.mark.parametrize("method", DELLA)
def test_della_divided_by_probabilities_keeps_each_elements_mean(method):
    delta = torch.arange(1.0, 9.0).repeat(30_000, 1)
    p = {"density": 0.4, "epsilon": 0.2, "rescale_by": "probability"}
    found = merged(method, [torch.zeros_like(delta), delta], **p).double().mean(0) / delta[0]
    chance = 0.2 + 0.4 * torch.arange(8.0) / 7
    assert ((found - 1).abs() < deviation(chance, len(delta)) / chance).all()


@pytest.mark.parametrize("method", DRAWN)
def test_the_seed_the_name_and_the_model_change_what_is_dropped_and_nothing_else(method):
    base, *models = (tensor.float() for tensor in drawn((50, 60), num_models=1))

    def kept(name: str, **more: Any) -> Tensor:
        states = [{name: model} for model in [*models, *models]]
        out = outliermerge.merge_state_dicts(
            states, base={name: base}, method=method, density=0.5, **more
        )
        return out[name] != base

    first = kept("w", weight=[1, 0])
    assert first.equal(kept("w", weight=[1, 0], seed=0))
    for other in (
        kept("w", weight=[1, 0], seed=1), kept("v", weight=[1, 0]), kept("w", weight=[0, 1])
    ):  # fmt: skip
        agree = (first == other).double().mean()
        assert abs(agree - 0.5) < 0.1


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.1), (0.5, 0.5), (0.2, -0.2)])
def test_probabilities_beyond_0_and_1_are_refused(density, epsilon):
    with pytest.raises(ArgumentError, match="expected between 0 and 1"):
        merged("della", drawn((4,)), density=density, epsilon=epsilon)
    for whole in (0, 1):
        merged("della", drawn((4,)), density=whole, epsilon=epsilon)


def test_a_text_that_is_no_choice_is_refused():
    with pytest.raises(ArgumentError, match="'rescale_by': found 'l2', expected probability or l1"):
        merged("dare_ties", drawn((4,)), rescale_by="l2")


def test_editors_are_told_the_choices():
    (of_ties,) = (
        each["then"]["properties"]["parameters"]["properties"]
        for each in json_schema()["allOf"]
        if each["if"]["properties"]["merge_method"]["const"] == "ties"
    )
    assert "'enum': ['tensor', 'model']" in str(of_ties["trim"])


# Which magnitudes are kept, found by counting.


SAMPLED = 4 * 8 * CHUNK_ELEMENTS + 77  # of so many elements some are looked at first


@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.01), (0.9, 0.3), (0.5, 0.0), (0.001, 0.5)])
@pytest.mark.parametrize(
    ("num", "dtype"),
    [
        *((num, dtype) for num in (1, 2, 3, 1000) for dtype in (torch.float32, torch.float64)),
        (SAMPLED, torch.float32),
    ],
    ids=str,
)
def test_the_middle_is_found_exactly(density, gamma, num, dtype):
    generator = torch.Generator().manual_seed(num)
    block = torch.randn(2, num, generator=generator, dtype=torch.float64).to(dtype)
    block[1] = block[1].to(torch.bfloat16)
    parameters = {"density": [density] * 2, "gamma": [gamma] * 2, "rescale": True}
    state: Any = Middle().start(2, num, parameters)
    while not isinstance(state, list):
        every = range(-(-num // CHUNK_ELEMENTS)) if state.chunks is None else state.chunks
        for chunk in every:
            part = block[:, chunk * CHUNK_ELEMENTS : (chunk + 1) * CHUNK_ELEMENTS]
            state.add(state.measure(part.clone()))
        state = state.finish()
    for row, low, high, scale in zip(block, *state, strict=True):
        own = torch.where((row.abs() >= low) & (row.abs() <= high), row, 0.0)
        assert own.equal(middle(row, density, gamma).to(dtype))
        if (own != 0).any():
            assert scale == pytest.approx(
                float(row.double().abs().sum() / own.double().abs().sum())
            )


# Runs.

NAMES = {"a.weight": (300, 260), "b.weight": (90, 7, 3, 3), "c.bias": (70_001,), "d": (3,)}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dare_linear": ("dare_linear", {"density": 0.4}),
    "dare_ties": ("dare_ties", {"density": 0.4, "rescale_by": "l1"}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.4, "gamma": 0.05}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.4, "rescale": True}),
    "della": ("della", {"density": 0.4}),
    "della_linear": ("della_linear", {"density": 0.4, "rescale_by": "probability"}),
    "sce": ("sce", {"select_topk": 0.3}),
    "ram": ("ram", {"epsilon": 0.05}),
    "ramplus_tl": ("ramplus_tl", {"epsilon": 0.05}),
    "ties of the model": ("ties", {"density": 0.2, "trim": "model", "rescale": True}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()}
    save_tensors(folder / "base", base)
    for model, scale in (("x", 0.1), ("y", 0.2)):
        moved = {n: t + scale * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        save_tensors(folder / model, moved)
    return folder


def spec_of(models: Path, case: str) -> dict[str, Any]:
    method, parameters = RUNS[case]
    return {
        "merge_method": method,
        "base_model": str(models / "base"),
        "models": [{"model": str(models / model)} for model in "xy"],
        "parameters": parameters,
    }


@pytest.mark.parametrize("case", RUNS)
def test_bytes_depend_on_neither_threads_blocks_kernels_nor_resuming(
    case, models, tmp_path, monkeypatch
):
    def digest(name: str, **options: Any) -> bytes:
        outliermerge.run(spec_of(models, case), output=tmp_path / name, **options)
        return (tmp_path / name / "model.safetensors").read_bytes()

    first = digest("first", threads=1)
    assert digest("many", threads=3) == first
    assert digest("small", threads=1, memory="11MB" if "della" in case else "7MB") == first
    assert digest("torch", kernels=False) == first
    with stopping_after(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        digest("stopped", threads=1)
    assert digest("stopped", threads=1) == first


@pytest.mark.parametrize("method", [*DARE, *CRUMBS])
@pytest.mark.parametrize(
    "parameters",
    [
        {"density": [0.0, 1.0], "weight": [0.3, -0.7]},
        {"density": [0.25, 1e-9], "normalize": True},
        {"density": [0.7, 0.3], "rescale": False, "consensus": "count"},
        {"density": [0.7, 0.3], "weight": [1.0, -1.0], "normalize": True, "rescale_by": "l1"},
    ],
    ids=str,
)
def test_kernels_give_the_bytes_of_torch(parameters, method, models, tmp_path):
    known = METHODS[method].parameters
    spec = spec_of(models, "ram") | {"merge_method": method, "parameters": {}}
    for name, value in parameters.items():
        if isinstance(value, list):
            for entry, own in zip(spec["models"], value, strict=True):
                entry.setdefault("parameters", {})[name] = own
        elif name in known:
            spec["parameters"][name] = value
    for kernels in (True, False):
        outliermerge.run(spec, output=tmp_path / str(kernels), kernels=kernels)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("True", "False")]
    assert files[0] == files[1]


@pytest.mark.parametrize("case", [case for case in RUNS if "model" not in case])
def test_memory_gives_what_files_give(case, models, tmp_path):
    method, parameters = RUNS[case]
    outliermerge.run(spec_of(models, case), output=tmp_path / "out")
    on_disk = load_folder(tmp_path / "out")
    base, *others = (load_folder(models / name) for name in ("base", "x", "y"))
    in_memory = outliermerge.merge_state_dicts(others, base=base, method=method, **parameters)
    assert all(in_memory[name].equal(tensor) for name, tensor in on_disk.items())


def test_ties_trims_each_tensor_or_the_whole_model(models, tmp_path):
    base, x, y = (load_folder(models / name) for name in ("base", "x", "y"))
    deltas = [{n: (model[n] - base[n]).double() for n in base} for model in (x, y)]
    spec = spec_of(models, "ties of the model")
    del spec["parameters"]["rescale"]
    outliermerge.run(spec, output=tmp_path / "out")
    found = load_folder(tmp_path / "out")
    limits = []
    for delta in deltas:
        every = torch.cat([d.flatten() for d in delta.values()]).abs()
        limits.append(every.sort(descending=True).values[int(0.2 * len(every)) - 1])
    for name, before in base.items():
        kept = [
            torch.where(delta[name].abs() >= limit, delta[name], 0.0)
            for delta, limit in zip(deltas, limits, strict=True)
        ]
        wanted = put_together(kept, True, {"weight": [1, 1], "normalize": True})
        torch.testing.assert_close(
            found[name].double(), before.double() + wanted, rtol=1e-6, atol=1e-6
        )
    in_memory = outliermerge.merge_state_dicts(
        [x, y], base=base, method="ties", trim="model", density=0.2
    )
    assert all(torch.equal(in_memory[name], found[name]) for name in base)


def test_trim_may_differ_by_tensor_and_needs_all_of_them(models, tmp_path):
    spec = spec_of(models, "ties of the model")
    spec["parameters"]["trim"] = [{"filter": "a.", "value": "model"}, {"value": "tensor"}]
    outliermerge.run(spec, output=tmp_path / "mixed")
    mixed = load_folder(tmp_path / "mixed")
    for trim, names in (("model", ("a.weight",)), ("tensor", ("b.weight", "c.bias", "d"))):
        spec["parameters"]["trim"] = trim
        outliermerge.run(spec, output=tmp_path / trim)
        whole = load_folder(tmp_path / trim)
        assert all(mixed[name].equal(whole[name]) for name in names)
    state = load_folder(models / "y")
    del state["d"]
    save_tensors(tmp_path / "y", state)
    spec |= {"missing": "base", "models": [*spec["models"][:1], {"model": str(tmp_path / "y")}]}
    outliermerge.plan(spec)
    spec["parameters"]["trim"] = [{"filter": "a.", "value": "model"}, {"value": "tensor"}]
    with pytest.raises(OutlierMergeError, match="d is not in all models"):
        outliermerge.plan(spec)


# mergekit 0.1.5, called in this process.


@pytest.fixture(scope="module")
def sparsify() -> Callable[..., Tensor]:
    import mergekit.sparsify

    def by_mergekit(tensor: Tensor, method: str, **more: Any) -> Tensor:
        kind = mergekit.sparsify.SparsificationMethod(method)
        norm = mergekit.sparsify.RescaleNorm.l1 if more.pop("rescale", False) else None
        return mergekit.sparsify.sparsify(tensor, method=kind, rescale_norm=norm, **more)

    return by_mergekit


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape], ids=str)
@pytest.mark.parametrize(
    ("density", "gamma"), [(0.3, 0.01), (0.9, 0.3), (0.5, 0.5), (0.5, 0.0), (0, 0.1), (1, 0.1)]
)
@pytest.mark.parametrize("rescale", [False, True])
def test_breadcrumbs_keep_what_mergekit_keeps(rescale, density, gamma, shape, sparsify):
    base, model = (tensor.float() for tensor in drawn(shape, num_models=1))
    found = merged(
        "breadcrumbs", [base * 0, model - base], density=density, gamma=gamma, rescale=rescale
    )
    theirs = sparsify(
        model - base, "magnitude_outliers", density=density, gamma=gamma, rescale=rescale
    )
    delta = model - base
    kept = (found != 0).flatten()
    tied = delta.abs().flatten().unique(return_counts=True)[1].max() > 1
    if not tied:
        assert kept.equal((theirs != 0).flatten())
        torch.testing.assert_close(found, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.2)])
@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 6, 2)], ids=str)
def test_della_and_mergekit_keep_each_element_as_often(shape, density, epsilon, sparsify):
    """Each against the probability, within five standard deviations."""
    torch.manual_seed(0)
    delta = torch.randperm(math.prod(shape)).view(shape) + 1.0
    num = 1500
    chance = chances("della", delta.double(), density, epsilon)
    p = {"density": density, "epsilon": epsilon}
    theirs = sum((sparsify(delta, "della_magprune", **p) != 0).double() for _ in range(num))
    names = [str(number) for number in range(num)]  # each draws numbers of its own
    ours = sum(
        (tensor != 0).double()
        for tensor in outliermerge.merge_state_dicts(
            [dict.fromkeys(names, delta)],
            base=dict.fromkeys(names, delta * 0),
            method="della_linear",
            rescale=False,
            **p,
        ).values()
    )
    for kept in (theirs, ours):
        assert ((kept / num - chance).abs() < deviation(chance, num)).all()


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dare_and_mergekit_agree_in_share_mean_and_norm(density, sparsify):
    torch.manual_seed(0)
    delta = torch.randn(300_000)
    both = (
        sparsify(delta, "random", density=density, rescale=True),
        merged("dare_linear", [delta * 0, delta], density=density),
        merged("dare_linear", [delta * 0, delta], density=density, rescale_by="l1"),
    )
    for found in both:
        kept = found != 0
        assert abs(kept.double().mean() - density) < deviation(density, len(delta))
        factor = (found[kept] / delta[kept]).double()
        assert factor.std() < 1e-5
        assert abs(factor.mean() * density - 1) < 10 * deviation(density, len(delta))
