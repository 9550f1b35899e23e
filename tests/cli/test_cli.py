"""The command line as a person and a script meet it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from checkpoints import load_folder, save_tensors
from waiting import LIMIT_SECONDS, held, stopped

import outliermerge.cli as cli_package
from outliermerge.cli import main as cli
from outliermerge.methods.table import EVERY, MODIFIERS
from outliermerge.spec.moe import parse_moe_spec

COMMANDS = tuple(cli.COMMANDS)
PROGRAM = [sys.executable, "-m", "outliermerge"]
HEAVY = ("torch", "transformers", "pydantic", "yaml", "rich", "numpy", "huggingface_hub")


def _call(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        **options,
    )


def _imported(*arguments: object) -> tuple[int, set[str]]:
    """Run a command line in a new process; return its exit code and the modules it loaded."""
    code = (
        "import sys\n"
        "from outliermerge.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "print(code, *sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    exit_code, *modules = done.stderr.splitlines()[-1].split()
    return int(exit_code), set(modules)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a base model, two task models and a spec, spec.yaml."""
    generator = torch.Generator().manual_seed(0)
    base = {
        f"model.layers.{layer}.mlp.weight": torch.randn(8, 16, generator=generator)
        for layer in range(4)
    }
    base["half"] = torch.randn(8, generator=generator).half()
    base["steps"] = torch.arange(3)
    save_tensors(tmp_path / "base", base)
    for number in (1, 2):
        moved = {
            name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in base.items()
        }
        save_tensors(tmp_path / f"task{number}", moved)
    (tmp_path / "base" / "optimizer.pt").write_bytes(b"")
    spec = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base"),
        "models": [
            {"model": str(tmp_path / "task1"), "parameters": {"density": [0.25, 1.0]}},
            {"model": str(tmp_path / "task2")},
        ],
        "parameters": {"lambda": 0.5},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    return tmp_path


class TestHelp:
    @pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
    def test_help_has_examples_and_exits_0(
        self, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([*command, "--help"]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        examples = printed.out.partition("examples:\n")[2].splitlines()
        for name in command or ("run", "plan", "verify", "methods", "schema"):
            assert any(line.startswith(f"  outliermerge {name}") for line in examples)

    @pytest.mark.parametrize("command", COMMANDS)
    @pytest.mark.sampled(2)
    def test_every_example_is_a_valid_command_line(
        self, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for arguments in ([], [command]):
            assert cli.main([*arguments, "--help"]) == 0
            text = capsys.readouterr().out.replace("\\\n", "")
            examples = re.findall(r"^  outliermerge (.+)$", text, re.MULTILINE)
            assert examples
            for example in examples:
                words = cli.command_first(example.partition(" > ")[0].split())
                cli.make_parser(cli.load()).parse_args(words)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_argument_is_explained(self, command: str) -> None:
        actions = cli.make_parser(cli.load([command])).of(command)._actions
        told = [(each.dest, each.help or "") for each in actions if each.metavar != "transplant"]
        assert [
            name for name, text in told if len(text.split()) < 3 and "SUPPRESS" not in text
        ] == []

    def test_the_help_of_moe_shows_a_file_that_it_reads(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["moe", "--help"]) == 0
        file = re.search(r"^  base_model:(.*\n  .*)+", capsys.readouterr().out, re.MULTILINE)
        assert file is not None
        assert parse_moe_spec(file[0]).moe.gate_mode == "hidden"

    @pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
    def test_help_imports_nothing_heavy(self, command: tuple[str, ...]) -> None:
        code, modules = _imported(*command, "--help")
        assert code == 0
        assert modules.isdisjoint(HEAVY)
        assert "outliermerge.cli.main" in modules

    def test_version_imports_nothing_heavy(self) -> None:
        code, modules = _imported("--version")
        assert code == 0
        assert modules.isdisjoint(HEAVY)

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"outliermerge {version('outliermerge')}\n"

    def test_python_m_is_the_program(self) -> None:
        done = _call("--version")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"outliermerge {version('outliermerge')}\n"

    def test_the_installed_script_is_the_program(self) -> None:
        script = Path(sys.executable).with_name("outliermerge")
        assert script.exists()
        done = subprocess.run(
            [script, "--version"], capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
        assert done.stdout == f"outliermerge {version('outliermerge')}\n"


class TestCommands:
    def test_a_file_and_a_line_add_a_command(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "greet.py").write_text(
            "from outliermerge.cli.parts import Command, print_json\n"
            "from outliermerge.errors import SpecError\n"
            "def add_arguments(parser):\n"
            "    parser.add_argument('name', help='whom')\n"
            "def run(options):\n"
            "    if options.name == 'nobody':\n"
            "        raise SpecError('nobody is there')\n"
            "    if options.name == 'stopped':\n"
            "        raise KeyboardInterrupt\n"
            "    print_json(options.name)\n"
            "    return 0\n"
            "COMMAND = Command(\n"
            "    summary='greet someone', examples=('outliermerge greet you',), goes_on=True,\n"
            "    add_arguments=add_arguments, run=run, overview='outliermerge greet all')\n"
        )
        monkeypatch.setattr(cli_package, "__path__", [*cli_package.__path__, str(tmp_path)])
        monkeypatch.setitem(cli.COMMANDS, "greet", "greet")
        monkeypatch.delitem(sys.modules, "outliermerge.cli.greet", raising=False)
        assert cli.main(["greet", "you"]) == 0
        assert capsys.readouterr().out == '"you"\n'
        assert cli.main(["--help"]) == 0
        text = capsys.readouterr().out
        assert "  outliermerge greet all\n" in text
        assert re.search("^    greet +greet someone$", text, re.MULTILINE)
        assert cli.main(["greet", "--help"]) == 0
        assert "\nGreet someone.\n" in capsys.readouterr().out
        assert cli.main(["greet", "nobody"]) == 2
        assert capsys.readouterr().err == "error: nobody is there\n"
        assert cli.main(["greet", "stopped"]) == 130
        assert "the same command goes on from here" in capsys.readouterr().err

    def test_a_command_that_is_named_is_loaded_alone(self) -> None:
        _, modules = _imported("plan", "--help")
        loaded = {f"outliermerge.cli.{name}" for name in cli.COMMANDS.values()} & modules
        assert loaded == {"outliermerge.cli.plan"}

    def test_a_word_that_is_no_command_is_refused_with_the_list_of_them(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for word in ("evaluate", "console"):  # modules, but no commands
            assert cli.main([word]) == 2
            said = capsys.readouterr().err
            assert all(name in said for name in COMMANDS)
        assert cli.main(["compare_weights"]) == 2
        assert capsys.readouterr().err.endswith("Did you mean 'compare-weights'?\n")


class TestUsage:
    def test_no_arguments_print_the_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([]) == 2
        printed = capsys.readouterr()
        assert "examples:" in printed.out + printed.err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["rnu"], "rnu"),
            (["run"], "SPEC"),
            (["run", "a.yaml", "b.yaml"], "b.yaml"),
            (["run", "a.yaml", "--outptu", "x"], "--outptu"),
            (["run", "a.yaml", "--over"], "--over"),
            (["plan", "a.yaml", "--fresh"], "--fresh"),
            (["plan", "a.yaml", "--threads", "-1"], "--threads"),
            (["plan", "a.yaml", "--threads", "two"], "'two' is not a number of at least 0"),
            (["eval", "a", "--limit", "0"], "'0' is not a number of at least 1"),
            (["verify"], "OUT"),
            (["--nonsense"], "--nonsense"),
        ],
    )
    def test_wrong_usage_is_2_and_says_what(
        self, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert said in printed.err

    @pytest.mark.parametrize("command", ["run", "plan"])
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--shard-size", "5XB"], "--shard-size: '5XB' is not a size"),
            (["--shard-size", "0"], "--shard-size: '0' is not a size"),
            (["--memory", "much"], "--memory: 'much' is not a size"),
            (["--memory", "1"], "--memory: 1 B is too little"),
            (["--device", "tpu"], "--device: found 'tpu', expected cpu, cuda"),
        ],
    )
    def test_a_wrong_value_is_2_and_nothing_is_written(
        self,
        place: Path,
        command: str,
        options: list[str],
        said: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        output = place / "out"
        code = cli.main([command, str(place / "spec.yaml"), "--output", str(output), *options])
        printed = capsys.readouterr()
        assert code == 2
        assert said in printed.err.partition("error: ")[2]
        assert printed.out == ""
        assert not output.exists()
        assert not (place / "out.partial").exists()

    @pytest.mark.parametrize("command", ["run", "plan"])
    def test_no_spec_file_is_2_and_no_model_is_1(
        self, place: Path, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = ("--output", str(place / "out"))
        assert cli.main([command, str(place / "absent.yaml"), *output]) == 2
        assert capsys.readouterr().err.endswith("absent.yaml: no such spec file\n")
        (place / "task1" / "model.safetensors").unlink()
        assert cli.main([command, str(place / "spec.yaml"), *output]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {place}/spec.yaml:")
        assert f"{place}/task1" in error


class TestPlan:
    def test_it_imports_no_torch(self, place: Path) -> None:
        for options in ([], ["--json"]):
            code, modules = _imported("plan", place / "spec.yaml", *options)
            assert code == 0
            assert modules.isdisjoint({"torch", "transformers", "huggingface_hub"})
            assert "outliermerge.planning.planner" in modules

    def test_the_table_tells_what_a_person_asks(
        self,
        place: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("COLUMNS", "300")
        arguments = ["plan", str(place / "spec.yaml"), "--output", str(place / "out")]
        assert cli.main(arguments) == 0
        printed = capsys.readouterr()
        lines = (printed.out + printed.err).splitlines()

        def line(*parts: str) -> str:
            found = [one for one in lines if all(part in one for part in parts)]
            assert len(found) == 1, (parts, lines)
            return found[0]

        line(f"{place}/base", "base", " 6 ", "float32 ×4", "float16 ×1", "int64 ×1")
        line(f"{place}/task1", "model", " 6 ", "float32 ×4")
        line(f"{place}/task2", "model", " 6 ", "float32 ×4")
        line("merged by ties", " 5 ", "520")
        line("copied if equal (int64 buffer)", " 1 ", " 3 ")
        line("density", "0.25→1 over the layers", " 5 ", "task1")
        line("lambda", "0.5", " 5 ")
        line("disk", "reads 6.26 kB", "1 file(s)", " free")
        line("time", "a trial of")
        line("peak memory", "for the program", "threads, device cpu")
        line("output", f"{place}/out")
        line("files carried over", "config.json")
        line("note: files of the base model that are not carried over:")
        line("  optimizer.pt")
        assert not (place / "out").exists()
        assert not (place / "out.partial").exists()

    def test_models_are_in_the_order_of_the_spec(
        self,
        place: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("COLUMNS", "300")
        assert cli.main(["plan", str(place / "spec.yaml")]) == 0
        text = capsys.readouterr().out
        places = [text.index(f"{place}/{name} ") for name in ("base", "task1", "task2")]
        assert places == sorted(places)

    def test_its_numbers_are_those_of_the_run_and_the_disk(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = place / "out"
        options = [str(place / "spec.yaml"), "--output", str(output)]
        options += ["--shard-size", "1kB", "--threads", "2", "--json"]
        assert cli.main(["plan", *options, "--tensors"]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert cli.main(["run", *options]) == 0
        printed = capsys.readouterr()
        done = json.loads(printed.out)
        assert printed.err == ""

        sizes = {path.name: path.stat().st_size for path in output.glob("*.safetensors")}
        assert len(sizes) > 1
        assert {shard["file"]: shard["num_bytes"] for shard in planned["shards"]} == sizes
        assert planned["write_bytes"] == sum(sizes.values())
        tensors = load_folder(output)
        assert done["written_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
        assert planned["input_bytes"] == done["input_bytes"] == 3 * done["written_bytes"]
        assert done["read_bytes"] >= done["input_bytes"]
        assert planned["num_parameters"] == done["num_parameters"]
        assert done["num_parameters"] == sum(tensor.numel() for tensor in tensors.values())
        assert len(planned["tensors"]) == done["num_tensors"] == len(tensors)
        for entry in planned["tensors"]:
            tensor = tensors[entry["name"]]
            assert entry["shape"] == list(tensor.shape)
            assert entry["dtype"] == str(tensor.dtype).removeprefix("torch.")
            assert entry["name"] in load_file_names(output / entry["file"])
        assert planned["actions"] == {"merge": 5, "equal": 1}
        assert planned["method"] == "ties"
        assert planned["threads"] == 2
        assert planned["device"] == "cpu"
        assert planned["output"] == done["output"] == str(output)
        assert done["num_resumed"] == 0
        assert done["non_finite"] == {}
        assert planned["notes"] == done["notes"]
        assert [entry["model"] for entry in planned["inputs"]] == [
            f"{place}/{name}" for name in ("base", "task1", "task2")
        ]
        assert planned["inputs"][0]["dtypes"] == {"float32": 4, "float16": 1, "int64": 1}
        assert all(e["num_bytes"] == done["written_bytes"] for e in planned["inputs"])
        assert planned["gradients"] == {
            "density": {"model.layers.": [[0.25, 1.0], [0.5, 1.0], [0.75, 1.0], [1.0, 1.0]]}
        }

    def test_its_gradients_are_what_the_run_uses(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = [str(place / "spec.yaml"), "--output", str(place / "out"), "--json"]
        assert cli.main(["plan", *options, "--tensors"]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert cli.main(["run", *options]) == 0
        manifest = json.loads((place / "out" / "outliermerge.json").read_text())
        for entry in planned["tensors"]:
            used = manifest["tensors"][entry["name"]].get("parameters", {})
            assert entry["parameters"] == used
        [values] = planned["gradients"]["density"].values()
        for layer, value in enumerate(values):
            entry = manifest["tensors"][f"model.layers.{layer}.mlp.weight"]
            assert entry["parameters"]["density"] == value


def load_file_names(path: Path) -> list[str]:
    data = path.read_bytes()
    return list(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


class TestRun:
    def test_it_tells_what_it_did(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["run", str(place / "spec.yaml"), "--output", str(place / "out")]) == 0
        printed = capsys.readouterr()
        assert re.fullmatch(
            rf"wrote {place}/out: 6 tensors, 523 parameters, [\d.]+ s, .+/s(, .+ from disk)?\n",
            printed.out,
        )
        assert printed.err == (
            "note: files of the base model that are not carried over:\n  optimizer.pt\n"
        )

    def test_nothing_but_json_is_on_stdout_and_no_bar_is_on_stderr(self, place: Path) -> None:
        for command in ("run", "verify"):
            target = place / ("spec.yaml" if command == "run" else "out")
            options = ["--output", place / "out"] if command == "run" else []
            done = _call(command, target, *options, "--json")
            assert done.returncode == 0, done.stderr
            assert isinstance(json.loads(done.stdout), dict)
            assert done.stderr == ""

    def test_no_bar_is_on_stderr_without_a_terminal(self, place: Path) -> None:
        done = _call("run", place / "spec.yaml", "--output", place / "out")
        assert done.returncode == 0
        assert "\x1b" not in done.stderr + done.stdout
        assert "\r" not in done.stderr + done.stdout
        assert "merging" not in done.stderr + done.stdout
        assert [line.split()[0] for line in done.stderr.splitlines()] == ["note:", "optimizer.pt"]

    def test_at_a_terminal_a_bar_is_shown_beside_the_json(self, place: Path) -> None:
        code, out, shown = _at_a_terminal(
            "run", place / "spec.yaml", "--output", place / "out", "--json"
        )
        assert code == 0, shown
        assert json.loads(out)["num_tensors"] == 6
        assert "merging" in shown
        assert "━" in shown
        total = sum(_work_bytes(place))
        assert f"{total / 1000:.1f}/{total / 1000:.1f} kB" in shown, "the bar is not full"

        code, out, shown = _at_a_terminal("verify", place / "out")
        assert code == 0
        assert "every tensor and file" in out
        assert "verifying" in shown

    def test_an_error_at_a_terminal_is_one_message(self, place: Path) -> None:
        tensors = load_folder(place / "task2")
        tensors["half"][0] = float("nan")
        save_tensors(place / "task2", tensors)
        code, out, shown = _at_a_terminal("run", place / "spec.yaml", "--output", place / "out")
        assert (code, out) == (1, "")
        assert "error: tensor 'half' has values that are infinite or NaN" in shown
        assert "Traceback" not in shown


def _work_bytes(place: Path) -> list[int]:
    import outliermerge

    planned = outliermerge.plan(place / "spec.yaml")
    return [planned.num_work_bytes(job) for job in planned.jobs]


def _at_a_terminal(*arguments: object) -> tuple[int, str, str]:
    """Run with stderr on a pseudo-terminal; return exit code, stdout, and what was shown."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], LIMIT_SECONDS)[0]:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    assert process.stdout is not None
    out = process.stdout.read().decode()
    process.stdout.close()
    code = process.wait(timeout=LIMIT_SECONDS)
    os.close(ours)
    return code, out, shown.decode()


class TestInterrupt:
    def test_ctrl_c_is_one_line_and_the_next_run_goes_on(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        base = {f"w{n}": torch.randn(100, 30, generator=generator) for n in range(10)}
        save_tensors(tmp_path / "base", base)
        save_tensors(tmp_path / "task", {name: tensor * 1.01 for name, tensor in base.items()})
        (tmp_path / "spec.yaml").write_text(
            f"merge_method: ties\nbase_model: {tmp_path}/base\n"
            f"models:\n- model: {tmp_path}/task\n  parameters:\n    density: 0.3\n"
        )
        run = ["run", tmp_path / "spec.yaml", "--output", tmp_path / "out", "--threads", "1"]
        journal = tmp_path / "out.partial.journal"
        process = subprocess.Popen(
            held(5, "interrupt", *run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert stopped(process)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=LIMIT_SECONDS)

        assert process.returncode == 130
        assert out == ""
        assert err == "error: interrupted: the same command goes on from here\n"
        assert not (tmp_path / "out").exists()
        num_journaled = journal.read_bytes().count(b'{"tensor"')
        assert num_journaled == 5

        done = _call(*run, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["num_resumed"] == num_journaled
        assert _call("verify", tmp_path / "out").returncode == 0

    @pytest.mark.parametrize("buffered", [False, True])
    @pytest.mark.parametrize(
        "command",
        [
            "plan SPEC",
            "plan SPEC --json",
            "methods",
            "methods min_sigma",
            "methods --json",
            "schema",
            "--help",
            "run --help",
            "--version",
        ],
    )
    @pytest.mark.sampled(3)
    def test_a_reader_that_has_enough_is_no_error(
        self, place: Path, command: str, buffered: bool
    ) -> None:
        """As in `outliermerge plan spec.yaml | head -1`."""
        words = [str(place / "spec.yaml") if word == "SPEC" else word for word in command.split()]
        reader, writer = os.pipe()
        os.close(reader)
        environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
        process = subprocess.Popen(
            [*PROGRAM, *words], stdout=writer, stderr=subprocess.PIPE, env=environment
        )
        os.close(writer)
        _, err = process.communicate(timeout=LIMIT_SECONDS)
        notes = b"note: files of the base model that are not carried over:\n  optimizer.pt\n"
        assert err.replace(notes, b"") == b""
        assert process.returncode == 0

    def test_plan_into_head_is_quiet(self, place: Path) -> None:
        line = f"'{sys.executable}' -m outliermerge plan -q '{place}/spec.yaml'"
        done = subprocess.run(
            ["bash", "-c", f"{line} | head -1"],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
        assert done.stdout.startswith("ties: ")
        assert done.stdout.count("\n") == 1
        assert done.stderr == ""


class TestMethods:
    def test_the_list_has_every_method_with_its_parameters(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("COLUMNS", "300")
        assert cli.main(["methods"]) == 0
        text = "\n" + capsys.readouterr().out
        for method in EVERY.values():
            part = text.partition(f"\n{method.name} ")[2]
            assert method.summary in part.splitlines()[0]
            following = re.split(r"\n(?=\w)", part)[0]
            for parameter in method.parameters.values():
                assert re.search(rf"^ +{parameter.name} ", following, re.MULTILINE)
            assert method.paper in following
        assert f"what a method has merged: {', '.join(MODIFIERS)}" in text

    @pytest.mark.parametrize("name", EVERY)
    def test_one_method_has_its_formula(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["methods", name]) == 0
        text = capsys.readouterr().out
        assert text.startswith(name)
        assert "W* = " in text
        assert EVERY[name].paper in text
        for parameter in EVERY[name].parameters:
            assert re.search(rf"^{parameter} ", text, re.MULTILINE)

    @pytest.mark.parametrize("name", EVERY)
    def test_one_method_is_told_in_the_words_of_a_spec(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        method = EVERY[name]
        assert cli.main(["methods", name]) == 0
        text = capsys.readouterr().out
        told = re.findall(r"^ {4}(\S+): ", text, re.MULTILINE)
        assert sorted(told) == sorted(method.parameters)
        # No argument of the function that no spec can set, and no shape of one.
        assert not re.search(r"\b\w+_[A-Z]{1,3}\b|\b[a-z]\w*_\b|\(.*\bM\b.*\)|Args:", text)
        needs = method.needs.keys() - method.parameters  # of min_sigma both are called sigma
        assert not any(re.search(rf"^ +{need}: ", text, re.MULTILINE) for need in needs)

    def test_json_describes_the_parameters(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["methods", "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert [entry["name"] for entry in listed] == list(EVERY)
        [ties] = [entry for entry in listed if entry["name"] == "ties"]
        assert ties["space"] == "delta"
        assert ties["cut"] == "element"
        assert ties["paper"] == "arXiv 2306.01708"
        by_name = {parameter["name"]: parameter for parameter in ties["parameters"]}
        assert by_name["density"] == {
            "name": "density",
            "type": "float",
            "default": 1.0,
            "per_model": True,
            "range": "≥ 0, ≤ 1",
        }
        assert by_name["lambda"]["per_model"] is False
        assert by_name["normalize"]["type"] == "bool"

        assert cli.main(["methods", "ties", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == [ties]

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("min_sgima", "Did you mean 'min_sigma'?"),
            ("tie", "Did you mean 'ties'?"),
            ("qqqq", f"Valid: {', '.join(sorted(EVERY))}."),
            ("nowhere:function", "no module 'nowhere' can be imported"),
            ("json:nothing", "json has no 'nothing'"),
            ("json:dumps", "expected a function decorated with @outliermerge.merge_method"),
        ],
    )
    def test_an_unknown_name_is_2_with_help(
        self, name: str, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["methods", name]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert said in printed.err
        assert name in printed.err

    def test_listing_imports_no_torch(self) -> None:
        code, modules = _imported("methods")
        assert code == 0
        assert modules.isdisjoint({"torch", "transformers"})


class TestSchema:
    @pytest.fixture
    def schema(self, capsys: pytest.CaptureFixture[str]) -> dict:
        assert cli.main(["schema"]) == 0
        return json.loads(capsys.readouterr().out)

    def test_it_is_a_json_schema(self, schema: dict) -> None:
        validator = jsonschema.validators.validator_for(schema)
        validator.check_schema(schema)
        assert schema["type"] == "object"

    def test_it_takes_a_spec_and_refuses_a_wrong_one(self, schema: dict, place: Path) -> None:
        validator = jsonschema.validators.validator_for(schema)(schema)
        spec = yaml.safe_load((place / "spec.yaml").read_text())
        validator.validate(spec)
        wrong = [
            spec | {"base_mdoel": "x"},
            spec | {"models": []},
            spec | {"models": [{"modle": "x"}]},
            spec | {"out_dtype": "int8"},
            spec | {"missing": "maybe"},
            {key: value for key, value in spec.items() if key != "merge_method"},
        ]
        for document in wrong:
            assert not validator.is_valid(document), document
