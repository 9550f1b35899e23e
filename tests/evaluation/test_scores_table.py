"""Scores as a file, as a table like the paper's Table 4, and as a chart."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import xxhash

from outliermerge.errors import OutlierMergeError
from outliermerge.evaluation import chart
from outliermerge.evaluation.formats import sealed, write_json
from outliermerge.evaluation.models import merge_of
from outliermerge.evaluation.paper import PAPER_TITLES, paper_rows, with_paper
from outliermerge.evaluation.scores import (
    Failure,
    ModelScores,
    Score,
    Scores,
    load_scores,
)
from outliermerge.evaluation.table import make_table

SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "load_in_8bit": False,
    "limit": None,
    "image_backend": "pil",
    "versions": {"lmms_eval": "0.7.3", "transformers": "5.23.0", "torch": "2.13.0"},
    "date": "2026-11-21",
}


def score(*units, task="a_task", metric="accuracy,none", stderr=1.0, **other):
    names = {f"question {number}": float(unit) for number, unit in enumerate(units)}
    mean = sum(units) / len(units)
    return Score(task, metric, mean, stderr, len(units), 0, 2.0, units=names, **other)


def model(name, method=None, fingerprint=None, parameters=None, **tasks):
    merge = None if method is None else {"method": method, "parameters": parameters or {}}
    return ModelScores(name, f"merged/{name}", fingerprint or f"weights of {name}", merge, tasks)


def scores(*models, titles=None, suite="tiny", **settings):
    titles = titles or tuple(dict.fromkeys(title for each in models for title in each.tasks))
    return Scores(suite, tuple(titles), SETTINGS | settings, models)


def rows(table):
    return {row.name: row for row in table.rows}


def lines(table):
    """The Markdown table alone, a list of texts a line."""
    text = table.as_markdown().split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]


def column(table, title):
    header, _, *body = lines(table)
    return {row[0]: row[header.index(title)] for row in body if row[0]}


# Order and cells


def test_parents_come_first_then_a_rule_the_average_others_and_min_sigma_by_falling_t():
    table = make_table(
        [
            scores(
                model("t2", "min_sigma", parameters={"t": 2}, A=score(1)),
                model("graded", "min_sigma", parameters={"t": [1, 9]}, A=score(1)),
                model("ties", "ties", A=score(1)),
                model("t3", "min_sigma", parameters={"t": 3.0}, A=score(1)),
                model("second parent", A=score(1)),
                model("average", "linear", A=score(1)),
                model("arithmetic", "task_arithmetic", A=score(1)),
                model("default t", "min_sigma", A=score(1)),
                model("first parent", A=score(1)),
            )
        ]
    )
    assert [row[0] for row in lines(table)[2:]] == [
        "second parent",
        "first parent",
        "",
        "average",
        "ties",
        "arithmetic",
        "t3",
        "t2",
        "default t",
        "graded",
    ]


def test_a_cell_shows_one_decimal_and_its_error_and_the_best_are_bold_with_ties():
    table = make_table(
        [
            scores(
                model("low", A=score(10.0, 20.0, stderr=5.04), B=score(50.0)),
                model("high", A=score(44.04, stderr=None), B=score(40.0)),
                model("tied as shown", A=score(43.96, stderr=0.25), B=score(49.94)),
            )
        ]
    )
    assert column(table, "A") == {
        "low": "15.0 ± 5.0",
        "high": "**44.0**",
        "tied as shown": "**44.0** ± 0.2",
    }
    assert table.best("B") == {"low"}


def test_one_model_is_not_the_best_of_anything():
    assert "**" not in make_table([scores(model("alone", A=score(1, 2)))]).as_markdown()


def test_a_failure_shows_with_its_reason_and_a_task_not_asked_for_as_a_dash():
    table = make_table(
        [
            scores(
                model("a", A=score(60, stderr=None), B=Failure("b_task", "out of\n memory")),
                model("b", A=score(80, stderr=None)),
            )
        ]
    )
    assert column(table, "B") == {"a": "failed", "b": "–"}
    assert "a, B: failed: out of memory" in table.notes
    assert "- a, B: failed: out of memory\n" in table.as_markdown()
    assert table.as_dict()["rows"][0]["tasks"]["B"] == {"failed": "out of\n memory"}
    assert "B" not in table.as_dict()["rows"][1]["tasks"]


def test_a_name_with_a_bar_stays_one_cell():
    table = make_table([scores(model("a|b", A=score(1)))])
    assert "| a\\|b " in table.as_markdown()


def test_a_task_cannot_take_the_name_of_a_computed_column():
    with pytest.raises(OutlierMergeError, match="'avg'"):
        make_table([scores(model("a", avg=score(1)))])


def test_no_models_are_refused():
    with pytest.raises(OutlierMergeError, match="no models"):
        make_table([scores(titles=("A",))])


def test_the_facts_stand_below_and_missing_ones_are_left_out():
    text = make_table([scores(model("a", A=score(1)), limit=8)]).as_markdown()
    assert (
        "\nSuite tiny, limit 8, device cpu, dtype float32, 8 bit no, image backend pil, "
        "lmms-eval 0.7.3, transformers 5.23.0, torch 2.13.0, 2026-11-21.\n"
    ) in text
    bare = Scores("tiny", ("A",), {}, (model("a", A=score(1)),))
    assert make_table([bare]).facts == ("Suite tiny",)


# avg and gain


def test_avg_is_over_the_tasks_that_all_models_have():
    table = make_table(
        [
            scores(
                model("a", A=score(10, stderr=3.0), B=score(30, stderr=4.0), C=score(90)),
                model("b", A=score(20, stderr=None), B=score(60), C=Failure("c", "no")),
            )
        ]
    )
    assert table.averaged == ("A", "B")
    assert rows(table)["a"].cell("avg").value == 20.0
    assert rows(table)["a"].cell("avg").stderr == 2.5  # √(3² + 4²) / 2
    assert rows(table)["b"].cell("avg").value == 40.0
    assert rows(table)["b"].cell("avg").stderr is None
    assert "avg is over A, B; not all models have a score on C." in table.notes


def test_without_a_common_task_there_is_no_avg_and_a_note():
    table = make_table(
        [scores(model("a", A=score(1)), model("b", "linear", B=score(2)), titles=("A", "B"))]
    )
    assert column(table, "avg") == {"a": "–", "b": "–"}
    assert column(table, "gain") == {"a": "–", "b": "–"}
    assert any(note.startswith("No avg") for note in table.notes)


def test_gain_and_its_error_are_those_of_paired_differences():
    generator = np.random.default_rng(0)
    ours = {title: generator.integers(0, 2, 30) * 100.0 for title in "AB"}
    base = {title: generator.integers(0, 2, 30) * 100.0 for title in "AB"}
    table = make_table(
        [
            scores(
                model("ours", "ties", **{title: score(*ours[title]) for title in "AB"}),
                model("average", "linear", **{title: score(*base[title]) for title in "AB"}),
            )
        ]
    )
    differences = [ours[title] - base[title] for title in "AB"]
    errors = [d.std(ddof=1) / np.sqrt(30) for d in differences]
    gain = rows(table)["ours"].cell("gain")
    assert table.baseline == "average"
    assert gain.value == pytest.approx(np.mean([d.mean() for d in differences]), rel=1e-12)
    assert gain.stderr == pytest.approx(np.sqrt(errors[0] ** 2 + errors[1] ** 2) / 2, rel=1e-12)


def test_units_are_paired_by_name_and_not_by_place():
    """Equal answers in another order: every difference is zero."""
    first = score(0, 100, 100)
    second = replace(first, units=dict(reversed(first.units.items())))
    table = make_table([scores(model("a", "ties", A=first), model("average", "linear", A=second))])
    assert column(table, "gain") == {"average": "**0.0**", "a": "**0.0** ± 0.0"}
    assert rows(table)["a"].cell("gain").stderr == 0.0


def test_a_constant_difference_has_no_error_and_a_sign():
    table = make_table(
        [
            scores(
                model("parent", A=score(0, 40)),
                model("average", "linear", A=score(20, 60)),
                model("t2", "min_sigma", A=score(50, 90)),
            )
        ]
    )
    assert column(table, "gain") == {
        "parent": "-20.0 ± 0.0",
        "average": "0.0",
        "t2": "**+30.0** ± 0.0",
    }


def test_one_question_gives_a_gain_without_an_error():
    table = make_table(
        [
            scores(
                model("a", "ties", A=score(100, stderr=None)),
                model("average", "linear", A=score(0, stderr=None)),
            )
        ]
    )
    assert rows(table)["a"].cell("gain").value == 100.0
    assert rows(table)["a"].cell("gain").stderr is None


def test_other_questions_give_a_gain_without_an_error_and_a_note():
    table = make_table(
        [
            scores(
                model("a", "ties", A=score(100, 0), B=score(1, 2)),
                model("average", "linear", A=score(0, 0, 0), B=score(1, 2)),
            )
        ]
    )
    assert rows(table)["a"].cell("gain").value == 25.0
    assert rows(table)["a"].cell("gain").stderr is None
    (note,) = table.notes
    assert note.startswith("a: its gain has no standard error: its questions of A are not those of")


def test_another_baseline_can_be_chosen_and_an_unknown_one_is_refused():
    run = scores(model("parent", A=score(10)), model("average", "linear", A=score(30)))
    assert column(make_table([run], baseline="parent"), "gain")["average"] == "**+20.0**"
    with pytest.raises(OutlierMergeError, match=r"'avrage'.*Did you mean 'average'"):
        make_table([run], baseline="avrage")


@pytest.mark.parametrize(
    ("methods", "reason"),
    [(["ties"], "none of the models is"), (["linear", "linear"], "m0, m1 are all linear merges")],
)
def test_without_one_average_there_is_no_gain_and_a_note(methods, reason):
    models = [model(f"m{number}", name, A=score(1)) for number, name in enumerate(methods)]
    table = make_table([scores(*models)])
    assert "gain" not in lines(table)[0]
    assert table.as_dict()["rows"][0]["gain"] is None
    assert any(note.startswith("No gain") and reason in note for note in table.notes)


def test_json_has_the_numbers_unrounded():
    table = make_table(
        [
            scores(
                model("a", "ties", A=score(1 / 3, 2 / 3, stderr=1 / 7)),
                model("average", "linear", A=score(0, 0, stderr=0.0)),
            )
        ]
    )
    content = json.loads(json.dumps(table.as_dict(), allow_nan=False))
    assert content["rows"][1] == {
        "name": "a",
        "group": "merged",
        "tasks": {"A": {"score": 0.5, "stderr": 1 / 7}},
        "avg": 0.5,
        "avg_stderr": 1 / 7,
        "gain": 0.5,
        "gain_stderr": pytest.approx(np.std([1 / 3, 2 / 3], ddof=1) / np.sqrt(2), rel=1e-12),
        "best": ["A", "avg", "gain"],
    }
    assert content["baseline"] == "average"


# Several runs


def test_runs_are_put_together_with_the_titles_of_the_first_in_front():
    table = make_table(
        [
            scores(model("t2", "min_sigma", B=score(1), A=score(1)), titles=("B", "A")),
            scores(model("parent", A=score(2), C=score(2)), titles=("A", "C"), date="2026-11-22"),
        ]
    )
    assert table.titles == ("B", "A", "C")
    assert list(rows(table)) == ["parent", "t2"]
    assert table.averaged == ("A",)
    assert table.facts[-1] == "2026-11-21 / 2026-11-22"
    assert not any("differ" in note for note in table.notes)


def test_a_model_that_two_runs_scored_alike_is_one_row_with_the_tasks_of_both():
    again = score(10, record="other.json")
    table = make_table(
        [
            scores(model("parent", A=score(10), B=score(20))),
            scores(model("parent", A=replace(again, seconds=9.0), C=score(30))),
        ]
    )
    (row,) = table.rows
    assert [row.cell(title).value for title in "ABC"] == [10, 20, 30]


@pytest.mark.parametrize(
    ("other", "settings"),
    [
        (model("x", fingerprint="others", A=score(1)), {}),
        (model("x", fingerprint="same", A=score(2)), {}),
        (model("x", fingerprint="same", A=score(1)), {"limit": 1}),
    ],
    ids=["weights", "score", "settings"],
)
def test_models_of_one_name_that_differ_are_told_apart_by_their_run(other, settings):
    first = scores(model("x", fingerprint="same", A=score(1)), model("y", A=score(1)))
    table = make_table([first, scores(other, **settings)])
    assert list(rows(table)) == ["x (run 1)", "y", "x (run 2)"]


def test_models_of_unknown_weights_are_not_taken_for_one():
    unknown = replace(model("x", A=score(1)), fingerprint="")
    assert len(make_table([scores(unknown), scores(unknown)]).rows) == 2


def test_two_models_of_one_name_in_one_run_are_refused():
    with pytest.raises(OutlierMergeError, match="two models are called 'x'"):
        make_table([scores(model("x", A=score(1)), model("x", "linear", A=score(2)))])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"limit": 8}, "limit none / 8"),
        ({"dtype": "float16"}, "dtype float32 / float16"),
        ({"device": "cuda"}, "device cpu / cuda"),
        ({"load_in_8bit": True}, "8 bit no / yes"),
        ({"image_backend": "torchvision"}, "image backend pil / torchvision"),
        ({"versions": SETTINGS["versions"] | {"torch": "2.6.0"}}, "torch 2.13.0 / 2.6.0"),
    ],
)
def test_runs_that_differ_are_put_together_with_a_note(settings, told):
    runs = [scores(model("a", A=score(1))), scores(model("b", A=score(2)), **settings)]
    table = make_table(runs)
    assert f"The scores are of runs that differ: {told}." in table.notes
    assert told in table.facts


def test_one_title_scored_in_two_ways_has_a_note():
    other = score(1, metric="exact,none", task="b_task")
    runs = [scores(model("a", A=score(1))), scores(model("b", A=other))]
    note = "A is not the same score in all rows: a_task accuracy,none (a); b_task exact,none (b)."
    assert note in make_table(runs).notes


# The paper


def test_the_papers_averages_are_the_means_of_its_scores():
    """Each within the rounding of the printed scores, and so is each printed gain."""
    paper = {row.name: row for row in paper_rows()}
    averages = {}
    for name, row in paper.items():
        values = [row.cell(title).value for title in PAPER_TITLES]
        if None not in values:
            averages[name] = row.cell("avg").value
            assert np.mean(values) == pytest.approx(averages[name], abs=0.1), name
    assert len(averages) == 5
    for name in ("min-σ, t=3 (paper)", "min-σ, t=2 (paper)"):
        gain = averages[name] - averages["average (paper)"]
        assert paper[name].cell("gain").value == pytest.approx(gain, abs=0.1)


def test_the_papers_rows_stand_below_ours_and_do_not_compete():
    ours = make_table(
        [
            scores(
                model("average", "linear", Other=score(1, 2), GeoQA=score(10, 20)),
                model("t2", "min_sigma", Other=score(1, 2), GeoQA=score(11, 21)),
            )
        ]
    )
    table = with_paper(ours)
    assert table.titles == ("Other", "GeoQA", *PAPER_TITLES[:-1])
    assert table.columns[-2:] == ("avg", "gain")
    body = [row[0] for row in lines(table)[2:]]
    assert body[:4] == ["average", "t2", "", "LLaVA-v1.5-13B (paper)"]
    assert column(table, "GeoQA")["t2"] == "**16.0** ± 1.0"
    assert column(table, "GeoQA")["Math-LLaVA (paper)"] == "46.6"
    assert column(table, "Other")["Math-LLaVA (paper)"] == "–"
    assert column(table, "AI2D")["t2"] == "–"
    assert column(table, "AI2D")["min-σ, t=3 (paper)"] == "71.2"
    assert column(table, "MMMU")["LLaVA-v1.5-13B (paper)"] == "27.7"
    assert column(table, "gain") == {
        **dict.fromkeys(column(table, "gain"), "–"),
        "average": "0.0",
        "t2": "**+0.5** ± 0.0",
        "min-σ, t=3 (paper)": "+1.2",
        "min-σ, t=2 (paper)": "+2.0",
    }
    assert any("avg of (paper) is over other tasks" in note for note in table.notes)


def test_the_papers_avg_has_no_note_when_ours_is_over_the_same_tasks():
    tasks = {title: score(1) for title in reversed(PAPER_TITLES)}
    table = with_paper(make_table([scores(model("a", **tasks))]))
    assert not any("other tasks" in note for note in table.notes)


# The chart


def full_table(num_models=8):
    methods = [None, None, None, "linear", "ties", "task_arithmetic", "min_sigma", "min_sigma"]
    models = [
        model(f"m{number}", methods[number], **{f"T{task}": score(task, 50) for task in range(7)})
        for number in range(num_models)
    ]
    models[-1] = replace(models[-1], tasks={**models[-1].tasks, "T3": Failure("t", "no")})
    return make_table([scores(*models)])


@pytest.mark.parametrize("num_models", [1, 8])
def test_the_chart_is_a_png_of_a_sensible_size_written_without_pyplot(
    tmp_path, monkeypatch, num_models
):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    path = tmp_path / "scores.png"
    path.write_text("an older chart")
    chart.draw(full_table(num_models), path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert 900 <= width <= 2400
    assert 600 <= height <= 900
    assert [file.name for file in tmp_path.iterdir()] == ["scores.png"]


def test_the_chart_tells_all_rows_apart_and_parents_are_grey():
    table = with_paper(full_table())
    looks = dict(zip((row.name for row in table.rows), chart._looks(table), strict=True))
    assert len(set(looks.values())) == len(table.rows)
    for row in table.rows:
        colour, hatch = looks[row.name]
        assert (row.group == "merged") == colour.startswith("#")
        assert (row.group == "paper") == (hatch != "")


def test_the_papers_rows_and_a_table_without_scores_can_be_drawn(tmp_path):
    chart.draw(with_paper(full_table()), tmp_path / "paper.png")
    chart.draw(make_table([scores(model("a", A=Failure("a", "no")))]), tmp_path / "none.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_missing_matplotlib_is_told_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fresh = importlib.reload(chart)  # it imports nothing of matplotlib by itself
    with pytest.raises(OutlierMergeError, match=r"pip install matplotlib"):
        fresh.draw(full_table(), tmp_path / "scores.png")
    assert list(tmp_path.iterdir()) == []


def test_a_chart_in_no_folder_is_told(tmp_path):
    with pytest.raises(OutlierMergeError, match=r"absent/scores\.png: cannot be written"):
        chart.draw(full_table(1), tmp_path / "absent" / "scores.png")


# The file


def saved(folder):
    """Scores on disk: records beside scores.json, as an evaluation leaves them."""
    result = score(0, 100, record="records/a.json", metrics={"accuracy,none": 0.5})
    run = scores(
        model("σ", "min_sigma", parameters={"t": 2}, A=result, B=Failure("b_task", "no")),
        titles=("A", "B"),
    )
    (folder / "records").mkdir()
    names = ("record", "checksum")
    content = {name: value for name, value in vars(result).items() if name not in names}
    identity = {"model": "weights of σ", "task": result.task, "metric": result.metric}
    record = sealed({"identity": identity, "model": "merged/σ", "result": content, "answers": None})
    write_json(folder / result.record, record)
    result = replace(result, checksum=record["checksum"])
    run = replace(run, models=(replace(run.models[0], tasks={**run.models[0].tasks, "A": result}),))
    return run, run.save(folder)


def test_scores_are_loaded_as_they_were_saved(tmp_path):
    run, path = saved(tmp_path)
    assert path == tmp_path / "scores.json"
    assert load_scores(path) == load_scores(str(tmp_path)) == run
    assert run.failures == [("σ", "B", "no")]
    assert make_table([load_scores(path)]) == make_table([run])


def test_an_absent_scores_file_is_told(tmp_path):
    with pytest.raises(
        OutlierMergeError, match=r"scores\.json: no such file\. `outliermerge eval`"
    ):
        load_scores(tmp_path)


def test_a_missing_record_is_told_by_its_name(tmp_path):
    _, path = saved(tmp_path)
    (tmp_path / "records" / "a.json").unlink()
    with pytest.raises(OutlierMergeError, match=r"records/a\.json: no such file"):
        load_scores(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "it is cut off"),
        ("[]", r"the file: found \[\]"),
        ("null", "the file: found None"),
        ("{}", "format: found {}: Field required"),
        ('{"format": 2}', "format: found 2: Input should be 1"),
        ('{"format": 1, "suite": "tiny"}', "titles: found"),
        (b"\xff\xfe\x00", "UTF-16"),
        ("[" * 100_000, "nested|deep"),
    ],
)
def test_a_file_that_is_something_else_is_told(tmp_path, content, reason):
    path = tmp_path / "scores.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OutlierMergeError, match=rf"scores\.json: (.|\n)*{reason}"):
        load_scores(path)


@pytest.mark.parametrize("content", ["{", "{}", '{"result": {"task": "a"}}', '{"result": 3}'])
def test_a_broken_record_is_told(tmp_path, content):
    _, path = saved(tmp_path)
    (tmp_path / "records" / "a.json").write_text(content)
    with pytest.raises(OutlierMergeError, match=r"a\.json: (is not what|ends at line 1)"):
        load_scores(path)


@pytest.mark.parametrize("key", ["score", "stderr", "num_samples", "num_empty", "metric", "units"])
@pytest.mark.parametrize("name", ["scores.json", "records/a.json", "both"])
def test_a_number_that_was_changed_by_hand_is_told(tmp_path, key, name):
    _, path = saved(tmp_path)
    if key == "units" and name == "scores.json":
        return  # it has none
    for file in ("scores.json", "records/a.json") if name == "both" else (name,):
        content = json.loads((tmp_path / file).read_text())
        if file == "scores.json":
            found = content["models"][0]["tasks"]["A"]
        else:
            found = content["result"]
        if key in found:
            found[key] = {"1": 1.0} if key == "units" else "b" if key == "metric" else 7
        (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(
        OutlierMergeError, match=r"was changed|7 empty answers|is not that of `result`"
    ):
        load_scores(path)


def test_a_record_without_a_checksum_of_an_older_version_is_read(tmp_path):
    run, path = saved(tmp_path)
    for file in (path, tmp_path / "records" / "a.json"):
        content = json.loads(file.read_text())
        del content["checksum"]
        if file == path:
            del content["models"][0]["tasks"]["A"]["checksum"]
        file.write_text(json.dumps(content))
    loaded = load_scores(path)
    assert loaded == run and loaded.unsealed == ("σ",)
    (note,) = make_table([loaded]).notes[:1]
    assert note.startswith("σ: of an earlier version, which wrote no checksums")


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_record_whose_checksum_is_of_its_result_alone_is_read(tmp_path, is_changed):
    # As they were before the file of answers had a checksum too.
    run, path = saved(tmp_path)
    content = json.loads(path.read_text())
    del content["checksum"], content["models"][0]["tasks"]["A"]["checksum"]
    path.write_text(json.dumps(content))
    record = tmp_path / "records" / "a.json"
    content = json.loads(record.read_text())
    del content["answers"]
    result = json.dumps(content["result"], sort_keys=True).encode()
    content["checksum"] = xxhash.xxh3_128_hexdigest(result)
    if is_changed:
        content["result"]["units"] = dict.fromkeys(content["result"]["units"], 1.0)
    record.write_text(json.dumps(content))
    if is_changed:
        with pytest.raises(OutlierMergeError, match=r"records/a\.json: was changed"):
            load_scores(path)
    else:
        assert load_scores(path) == run


@pytest.mark.parametrize("name", ["scores.json", "records/a.json"])
def test_of_a_changed_number_both_files_the_key_and_both_values_are_told(tmp_path, name):
    _, path = saved(tmp_path)
    file = tmp_path / name
    text = file.read_text()
    assert '"score": 50.0' in text
    file.write_text(text.replace('"score": 50.0', '"score": 99.0'))
    ours, theirs = (99.0, 50.0) if file == path else (50.0, 99.0)
    told = rf"{path}: A of σ: score is {ours}, but {theirs} in {tmp_path}/records/a\.json: "
    with pytest.raises(OutlierMergeError, match=told):
        load_scores(path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
@pytest.mark.parametrize("name", ["scores.json", "records/a.json"])
def test_what_is_no_regular_file_is_told(tmp_path, kind, name):
    _, path = saved(tmp_path)
    file = tmp_path / name
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(file.name)
    with pytest.raises(OutlierMergeError, match=name.rpartition("/")[2]):
        load_scores(path)


def test_no_code_is_imported_that_a_models_manifest_names(tmp_path, monkeypatch):
    code = tmp_path / "hostile_method.py"
    code.write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\ndef merge(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = {"merge_method": "hostile_method:merge", "models": [{"model": "a"}, {"model": "b"}]}
    (tmp_path / "outliermerge.json").write_text(json.dumps({"spec": spec}))
    assert merge_of(tmp_path) == {"method": "hostile_method:merge", "parameters": {}}
    assert not (tmp_path / "imported").exists()


def test_a_folder_of_several_evaluations_names_them(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text("{}")
    with pytest.raises(OutlierMergeError, match=r"but 2 evaluations are in it\. Name one of them:"):
        load_scores(tmp_path)
