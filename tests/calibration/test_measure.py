"""Statistics of models on data, against sums in float64 that the tests make themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from checkpoints import load_folder
from documents import ROOT
from families import save_llama
from PIL import Image
from safetensors.torch import save_file
from text_models import save_text_model
from torch import Tensor

import outliermerge
from outliermerge import OutlierMergeError, SpecError
from outliermerge.calibration.data import Sample, read_samples, samples_hash
from outliermerge.calibration.measure import Wanted, held, measure
from outliermerge.calibration.model import Feeder, Loaded, load
from outliermerge.calibration.sums import Summing, Sums, in_groups, units_of
from outliermerge.cli.main import main
from outliermerge.output.journal import Journal

SAMPLES = [
    *(Sample(f"number {n} is {n * n}.") for n in range(6)),
    Sample(prompt="three and four", text=" are seven"),
    Sample(prompt="two", text=" is even"),
]
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("measure")
    save_text_model(folder / "a", seed=0)
    save_text_model(folder / "b", seed=1)
    lines = [
        {"text": one.text} if not one.prompt else {"prompt": one.prompt, "completion": one.text}
        for one in SAMPLES
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def loaded(place) -> Loaded:
    return load(str(place / "a"), device="cpu", what="measure")


@pytest.fixture(scope="module")
def measured(place, loaded) -> Path:
    measure(loaded, SAMPLES, output=place / "all", wanted=Wanted(), data="data.jsonl")
    return place / "all"


def tokens_of(folder: Path, sample: Sample) -> tuple[Tensor, int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    before = tokenizer(sample.prompt)["input_ids"] if sample.prompt else []
    return torch.tensor([before + tokenizer(sample.text)["input_ids"]]), len(before)


@pytest.fixture(scope="module")
def expected(place) -> dict[str, dict[str, Tensor]]:
    model = transformers.LlamaForCausalLM.from_pretrained(place / "a", dtype=torch.float64)
    inputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def note(module: Any, given: Any, name: str = f"{name}.weight") -> None:
                inputs.setdefault(name, []).append(given[0][0].detach())

            module.register_forward_pre_hook(note)
    fisher = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    for sample in SAMPLES:
        ids, num_prompt = tokens_of(place / "a", sample)
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
        places = range(max(1, num_prompt), ids.shape[1])
        total = sum(logs[at - 1, ids[0, at]] for at in places)
        grads = torch.autograd.grad(total, list(model.parameters()))
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            fisher[name] += grad.square() / len(SAMPLES)
    rows = {name: torch.cat(found) for name, found in inputs.items()}
    return {
        "gram": {name: x.T @ x / len(x) for name, x in rows.items()},
        "mean": {name: x.mean(0) for name, x in rows.items()},
        "fisher": fisher,
    }


@pytest.mark.parametrize("kind", ["gram", "mean", "fisher"])
def test_statistics_are_those_of_sums_in_float64(kind, measured, expected):
    found = load_folder(measured / kind)
    assert found.keys() == expected[kind].keys()
    for name, wanted in expected[kind].items():
        largest = float(wanted.abs().max())
        assert torch.allclose(found[name].double(), wanted, rtol=1e-4, atol=1e-5 * largest), name
        assert found[name].dtype == torch.float32


def test_the_manifest_says_of_what_they_are(measured, place):
    manifest = json.loads((measured / "statistics.json").read_text())
    assert manifest["statistics"].keys() == {"gram", "fisher", "mean"}
    assert "data's own labels" in manifest["statistics"]["fisher"]["definition"]
    num_tokens = sum(tokens_of(place / "a", one)[0].shape[1] for one in SAMPLES)
    assert (manifest["data"]["num_samples"], manifest["data"]["num_tokens"]) == (8, num_tokens)
    norm = sum(
        float(one.double().square().sum()) for one in load_folder(measured / "gram").values()
    )
    assert manifest["statistics"]["gram"]["norm"] == pytest.approx(norm**0.5)
    assert manifest["versions"]["transformers"] == transformers.__version__
    assert manifest["tensors"].keys() == load_folder(place / "a").keys()
    assert {path.name for path in measured.iterdir()} == {
        "gram", "mean", "fisher", "statistics.json"
    }  # fmt: skip


def test_less_memory_takes_more_passes_and_changes_no_value(loaded, measured, tmp_path):
    seen = set()
    measure(
        loaded, SAMPLES, output=tmp_path / "out", wanted=Wanted(), memory_bytes=200_000,
        on_progress=lambda done, total: seen.add(total),
    )  # fmt: skip
    (total,) = seen
    assert total > 3 * len(SAMPLES)
    for kind in ("gram", "mean", "fisher"):
        assert len(list((tmp_path / "out" / kind).glob("*.safetensors"))) > 3
        one, other = load_folder(tmp_path / "out" / kind), load_folder(measured / kind)
        assert all(one[name].equal(other[name]) for name in other)


@pytest.mark.parametrize("stop", [3, 11])
def test_what_was_interrupted_goes_on_and_gives_the_same_bytes(stop, loaded, tmp_path):
    """It is stopped in the first or the second of its passes."""

    def run(name: str, on_progress: Any = lambda done, total: None) -> dict[str, bytes]:
        wanted = Wanted(("gram", "fisher"), "sampled")
        measure(
            loaded, SAMPLES, output=tmp_path / name, wanted=wanted, save_every=2,
            memory_bytes=700_000, on_progress=on_progress,
        )  # fmt: skip
        files = (tmp_path / name).rglob("*")
        return {str(f.relative_to(tmp_path / name)): f.read_bytes() for f in files if f.is_file()}

    def interrupt(done: int, total: int) -> None:
        if done >= stop:
            raise KeyboardInterrupt

    begun = []
    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", interrupt)
    assert not (tmp_path / "stopped").exists()
    again = run("stopped", lambda done, total: begun.append(done))
    assert begun[:2] == ([2, 3] if stop == 3 else [8, 10])  # whole passes are not repeated
    assert again == whole


def test_part_of_other_statistics_is_not_gone_on_with(loaded, tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    wanted = Wanted(("mean",))
    with pytest.raises(KeyboardInterrupt):
        measure(
            loaded, SAMPLES, output=tmp_path / "s", wanted=wanted, save_every=1, on_progress=stop
        )
    with pytest.raises(OutlierMergeError, match=r"s\.partial: was begun .*: data changed since\."):
        measure(loaded, SAMPLES[1:], output=tmp_path / "s", wanted=wanted)
    measure(loaded, SAMPLES, output=tmp_path / "s", wanted=wanted)
    with pytest.raises(OutlierMergeError, match=r"/s: is there already"):
        measure(loaded, SAMPLES, output=tmp_path / "s", wanted=wanted)


def test_other_statistics_than_those_begun_are_told_how_to_start_over(place, tmp_path, capsys):
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    data, out = place / "data.jsonl", tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        outliermerge.measure(
            place / "a", data, output=out, statistics="mean", save_every=1, on_progress=stop
        )
    given = ["measure", str(place / "a"), "--data", str(data), "-q", "--statistics", "gram"]
    given += ["-o", str(out)]
    assert main(given) == 1
    assert capsys.readouterr().err == (
        f"error: {out}.partial: was begun by another measurement: statistics changed since. "
        "Measure the same to go on, or use --fresh to start over.\n"
    )
    assert main([*given, "--fresh"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert {path.name for path in out.iterdir()} == {"gram", "statistics.json"}


def test_a_measurement_without_any_sums_leaves_nothing_in_the_way(loaded, place, tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    def killed(statistics: str) -> None:
        wanted = Wanted((statistics,))
        with pytest.raises(KeyboardInterrupt):
            measure(loaded, SAMPLES, output=tmp_path / "s", wanted=wanted, on_progress=stop)

    with held(tmp_path / "s", fresh=False):
        killed("mean")
    assert not [*tmp_path.iterdir()]
    killed("mean")  # without the end that an error leads to
    assert (tmp_path / "s.partial").exists()
    outliermerge.measure(
        place / "a", place / "data.jsonl", output=tmp_path / "s", statistics="gram"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_statistics_that_a_kill_left_without_their_name_are_not_mixed_with_others(loaded, tmp_path):
    out = tmp_path / "s"
    measure(loaded, SAMPLES, output=out, wanted=Wanted(("mean",)))
    out.rename(tmp_path / "s.partial")
    measure(loaded, SAMPLES, output=out, wanted=Wanted(("gram",)))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert {path.name for path in out.iterdir()} == {"gram", "statistics.json"}


def test_sums_of_another_division_are_not_gone_on_with(loaded, tmp_path):
    """The memory divides modules into as many passes, but others: the sums lack some of them."""
    units, divisions = units_of(loaded, ("gram",)), dict[int, dict[tuple[int, ...], int]]()
    for memory in range(30_000, 300_000, 500):
        sizes = tuple(map(len, in_groups(units, ("gram",), memory)))
        divisions.setdefault(len(sizes), {}).setdefault(sizes, memory)
    (_, one), (_, other) = next(list(v.items())[:2] for k, v in divisions.items() if len(v) > 1)

    def stop(done: int, total: int) -> None:
        if done == len(SAMPLES) + 2:
            raise KeyboardInterrupt

    given: Any = {"output": tmp_path / "s", "wanted": Wanted(("gram",)), "save_every": 1}
    with pytest.raises(KeyboardInterrupt):
        measure(loaded, SAMPLES, memory_bytes=one, on_progress=stop, **given)
    with pytest.raises(OutlierMergeError, match="division into passes changed since"):
        measure(loaded, SAMPLES, memory_bytes=other, **given)
    state = tmp_path / "s.partial/sums.safetensors"
    cut = state.read_bytes()[:99]
    save_file({}, state)
    for damaged in (state.read_bytes(), cut):  # one that does not say of what it is
        state.write_bytes(damaged)
        with pytest.raises(OutlierMergeError, match=r"sums\.safetensors: is damaged"):
            measure(loaded, SAMPLES, memory_bytes=one, **given)


def test_fisher_information_of_other_labels_is_refused(place):
    with pytest.raises(outliermerge.ArgumentError, match="fisher: found 'x', expected empirical"):
        outliermerge.measure(place / "a", place / "data.jsonl", fisher="x")


def test_a_label_that_is_no_class_is_told(loaded):
    summing = Summing(loaded, Any, [], [], fisher="empirical", seed=0, sums=Sums())
    for label, said in [(3, "the label 3, expected a class from 0 to 2"), (-1, "the label -1")]:
        with pytest.raises(OutlierMergeError, match=said):
            summing._likelihood(
                SimpleNamespace(logits=torch.zeros(1, 3)), torch.zeros(1, 4), 0,
                Sample("a", label=label), 0,
            )  # fmt: skip


def test_values_that_are_not_finite_are_named(place, tmp_path, capsys):
    tensors = load_folder(place / "a")
    name = next(n for n in tensors if "layers.1" in n and n.endswith("up_proj.weight"))
    shutil.copytree(place / "a", tmp_path / "m")
    save_file(tensors | {name: tensors[name] / 0}, tmp_path / "m/model.safetensors")
    (tmp_path / "d.jsonl").write_text('{"text": "some text"}')
    words = ["measure", str(tmp_path / "m"), "--data", str(tmp_path / "d.jsonl"), "-q"]
    assert main([*words, "--statistics", "gram", "-o", str(tmp_path / "s")]) == 1
    assert f"gram of {DOWN} is infinite or NaN: the model has" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_drawn_labels_are_the_models_and_the_seeds(loaded):
    def drawn(seed: int, number: int) -> Tensor:
        feeder = Feeder(loaded, with_images=False, max_tokens=9)
        summing = Summing(loaded, feeder, [], [], fisher="sampled", seed=seed, sums=Sums())
        return summing._drawn(logits, number)

    wanted = torch.tensor([0.6, 0.0, 0.3, 0.1])
    logits = wanted.log().expand(20_000, 4)
    found = drawn(0, 1)
    shares = found.bincount(minlength=4) / len(found)
    assert torch.allclose(shares, wanted, atol=0.015) and shares[1] == 0
    assert found.equal(drawn(0, 1))
    assert not found.equal(drawn(1, 1)) and not found.equal(drawn(0, 2))


def test_images_go_through_the_processor_of_a_vlm(tmp_path):
    """The model of the small family: its parameters have other names than its tensors."""
    model = ROOT / "evals/family/models/base"
    for number in range(2):
        Image.new("RGB", (32, 32), (90 * number, 20, 200)).save(tmp_path / f"{number}.png")
    lines = [
        {"prompt": "<image>what colour?", "completion": " red", "images": [f"{number}.png"]}
        for number in range(2)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["measure", str(model), "--data", str(tmp_path / "data.jsonl"), "-q"]
    assert main([*given, "-o", str(tmp_path / "out")]) == 0
    stored = load_folder(model)
    grams, fisher = load_folder(tmp_path / "out/gram"), load_folder(tmp_path / "out/fisher")
    assert fisher.keys() <= stored.keys() and len(fisher) > 0.9 * len(stored)
    linear = [name for name in grams if "vision" in name and "q_proj" in name]
    assert linear and all(grams[name].diagonal().min() > 0 for name in linear)
    assert all(fisher[name].shape == stored[name].shape for name in fisher)
    Path(tmp_path / "1.png").write_bytes(b"no image")
    assert main([*given, "-o", str(tmp_path / "x")]) == 1


@pytest.mark.parametrize("fresh", [[], ["--fresh"]], ids=str)
def test_another_process_that_writes_the_folder_is_told(fresh, place, tmp_path, capsys):
    given = ["measure", str(place / "a"), "--data", str(place / "data.jsonl"), "-q", *fresh]
    given += ["--statistics", "mean", "-o", str(tmp_path / "s")]
    with held(tmp_path / "s", fresh=False):
        (tmp_path / "s.partial").mkdir()
        for name in ("measures.json", "group-1.json"):
            (tmp_path / "s.partial" / name).write_text("{}")
        assert main(given) == 1
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"error: {tmp_path / 's'}: another run (process ")
        assert "\n" not in said
        assert (tmp_path / "s.partial/measures.json").exists()
    shutil.rmtree(tmp_path / "s.partial")
    assert main(given) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_folder_that_a_merge_has_begun_is_left_to_it(place, tmp_path, capsys):
    journal = Journal(tmp_path / "s")
    journal.begin({"spec": "a merge"})
    journal.close()
    given = ["measure", str(place / "a"), "--data", str(place / "data.jsonl"), "-q"]
    assert main([*given, "-o", str(tmp_path / "s")]) == 1
    assert "was begun by a merge" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["s.partial.journal"]


def test_a_shared_weight_is_no_linear_layer(tmp_path):
    folder = save_llama(tmp_path / "tied", tied=True)
    found = load(str(folder), device="cpu", what="measure")
    from outliermerge.calibration.sums import units_of

    names = {unit.inputs for unit in units_of(found, ["gram"])}
    assert None not in names and not any("embed" in name or "head" in name for name in names)
    fishers = [name for unit in units_of(found, ["fisher"]) for name in unit.parameters]
    assert sorted(fishers) == sorted(set(found.names.values()))


def test_regmean_and_fisher_merge_what_was_measured(place, measured, tmp_path, capsys):
    given = ["measure", str(place / "b"), "--data", str(place / "data.jsonl")]
    given += ["-o", str(tmp_path / "b"), "--statistics", "gram,fisher", "--json"]
    assert main(given) == 0
    (printed,) = json.loads(capsys.readouterr().out)
    assert printed["data"]["num_samples"] == 8 and printed["output"] == str(tmp_path / "b")
    models = [
        {"model": str(place / "a"), "statistics": str(measured)},
        {"model": str(place / "b"), "statistics": str(tmp_path / "b")},
    ]
    for method, parameters in (("regmean", {"reduce": 1.0}), ("fisher", {})):
        spec = {"merge_method": method, "models": models, "parameters": parameters}
        outliermerge.run(spec, output=tmp_path / method)
    w = [load_folder(place / name) for name in "ab"]
    g = [load_folder(folder / "gram") for folder in (measured, tmp_path / "b")]

    def loss(merged: Tensor, name: str) -> float:
        errors = (((merged - one[name]) @ gram[name] * (merged - one[name])).sum() for one, gram
                  in zip(w, g, strict=True))  # fmt: skip
        return float(sum(errors))

    best = load_folder(tmp_path / "regmean")
    for name in (Q, DOWN):
        mean = (w[0][name] + w[1][name]) / 2
        assert loss(best[name], name) < 0.9 * loss(mean, name)
        moved = best[name] + torch.randn(best[name].shape) * best[name].std() / 10
        assert loss(best[name], name) < loss(moved, name)
    swapped = [models[0], models[1] | {"statistics": str(measured)}]
    spec = {"merge_method": "regmean", "models": swapped}
    with pytest.raises(OutlierMergeError, match="these statistics are of another model"):
        outliermerge.run(spec, output=tmp_path / "no")


def test_samples_are_read_from_lines_and_parquet(place, tmp_path):
    import pyarrow
    import pyarrow.parquet

    assert read_samples(str(place / "data.jsonl")) == SAMPLES
    assert read_samples(str(place / "data.jsonl"), limit=2) == SAMPLES[:2]
    table = pyarrow.table({"content": ["one", "two"], "label": [0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    found = read_samples(str(tmp_path / "d.parquet"), column="content")
    assert found == [Sample("one", label=0), Sample("two", label=1)]
    assert samples_hash(found) != samples_hash([Sample("one", label=1), Sample("two", label=1)])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": 3}', r"1: found the keys text; expected \{"),
        ("[1]", r"1: found '\[1\]', expected \{"),
        ('{"text": "a"}\n{', r"2: .*again\. Expected \{"),
        ('{"text": ""}', "1: the text is empty; expected"),
        (r'{"text": "\ud800"}', "1: .*surrogate"),
        ('{"text": "a", "images": 3}', "1: images: expected a list of files"),
        ("\n", "holds no samples"),
    ],
)
def test_a_wrong_line_is_told_by_its_number(line, said, tmp_path):
    (tmp_path / "d.jsonl").write_text(line)
    with pytest.raises(SpecError, match=said):
        read_samples(str(tmp_path / "d.jsonl"))


def test_what_cannot_be_measured_is_told(place, tmp_path, capsys):
    data = ["--data", str(place / "data.jsonl")]
    assert main(["measure", str(place / "a"), *data, "--statistics", "grams"]) == 2
    assert "no statistic 'grams'. Did you mean 'gram'?" in capsys.readouterr().err
    assert main(["measure", str(place / "a"), "--data", str(tmp_path / "no.jsonl")]) == 2
    assert "no such file of samples" in capsys.readouterr().err
    assert main(["measure", str(tmp_path), *data, "-o", str(tmp_path / "x")]) == 1
    capsys.readouterr()
    config = json.loads((place / "a/config.json").read_text())
    for change, said in (
        ({"architectures": ["Nothing"]}, "has no Nothing"),
        ({"architectures": None}, "names a class of transformers"),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"quantization_config": {}}, "are quantised"),
    ):
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        for file in (place / "a").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "config.json").write_text(json.dumps(config | change))
        assert main(["measure", str(folder), *data, "-o", str(tmp_path / "x")]) == 1
        assert said in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    assert main(["measure", str(folder), *data, "-o", str(tmp_path / "x")]) == 1
    assert "its tokenizer does not load" in capsys.readouterr().err


def test_a_model_that_needs_a_picture_too_says_what_it_was_given(place, tmp_path, capsys):
    small = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "image_size": 8, "patch_size": 4, "vocab_size": 300,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=small, vision_config=small, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    for file in (place / "a").glob("tokenizer*"):
        (tmp_path / "clip" / file.name).write_bytes(file.read_bytes())
    data = ["--data", str(place / "data.jsonl"), "-o", str(tmp_path / "x")]
    assert main(["measure", str(tmp_path / "clip"), *data, "--statistics", "gram"]) == 1
    assert "it was given input_ids alone" in capsys.readouterr().err


def test_the_function_measures_as_the_command_does(place, measured, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    wanted = ["gram", "mean"]
    found = outliermerge.measure(
        place / "a", "data.jsonl", output=tmp_path / "out", statistics=wanted
    )
    assert list(found) == [tmp_path / "out"]
    assert list(found[tmp_path / "out"]["statistics"]) == wanted
    for kind in wanted:
        whole = load_folder(measured / kind)
        for name, tensor in load_folder(tmp_path / "out" / kind).items():
            assert tensor.equal(whole[name])
    for error, more in {
        "no statistic 'grams'": {"statistics": "grams"},
        "statistics: none, expected some of": {"statistics": []},
        "samples: found 0, expected a whole number of 1 or more": {"samples": 0},
    }.items():
        with pytest.raises(outliermerge.ArgumentError, match=error):
            outliermerge.measure(place / "a", "data.jsonl", **more)
    with pytest.raises(outliermerge.ArgumentError, match="data: given 2, expected one"):
        outliermerge.measure(place / "a", ["data.jsonl"] * 2)
