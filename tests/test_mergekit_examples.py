"""What mergekit 0.1.5's repository and documents show runs here as it is, with its values.

Examples of tokenizers and chat templates are in test_mergekit_tokenizers.py, of
mergekit-tokensurgeon in test_transplant_as_mergekit.py. mergekit-evolve and mergekit-extract-lora
do not merge, and have no counterpart here.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import load_folder
from mergekit_examples import FILES, MIXTURES, OF_RAW_FILES
from moe_models import dense_family, load, mixture_by_mergekit
from parity.both import by_mergekit, same_draws
from safetensors.torch import load_file
from stacks import save
from torch import Tensor

import outliermerge
from outliermerge import PerModel
from outliermerge.checkpoint.sources import DTYPES
from outliermerge.cli.main import main

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

# Where mergekit has a fault, or another default, both are made to compute the same.
ALIKE = {
    "arcee_fusion": {"compat": "mergekit"},
    "model_stock": {"compat": "mergekit"},
    "sce": {"compat": "mergekit"},
    "dare_linear": {"rescale_by": "l1"},
    "dare_ties": {"rescale_by": "l1"},
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


@outliermerge.merge_method(space="weight")
def weighted_average(
    weights_ME: Tensor, *, weight: PerModel = 1.0, normalize: bool = True
) -> Tensor:
    """Average models by weights, as an own method."""
    if normalize:
        weight = weight / weight.sum()
    return (weights_ME * weight[:, None]).sum(0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three models of six layers."""
    folder = tmp_path_factory.mktemp("models")
    save("llama", folder, num_layers=6, num_models=3)
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.sampled(3)
def test_an_example_runs_strictly_and_gives_what_mergekit_gives(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    file = tmp_path / "merge.yaml"
    file.write_text(FILES[name])
    assert main(["run", str(file), str(tmp_path / "as-written")]) == 0
    merges = list(yaml.safe_load_all(FILES[name]))
    dtype = DTYPES[merges[-1].get("dtype", "float32")].name
    stored = load_folder(tmp_path / "as-written")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}

    is_random = any(merge["merge_method"] in RANDOM for merge in merges)
    for merge in merges:
        merge["dtype"] = "float32"
        if len(merges) > 1:  # the rounding of a stage would change what is drawn
            for model in merge["models"]:
                model.get("parameters", {}).pop("density", None)
    theirs = [_in_mergekits_words(merge) for merge in merges]
    ours = [
        merge | {"parameters": merge.get("parameters", {}) | ALIKE.get(merge["merge_method"], {})}
        for merge in merges
    ]
    file.write_text(yaml.safe_dump_all(ours))
    with same_draws() if is_random else nullcontext():
        expected = _by_mergekit(theirs, tmp_path)
        # Only torch can draw what mergekit draws.
        found = outliermerge.run(file, output=tmp_path / "ours", kernels=not is_random).output
    assert_near(load_folder(found), expected, ulps=512 if "nuslerp" in name else 32)
    if ours == merges and not is_random:  # what was written is the same, rounded once
        for tensor, value in load_folder(found).items():
            assert stored[tensor].equal(value.to(stored[tensor].dtype)), tensor


def _in_mergekits_words(merge: dict[str, Any]) -> dict[str, Any]:
    own = merge["merge_method"].endswith(":weighted_average")
    return merge | ({"merge_method": "linear"} if own else {})


def _by_mergekit(merges: Sequence[dict[str, Any]], folder: Path) -> dict[str, Tensor]:
    if len(merges) == 1:
        return by_mergekit(merges[0], folder / "theirs")
    from mergekit.scripts.multimerge import main as multi

    (folder / "multi.yaml").write_text(yaml.safe_dump_all(merges))
    flags = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card"]
    given = [str(folder / "multi.yaml"), "-I", str(folder / "stages"), *flags]
    _call(multi, [*given, "--out-path", str(folder / "theirs")])
    last = merges[-1].get("name")
    return load_folder(folder / "stages" / last if last else folder / "theirs")


def _call(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command(arguments)
    assert end.value.code == 0


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, ulps: int) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = ours[name]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        limit = ulps * torch.finfo(torch.float32).eps * max(1e-3, float(expected.abs().max()))
        assert float((found - expected).abs().max()) <= limit, name


def test_every_method_of_mergekits_guide_is_among_the_examples() -> None:
    shown = {
        method
        for text in FILES.values()
        for method in re.findall(r"^merge_method: (\w+)$", text, re.MULTILINE)
    }
    program = (
        "from mergekit.merge_methods import registered_methods\n"
        "print(*(method.spec.name for method in registered_methods()))"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]  # other tests register ours
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown == set(done.stdout.split())


def test_raw_files_of_weights_are_merged_as_mergekit_pytorch_does(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit.scripts.merge_raw_pytorch import main as raw

    monkeypatch.chdir(models)
    file = tmp_path / "raw.yaml"
    file.write_text(OF_RAW_FILES)
    _call(raw, [str(file), str(tmp_path / "theirs"), "--quiet"])
    assert main(["run", str(file), str(tmp_path / "ours.safetensors")]) == 0
    ours = load_file(tmp_path / "ours.safetensors")
    assert_near(ours, load_folder(tmp_path / "theirs"), ulps=32)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    dense_family("llama", folder)
    return folder


@pytest.mark.parametrize("name", MIXTURES)
def test_an_example_of_a_mixture_is_mergekits(
    name: str, experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(experts)
    (tmp_path / "moe.yaml").write_text(MIXTURES[name])
    assert main(["moe", str(tmp_path / "moe.yaml"), str(tmp_path / "as-written")]) == 0

    spec = yaml.safe_load(MIXTURES[name]) | {"dtype": "float32"}
    outliermerge.moe(spec, output=tmp_path / "ours", routing=False)
    mixture_by_mergekit(spec, tmp_path / "theirs")
    ours, theirs = (load(tmp_path / folder).state_dict() for folder in ("ours", "theirs"))
    for tensor, expected in theirs.items():
        is_zero = tensor.endswith("bias") and not expected.any()  # which Qwen's form has
        if is_zero and tensor not in ours:
            continue
        assert ours[tensor].shape == expected.shape, tensor
        if "gate.weight" not in tensor:
            assert ours[tensor].equal(expected), tensor
        elif spec["gate_mode"] != "random":
            torch.testing.assert_close(ours[tensor], expected, rtol=0, atol=2e-5)
    assert ours.keys() <= theirs.keys()
