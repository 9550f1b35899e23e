"""The statistics of weights against scipy and plain numpy, in float64."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pyarrow.parquet
import pytest
import scipy.stats
import torch
from checkpoints import family, save_tensors

from outliermerge.analysis.measure import _SPAN_ELEMENTS
from outliermerge.analysis.stats import stats_of_tensor, weight_stats
from outliermerge.analysis.table import BINS, HALF_WIDTH
from outliermerge.cli.main import main
from outliermerge.errors import ArgumentError, OutlierMergeError

RNG = np.random.default_rng(7)
NUM = 40_001  # no whole number of lanes, steps or pieces


def _mixture() -> np.ndarray:
    spike, wide = RNG.normal(0, 1e-4, NUM), RNG.normal(0, 0.3, NUM)
    return np.where(RNG.random(NUM) < 0.7, spike, wide)


DISTRIBUTIONS = {
    "gaussian": RNG.normal(0.001, 0.02, NUM),
    "laplace": RNG.laplace(0, 0.01, NUM),
    "student_t": RNG.standard_t(3, NUM) * 0.01,
    "uniform": RNG.uniform(-1, 2, NUM),
    "skewed": RNG.exponential(0.1, NUM),
    "mixture": _mixture(),
    "huge_mean": RNG.normal(6e4, 1, NUM),
    "one_outlier": np.append(RNG.normal(0, 0.01, NUM), 1e4),
    "outlier_first": np.append(1e4, RNG.normal(0, 0.01, NUM)),
    "kept_far_from_the_rest": np.append(RNG.normal(5, 0.01, NUM), np.full(30, -800.0)),
    "sorted": np.sort(RNG.normal(0, 1, 200_000)),
    "two_values": RNG.choice([-0.5, 0.25], NUM),
    "many_zeros": np.where(RNG.random(NUM) < 0.9, 0, RNG.normal(0, 1, NUM)),
    "small_only": RNG.normal(0, 1e-5, NUM),
    "seventeen": RNG.normal(0, 1, 17),
    "two": np.array([1.0, 2.0]),
    "spans": RNG.normal(0, 0.02, _SPAN_ELEMENTS + 5),
}
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def _oracle(x: np.ndarray, filter: float, small: float) -> dict[str, float]:
    """The definitions, written out. Two moments of a sample with far mean are of what is left
    when an element is taken from all, which changes no central moment."""
    x = x.astype(np.float64)
    mean = x[0] + (x - x[0]).mean()
    std = math.sqrt(np.square(x - mean).mean())
    kept = x[(x >= mean - filter * std) & (x <= mean + filter * std)]
    large = kept[np.abs(kept) >= small]

    def third(sample):
        return scipy.stats.skew(sample - sample[0]) if len(sample) else math.nan

    def fourth(sample):
        return scipy.stats.kurtosis(sample - sample[0], fisher=False) if len(sample) else math.nan

    return {
        "num_elements": len(x),
        "num_non_finite": 0,
        "mean": mean,
        "std": std,
        "minimum": x.min(),
        "maximum": x.max(),
        "zero_ratio": (x == 0).mean(),
        "skewness_before": third(x),
        "kurtosis_before": fourth(x),
        "kept_ratio": len(kept) / len(x),
        "skewness": third(kept),
        "kurtosis": fourth(kept),
        "small_ratio": (np.abs(x) < small).mean(),
        "without_small_ratio": len(large) / len(x),
        "std_without_small": (large - large[0]).std() if len(large) else math.nan,
        "skewness_without_small": third(large),
        "kurtosis_without_small": fourth(large),
        "outside_2_ratio": (np.abs(x - mean) > 2 * std).mean(),
        "outside_3_ratio": (np.abs(x - mean) > 3 * std).mean(),
        "outside_4_ratio": (np.abs(x - mean) > 4 * std).mean(),
        "l1_norm": np.abs(x).sum(),
        "l2_norm": math.sqrt(np.square(x).sum()),
    }


def _check(found, x: np.ndarray, *, filter: float = 3.0, small: float = 1e-3) -> None:
    for name, wanted in _oracle(x, filter, small).items():
        value = getattr(found, name)
        if name.startswith("skewness"):  # near zero: relative to what it is the difference of
            assert value == pytest.approx(wanted, rel=1e-10, abs=1e-10, nan_ok=True), name
        else:
            assert value == pytest.approx(wanted, rel=1e-10, abs=1e-300, nan_ok=True), name


def _save(folder, tensors: dict[str, torch.Tensor]) -> str:
    return str(save_tensors(folder, tensors))


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_scipys(tmp_path, dtype, kernels):
    stored = {name: torch.from_numpy(x).to(DTYPES[dtype]) for name, x in DISTRIBUTIONS.items()}
    folder = _save(tmp_path / "m", stored)
    found = weight_stats(folder, kernels=kernels)
    assert {tensor.name for tensor in found.tensors} == set(stored)
    for tensor in found.tensors:
        x = stored[tensor.name].double().numpy()
        _check(tensor, x)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize(("base", "tuned"), [("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_task_vectors_are_differences_in_float64(tmp_path, base, tuned, kernels):
    weights = torch.from_numpy(RNG.normal(1, 0.02, (150, 700)))
    before = weights.to(DTYPES[base])
    after = (weights + torch.from_numpy(RNG.normal(0, 0.01, (150, 700)))).to(DTYPES[tuned])
    folders = [
        _save(tmp_path / name, {"w": tensor, name: torch.zeros(3)})
        for name, tensor in (("base", before), ("tuned", after))
    ]
    found = weight_stats(folders[1], base=folders[0], kernels=kernels)
    (tensor,) = found.tensors
    _check(tensor, (after.double() - before.double()).numpy().ravel())
    assert found.base == folders[0]
    assert any("only in" in note and "tuned" in note for note in found.notes)


@pytest.mark.parametrize(("filter", "small"), [(2.0, 1e-3), (0.5, 0.0), (5.0, 0.01), (0.0, 0.02)])
def test_the_filter_and_what_is_small_can_be_chosen(tmp_path, filter, small):
    x = torch.from_numpy(DISTRIBUTIONS["gaussian"]).float()
    folder = _save(tmp_path / "m", {"w": x, "half": x.bfloat16()})
    found = weight_stats(folder, filter=filter, small=small)
    for tensor in found.tensors:
        stored = {"w": x, "half": x.bfloat16()}[tensor.name]
        _check(tensor, stored.double().numpy(), filter=filter, small=small)


def test_an_exact_gaussian_keeps_99_73_percent_and_has_a_kurtosis_of_2_83():
    quantiles = scipy.stats.norm.ppf((np.arange(1_000_000) + 0.5) / 1_000_000)
    found = stats_of_tensor(torch.from_numpy(quantiles))
    assert found.kept_ratio == pytest.approx(scipy.stats.norm.cdf(3) * 2 - 1, abs=2e-6)
    within_three = 3 + float(scipy.stats.truncnorm(-3, 3).stats("k"))
    assert round(within_three, 2) == 2.83
    assert found.kurtosis == pytest.approx(within_three, abs=1e-4)
    assert found.skewness == pytest.approx(0, abs=1e-10)
    assert found.kurtosis_before == pytest.approx(3, abs=1e-3)
    assert found.label == "Gaussian"


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_vary_has_no_shape(tmp_path, dtype, kernels):
    tensors = {
        "zeros": torch.zeros(70, 70),
        "constant": torch.full((99_999,), 0.1),
        "one": torch.tensor([-2.5]),
        "scalar": torch.tensor(4.0),
    }
    stored = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    for tensor in weight_stats(_save(tmp_path / "m", stored), kernels=kernels).tensors:
        value = stored[tensor.name].reshape(-1)[0].item()
        assert (tensor.mean, tensor.std, tensor.minimum) == (value, 0, value)
        assert tensor.kept_ratio == 1
        assert math.isnan(tensor.kurtosis) and math.isnan(tensor.skewness_before)
        assert tensor.label is None and tensor.histogram is None
    assert weight_stats(_save(tmp_path / "e", {"empty": torch.zeros(0, 4)})).tensors[0].l2_norm == 0


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_infinite_and_nan_elements_are_counted_and_left_out(tmp_path, dtype, kernels):
    x = torch.from_numpy(DISTRIBUTIONS["laplace"]).to(DTYPES[dtype])
    x[[0, 5, 17, 30_000]] = torch.tensor([math.nan, math.inf, -math.inf, math.nan], dtype=x.dtype)
    found = weight_stats(_save(tmp_path / "m", {"w": x}), kernels=kernels)
    (tensor,) = found.tensors
    assert (tensor.num_non_finite, tensor.num_elements) == (4, NUM)
    finite = x[x.isfinite()].double().numpy()
    wanted = _oracle(finite, 3.0, 1e-3) | {"num_elements": NUM, "num_non_finite": 4}
    for name in ("mean", "std", "kurtosis", "kept_ratio", "num_elements", "l1_norm"):
        assert getattr(tensor, name) == pytest.approx(wanted[name], rel=1e-10), name
    assert found.notes == (
        "w: 4 of 40,001 elements are infinite or NaN, and left out of its statistics",
    )


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_histograms_count_every_element(tmp_path, dtype, kernels):
    x = torch.from_numpy(DISTRIBUTIONS["student_t"]).to(DTYPES[dtype])
    (tensor,) = weight_stats(_save(tmp_path / "m", {"w": x}), kernels=kernels).tensors
    scaled = (x.double().numpy() - tensor.mean) / tensor.std
    edges = np.linspace(-HALF_WIDTH, HALF_WIDTH, BINS + 1)
    wanted, _ = np.histogram(scaled, edges)
    assert sum(abs(np.array(tensor.histogram.counts) - wanted)) <= 2  # on an edge, by rounding
    assert tensor.histogram.num_below == (scaled < -HALF_WIDTH).sum() > 0
    assert tensor.histogram.num_above == (scaled > HALF_WIDTH).sum() > 0


def test_an_adapter_is_what_it_adds_to_its_base(tmp_path):
    weights = {name: torch.randn(60, 40) for name in ("layers.0.q.weight", "layers.1.q.weight")}
    base = _save(tmp_path / "base", weights)
    key, a, b = "base_model.model.layers.1.q", torch.randn(4, 40), torch.randn(60, 4) * 0.01
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    adapter = tmp_path / "adapter"
    save_tensors(adapter, tensors)
    (adapter / "config.json").unlink()
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]})
    )
    for model, named in ((str(adapter), base), (f"{base}+{adapter}", base)):
        found = weight_stats(model, base=named)
        (tensor,) = found.tensors
        assert tensor.name == "layers.1.q.weight"
        wanted = _oracle((b.double() @ a.double() * 2).numpy().ravel(), 3.0, 1e-3)
        for name in ("std", "kurtosis", "l2_norm", "maximum"):
            assert getattr(tensor, name) == pytest.approx(wanted[name], rel=1e-5), name
        assert "left out, since the adapter does not change them: 1 tensors" in found.notes


def test_results_do_not_depend_on_threads(tmp_path):
    tensors = {f"layers.{i}.w": torch.randn(1700, 700) for i in range(3)}
    folder = _save(tmp_path / "m", tensors | {"half": torch.randn(900, 900).bfloat16()})
    one, five = (weight_stats(folder, threads=threads) for threads in (1, 5))
    assert one == five


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_measures_what_the_cpu_does(tmp_path, dtype):
    stored = {name: torch.from_numpy(x).to(DTYPES[dtype]) for name, x in DISTRIBUTIONS.items()}
    folder = _save(tmp_path / "m", stored)
    for tensor in weight_stats(folder, device="cuda").tensors:
        _check(tensor, stored[tensor.name].double().numpy())


def test_groups_are_means_and_deviations_over_matrices(tmp_path):
    tensors = {
        f"model.layers.{i}.{module}.weight": torch.randn(40, 50) * (i + 1)
        for i in range(3)
        for module in ("self_attn.q_proj", "mlp.up_proj")
    }
    tensors |= {"model.norm.weight": torch.randn(50), "conv.weight": torch.randn(50, 1, 1)}
    found = weight_stats(_save(tmp_path / "m", tensors))
    assert [group.name for group in found.layers] == [f"model.layers.{i}" for i in range(3)]
    by_name = {tensor.name: tensor for tensor in found.tensors}
    stds = [by_name[f"model.layers.{i}.mlp.up_proj.weight"].std for i in range(3)]
    group = next(group for group in found.modules if group.name == "model.layers.*.mlp.up_proj")
    assert group.num_tensors == 3 and group.num_elements == 6000
    assert group.spreads["std"].mean == pytest.approx(np.mean(stds))
    assert group.spreads["std"].std == pytest.approx(np.std(stds))
    assert found.whole.num_tensors == 6
    assert found.short_names["model.layers.*.mlp.up_proj"] == "mlp.up_proj"


def test_types_of_module_stand_in_one_order_whatever_that_of_the_file(tmp_path):
    names = [f"model.layers.0.mlp.{module}.weight" for module in ("up", "w10", "w2", "down")]
    for place, order in enumerate((names, names[::-1])):
        folder = _save(tmp_path / str(place), {name: torch.randn(8, 8) for name in order})
        modules = [group.name.rpartition(".")[2] for group in weight_stats(folder).modules]
        assert modules == ["down", "up", "w2", "w10"]


def test_the_command_writes_what_the_library_returns(tmp_path, capsys):
    base, (tuned,) = family("llama", tmp_path, num_models=1)
    files = {kind: tmp_path / f"stats.{kind}" for kind in ("json", "csv", "parquet")}
    arguments = [part for kind, file in files.items() for part in (f"--{kind}", str(file))]
    assert main(["stats", str(tuned), "--base", str(base), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "self_attn.q_proj" in shown and "all matrices" in shown
    wanted = weight_stats(str(tuned), base=str(base))
    written = json.loads(files["json"].read_text())
    assert [tensor["name"] for tensor in written["tensors"]] == [t.name for t in wanted.tensors]
    for row, parquet, text, tensor in zip(
        written["tensors"],
        pyarrow.parquet.read_table(files["parquet"]).to_pylist(),
        csv.DictReader(files["csv"].read_text().splitlines()),
        wanted.tensors,
        strict=True,
    ):
        assert row["std"] == parquet["std"] == float(text["std"]) == tensor.std
        assert row["kurtosis"] == tensor.kurtosis and row["kept_ratio"] == tensor.kept_ratio
        assert row["num_elements"] == parquet["num_elements"] == int(text["num_elements"])
    groups = written["groups"]
    assert groups["model"]["kurtosis_mean"] == wanted.whole.spreads["kurtosis"].mean
    assert len(groups["layers"]) == 3


def test_numbers_that_are_none_are_null_in_json(tmp_path, capsys):
    folder = _save(tmp_path / "m", {"w": torch.ones(4, 4)})
    assert main(["stats", folder, "--json", "-", "--by", "tensor"]) == 0
    tensor = json.loads(capsys.readouterr().out)["tensors"][0]
    assert tensor["kurtosis"] is None and tensor["label"] is None and tensor["std"] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing"], 1, "missing"),
        (["m", "--filter", "-1"], 2, "filter: found -1.0, expected a number of at least 0"),
        (["m", "--small", "nan"], 2, "small: found nan"),
        (["m", "--base", "other"], 1, "expected 'w'"),
        (["m", "--base", "m", "--rename", "nonsense"], 2, "--rename: there is no map 'nonsense'"),
        (["ints"], 1, "holds no tensor of floats"),
        (["m", "--device", "gpu"], 2, "device: found 'gpu'"),
        (["m", "--json", "nowhere/x.json"], 1, "there is no folder nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(
    tmp_path, monkeypatch, capsys, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    _save(tmp_path / "m", {"v": torch.ones(4)})
    _save(tmp_path / "other", {"w": torch.ones(4)})
    _save(tmp_path / "ints", {"i": torch.ones(4, dtype=torch.int32)})
    assert main(["stats", *arguments]) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_what_is_too_large_to_be_squared_is_told(tmp_path):
    huge = torch.randn(1050, 1000, dtype=torch.float64) * 1e300  # two spans
    folder = _save(tmp_path / "m", {"w": huge, "same": torch.full((5, 4), 0.3)})
    found = weight_stats(folder)
    assert "w: its elements are too large to be squared" in found.notes
    assert "not counted in groups, since all their elements are equal: 1 matrices" in found.notes
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert by_name["w"].histogram is None and by_name["w"].maximum == huge.max()


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.ones(4), {"filter": -1.0}, "filter: found -1.0"),
        (torch.ones(4), {"small": math.nan}, "small: found nan"),
        (torch.ones(4, dtype=torch.complex64), {}, "found torch.complex64, expected floats"),
        (torch.ones(4, dtype=torch.int32), {}, "found torch.int32, expected floats"),
    ],
)
def test_a_tensor_in_memory_has_to_be_one_of_floats(values, options, message):
    with pytest.raises(OutlierMergeError, match=message):
        stats_of_tensor(values, **options)


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path):
    from outliermerge.analysis.models import open_subject

    folder = _save(tmp_path / "m", {"w": torch.randn(1000, 1000)})
    subject = open_subject(folder)
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1_000_000])
    with pytest.raises(OutlierMergeError, match=r"model.safetensors: tensor 'w': cannot be read"):
        weight_stats(subject)
    with pytest.raises(ArgumentError):
        weight_stats(subject, filter=math.inf)


def test_a_base_of_another_architecture_is_noted(tmp_path):
    for name, kind, tensors in (("base", "Llama", ["w", "a"]), ("model", "Qwen2", ["w", "b"])):
        save_tensors(tmp_path / name, {each: torch.randn(3, 4) for each in tensors})
        config = {"architectures": [f"{kind}ForCausalLM"]}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    found = weight_stats(str(tmp_path / "model"), base=str(tmp_path / "base"))
    (note,) = (each for each in found.notes if each.startswith("what is compared may be no fine-"))
    assert "model is Qwen2ForCausalLM" in note and "base is LlamaForCausalLM" in note
