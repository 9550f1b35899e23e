"""What a suite may say, and that everything else is refused before a model is touched."""

from __future__ import annotations

import ast
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from outliermerge.cli import main as cli
from outliermerge.errors import OutlierMergeError, SpecError
from outliermerge.evaluation import task_files
from outliermerge.evaluation.model_types import (
    HARNESSES,
    MODEL_TYPES,
    ModelType,
    check_packages,
    model_arguments,
)
from outliermerge.evaluation.suite import Suite, load_suite

SUITES = Path(__file__).parents[2] / "evals"
SHIPPED = ("mllm", "paper", "paper-judge", "text", "tiny", "tiny-text")

TASK = "- {title: MMStar, task: mmstar, metric: 'average,none'}\n"


def _write(folder: Path, text: str) -> Path:
    file = folder / "own.yaml"
    file.write_text(textwrap.dedent(text))
    return file


def _refusal(folder: Path, text: str, **overrides: object) -> str:
    file = _write(folder, text)
    with pytest.raises(SpecError) as caught:
        load_suite(file, **overrides)
    return str(caught.value).replace(str(file), "FILE")


def _load(folder: Path, text: str, **overrides: object) -> Suite:
    return load_suite(_write(folder, text), **overrides)


# What a suite says


def test_a_suite_says_only_its_tasks_and_the_rest_has_defaults(tmp_path):
    suite = _load(tmp_path, "tasks:\n" + TASK)
    (task,) = suite.document.tasks
    assert (suite.name, task.title, task.scale) == ("own", "MMStar", 100)
    assert (suite.tasks_folder, suite.data) == (None, None)
    assert (suite.limit_of(task), suite.generation_of(task)) == (None, {})
    assert (suite.document.harness, suite.model_type) == ("lmms_eval", "llava_hf")
    assert suite.document.batch_size == 1


def test_a_task_has_its_own_limit_and_generation_before_the_suites(tmp_path):
    suite = _load(
        tmp_path,
        """\
        limit: 9
        generation: {max_new_tokens: 4, temperature: 0}
        tasks:
        - {title: One, task: one, metric: m, limit: 2, generation: {max_new_tokens: 8}}
        - {title: Two, task: two, metric: m}
        """,
    )
    one, two = suite.document.tasks
    assert [suite.limit_of(task) for task in (one, two)] == [2, 9]
    assert suite.generation_of(one) == {"max_new_tokens": 8, "temperature": 0}
    assert suite.generation_of(two) == {"max_new_tokens": 4, "temperature": 0}


def test_folders_are_found_from_the_suites_file(tmp_path, monkeypatch):
    (tmp_path / "suites" / "tasks").mkdir(parents=True)
    (tmp_path / "sets").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = "tasks_folder: tasks\ndata: ../sets\ntasks:\n" + TASK
    (tmp_path / "suites" / "own.yaml").write_text(text)
    suite = load_suite("../suites/own.yaml")
    assert suite.tasks_folder is not None and suite.data is not None
    assert suite.tasks_folder.is_absolute() and suite.data.is_absolute()
    assert suite.tasks_folder.samefile(tmp_path / "suites" / "tasks")
    assert suite.data.samefile(tmp_path / "sets")


def test_the_commands_data_folder_is_found_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "suites" / "sets").mkdir(parents=True)
    (tmp_path / "here" / "sets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    suite = _load(tmp_path / "suites", "data: sets\ntasks:\n" + TASK, data="sets")
    assert suite.data == tmp_path / "here" / "sets"


# What the command replaces


def test_the_command_replaces_what_the_suite_says(tmp_path):
    text = "model_type: vllm\nbatch_size: 4\ndevice: auto\ntasks:\n" + TASK
    document = _load(
        tmp_path, text, model_type="llava_hf", batch_size=1, device="cpu", dtype="bfloat16"
    ).document
    assert (document.model_type, document.batch_size) == ("llava_hf", 1)
    assert (document.device, document.dtype) == ("cpu", "bfloat16")


def test_what_the_command_leaves_out_stays(tmp_path):
    text = "load_in_8bit: true\nlimit: 3\ntasks:\n" + TASK
    document = _load(tmp_path, text, load_in_8bit=None, limit=None).document
    assert document.load_in_8bit and document.limit == 3
    assert not _load(tmp_path, text, load_in_8bit=False).document.load_in_8bit


def test_the_commands_limit_is_of_each_task_whatever_the_suite_says(tmp_path):
    text = "tasks:\n- {title: One, task: one, metric: m, limit: 500}\n"
    suite = _load(tmp_path, text, limit=2)
    assert suite.limit_of(suite.document.tasks[0]) == 2


def test_the_commands_generation_wins_key_by_key(tmp_path):
    suite = _load(
        tmp_path,
        """\
        generation: {max_new_tokens: 64}
        tasks:
        - {title: One, task: one, metric: m, generation: {temperature: 0.2}}
        """,
        generation={"temperature": 0.7},
    )
    found = suite.generation_of(suite.document.tasks[0])
    assert found == {"max_new_tokens": 64, "temperature": 0.7}


# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks:\n" + TASK + "limits: 3\n", "FILE:3:1: limits: unknown key 'limits'. "
         "Did you mean 'limit'?"),
        ("tasks:\n- {title: A, task: a, metrics: m, metric: m}\n", "FILE:2:23: tasks[0].metrics: "
         "unknown key 'metrics'. Did you mean 'metric'?"),
        ("tasks:\n- {title: A, task: a}\n", "FILE:2:3: tasks[0]: `metric` is missing"),
        ("limit: 3\n", "FILE:1:1: `tasks` is missing"),
        ("tasks:\n" + TASK + "limit: 3\nlimit: 4\n", "FILE:4:1: the key 'limit' stands twice, "
         "first in line 3"),
        ("tasks: [\n", "FILE:2:1: not valid YAML"),
        ("- one\n- two\n", "FILE:1:1: found a list, expected a mapping with `tasks`"),
        ("", "FILE: found nothing, expected a mapping with `tasks`"),
        ("tasks: []\n", "FILE:1:8: tasks: must not be empty"),
        ("tasks: mmstar\n", "FILE:1:8: tasks: found 'mmstar'"),
        ("tasks: [mmstar]\n", "FILE:1:9: tasks[0]: found 'mmstar'"),
        ("limit: 0\ntasks:\n" + TASK, "FILE:1:8: limit: found 0"),
        ("limit: '3'\ntasks:\n" + TASK, "FILE:1:8: limit: found '3'"),
        ("limit: 2.5\ntasks:\n" + TASK, "FILE:1:8: limit: found 2.5"),
        ("limit: true\ntasks:\n" + TASK, "FILE:1:8: limit: found True"),
        ("batch_size: -1\ntasks:\n" + TASK, "FILE:1:13: batch_size: found -1"),
        ("load_in_8bit: 1\ntasks:\n" + TASK, "FILE:1:15: load_in_8bit: found 1"),
        ("judge: sometimes\ntasks:\n" + TASK, "FILE:1:8: judge: found 'sometimes'"),
        ("dtype: float8\ntasks:\n" + TASK, "FILE:1:8: dtype: found 'float8'"),
        ("model_type: llava\ntasks:\n" + TASK, "FILE:1:13: model_type: lmms_eval has no model "),
        ("generation: 4\ntasks:\n" + TASK, "FILE:1:13: generation: found 4"),
        (
            "generation: {max_new_tokens: -3}\ntasks:\n" + TASK,
            "FILE:1:30: generation.max_new_tokens: found -3, expected a whole number from 1",
        ),
        ("generation:\ntasks:\n" + TASK, "FILE:1:12: generation: found nothing, "
         "expected a mapping"),
        ("data: ''\ntasks:\n" + TASK, "FILE:1:7: data: must not be empty"),
        ("tasks:\n- {title: '', task: a, metric: m}\n", "FILE:2:11: tasks[0].title: "
         "must not be empty"),
        ("tasks:\n- {title: A, task: a, metric: m, scale: 10}\n", "FILE:2:41: tasks[0].scale: "
         "found 10"),
        ("tasks:\n- {title: A, task: a, metric: m}\n- {title: B, task: a, metric: n}\n",
         "FILE:3:20: tasks[1].task: 'a' stands twice, first in tasks[0]"),
        ("tasks:\n- {title: A, task: a, metric: m}\n- {title: A, task: b, metric: n}\n",
         "FILE:3:11: tasks[1].title: 'A' stands twice, first in tasks[0]"),
        ("data: nowhere\ntasks:\n" + TASK, "FILE:1:7: data: no such folder: "),
        ("tasks_folder: own.yaml\ntasks:\n" + TASK, "FILE:1:15: tasks_folder: no such folder: "),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line_and_column(tmp_path, text, message):
    assert _refusal(tmp_path, text).startswith(message)


def test_all_mistakes_of_a_suite_are_told_at_once(tmp_path):
    text = "limit: 0\nbatch_size: 0\ntasks:\n- {title: A, task: a}\n"
    places = [line.partition(": ")[0] for line in _refusal(tmp_path, text).splitlines()]
    assert sorted(places) == ["FILE:1:8", "FILE:2:13", "FILE:4:3"]


def test_mistakes_of_types_hide_none_beyond_them(tmp_path):
    text = """\
    limit: 0
    tasks:
    - {title: avg, task: a, metric: m}
    - {title: B, task: b, metrics: m}
    - {title: C, task: c, metric: m, generation: {max_tokens: 4}}
    device: tpu
    data: nowhere
    limit: 3
    dtype: bf16
    """
    told = _refusal(tmp_path, text).splitlines()
    assert [line.split(": ")[0] for line in told] == [
        "FILE:3:11", "FILE:4:23", "FILE:5:47", "FILE:6:9", "FILE:7:7", "FILE:8:1"
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "dtype"), [("bf16", "bfloat16"), ("FP16", "float16")])
def test_a_dtype_is_taken_in_its_usual_spellings(tmp_path, text, dtype):
    assert _load(tmp_path, f"dtype: {text}\ntasks:\n" + TASK).document.dtype == dtype
    assert _load(tmp_path, "tasks:\n" + TASK, dtype=text).document.dtype == dtype


@pytest.mark.parametrize("title", ["avg", "gain"])
def test_a_title_that_the_table_has_already_is_refused(tmp_path, title):
    # Hours later the table would refuse it.
    message = _refusal(tmp_path, f"tasks:\n- {{title: {title}, task: a, metric: m}}\n")
    assert message.startswith("FILE:2:11: tasks[0].title: ") and repr(title) in message


@pytest.mark.parametrize("value", ["2024-05-01", ".nan", ".inf", "!!set {a}"])
@pytest.mark.parametrize("key", ["generation", "model_args"])
def test_a_setting_that_json_cannot_hold_is_refused(tmp_path, key, value):
    # Records and the request to lmms-eval are JSON.
    message = _refusal(tmp_path, f"{key}: {{seed: {value}}}\ntasks:\n" + TASK)
    assert message.startswith("FILE:1:") and f"{key}.seed" in message


def test_a_suite_that_is_not_there_or_not_text_is_told(tmp_path):
    with pytest.raises(SpecError, match=r"absent\.yaml: no such suite"):
        load_suite(tmp_path / "absent.yaml")
    with pytest.raises(SpecError, match="is a folder, expected a YAML file"):
        load_suite(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"tasks: \xff\xfe")
    with pytest.raises(SpecError, match=r"binary\.yaml: is no UTF-8 text"):
        load_suite(tmp_path / "binary.yaml")


# What a model type refuses


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: 2\n", "FILE:1:13: batch_size: llava_hf takes one question at a time"),
        ("model_type: qwen2_5_vl\nload_in_8bit: true\n",
         "FILE:2:15: load_in_8bit: qwen2_5_vl cannot load in 8 bit here"),
        ("model_type: vllm\nload_in_8bit: true\n",
         "FILE:2:15: load_in_8bit: vllm cannot load in 8 bit here"),
        ("model_type: qwen2_5_vl\ndtype: float16\n",
         "FILE:2:8: dtype: qwen2_5_vl takes the checkpoint's dtype: leave it at auto"),
        ("model_args: {pretrained: x}\n",
         "FILE:1:14: model_args.pretrained: 'pretrained' is set by the command"),
        ("model_type: vllm\nmodel_args: {model: x}\n",
         "FILE:2:14: model_args.model: 'model' is set by the command"),
        ("model_args: {device_map: auto}\n",
         "FILE:1:14: model_args.device_map: 'device_map' is set by the command"),
    ],
)  # fmt: skip
def test_what_a_model_type_cannot_take_is_refused(tmp_path, text, message):
    assert _refusal(tmp_path, f"{text}tasks:\n{TASK}") == message


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "vllm"])
def test_other_model_types_take_batches(tmp_path, model_type):
    suite = _load(tmp_path, f"model_type: {model_type}\nbatch_size: 8\ntasks:\n{TASK}")
    assert suite.document.batch_size == 8


@pytest.mark.parametrize(
    "overrides",
    [
        {"limit": 0},
        {"dtype": "float8"},
        {"batch_size": 2},
        {"model_type": "vllm", "load_in_8bit": True},
        {"data": "nowhere"},
    ],
)
def test_a_mistake_of_the_command_is_not_blamed_on_the_suite(tmp_path, overrides):
    assert _refusal(tmp_path, "tasks:\n" + TASK, **overrides).startswith("command line: ")


# At the command line


@pytest.mark.parametrize("setting", ["max_new_tokens", "=4", ""])
def test_a_generation_setting_without_a_key_or_value_is_refused(tmp_path, capsys, setting):
    file = _write(tmp_path, "tasks:\n" + TASK)
    code = cli.main(
        ["eval", "m", "--suite", str(file), "--output", str(tmp_path / "o"),
         f"--generation={setting}"]
    )  # fmt: skip
    assert code == 2
    assert f"--generation {setting}: expected KEY=VALUE" in capsys.readouterr().err


def test_a_mistake_in_a_suite_ends_with_exit_code_2_and_leaves_nothing(tmp_path, capsys):
    file = _write(tmp_path, "tasks: 3\n")
    output = tmp_path / "scores"
    assert cli.main(["eval", "model", "--suite", str(file), "--output", str(output)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {file}:1:8: tasks: ")
    assert not output.exists()


def test_a_model_type_whose_packages_are_absent_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(MODEL_TYPES, "vllm", ModelType("model", packages=("json", "no_such_one")))
    with pytest.raises(OutlierMergeError, match=r"^vllm needs .*: pip install no-such-one$"):
        check_packages("vllm", load_in_8bit=False)
    check_packages("llava_hf", load_in_8bit=True)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_suite_names_tasks_that_there_are(name):
    suite = load_suite(SUITES / f"{name}.yaml")
    assert suite.document.judge == (name == "paper-judge")
    for task in suite.document.tasks:
        ours = task_files.own_files(suite.tasks_folder, suite.data)
        definition = task_files.definition_of(task.task, ours, suite.document.harness)
        config, _ = task_files._keys(definition.file, None, ())
        listed = config.get("metric_list") or config["aggregate_metric_list"]  # of a group
        metrics = {entry["metric"] for entry in listed[0]}
        assert task.metric.partition(",")[0] in metrics


@pytest.mark.parametrize(
    ("harness", "name"),
    [(harness, name) for harness in HARNESSES for name in HARNESSES[harness].model_types],
)
def test_a_model_type_has_the_arguments_that_it_is_given(harness, name):
    """The classes are read, not imported: they import vllm and others."""
    text = {"hf": "huggingface.py", "vllm": "vllm_causallms.py"}
    file = text[name] if harness == "lm_eval" else f"simple/{name}.py"
    (home,) = find_spec(harness).submodule_search_locations
    tree = ast.parse(Path(home, "models", file).read_text())
    taken = {
        argument.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        for argument in [*node.args.args, *node.args.kwonlyargs]
    }
    _, given = model_arguments(
        name, path="m", device="cpu", dtype="auto", load_in_8bit=False, extra={}, harness=harness
    )
    if (harness, name) == ("lmms_eval", "vllm"):
        taken.add("dtype")  # it hands on to vllm what it does not know
    assert given.keys() | {"batch_size"} <= taken
    assert ("dtype" in given) == HARNESSES[harness].model_types[name].takes_dtype


def test_internvl2_reads_few_generation_settings(tmp_path):
    text = "model_type: internvl2\ngeneration: {SETTING: 1}\ntasks:\n" + TASK
    _load(tmp_path, text.replace("SETTING", "num_beams"))
    said = "no generation setting 'temperature'"
    assert said in _refusal(tmp_path, text.replace("SETTING", "temperature"))


def test_every_suite_that_ships_is_looked_at():
    names = {path.stem for path in SUITES.glob("*.yaml")}
    assert names == set(SHIPPED)
