"""The benchmarks: what is built, measured, derived, shown, and told to have become worse."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import check  # noqa: E402
import copy_files  # noqa: E402
import plots  # noqa: E402
import suite  # noqa: E402
import tables  # noqa: E402
from build_checkpoints import build, num_model_bytes, num_parameters  # noqa: E402
from measure import FailedCommand, alternate, measure  # noqa: E402
from report import Report, all_ratios, fit, overheads, ratio  # noqa: E402

SECONDS = {"0.1B": 0.5, "0.5B": 1.0, "1.5B": 2.0, "3B": 3.5}  # 0.5 s + 1 s a billion parameters
BILLIONS = {"0.1B": 0.0, "0.5B": 0.5, "1.5B": 1.5, "3B": 3.0}


def run(wall: float, work: float, peak: float) -> dict[str, float]:
    times = {"wall_seconds": wall, "cpu_seconds": 2 * wall, "work_seconds": work}
    others = {"seconds": work + 0.125, "peak_anonymous_megabytes": peak}
    return times | others | {"disk_read_megabytes": 0.0}


def case(method: str, size: str, num_models: int, **runs: list[dict[str, float]]) -> dict:
    about = {"method": method, "size": size, "num_models": num_models}
    return about | {"name": f"{method}-{size}-{num_models}", "runs": runs}


def made_up() -> dict:
    """A report with figures that can be followed by hand."""
    cases = [
        case(
            "linear", size, 2,
            copy=[run(1, 0.5, 5), run(1, 1, 5), run(1, 1, 5)],
            outliermerge=[run(wall, 1, 200), run(wall, 1.2, 210), run(wall, 1.1, 190)],
            mergekit=[run(10 * wall, 0, 2000)] * 3,
        )
        for size, wall in SECONDS.items()
    ]  # fmt: skip
    cases += [
        case("task_arithmetic", "0.5B", n, outliermerge=[run(n + 1, n, 300)]) for n in (2, 3, 5, 8)
    ]
    swept = case("min_sigma", "0.5B", 2, outliermerge=[run(2, 1.5, 250)], sweep=[run(3, 2, 250)])
    swept["runs"]["outliermerge --no-kernels"] = [run(20, 15, 250)]
    helps = {"outliermerge --help": [run(0.25, 0, 10)], "mergekit --help": [run(5, 0, 300)]}
    about = {"date": "2026-01-02", "hardware": "2 cores", "versions": {"python": "3.11"}}
    return about | {
        "load_before": 0.5,
        "runs": 3,
        "num_parameters": {size: 1e9 * number for size, number in BILLIONS.items()},
        "cases": [*cases, swept, {"name": "start-up", "runs": helps}],
    }


@pytest.fixture(scope="module")
def report() -> Report:
    return Report(made_up())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build("tiny", tmp_path_factory.mktemp("built"), num_models=3)


def test_checkpoints_load_with_the_shapes_of_the_model_that_their_config_makes(built):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(built[0]))
    shapes = {name: value.shape for name, value in expected.named_parameters()}
    for folder in built:
        state = load_file(folder / "model.safetensors")
        assert {name: value.shape for name, value in state.items()} == shapes
        assert {value.dtype for value in state.values()} == {torch.bfloat16}
        assert sum(value.nbytes for value in state.values()) == num_model_bytes("tiny")


@pytest.mark.parametrize(
    ("size", "billions"),
    [("0.1B", 0.118), ("0.5B", 0.494), ("1.5B", 1.54), ("3B", 3.09), ("7B", 7.62)],
)
def test_sizes_are_what_they_are_called(size, billions):
    assert num_parameters(size) / 1e9 == pytest.approx(billions, rel=5e-3)


def test_fine_tunes_differ_from_the_base_by_independent_normal_numbers(built):
    base, *tasks = (
        torch.cat([value.double().flatten() for value in state.values()])
        for state in (load_file(folder / "model.safetensors") for folder in built)
    )
    deltas = torch.stack([task - base for task in tasks])
    assert base.std().item() == pytest.approx(0.02, rel=0.01)
    assert deltas.std(1).tolist() == pytest.approx([0.002] * 3, rel=0.01)
    assert deltas.mean(1).abs().max() < 1e-5
    scaled = deltas / deltas.std(1, keepdim=True)
    assert (scaled**4).mean(1).tolist() == pytest.approx([3.0] * 3, rel=0.02)
    assert (scaled.abs() < 1).double().mean(1).tolist() == pytest.approx([0.683] * 3, abs=0.01)
    correlations = torch.corrcoef(torch.cat([deltas, base[None]]))
    assert (correlations - torch.eye(4)).abs().max() < 5e-3
    # What bfloat16 rounds away; a delta that stays 0 elsewhere would be a copy.
    assert (deltas == 0).double().mean() < 0.04


def test_no_tensor_is_left_as_it_was(built):
    base, *tasks = (load_file(folder / "model.safetensors") for folder in built)
    for name, value in base.items():
        for task in tasks:
            assert not torch.equal(task[name], value), name


@pytest.mark.parametrize("options", [[], ["--direct"]], ids=["plain", "direct"])
def test_the_yardstick_reads_everything_once_and_writes_the_last(options, tmp_path):
    block = copy_files.BLOCK_BYTES[bool(options)]
    contents = [bytes([i]) * (2 * block + 12345 + i) for i in (1, 2)]
    files = [tmp_path / str(number) for number in range(2)]
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, copy_files.__file__, *options, tmp_path / "out", *files],
        capture_output=True,
        check=True,
    )
    said = json.loads(done.stdout)
    assert (tmp_path / "out").read_bytes() == contents[1]
    assert said["read_bytes"] == sum(map(len, contents))
    assert said["written_bytes"] == len(contents[1])
    assert said["work_seconds"] > 0 and said["sync_seconds"] > 0


HELD = """
import json, time
held = bytearray(200_000_000)
held[::4096] = b"x" * len(held[::4096])
time.sleep(0.1)
print(json.dumps({"work_seconds": 1.5, "other": 3}))
"""


def test_a_process_is_measured_and_heard():
    figures = measure([sys.executable, "-c", HELD])
    assert figures["peak_anonymous_megabytes"] == pytest.approx(205, rel=0.1)
    assert figures["wall_seconds"] > 0.1
    assert 0 < figures["cpu_seconds"] < figures["wall_seconds"] + 0.1
    assert figures["work_seconds"] == 1.5 and "other" not in figures


def test_commands_alternate_and_one_that_fails_is_named_and_left_out(tmp_path):
    note = f"open({str(tmp_path / 'log')!r}, 'a').write"
    commands = {
        "a": [sys.executable, "-c", f"{note}('a')"],
        "broken": [sys.executable, "-c", "raise SystemExit('no such command')"],
        "b": [sys.executable, "-c", f"{note}('b')"],
    }
    runs, failed = alternate(commands, 3)
    assert (tmp_path / "log").read_text() == "ababab"
    assert {name: len(measured) for name, measured in runs.items()} == {"a": 3, "b": 3}
    assert list(failed) == ["broken"] and "no such command" in failed["broken"]
    with pytest.raises(FailedCommand, match="exit status 1"):
        measure(commands["broken"])


def test_a_line_through_points_is_that_of_least_squares():
    # By hand: 1.5, 3 and 4.5 are off by ½, −1 and ½; the points are off their mean by −1, −1, 2.
    line = fit([(1, 2), (2, 2), (3, 5)])
    assert line is not None
    assert (line.slope, line.intercept, line.r_squared) == pytest.approx((1.5, 0.0, 0.75))


def test_two_points_make_no_line():
    assert fit([(1, 2), (2, 3), (2, 5)]) is None


def test_ratios_are_of_the_same_round(report):
    # 1 / 0.5, 1.2 / 1, 1.1 / 1: the median is not the ratio of the medians, 1.1.
    found = report.find("linear", "0.5B")
    assert ratio(found, "outliermerge", "copy", "work_seconds") == 1.2
    assert "| linear, over a plain copy | 1.20 (1.10–2.00) | 1.20" in tables.work(report)


def test_what_is_not_work_is_told_from_syncing(report):
    found = report.find("task_arithmetic", "0.5B", 5)  # 6 s in all, 5 s work, 0.125 s after it
    assert overheads(found) == [0.875]
    told = found | {"runs": {"outliermerge": [run(6, 5, 1) | {"sync_seconds": 0.25}]}}
    assert overheads(told) == [0.75]


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {name: rest for name, *rest in rows[2:]}


def test_tables_say_what_was_measured(report):
    assert cells(tables.mergekit(report))["linear, 1.5B"] == [
        "2.0", "4.0", "200", "20", "40", "2000", "10",
    ]  # fmt: skip
    assert cells(tables.memory(report))["linear, mergekit"] == ["2000"] * 4
    by_size = cells(tables.sizes(report))
    assert by_size["linear"] == ["0.50", "1.0", "2.0", "3.5", "1.0", "1.000"]
    assert by_size["task_arithmetic"] == ["–", "3.0", "–", "–", "–", "–"]
    by_count = cells(tables.models(report))
    assert by_count["task_arithmetic"] == ["3.0", "4.0", "6.0", "9.0", "1.0", "1.000"]
    assert cells(tables.start_up(report))["`--help`"] == ["0.25", "5.0"]
    assert list(cells(tables.extras(report)).values()) == [["10"], ["1.5"]]
    assert "2026-01-02: 2 cores; python 3.11" in tables.machine(report)


def test_goals_are_met_or_not(report):
    rows = cells(tables.goals(report))
    assert rows["linear, 1.5B: work over a plain copy"] == ["≤ 1.3", "1.20", "yes"]
    assert rows["linear, 1.5B: times as fast as mergekit"] == ["≥ 8", "10.00", "yes"]
    assert rows["a sweep of three over one run"] == ["≤ 1.8", "1.50", "yes"]
    slow = made_up()
    slow["cases"][2]["runs"]["mergekit"] = [run(15, 0, 2000)] * 3
    rows = cells(tables.goals(Report(slow)))
    assert rows["linear, 1.5B: times as fast as mergekit"] == ["≥ 8", "7.50", "no"]


def test_an_empty_report_makes_no_table():
    empty = Report(made_up() | {"cases": []})
    assert [write(empty) for name, write in tables.SECTIONS.items() if name != "machine"] == (
        [""] * (len(tables.SECTIONS) - 1)
    )


def test_markers_take_the_tables_and_nothing_else_changes():
    text = "a\n<!-- bench:work -->\nold\n<!-- /bench -->\nb\n<!-- bench:goals -->\n<!-- /bench -->"
    once = tables.filled(text, {"work": "| w |", "goals": "| g |"})
    assert once == (
        "a\n<!-- bench:work -->\n| w |\n<!-- /bench -->\nb\n"
        "<!-- bench:goals -->\n| g |\n<!-- /bench -->"
    )
    assert tables.filled(once, {"work": "| w |", "goals": "| g |"}) == once
    with pytest.raises(SystemExit, match="bench:goals is not measured; there is: work"):
        tables.filled(text, {"work": "| w |"})


def test_the_documents_and_the_plots_are_written_by_one_command(tmp_path, monkeypatch):
    written = (tmp_path / "README.md", tmp_path / "docs" / "measurements.md")
    written[1].parent.mkdir()
    for document in written:
        document.write_text("# x\n<!-- bench:start-up -->\n<!-- /bench -->\n")
    (tmp_path / "speed.json").write_text(json.dumps(made_up()))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["", "--results", str(tmp_path), "--write"])
    tables.main()
    assert all("| `--help` | 0.25 | 5.0 |" in document.read_text() for document in written)
    assert (tmp_path / "time_by_size.png").is_file()


def test_the_documents_show_the_committed_results():
    shown = ""
    for document in tables.documents():
        text = document.read_text()
        assert tables.filled(text, tables.sections()) == text, document
        shown += text
    assert all(f"<!-- bench:{name} -->" in shown for name in tables.sections())
    assert suite.RESULT.is_file()


def test_plots_are_drawn_of_what_was_measured(report, tmp_path):
    drawn = plots.draw(report, tmp_path)
    assert [path.name for path in drawn] == [
        "time_by_size.png", "memory_by_size.png", "time_by_models.png",
    ]  # fmt: skip
    for path in drawn:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") == 1400
    assert plots.draw(Report(made_up() | {"cases": []}), tmp_path / "none") == []


def test_a_report_is_no_worse_than_itself(report):
    found, num_compared = check.worse(report, report, 0.25)
    assert found == [] and num_compared == len(list(all_ratios(report))) > 10


@pytest.mark.parametrize(("factor", "worse"), [(1.2, 0), (1.3, 1), (0.1, 0)])
def test_a_slower_merge_is_worse_beyond_the_tolerance(report, factor, worse):
    new = made_up()
    for measured in new["cases"][2]["runs"]["outliermerge"]:
        measured["work_seconds"] *= factor
    found, _ = check.worse(Report(new), report, 0.25)
    assert len(found) == worse
    assert all(line.startswith("linear-1.5B-2: outliermerge over copy, work") for line in found)


def test_a_slower_machine_is_not_worse(report):
    new = made_up()
    for one in new["cases"]:
        for measured in one["runs"].values():
            measured[:] = [
                {key: value * (3 if "seconds" in key else 1) for key, value in figures.items()}
                for figures in measured
            ]
    assert check.worse(Report(new), report, 0.01)[0] == []


def test_memory_that_grows_with_the_model_is_worse(report):
    new = made_up()
    for measured in new["cases"][3]["runs"]["outliermerge"]:
        measured["peak_anonymous_megabytes"] *= 2
    found, _ = check.worse(Report(new), report, 0.25)
    assert "linear: outliermerge, memory of 3B over 0.1B: 1 became 2 (+100%)" in found


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (2.0, 1)])
def test_the_check_says_by_its_exit_status_and_lists_what_is_worse(tmp_path, factor, code):
    new = made_up()
    for one in new["cases"]:
        for measured in one["runs"].get("sweep", []):
            measured["wall_seconds"] *= factor
    for name, content in (("new.json", new), ("old.json", made_up())):
        (tmp_path / name).write_text(json.dumps(content))
    done = subprocess.run(
        [sys.executable, check.__file__, tmp_path / "new.json", tmp_path / "old.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert done.stderr == (
        "min_sigma-0.5B-2: sweep over outliermerge, wall: 1.5 became 3 (+100%)\n" if code else ""
    )


def test_reports_without_a_common_case_are_refused(tmp_path, monkeypatch):
    (tmp_path / "new.json").write_text(json.dumps(made_up() | {"cases": []}))
    (tmp_path / "old.json").write_text(json.dumps(made_up()))
    monkeypatch.setattr(sys, "argv", ["", f"{tmp_path}/new.json", f"{tmp_path}/old.json"])
    with pytest.raises(SystemExit, match="has no case in common with"):
        check.main()


def test_the_suite_says_what_disk_it_needs_and_starts_nothing_without_it(
    tmp_path, monkeypatch, capsys
):
    needed = 2 * num_parameters("3B") * 4  # a base, two task models, an output
    monkeypatch.setattr(
        suite.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": needed})
    )
    with pytest.raises(SystemExit, match="has too little space"):
        suite.check_disk(tmp_path, suite.CASES)
    assert f"needs {1.05 * needed / 1e9:.1f} GB" in capsys.readouterr().err


def test_cases_have_names_of_their_own_and_a_wrong_one_is_answered_with_them():
    names = suite.chosen_names([], suite.CASES)
    assert len(set(names)) == len(names)
    assert suite.chosen_names(["model_stock-0", "start"], suite.CASES) == [
        "start-up", "model_stock-0.1B-2", "model_stock-0.5B-2",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=r"--only karcher: no case .* min_sigma-0.5B-8"):
        suite.chosen_names(["karcher"], suite.CASES)


def test_only_results_of_the_same_machine_are_completed(tmp_path):
    path = tmp_path / "speed.json"
    now = {"hardware": "2 cores", "versions": {"torch": "2"}, "runs": 3}
    path.write_text(json.dumps(now | {"cases": ["measured"]}))
    assert suite.opened(path, now, go_on=True)["cases"] == ["measured"]
    assert suite.opened(path, now, go_on=False)["cases"] == []
    with pytest.raises(SystemExit, match=r"versions was \{'torch': '2'\}, is \{'torch': '3'\}"):
        suite.opened(path, now | {"versions": {"torch": "3"}}, go_on=True)


def test_the_suite_measures_writes_cleans_up_and_goes_on_where_it_stopped(tmp_path):
    (tmp_path / "build").mkdir()
    results = tmp_path / "results" / "speed.json"

    def suite_of(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, suite.__file__, "--tiny", "--runs", "1", "--results", results,
             "--folder", tmp_path / "build", *options],
            capture_output=True,
            text=True,
        )  # fmt: skip

    first = suite_of("--only", "task_arithmetic")
    assert first.returncode == 0, first.stderr
    assert (
        "needs 0.0 GB of disk" in first.stderr
        and "task_arithmetic-tiny-2, 1/1: copy" in first.stderr
    )
    then = suite_of("--resume", "--only", "task_arithmetic", "--only", "min_sigma")
    assert then.returncode == 0, then.stderr
    assert (
        "task_arithmetic-tiny-2" not in then.stderr
        and "min_sigma-tiny-2, 1/1: sweep" in then.stderr
    )
    assert list((tmp_path / "build").iterdir()) == []

    report = Report.load(results)
    summed, min_sigma = report.cases
    assert [summed["name"], min_sigma["name"]] == ["task_arithmetic-tiny-2", "min_sigma-tiny-2"]
    copies = list(tables.COPIES)
    assert list(summed["runs"]) == [*copies, "outliermerge", tables.LOW_MEMORY, "mergekit"]
    assert list(min_sigma["runs"])[4:] == [tables.TORCH, "sweep"]
    for (figures,) in (*summed["runs"].values(), *min_sigma["runs"].values()):
        assert all(math.isfinite(value) for value in figures.values())
        assert figures["wall_seconds"] > 0 and figures["peak_anonymous_megabytes"] > 1
    assert all(value > 0 for _, value in all_ratios(report))
    assert "task_arithmetic, tiny" in cells(tables.mergekit(report))
    assert {"hardware", "versions", "date", "load_before"} <= set(report.content)
