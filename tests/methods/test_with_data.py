"""Methods that take statistics of data, against their formulas in float64."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder, save_tensors
from statistics_of import save_statistics
from stopping import stopping_after
from torch import Tensor

import outliermerge
from outliermerge import ArgumentError, OutlierMergeError, SpecError
from outliermerge.cli.main import main
from outliermerge.methods.table import WITH_DATA

SHAPES = {
    "layers.0.q.weight": (300, 40),  # more than a panel
    "layers.0.down.weight": (40, 61),
    "layers.0.norm.weight": (40,),
    "embed.weight": (30, 40),
    "scalar": (),
}
LINEAR = [name for name in SHAPES if name.startswith("layers") and "norm" not in name]
WEIGHTS = [1.0, 0.5, 2.0]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Three models of one base, and their statistics: inputs are few, and one is never there."""
    folder, drawn = tmp_path_factory.mktemp("measured"), torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn)

    base = {name: random(*shape) for name, shape in SHAPES.items()}
    for number in range(3):
        model = {name: base[name] + random(*shape) / 3 for name, shape in SHAPES.items()}
        save_tensors(folder / f"m{number}", model)
        grams = {}
        for name in LINEAR:
            inputs = random(25, SHAPES[name][1]) * torch.logspace(-3, 1, SHAPES[name][1])
            inputs[:, 7] = 0
            grams[name] = inputs.T @ inputs / len(inputs)
        fishers = {
            n: random(*shape).square() * 1e-8 for n, shape in SHAPES.items() if n != "scalar"
        }
        fishers["embed.weight"][3] = 0
        save_statistics(folder / f"s{number}", folder / f"m{number}", gram=grams, fisher=fishers)
    return folder


def spec_of(place: Path, method: str, num: int = 3, **more: Any) -> dict[str, Any]:
    models = [
        {
            "model": str(place / f"m{number}"),
            "statistics": str(place / f"s{number}"),
            "parameters": {"weight": WEIGHTS[number]},
        }
        for number in range(num)
    ]
    return {"merge_method": method, "models": models, "parameters": more}


def regmean(
    name: str, w: list[Tensor], s: list[dict[str, Any]], p: dict[str, Any]
) -> Tensor | None:
    if name not in LINEAR:
        return None
    grams = []
    for own, weight in zip(s, WEIGHTS, strict=False):
        gram = weight * own["gram"][name].double()
        grams.append(torch.where(torch.eye(len(gram)) > 0, gram, gram * p.get("reduce", 0.9)))
    kept = torch.arange(len(grams[0])) != 7  # this input is never there: averaged
    grams = [gram[kept][:, kept] for gram in grams]
    right = sum(one[:, kept] @ gram for one, gram in zip(w, grams, strict=True))
    merged = mean(w)
    merged[:, kept] = torch.linalg.solve(sum(grams), right, left=False)
    return merged


def fisher(name: str, w: list[Tensor], s: list[dict[str, Any]], p: dict[str, Any]) -> Tensor | None:
    if name == "scalar":
        return None
    shares = [
        weight * (own["fisher"][name].double() + p.get("epsilon", 1e-12))
        for own, weight in zip(s, WEIGHTS, strict=False)
    ]
    return sum(share * one for share, one in zip(shares, w, strict=True)) / sum(shares)


def mean(w: list[Tensor]) -> Tensor:
    total = sum(WEIGHTS[: len(w)])
    return sum(one * weight for one, weight in zip(w, WEIGHTS, strict=False)) / total


def by_scipy(a: Tensor, b: Tensor, start: Tensor, p: dict[str, Any]) -> Tensor:
    """Solve xa = b, x flat as the published code has it; a diagonal is a vector."""
    import numpy
    from scipy.sparse.linalg import LinearOperator, cg

    def apply(x: Any) -> Any:
        x = torch.from_numpy(x).view(b.shape)
        return (x * a if a.shape == b.shape else x @ a).flatten().numpy()

    start = start * 0 if p.get("init") == "zero" else start
    operator = LinearOperator((b.numel(), b.numel()), matvec=apply, dtype=numpy.float64)
    most = {"maxiter": p.get("iterations", 100), "rtol": p.get("tolerance", 1e-5)}
    found, _ = cg(operator, b.flatten().numpy(), x0=start.flatten().numpy(), **most)
    return torch.from_numpy(found).view(b.shape)


def mats(name: str, w: list[Tensor], s: list[dict[str, Any]], p: Any) -> Tensor | None:
    if name not in LINEAR:
        return None
    grams = [a * own["gram"][name].double() for a, own in zip(WEIGHTS, s, strict=False)]
    right = sum(one @ gram for one, gram in zip(w, grams, strict=True))
    return by_scipy(sum(grams), right, mean(w), p)


def mats_fisher(name: str, w: list[Tensor], s: list[dict[str, Any]], p: Any) -> Tensor | None:
    if name == "scalar":
        return None
    shares = [a * own["fisher"][name].double() for a, own in zip(WEIGHTS, s, strict=False)]
    right = sum(share * one for share, one in zip(shares, w, strict=True))
    return by_scipy(sum(shares), right, mean(w), p)


ORACLES = {f.__name__: f for f in (regmean, fisher, mats, mats_fisher)}
CASES: dict[str, dict[str, Any]] = {
    "regmean": {},
    "regmean reduced": {"reduce": 0.3},
    "regmean diagonal": {"reduce": 0.0},
    "fisher": {},
    "fisher epsilon": {"epsilon": 1e-8},
    "mats": {"iterations": 8},
    "mats few": {"iterations": 4, "tolerance": 0.0},
    "mats zero": {"iterations": 9, "init": "zero", "tolerance": 0.01},
    "mats_fisher": {"iterations": 8},
    "mats_fisher few": {"iterations": 3, "tolerance": 0.0, "init": "zero"},
}


SMALL = {"regmean": 1_200_000, "fisher": 9_000_000, "mats": 3_000_000, "mats_fisher": 3_000_000}


def test_every_method_with_data_is_tried():
    assert {case.partition(" ")[0] for case in CASES} == set(WITH_DATA)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_formula(case, num, place, tmp_path):
    name = case.partition(" ")[0]
    outliermerge.run(spec_of(place, name, num, **CASES[case]), output=tmp_path / "out")
    models = [load_folder(place / f"m{number}") for number in range(num)]
    statistics = [
        {kind: load_folder(place / f"s{number}" / kind) for kind in ("gram", "fisher")}
        for number in range(num)
    ]
    for tensor, found in load_folder(tmp_path / "out").items():
        weights = [model[tensor].double() for model in models]
        wanted = ORACLES[name](tensor, weights, statistics, CASES[case])
        wanted = mean(weights) if wanted is None else wanted
        assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6), tensor


@pytest.mark.parametrize("method", ["mats", "mats_fisher"])
def test_conjugate_gradients_end_at_the_tolerance(method, place, tmp_path):
    spec = spec_of(place, method, 2, tolerance=0.01)
    outliermerge.run(spec, output=tmp_path / "out")
    kind, name = "gram" if method == "mats" else "fisher", "layers.0.q.weight"
    w = [load_folder(place / f"m{n}")[name].double() for n in range(2)]
    s = [WEIGHTS[n] * load_folder(place / f"s{n}" / kind)[name].double() for n in range(2)]

    def product(x: Tensor, a: Tensor) -> Tensor:
        return x @ a if method == "mats" else x * a

    right = sum(product(one, a) for one, a in zip(w, s, strict=True))

    def residual(x: Tensor) -> float:
        return float((product(x, sum(s)) - right).norm() / right.norm())

    assert residual(load_folder(tmp_path / "out")[name].double()) < 0.0101 < residual(mean(w))


def test_full_gram_matrices_may_be_singular(place, tmp_path):
    """25 inputs for 61 columns of two models: what the data say is met, the rest is the mean's."""
    outliermerge.run(spec_of(place, "regmean", 2, reduce=1.0), output=tmp_path / "out")
    name = "layers.0.down.weight"
    found = load_folder(tmp_path / "out")[name].double()
    w = [load_folder(place / f"m{n}")[name].double() for n in range(2)]
    g = [WEIGHTS[n] * load_folder(place / f"s{n}/gram")[name].double() for n in range(2)]
    total, wanted = sum(g), sum(a @ b for a, b in zip(w, g, strict=True))
    assert torch.allclose(found @ total, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())
    assert torch.allclose(found[:, 7], mean(w)[:, 7], atol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if " " not in c])
def test_bytes_depend_on_neither_threads_memory_nor_resuming(case, place, tmp_path, monkeypatch):
    spec = spec_of(place, case, 3, **CASES[case])

    def digest(name: str, **options: Any) -> str:
        outliermerge.run(spec, output=tmp_path / name, **options)
        return hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()

    first = digest("first", threads=1)
    assert digest("many", threads=3, memory="64MB") == first
    assert digest("small", threads=1, memory=SMALL[case]) == first
    with stopping_after(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        digest("stopped", threads=1)
    assert digest("stopped", threads=1) == first


@pytest.mark.parametrize("method", WITH_DATA)
def test_a_plan_says_what_is_read_and_in_what_it_is_computed(
    method, place, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(place)
    kind = "fisher" if "fisher" in method else "gram"
    by_method = [n for n in SHAPES if n != "scalar"] if kind == "fisher" else LINEAR
    spec = spec_of(Path(), method, 2, **CASES.get(method, {}))
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert main(["plan", str(tmp_path / "spec.json"), "-q"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for number in range(2):
        (row,) = [line for line in lines if line.strip().startswith(f"s{number} ")]
        assert f"its {kind}" in row and f"float32 ×{len(by_method)}" in row, row
    (merged,) = [line for line in lines if line.strip().startswith("merged by")]
    assert "float32, float64" in merged  # what was not measured is averaged

    told = outliermerge.plan(spec).as_dict()
    assert told["compute_dtypes"] == ["float32", "float64"]
    stored = load_folder(Path("s1") / kind)
    sizes = 4 * sum(one.numel() for one in stored.values())
    (read,) = told["inputs"][1]["auxiliary"]
    assert (read["path"], read["kind"]) == ("s1", kind)
    assert (read["num_tensors"], read["num_bytes"]) == (len(stored), sizes)
    weights = sum(entry["num_bytes"] for entry in told["inputs"])
    assert told["input_bytes"] == weights + 2 * sizes

    # So the dtype changes what is averaged only.
    outliermerge.run(spec, output=tmp_path / "usual")
    wide = spec | {"dtype": "float64", "out_dtype": "float32"}
    outliermerge.run(wide, output=tmp_path / "wide")
    usual, wide = load_folder(tmp_path / "usual"), load_folder(tmp_path / "wide")
    assert all(usual[name].equal(wide[name]) for name in by_method)


def test_a_plan_refuses_too_little_memory_for_gram_matrices(place, tmp_path):
    said = r"is too little for tensor 'layers\.0\.q\.weight'"
    with pytest.raises(OutlierMergeError, match=said):
        outliermerge.run(
            spec_of(place, "regmean"), output=tmp_path / "x", threads=1, memory=1_000_000
        )


def test_the_order_of_models_changes_rounding_only(place, tmp_path):
    for name in ("regmean", "fisher"):
        spec = spec_of(place, name, **CASES[name])
        outliermerge.run(spec, output=tmp_path / name)
        turned = spec | {"models": spec["models"][::-1]}
        outliermerge.run(turned, output=tmp_path / f"{name}-turned")
        pair = load_folder(tmp_path / name), load_folder(tmp_path / f"{name}-turned")
        for tensor in SHAPES:
            assert torch.allclose(pair[0][tensor], pair[1][tensor], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", WITH_DATA)
def test_equal_models_stay_as_they_are(method, place, tmp_path):
    spec = spec_of(place, method, 2)
    twin = save_tensors(tmp_path / "twin", load_folder(place / "m0"))
    spec["models"][1]["model"] = str(twin)
    spec["models"][1]["statistics"] = str(
        save_statistics(
            tmp_path / "s",
            twin,
            gram=load_folder(place / "s1/gram"),
            fisher=load_folder(place / "s1/fisher"),
        )
    )
    outliermerge.run(spec, output=tmp_path / "out")
    for name, tensor in load_folder(tmp_path / "out").items():
        assert tensor.equal(load_folder(place / "m0")[name])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", WITH_DATA)
def test_a_stage_gives_the_values_of_a_merge_of_its_own(method, place, tmp_path):
    spec = spec_of(place, method, 2)
    outliermerge.run(spec, output=tmp_path / "alone")
    stages = {
        "stages": [{"name": "inner"} | spec],
        "merge_method": "passthrough",
        "models": [{"model": "inner"}],
        "parameters": {"scale": 1.0},
    }
    outliermerge.run(stages, output=tmp_path / "staged")
    alone, staged = load_folder(tmp_path / "alone"), load_folder(tmp_path / "staged")
    assert all(staged[name].equal(alone[name]) for name in alone)
    spec["models"][1]["statistics"] = str(place / "s0")
    with pytest.raises(OutlierMergeError, match="these statistics are of another model"):
        outliermerge.run(stages | {"stages": [{"name": "inner"} | spec]}, output=tmp_path / "x")


@pytest.mark.parametrize("method", WITH_DATA)
def test_statistics_of_another_model_are_refused(method, place, tmp_path):
    spec = spec_of(place, method, 2)
    spec["models"][1]["statistics"] = str(place / "s0")
    with pytest.raises(OutlierMergeError, match=r"/s0: these statistics are of another model: its"):
        outliermerge.run(spec, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_statistics_is_told_by_name(place, tmp_path):
    spec = spec_of(place, "regmean", 2)
    del spec["models"][1]["statistics"]
    with pytest.raises(SpecError, match=r"regmean needs 'gram' of each model: `statistics: DIR`"):
        outliermerge.plan(spec)
    with pytest.raises(SpecError, match="linear takes no statistics"):
        outliermerge.plan(spec_of(place, "linear", 2))

    def refused(**kinds: dict[str, Tensor]) -> str:
        spec = spec_of(place, "regmean", 2)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        spec["models"][1]["statistics"] = str(save_statistics(folder, place / "m1", **kinds))
        with pytest.raises(OutlierMergeError) as raised:
            outliermerge.run(spec, output=tmp_path / "out", fresh=True)
        return str(raised.value)

    grams = load_folder(place / "s1/gram")
    lacking = {name: gram for name, gram in grams.items() if "q" not in name}
    assert "gram of layers.0.q.weight is not in it, expected a floating" in refused(gram=lacking)
    wrong = grams | {"layers.0.q.weight": torch.ones(3, 3)}
    assert "is float32 [3, 3], expected a floating-point tensor [40, 40]" in refused(gram=wrong)
    assert "holds no gram, only fisher: measure" in refused(fisher=grams)
    broken = grams | {"layers.0.q.weight": grams["layers.0.q.weight"] * torch.nan}
    assert "layers.0.q.weight has values that are infinite or NaN" in refused(gram=broken)
    broken = grams | {"layers.0.q.weight": grams["layers.0.q.weight"].triu()}
    assert "layers.0.q.weight has values that are not symmetric" in refused(gram=broken)
    spec["models"][1]["statistics"] = "statistics/none"
    with pytest.raises(OutlierMergeError, match=r"statistics/none: no such folder, expected stat"):
        outliermerge.plan(spec)
    spec["models"][1]["statistics"] = str(place / "m1")
    with pytest.raises(OutlierMergeError, match=r"no statistics\.json in it"):
        outliermerge.plan(spec)


def test_the_plan_says_what_is_averaged_and_counts_what_is_read(place):
    plan = outliermerge.plan(spec_of(place, "regmean"))
    (note,) = (note for note in plan.notes if "gram" in note)
    assert note.startswith("3 tensor(s) such as ") and note.endswith("are averaged")
    plain = outliermerge.plan({"merge_method": "linear", "models": [{"model": str(place / "m0")}]})
    assert plan.num_read_bytes > 3 * plain.num_read_bytes
    recipe = json.dumps(plan.spec.as_dict())
    assert str(place / "s2") in recipe


def test_weights_below_0_are_refused(place):
    spec = spec_of(place, "fisher", 2)
    spec["models"][0]["parameters"]["weight"] = -1
    with pytest.raises(SpecError, match="expected a number ≥ 0"):
        outliermerge.plan(spec)


def in_memory(place: Path, kinds: tuple[str, ...]) -> dict[str, list[dict[str, Tensor]]]:
    return {
        kind: [load_folder(place / f"s{number}/{kind}") for number in range(3)] for kind in kinds
    }


@pytest.mark.parametrize("method", WITH_DATA)
def test_a_merge_in_memory_is_that_of_files(method, place, tmp_path):
    outliermerge.run(spec_of(place, method), output=tmp_path / "out")
    models = [load_folder(place / f"m{number}") for number in range(3)]
    auxiliary = in_memory(place, outliermerge.find_method(method).auxiliary)
    before = [
        {name: t.clone() for name, t in own.items()} for own in next(iter(auxiliary.values()))
    ]
    found = outliermerge.merge_state_dicts(
        models, method=method, auxiliary=auxiliary, weight=WEIGHTS
    )
    for name, tensor in load_folder(tmp_path / "out").items():
        assert torch.equal(found[name], tensor), name
    for own, kept in zip(next(iter(auxiliary.values())), before, strict=True):
        assert all(torch.equal(own[name], kept[name]) for name in own)
    name = LINEAR[0]
    alone = outliermerge.merge_tensors(
        [model[name] for model in models],
        method=method,
        auxiliary={kind: [own[name] for own in each] for kind, each in auxiliary.items()},
        weight=WEIGHTS,
    )
    assert torch.equal(alone, found[name])


def test_what_is_wrong_with_auxiliary_tensors_in_memory_is_told(place):
    models = [load_folder(place / f"m{number}") for number in range(3)]
    grams = in_memory(place, ("gram",))["gram"]

    def refused(error: type[Exception], method: str = "regmean", **auxiliary: Any) -> str:
        with pytest.raises(error) as raised:
            outliermerge.merge_state_dicts(models, method=method, auxiliary=auxiliary)
        return str(raised.value)

    said = "regmean takes gram of each model: found {}, expected 3 as auxiliary={{'gram': [...]}}"
    assert refused(ArgumentError) == said.format("none")
    assert refused(ArgumentError, gram=grams[:2]) == said.format(2)
    assert "takes no 'fisher'" in refused(ArgumentError, gram=grams, fisher=grams)
    assert "linear takes no 'gram'" in refused(ArgumentError, "linear", gram=grams)
    name = LINEAR[0]
    lacking = {other: gram for other, gram in grams[1].items() if other != name}
    place_ = f"tensor '{name}': auxiliary['gram'][1]: "
    told = refused(OutlierMergeError, gram=[grams[0], lacking, grams[2]])
    assert told == f"{place_}found none, expected a tensor [40, 40], as the weights are [300, 40]"
    spoiled = grams[1] | {name: grams[1][name] * torch.nan}
    told = refused(OutlierMergeError, gram=[grams[0], spoiled, grams[2]])
    assert told == f"{place_}has values that are infinite, NaN or no floats"
