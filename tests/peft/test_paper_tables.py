"""Tables 2 and 3 of arXiv 2501.10661 on small replicas: their scores, and what can go wrong."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from scipy import stats
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from evals.peft import commands, commonsense, glue, replicas, runs, table2, table3
from evals.peft.study import Texts
from outliermerge.errors import OutlierMergeError

RECIPE = runs.Recipe("model", "data", 1e-2, batch=8, epochs=2, warmup=0.1, max_tokens=32)
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def transformers_words() -> Iterator[None]:
    """The commands hush transformers; other tests may listen to it."""
    before = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(before)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def glue_replica(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return replicas.table2(tmp_path_factory.mktemp("table2"))


@pytest.fixture(scope="module")
def llama_replica(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return replicas.table3(tmp_path_factory.mktemp("table3"))


def records_of(folder: Path) -> dict[str, Any]:
    paths = (folder / "runs").glob("*.json")
    return {path.stem: json.loads(path.read_text())["found"] for path in paths}


# Metrics.


def test_metrics_are_those_of_scipy_and_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    drawn = np.random.default_rng(0)
    right, told = (drawn.integers(0, 2, 200) for _ in range(2))
    told[:80] = right[:80]
    assert glue.accuracy(told, right) == sklearn.accuracy_score(right, told)
    assert glue.f1(told, right) == pytest.approx(sklearn.f1_score(right, told))
    assert glue.matthews(told, right) == pytest.approx(sklearn.matthews_corrcoef(right, told))
    numbers, near = drawn.integers(0, 9, 100) / 2, drawn.normal(size=100).round(1)
    assert glue.pearson(near, numbers) == pytest.approx(stats.pearsonr(near, numbers).statistic)
    assert glue.spearman(near, numbers) == pytest.approx(stats.spearmanr(near, numbers).statistic)


def test_metrics_by_hand():
    right, told = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])
    # 2 true positives, 1 false, 1 missed, 2 true negatives
    assert glue.f1(told, right) == pytest.approx(4 / 6)
    assert glue.matthews(told, right) == pytest.approx((2 * 2 - 1 * 1) / 9)
    always = np.ones(6, dtype=int)
    assert glue.matthews(always, right) == 0.0 and glue.f1(1 - always, right) == 0.0
    assert glue.correlation(np.ones(6), np.arange(6.0)) == 0.0
    logits = np.array([[0.1, 0.9], [2.0, -1.0]])
    assert glue.score(glue.TASKS["rte"], logits, np.array([1, 1])) == {"accuracy": 50.0}


@pytest.mark.parametrize("rows", [table2.PAPER, table3.PAPER], ids=["table 2", "table 3"])
def test_the_cited_means_are_those_of_the_cited_scores(rows):
    """But for two that are off in the paper itself."""
    # Some of Table 3's are cut off where others are rounded.
    digits = 0.065 if rows is table3.PAPER else 0.005
    for key, (_, *scores, mean) in rows.items():
        assert len(scores) == 8
        off = {"gaussian": 0.1263, ("LLaMA-7B", "lora", 16): 0.1}.get(key, 0.0)
        assert statistics.fmean(scores) == pytest.approx(mean + off, abs=digits * 1.01)


def test_as_many_parameters_are_trained_as_in_table_2():
    config = transformers.DebertaV2Config(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_buckets=256,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    )
    with torch.device("meta"):
        model = transformers.DebertaV2ForSequenceClassification(config)
    assert table2.adapt(model, "full", 1) == pytest.approx(184e6, rel=0.01)
    matrices = table2._matrices(model.deberta)
    assert f"{sum(min(each.weight.shape) for each in matrices):,}" == table2.PAPER["svdiff"][0]
    assert str(table2.adapt(model, "noise", 1)) == table2.PAPER["noise"][0]


@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("LLaMA-7B", {}),
        (
            "LLaMA3-8B",
            {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
        ),
    ],
)
def test_as_many_parameters_are_trained_as_in_table_3(name, config, rank):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    trained = sum(
        rank * sum(module.weight.shape)
        for where, module in model.named_modules()
        if where.rpartition(".")[2] in table3.TARGETS
    )
    percent = 100 * trained / sum(p.numel() for p in model.parameters())
    assert percent == pytest.approx(table3.PAPER[name, "lora", rank][0], abs=0.006)


# Training.


class Line:
    """Points of a line; a model that is told NaN at one step, or stopped there."""

    def __init__(self, stop_at: int | None = None, value: float = 1.0) -> None:
        self.lengths = [1 + n % 5 for n in range(20)]
        self.x = torch.arange(20.0)[:, None] / 10
        self.calls, self.stop_at, self.value = 0, stop_at, value

    def num_terms(self, rows: list[int]) -> int:
        return len(rows)

    def loss(self, model: nn.Module, rows: list[int]) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            if self.value != 1.0:
                return model(self.x[rows]).sum() * self.value
            raise KeyboardInterrupt
        return (model(self.x[rows])[:, 0] - 3 * self.x[rows, 0]).square().sum()


def line_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), nn.Linear(8, 1))


def train(examples: Any, path: Path, model: nn.Module | None = None, **keys: Any) -> Any:
    model = model or line_model()
    given = {"seed": 1, "checkpoint": path, "micro_batch": 8, "title": "a line"} | keys
    recipe = given.pop("recipe", RECIPE)
    return model, runs.train(model, examples, recipe, **given)


@pytest.mark.parametrize("stop_at", [1, 2, 4, 6])
def test_a_stopped_training_ends_as_one_that_was_not(tmp_path, monkeypatch, stop_at):
    whole, told = train(Line(), tmp_path / "whole.pt")
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(Line(stop_at), tmp_path / "stopped.pt")
    torch.rand(5)  # another process has another random state
    rest = Line()
    resumed, told_later = train(rest, tmp_path / "stopped.pt")
    assert rest.calls == 6 - (stop_at - 1)
    assert told_later["losses"] == told["losses"] and told["steps"] == 6
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_lowers_the_loss_and_the_seed_matters(tmp_path):
    recipe = runs.Recipe("m", "d", 3e-2, batch=8, epochs=20, warmup=2, max_tokens=1)
    model, told = train(Line(), tmp_path / "a.pt", recipe=recipe)
    assert told["losses"][-1] < 0.3 * told["losses"][0]
    other, _ = train(Line(), tmp_path / "b.pt", recipe=recipe, seed=2)
    assert not torch.equal(model[0].weight, other[0].weight)


def test_a_training_of_one_step_moves(tmp_path):
    recipe = runs.Recipe("m", "d", 1e-2, batch=32, epochs=1, warmup=100, max_tokens=1)
    model, told = train(Line(), tmp_path / "a.pt", recipe=recipe)
    assert told["steps"] == 1 and not torch.equal(model[0].weight, line_model()[0].weight)


def test_parts_of_a_batch_add_up_to_its_gradient(tmp_path):
    def trained(micro_batch: int) -> list[torch.Tensor]:
        model = line_model()
        model[1].p = 0.0
        path = tmp_path / f"{micro_batch}.pt"
        train(Line(), path, model, micro_batch=micro_batch)
        return list(model.parameters())

    for one, other in zip(trained(8), trained(3), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch, value):
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(runs.Diverged, match=r"at step 3 of 6 the loss is .*--rate than 0\.01"):
        train(Line(3, value), tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    train(Line(), path)
    other = runs.Recipe("model", "data", 2e-2, batch=8, epochs=2, warmup=0.1, max_tokens=32)
    with pytest.raises(OutlierMergeError, match=r"a\.pt is of another recipe: rate 0\.01, now"):
        train(Line(), path, recipe=other)
    with pytest.raises(OutlierMergeError, match=r"a\.pt is of another model"):
        train(Line(), path, nn.Linear(1, 1))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OutlierMergeError, match=r"a\.pt cannot be read: .*Remove it to train"):
        train(Line(), path)


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def full(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("file write failed\nC++ frames")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutlierMergeError, match=r"a\.pt cannot be written, with .* MB free"):
        train(Line(), tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutlierMergeError, match=r"adapters cannot be written, with .* MB free"):
        with runs.writing(tmp_path / "adapters"):
            raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_progress_in_a_log_has_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(runs, "LOG_SECONDS", 0.0)
    with runs.progress("cola, noise", 10, 4) as show:
        show(5, "loss 0.500")
    assert capsys.readouterr().err == "cola, noise: 5 of 10, loss 0.500, 0 minutes left\n"


# Table 2.


def small2(folder: Path, *more: str) -> int:
    return table2.main(["--small", "--output", str(folder), "--device", "cpu", *more])


def test_table_2_on_the_replica(tmp_path, capsys, monkeypatch):
    assert small2(tmp_path, "--tasks", "cola", "--seeds", "1") == 0
    assert small2(tmp_path, "--tasks", "cola", "--seeds", "2", "--methods", "noise") == 0
    found = records_of(tmp_path)
    assert len(found) == len(table2.METHODS) + 1
    trained = {name: found[f"cola-{name}-1"]["num_trained"] for name in table2.METHODS}
    # Two layers of Q, K, V, O (32 × 32), up and down (32 × 48); rank 8.
    assert trained["head"] == 0 and trained["noise"] == trained["gaussian"] == 12
    assert trained["svdiff"] == 12 * 32
    assert trained["lora"] == 2 * 8 * (4 * 64 + 2 * 80)
    model = transformers.AutoModel.from_pretrained(tmp_path / "replica" / "model")
    assert trained["full"] == sum(p.numel() for p in model.parameters())
    full = found["cola-full-1"]
    assert full["losses"][2] < full["losses"][0] and full["score"] > 30
    assert found["cola-noise-1"]["losses"] != found["cola-noise-2"]["losses"]
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| noise, W + sN | 12 | – | – | " in table
    assert "| *paper* | 72 | 69.49 | 88.53 | 61.34 |" in table and "nan" not in table
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["runs"]) == len(found)
    assert not list((tmp_path / "checkpoints").iterdir())
    monkeypatch.setattr(table2, "train", lambda *_, **__: pytest.fail("trained again"))
    assert small2(tmp_path, "--tasks", "cola", "--seeds", "1") == 0


def test_table_2_scores_pairs_numbers_and_mismatched_sentences(tmp_path):
    more = (
        "--tasks",
        "mnli",
        "stsb",
        "mrpc",
        "--methods",
        "noise",
        "--seeds",
        "1",
        "--epochs",
        "1",
    )
    assert small2(tmp_path, *more) == 0
    found = records_of(tmp_path)
    assert {"validation_matched", "validation_mismatched"} <= found["mnli-noise-1"].keys()
    assert set(found["mrpc-noise-1"]["validation"]) == {"accuracy", "f1"}
    numbers = found["stsb-noise-1"]
    assert numbers["score"] == numbers["validation"]["correlation"]
    assert "| noise, W + sN | 12 | " in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("method", ["noise", "svdiff", "lora", "head"])
def test_training_begins_at_the_pretrained_model(glue_replica, method):
    model = table2.load_model(glue_replica[0], glue.TASKS["mnli"], 1).eval()
    inputs = {"input_ids": torch.arange(4, 12).view(2, 4)}
    with torch.inference_mode():
        before = model(**inputs).logits
        table2.adapt(model, method, 1)
        assert torch.equal(model(**inputs).logits, before)
    head = {
        name for name, p in model.named_parameters() if p.requires_grad and "deberta" not in name
    }
    assert head == {
        *("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias")
    }


def test_svdiff_changes_the_singular_values():
    torch.manual_seed(0)
    weight = torch.randn(5, 3)
    spectral = table2.Spectral(weight)
    spectral.delta.data = torch.tensor([0.5, -0.1, -99.0])
    found = torch.linalg.svdvals(spectral(weight))
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(found, torch.tensor([values[0] + 0.5, values[1] - 0.1, 0.0]))


def test_noise_alone_begins_as_a_standard_gaussian(glue_replica):
    model = table2.load_model(glue_replica[0], glue.TASKS["cola"], 1)
    table2.adapt(model, "gaussian", 1)
    layer = model.deberta.base_model.encoder.layer[1].output.dense
    x = torch.eye(layer.base_layer.in_features)
    made = (layer(x) - layer.base_layer.bias).flatten()
    assert not layer.base_layer.weight.any()
    assert made.std().item() == pytest.approx(1, abs=0.05)


def test_a_run_that_diverges_leaves_the_others(tmp_path, capsys):
    more = ("--tasks", "cola", "--seeds", "1", "--methods", "head", "full", "--epochs", "1")
    real = table2.load_model

    def broken(name: str, task: Any, seed: int) -> nn.Module:
        model = real(name, task, seed)
        model.deberta.embeddings.LayerNorm.weight.data.fill_(math.nan)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table2, "load_model", broken)
        assert small2(tmp_path, *more) == 1
    said = capsys.readouterr().err
    assert "error: 1/2 cola, head, 1: at step 1 of 6 the loss is nan" in said
    assert "2/2 cola, full, 1" in said and not records_of(tmp_path)
    assert small2(tmp_path, *more) == 0  # the same command makes what is missing


def test_a_folder_has_runs_of_one_recipe(tmp_path, capsys):
    more = ("--tasks", "cola", "--seeds", "1", "--methods", "head", "--epochs", "1")
    assert small2(tmp_path, *more) == 0
    assert small2(tmp_path, *more, "--rate", "0.5") == 1
    assert (
        "cola-head-1.json is of another recipe: rate 0.01, now 0.5. Name" in capsys.readouterr().err
    )
    path = next((tmp_path / "runs").iterdir())
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"recipe": record["recipe"] | {"model": "else"}}))
    assert small2(tmp_path, *more[:2], "--seeds", "2", *more[4:]) == 1
    assert "is of another recipe: model else, now" in capsys.readouterr().err
    for text in ("{", '{"key": [], "recipe": [], "found": {}}'):
        path.write_text(text)
        assert small2(tmp_path, *more) == 1
        assert "is not the record of a run. Remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (None, "has train.jsonl. Each line"),
        ("", "has no rows"),
        (b"\xff", "is no text in UTF-8"),
        ('{"sentence": "a"', "validation.jsonl:1: is not JSON"),
        ("[1]", "validation.jsonl:1: found [1], expected an object"),
        (
            '{"text": "a", "label": 0}',
            "sentence is None, expected a text; CoLA's rows have sentence",
        ),
        ('{"sentence": "a", "label": 1}\n\n{"sentence": "b"}', "validation.jsonl:3: has no label"),
        ('{"sentence": "a", "label": -1}', "validation.jsonl:1: has no label. GLUE keeps"),
        ('{"sentence": "a", "label": 2}', "label is 2, expected 0 to 1"),
        ('{"sentence": "a", "label": true}', "label is True, expected 0 to 1"),
        ('{"sentence": "a", "label": "1"}', "label is '1', expected 0 to 1"),
    ],
)
def test_bad_rows_of_glue_are_told(glue_replica, tmp_path, capsys, line, said):
    data = tmp_path / "data"
    shutil.copytree(Path(glue_replica[1]) / "cola", data / "cola")
    path = data / "cola" / "validation.jsonl"
    if line is None:
        path.unlink()
    else:
        path.write_bytes(line if isinstance(line, bytes) else line.encode())
    given = ["--model", glue_replica[0], "--data", str(data), "--output", str(tmp_path / "out")]
    assert table2.main([*given, "--tasks", "cola", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error


def test_numbers_are_asked_of_a_task_of_numbers(tmp_path):
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb" / "train.jsonl").write_text(
        '{"sentence1": "", "sentence2": "", "label": NaN}'
    )
    with pytest.raises(OutlierMergeError, match="label is nan, expected a number"):
        glue.read("stsb", "train", str(tmp_path))


def test_models_that_are_no_pretrained_deberta_are_refused(glue_replica, llama_replica, tmp_path):
    task = glue.TASKS["cola"]
    with pytest.raises(OutlierMergeError, match="its model_type is llama, expected deberta-v2"):
        table2.load_model(llama_replica[0], task, 1)
    with pytest.raises(OutlierMergeError, match=r"AutoConfig cannot load it: .*hf download"):
        table2.load_model(str(tmp_path / "absent"), task, 1)
    model = table2.load_model(glue_replica[0], task, 1)
    for labels in (2, 3):
        model.config.num_labels = labels
        made = transformers.DebertaV2ForSequenceClassification(model.config)
        made.save_pretrained(tmp_path / f"tuned{labels}")
    with pytest.raises(OutlierMergeError, match=r"has classifier\.bias, so it is tuned to a task"):
        table2.load_model(str(tmp_path / "tuned2"), task, 1)
    with pytest.raises(
        OutlierMergeError, match=r"has pooler\.dense\.bias, so it is tuned to a task"
    ):
        table2.load_model(str(tmp_path / "tuned3"), task, 1)
    state = {
        name: each for name, each in model.deberta.state_dict().items() if "layer.1" not in name
    }
    model.deberta.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(
        OutlierMergeError, match=r"has no deberta\.encoder\.layer\.1\.attention.*and"
    ):
        table2.load_model(str(tmp_path / "part"), task, 1)


def test_rows_come_from_the_hub_through_datasets(glue_replica, tmp_path, monkeypatch):
    """A folder in place of the hub: the rows are those of the files."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(glue, "HUB", glue_replica[1])
    (Path(glue_replica[1]) / "README.md").write_text(
        "---\nconfigs:\n- config_name: stsb\n  data_files:\n  - split: train\n"
        "    path: stsb/train.jsonl\n---\n"
    )
    assert glue.read("stsb", "train", None) == glue.read("stsb", "train", glue_replica[1])
    with pytest.raises(OutlierMergeError, match=r"stsb, test: .*give the tasks as files: --data"):
        glue.read("stsb", "test", None)


# Table 3.


def small3(folder: Path, *more: str) -> int:
    return table3.main(["--small", "--output", str(folder), "--device", "cpu", *more])


def test_table_3_on_the_replica(tmp_path, capsys, monkeypatch):
    assert small3(tmp_path, "--seeds", "1", "--tasks", "boolq") == 0
    found = records_of(tmp_path)
    assert set(found) == {"model-lora-4-1", "model-lora_s-4-1"}
    plain, scaled = found["model-lora-4-1"], found["model-lora_s-4-1"]
    assert scaled["num_trained"] == plain["num_trained"] + 10  # Q, K, V, up, down of two layers
    assert plain["num_trained"] == 2 * 4 * (3 * 64 + 2 * 80)
    assert plain["losses"][-1] < 0.7 * plain["losses"][0]
    assert scaled["scores"]["boolq"]["unread"] < 8  # it has learnt to answer, if not what
    assert plain["scales"] == [] and len(scaled["scales"]) == 10 and any(scaled["scales"])
    assert scaled["scores"]["boolq"]["questions"] == replicas.NUM_TEST
    table = (tmp_path / "table.md").read_text()
    assert "| model | LoRA + s, r = 4 |" in table and table in capsys.readouterr().out
    # The adapter that was kept is asked another task, and is what was trained.
    monkeypatch.setattr(table3, "train", lambda *_, **__: pytest.fail("trained again"))
    asked = (tmp_path / "answers" / "model-lora_s-4-1-boolq.jsonl").read_text()
    record = tmp_path / "runs" / "model-lora_s-4-1.json"
    without = json.loads(record.read_text())
    without["found"]["scores"] = {}
    record.write_text(json.dumps(without))
    one = ("--seeds", "1", "--methods", "lora_s")
    assert small3(tmp_path, *one, "--tasks", "boolq", "piqa") == 0
    scores = records_of(tmp_path)["model-lora_s-4-1"]["scores"]
    assert scores["boolq"] == scaled["scores"]["boolq"] and "piqa" in scores
    assert (tmp_path / "answers" / "model-lora_s-4-1-boolq.jsonl").read_text() == asked
    adapter = tmp_path / "adapters" / "model-lora_s-4-1" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:99])
    assert small3(tmp_path, *one, "--tasks", "ARC-Easy") == 1
    assert "model-lora_s-4-1 cannot be read: " in capsys.readouterr().err
    shutil.rmtree(tmp_path / "adapters")
    assert small3(tmp_path, *one, "--tasks", "ARC-Easy") == 1
    assert "is not there, but" in capsys.readouterr().err


def test_scores_are_the_share_of_right_words(llama_replica, tmp_path, monkeypatch):
    rows = commonsense.read_test(llama_replica[1], "boolq")[:4]
    said = [f"the correct answer is {row['answer']}" for row in rows]
    said[1] = "nothing"
    said[2] = "false true" if rows[2]["answer"] == "true" else "true false"
    monkeypatch.setattr(table3, "answers", lambda *_, **__: said)
    options = table3.parser().parse_args(["--small"])
    command = table3.Command(options, runs.Records(tmp_path), CPU, None, {"boolq": rows})
    key = ("m", "lora", 4, 1)
    assert command.ask(nn.Identity(), key, "boolq", "") == {
        "score": 50.0,
        "questions": 4,
        "unread": 1,
    }
    lines = (tmp_path / "answers" / "m-lora-4-1-boolq.jsonl").read_text().splitlines()
    assert [
        json.loads(line)["read"] == row["answer"] for line, row in zip(lines, rows, strict=True)
    ] == [*(True, False, False, True)]


@pytest.mark.parametrize(
    ("task", "text", "word"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "True", ""),  # as the usual evaluation: in small letters
        ("piqa", "solution2 not solution1", "solution2"),
        ("ARC-Easy", "answer5.", "answer5"),
        ("hellaswag", "the correct answer is ending", ""),
        ("winogrande", "option1</s>", "option1"),
    ],
)
def test_answers_are_read_as_the_first_word(task, text, word):
    assert commonsense.read_answer(task, text) == word


def test_prompts_of_several_lengths_are_answered_as_alone(llama_replica):
    model = table3.load_model(llama_replica[0], "float32").eval()
    for parameter in model.parameters():
        parameter.data *= 4  # so that it prefers some words to others
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_replica[0])
    rows = commonsense.read_test(llama_replica[1], "piqa")[:5]
    assert len({len(tokenizer(commonsense.prompt(row))["input_ids"]) for row in rows}) > 1
    ask = {"new_tokens": 4, "title": ""}
    together = table3.answers(model, tokenizer, rows, size=5, **ask)
    assert together == table3.answers(model, tokenizer, rows, size=1, **ask)
    assert len(set(together)) > 1 and all(together)


def test_what_is_trained_on_ends_where_it_has_room(llama_replica):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_replica[0])
    texts = table3.training_texts(llama_replica[1], tokenizer, 64)
    rows = commonsense.read_training(llama_replica[1])
    for tokens, row in zip(texts.tokens, rows, strict=True):
        assert tokens[0] == tokenizer.bos_token_id and tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[:-1]).endswith(row["answer"])
    short = table3.training_texts(llama_replica[1], tokenizer, 9)
    assert all(len(tokens) == 9 for tokens in short.tokens)
    assert all(tokens[-1] != tokenizer.eos_token_id for tokens in short.tokens)


def test_the_loss_is_the_mean_over_tokens_without_the_filling(llama_replica):
    model = table3.load_model(llama_replica[0], "float32").eval()
    texts = Texts([[1, 5, 6, 7, 2], [1, 8, 2]], torch.zeros(2))
    written = table3.Written(texts, CPU)
    together = written.loss(model, [0, 1])
    alone = sum(
        model(input_ids=torch.tensor([tokens]), labels=torch.tensor([tokens])).loss
        * (len(tokens) - 1)
        for tokens in texts.tokens
    )
    torch.testing.assert_close(together, alone)
    assert written.num_terms([0, 1]) == 6


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (commonsense.TRAINING, None, "is to be a copy of LLM-Adapters: git clone"),
        (commonsense.TRAINING, "{", "is not JSON"),
        (commonsense.TRAINING, "[]", "expected a list of rows"),
        (commonsense.TRAINING, '[{"instruction": "a"}]', "row 0: output is None, expected a text"),
        ("dataset/boolq/test.json", None, "test.json is not there"),
        (
            "dataset/boolq/test.json",
            '[{"instruction": "a"}]',
            "row 0: answer is None, expected true",
        ),
        ("dataset/boolq/test.json", '[{"answer": "true"}]', "row 0: instruction is None"),
    ],
)
def test_bad_questions_are_told(llama_replica, tmp_path, capsys, file, text, said):
    data = tmp_path / "data"
    shutil.copytree(llama_replica[1], data)
    path = data / file
    path.unlink() if text is None else path.write_text(text)
    given = ["--model", llama_replica[0], "--data", str(data), "--output", str(tmp_path / "out")]
    more = ["--device", "cpu", "--dtype", "float32", "--tasks", "boolq", "--epochs", "1"]
    assert table3.main([*given, *more]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and str(path) in error


def test_models_without_the_matrices_of_a_llama_are_refused(glue_replica, tmp_path):
    with pytest.raises(
        OutlierMergeError, match="AutoModelForCausalLM cannot load it: Unrecognized"
    ):
        table3.load_model(glue_replica[0], "float32")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(OutlierMergeError, match="is a gpt2, without down_proj, k_proj, q_proj"):
        table3.load_model(str(tmp_path), "float32")


def test_the_recipes_are_those_of_the_paper():
    options = table3.parser().parse_args(["--model", "meta-llama/Llama-2-7b-hf", "--data", "d"])
    assert [table3.recipe_of(rank, options).rate for rank in (16, 32, 8)] == [2e-4, 3e-4, 3e-4]
    assert table3.family("/models/Meta-Llama-3-8B/")[0] == "LLaMA3-8B"
    options = table2.parser().parse_args([])
    recipe = table2.recipe_of("rte", "noise", options)
    assert (recipe.rate, recipe.epochs, recipe.max_tokens) == (1.2e-3, 50, 320)
    assert table2.recipe_of("rte", "full", options).rate == table2.FULL_RATE


# Commands.


@pytest.mark.parametrize(
    ("module", "given", "said"),
    [
        (table2, ["--tasks", "wnli"], "invalid choice: 'wnli'"),
        (table2, ["--epochs", "0"], "--epochs: found 0, expected 1 or more"),
        (table2, ["--rate", "nan"], "--rate: found nan, expected more than 0"),
        (table2, ["--small", "--data", "d"], "--small makes its own model and data"),
        (table2, ["--small", "--seeds", "-1"], "--seeds: found -1, expected 0 to 4294967295"),
        (table2, ["--small", "--output", "s3://bucket/x"], "this is an address: name a path"),
        (table3, ["--small", "--model", "m"], "--small makes its own model and data"),
        (table3, [], "--data: name a copy of LLM-Adapters"),
        (table3, ["--small", "--ranks", "0"], "--ranks: found 0, expected 1 or more"),
    ],
)
def test_wrong_usage_is_exit_code_2(module, given, said, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(given)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("AutoModel", "model.safetensors"),
        ("AutoTokenizer", "tokenizer.json"),
        ("AutoConfig", "config.json"),
    ],
)
def test_damaged_files_of_a_model_are_told(glue_replica, tmp_path, kind, file):
    model = tmp_path / "model"
    shutil.copytree(glue_replica[0], model)
    whole = (model / file).read_bytes()
    (model / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OutlierMergeError, match=f"--model .*: {kind} cannot load it: "):
        commands.pretrained(getattr(transformers, kind), str(model))


def test_a_replica_is_made_file_by_file_and_damage_is_undone(tmp_path):
    def make(folder: Path) -> tuple[str, str]:
        for name in ("model", "data"):
            (folder / name).mkdir()
            (folder / name / "file").write_text(name)
        return str(folder / "model"), str(folder / "data")

    options = table2.parser().parse_args(["--small", "--device", "cpu", "--seeds", "3"])
    options.output = tmp_path
    commands.begin(options, make, seeds=((1, 2), (1,)), tasks=(("cola",), ("rte",)))
    assert (options.seeds, options.tasks) == ([3], ("cola",))
    with (Path(options.model) / "file").open() as read:  # as by another process
        (Path(options.data) / "file").write_text("damaged")
        commands.begin(options, make)
        assert read.read() == "model"
    assert (Path(options.data) / "file").read_text() == "data"
    assert [path.name for path in tmp_path.iterdir()] == ["replica"]


def test_devices_that_are_not_there_are_told():
    with pytest.raises(OutlierMergeError, match="--device cuda:77: "):
        commands.device_of("cuda:77")
    with pytest.raises(OutlierMergeError, match="--device gpu: "):
        commands.device_of("gpu")
    with pytest.raises(OutlierMergeError, match="--device meta: expected cpu, cuda"):
        commands.device_of("meta")


def test_a_command_ends_without_a_traceback(capsys):
    def ends(error: BaseException) -> str:
        def work() -> int:
            raise error

        assert commands.ended(work) == 1
        return capsys.readouterr().err

    assert "stopped; the same command goes on" in ends(KeyboardInterrupt())
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    assert "smaller --micro-batch" in ends(memory)
    assert "memory is too small: " in ends(
        RuntimeError("DefaultCPUAllocator: can't allocate memory")
    )
    assert (
        ends(OSError(28, "No space left on device"))
        == "error: [Errno 28] No space left on device\n"
    )
