"""A killed or stopped extraction goes on where it was, and ends in the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_tensors
from safetensors.torch import load_file
from stopping import stopping_after

import outliermerge
from outliermerge.cli.main import main
from outliermerge.errors import OutlierMergeError
from outliermerge.extraction.making import Making

NUM_LAYERS = 3
# Four matrices of a layer, two of them experts in one step; embeddings, a norm, a bias.
NUM_STEPS = 3 * NUM_LAYERS + 3


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (7, 8)}
    for layer in range(NUM_LAYERS):
        stem = f"model.layers.{layer}"
        shapes |= {
            f"{stem}.self_attn.q_proj.weight": (8, 8),
            f"{stem}.mlp.experts.gate_up_proj": (3, 12, 8),
            f"{stem}.mlp.experts.down_proj": (3, 8, 6),
            f"{stem}.mlp.up_proj.weight": (12, 8),
        }
    shapes |= {"model.layers.0.self_attn.q_proj.bias": (8,), "model.norm.weight": (8,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a model, and the adapter that an undisturbed extraction makes."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "tuned")):
        save_tensors(folder / name, _tensors(seed))
    outliermerge.extract(folder / "tuned", base=folder / "base", output=folder / "whole", rank=2)
    return folder


def extract(models: Path, output: Path, **settings: Any) -> None:
    settings = {"rank": 2, **settings}
    outliermerge.extract(models / "tuned", base=models / "base", output=output, **settings)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_whole(models: Path, output: Path) -> None:
    assert files_of(output) == files_of(models / "whole")
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def stopping_at(monkeypatch: pytest.MonkeyPatch, step: int) -> AbstractContextManager[None]:
    """Interrupt an extraction when a step is about to be noted."""
    return stopping_after(monkeypatch, step - 1, key="step")


@contextmanager
def factored(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Note what is factored."""
    found: list[str] = []
    factor = Making._factored

    def noting(making: Making, name: str, *more: Any) -> Any:
        found.append(name)
        return factor(making, name, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Making, "_factored", noting)
        yield found


@pytest.mark.parametrize("step", range(1, NUM_STEPS + 1))
def test_a_stopped_one_goes_on_with_other_threads(
    step: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "adapter"
    with stopping_at(monkeypatch, step), pytest.raises(KeyboardInterrupt):
        extract(models, output, threads=1)
    left = [path.name for path in tmp_path.iterdir()]
    if step > 1:
        assert sorted(left) == ["adapter.partial", "adapter.partial.journal"]
        with pytest.raises(OutlierMergeError, match="another extraction: what was asked for"):
            extract(models, output, rank=3)
    total, read = [0], [0]
    with factored(monkeypatch) as names:
        extract(
            models, output, threads=3, memory="1GiB",
            on_total=lambda num: total.append(num),
            on_progress=lambda num: read.append(num),
        )  # fmt: skip
    num_modules = 3 * NUM_LAYERS - (step - 1)
    assert len({name.rpartition(".")[0] for name in names}) == max(0, num_modules)
    assert sum(read) == total[-1]
    check_whole(models, output)


KILLING = """
import os, signal, sys
import outliermerge
from outliermerge.extraction.written import AdapterFolder
from outliermerge.output.journal import Journal

models, output, where = sys.argv[1:]
num_left = int(where) if where.isdigit() else 0
add = Journal.add

def kill(*anything):
    os.kill(os.getpid(), signal.SIGKILL)

def counted(journal, entry):
    global num_left
    add(journal, entry)
    if "step" in entry:
        num_left -= 1
        if num_left == 0:
            kill()

if where.isdigit():
    Journal.add = counted
else:
    AdapterFolder.finish = kill
outliermerge.extract(f"{models}/tuned", base=f"{models}/base", output=output, rank=2)
"""


@pytest.mark.parametrize("where", ["5", pytest.param("finish", marks=pytest.mark.faults)])
def test_a_killed_one_goes_on(
    where: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "adapter"
    done = subprocess.run(
        [sys.executable, "-c", KILLING, str(models), str(output), where],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()
    with factored(monkeypatch) as names:
        extract(models, output)
    left = 3 * NUM_LAYERS - 5 if where == "5" else 0
    assert len({name.rpartition(".")[0] for name in names}) == left
    check_whole(models, output)


@pytest.mark.parametrize("damage", ["a byte", "the end", "the file", "the journal"])
def test_what_is_not_as_it_was_written_is_made_again(
    damage: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a power cut the journal can know more than the file has."""
    output = tmp_path / "adapter"
    with stopping_at(monkeypatch, 6), pytest.raises(KeyboardInterrupt):
        extract(models, output, threads=1)
    weights = tmp_path / "adapter.partial/adapter_model.safetensors"
    content = weights.read_bytes()
    if damage == "the file":
        weights.unlink()
    elif damage == "the journal":
        (tmp_path / "adapter.partial.journal").unlink()
    else:
        weights.write_bytes(content[:-700] + (b"?" + content[-699:] if damage == "a byte" else b""))
    with factored(monkeypatch) as names:
        extract(models, output)
    modules = len({name.rpartition(".")[0] for name in names})
    assert modules == 9 if damage.startswith("the ") and damage != "the end" else 4 < modules < 9
    check_whole(models, output)


def test_all_is_made_anew_where_a_model_was_copied_again_or_is_another(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copies, place = tmp_path / "copies", tmp_path / "place"
    shutil.copytree(models, copies)
    place.mkdir()
    command = ["extract", str(copies / "tuned"), "--base", str(copies / "base"), "--rank", "2"]
    command += ["-o", str(place / "adapter"), "--no-load-check", "-q"]
    with stopping_at(monkeypatch, 6):
        assert main(command) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    weights = copies / "tuned/model.safetensors"
    again = weights.with_name("again")
    shutil.copy2(weights, again)
    again.rename(weights)
    with factored(monkeypatch) as names, stopping_at(monkeypatch, 6):
        assert main(command) == 130
    assert len(names) > NUM_LAYERS
    capsys.readouterr()
    save_tensors(copies / "tuned", _tensors(2))
    assert main(command) == 0
    assert list(place.iterdir()) == [place / "adapter"]
    fresh = place / "other"
    outliermerge.extract(copies / "tuned", base=copies / "base", output=fresh, rank=2)
    assert files_of(fresh) == files_of(place / "adapter")


def test_fresh_starts_over(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "adapter"
    with stopping_at(monkeypatch, 6), pytest.raises(KeyboardInterrupt):
        extract(models, output, rank=3)
    with pytest.raises(OutlierMergeError, match="fresh=True to start over"):
        extract(models, output)
    extract(models, output, fresh=True)
    check_whole(models, output)


# Which tensors are chosen.


def test_only_the_chosen_tensors_are_compared_and_changed(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models"
    base, tuned = _tensors(0), _tensors(1)
    for name in ("norm.weight", "norm.bias"):
        base[f"model.{name}"], tuned[f"model.{name}"] = torch.zeros(8), torch.ones(8)
    tuned["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan  # is not read
    save_tensors(folder / "base", base)
    save_tensors(folder / "tuned", tuned)
    command = ["extract", str(folder / "tuned"), "--base", str(folder / "base"), "--rank", "2"]
    command += ["-o", str(tmp_path / "adapter"), "--no-load-check", "--include", "layers.0."]
    command += ["--include", "norm.weight", "--exclude", "experts", "--exclude", "bias", "--json"]
    assert main(command) == 0
    made = json.loads(capsys.readouterr().out)
    assert [tensor["name"] for tensor in made["tensors"]] == [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
    ]
    assert made["num_excluded"] == len(base) - 3 and made["num_unchanged"] == 0
    assert made["settings"]["include"] == ["layers.0.", "norm.weight"]
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    # A module is saved with all that it has: the bias is the base's.
    assert stored["base_model.model.model.norm.weight"].eq(1).all()
    assert stored["base_model.model.model.norm.bias"].eq(0).all()


WRONG = {
    "in no name": (["--include", "mlp.upproj"], "--include: 'mlp.upproj' is in no tensor's name."),
    "meant": (["--exclude", "mlp.upproj"], "Did you mean 'mlp.up_proj'?"),
    "signs": (["--include", ".*mlp.*"], "without signs such as * and ^"),
    "nothing": (
        ["--include", "mlp", "--exclude", "mlp"],
        "--include and --exclude leave no tensor",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_choice(
    kind: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, said = WRONG[kind]
    command = ["extract", str(models / "tuned"), "--base", str(models / "base"), "--rank", "2"]
    assert main([*command, "-o", str(tmp_path / "adapter"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
