"""Every call on an input fails or does half: the merge goes on, or one message names the file.

The points are all calls of a run on the models. A sample of them is tried, of one in five pairs of
a case and a mode; `make faults` tries all.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import forms
import pytest
import torch
from checkpoints import save_tensors
from forms import FORMS
from injection import Call, Done, Driver, Injection, try_calls
from kinds import IMPORTED, KINDS, MODELS, command, save_models, save_specs

NUM_SAMPLED = 6
# Of kinds of specs, which share how an input is read, a test tries two calls, and `make faults` one
# in four for each mode.
NUM_OF_KINDS, EVERY_OF_KINDS = 2, 4
READING = "open,read,pread,preadv,mmap,opendir,stat"
MODES = {
    "EIO": ("err", errno.EIO, READING),
    "ESTALE": ("err", errno.ESTALE, READING),
    "EIO from then on": ("persist", errno.EIO, READING),
    "EINTR": ("err", errno.EINTR, "open,read,pread,preadv"),
    "half": ("short", 0, "read,pread,preadv"),
    "end of file": ("eof", 0, "pread,preadv"),
}
ADAPTER = "adapter"
CASES = {
    "kernels": ("min_sigma.yaml",),
    "torch": ("min_sigma.yaml", "--no-kernels"),
    "TIES": ("ties.yaml",),
    "TIES by torch": ("ties.yaml", "--no-kernels"),
    "several threads": ("min_sigma.yaml", "--threads", "3"),
    **{kind: (f"{kind}.yaml",) for kind in (*KINDS, *FORMS)},
    ADAPTER: ("lora.yaml", "--rank", "2"),
}

OF_KINDS = (*KINDS, *FORMS, ADAPTER)


class Workplace:
    """Models with weights in safetensors and in a pickle, and the calls of each case on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        generator = torch.Generator().manual_seed(0)
        for name in ("base", "task", "pickled"):
            tensors = {f"w{n}": torch.randn(8, 10, generator=generator) for n in range(3)}
            tensors["large"] = torch.randn(3 * 65_536 + 5, generator=generator)
            if name == "pickled":
                (root / name).mkdir()
                torch.save(tensors, root / name / "pytorch_model.bin")
                shutil.copy(root / "base" / "config.json", root / name)
            else:
                save_tensors(root / name, tensors)
        for method in ("min_sigma", "ties"):
            (root / f"{method}.yaml").write_text(
                f"merge_method: {method}\nbase_model: {root}/base\n"
                f"models:\n- model: {root}/task\n- model: {root}/pickled\n"
            )
        save_models(root / "models")
        save_specs(root, root / "models", gate_mode="hidden")
        forms.save_models(root / "forms")
        forms.save_specs(root, root / "forms")
        self.inputs = [root / name for name in ("base", "task", "pickled")]
        self.inputs += [root / "models" / name for name in MODELS]
        self.inputs += [*(root / "forms").iterdir()]
        self.driver = Driver(root / "driver", (*IMPORTED, *forms.IMPORTED))
        self.calls: dict[str, list[Call]] = {}
        self.expected: dict[str, bytes] = {}

    def run(self, case: str, injection: Injection) -> Done:
        shutil.rmtree(self.root / "out", ignore_errors=True)
        shutil.rmtree(self.root / "out.partial", ignore_errors=True)
        self.root.joinpath("out.partial.journal").unlink(missing_ok=True)
        spec, *more = CASES[case]
        threads = [] if "--threads" in more else ["--threads", "1"]
        output = ["--output", self.root / "out", "--no-load-check"]
        word = command(case) if case in KINDS else "extract" if case == ADAPTER else "run"
        return self.driver.run([word, self.root / spec, *output, *more, *threads], injection)

    def prepare(self, case: str) -> list[Call]:
        """Run a case undisturbed, and return its calls on the models."""
        if case not in self.calls:
            done = self.run(case, Injection(kinds=READING, paths=self.inputs))
            assert done.code == 0, done.err
            self.calls[case] = list(done.calls)
            self.expected[case] = self.weights()
        return self.calls[case]

    def weights(self) -> bytes:
        """Return the weights of the output."""
        (file,) = (self.root / "out").glob("*model.*")
        return file.read_bytes()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    made = Workplace(tmp_path_factory.mktemp("input_faults"))
    with made.driver:
        yield made


def _check(workplace: Workplace, case: str, mode: str, number: int) -> None:
    how, value, kinds = MODES[mode]
    done = workplace.run(case, Injection(how, number, value, kinds, workplace.inputs))
    output = workplace.root / "out"
    assert "Traceback" not in done.err, done.err
    if done.code == 0:
        assert workplace.weights() == workplace.expected[case]
        return
    assert done.code == 1, (done.code, done.err)
    assert mode not in ("EINTR", "half"), done.err
    assert done.err.startswith(("error: ", "computing the routers\nerror: ")), done.err
    assert sum(line.startswith("error: ") for line in done.err.splitlines()) == 1
    assert any(str(path) in done.err for path in workplace.inputs), done.err
    weights = [hit for hit in done.hits if hit.kind in ("pread", "preadv")]
    if weights and mode != "EIO from then on":
        assert weights[0].path in done.err, done.err
        assert "tensor" in done.err, done.err
    assert not output.exists()


def _try(workplace: Workplace, case: str, mode: str, *, most: int | None) -> int:
    wanted = MODES[mode][2].split(",")
    calls = [call for call in workplace.prepare(case) if call.kind in wanted]
    return try_calls(
        f"{case}, {mode}",
        calls,
        range(len(calls)),
        lambda number: _check(workplace, case, mode, number),
        step=max(1, len(calls) // most) if most else EVERY_OF_KINDS if case in OF_KINDS else 1,
    )


@pytest.mark.parametrize(("case", "mode"), [*product(CASES, MODES)][::5])
@pytest.mark.sampled(2)
def test_a_call_on_an_input_that_fails_is_gone_on_with_or_named(workplace, case, mode):
    _try(workplace, case, mode, most=NUM_OF_KINDS if case in OF_KINDS else NUM_SAMPLED)


@pytest.mark.faults
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_whichever_call_on_an_input_fails_is_gone_on_with_or_named(
    workplace, case, mode, record_property
):
    record_property("points", _try(workplace, case, mode, most=None))
