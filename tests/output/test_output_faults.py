"""Every call on an output fails, or is the process's last: nothing is lost, and the next run ends.

The points are all calls of a run on the output and what stands beside it. A sample of them is
tried, of one in seven pairs of a scenario and a mode; `make faults` tries all.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import forms
import pytest
import torch
from checkpoints import save_tensors
from forms import FORMS
from injection import Call, Done, Driver, Injection, try_calls
from kinds import KINDS, STAGE, save_models, save_specs
from safetensors.torch import save_file

ORDINARY = "outliermerge.cli.main:main"
KILLED = -9
# Of the points of a scenario, how many a test tries when not all are tried. Kinds of specs share
# how an output is written: of theirs a test tries one, and `make faults` one in four of each mode.
NUM_SAMPLED, EVERY_OF_KINDS = 3, 4


@dataclass(frozen=True)
class Scenario:
    """A command, and what is there before it.

    Attributes:
        arguments: of the command, less the folder of its output.
        outputs: names in that folder that it makes.
        beside: other names that belong to an output.
        overwrites: outputs of another merge are there.
        call: what runs it.
        first: commands that have been run before it.
        then: commands that finish what it has begun.
    """

    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    beside: tuple[str, ...] = ()
    overwrites: bool = False
    call: str = ORDINARY
    first: tuple[tuple[str, ...], ...] = ()
    then: tuple[tuple[str, ...], ...] = ()


FOLDER = ("run", "spec.yaml", "--output", "place/out")
FILE = ("run", "file.yaml", "--output", "place/out.safetensors")
SWEEP = ("sweep", "spec.yaml", "--set", "weight=0.25,0.75", "--output", "place")
MANIFEST = "out.safetensors.outliermerge.json"
SWEPT = ("weight=0.25", "weight=0.75")
OVERWRITE = ("--overwrite",)
SLICES, STAGES, MODULES, TOKENIZER = (
    ("run", f"{kind}.yaml", "--output", "place/out")
    for kind in ("slices", "stages", "modules", "tokenizer")
)
EXPERTS = ("moe", "moe.yaml", "--output", "place/out", "--no-routing")
KEEP, KEPT = ("--keep", STAGE), ("out", f"out-{STAGE}")
PART, OTHER = ((*FOLDER, "--part", part) for part in ("1/2", "2/2"))
JOIN = ("join", "spec.yaml", "--output", "place/out")
FP8, GGUF = (("run", f"to-{form}.yaml", "--output", "place/out") for form in ("fp8", "gguf"))
EXTRACT = ("extract", "lora.yaml", "--output", "place/adapter", "--rank", "2")
UNABLE, SHARED = "without_exchange:main", "with_claims:main"
SCENARIOS = {
    "folder": Scenario(FOLDER, ("out",)),
    "old folder": Scenario((*FOLDER, *OVERWRITE), ("out",), overwrites=True),
    "file": Scenario(FILE, ("out.safetensors",), (MANIFEST,)),
    "old file": Scenario((*FILE, *OVERWRITE), ("out.safetensors",), (MANIFEST,), overwrites=True),
    "sweep": Scenario(SWEEP, SWEPT),
    "old sweep": Scenario((*SWEEP, *OVERWRITE), SWEPT, overwrites=True),
    "folder, no exchange": Scenario(FOLDER, ("out",), call=UNABLE),
    "old folder, no exchange": Scenario(
        (*FOLDER, *OVERWRITE), ("out",), overwrites=True, call=UNABLE
    ),
    "old file, no exchange": Scenario(
        (*FILE, *OVERWRITE), ("out.safetensors",), (MANIFEST,), overwrites=True, call=UNABLE
    ),
    "first part": Scenario(PART, ("out",), then=(OTHER, JOIN)),
    "last part": Scenario(PART, ("out",), first=(OTHER,), then=(JOIN,)),
    "part of an old folder": Scenario(
        (*PART, *OVERWRITE),
        ("out",),
        overwrites=True,
        then=((*OTHER, *OVERWRITE), (*JOIN, *OVERWRITE)),
    ),
    "join": Scenario(JOIN, ("out",), first=(PART, OTHER)),
    "join of an old folder": Scenario(
        (*JOIN, *OVERWRITE),
        ("out",),
        overwrites=True,
        first=((*PART, *OVERWRITE), (*OTHER, *OVERWRITE)),
    ),
    "folder, shared disk": Scenario(FOLDER, ("out",), call=SHARED),
    "last part, shared disk": Scenario(PART, ("out",), first=(OTHER,), then=(JOIN,), call=SHARED),
    "join, shared disk": Scenario(JOIN, ("out",), first=(PART, OTHER), call=SHARED),
    "slices": Scenario(SLICES, ("out",)),
    "stages": Scenario((*STAGES, *KEEP), KEPT),
    "old stages": Scenario((*STAGES, *KEEP, *OVERWRITE), KEPT, overwrites=True),
    "old modules": Scenario((*MODULES, *OVERWRITE), ("out",), overwrites=True),
    "tokenizer": Scenario(TOKENIZER, ("out",)),
    "moe": Scenario(EXPERTS, ("out",)),
    "old moe": Scenario((*EXPERTS, *OVERWRITE), ("out",), overwrites=True),
    **{
        form: Scenario(("run", f"{form}.yaml", "--output", "place/out"), ("out",)) for form in FORMS
    },
    "old to-gguf": Scenario((*GGUF, *OVERWRITE), ("out",), overwrites=True),
    "part of to-fp8": Scenario(
        (*FP8, "--part", "1/2"),
        ("out",),
        then=((*FP8, "--part", "2/2"), ("join", "to-fp8.yaml", "--output", "place/out")),
    ),
    "adapter": Scenario(EXTRACT, ("adapter",)),
}
MODES = {
    "killed before": ("kill_before", 0),
    "killed after": ("kill_after", 0),
    "torn": ("torn", 0),
    "EIO": ("err", errno.EIO),
    "ENOSPC": ("err", errno.ENOSPC),
    "EIO from then on": ("persist", errno.EIO),
    "EINTR": ("err", errno.EINTR),
    "half": ("short", 0),
    "end of file": ("eof", 0),
}
# What an errno is injected into: what only asks is not told apart from what is not there.
CHANGING = (
    "open,read,pread,preadv,write,pwrite,pwritev,fsync,fallocate,truncate,rename,link,unlink,"
    "rmdir,mkdir,lock,opendir"
)


class Workplace:
    """Models, specs, and what each scenario starts from and ends in."""

    def __init__(self, root: Path) -> None:
        self.root, self.place = root, root / "place"
        generator = torch.Generator().manual_seed(0)
        for name in ("base", "task"):
            tensors = {f"w{n}": torch.randn(8, 10, generator=generator) for n in range(3)}
            save_tensors(root / name, tensors)
            (root / name / "tokenizer_config.json").write_text('{"model_max_length": 8}')
            save_file(tensors, root / f"{name}.safetensors")
        for name, suffix in (("spec", ""), ("file", ".safetensors")):
            for old, weight in (("", 0.5), ("old_", 0.1)):
                (root / f"{old}{name}.yaml").write_text(
                    f"merge_method: task_arithmetic\nbase_model: {root}/base{suffix}\n"
                    f"models:\n- model: {root}/task{suffix}\nparameters:\n  weight: {weight}\n"
                )
        save_models(root / "models")
        for start, weight in (("", 0.5), ("old_", 0.1)):
            save_specs(root, root / "models", start=start, weight=weight)
        forms.save_models(root / "forms")
        for start, weight in (("", 0.5), ("old_", 0.1)):
            forms.save_specs(root, root / "forms", start=start, weight=weight)
        self.driver = Driver(root / "driver", forms.IMPORTED)
        self.watched = [self.place, self.driver.cache]
        self.calls: dict[str, list[Call]] = {}
        self.before: dict[str, dict[str, bytes]] = {}
        self.after: dict[str, dict[str, bytes]] = {}

    def prepare(self, name: str) -> list[Call]:
        """Run a scenario undisturbed, and return its calls on the output."""
        if name not in self.calls:
            scenario = SCENARIOS[name]
            self._clear()
            if scenario.overwrites:
                words = scenario.first[0] if scenario.first else scenario.arguments
                arguments = [self._old(word) for word in _without_parts(words)]
                assert self.run(arguments, Injection()).code == 0
            self.before[name] = _files(self.place)
            self.run_all(scenario.first, scenario.call)
            injection = Injection(kinds="all", paths=self.watched)
            done = self.run(scenario.arguments, injection, scenario.call)
            assert done.code == 0, done.err
            self.calls[name] = list(done.calls)
            self.run_all(scenario.then, scenario.call)
            self.after[name] = _files(self.place)
        return self.calls[name]

    @staticmethod
    def _old(argument: str) -> str:
        return f"old_{argument}" if argument.endswith(".yaml") else argument

    def reset(self, name: str) -> None:
        """Put back what a scenario starts from."""
        self._clear()
        for file, data in self.before[name].items():
            (self.place / file).parent.mkdir(parents=True, exist_ok=True)
            (self.place / file).write_bytes(data)
        self.run_all(SCENARIOS[name].first, SCENARIOS[name].call)

    def run_all(self, commands: tuple[tuple[str, ...], ...], call: str = ORDINARY) -> None:
        """Run commands, undisturbed."""
        for arguments in commands:
            done = self.run(arguments, Injection(), call)
            assert done.code == 0, done.err

    def _clear(self) -> None:
        for folder in self.watched:
            shutil.rmtree(folder, ignore_errors=True)
        self.place.mkdir()
        (self.place / "notes.txt").write_text("mine")

    def run(self, arguments, injection: Injection, call: str = ORDINARY) -> Done:
        more = ("--no-load-check", "--threads", "1") if arguments[0] != "verify" else ()
        named = [
            str(self.root / a) if a.endswith(".yaml") or a.startswith("place") else a
            for a in arguments
        ]
        return self.driver.run([*named, *more], injection, call=call)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    made = Workplace(tmp_path_factory.mktemp("faults"))
    with made.driver:
        yield made


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _without_parts(words: tuple[str, ...]) -> list[str]:
    """Return the command of a whole output that is not there yet."""
    words = words[: words.index("--part")] if "--part" in words else words
    return [word for word in words if word != "--overwrite"]


def _of(files: dict[str, bytes], output: str) -> dict[str, bytes]:
    return {n: data for n, data in files.items() if n == output or n.startswith(f"{output}/")}


def check(workplace: Workplace, name: str, mode: str, number: int, kinds: str) -> None:
    """Try one point, and what comes after it."""
    scenario, (how, value) = SCENARIOS[name], MODES[mode]
    old, new = workplace.before[name], workplace.after[name]
    workplace.reset(name)
    injection = Injection(how, number, value, kinds, workplace.watched)
    done = workplace.run(scenario.arguments, injection, scenario.call)
    assert len(done.hits) >= 1
    assert "Traceback" not in done.err
    if how.startswith("kill") or how == "torn":
        assert done.code == KILLED
    else:
        assert done.code in (0, 1)
        assert (done.code == 1) == done.err.startswith("error: "), done.err
    if mode in ("EINTR", "half"):
        assert done.code == 0, done.err
    found = _files(workplace.place)
    assert found["notes.txt"] == b"mine"
    for output in scenario.outputs:
        there = _of(found, output)
        assert there in (_of(old, output), _of(new, output), {}), "it is not whole"
        if scenario.overwrites and not there:
            assert scenario.call == UNABLE, "nothing has the name"
    if done.code != 0:
        undisturbed = workplace.run(scenario.arguments, Injection(), scenario.call)
        if undisturbed.code != 0:
            assert "exists already" in undisturbed.err, undisturbed.err
    workplace.run_all(scenario.then, scenario.call)
    assert _files(workplace.place) == new
    left = {path.name for path in workplace.place.iterdir()}
    assert left == {*scenario.outputs, *scenario.beside, "notes.txt"}


def _points(workplace: Workplace, name: str, mode: str) -> tuple[list[int], str]:
    """Return the numbers of the calls that a mode is tried at, and the kinds that are counted."""
    calls = workplace.prepare(name)
    how = MODES[mode][0]
    if how.startswith("kill"):
        changing = {*CHANGING.split(",")} - {"read", "pread", "preadv", "opendir"}
        return [call.number for call in calls if call.kind in changing], "all"
    kinds = "write,pwrite,pwritev" if how == "torn" else CHANGING
    if mode == "EINTR":
        kinds = "open,read,pread,preadv,write,pwrite,pwritev,truncate,lock"
    if mode in ("half", "end of file"):
        kinds = "read,pread,preadv" + (",write,pwrite,pwritev" if mode == "half" else "")
    if mode == "ENOSPC":
        kinds = "write,pwrite,pwritev,fallocate,mkdir,fsync,rename"
    return list(range(sum(call.kind in kinds.split(",") for call in calls))), kinds


def _is_kind(name: str) -> bool:
    return name.removeprefix("old ").removeprefix("part of ") in (*KINDS, *FORMS)


def _try(workplace: Workplace, name: str, mode: str, *, most: int | None) -> int:
    numbers, kinds = _points(workplace, name, mode)
    calls = [c for c in workplace.calls[name] if kinds == "all" or c.kind in kinds.split(",")]
    every = EVERY_OF_KINDS if _is_kind(name) else 1
    return try_calls(
        f"{name}, {mode}",
        calls,
        numbers,
        lambda number: check(workplace, name, mode, number, kinds),
        step=max(1, len(numbers) // most) if most else every,
    )


@pytest.mark.parametrize(("name", "mode"), [*product(SCENARIOS, MODES)][::7])
@pytest.mark.sampled(2)
def test_nothing_is_lost_where_a_call_fails_or_is_the_last(workplace, name, mode):
    _try(workplace, name, mode, most=1 if _is_kind(name) else NUM_SAMPLED)


@pytest.mark.faults
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_lost_whichever_call_fails_or_is_the_last(
    workplace, name, mode, record_property
):
    record_property("points", _try(workplace, name, mode, most=None))
