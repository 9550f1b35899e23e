"""A killed run goes on where it stopped, and ends in the bytes of a run that was not killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import save_tensors
from stopping import stopping_after
from waiting import LIMIT_SECONDS, held, stopped, wait_for

import outliermerge
from outliermerge.cli import main as cli

NUM_LAYERS, NUM_SMALL = 20, 12
METHODS = ("min_sigma", "ties")
SHARD_SIZE = "20MB"


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.big.weight"] = torch.randn(1024, 700, generator=generator)
        for number in range(NUM_SMALL):
            small = torch.randn(64, 50, generator=generator)
            tensors[f"{prefix}.small{number}.weight"] = small.bfloat16()
        tensors[f"{prefix}.steps"] = torch.arange(5) + layer
    return tensors


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of 59 MB, two task models, a spec a method, and its undisturbed output."""
    folder = tmp_path_factory.mktemp("kill")
    base = _tensors(0)
    save_tensors(folder / "base", base)
    (folder / "base" / "tokenizer.json").write_text('{"version": "1.0"}\n')
    for number in (1, 2):
        moved = {
            name: (tensor.float() + 0.01 * noise.float()).to(tensor.dtype)
            if tensor.is_floating_point()
            else tensor
            for (name, tensor), noise in zip(base.items(), _tensors(number).values(), strict=True)
        }
        save_tensors(folder / f"task{number}", moved)
    for method in METHODS:
        spec = _spec(folder, method)
        spec.write_text(
            f"merge_method: {method}\n"
            f"base_model: {folder}/base\n"
            f"models:\n- model: {folder}/task1\n- model: {folder}/task2\n"
            + ("parameters:\n  density: 0.4\n" if method == "ties" else "")
        )
        done = _finish(spec, folder / f"undisturbed_{method}")
        assert done["num_resumed"] == 0
    return folder


def _spec(folder: Path, method: str) -> Path:
    return folder / f"{method}.yaml"


def _command(spec: Path, output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "outliermerge", *_arguments(spec, output, *options)]


def _arguments(spec: Path, output: Path, *options: str) -> list[str]:
    run = ["run", str(spec), "--output", str(output), "--json", "--threads", "1"]
    return [*run, "--shard-size", SHARD_SIZE, *options]


def _finish(spec: Path, output: Path, *options: str) -> dict:
    done = subprocess.run(
        _command(spec, output, *options), capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _start(spec: Path, output: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        _command(spec, output, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _start_held(
    number: int, when: str, spec: Path, output: Path, *options: str
) -> subprocess.Popen:
    """Start a run that stops itself at so many tensors."""
    return subprocess.Popen(
        held(number, when, *_arguments(spec, output, *options)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=LIMIT_SECONDS)


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _journal(output: Path) -> Path:
    return output.with_name(output.name + ".partial.journal")


def _journaled(output: Path) -> list[str]:
    """The tensors whose journal lines are whole."""
    path = _journal(output)
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [
        json.loads(text)["tensor"]
        for text, _, checksum in (line.partition(b"\t") for line in lines)
        if text.startswith(b'{"tensor"') and len(checksum) == 16
    ]


def _wait(process: subprocess.Popen, output: Path, num_journaled: int) -> None:
    """Wait until the journal holds so many tensors or the process has ended."""

    def is_so_far() -> bool:
        is_there = _journal(output).exists() and len(_journaled(output)) >= num_journaled
        return is_there or process.poll() is not None

    assert wait_for(is_so_far), "the run did not get on"


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _assert_same(output: Path, undisturbed: Path) -> None:
    found, expected = _bytes(output), _bytes(undisturbed)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert cli.main(["verify", str(output)]) == 0
    assert not _partial(output).exists()


NUM_TENSORS = NUM_LAYERS * (NUM_SMALL + 2)
NUM_MOMENTS = 6


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, marks=() if moment in (0, 3, 5) else pytest.mark.faults)
        for moment in range(NUM_MOMENTS)
    ],
)
def test_a_killed_run_goes_on_with_what_was_left(
    workplace: Path, tmp_path: Path, moment: int
) -> None:
    chance = random.Random(moment)
    method = METHODS[moment % 2]
    output = tmp_path / "out"
    number = 1 + int(NUM_TENSORS * (moment + chance.random() * 0.9) / NUM_MOMENTS)
    when = chance.choice(["before", "after"])
    process = _start_held(number, when, _spec(workplace, method), output)
    assert stopped(process)
    _kill(process)
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    journaled = _journaled(output)
    assert len(journaled) == number - (when == "before")

    done = _finish(_spec(workplace, method), output)

    assert done["num_resumed"] == len(journaled)
    sizes = {f"model.layers.{layer}.big.weight": 4 * 1024 * 700 for layer in range(NUM_LAYERS)}
    left = set(_tensor_names()) - set(journaled)
    small = {"weight": 2 * 64 * 50, "steps": 8 * 5}
    expected = sum(sizes.get(name, small[name.rpartition(".")[2]]) for name in left)
    assert done["written_bytes"] == expected
    _assert_same(output, workplace / f"undisturbed_{method}")


def _tensor_names() -> list[str]:
    kinds = ["big.weight", "steps", *(f"small{number}.weight" for number in range(NUM_SMALL))]
    return [f"model.layers.{layer}.{kind}" for layer in range(NUM_LAYERS) for kind in kinds]


def test_a_run_killed_again_and_again_ends_in_the_same_bytes(
    workplace: Path, tmp_path: Path
) -> None:
    method = "ties"
    chance = random.Random(method)
    output, spec = tmp_path / "out", _spec(workplace, method)
    journaled: list[str] = []
    num_kills = 0
    while not output.exists() and num_kills < 30:
        step = chance.randrange(NUM_TENSORS // 8, NUM_TENSORS // 3)
        process = _start_held(step, chance.choice(["before", "after"]), spec, output)
        if not stopped(process):  # there were fewer left
            assert process.wait() == 0
            break
        _kill(process)
        num_kills += 1
        before, journaled = journaled, _journaled(output)
        assert set(before) <= set(journaled), "finished work was lost"
    assert num_kills >= 3
    if not output.exists():
        assert _finish(spec, output)["num_resumed"] == len(journaled)
    _assert_same(output, workplace / f"undisturbed_{method}")


def test_a_kill_at_the_start_or_the_end_of_a_run_does_no_harm(
    workplace: Path, tmp_path: Path
) -> None:
    output, spec = tmp_path / "out", _spec(workplace, "min_sigma")
    chance = random.Random(7)
    for num_journaled in (0, 0, 0, NUM_TENSORS, NUM_TENSORS):
        process = _start(spec, output)
        _wait(process, output, num_journaled)
        time.sleep(chance.random() * 0.01)
        _kill(process)
        if output.exists():  # only ever whole
            assert cli.main(["verify", str(output)]) == 0
            break
    if not output.exists():
        num_journaled = len(_journaled(output))
        assert _finish(spec, output)["num_resumed"] == num_journaled
    _assert_same(output, workplace / "undisturbed_min_sigma")


def test_a_kill_before_the_end_leaves_the_output_that_was_to_be_overwritten(
    workplace: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(workplace / "undisturbed_ties", output)
    spec = _spec(workplace, "min_sigma")
    process = _start_held(NUM_TENSORS // 2, "after", spec, output, "--overwrite")
    assert stopped(process)
    assert _bytes(output) == _bytes(workplace / "undisturbed_ties")
    _kill(process)
    assert process.returncode == -signal.SIGKILL
    assert _bytes(output) == _bytes(workplace / "undisturbed_ties")

    assert _finish(_spec(workplace, "min_sigma"), output, "--overwrite")["num_resumed"] > 0
    _assert_same(output, workplace / "undisturbed_min_sigma")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


class TestSmall:
    """What a killed run leaves behind, made by hand: quick, in this process."""

    @pytest.fixture
    def killed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A run that stopped after 7 of 10 tensors; its spec and models are beside it."""
        generator = torch.Generator().manual_seed(0)
        for model in ("base", "task"):
            tensors = {f"w{n}": torch.randn(8, 100, generator=generator) for n in range(10)}
            save_tensors(tmp_path / model, tensors)
        (tmp_path / "spec.yaml").write_text(_small_spec(tmp_path, 0.5))
        output = tmp_path / "out"
        assert cli.main(_small(output)) == 0
        output.rename(tmp_path / "undisturbed")

        from outliermerge.output.folder import OutputFolder

        record = OutputFolder.record

        def stop(self, name, result):
            if len(self.done) == 7:
                raise KeyboardInterrupt
            record(self, name, result)

        with monkeypatch.context() as patch:
            patch.setattr(OutputFolder, "record", stop)
            assert cli.main(_small(output)) == 130
        assert not output.exists()
        assert len(_journaled(output)) == 7
        return output

    @pytest.fixture(autouse=True)
    def _fresh_output(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def _resume(self, output: Path, *options: str) -> dict:
        self.capsys.readouterr()
        assert cli.main([*_small(output), *options]) == 0
        return json.loads(self.capsys.readouterr().out)

    def _refusal(self, output: Path, *options: str) -> str:
        self.capsys.readouterr()
        before = _bytes(_partial(output))
        assert cli.main([*_small(output), *options]) == 1
        printed = self.capsys.readouterr()
        assert printed.out == ""
        assert not output.exists()
        assert _bytes(_partial(output)) == before, "a refusal must not change what was begun"
        return printed.err

    def test_it_goes_on(self, killed: Path) -> None:
        assert self._resume(killed)["num_resumed"] == 7
        _assert_same(killed, killed.with_name("undisturbed"))

    @pytest.mark.parametrize(("num_cut", "num_left"), [(1, 7), (2, 6), (18, 6), (40, 6)])
    def test_a_torn_last_line_costs_one_tensor(
        self, killed: Path, num_cut: int, num_left: int
    ) -> None:
        journal = _journal(killed)
        whole = journal.read_bytes()
        journal.write_bytes(whole[:-num_cut])
        assert self._resume(killed)["num_resumed"] == num_left
        _assert_same(killed, killed.with_name("undisturbed"))

    @pytest.mark.parametrize("number", range(7))
    @pytest.mark.parametrize("where", [2, 0.5, -3])
    @pytest.mark.sampled(3)
    def test_a_changed_digit_in_the_journal_costs_one_tensor(
        self, killed: Path, number: int, where: float
    ) -> None:
        lines = _journal(killed).read_bytes().split(b"\n")
        chosen = [i for i, line in enumerate(lines) if line.startswith(b'{"tensor"')][number]
        line = bytearray(lines[chosen])
        line[int(where * len(line)) if where == 0.5 else int(where)] ^= 1
        lines[chosen] = bytes(line)
        _journal(killed).write_bytes(b"\n".join(lines))

        assert self._resume(killed)["num_resumed"] == 6
        _assert_same(killed, killed.with_name("undisturbed"))

    @pytest.mark.parametrize("num_bytes", [0, 5, 20, 200])
    def test_what_a_lost_journal_does_not_know_is_left_alone(
        self, killed: Path, num_bytes: int
    ) -> None:
        journal = _journal(killed)
        journal.write_bytes(journal.read_bytes()[:num_bytes])
        assert "model.safetensors" in self._refusal(killed)
        assert "model.safetensors" in self._refusal(killed, "--fresh")
        shutil.rmtree(_partial(killed))
        assert self._resume(killed)["num_resumed"] == 0
        _assert_same(killed, killed.with_name("undisturbed"))

    @pytest.mark.parametrize("content", [b"mine", b"{}", b'{"outliermerge": 1}\n', b"\n"])
    def test_a_file_of_the_journals_name_that_is_none_is_left_alone(
        self, killed: Path, content: bytes
    ) -> None:
        _journal(killed).write_bytes(content)
        assert "something else" in self._refusal(killed)
        assert _journal(killed).read_bytes() == content

    def test_what_somebody_put_beside_the_work_stops_it(self, killed: Path) -> None:
        (_partial(killed) / "notes.txt").write_text("mine")
        for options in ([], ["--fresh"]):
            assert "notes.txt" in self._refusal(killed, *options)
        (_partial(killed) / "notes.txt").unlink()
        assert self._resume(killed)["num_resumed"] == 7
        _assert_same(killed, killed.with_name("undisturbed"))

    @pytest.mark.parametrize("kind", ["link", "hard link", "folder"])
    @pytest.mark.parametrize("options", [[], ["--fresh"]])
    def test_no_shard_is_written_through_a_link(
        self, killed: Path, kind: str, options: list[str]
    ) -> None:
        [shard] = _partial(killed).glob("*.safetensors")
        mine = killed.with_name("base") / "model.safetensors"
        before = mine.read_bytes()
        shard.unlink()
        if kind == "link":
            shard.symlink_to(mine)
        elif kind == "hard link":
            shard.hardlink_to(mine)
        else:
            shard.mkdir()
        assert cli.main([*_small(killed), *options]) in (0, 1)
        assert mine.read_bytes() == before

    @pytest.mark.parametrize("num_lines", [0, 1, 2])
    def test_a_kill_after_the_journal_is_opened_again_loses_nothing(
        self, killed: Path, monkeypatch: pytest.MonkeyPatch, num_lines: int
    ) -> None:
        with stopping_after(monkeypatch, num_lines):
            assert cli.main(_small(killed)) == 130
        assert self._resume(killed)["num_resumed"] == 7 + num_lines
        _assert_same(killed, killed.with_name("undisturbed"))

    def test_a_journal_zeroed_at_its_end_by_a_power_cut_is_read_up_to_there(
        self, killed: Path
    ) -> None:
        with (_journal(killed)).open("ab") as journal:
            journal.write(b"\0" * 100)
        assert self._resume(killed)["num_resumed"] == 7
        _assert_same(killed, killed.with_name("undisturbed"))

    def test_only_a_tensor_with_damaged_bytes_is_done_again(self, killed: Path) -> None:
        [shard] = _partial(killed).glob("*.safetensors")
        num_data_bytes = 4 * 8 * 100
        number = int(_journaled(killed)[3].removeprefix("w"))
        names = sorted(f"w{n}" for n in range(10))
        with shard.open("r+b") as file:
            header_length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_length))
            start = header[f"w{number}"]["data_offsets"][0]
            assert start % num_data_bytes == 0
            assert sorted(header.keys() - {"__metadata__"}) == names
            position = 8 + header_length + start + 1234
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1]))
        done = self._resume(killed)
        assert done["num_resumed"] == 6
        assert done["written_bytes"] == 4 * num_data_bytes
        _assert_same(killed, killed.with_name("undisturbed"))

    def test_a_lost_shard_is_written_again(self, killed: Path) -> None:
        [shard] = _partial(killed).glob("*.safetensors")
        shard.unlink()
        assert self._resume(killed)["num_resumed"] == 0
        _assert_same(killed, killed.with_name("undisturbed"))

    def test_a_shard_cut_short_costs_only_what_was_behind(self, killed: Path) -> None:
        [shard] = _partial(killed).glob("*.safetensors")
        size = shard.stat().st_size
        os.truncate(shard, size - 6 * 4 * 8 * 100 - 1)  # reaches into the fourth tensor
        assert self._resume(killed)["num_resumed"] == 3
        _assert_same(killed, killed.with_name("undisturbed"))

    def test_a_damaged_header_is_written_again(self, killed: Path) -> None:
        [shard] = _partial(killed).glob("*.safetensors")
        with shard.open("r+b") as file:
            file.write(b"\xff" * 16)
        assert self._resume(killed)["num_resumed"] == 7
        _assert_same(killed, killed.with_name("undisturbed"))

    def test_a_changed_spec_is_refused(self, killed: Path) -> None:
        spec = killed.with_name("spec.yaml")
        spec.write_text(_small_spec(killed.parent, 0.25))
        message = self._refusal(killed)
        assert "the spec changed" in message
        assert "--fresh" in message
        assert "files of" not in message

        done = self._resume(killed, "--fresh")
        assert done["num_resumed"] == 0
        assert cli.main(["verify", str(killed)]) == 0
        manifest = json.loads((killed / "outliermerge.json").read_text())
        assert manifest["tensors"]["w0"]["parameters"]["weight"] == [0.25]
        assert _bytes(killed) != _bytes(killed.with_name("undisturbed"))

    @pytest.mark.parametrize("change", ["mtime", "bytes"])
    def test_a_changed_input_file_is_refused(self, killed: Path, change: str) -> None:
        path = killed.with_name("task") / "model.safetensors"
        if change == "mtime":
            os.utime(path, ns=(1, 1))
        else:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        message = self._refusal(killed)
        assert f"the files of {killed.parent}/task" in message
        assert f"the files of {killed.parent}/base" not in message
        assert "changed since" in message

        assert self._resume(killed, "--fresh")["num_resumed"] == 0
        assert cli.main(["verify", str(killed)]) == 0
        same = _bytes(killed) == _bytes(killed.with_name("undisturbed"))
        assert same == (change == "mtime")

    def test_a_changed_shard_size_is_refused(self, killed: Path) -> None:
        message = self._refusal(killed, "--shard-size", "10KB")
        assert "the size of its files" in message
        assert "changed since" in message

        assert self._resume(killed, "--fresh", "--shard-size", "10KB")["num_resumed"] == 0
        assert cli.main(["verify", str(killed)]) == 0
        assert not (killed / "model.safetensors").exists()
        assert len(list(killed.glob("model-*-of-00004.safetensors"))) == 4

    def test_a_refusal_names_everything_that_changed(self, killed: Path) -> None:
        killed.with_name("spec.yaml").write_text(_small_spec(killed.parent, 0.25))
        os.utime(killed.with_name("base") / "model.safetensors", ns=(1, 1))
        message = self._refusal(killed)
        assert "the spec" in message
        assert f"the files of {killed.parent}/base" in message

    def test_more_threads_and_another_memory_budget_go_on(self, killed: Path) -> None:
        assert self._resume(killed, "--threads", "3", "--memory", "100MB")["num_resumed"] == 7
        _assert_same(killed, killed.with_name("undisturbed"))

    def test_fresh_starts_over_without_a_change(self, killed: Path) -> None:
        assert self._resume(killed, "--fresh")["num_resumed"] == 0
        _assert_same(killed, killed.with_name("undisturbed"))

    def test_files_beside_the_weights_that_are_no_longer_wanted_do_not_reach_the_output(
        self, killed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A kill after they are written leaves them in the folder."""
        config = killed.with_name("base") / "generation_config.json"
        config.write_text("{}")
        with monkeypatch.context() as patch:
            patch.setattr("outliermerge.output.run.name_all", _interrupt)
            assert cli.main(_small(killed)) == 130
        assert (_partial(killed) / "generation_config.json").exists()
        config.unlink()
        self._resume(killed)
        assert cli.main(["verify", str(killed)]) == 0, self.capsys.readouterr().out
        assert not (killed / "generation_config.json").exists()

    def test_a_journal_is_gone_when_all_is_done(self, killed: Path) -> None:
        self._resume(killed)
        assert not _journal(killed).exists()


def _small_spec(folder: Path, weight: float) -> str:
    return (
        f"merge_method: task_arithmetic\nbase_model: {folder}/base\n"
        f"models:\n- model: {folder}/task\n  parameters:\n    weight: {weight}\n"
    )


def _small(output: Path) -> list[str]:
    spec = output.with_name("spec.yaml")
    return ["run", str(spec), "--output", str(output), "--json", "--threads", "1"]


def test_a_second_run_on_the_same_output_is_refused(workplace: Path, tmp_path: Path) -> None:
    output, spec = tmp_path / "out", _spec(workplace, "ties")
    first = _start_held(3, "after", spec, output)
    assert stopped(first)
    try:
        before = _bytes(_partial(output))
        for options in ([], ["--fresh"], ["--overwrite"]):
            second = subprocess.run(
                _command(spec, output, *options),
                capture_output=True,
                text=True,
                timeout=LIMIT_SECONDS,
            )
            assert second.returncode == 1
            start = f"error: {output}: another run (process {first.pid} on "
            assert second.stderr.startswith(start)
            assert second.stdout == ""
        assert _bytes(_partial(output)) == before
    finally:
        first.send_signal(signal.SIGCONT)
        code = first.wait(timeout=LIMIT_SECONDS)
    assert code == 0
    _assert_same(output, workplace / "undisturbed_ties")


def test_a_non_finite_value_in_a_late_tensor_leaves_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {f"w{number}": torch.randn(8, 100) for number in range(10)}
    save_tensors(tmp_path / "base", tensors)
    tensors = {name: tensor + 0.1 for name, tensor in tensors.items()}
    tensors["w9"][3, 4] = float("nan")
    save_tensors(tmp_path / "task", tensors)
    output = tmp_path / "out"
    output.with_name("spec.yaml").write_text(_small_spec(tmp_path, 0.5))

    assert cli.main(_small(output)) == 1

    printed = capsys.readouterr()
    assert printed.out == ""
    assert "'w9'" in printed.err
    assert f"{tmp_path}/task" in printed.err
    assert "Traceback" not in printed.err
    assert not output.exists()
    assert _journaled(output) == [f"w{number}" for number in range(9)]

    assert cli.main([*_small(output), "--allow-non-finite"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["num_resumed"] == 9
    assert list(done["non_finite"]) == ["w9"]
    assert cli.main(["verify", str(output)]) == 0


def test_a_run_that_allows_no_infinite_values_takes_none_over(tmp_path, monkeypatch):
    """They were allowed by the killed run, not by the one that goes on."""
    base = {name: torch.zeros(4) for name in ("a", "b")}
    save_tensors(tmp_path / "base", base)
    save_tensors(tmp_path / "task", {"a": torch.full((4,), torch.inf), "b": torch.ones(4)})
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "task"), "parameters": {"weight": 0.5}}],
    }
    with monkeypatch.context() as patch:
        patch.setattr("outliermerge.output.run.write_sidecars", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            outliermerge.run(spec, output=tmp_path / "out", allow_non_finite=True)
    with pytest.raises(outliermerge.OutlierMergeError, match="'a' has values that are infinite"):
        outliermerge.run(spec, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = outliermerge.run(spec, output=tmp_path / "out", allow_non_finite=True)
    assert list(result.non_finite) == ["a"]


def _interrupt(*arguments, **options):
    raise KeyboardInterrupt
