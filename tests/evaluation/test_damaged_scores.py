"""Every file that `eval` and `compare` read, damaged in every way: refused in a message, or told.

A tree is made as an evaluation leaves it, one file of it is damaged, and a command is called.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from outliermerge.cli.main import main as cli
from outliermerge.evaluation import chart, task_files
from outliermerge.evaluation import evaluate as evaluate_module
from outliermerge.evaluation.scores import load_scores

FRAME = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl", "train": ["more.jsonl"]}},
}
TASKS = {
    "a.yaml": {"task": "a", "include": ["frame", "frame2"], "group": ["all"]},
    "frame": {"include": "frame2", **FRAME},
    "frame2": {"output_type": "generate_until"},
    "g.yaml": {"group": "g", "task": ["a", {"task": "h", "group_alias": "H"}]},
    "h.yaml": {"group": "h", "task": ["a"]},
}
SUITE = {
    "tasks_folder": "tasks",
    "data": "sets",
    "device": "cpu",
    "limit": 4,
    "generation": {"max_new_tokens": 4},
    "tasks": [
        {"title": "A", "task": "a", "metric": "accuracy,none", "scale": 100, "limit": 3},
        {"title": "G", "task": "g", "metric": "accuracy,none", "generation": {"until": ["x"]}},
    ],
}
MANIFEST = {
    "spec": {"merge_method": "min_sigma", "models": ["x", "y"], "parameters": {"t": 2.0}},
}


@contextmanager
def _worker(request: Mapping[str, Any], **_: Any) -> Iterator[tuple[Any, Any]]:
    """Stands for lmms-eval's process: a score for each task at once, but the last fails."""

    def events() -> Iterator[dict[str, Any]]:
        yield {"event": "loaded", "image_backend": "pil"}
        for entry in request["tasks"]:
            yield {"event": "started", "title": entry["title"]}
            if entry["title"] == "G":
                yield {"event": "failed", "title": "G", "reason": "no reason"}
                continue
            Path(entry["answers_path"]).write_text('{"doc_id": 0}\n')
            result = {
                "score": 50.0, "metrics": {entry["metric"]: 0.5}, "num_samples": 2,
                "num_empty": 1, "units": {"0": 0.0, "1": 100.0}, "seconds": 1.5,
            }  # fmt: skip
            yield {"event": "finished", "title": entry["title"], "result": result}

    yield Mock(**{"wait.return_value": 0}), events()


def _make(root: Path) -> None:
    for name in ("tasks", "sets", "model"):
        (root / name).mkdir(parents=True)
    for name, content in TASKS.items():
        (root / "tasks" / name).write_text(yaml.safe_dump(content, sort_keys=False))
    (root / "suite.yaml").write_text(yaml.safe_dump(SUITE, sort_keys=False))
    for name in ("questions.jsonl", "more.jsonl"):
        (root / "sets" / name).write_text("{}\n")
    (root / "model" / "config.json").write_text("{}")
    (root / "model" / "model.safetensors").write_bytes(b"weights")
    (root / "model" / "outliermerge.json").write_text(json.dumps(MANIFEST))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("made") / "tree"
    _make(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "worker", _worker)
        patch.setattr(chart, "draw", lambda table, path: None)
        # Not to search lmms-eval's two thousand files for each name that there is none of.
        patch.setattr(task_files, "util", Mock(**{"find_spec.return_value": None}))
        assert cli(_eval(root)) == 1  # one task fails
        (record,) = (root / "out" / "records").glob("*.json")
        record.with_suffix(".jsonl").rename(record.with_name("a.jsonl"))
        record.with_name("a.jsonl").rename(record.with_suffix(".jsonl"))
        yield root


@pytest.fixture
def tree(made: Path, tmp_path: Path) -> Path:
    return _copied(made, tmp_path / "tree")


def _copied(made: Path, root: Path) -> Path:
    shutil.copytree(made, root)
    return root


def _eval(root: Path) -> list[str]:
    arguments = ["eval", str(root / "model"), "--suite", str(root / "suite.yaml")]
    return [*arguments, "--output", str(root / "out")]


def _compare(root: Path) -> list[str]:
    return ["compare", str(root / "out")]


def _file(root: Path, name: str) -> Path:
    """The file of a name; RECORD and ANSWERS are those of the one record."""
    if name in ("RECORD", "ANSWERS"):
        (record,) = (root / "out" / "records").glob("*.json")
        return record if name == "RECORD" else record.with_suffix(".jsonl")
    return root / name


class Said:
    """What a command has said, which is looked at in any case."""

    def __init__(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        self.code = cli(arguments)
        self.out, self.err = capsys.readouterr()
        both = self.out + self.err
        assert self.code in (0, 1, 2)
        assert "Traceback" not in both
        assert all(sign.isprintable() or sign == "\n" for sign in both), repr(both)[:2000]
        assert len(self.err) < 2000
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) <= 1
        self.refused = bool(errors)
        assert not self.refused or (self.code in (1, 2) and self.out == "")


# Ways to damage a file, whatever it holds


def _replaced(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(change(file.read_bytes()))


def _other(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(file: Path) -> None:
        file.unlink()
        make(file)

    return change


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda file: file.unlink(),
    "empty": _replaced(lambda data: b""),
    "blank": _replaced(lambda data: b" \n\t\n"),
    "a quarter": _replaced(lambda data: data[: len(data) // 4]),
    "half": _replaced(lambda data: data[: len(data) // 2]),
    "all but the last bytes": _replaced(lambda data: data[:-3]),
    "zeros at the end": _replaced(lambda data: data[:-5] + b"\0" * 5),
    "zeros": _replaced(lambda data: b"\0" * len(data)),
    "no text": _replaced(lambda data: data[:20] + b"\xff\xfe" + data[20:]),
    "BOM": _replaced(lambda data: b"\xef\xbb\xbf" + data),
    "UTF-16": _replaced(lambda data: data.decode().encode("utf-16")),
    "twice": _replaced(lambda data: data + data),
    "something behind": _replaced(lambda data: data + b"\n}"),
    "a control sign": _replaced(lambda data: data[:10] + b"\x1b[2J" + data[10:]),
    "deep": _replaced(lambda data: b"[" * 100_000),
    "deep and whole": _replaced(lambda data: b"[" * 5000 + b"]" * 5000),
    "web page": _replaced(lambda data: b"<!DOCTYPE html><html></html>"),
    "folder": _other(lambda file: file.mkdir()),
    "pipe": _other(os.mkfifo),
    "link to nothing": _other(lambda file: file.symlink_to("nothing")),
    "link to itself": _other(lambda file: file.symlink_to(file.name)),
    "link to zeros": _other(lambda file: file.symlink_to("/dev/zero")),
    "gigantic": lambda file: os.truncate(file, 1 << 40),
    "large": _replaced(lambda data: data + b" " * (70 << 20)),
    **{
        f"is {text[:20]}": _replaced(lambda data, text=text: text.encode())
        for text in ("null", "true", "3", "-0.5", "NaN", "Infinity", "1e999", '"text"', "[]", "{}",
                     "[[1]]", '{"a": 1}', '{"a": 1, "a": 2}', "9" * 5000, '"\\ud800"')
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["out/scores.json", "RECORD"])
@pytest.mark.parametrize("way", DAMAGE)
def test_compare_refuses_a_damaged_file_by_its_name(tree, capsys, way, name):
    file = _file(tree, name)
    DAMAGE[way](file)
    said = Said(_compare(tree), capsys)
    assert said.refused and said.code == 1 and file.name in said.err


@pytest.mark.parametrize("way", [way for way in DAMAGE if way != "gigantic"])
def test_compare_refuses_other_answers_than_were_scored(tree, capsys, way):
    file = _file(tree, "ANSWERS")
    DAMAGE[way](file)
    said = Said(_compare(tree), capsys)
    # Where answers were removed, for their size, the numbers are still those that were measured.
    absent = way in ("missing", "link to nothing")
    assert said.refused != absent and (absent or file.name in said.err)


EVAL_READS = (
    "suite.yaml",
    *(f"tasks/{name}" for name in TASKS),
    "model/outliermerge.json",
    "model/config.json",
    "sets/questions.jsonl",
    "out/fingerprints.json",
    "out/scores.json",
    "out/scores.md",
    "out/work/lock",
    "RECORD",
    "ANSWERS",
)
# The model's files and data are hashed whole, and what is overwritten is not read.
HASHED = ("model/config.json", "sets/questions.jsonl", "ANSWERS")
# A quarter is tried in every run of the tests, each way and each file among them.
EVAL_CASES = [
    pytest.param(way, name, marks=pytest.mark.faults if number % 4 else ())
    for number, (way, name) in enumerate(itertools.product(DAMAGE, EVAL_READS))
    if way != "gigantic" or name not in HASHED
]


@pytest.mark.parametrize(("way", "name"), EVAL_CASES)
def test_eval_refuses_a_damaged_file_by_its_name_or_goes_on(tree, capsys, way, name):
    file = _file(tree, name)
    DAMAGE[way](file)
    said = Said(_eval(tree), capsys)
    if said.refused:
        assert file.name in said.err
    elif absent := _absent_data(tree):
        assert [failure.reason for failure in _scores(tree, "A")] == [
            f"its data {absent} is not in {tree / 'sets'}"
        ]
    else:
        assert [score.score for score in _scores(tree, "A")] == [50.0]
        assert Said(_compare(tree), capsys).code == 0


def _absent_data(root: Path) -> str | None:
    """Return the first data file that the task names, and that is not there."""
    text = (root / "tasks" / "frame").read_text(encoding="utf-8-sig", errors="replace")
    named = re.findall(r"\w+\.jso\w*", text)
    return next((name for name in named if not (root / "sets" / name).is_file()), None)


def _scores(root: Path, title: str) -> list[Any]:
    return [model.tasks[title] for model in load_scores(root / "out").models]


# Each value of a file, replaced by each kind of value


REMOVE = object()
WRONG: list[Any] = [
    REMOVE, None, True, False, -1, 3.5, -0.5, 10**30, 10**400, 1e308, float("nan"), float("inf"),
    "", "text", "a\x1b[2J\nb|" * 50, "\ud800", "../a", "/dev/zero", "x" * 100_000, "a\0b",
    [], [1], [None], ["text"], {}, {"a": 1}, {"\ud800": 1}, [[[]]],
]  # fmt: skip


def _paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each value of a document."""
    if before:
        yield before
    entries = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else entries:
        yield from _paths(inner, (*before, key))


def _with(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if value is REMOVE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


def _variants(document: Any, every: int) -> Iterator[tuple[str, Any]]:
    """Yield changes of a document with the key that is changed: each, or every so many."""
    cases = itertools.product(_paths(document), WRONG)
    for number, (path, value) in enumerate(cases):
        if number % every == 0:
            changed = _with(document, path, value)
            if repr(changed) != repr(document):
                yield str(path[-1]), changed
    yield "unknown", {**document, "unknown": 1}
    yield "x" * 20, {**document, "x" * 5000: 1}


def _without_checksums(root: Path) -> None:
    """Make of a tree one that an earlier version has written."""
    for file in (root / "out" / "scores.json", _file(root, "RECORD")):
        content = json.loads(file.read_text())
        del content["checksum"]
        content.pop("answers", None)
        for model in content.get("models", ()):
            for task in model["tasks"].values():
                task.pop("checksum", None)
        file.write_text(json.dumps(content))


# Of all these changes a part is tried in every run of the tests; all of them by `make faults`.
EVERY = pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.faults), 11])


@EVERY
@pytest.mark.parametrize("name", ["out/scores.json", "RECORD"])
def test_compare_shows_nothing_that_was_changed(tree, capsys, name, every, record_property):
    file = _file(tree, name)
    num_tried = 0
    for key, content in _variants(json.loads(file.read_text()), every):
        if key == "checksum" and content.get("checksum") is None:
            continue  # as of an earlier version, below
        file.write_text(json.dumps(content))
        said = Said(_compare(tree), capsys)
        assert said.code == 1 and said.refused and file.name in said.err, content
        num_tried += 1
    assert num_tried > 300 / every
    record_property("points", num_tried)


@EVERY
@pytest.mark.parametrize("name", ["out/scores.json", "RECORD"])
def test_of_scores_without_checksums_values_of_a_wrong_kind_are_refused_by_their_key(
    tree, capsys, name, every, record_property
):
    _without_checksums(tree)
    file = _file(tree, name)
    variants = [*_variants(json.loads(file.read_text()), every)]
    record_property("points", len(variants))
    for key, content in variants:
        file.write_text(json.dumps(content))
        said = Said(_compare(tree), capsys)
        if said.refused:
            assert file.name in said.err
            assert key[:20] in said.err or "lone surrogate" in said.err or said.err.count("\n") == 1
        else:
            assert "of an earlier version, which wrote no checksums" in said.out


@pytest.mark.parametrize("checksums", [True, False])
def test_a_score_changed_in_both_places_is_not_shown_without_a_word(tree, capsys, checksums):
    if not checksums:
        _without_checksums(tree)
    for file in (tree / "out" / "scores.json", _file(tree, "RECORD")):
        file.write_text(file.read_text().replace("50.0", "99.0"))
    said = Said(_compare(tree), capsys)
    if checksums:
        assert said.refused and "are not those that eval wrote" in said.err
    else:
        assert "99.0" in said.out and "cannot be told" in said.out


def test_a_checksum_stands_layout_and_whole_numbers_without_a_point(tree, capsys):
    # As other programs write what they read.
    for file in (tree / "out" / "scores.json", _file(tree, "RECORD")):
        content = json.loads(file.read_text(), parse_float=lambda t: float(t) if float(t) % 1 else
                             int(float(t)))  # fmt: skip
        file.write_text(json.dumps(dict(reversed(content.items()))))
    said = Said(_compare(tree), capsys)
    assert said.code == 0 and "50.0" in said.out and "checksum" not in said.out


def test_records_that_changed_places_are_told(tree, capsys):
    (tree / "model" / "model.safetensors").write_bytes(b"other")
    record = _file(tree, "RECORD")
    scores = (tree / "out" / "scores.json").read_text()
    cli(_eval(tree))
    (other,) = set((tree / "out" / "records").glob("*.json")) - {record}
    (tree / "out" / "scores.json").write_text(scores)
    other.replace(record)
    other.with_suffix(".jsonl").replace(record.with_suffix(".jsonl"))
    capsys.readouterr()
    said = Said(_compare(tree), capsys)
    assert said.refused and record.name in said.err


def test_what_was_changed_is_scored_again_and_said(tree, capsys):
    record = _file(tree, "RECORD")
    record.write_text(record.read_text().replace("50.0", "99.0"))
    said = Said(_eval(tree), capsys)
    assert f"model: A is scored again: {record}: was changed" in said.err
    assert "A 50.0" in said.err and Said(_compare(tree), capsys).code == 0


@EVERY
@pytest.mark.parametrize("name", ["suite.yaml", *(f"tasks/{n}" for n in TASKS)])
def test_eval_refuses_values_of_a_wrong_kind_in_yaml_or_goes_on(tree, capsys, name, every):
    file = tree / name
    whole = yaml.safe_load(file.read_text())
    num_refused = 0
    for _, content in _variants(whole, every):
        if len(content) == 0 or "10000" in repr(content)[:20_000]:
            continue  # a number of thousands of signs: YAML itself is refused, once is enough
        file.write_text(yaml.dump(content))
        said = Said(_eval(tree), capsys)
        if said.refused:
            num_refused += 1
            assert file.name in said.err or "tasks" in said.err
    assert num_refused > 0 or every > 1 or name == "tasks/frame2"


@EVERY
@pytest.mark.parametrize("name", ["model/outliermerge.json", "out/fingerprints.json"])
def test_eval_takes_or_refuses_every_value_of_a_manifest_and_of_remembered_hashes(
    tree, capsys, name, every
):
    file = tree / name
    for _, content in _variants(json.loads(file.read_text()), every):
        file.write_text(json.dumps(content))
        said = Said(_eval(tree), capsys)
        assert not said.refused or file.name in said.err
        if name == "out/fingerprints.json":
            assert not said.refused


# What task files can say of one another


def _say(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text + "\n")


CIRCLES: dict[str, dict[str, str]] = {
    "includes itself": {"a": "task: a\ninclude: a.yaml"},
    "includes itself by another name": {"a": "task: a\ninclude: ../tasks/./a.yaml"},
    "includes in a circle": {"a": "task: a\ninclude: b.yaml", "b": "include: [c.yaml]",
                             "c": "include: a.yaml"},
    "includes a circle": {"a": "task: a\ninclude: b.yaml", "b": "include: b.yaml"},
    "group of itself": {"a": "group: a\ntask: a"},
    "group of a list of itself": {"a": "group: a\ntask: [a]"},
    "group of a mapping of itself": {"a": "group: a\ntask: [{task: a}]"},
    "groups in a circle": {"a": "group: a\ntask: [b]", "b": "group: b\ntask: [{task: c}]",
                           "c": "group: c\ntask: [a]"},
    "group of a circle": {"a": "group: a\ntask: [b]", "b": "group: b\ntask: [b]"},
    "includes nothing there": {"a": "task: a\ninclude: nothing"},
    "includes a file that does": {"a": "task: a\ninclude: b.yaml", "b": "include: nothing"},
    "includes a folder": {"a": "task: a\ninclude: ."},
    "includes what is no name": {"a": "task: a\ninclude: [1]"},
    "includes a long name": {"a": f"task: a\ninclude: {'x' * 5000}"},
    "includes a list": {"a": "task: a\ninclude: b.yaml", "b": "[1]"},
    "includes zeros": {"a": "task: a\ninclude: /dev/zero"},
    "stands for more than it says": {
        "a": "task: a\n" + "\n".join(
            f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9) if n else 1}]" for n in range(12)
        )
    },
    "contains itself": {"a": "task: a\ndataset_kwargs: &x {data_files: *x}"},
    "another's damage, which lmms-eval reads": {"a": "task: a", "b": "x: *unknown"},
}  # fmt: skip


@pytest.mark.parametrize("way", CIRCLES)
def test_task_files_that_cannot_be_meant_are_refused(tree, capsys, way):
    shutil.rmtree(tree / "tasks")
    (tree / "tasks").mkdir()
    _say(tree / "tasks", **CIRCLES[way])
    if way == "group of itself":  # a task of the name of its group, as lmms-eval has some
        assert not Said(_eval(tree), capsys).refused
        return
    suite = {**SUITE, "tasks": [SUITE["tasks"][0]]}
    (tree / "suite.yaml").write_text(yaml.safe_dump(suite))
    said = Said(_eval(tree), capsys)
    assert said.refused and said.code == 2
    assert str(tree / "tasks") in said.err or "/dev/zero" in said.err


def test_files_that_include_many_that_include_many_are_read_in_bounds(tree):
    (tree / "tasks" / "n0").write_text("x: 1\n")
    for n in range(1, 18):
        (tree / "tasks" / f"n{n}").write_text(f"include: [n{n - 1}, n{n - 1}]\n")
    _say(tree / "tasks", a="task: a\ninclude: n17")
    with pytest.raises(ValueError, match="more than 2000 files"):
        task_files.task_files("a", tree / "tasks", None)


def test_groups_that_share_groups_are_read_once(tmp_path):
    _say(tmp_path, t0="task: t0")
    for n in range(1, 40):
        _say(tmp_path, **{f"t{n}": f"group: t{n}\ntask: [t{n - 1}, {{task: t{n - 1}}}]"})
    assert len(task_files.task_files("t39", tmp_path, None)) == 40
