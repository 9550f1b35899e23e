"""Command lines as mergekit-yaml takes them, and what every command takes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import load_folder, save_tensors
from waiting import LIMIT_SECONDS

from outliermerge.cli import main as cli
from outliermerge.cli.mergekit_flags import _WITH_VALUE, WITHOUT_EFFECT

COMMANDS = tuple(cli.COMMANDS)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a base model, a task model, and merge.yml."""
    base = {"model.layers.0.mlp.weight": torch.arange(32.0).reshape(4, 8), "half": torch.ones(3)}
    save_tensors(tmp_path / "base", base)
    save_tensors(tmp_path / "task", {name: tensor + 1 for name, tensor in base.items()})
    spec = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "task", "parameters": {"density": 0.5}}],
    }
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(spec))
    (tmp_path / "spec").write_text(yaml.safe_dump(spec))
    (tmp_path / "merge.json").write_text(json.dumps(spec))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestFileAndFolder:
    @pytest.mark.parametrize(
        "words",
        [
            "merge.yml out",
            "merge.json out",
            "./spec out",
            "spec out",
            "run merge.yml out",
            "run merge.yml -o out",
            "run merge.yml out --output out",
            "run merge.yml --threads 1 out",
            "run --threads 1 merge.yml out",
            "merge.yml --threads 1 out",
            "--threads 1 merge.yml out",
            "-q merge.yml out",
            "-v run merge.yml out",
            "run -v merge.yml out -q",
        ],
    )
    def test_a_merge_is_made(self, place: Path, words: str) -> None:
        assert cli.main(words.split()) == 0
        assert load_folder(place / "out").keys() == load_folder(place / "base").keys()

    @pytest.mark.parametrize("words", ["- out", "run - out", "run - -o out", "sweep - out --set t"])
    def test_the_spec_may_come_from_the_standard_input(
        self, place: Path, words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = words.replace("--set t", "--set lambda=0.5,1")
        text = (place / "merge.yml").read_bytes()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert cli.main(words.split()) == 0
        assert (place / "out").is_dir()

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"merge_method: [", "error: standard input:1:16: not valid YAML"),
            (b"", "error: standard input: found nothing"),
            (b"\xff", "error: standard input: is no UTF-8 text"),
            (b" " * 3_000_000, "error: standard input: more than"),
        ],
        ids=["no YAML", "nothing", "no text", "too long"],
    )
    def test_errors_name_the_standard_input(
        self,
        data: bytes,
        said: str,
        place: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert cli.main(["-", "out"]) == 2
        assert capsys.readouterr().err.startswith(said)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("run merge.yml a -o b", "two outputs are given: a and --output b"),
            ("merge.yml a.yml", "a.yml is named as the output, but looks like a spec"),
            ("plan merge.yml a -o b", "two outputs are given"),
            ("merge.yml a b", "unrecognized arguments: b"),
            ("run merge.yml a --memroy 2GiB", "no option '--memroy'. Did you mean --memory?"),
            ("merge.yml a --overwrit=yes", "no option '--overwrit'. Did you mean --overwrite?"),
            ("plan merge.yml -z", "no option '-z'. outliermerge plan --help lists all."),
            ("absent.yaml out", "absent.yaml: no such spec file"),
            ("run absent out", "absent: no such file, and no spec of that name ships"),
        ],
    )
    def test_what_is_wrong_is_told(
        self, place: Path, words: str, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(words.split()) == 2
        assert said in capsys.readouterr().err
        assert not (place / "a").exists()

    def test_a_command_is_a_command_though_a_file_has_its_name(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (place / "methods").write_text("")
        assert cli.main(["methods", "ties"]) == 0
        assert capsys.readouterr().out.startswith("ties")


class TestFlagsOfMergekit:
    @pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")
    def test_all_of_them_are_taken(self, place: Path) -> None:
        from mergekit.options import MergeOptions

        for field in MergeOptions.model_fields:
            if field == "verbosity":
                continue
            flags = ["--" + field.replace("_", "-")]
            is_switch = MergeOptions.model_fields[field].annotation is bool
            if is_switch and field != "gpu_rich":
                flags.append("--no-" + flags[0][2:])
            for flag in flags:
                value = {"device": ["cpu"]}.get(field, ["1"])
                words = ["run", "merge.yml", "out", flag, *([] if is_switch else value)]
                parser = cli.make_parser(cli.load(["run"])).of("run")
                parser.parse_intermixed_args(words[1:])

    @pytest.mark.parametrize(
        ("words", "name", "value"),
        [
            ("--cuda", "cuda", True),
            ("--gpu-rich", "cuda", True),
            ("-j 3", "threads", 3),
            ("--num-threads 3", "threads", 3),
            ("--out-shard-size 5B", "shard_size", "5GB"),
            ("--out-shard-size 300m", "shard_size", "300MB"),
            ("--random-seed 7", "random_seed", 7),
            ("--quiet", "quiet", True),
            ("-vv", "verbose", 2),
        ],
    )
    def test_those_with_a_meaning_have_it(self, words: str, name: str, value: object) -> None:
        parser = cli.make_parser(cli.load(["run"])).of("run")
        options = parser.parse_intermixed_args(["a.yml", "out", *words.split()])
        assert getattr(options, name) == value

    def test_the_seed_is_the_spec_s(self, place: Path) -> None:
        assert cli.main(["merge.yml", "out", "--random-seed", "7"]) == 0
        manifest = json.loads((place / "out" / "outliermerge.json").read_text())
        assert manifest["spec"]["seed"] == 7

    def test_the_output_of_mergekit_multi_is_the_output(self, place: Path) -> None:
        assert cli.main(["merge.yml", "--intermediate-dir", "parts", "--out-path", "out"]) == 0
        assert (place / "out" / "outliermerge.json").is_file()
        assert not (place / "parts").exists()

    def test_those_without_one_are_named_once_with_the_reason(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = [
            word
            for flag in WITHOUT_EFFECT
            for word in (flag, *(["1"] if flag in _WITH_VALUE else []))
        ]
        assert cli.main(["merge.yml", "out", *flags, "--allow-crimes", "--copy-tokenizer"]) == 0
        notes = capsys.readouterr().err.splitlines()
        [note] = [line for line in notes if "flags of mergekit" in line]
        assert all(
            note.count(f"{flag} (") + note.count(f"{flag}, ") == 1 for flag in WITHOUT_EFFECT
        )
        assert all(reason in note for reason in WITHOUT_EFFECT.values())
        assert "--copy-tokenizer" not in note.replace("--no-copy-tokenizer", "")

    def test_no_cuda_device_is_told_as_a_device(
        self, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert cli.main(["merge.yml", "out", "--cuda"]) == 2
        said = capsys.readouterr().err
        assert "error: device cuda is not on this machine" in said
        assert "Leave it out, and the CPU computes." in said


class TestEveryCommand:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_version(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([command, "--version"]) == 0
        assert capsys.readouterr().out.startswith("outliermerge ")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_wrong_words_are_answered_with_its_own_usage(
        self, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([command, "--nonsense", "x", "y", "z"]) == 2
        usage, error = capsys.readouterr().err.splitlines()
        assert usage.startswith(f"usage: outliermerge {command} [option …]")
        assert error.startswith("error: ")

    @pytest.mark.parametrize(
        ("word", "meant"), [("rnu", "run"), ("verfy", "verify"), ("method", "methods")]
    )
    def test_a_misspelt_one_is_answered_with_the_usage_of_the_one_that_is_meant(
        self, word: str, meant: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([word, "merge.yaml"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"usage: outliermerge {meant} ")
        assert f"no command and no file '{word}'. Did you mean '{meant}'?" in said

    def test_usage_names_options_that_are_needed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["eval"]) == 2
        usage = capsys.readouterr().err.splitlines()[0]
        assert usage == "usage: outliermerge eval [option …] MODEL … --suite YAML --output DIR"


class TestWhatIsSaid:
    @pytest.mark.parametrize("words", ["run merge.yml out -q", "-q run merge.yml out"])
    def test_quiet_prints_nothing(
        self, place: Path, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (place / "base" / "optimizer.pt").write_bytes(b"")  # there is a note on it
        assert cli.main(words.split()) == 0
        assert capsys.readouterr() == ("", "")
        assert cli.main(["verify", "out", "-q"]) == 0
        assert capsys.readouterr() == ("", "")

    def test_quiet_leaves_errors_and_json(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["run", "merge.yml", "out", "-q", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["num_tensors"] == 2
        assert cli.main(["run", "merge.yml", "out", "-q", "--device", "tpu"]) == 2
        assert capsys.readouterr().err.startswith("error: ")

    def test_verbose_tells_what_is_merged(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["run", "merge.yml", "out", "-v"]) == 0
        assert capsys.readouterr().err.startswith("ties: task onto base; 2 tensors, reads ")

    @pytest.mark.parametrize("words", ["run merge.yml out", "sweep merge.yml out --set lambda=1"])
    def test_notes_come_once_and_after_the_result(self, place: Path, words: str) -> None:
        (place / "base" / "optimizer.pt").write_bytes(b"")
        done = subprocess.run(
            [sys.executable, "-m", "outliermerge", *words.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_SECONDS,
        )
        assert done.returncode == 0
        *_, result, note, file = done.stdout.splitlines()
        assert result.startswith("wrote out") or words.startswith("sweep")
        assert done.stdout.count("note: ") == 1
        assert note.startswith("note: files of the base model that are not carried over")
        assert file == "  optimizer.pt"

    def test_notes_of_a_plan_come_once_and_after_it(
        self, place: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (place / "base" / "optimizer.pt").write_bytes(b"")
        for more, num in (["-q"], 0), (["--json"], 0), ([], 1):
            assert cli.main(["plan", "merge.yml", "out", "--no-load-check", *more]) == 0
            printed = capfd.readouterr()
            assert "note: " not in printed.out and printed.err.count("note: ") == num
        assert printed.err.startswith("note: files of the base model that are not carried over")

    @pytest.mark.parametrize("words", ["run merge.yml out", "sweep merge.yml out --set lambda=1"])
    def test_an_error_comes_without_notes(
        self, place: Path, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (place / "base" / "optimizer.pt").write_bytes(b"")
        tensors = load_folder(place / "task")
        tensors["half"][0] = float("nan")
        save_tensors(place / "task", tensors)
        assert cli.main(words.split()) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: tensor 'half' has values")
        assert "note:" not in said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_flags(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
    assert "overwrite" in printed
    assert "lazy-unpickle" not in printed, "flags that are not in the help are not completed"


def test_bash_completes_a_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "merge.yaml").write_text("")
    script = """
    source ./completion
    complete_words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
        _shtab_outliermerge; echo "${COMPREPLY[@]}"; }
    complete_words outliermerge ver
    complete_words outliermerge run --over
    complete_words outliermerge run mer
    """
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.stdout.split() == ["verify", "--overwrite", "merge.yaml"], done.stderr


def test_completion_without_its_library_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert "pip install shtab" in capsys.readouterr().err


def test_a_word_that_is_sure_is_told_without_the_list_of_commands(capsys):
    assert cli.main(["plna", "merge.yml"]) == 2
    assert "Commands:" not in capsys.readouterr().err
    assert cli.main(["qqqq", "merge.yml"]) == 2
    assert "Commands: run, plan, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stats", "m", "--by", "layr"],
         "argument --by: found 'layr', expected module, layer or tensor. Did you mean 'layer'?"),
        (["completion", "csh"], "argument SHELL: found 'csh', expected bash, zsh or fish"),
        (["tokenizer", "transplnt", "a", "b"],
         "argument transplant: found 'transplnt', expected transplant. Did you mean 'transplant'?"),
    ],
)  # fmt: skip
def test_a_word_that_is_no_choice_is_answered_with_those_that_are(words, said, capsys):
    assert cli.main(words) == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_a_folder_in_place_of_a_spec_is_answered_with_its_manifest(place, capsys):
    assert cli.main(["run", "merge.yml", "out"]) == 0
    assert cli.main(["run", "out", "again"]) == 2
    assert "To repeat the merge that made it, name out/outliermerge.json" in capsys.readouterr().err


def test_the_flag_for_a_gpu_that_a_command_lacks_is_told_as_its_own(capsys):
    assert cli.main(["plan", "merge.yml", "--cuda"]) == 2
    assert "no option '--cuda'. Did you mean --device cuda?" in capsys.readouterr().err
