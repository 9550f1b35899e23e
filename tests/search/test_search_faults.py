"""Searches that go wrong: full disks, damaged files, killed processes, changed inputs, Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from checkpoints import save_tensors
from waiting import LIMIT_SECONDS, heed_interrupts

from outliermerge.cli import search_helpers
from outliermerge.cli.main import main as cli
from outliermerge.errors import ArgumentError, OutlierMergeError
from outliermerge.evaluation.suite import load_suite
from outliermerge.search.ledger import Ledger
from outliermerge.search.samplers import make_sampler
from outliermerge.search.suites import SuiteScorer
from outliermerge.search.trials import TRIALS_NAME, Trials

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, mean in (("base", 0.0), ("a", 1.0), ("b", 0.2)):
        save_tensors(tmp_path / name, {"w": torch.full((40, 30), mean)})
    models = [{"model": "a"}, {"model": "b"}]
    spec = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "space.yaml").write_text("lambda: {low: 0.1, high: 1.5}\n")
    return tmp_path


def words(suite: str = "scored:closeness", trials: int = 3, output: str = "out") -> list[str]:
    given = ["search", "spec.yaml", "--space", "space.yaml", "--suite", suite, "-o", output]
    return [*given, "--questions", "8", "--trials", str(trials), "-q"]


def tried(output: str = "out") -> list[Any]:
    found = json.loads(Path(output, "result.json").read_text())
    return [(trial["point"], trial["state"], trial["values"]) for trial in found["trials"]]


class TestEarlyStops:
    def test_bars_are_those_of_optunas_median(self, tmp_path):
        """What is stopped is what Optuna's MedianPruner would have stopped."""
        trials, sampler = Trials(tmp_path, 1), make_sampler("random", 0, [])
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_min_trials=3)
        drawn = torch.Generator().manual_seed(0)
        agreed = []
        for _ in range(20):
            running = trials.next(20, sampler)
            assert running
            steps = torch.rand(3, generator=drawn).tolist()
            bars, stopped = trials.bars(3), None
            for number, bar in enumerate(bars[:2]):
                running._trial.report(steps[number], number)
                frozen = trials.study.get_trials(deepcopy=False)[-1]
                ours = bar is not None and max(steps[: number + 1]) < bar
                assert ours == pruner.prune(trials.study, frozen)
                agreed.append(ours)
                stopped = stopped or ours
            if stopped:
                running.stopped()
            else:
                running._trial.report(steps[2], 2)
                running.done([steps[2]])
        trials.close()
        assert 5 < sum(agreed) < 25


class TestTrials:
    def test_those_at_work_are_not_given_twice(self, tmp_path):
        trials, sampler = Trials(tmp_path, 1), make_sampler("random", 0, [])
        first, second = trials.next(3, sampler), trials.next(3, sampler)
        assert first and second and (first.number, second.number) == (1, 2)
        first.done([0.0])
        third = trials.next(3, sampler)
        assert third and third.number == 3 and trials.next(3, sampler) is None
        trials.close()

    def test_one_that_kills_its_processes_fails(self, tmp_path):
        sampler = make_sampler("random", 0, [])
        for _ in range(3):
            killed = Trials(tmp_path, 1)
            running = killed.next(2, sampler)
            assert running and running.number == 1
            killed._own.close()  # as by a kill: nothing else is let go
        trials = Trials(tmp_path, 1)
        running = trials.next(2, sampler)
        assert running and running.number == 2
        (failed, _) = trials.all()
        assert failed.state == "failed" and "3 processes were killed" in failed.reason
        trials.close()

    def test_an_interrupt_does_not_count(self, tmp_path):
        for _ in range(5):
            trials = Trials(tmp_path, 1)
            running = trials.next(1, make_sampler("random", 0, []))
            assert running and running.number == 1
            trials.close()


class TestDamage:
    def test_records_that_were_changed_are_made_again(self, tmp_path):
        ledger, spec = Ledger(tmp_path), {"merge_method": "linear"}
        record = {"spec": spec, "checksum": "1", "answers": {"t": {"1": 0.5}}, "is_whole": True}
        ledger.put(spec, record)
        assert ledger.record(spec) == record
        (file,) = tmp_path.iterdir()
        whole = file.read_text()
        for text in (whole.replace("0.5", "0.6"), whole[:-9], "", "[]", '{"record": 3}', "\0"):
            file.write_text(text)
            assert ledger.record(spec) == {}

    @pytest.mark.parametrize(
        "damage",
        [
            "pages",
            *(pytest.param(one, marks=pytest.mark.faults) for one in ("cut", "text", "folder")),
        ],
    )
    def test_a_damaged_storage_is_told_and_what_was_scored_is_not_lost(self, damage, place, capsys):
        assert cli(words()) == 0
        whole, file = tried(), Path("out", TRIALS_NAME)
        if damage == "cut":
            os.truncate(file, 5000)
        elif damage == "text":
            file.write_text("not a database" * 1000)
        elif damage == "pages":
            with file.open("r+b") as handle:
                handle.seek(4096)
                handle.write(b"\xff" * (file.stat().st_size - 4096))
        else:
            file.unlink()
            file.mkdir()
        capsys.readouterr()
        assert cli(words(trials=4)) == 1
        said = capsys.readouterr().err
        assert "trials.sqlite: cannot be used: " in said and "Traceback" not in said
        shutil.rmtree(file) if damage == "folder" else file.unlink()
        assert cli(words("scored:closeness", 3)) == 0
        assert tried() == whole

    def test_settings_that_are_damaged_are_told(self, place, capsys):
        assert cli(words()) == 0
        Path("out/search.json").write_text('{"spec"')
        assert cli(words()) == 1
        assert "search.json: " in capsys.readouterr().err


class TestFullDisk:
    @pytest.mark.parametrize("name", ["ledger.write_whole", "search.write_whole"])
    def test_files_that_cannot_be_written_are_told_and_the_search_goes_on(
        self, name, place, capsys, monkeypatch
    ):
        def full(path: Path, content: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        with monkeypatch.context() as patch:
            patch.setattr(f"outliermerge.search.{name}", full)
            assert cli(words()) == 1
        said = capsys.readouterr().err
        assert "No space left on device" in said and "bytes free" in said
        assert cli(words()) == 0

    @pytest.mark.faults
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits of processes")
    def test_a_storage_that_cannot_grow_is_told(self, place):
        assert cli(words()) == 0
        size = Path("out", TRIALS_NAME).stat().st_size
        limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
        run = f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {limited}"
        run += (
            f"; from outliermerge.cli.main import main; raise SystemExit(main({words(trials=60)}))"
        )
        path = f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
        done = subprocess.run(
            [sys.executable, "-c", run], env={**os.environ, "PYTHONPATH": path},
            capture_output=True, text=True, timeout=LIMIT_SECONDS,
        )  # fmt: skip
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "trials.sqlite: cannot be used: " in done.stderr

    def test_a_storage_on_a_full_disk_is_told(self, tmp_path):
        trials = Trials(tmp_path, 1)
        running = trials.next(1, make_sampler("random", 0, []))
        assert running
        connect = trials.study._storage._backend.engine.pool._creator  # type: ignore[attr-defined]

        def full() -> Any:
            found = connect()
            found.execute("pragma max_page_count = 1")  # SQLite then says what a full disk says
            return found

        trials.study._storage._backend.engine.pool._creator = full  # type: ignore[attr-defined]
        trials.study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
        with pytest.raises(OutlierMergeError, match=r"No space left on device.*bytes free"):
            running.failed("é" * 2000)
        trials.close()


class TestChangedInputs:
    def refused(self, capsys: Any, *given: str) -> str:
        assert cli(list(given) or words()) == 2
        said: str = capsys.readouterr().err
        assert "holds a search with other settings: " in said
        return said

    def test_a_function_whose_module_was_edited_is_another(self, place, capsys, monkeypatch):
        monkeypatch.syspath_prepend(place)
        for text in ("FACTOR = 1\n", "FACTOR = 2\n"):
            Path("mine.py").write_text(
                f"from scored import closeness\n{text}"
                "def score(model): return {k: FACTOR * v for k, v in closeness(model).items()}\n"
            )
            sys.modules.pop("mine", None)
            if "1" in text:
                assert cli(words("mine:score")) == 0
        assert "scorer changed" in self.refused(capsys, *words("mine:score"))

    @pytest.mark.parametrize("name", ["tiny_sums.yaml", "sums.jsonl"])
    def test_a_suite_whose_task_was_edited_is_another(self, name, tmp_path):
        folder = tmp_path / "evals"
        shutil.copytree(ROOT / "evals" / "tiny_text", folder / "tiny_text")
        shutil.copy(ROOT / "evals" / "tiny-text.yaml", folder)

        def identity() -> Any:
            suite = load_suite(folder / "tiny-text.yaml")
            return SuiteScorer(suite, folder=tmp_path / "work").identity()

        before = identity()
        assert identity() == before
        with (folder / "tiny_text" / name).open("a") as file:
            file.write("\n# another\n" if name.endswith("yaml") else "\n")
        assert identity() != before

    def test_a_suite_on_another_gpu_is_the_same(self, tmp_path):
        def identity(device: str) -> Any:
            suite = load_suite(ROOT / "evals" / "tiny-text.yaml", device=device)
            return SuiteScorer(suite, folder=tmp_path).identity()

        assert identity("cuda:0") == identity("cuda:1") != identity("cpu")

    def test_other_flags_are_another_search(self, place, capsys):
        assert cli(words(trials=1)) == 0
        for flag, value in (("seed", "1"), ("questions", "9"), ("sampler", "random")):
            assert flag in self.refused(capsys, *words(), f"--{flag}", value)


class TestGpus:
    """There is none here: the number of GPUs is a stand-in, the rest is what runs."""

    @pytest.fixture
    def two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def test_each_job_has_its_own(self, two, monkeypatch):
        assert search_helpers.gpus_of(2, ("cuda", "cpu")) == ["0", "1"]
        assert search_helpers.gpus_of(2, ("cpu", "auto")) == ["0", "1"]
        assert search_helpers.gpus_of(1, ("cuda", "cuda")) == []
        assert search_helpers.gpus_of(2, ("cpu", "cpu")) == []
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3f, GPU-9c")
        assert search_helpers.gpus_of(2, ("cuda",)) == ["GPU-3f", "GPU-9c"]

    def test_fewer_than_jobs_are_refused_and_one_may_be_shared(self, two):
        with pytest.raises(ArgumentError, match="this machine has 2") as error:
            search_helpers.gpus_of(3, ("cuda", "cuda"))
        assert "cuda:0" in str(error.value)
        assert search_helpers.gpus_of(3, ("cuda:0", "cuda:0")) == []

    def test_a_process_sees_its_own_alone(self, two, place, monkeypatch):
        started = []

        class Process:
            def __init__(self, command: list[str], **given: Any) -> None:
                started.append((command, given["env"].get("CUDA_VISIBLE_DEVICES")))

            def wait(self) -> int:
                return 0

        monkeypatch.setattr(search_helpers.subprocess, "Popen", Process)
        (place / "out" / "work").mkdir(parents=True)
        options = cli_options(*words(), "--jobs", "2", "--device", "cuda", "--trial-seconds", "9")
        gpus = search_helpers.gpus_of(2, ("cuda",))
        with search_helpers.Helpers(options, 2, gpus, print) as helpers:
            helpers.start()
        ((command, visible),) = started
        assert visible == "1" and {"--device=cuda", "--trial-seconds=9"} <= set(command)


def cli_options(*given: str) -> Any:
    from outliermerge.cli.parser import load, make_parser

    return make_parser(load(["search"])).parse_args(list(given))


class TestInterrupts:
    def test_an_interrupt_in_a_function_ends_it_and_it_goes_on(self, place, capsys, monkeypatch):
        monkeypatch.setenv("INTERRUPT_AT", "3")
        assert cli(words("scored:interrupted", 3)) == 130
        said = capsys.readouterr().err
        assert said.strip() == "error: interrupted: the same command goes on from here"
        assert not list(Path("out/work").glob("*.process"))
        monkeypatch.delenv("INTERRUPT_AT")
        assert cli(words("scored:interrupted", 3)) == 0
        assert cli(words("scored:interrupted", 3, "whole")) == 0
        assert tried() == tried("whole")

    @pytest.mark.faults
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_ctrl_c_ends_it_with_one_line_and_it_goes_on(self, jobs, place):
        given = [*words("scored:unhurried", 12)[:-1], "--jobs", str(jobs)]  # not -q
        path = f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
        process = subprocess.Popen(
            [sys.executable, "-m", "outliermerge", *given], env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, preexec_fn=heed_interrupts,
        )  # fmt: skip
        assert process.stderr
        for line in process.stderr:
            if b"trial 2/12" in line:
                process.send_signal(signal.SIGINT)
                break
        _, said = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == 130
        *_, last = said.decode().strip().splitlines()
        assert last == "error: interrupted: the same command goes on from here"
        assert b"Traceback" not in said
        assert not list(Path("out/work").glob("*.process"))


class TestLimits:
    def test_a_trial_that_hangs_is_stopped_and_the_others_are_what_they_would_be(self, place):
        Path("space.yaml").write_text("lambda: [0.5, 1.4, 0.7]\n")  # means 0.6, 1.68, 0.84
        given = ["--sampler", "grid"]
        assert cli([*words("scored:hangs_above"), *given, "--trial-seconds", "5"]) == 0
        failed = json.loads(Path("out/result.json").read_text())["trials"][1]
        assert failed["state"] == "failed"
        assert failed["reason"] == "it took longer than 5 seconds, and was stopped"
        assert not list(Path("out/work").glob("scoring-*"))
        assert cli([*words("scored:closeness", output="whole"), *given]) == 0
        assert [tried()[number] for number in (0, 2)] == [tried("whole")[n] for n in (0, 2)]


class TestScorers:
    @pytest.mark.parametrize(
        ("suite", "said"),
        [
            ("scored:gives_others", "gave no score for 2 questions"),
            ("scored:exits", "failed: SystemExit"),
            pytest.param("scored:gives_no_task", "gave no score", marks=pytest.mark.faults),
        ],
    )
    def test_trials_that_are_scored_wrongly_are_failed(self, suite, said, place, capsys):
        assert cli(words(suite, 6)) == 1
        assert said in capsys.readouterr().err

    def test_a_suite_without_a_judge_is_refused_before_anything_is_merged(
        self, place, monkeypatch, capsys
    ):
        for name in ("OPENAI_API_KEY", "API_TYPE"):
            monkeypatch.delenv(name, raising=False)
        assert cli(words(str(ROOT / "evals" / "paper-judge.yaml"))) in (1, 2)
        said = capsys.readouterr().err
        assert "judge" in said or "not installed" in said
        assert not Path("out/scores").exists()


def test_a_folder_whose_name_is_special_to_sqlite_is_used(tmp_path):
    for name in ("a?b", "a%20b", "a#b", "ä b", "{SCHEMA_VERSION}"):
        folder = tmp_path / name
        folder.mkdir()
        trials = Trials(folder, 1)
        trials.close()
        assert (folder / TRIALS_NAME).is_file(), name
    with pytest.raises(OutlierMergeError, match="cannot be used"):
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / TRIALS_NAME).mkdir()
        Trials(tmp_path / "taken", 1)
