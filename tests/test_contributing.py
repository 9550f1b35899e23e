"""What CONTRIBUTING.md says of adding to the house, done: each addition in a copy of the package.

The files of `tests/contributed/` are put into their places and lines into the files named here;
then the copy does what was added. In how many places that was is what the page says.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load_folder, save_tensors
from compiling import quick_compiler

ROOT = Path(__file__).parent.parent
ADDED = Path(__file__).parent / "contributed"
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
BINARIES = Path(sys.executable).parent


@dataclass(frozen=True)
class Addition:
    """What is added to the house.

    Attributes:
        heading: of its section in CONTRIBUTING.md.
        file: the new file, of `contributed/`, and where it goes.
        places: a file, what stands in it, and the line or word that is put behind that.
        needs: another addition that is made first.
    """

    heading: str
    file: tuple[str, str]
    places: tuple[tuple[str, str, str], ...]
    needs: str = ""


PACKAGE = "outliermerge"
ADDITIONS = {
    "method": Addition(
        "A method",
        ("magmax.py", f"{PACKAGE}/methods/magmax.py"),
        (
            (
                f"{PACKAGE}/methods/table.py",
                "from outliermerge.methods.lines import lines\n",
                "from outliermerge.methods.magmax import magmax\n",
            ),
            (f"{PACKAGE}/methods/table.py", "        passthrough,\n", "        magmax,\n"),
            ("pyproject.toml", '"arcee_fusion | min_sigma', " | magmax"),
        ),
    ),
    "kernel": Addition(
        "A kernel",
        ("magmax.h", f"{PACKAGE}/engines/native/magmax.h"),
        (
            (
                f"{PACKAGE}/engines/native/methods.h",
                '#include "min_sigma.h"\n',
                '#include "magmax.h"\n',
            ),
            (f"{PACKAGE}/engines/native/methods.h", "&min_sigma, ", "&magmax, "),
            (
                f"{PACKAGE}/methods/magmax.py",
                "from outliermerge.methods.contract import merge_method\n",
                "from outliermerge.methods.kernel_call import Kernel, KernelCall\n",
            ),
            (
                f"{PACKAGE}/methods/magmax.py",
                '    paper="arXiv 2407.06322",\n',
                '    kernel=Kernel("magmax", lambda p, needs: KernelCall("magmax", (p["lambda"],)))'
                ",\n",
            ),
        ),
        needs="method",
    ),
    "format": Addition(
        "A format",
        ("npz_file.py", f"{PACKAGE}/checkpoint/formats/npz_file.py"),
        (
            (
                f"{PACKAGE}/checkpoint/formats/table.py",
                'alone=(".ckpt",)),\n',
                '    Format("npz_file", (".npz",)),\n',
            ),
        ),
    ),
    "command": Addition(
        "A command",
        ("tensors.py", f"{PACKAGE}/cli/tensors.py"),
        (
            (f"{PACKAGE}/cli/parser.py", '    "stats": "stats",\n', '    "tensors": "tensors",\n'),
            ("pyproject.toml", '"run | plan | moe', " | tensors"),
        ),
    ),
    "executor": Addition(
        "An executor",
        ("processes.py", f"{PACKAGE}/execution/processes.py"),
        (
            (
                "pyproject.toml",
                'containers = ["outliermerge.execution"]\nlayers = [\n',
                '    "processes",\n',
            ),
        ),
    ),
}


def make_house(folder: Path, *added: str) -> Path:
    """Copy the package with what is added, and what `make check` reads."""
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    for kind in added:
        addition = ADDITIONS[kind]
        shutil.copy(ADDED / addition.file[0], folder / addition.file[1])
        for file, anchor, text in addition.places:
            content = (folder / file).read_text()
            assert content.count(anchor) == 1, (kind, file, anchor)
            (folder / file).write_text(content.replace(anchor, anchor + text))
    return folder


@pytest.fixture(autouse=True)
def _warm(warm_torch, monkeypatch):
    """Import torch once for all processes of the copies, which import the package themselves."""
    monkeypatch.setattr(sys, "executable", str(warm_torch))


# From Python 3.12 on, forking is warned of where a library has started threads.
WARNINGS = ("-W", "error", "-W", "ignore:This process:DeprecationWarning")


def in_house(house: Path, *arguments: str) -> str:
    """Run Python with the copy of the package; return what it prints."""
    return output_of([sys.executable, *WARNINGS, *arguments], house)


def output_of(command: Sequence[str | Path], house: Path) -> str:
    done = subprocess.run(
        command,
        cwd=house,
        env=os.environ | {"PYTHONPATH": str(house)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


_DRIVER = """
import json, sys
import outliermerge
from outliermerge.api import run
house, spec, output, executor, options = json.loads(sys.argv[1])
assert outliermerge.__file__.startswith(house)
if executor:
    from outliermerge.execution.processes import execute_in_processes as executor
    options["executor"] = executor
print(json.dumps(run(spec, output=output, **options).as_dict()))
assert outliermerge.verify(output) == []
"""


def merge(house: Path, spec: dict, output: Path, *, executor: bool = False, **options) -> bytes:
    """Merge in the copy of the house, and verify; return the output's bytes."""
    job = json.dumps([str(house), spec, str(output), executor, options])
    in_house(house, "-c", _DRIVER, job)
    return (output / "model.safetensors").read_bytes()


SHAPES = {"large.weight": (700, 311), "small.weight": (7, 9), "tiny.bias": (3,)}


@pytest.fixture(scope="module")
def states() -> list[dict[str, torch.Tensor]]:
    """A base and three models."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    moved = [
        {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        for _ in range(3)
    ]
    return [base, *moved]


@pytest.fixture(scope="module")
def models(states, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_tensors(folder / str(i), state) for i, state in enumerate(states)]


def spec_of(method: str, models: Sequence[Path], **parameters: float) -> dict:
    return {
        "merge_method": method,
        "base_model": str(models[0]),
        "models": [{"model": str(model)} for model in models[1:]],
        "parameters": parameters,
    }


@pytest.fixture(scope="module")
def houses(tmp_path_factory) -> dict[str, Path]:
    """A copy of the house with each addition; the kernel's is compiled."""
    made = {}
    for kind, addition in ADDITIONS.items():
        added = (addition.needs, kind) if addition.needs else (kind,)
        made[kind] = make_house(tmp_path_factory.mktemp(kind), *added)
    return made


def check_values(output: Path, states: list[dict[str, torch.Tensor]], scale: float) -> None:
    base, *others = states
    for name, merged in load_folder(output).items():
        deltas = torch.stack([(state[name] - base[name]).double() for state in others])
        largest = deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]
        torch.testing.assert_close(merged.double(), base[name] + scale * largest, atol=1e-6, rtol=0)


def test_a_method_merges_and_no_block_or_thread_changes_its_bytes(houses, models, states, tmp_path):
    house, spec = houses["method"], spec_of("magmax", models, **{"lambda": 0.5})
    first = merge(house, spec, tmp_path / "first", threads=1)
    check_values(tmp_path / "first", states, 0.5)
    assert merge(house, spec, tmp_path / "small", threads=1, memory="9MB") == first
    assert merge(house, spec, tmp_path / "many", threads=3) == first


def test_a_kernel_gives_the_bytes_of_torch_and_is_called(
    houses, models, states, tmp_path, monkeypatch
):
    monkeypatch.setenv("CC", quick_compiler(tmp_path))
    house = houses["kernel"]
    for path in (house / PACKAGE / "engines").glob("_kernels*.so"):
        path.unlink()
    for command in commands_of("A kernel"):
        run_command(command, house)
    spec = spec_of("magmax", models, **{"lambda": 0.5})
    called = """

from outliermerge.engines.cpu import KernelEngine
merge = KernelEngine.merge_places
def merged(self, variants, sources, num_elements, start=0):
    called.update(arguments[0] for _, (_, arguments, _), _ in variants)
    return merge(self, variants, sources, num_elements, start)
called = set()
KernelEngine.merge_places = merged
"""
    job = json.dumps([str(house), spec, str(tmp_path / "kernels"), False, {"memory": "30MB"}])
    in_house(house, "-c", f"{called}{_DRIVER}\nassert called == {{'magmax'}}, called", job)
    check_values(tmp_path / "kernels", states, 0.5)
    by_torch = merge(house, spec, tmp_path / "torch", kernels=False)
    assert (tmp_path / "kernels" / "model.safetensors").read_bytes() == by_torch


def test_a_format_merges_to_the_bytes_of_the_same_weights_in_safetensors(
    houses, models, states, tmp_path
):
    house, folders = houses["format"], []
    for number, state in enumerate(states):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        np.savez(folders[-1] / "weights.npz", **{n: t.numpy() for n, t in state.items()})
    wanted = merge(house, spec_of("min_sigma", models), tmp_path / "safetensors")
    found = merge(house, spec_of("min_sigma", folders), tmp_path / "npz")
    assert load_folder(tmp_path / "npz").keys() == SHAPES.keys()
    assert found == wanted
    mixed = [models[0], *folders[1:]]
    assert merge(house, spec_of("min_sigma", mixed), tmp_path / "mixed") == wanted


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda path: np.savez_compressed(path, w=np.ones(9)), "array 'w': is compressed"),
        (lambda path: np.savez(path, w=np.array([{}])), "array 'w': dtype |O is not read"),
        (lambda path: np.savez(path, w=np.ones((2, 3), order="F")), "columns lie one behind"),
        (lambda path: path.write_bytes(b"no archive"), "not an archive of arrays"),
    ],
    ids=["compressed", "pickled", "columns", "broken"],
)
def test_what_a_format_cannot_read_is_told(save, message, houses, tmp_path):
    save(tmp_path / "weights.npz")
    program = (
        "import sys; from pathlib import Path; import outliermerge\n"
        "from outliermerge.checkpoint.folders.folder import open_checkpoint\n"
        "try: open_checkpoint(Path(sys.argv[1]))\n"
        "except outliermerge.OutlierMergeError as error: print(error)"
    )
    told = in_house(houses["format"], "-c", program, str(tmp_path / "weights.npz"))
    assert told.startswith(str(tmp_path / "weights.npz")) and message in told


def test_a_command_is_in_the_help_and_runs(houses, models):
    house = houses["command"]
    help_text = in_house(house, "-m", PACKAGE, "--help")
    assert re.search(r"^    tensors +list the tensors of a model$", help_text, re.M)
    listed = json.loads(in_house(house, "-m", PACKAGE, "tensors", str(models[0]), "--json"))
    assert {n: tuple(entry["shape"]) for n, entry in listed.items()} == SHAPES
    assert "700 × 311" in in_house(house, "-m", PACKAGE, "tensors", str(models[0]))


@pytest.mark.parametrize("kernels", [True, False])
def test_an_executor_gives_the_bytes_of_threads(kernels, houses, models, tmp_path):
    house, spec = houses["executor"], spec_of("ties", models, density=0.3)
    wanted = merge(house, spec, tmp_path / "threads", threads=2, kernels=kernels)
    options = {"threads": 3, "kernels": kernels}
    assert merge(house, spec, tmp_path / "processes", executor=True, **options) == wanted


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("", r"small\.weight"),
        (
            "from outliermerge.execution import processes\n"
            "processes._work = lambda *given: processes.os._exit(9)",
            r"worker process \d+ was killed",
        ),
    ],
    ids=["a value", "a kill"],
)
def test_what_fails_in_an_executor_is_told(first, message, houses, states, tmp_path):
    bad = states[1] | {"small.weight": torch.full(SHAPES["small.weight"], torch.nan)}
    models = [save_tensors(tmp_path / n, s) for n, s in (("0", states[0]), ("1", bad))]
    spec = spec_of("ties", models)
    job = json.dumps([str(houses["executor"]), spec, str(tmp_path / "out"), True, {"threads": 2}])
    with pytest.raises(AssertionError, match=f"OutlierMergeError: .*{message}"):
        in_house(houses["executor"], "-c", f"{first}\n{_DRIVER}", job)
    assert not (tmp_path / "out").exists()


# The page.


def section(heading: str) -> str:
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def commands_of(heading: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", section(heading), re.S)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def run_command(command: str, house: Path) -> None:
    """Run a command of the page in a copy of the house; of `make`, see that it is there."""
    program, *arguments = shlex.split(command)
    if program == "make":
        without = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
        target = ["make", "-n", *arguments, "VENV=absent"]
        subprocess.run(target, cwd=ROOT, env=without, capture_output=True, check=True)
    elif program == ".venv/bin/python":
        output_of([sys.executable, *arguments], house)
    else:
        assert program == ".venv/bin/outliermerge", command
        in_house(house, "-m", PACKAGE, *arguments)


def test_every_command_of_the_page_is_in_a_section_that_is_tried():
    tried = [command for heading in HEADINGS for command in commands_of(heading)]
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    assert len(tried) == sum(len(block.splitlines()) for block in blocks)


HEADINGS = ["Set-up", *(addition.heading for addition in ADDITIONS.values())]


@pytest.mark.parametrize("heading", [h for h in HEADINGS if h != "A kernel"])  # compiled above
def test_the_commands_of_the_page_run(heading, houses, tmp_path):
    of = {addition.heading: houses[kind] for kind, addition in ADDITIONS.items()}
    house = of.get(heading) or make_house(tmp_path)
    shutil.copytree(ROOT / "tests", house / "tests", dirs_exist_ok=True)
    for command in commands_of(heading):
        run_command(command, house)


@pytest.mark.parametrize("kind", ADDITIONS)
def test_the_page_counts_what_was_edited(kind):
    addition = ADDITIONS[kind]
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {addition.heading} |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    files = {file for file, _, _ in addition.places}
    assert (
        cells[-1] == f"1 new file, {_number(addition.places, 'place')} in {_number(files, 'file')}"
    )
    for file in {addition.file[1], *files}:
        assert Path(file).name in section(addition.heading), file
    assert addition.file[0] in section(addition.heading)


def _number(things: Collection[object], what: str) -> str:
    return f"{len(things)} {what}{'s' if len(things) > 1 else ''}"


def test_the_tour_leads_through_files_that_are_there():
    tour = section("The house in ten minutes")
    paths = [path for path in re.findall(r"`([\w/]+\.(?:py|h))`", tour)]
    assert len(paths) > 8
    assert [path for path in paths if not (ROOT / PACKAGE / path).is_file()] == []


def test_additions_pass_the_checks_of_the_house(tmp_path):
    house = make_house(tmp_path, *ADDITIONS)
    for program, *arguments in (["ruff", "check"], ["ruff", "format", "--check"], ["lint-imports"]):
        output_of([BINARIES / program, *arguments], house)


@pytest.mark.faults  # it takes a minute
def test_additions_pass_mypy(tmp_path):
    output_of([BINARIES / "mypy"], make_house(tmp_path, *ADDITIONS))
