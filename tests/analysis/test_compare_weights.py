"""Models compared pair by pair: equal to numpy on whole tensors in float64."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load_folder, save_tensors
from families import save_llama, tune
from safetensors.torch import save_file

import outliermerge
from outliermerge.analysis.compare import MATRIX_DIAGONAL, Comparison, PairStats, compare_weights
from outliermerge.analysis.models import open_subject
from outliermerge.checkpoint.reader import Reader
from outliermerge.errors import ArgumentError, OutlierMergeError
from outliermerge.methods.min_sigma import min_sigma

SHAPES = {
    "model.layers.0.up_proj.weight": (300, 257),  # more than one chunk
    "model.layers.1.up_proj.weight": (40, 30),
    "model.norm.weight": (33,),
    "one": (1,),
    "scalar": (),
    "empty": (0, 4),
    "zeros": (5, 5),
}
DTYPES = {
    "bfloat16": [torch.bfloat16] * 4,
    "float16": [torch.float16] * 4,
    "float32": [torch.float32] * 4,
    "float64": [torch.float64] * 4,
    "mixed": [torch.float32, torch.bfloat16, torch.float64, torch.float16],
}
T = 1.5


def _models(
    folder: Path, *, num_models: int = 3, dtypes: list[torch.dtype] | None = None, mean: float = 0.0
) -> list[str]:
    """Save a base and models that are moved by heavy tails, some elements not at all."""
    generator = torch.Generator().manual_seed(0)
    dtypes = dtypes or [torch.float64] * (num_models + 1)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = {name: mean + 0.5 * draw(shape) for name, shape in SHAPES.items()}
    base["zeros"].zero_()
    folders = []
    for number, dtype in zip(range(num_models + 1), dtypes, strict=False):
        moved = {}
        for name, tensor in base.items():
            change = 0.01 * number * draw(tensor.shape) ** 3 * (draw(tensor.shape) > -0.5)
            moved[name] = (tensor + change * (name != "zeros")).to(dtype)
        folders.append(str(save_tensors(folder / f"{number}", moved)))
    return folders


def _vectors(models: list[str], base: str | None) -> dict[str, list[np.ndarray]]:
    def load(folder: str) -> dict[str, np.ndarray]:
        return {k: v.double().numpy().ravel() for k, v in load_folder(Path(folder)).items()}

    under = load(base) if base else None
    loaded = [load(model) for model in models]
    return {
        name: [each[name] - under[name] if under else each[name] for each in loaded]
        for name in loaded[0]
    }


def _expected(
    a: np.ndarray, b: np.ndarray, own_a: np.ndarray, own_b: np.ndarray, min_: np.ndarray
) -> dict[str, float]:
    """The definitions; own_* and min_ are the thresholds of each element."""

    def ratio(part: float, whole: float) -> float:
        return float(part / whole) if whole else math.nan

    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    distance = np.linalg.norm(a - b)
    non_zero = (a != 0) & (b != 0)
    agree = np.sign(a) == np.sign(b)
    stands_a, stands_b = abs(a) > own_a, abs(b) > own_b
    outlier_a, outlier_b = abs(a) > min_, abs(b) > min_
    both = outlier_a & outlier_b
    return {
        "cosine": ratio(a @ b, norm_a * norm_b),
        "distance": distance,
        "relative_distance": ratio(distance, norm_a),
        "norm_a": norm_a,
        "norm_b": norm_b,
        "std_a": a.std(),
        "std_b": b.std(),
        "std_difference": abs(a.std() - b.std()),
        "sign_agreement": ratio((non_zero & agree).sum(), non_zero.sum()),
        "sign_conflict_ratio": (non_zero & ~agree).mean(),
        "outlier_overlap": ratio((stands_a & stands_b).sum(), (stands_a | stands_b).sum()),
        "outlier_ratio_a": outlier_a.mean(),
        "outlier_ratio_b": outlier_b.mean(),
        "both_outliers_ratio": both.mean(),
        "conflict_ratio": (both & ~agree).mean(),
    }


def _check(found: Comparison, vectors: dict[str, list[np.ndarray]], t: float) -> None:
    num_models = len(found.models)
    limits = {
        name: [np.full(row.size, t * row.std() if row.size else 0.0) for row in rows]
        for name, rows in vectors.items()
    }
    pairs = list(combinations(range(num_models), 2))
    assert [(s.name, s.a, s.b) for s in found.tensors] == [
        (name, a, b) for name in vectors for a, b in pairs
    ]
    for stats in found.tensors:
        rows, own = vectors[stats.name], limits[stats.name]
        assert stats.num_elements == rows[0].size == math.prod(stats.shape)
        if rows[0].size:
            a, b = stats.a, stats.b
            _close(stats, _expected(rows[a], rows[b], own[a], own[b], np.minimum(own[a], own[b])))
        else:
            assert math.isnan(stats.cosine) and math.isnan(stats.conflict_ratio)
    joined = [np.concatenate([rows[m] for rows in vectors.values()]) for m in range(num_models)]
    own = [np.concatenate([rows[m] for rows in limits.values()]) for m in range(num_models)]
    assert [(pair.a, pair.b) for pair in found.pairs] == pairs
    for pair in found.pairs:
        a, b = pair.a, pair.b
        assert pair.num_elements == joined[0].size
        _close(pair, _expected(joined[a], joined[b], own[a], own[b], np.minimum(own[a], own[b])))


def _close(stats: PairStats, expected: dict[str, float]) -> None:
    for column, value in expected.items():
        # What is a difference of large numbers is as exact as they are.
        scale = {"cosine": 1.0, "std_difference": expected["std_a"]}.get(column, 0.0)
        assert getattr(stats, column) == pytest.approx(
            value, rel=1e-12, abs=1e-12 * scale, nan_ok=True
        ), (stats.name, column)


@pytest.mark.parametrize("has_base", [True, False], ids=["task vectors", "weights"])
@pytest.mark.parametrize("kind", DTYPES)
def test_pairs_are_what_numpy_tells(kind, has_base, tmp_path):
    base, *models = _models(tmp_path, dtypes=DTYPES[kind])
    under = base if has_base else None
    found = compare_weights(models, base=under, t=T)
    assert (found.models, found.base, found.t) == (tuple(models), under, T)
    _check(found, dict(sorted(_vectors(models, under).items())), T)


@pytest.mark.parametrize("has_base", [True, False], ids=["task vectors", "weights"])
def test_huge_means_do_not_hide_deviations(has_base, tmp_path):
    base, *models = _models(tmp_path, mean=1e6)
    under = base if has_base else None
    found = compare_weights(models, base=under, t=T)
    _check(found, dict(sorted(_vectors(models, under).items())), T)


@pytest.mark.parametrize("scale", [1e-5, 1e-9])
def test_nearly_equal_models_are_told_apart(scale, tmp_path):
    generator = torch.Generator().manual_seed(0)
    first, change = torch.randn(2, 100_000, generator=generator, dtype=torch.float64)
    second = first + scale * change
    models = [str(save_tensors(tmp_path / "a", {"w": first}))]
    models.append(str(save_tensors(tmp_path / "b", {"w": second})))
    (pair,) = compare_weights(models).pairs
    x, y = first.numpy(), second.numpy()
    assert pair.distance == pytest.approx(np.linalg.norm(y - x), rel=1e-12)
    turned = y - x * (x @ y) / (x @ x)
    angle = np.arctan(np.linalg.norm(turned) / np.linalg.norm(x))
    assert pair.cosine == pytest.approx(1 - 2 * np.sin(angle / 2) ** 2, rel=2e-16, abs=0)


def _of(folder: Path, **tensors: dict[str, list[float]]) -> list[str]:
    """Save a model of float64 vectors for each keyword."""
    return [
        str(
            save_tensors(
                folder / model,
                {name: torch.tensor(values, dtype=torch.float64) for name, values in each.items()},
            )
        )
        for model, each in tensors.items()
    ]


def test_copies_agree_in_everything(tmp_path):
    values = {"w": [1.0, -2.0, 0.0, 9.0, 0.3]}
    models = _of(tmp_path, a=values, b=values)
    (pair,) = compare_weights(models, t=1).pairs
    assert (pair.cosine, pair.sign_agreement, pair.outlier_overlap) == (1, 1, 1)
    assert (pair.distance, pair.relative_distance, pair.std_difference) == (0, 0, 0)
    assert (pair.conflict_ratio, pair.sign_conflict_ratio) == (0, 0)
    assert pair.both_outliers_ratio == pair.outlier_ratio_a == pair.outlier_ratio_b == 0.2


def test_opposite_task_vectors_conflict_in_everything(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base, change = torch.randint(-64, 64, (2, 80_000), generator=generator).double() / 64
    change[:40_000] = change[:40_000].clamp(-0.125, 0.125)
    for name, tensor in (("base", base), ("plus", base + change), ("minus", base - change)):
        save_tensors(tmp_path / name, {"w": tensor.float()})
    models = [str(tmp_path / "plus"), str(tmp_path / "minus")]
    (pair,) = compare_weights(models, base=str(tmp_path / "base"), t=1).pairs
    assert pair.cosine == pytest.approx(-1, abs=1e-15)
    assert (pair.sign_agreement, pair.outlier_overlap) == (0, 1)
    assert pair.std_difference < 1e-15  # their means are of opposite signs
    assert pair.relative_distance == pytest.approx(2, rel=1e-12)
    assert pair.sign_conflict_ratio == (change != 0).double().mean()
    assert 0.1 < pair.conflict_ratio == pair.both_outliers_ratio == pair.outlier_ratio_a


def test_outliers_are_those_of_a_merge_of_the_two(tmp_path):
    base, *models = _models(tmp_path)
    found = compare_weights(models, base=base, t=2)
    for name, rows in _vectors(models, base).items():
        deltas = torch.from_numpy(np.stack(rows))
        if not deltas.numel():
            continue
        for stats in [each for each in found.tensors if each.name == name]:
            pair = deltas[[stats.a, stats.b]]
            _, report = min_sigma(pair, sigma=pair.std(1, correction=0), t=2)
            shares = [stats.outlier_ratio_a, stats.outlier_ratio_b]
            assert [round(s * pair.shape[1]) for s in shares] == report["outliers"].tolist()


def test_a_pair_is_the_same_whatever_models_are_beside_it(tmp_path):
    base, *models = _models(tmp_path)
    found = compare_weights(models, base=base, t=2)
    for pair in found.pairs:
        (alone,) = compare_weights([models[pair.a], models[pair.b]], base=base, t=2).pairs
        assert replace(alone, a=pair.a, b=pair.b) == pair


def test_an_element_at_the_threshold_is_noise(tmp_path):
    models = _of(tmp_path, a={"w": [1.0, -1, 1, -1]}, b={"w": [3.0, -3, -3, 3]})
    (pair,) = compare_weights(models, t=1).pairs
    assert (pair.std_a, pair.std_b) == (1, 3)
    assert (pair.outlier_ratio_a, pair.outlier_ratio_b) == (0, 1)
    assert math.isnan(pair.outlier_overlap)  # 3 is no outlier by its own σ
    assert (pair.both_outliers_ratio, pair.sign_conflict_ratio) == (0, 0.5)


def test_a_frozen_tensor_makes_every_change_an_outlier(tmp_path):
    base, *models = _of(
        tmp_path,
        base={"w": [1.0, 2, 3, 4]},
        frozen={"w": [1.0, 2, 3, 4]},
        tuned={"w": [1.0, 2.5, 3, 3]},
    )
    (pair,) = compare_weights(models, base=base).pairs
    assert (pair.outlier_ratio_a, pair.outlier_ratio_b) == (0, 0.5)
    assert math.isnan(pair.cosine) and math.isnan(pair.sign_agreement)
    assert math.isnan(pair.relative_distance) and pair.distance == math.sqrt(1.25)
    assert pair.both_outliers_ratio == 0


def test_several_models_make_matrices(tmp_path):
    base, *models = _models(tmp_path, num_models=4)
    found = compare_weights(models, base=base)
    by_pair = {(pair.a, pair.b): pair for pair in found.pairs}
    assert list(by_pair) == list(combinations(range(4), 2))
    for column, diagonal in MATRIX_DIAGONAL.items():
        matrix = found.matrix(column)
        assert [matrix[m][m] for m in range(4)] == [diagonal] * 4
        for (a, b), pair in by_pair.items():
            assert matrix[a][b] == getattr(pair, column)
            if column == "relative_distance":
                assert matrix[b][a] == pair.distance / pair.norm_b != matrix[a][b]
            else:
                assert matrix[b][a] == matrix[a][b]
    with pytest.raises(ArgumentError, match=r"no matrix of 'cosin'\. Did you mean 'cosine'\?"):
        found.matrix("cosin")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Models of more than one span."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    paths = []
    for number in range(3):
        wide = torch.randn(1200, 1000, generator=generator).to(torch.bfloat16)
        narrow = torch.randn(700, generator=generator).to(torch.bfloat16)
        paths.append(str(save_tensors(folder / f"{number}", {"wide": wide, "narrow": narrow})))
    return paths


def test_results_do_not_depend_on_threads(large):
    base, *models = large
    one, *others = (
        json.dumps(compare_weights(models, base=base, threads=threads).as_dict())
        for threads in (1, 2, 5)
    )
    assert "NaN" not in one
    assert others == [one, one]


def test_a_tensor_is_read_in_bounded_spans_twice_from_each_model(large, monkeypatch):
    sizes, values = [], Reader.values

    def read(self: Reader, source: object, start: int, stop: int) -> torch.Tensor:
        sizes.append(stop - start)
        return values(self, source, start, stop)

    monkeypatch.setattr(Reader, "values", read)
    progress: list[int] = []
    compare_weights(large, on_progress=progress.append)
    assert max(sizes) == 1 << 20
    assert sum(sizes) == 2 * 3 * 1_200_700
    assert sum(progress) == 2 * sum(sizes)


def _adapter(folder: Path, base: str, *, seed: int) -> tuple[str, torch.Tensor]:
    """Save a LoRA of rank 2 as peft does; return it and its change of the weight."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 16, generator=generator), torch.randn(24, 2, generator=generator)
    folder.mkdir()
    prefix = "base_model.model.layers.0.q_proj.lora_"
    save_file(
        {f"{prefix}A.weight": a, f"{prefix}B.weight": b}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    config["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder), 3 * (b.double() @ a.double()).flatten()


def test_models_that_are_open_already_have_their_one_base(tmp_path):
    weights = {"w": torch.randn(4, 4)}
    base, a, b = (
        str(save_tensors(tmp_path / n, {"w": weights["w"] + i})) for i, n in enumerate("xab")
    )
    opened = [open_subject(model, base) for model in (a, b)]
    assert compare_weights(opened) == compare_weights([a, b], base=base)
    with pytest.raises(ArgumentError, match="is open already"):
        compare_weights(opened, base=base)
    with pytest.raises(ArgumentError, match="found models of several bases"):
        compare_weights([opened[0], open_subject(b)])


@pytest.mark.parametrize("has_base", [True, False], ids=["task vectors", "weights"])
def test_adapters_are_models(has_base, tmp_path):
    names = ("layers.0.q_proj.weight", "layers.0.k_proj.weight")
    weights = {name: torch.randn(24, 16, generator=torch.Generator()) for name in names}
    base = str(save_tensors(tmp_path / "base", weights))
    first, x = _adapter(tmp_path / "first", base, seed=1)
    second, y = _adapter(tmp_path / "second", base, seed=2)
    found = compare_weights([first, second], base=base if has_base else None)
    adapted, untouched = names
    assert {s.name: (s.layer, s.module) for s in found.tensors} == {
        adapted: ("layers.0", "layers.*.q_proj"),
    } | ({} if has_base else {untouched: ("layers.0", "layers.*.k_proj")})
    note = "left out, since no adapter changes them: 1 tensors"
    assert (note in found.notes) == has_base
    by_name = {s.name: s for s in found.tensors}
    if not has_base:
        x, y = (weights[adapted].double().flatten() + each for each in (x, y))
    cosine = float(x @ y / x.norm() / y.norm())
    assert by_name[adapted].cosine == pytest.approx(cosine, abs=1e-5)
    assert by_name[adapted].distance == pytest.approx(float((x - y).norm()), rel=1e-5)
    if not has_base:
        assert by_name[untouched].distance == 0
        assert by_name[untouched].cosine == pytest.approx(1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_and_left_out_of_whole_models(value, tmp_path):
    good = {"w": [1.0, -2, 3, 4], "v": [0.5, 2, 1, 1]}
    _, *models = _of(
        tmp_path,
        base={"w": [0.0] * 4, "v": [0.0] * 4},
        a=good,
        b=good | {"w": [1.0, value, -value, 4]},
        c=good | {"w": [2.0, -2, 3, 4]},
    )
    found = compare_weights(models, base=str(tmp_path / "base"), t=1)
    assert f"w: {models[1]}" in found.notes[-1]
    for stats in found.tensors:
        affected = stats.name == "w" and 1 in (stats.a, stats.b)
        assert math.isnan(stats.distance) == math.isnan(stats.conflict_ratio) == affected
    (kept,) = (s for s in found.tensors if s.name == "w" and (s.a, s.b) == (0, 2))
    assert (kept.distance, kept.both_outliers_ratio) == (1, 0.5)
    assert [pair.num_elements for pair in found.pairs] == [4, 4, 4]
    assert [pair.both_outliers_ratio for pair in found.pairs] == [0.75, 0.75, 0.75]
    assert [pair.cosine for pair in found.pairs] == pytest.approx([1, 1, 1])


def test_a_base_that_is_not_finite_is_named(tmp_path):
    base, *models = _of(tmp_path, base={"w": [math.nan, 1]}, a={"w": [1.0, 2]}, b={"w": [3.0, 4]})
    found = compare_weights(models, base=base)
    assert f"w: {base}" in found.notes[-1]
    (pair,) = found.pairs
    assert pair.num_elements == 0 and math.isnan(pair.cosine)


def test_tensors_that_not_all_have_in_one_shape_are_noted(tmp_path):
    first = {"w": torch.ones(3), "mine": torch.ones(2), "resized": torch.ones(4)}
    second = {"w": torch.ones(3) * 2, "ids": torch.arange(3), "resized": torch.ones(5)}
    models = [str(save_tensors(tmp_path / "a", first)), str(save_tensors(tmp_path / "b", second))]
    found = compare_weights(models)
    assert [stats.name for stats in found.tensors] == ["w"]
    assert found.notes == (
        "left out, since they are not floats:\n  ids",
        "left out, since not all models have them:\n  mine",
        "left out, since their shapes differ:\n  resized: [4] and [5]",
    )


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("has_base", [True, False])
def test_layers_that_slices_moved_are_noted(moved, has_base, tmp_path):
    base, task = save_llama(tmp_path / "base"), tmp_path / "task"
    tune(base, task, seed=1)
    slices = [{"sources": [{"model": str(task), "layer_range": [start, start + 1]}]}
              for start in ((1, 0) if moved else (0, 1))]  # fmt: skip
    out = tmp_path / "out"
    outliermerge.run({"merge_method": "passthrough", "slices": slices}, output=out)
    found = compare_weights([str(out), str(task)], base=str(base) if has_base else None)
    notes = [note for note in found.notes if "is a merge of slices" in note]
    assert len(notes) == moved
    if moved:
        assert f"{out} is a merge" in notes[0] and f"0 from {task} (1); 1 from" in notes[0]
    (out / "recipe.yaml").write_text("slices: [{sources: 3}]")
    again = compare_weights([str(out), str(task)]).notes
    assert not any("is a merge of slices" in note for note in again)


def test_a_rename_brings_the_other_models_names_to_the_firsts(tmp_path):
    new, old = _of(
        tmp_path,
        new={"model.language_model.norm.weight": [1.0, 2]},
        old={"model.norm.weight": [1.0, 3]},
    )
    with pytest.raises(OutlierMergeError, match="`rename='qwen_vl_v4_to_v5'` pairs 1 of 1"):
        compare_weights([new, old])
    (pair,) = compare_weights([new, old], rename="qwen_vl_v4_to_v5").pairs
    assert pair.distance == 1


def test_models_of_other_shapes_are_told_by_shapes_and_architectures(tmp_path):
    models = []
    for name, kind, size in (("base", "Llama", 8), ("a", "Llama", 8), ("b", "Qwen2", 4)):
        folder = save_tensors(tmp_path / name, {"w": torch.rand(size, size)})
        config = {"architectures": [f"{kind}ForCausalLM"], "hidden_size": size}
        (folder / "config.json").write_text(json.dumps(config))
        models.append(str(folder))
    base, a, b = models
    with pytest.raises(OutlierMergeError) as found:
        compare_weights([a, b], base=base)
    assert "found for example 'w' [4, 4], expected 'w' [8, 8]" in str(found.value)
    said = "Qwen2ForCausalLM (hidden size 4, 16 parameters); "
    assert said in str(found.value) and "LlamaForCausalLM (hidden size 8, 64" in str(found.value)
    with pytest.raises(OutlierMergeError, match=r"has 'w' \[8, 8\], .*has 'w' \[4, 4\]"):
        compare_weights([a, b])


@pytest.mark.parametrize(
    ("names", "keywords", "message"),
    [
        ("a", {}, r"found 1 model\(s\) to compare, expected two or more"),
        ("aa", {}, "is the same model as"),
        ("ab", {"base": "b"}, "is the same model as"),
        ("ab", {"t": -1.0}, "t: found -1.0, expected a number of 0 or more"),
        ("ab", {"t": math.nan}, "t: found nan, expected a number of 0 or more"),
        ("ab", {"device": "tpu"}, "device: found 'tpu'"),
        ("ab", {"rename": "nonsense"}, "rename"),
    ],
)
def test_mistakes_are_told(names, keywords, message, tmp_path):
    _of(tmp_path, a={"w": [1.0, 2]}, b={"w": [1.0, 3]})
    if "base" in keywords:
        keywords = {"base": str(tmp_path / keywords["base"])}
    with pytest.raises(ArgumentError, match=message):
        compare_weights([str(tmp_path / name) for name in names], **keywords)


@pytest.mark.gpu
def test_a_gpu_tells_the_same(large):
    base, *models = large
    here = compare_weights(models, base=base)
    there = compare_weights(models, base=base, device="cuda")
    for ours, theirs in zip(here.tensors, there.tensors, strict=True):
        assert theirs.as_dict() == pytest.approx(ours.as_dict(), rel=1e-12, abs=1e-15)
