"""Searches: trials that `run` repeats, resumption, the winner on questions that were held out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
import yaml
from checkpoints import family, load_folder, save_tensors

import outliermerge
from outliermerge.cli.main import main as cli
from outliermerge.output.manifest_file import read_manifest
from outliermerge.output.options import RunOptions
from outliermerge.search.samplers import make_sampler
from outliermerge.search.space import Dimension
from outliermerge.search.trials import Trials
from outliermerge.search.workplace import Workplace
from outliermerge.storage.system import lock


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A base with weights 0, and models with weights around 1 and 0.2."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(40, 30)
    tensors = {"base": base, "a": base + 1, "b": base + 0.2}
    for name, tensor in tensors.items():
        noise = 0.01 * torch.randn(tensor.shape, generator=generator)
        save_tensors(folder / name, {"w": tensor + noise, "same": base})
    return folder


@pytest.fixture
def place(models, tmp_path, monkeypatch) -> Path:
    """A folder with a spec and a space; there `search` is run."""
    monkeypatch.chdir(tmp_path)
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(models / "base"),
        "models": [{"model": str(models / name)} for name in ("a", "b")],
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    space = "lambda: {low: 0.1, high: 1.5}\nmodels.2.weight: {low: 0, high: 1}\n"
    (tmp_path / "space.yaml").write_text(space)
    return tmp_path


def search(*words: str, suite: str = "scored:closeness", output: str = "out") -> int:
    given = ["spec.yaml", "--space", "space.yaml", "--suite", suite, "-o", output]
    return cli(["search", *given, "--questions", "8", "-q", *words])


def result(output: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(output, "result.json").read_text())
    return found


def tried(output: str = "out") -> list[Any]:
    return [
        (trial["point"], trial["state"], trial["values"], trial["steps"])
        for trial in result(output)["trials"]
    ]


class TestWinner:
    def test_it_beats_the_defaults_on_questions_that_no_trial_was_asked(self, place, capsys):
        assert search("--trials", "8") == 0
        found = result()
        rows = {row["name"]: row for row in found["rows"]}
        assert list(rows)[:4] == ["base", "a", "b", "the defaults"]
        best = rows[found["best"]["name"]]
        assert best["gain"] > 2 * best["stderr"] > 0
        assert found["questions"] == {"score": {"asked": 8, "searched": 20, "held_out": 20}}
        said = capsys.readouterr().out
        assert "Winner's curse" in said and "more than two standard errors" in said

    def test_its_spec_gives_the_bytes_that_were_scored(self, place):
        assert search("--trials", "6") == 0
        assert cli(["run", "out/best.yaml", "merged", "-q"]) == 0
        manifest = read_manifest(Path("merged"))
        lines = sorted(f"{name} {t['checksum']}\n" for name, t in manifest["tensors"].items())
        checksum = xxhash.xxh3_128_hexdigest("".join(lines).encode())
        assert checksum == result()["best"]["checksum"]
        assert checksum in Path("out/best.yaml").read_text()

    def test_where_no_trial_is_better_the_spec_stays_as_it_is(self, place):
        spec = yaml.safe_load(Path("spec.yaml").read_text())
        spec["parameters"] = {"lambda": 0.415}  # the weights' mean is 0.5
        Path("spec.yaml").write_text(yaml.safe_dump(spec))
        Path("space.yaml").write_text("lambda: [0.1, 1.5]\n")
        assert search("--trials", "2", "--sampler", "grid") == 0
        assert result()["best"]["name"] == "the defaults"
        assert "No trial is better" in result()["verdict"]
        assert yaml.safe_load(Path("out/best.yaml").read_text()) == spec

    def test_json_has_all_and_nothing_else_is_left(self, place, capsys):
        assert search("--trials", "3", "--json", suite="scored:loud") == 0
        assert json.loads(capsys.readouterr().out) == result()
        assert not [path for path in Path("out/work").iterdir() if path.suffix != ".lock"]
        assert {path.name for path in Path("out").iterdir()} == {
            "best.yaml", "result.json", "scores", "search.json", "search.md", "trials.sqlite",
            "work",
        }  # fmt: skip


class TestTrials:
    # More than TPE draws at random, and than a generation of NSGA-II.
    @pytest.mark.parametrize(
        ("sampler", "number"), [("tpe", 12), ("cmaes", 6),
                              pytest.param("nsga2", 18, marks=pytest.mark.faults)],
    )  # fmt: skip
    def test_what_a_trial_is_depends_on_those_before_and_on_its_number(
        self, sampler, number, tmp_path
    ):
        dimensions = [
            Dimension("a", 0.0, 1.0),
            Dimension("b", 1, 9, 2, is_whole=True),
            Dimension("c", 0.01, 1.0, log=True),
            Dimension("d", choices={"x": 1, "y": 2}),
        ]

        def tried_by(folder: str, parts: list[int], seed: int = 3) -> list[Any]:
            (tmp_path / folder).mkdir()
            for most in parts:
                trials = Trials(tmp_path / folder, 1)
                while running := trials.next(most, make_sampler(sampler, seed, [])):
                    point = [running.ask(each) for each in dimensions]
                    if running.number == most and most < number and not trials_left.get(folder):
                        trials_left[folder] = point  # it is left as by a kill
                        break
                    trials_left.pop(folder, None)
                    running.done([point[0] - abs(point[2] - 0.3)])
                found = [trial.point for trial in trials.all()]
                trials.close()
            return found

        trials_left: dict[str, Any] = {}
        whole = tried_by("whole", [number])
        assert tried_by("parts", [2, number - 1, number]) == whole
        assert tried_by("other", [2], seed=4) != whole[:2]
        assert {point["b"] for point in whole} <= {1, 3, 5, 7, 9}

    def test_another_seed_tries_others(self, place):
        for seed in ("0", "1"):
            assert search("--trials", "2", "--seed", seed, output=seed) == 0
        assert tried("0") != tried("1")

    def test_a_killed_search_goes_on_with_the_trial_that_it_was_at(self, place):
        assert search("--trials", "5", suite="scored:slow", output="whole") == 0
        words = ["spec.yaml", "--space", "space.yaml", "--suite", "scored:slow", "-o", "out"]
        command = [sys.executable, "-m", "outliermerge", "search", *words, "--questions", "8"]
        path = f"{Path(__file__).parent.parent}:{os.environ.get('PYTHONPATH', '')}"
        process = subprocess.Popen(
            [*command, "--trials", "5"],
            env={**os.environ, "PYTHONPATH": path, "SLOW_AT": "4"},
            stderr=subprocess.PIPE,
        )
        assert process.stderr
        for line in process.stderr:
            if b"trial 3/5" in line:
                break
        time.sleep(0.5)  # it is at the fourth, which takes for ever
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for trials in ("4", "5"):  # and again with more
            assert search("--trials", trials, suite="scored:slow") == 0
        assert tried("out") == tried("whole")
        assert len({json.dumps(point) for point, *_ in tried("out")}) == 5

    def test_hopeless_trials_are_stopped_after_a_part_of_the_questions(self, place):
        assert search("--trials", "9", "--sampler", "random") == 0
        found = result()["trials"]
        stopped = [trial for trial in found if trial["state"] == "stopped"]
        assert stopped and all(len(trial["steps"]) < 3 for trial in stopped)
        assert all(len(trial["steps"]) == 3 for trial in found if trial["state"] == "done")

    def test_a_grid_has_all_combinations(self, place):
        Path("space.yaml").write_text(
            "merge_method: [task_arithmetic, ties, linear]\n"
            "lambda: {low: 0.25, high: 0.75, step: 0.5}\ndensity: [0.5, 1]\n"
        )
        assert search("--sampler", "grid", "--trials", "99") == 0
        points = [point for point, *_ in tried()]
        assert len(points) == 2 + 2 * 2 + 1
        assert {"merge_method": "linear"} in points  # it has neither parameter
        assert {"merge_method": "ties", "lambda": 0.75, "density": "0.5"} in points

    def test_models_may_take_no_part(self, place):
        Path("space.yaml").write_text("models: {least: 1}\n")
        assert search("--sampler", "grid", "--trials", "9") == 0
        chosen = [point for point, *_ in tried()]
        assert chosen == [
            {"models.1": "in", "models.2": "in"},
            {"models.1": "in", "models.2": "out"},
            {"models.1": "out"},  # then the second is needed
        ]

    def test_tasks_are_objectives_of_nsga2(self, place):
        assert search("--sampler", "nsga2", "--trials", "8", suite="scored:two_tasks") == 0
        found = result()
        assert all(len(trial["values"]) == 2 for trial in found["trials"])
        scores = {trial["number"]: trial["values"] for trial in found["trials"]}
        front = {
            number
            for number, own in scores.items()
            if not any(
                all(a >= b for a, b in zip(other, own, strict=True)) and other != own
                for other in scores.values()
            )
        }
        assert set(found["front"]) == front and len(front) > 1

    def test_a_trial_that_fails_is_passed_over(self, place):
        assert search("--trials", "6", suite="scored:fails_above_one") == 0
        states = [trial["state"] for trial in result()["trials"]]
        assert "failed" in states and "done" in states
        assert any("too large" in note for note in result()["notes"])


class TestStrategies:
    def searched(self, strategy: str, *words: str, suite: str = "scored:closeness") -> Any:
        given = ["spec.yaml", "--strategy", strategy, "--suite", suite, "-o", strategy]
        assert cli(["search", *given, "--questions", "8", "-q", *words]) == 0
        return result(strategy)

    def test_a_greedy_soup_keeps_models_that_do_no_harm(self, place, models):
        spec = yaml.safe_load(Path("spec.yaml").read_text()) | {"merge_method": "linear"}
        del spec["base_model"]
        names = ["a", "base", "b"]  # means 1, 0, 0.2: b is best alone, and a brings it near 0.5
        spec["models"] = [{"model": str(models / name)} for name in names]
        Path("spec.yaml").write_text(yaml.safe_dump(spec))
        found = self.searched("greedy-soup")
        tried = [
            [names[int(name[-1]) - 1] for name, value in trial["point"].items() if value == "in"]
            for trial in found["trials"]
        ]
        assert [sorted(one) for one in tried] == [["b"], ["b", "base"], ["a", "b"]]
        one, two, three = (sum(trial["values"]) for trial in found["trials"])
        assert two < one <= three  # so the second was not kept for the third

    def test_parts_of_task_vectors_are_left_out_where_that_does_no_harm(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        base = {f"layers.{i}.up.w": torch.zeros(4, 4) for i in range(2)} | {"head": torch.zeros(3)}
        save_tensors(Path("base"), base)
        # Only the second layer of a, and what is outside layers of b, bring the mean near 0.5.
        save_tensors(Path("a"), {n: t + (0.6 if "1" in n else -9) for n, t in base.items()})
        save_tensors(Path("b"), {n: t + (0.4 if n == "head" else -5) for n, t in base.items()})
        models = [{"model": "a", "parameters": {"weight": 0.9}}, {"model": "b"}]
        spec = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
        Path("spec.yaml").write_text(yaml.safe_dump(spec))
        found = self.searched("prune", suite="scored:means")
        assert len(found["trials"]) == 6
        best = yaml.safe_load(Path("prune/best.yaml").read_text())
        assert [one["parameters"]["weight"] for one in best["models"]] == [
            [
                {"filter": "layers.0.", "value": 0},
                {"filter": "layers.1.", "value": 0.9},
                {"value": 0},
            ],
            [
                {"filter": "layers.0.", "value": 0},
                {"filter": "layers.1.", "value": 0},
                {"value": 1.0},
            ],
        ]

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--strategy", "prune", "--space", "space.yaml"), "--space: prune chooses what"),
            (("--strategy", "greedy-soup", "--jobs", "2"), "--jobs: greedy-soup is for one"),
            ((), "--space: name the file"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, words, said, place, capsys):
        given = ["spec.yaml", "--suite", "scored:closeness", "-o", "out"]
        assert cli(["search", *given, *words]) == 2
        assert said in capsys.readouterr().err

    def test_pruning_needs_weights_of_task_vectors(self, place, capsys):
        spec = yaml.safe_load(Path("spec.yaml").read_text()) | {"merge_method": "linear"}
        Path("spec.yaml").write_text(yaml.safe_dump(spec))
        given = ["spec.yaml", "--suite", "scored:closeness", "-o", "out", "--strategy", "prune"]
        assert cli(["search", *given]) == 2
        assert "which linear is not" in capsys.readouterr().err


class TestProcesses:
    def test_several_share_the_trials_of_a_folder(self, place, monkeypatch, capfd):
        here = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
        monkeypatch.setenv("PYTHONPATH", here)
        assert search("--trials", "5", "--jobs", "2", suite="scored:unhurried") == 0
        found = result()
        assert [trial["number"] for trial in found["trials"]] == list(range(1, 6))
        assert all(trial["state"] != "running" for trial in found["trials"])
        assert "failed" not in capfd.readouterr().err
        assert not list(Path("out/work").glob("*.process"))

    def test_a_trial_is_for_one_process_until_that_is_gone(self, tmp_path):
        sampler = make_sampler("random", 0, [])
        first, second = Trials(tmp_path, 1), Trials(tmp_path, 1)
        one, two = first.next(3, sampler), second.next(3, sampler)
        assert one and two and (one.number, two.number) == (1, 2)
        two.done([0.5])
        first.close()  # as when its process ends
        again = second.next(3, sampler)
        assert again and again.number == 1
        again.done([0.1])
        second.close()


class TestPage:
    def test_it_shows_the_search_and_needs_no_network(self, place, capsys):
        words = ("--sampler", "nsga2", "--trials", "4")
        assert search(*words, suite="scored:two_tasks") == 0
        for _ in range(2):  # its own page is replaced
            assert cli(["report", "out", "-o", "page.html"]) == 0
        page = Path("page.html").read_text()
        assert "trial 3" in page and "What matters" in page and "Front" in page
        assert "http" not in page.replace("http-equiv", "") and "<script" not in page
        assert page.count("<circle") == 4 + len(
            [trial for trial in result()["trials"] if trial["values"]]
        )

    def test_a_search_without_result_has_no_page(self, place, capsys):
        assert search("--trials", "1") == 0
        Path("out/result.json").unlink()
        assert cli(["report", "out", "-o", "page.html"]) == 1
        assert "has no result yet" in capsys.readouterr().err


class TestRefusals:
    def refused(self, capsys, *words: str, suite: str = "scored:closeness") -> str:
        assert search(*words, suite=suite) in (1, 2)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    @pytest.mark.parametrize(
        ("space", "said"),
        [
            ("lambda: {low: 1, high: 0}", "space.yaml:1:9: lambda: `low` is 1, `high` is 0"),
            ("lambda: {low: 1}", "space.yaml:1:9: lambda: a range needs `high`"),
            ("\nlambda: {lo: 1, high: 2}", "2:10: lambda.lo: unknown key 'lo'. Did you mean 'low'"),
            ("lambda: 2", "1:9: lambda: found 2, expected a range"),
            ("lambda: [2]", "expected a list of two or more"),
            ("lambada: [1, 2]", "1:1: lambada: is no setting of the spec. Did you mean 'lambda'"),
            ("models.3.weight: [1, 2]", "1:1: models.3.weight: there is no model 3"),
            ("models: {least: 2}", "1:17: models.least: found 2, but the spec has 2 models"),
            ("models: all", "expected {least: N}"),
            ("slices: order", "1:1: slices: the spec has no two `slices`"),
            ("merge_method: [ties, tiez]", "unknown merge method 'tiez'"),
            ("merge_method: [ties, linear]\ndensity: {low: 0.5, high: 2}", "2:10: density: with"),
            ("lambda: {low: 1e-3, high: 2}", "expected a number"),
            ("lambda: {low: 0, high: 2, log: true}", "expected `low` above 0"),
            ("lambda: [{filter: x, low: 1, high: 2}, {value: x}]", "1:9: lambda"),
            ("", "expected a mapping"),
            ("lambda: {low: 1, high: 2}\nlambda: [1, 2]", "stands twice"),
        ],
    )
    def test_a_wrong_space_is_told_with_its_line(self, space, said, place, capsys):
        Path("space.yaml").write_text(space)
        assert said in self.refused(capsys)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--sampler", "grid"), "a grid needs a `step`"),
            (("--trials", "0"), "is not a number of at least 1"),
        ],
    )
    def test_a_wrong_option_is_told(self, words, said, place, capsys):
        assert said in self.refused(capsys, *words)

    def test_cmaes_needs_two_ranges(self, place, capsys):
        Path("space.yaml").write_text("lambda: {low: 0, high: 1}\n")
        said = self.refused(capsys, "--sampler", "cmaes")
        assert "--sampler cmaes: needs at least two ranges" in said

    @pytest.mark.parametrize(
        ("suite", "said"),
        [
            ("scored:nothing", "has no 'nothing'"),
            ("no_such_module:score", "no module 'no_such_module'"),
            ("scored:TARGETS", "expected a function"),
            ("scored:fails", "failed: RuntimeError: out of luck"),
            ("scored:returns_nan", "expected a finite number"),
            ("scored:returns_pairs", "expected a number"),
            ("scored:returns_huge", "expected a number"),
            ("scored:returns_text", "expected a dict of scores"),
            ("scored:two_questions", "at least 4"),
        ],
    )
    def test_a_function_that_does_not_score_is_told(self, suite, said, place, capsys):
        assert said in self.refused(capsys, "--trials", "2", suite=suite)

    def test_a_search_of_which_nothing_comes_ends(self, place, capsys):
        said = self.refused(capsys, suite="scored:fails_but_for_known")
        assert "the first 5 trials failed" in said

    def test_a_folder_with_another_search_is_refused(self, place, capsys):
        assert search("--trials", "2") == 0
        Path("space.yaml").write_text("lambda: {low: 0.2, high: 1.5}\n")
        said = self.refused(capsys)
        assert "holds a search with other settings: space changed" in said

    def test_a_model_that_changed_is_noticed(self, place, models, capsys):
        assert search("--trials", "2") == 0
        os.utime(models / "a" / "model.safetensors")
        assert "files changed since" in self.refused(capsys)


class TestWorkplace:
    def test_it_holds_what_run_writes(self, tmp_path):
        base, models = family("llama", tmp_path / "models", dtype=torch.bfloat16)
        spec = {
            "merge_method": "min_sigma",
            "base_model": str(base),
            "models": [{"model": str(model)} for model in models],
        }
        specs = [
            spec | {"parameters": {"t": [{"filter": "layers.1.", "value": t}, {"value": 2}]}}
            for t in (2.0, 3.0)
        ]
        specs.append(spec | {"merge_method": "ties", "parameters": {"trim": "model"}})
        specs.append(spec | {"merge_method": "linear", "out_dtype": "float32"})
        numbers = []
        with Workplace(tmp_path / "work", RunOptions(threads=2)) as workplace:
            for number, one in enumerate(specs):
                made = workplace.merge(outliermerge.plan(one))
                own = outliermerge.run(one, output=tmp_path / f"out{number}").output
                numbers.append(made.num_made)
                expected, found = load_folder(own), load_folder(made.path)
                assert expected.keys() == found.keys()
                for name, tensor in expected.items():
                    assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name])
                for name in ("config.json", "tokenizer.json"):
                    assert (made.path / name).read_bytes() == (own / name).read_bytes()
            folder = made.path
        assert not folder.exists()
        all_ = len(outliermerge.plan(spec).jobs)
        assert numbers == [all_, sum("layers.1." in name for name in expected), all_, all_]

    def test_what_a_killed_search_left_in_memory_is_removed(self, tmp_path, monkeypatch):
        monkeypatch.setattr("outliermerge.search.workplace._MEMORY_DISK", tmp_path)
        for name in ("gone", "alive"):
            (tmp_path / f"outliermerge-search-{name}").mkdir()
            (tmp_path / f"outliermerge-search-{name}" / ".lock").touch()
        with (tmp_path / "outliermerge-search-alive" / ".lock").open("r+") as file:
            assert lock(file.fileno())
            with Workplace(tmp_path / "work", RunOptions()):
                assert [path.name for path in tmp_path.iterdir()] == ["outliermerge-search-alive"]

    def test_where_memory_does_not_do_it_is_on_the_disk(self, place, models, monkeypatch):
        monkeypatch.setattr("outliermerge.search.workplace._SHARE", 0)
        with Workplace(place / "work", RunOptions()) as workplace:
            made = workplace.merge(outliermerge.plan("spec.yaml"))
            assert made.path.parent == place / "work"
        assert list((place / "work").iterdir()) == []
