"""What would fail only after a model has been loaded is found out before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outliermerge.cli.main import main as cli
from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation import evaluate as evaluate_module
from outliermerge.evaluation.early import check_models, lacking_by_task
from outliermerge.evaluation.suite import load_suite

SUITES = Path(__file__).parents[2] / "evals"
TEXT = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LLAVA = {"model_type": "llava", "vision_config": {}, "text_config": TEXT}


def _model(folder: Path, config: dict) -> tuple[str, Path]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder.name, folder


@pytest.mark.parametrize(
    ("model_type", "config", "said"),
    [
        ("llava_hf", TEXT, "is of type llama, a text model that sees no pictures."),
        ("qwen2_5_vl", TEXT, "is of type llama, a text model that sees no pictures."),
        ("qwen2_5_vl", LLAVA, "is of type llava. model_type='llava_hf' takes it."),
        ("llava_hf", {"model_type": "qwen2_5_vl", "vision_config": {}},
         "is of type qwen2_5_vl. model_type='qwen2_5_vl' takes it."),
        ("llava_hf", {"model_type": "llava_llama", "mm_vision_tower": "x"},
         "is of type llava_llama."),
    ],
)  # fmt: skip
def test_a_model_that_its_model_type_does_not_load_is_refused(tmp_path, model_type, config, said):
    models = [_model(tmp_path / "one", config), _model(tmp_path / "two", config)]
    with pytest.raises(OutlierMergeError) as raised:
        check_models(model_type, models)
    first, second, last = str(raised.value).split("\n")
    assert first == f"model 'one' {said}"
    assert second == f"model 'two' {said}"
    assert last.startswith(f"The model type {model_type} takes ")


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("llava_hf", LLAVA), ("vllm", TEXT), ("llava_hf", {}), ("qwen2_5_vl", {"model_type": None})],
)
def test_others_are_left_to_lmms_eval(tmp_path, model_type, config):
    check_models(model_type, [_model(tmp_path / "one", config)])


def test_a_checkpoint_that_lacks_its_own_code_is_refused(tmp_path):
    # InternVL's: the config names some files, which import from others beside them.
    classes = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XModel",
               "AutoTokenizer": ["there--tokens.Tokens", None]}  # fmt: skip
    name, folder = _model(tmp_path / "one", {"model_type": "internvl_chat", "auto_map": classes})
    (folder / "configuration_x.py").write_text("from .parts import Part\n")
    with pytest.raises(OutlierMergeError) as raised:
        check_models("internvl2", [(name, folder)])
    assert "its folder lacks modeling_x.py, parts.py. Copy the .py files" in str(raised.value)
    check_models("vllm", [(name, folder)])  # runs no code of it, unless told to
    with pytest.raises(OutlierMergeError, match=r"modeling_x\.py"):
        check_models("vllm", [(name, folder)], own_code=True)
    for file in ("modeling_x.py", "parts.py"):
        (folder / file).write_text("")
    check_models("internvl2", [(name, folder)])


@pytest.mark.parametrize(
    ("folder", "kind", "said"),
    [
        ("merged", "qwen3_vl", None),
        ("merged-30B-A3B", "qwen3_vl_moe", None),
        ("merged", "qwen3_vl_moe", "has no such part, but its type is qwen3_vl_moe"),
        ("merged-A3B", "qwen3_5", "has one, but its type is qwen3_5"),
    ],
)
def test_lmms_eval_tells_a_mixture_of_experts_by_its_path(tmp_path, folder, kind, said):
    model = _model(tmp_path / folder, {"model_type": kind, "vision_config": {}})
    if said is None:
        check_models("qwen3_vl", [model])
    else:
        with pytest.raises(OutlierMergeError, match=f"{said}. Rename the folder"):
            check_models("qwen3_vl", [model])


def test_a_text_model_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_module, "worker", None)
    _, model = _model(tmp_path / "text", TEXT)
    suite = str(SUITES / "tiny.yaml")
    assert cli(["eval", str(model), "--suite", suite, "--output", str(tmp_path / "out")]) == 1
    assert "a text model that sees no pictures" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "task", "command"),
    [
        ("tiny", "tiny_attributes", "python evals/family/data.py evals/data"),
        ("tiny", "tiny_mathematics", "python evals/family/data.py evals/data"),
        ("paper", "geoqa_direct", "python evals/geoqa.py QUESTIONS ANSWERS IMAGES "
         "evals/data/geoqa/test.parquet"),
    ],
)  # fmt: skip
def test_the_suites_that_ship_name_the_commands_that_make_their_data(tmp_path, name, task, command):
    suite = load_suite(SUITES / f"{name}.yaml", data=str(tmp_path))
    reason = lacking_by_task(suite)[task]
    assert reason.startswith("its data ")
    assert reason.endswith(f"is not in {tmp_path}. To make it: {command}")
    assert Path(command.split()[1]).name in {p.name for p in SUITES.rglob("*.py")}


def _suite(folder: Path, data_files: str) -> Path:
    (folder / "tasks").mkdir(parents=True)
    (folder / "sets").mkdir()
    (folder / "tasks" / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {data_files}}}\n"
    )
    file = folder / "suite.yaml"
    file.write_text(
        "tasks_folder: tasks\ndata: sets\ntasks: [{title: Own, task: own, metric: 'm,none'}]\n"
    )
    return file


@pytest.mark.parametrize(
    ("data_files", "present", "lacking"),
    [
        ("{test: a.jsonl}", "", "a.jsonl"),
        ("{test: a.jsonl}", "sets/a.jsonl", None),
        ("{test: a.jsonl}", "tasks/a.jsonl", None),
        ("{test: [a.jsonl, b.jsonl]}", "sets/a.jsonl", "b.jsonl"),
        ("{test: 'x/*.jsonl'}", "sets/x/1.jsonl", None),
        ("{test: 'x/*.jsonl'}", "sets/y/1.jsonl", "x/*.jsonl"),
        ("{test: 'https://host/a.jsonl'}", "", None),
    ],
)
def test_local_data_is_looked_for_where_lmms_eval_looks(tmp_path, data_files, present, lacking):
    file = _suite(tmp_path, data_files)
    if present:
        (tmp_path / present).parent.mkdir(exist_ok=True)
        (tmp_path / present).write_text("{}\n")
    reasons = lacking_by_task(load_suite(file))
    wanted = {"own": f"its data {lacking} is not in {tmp_path / 'sets'}"} if lacking else {}
    assert reasons == wanted
