"""The commands that look at weights, beside `stats`, whose file has its own."""

from __future__ import annotations

import csv
import json
import os
import shutil
import stat
import sys
import threading

import pytest
import torch
from checkpoints import family, save_tensors

from outliermerge.analysis.compare import compare_weights
from outliermerge.analysis.simulate import simulate
from outliermerge.analysis.spectra import layer_spectra
from outliermerge.cli.main import main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base, (a, b) = family("llama", tmp_path_factory.mktemp("family"))
    return {"base": str(base), "a": str(a), "b": str(b)}


def test_compare_weights_prints_pairs_and_writes_them(models, tmp_path, capsys):
    written = {kind: tmp_path / f"pairs.{kind}" for kind in ("json", "csv")}
    arguments = [part for kind, file in written.items() for part in (f"--{kind}", str(file))]
    code = main(["compare-weights", models["a"], models["b"], "--base", models["base"], *arguments])
    shown = capsys.readouterr().out
    wanted = compare_weights([models["a"], models["b"]], base=models["base"])
    assert code == 0 and f"{wanted.pairs[0].cosine:.4f}" in shown
    found = json.loads(written["json"].read_text())
    assert found["pairs"][0]["conflict_ratio"] == wanted.pairs[0].conflict_ratio
    rows = list(csv.DictReader(written["csv"].read_text().splitlines()))
    assert [float(row["std_difference"]) for row in rows] == [
        pair.std_difference for pair in wanted.tensors
    ]


def test_compare_weights_prints_a_matrix_of_three_models(models, capsys):
    assert main(["compare-weights", *models.values()]) == 0
    shown = capsys.readouterr().out
    wanted = compare_weights(list(models.values()))
    rows = [line.split() for line in shown.splitlines()]
    at = rows.index(["cosine", "A", "B", "C"])
    matrix = wanted.matrix("cosine")
    assert rows[at + 1] == ["A", *(f"{value:.4f}" for value in matrix[0])]


@pytest.mark.parametrize("by", ["model", "module"])
@pytest.mark.parametrize("num", [2, 3])
def test_conflicts_are_told_of_task_vectors_only(models, tmp_path, capsys, by, num):
    third = tmp_path / "third"
    shutil.copytree(models["a"], third)
    given = [models["a"], models["b"], str(third)][:num]
    for base, has in (([], False), (["--base", models["base"]], True)):
        assert main(["compare-weights", *given, *base, "--by", by]) == 0
        table = capsys.readouterr().out.rpartition("sign:")[0]
        assert ("conflict %" in table) is has
    for base, has in ((None, False), (models["base"], True)):
        table = compare_weights(given, base=base)._repr_html_()
        assert (">conflicts<" in table) is has


@pytest.mark.parametrize("by", ["layer", "module", "tensor"])
def test_compare_weights_prints_rows_by_what_is_asked_for(models, capsys, by):
    names = {
        "layer": "model.layers.1",
        "module": "mlp.down_proj",
        "tensor": "model.norm.weight",
    }
    assert main(["compare-weights", models["a"], models["b"], "--by", by]) == 0
    assert names[by] in capsys.readouterr().out


def test_layers_prints_spectra_and_fingerprint_distances(models, capsys):
    assert main(["layers", models["a"], models["b"], "--values", "4"]) == 0
    shown = capsys.readouterr().out
    assert "mlp.gate_proj" in shown and "distance between the models' σ" in shown
    assert main(["layers", models["a"], "--values", "4", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = layer_spectra(models["a"], num_values=4)
    first = found["models"][0]["modules"][0]
    assert first["singular_values"] == [list(row) for row in wanted.modules[0].singular_values]
    assert found["fingerprint_distances"] == [[0.0]]


def test_simulate_prints_labels_beside_the_papers_and_draws(tmp_path, capsys):
    png = tmp_path / "fig7.png"
    assert main(["simulate", "--points", "50000", "--png", str(png)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    labels = {each.noise: each.stats.label for each in simulate(num_points=50_000).weights}
    assert next(row for row in rows if row[:1] == ["0.05"])[-2:] == [labels[0.05], "sharp"]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert main(["simulate", "--points", "1000", "--seed", "7", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 7


def test_report_writes_a_page(models, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", models["a"], "--base", models["base"], "-o", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compare-weights", "a"], 2, "found 1 model(s) to compare, expected two or more"),
        (["compare-weights", "a", "a"], 2, "is the same model as"),
        (["compare-weights", "a", "b", "--t", "-1"], 2, "--t: found -1.0"),
        (["compare-weights", "a", "absent"], 1, "absent"),
        (["layers", "flat"], 1, "flat: found no type of module"),
        (["layers", "a", "--values", "1"], 2, "--values: found 1"),
        (["simulate", "--points", "9"], 2, "--points: found 9"),
        (["simulate", "--points", "1000", "--png", "no/x.png"], 1, "no/x.png: cannot be written"),
        (["compare-weights", "a", "b", "--csv", "-"], 2, "--csv: found '-', expected a file"),
        (["layers", "a", "--json", ""], 2, "--json: found '', expected a file"),
        (["compare-weights", "a", "b", "--csv", "x", "--json", "x"], 2, "expected a file of its"),
        (["compare-weights", "a", "b", "--json", "."], 1, ".: cannot be written: it is a folder"),
        (["report", "a", "-o", "x.html", "--png", "flat/config.json"], 1, "expected a folder"),
        (["report", "a", "-o", "no/x.html"], 1, "cannot be written: there is no folder no"),
        (["report", "a", "-o", "flat"], 1, "flat: cannot be written: it is a folder"),
        (["report", "a", "-o", "x.html", "--t", "9"], 2, "--t: found 9.0"),
        (["report", "a"], 2, "-o/--output"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(
    models, tmp_path, monkeypatch, capsys, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    save_tensors(tmp_path / "flat", {"w": torch.randn(4, 4)})
    assert main([models.get(argument, argument) for argument in arguments]) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["flat"]


def test_a_missing_package_is_told_before_anything_is_written(
    models, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    files = [str(tmp_path / name) for name in ("stats.csv", "stats.parquet")]
    assert main(["stats", models["a"], "--csv", files[0], "--parquet", files[1]]) == 1
    said = capsys.readouterr().err
    assert said == "error: --parquet needs pyarrow: pip install pyarrow\n"
    assert list(tmp_path.iterdir()) == []


def test_names_that_would_control_a_terminal_do_no_harm(tmp_path, capsys):
    name = "layers.0.\x1b[31m[bold]q.weight"
    folder = tmp_path / "dir"
    save_tensors(folder, {name: torch.randn(40, 40), "experts.0.w1.weight": torch.randn(8, 8)})
    written = tmp_path / "stats.json"
    assert main(["stats", str(folder), "--by", "tensor", "--json", str(written)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "[bold]" in shown
    assert {row["module"] for row in json.loads(written.read_text())["tensors"]} == {
        "layers.*.\x1b[31m[bold]q",
        "experts.*.w1",
    }


@pytest.mark.parametrize("command", ["stats", "layers"])
def test_an_interrupted_command_that_starts_over_does_not_say_otherwise(
    models, monkeypatch, capsys, command
):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("outliermerge.planning.inputs.open_checkpoint", interrupt)
    assert main([command, models["a"]]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_pipe_and_a_link_are_written_through(models, tmp_path):
    pipe, real, link = tmp_path / "pipe", tmp_path / "real.json", tmp_path / "link.json"
    os.mkfifo(pipe)
    link.symlink_to(real)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    assert main(["stats", models["a"], "--csv", str(pipe), "--json", str(link)]) == 0
    reader.join()
    assert got[0].startswith("name,layer,module") and stat.S_ISFIFO(pipe.stat().st_mode)
    assert link.is_symlink() and json.loads(real.read_text())["model"] == models["a"]


@pytest.mark.parametrize("by", ["module", "layer", "tensor"])
@pytest.mark.parametrize("width", [100, 200])
def test_the_footnote_of_stats_says_what_each_column_is(models, monkeypatch, capsys, by, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["stats", models["a"], "--by", by, "--small", "0.0123"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    head, _, footnote = shown.rpartition("kept: within 3σ")
    assert footnote and ("|x| < 0.0123" in footnote) is ("small %" in head) is (width == 200)
    assert ("mean±deviation" in head) is (by != "tensor")
    assert ("how many matrices have it" in footnote) is (by != "tensor")
    assert "label: the" in footnote


@pytest.mark.parametrize("quiet", [[], ["-q"]])
@pytest.mark.parametrize("json_to", [None, "file", "-"])
@pytest.mark.parametrize("command", ["stats", "layers", "compare-weights"])
def test_notes_come_once_and_after_the_output(
    models, tmp_path, capfd, monkeypatch, command, json_to, quiet
):
    save_tensors(tmp_path / "c", {**{f"layers.{n}.up.weight": torch.randn(9, 9) for n in range(4)},
                                  "number": torch.zeros(3, dtype=torch.int64)})  # fmt: skip
    shutil.copytree(tmp_path / "c", tmp_path / "d")
    given = ["c", "d"] if command != "stats" else ["c"]
    to = [] if json_to is None else ["--json", "x.json" if json_to == "file" else "-"]
    monkeypatch.chdir(tmp_path)
    assert main([command, *given, *to, *quiet]) == 0
    out, err = capfd.readouterr()
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert "note: " not in out
    assert len(notes) == (not quiet and json_to != "-")
