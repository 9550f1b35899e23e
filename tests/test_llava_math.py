"""The paper's merge, as shipped, on replicas of the checkpoints as they are published."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from hub_server import HubServer
from llava_replicas import (
    HF_BASE,
    INSTRUCT,
    MATHS,
    NUM_ROWS,
    NUM_TOKENS,
    ORIGINAL_BASE,
    hf_name,
    save_all,
    save_by_transformers,
    save_hf_base,
    save_maths,
)
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

import outliermerge
from outliermerge.cli import main as cli

SPECS = Path(__file__).parent.parent / "merge_configs"
EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
TOWER = "vision_tower.vision_model."

State = dict[str, Tensor]
Rule = Callable[[list[Tensor], int], Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder in which the hub ids are folders, Math-LLaVA without its tower."""
    root = tmp_path_factory.mktemp("world")
    save_all(root)
    return root


@pytest.fixture(scope="module")
def merged(world) -> Path:
    """The output of llava_math.yaml as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        assert cli.main(["run", str(SPECS / "llava_math.yaml")]) == 0
    return world / "merged" / "llava_math"


@pytest.fixture
def own_world(world, tmp_path, monkeypatch) -> Path:
    """The same folders, to change them; the working directory."""
    for name in (HF_BASE, ORIGINAL_BASE, INSTRUCT, MATHS):
        shutil.copytree(world / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spec(name: str = "llava_math", **changes: Any) -> dict[str, Any]:
    """Return a shipped spec with changes."""
    return yaml.safe_load((SPECS / f"{name}.yaml").read_text()) | changes


def without(key: str) -> dict[str, Any]:
    """Return the shipped spec without a key, its own and its models'."""
    document = spec()
    document.pop(key, None)
    for entry in document["models"]:
        entry.pop(key, None)
    return document


# The merge by hand, in float64


def load_raw(folder: Path) -> State:
    """Return the tensors that a folder's index names, read by the library of their format."""
    state: State = {}
    index = next(folder.glob("*.index.json"), None)
    if index is None:
        return load_file(folder / "model.safetensors")
    for file in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        path = folder / file
        state |= torch.load(path) if path.suffix == ".bin" else load_file(path)
    return state


def load_original(folder: Path) -> State:
    """Return the tensors of a folder in the original layout, in HF names."""
    return {hf_name(name): values for name, values in load_raw(folder).items()}


def min_sigma(t: float) -> Rule:
    """Algorithm 2: n is the number of models that have the tensor."""

    def rule(deltas: list[Tensor], num_models: int) -> Tensor:
        sigma = min(delta.std(unbiased=False).item() for delta in deltas)
        return sum(
            torch.where(delta.abs() <= t * sigma, delta / len(deltas), delta) for delta in deltas
        )

    return rule


def average(deltas: list[Tensor], num_models: int) -> Tensor:
    """A model that lacks a tensor has the base's."""
    return sum(deltas) / num_models


def task_arithmetic(deltas: list[Tensor], num_models: int) -> Tensor:
    return 0.4 * sum(deltas)


def ties(deltas: list[Tensor], num_models: int) -> Tensor:
    kept = []
    for delta in deltas:
        number = max(1, int(0.2 * delta.numel()))
        smallest = delta.abs().flatten().sort(descending=True).values[number - 1]
        kept.append(torch.where(delta.abs() >= smallest, delta, 0.0))
    sign = torch.where(sum(kept) >= 0, 1.0, -1.0)
    agreeing = [torch.where(delta.sign() == sign, delta, 0.0) for delta in kept]
    return sum(agreeing) / sum((delta != 0).double() for delta in agreeing).clamp(min=1)


RULES: Mapping[str, Rule] = {
    "llava_math": min_sigma(2),
    "llava_math_t3": min_sigma(3),
    "llava_math_average": average,
    "llava_math_task_arithmetic": task_arithmetic,
    "llava_math_ties": ties,
}


def by_hand(base: State, models: list[State], rule: Rule) -> State:
    """Return the merge in float64; rows that a model lacks are unchanged in it."""
    result = {}
    for name, values in base.items():
        start = values.double()
        deltas = []
        for model in models:
            if name in model:
                delta = torch.zeros_like(start)
                rows = len(model[name])
                delta[:rows] = model[name].double() - start[:rows]
                deltas.append(delta)
        result[name] = start + rule(deltas, len(models))
    return result


def expected(root: Path, rule: Rule) -> State:
    models = [load_original(root / INSTRUCT), load_original(root / MATHS)]
    return {k: v.half() for k, v in by_hand(load_raw(root / HF_BASE), models, rule).items()}


def assert_same_halves(found: State, wanted: State, *, most_off: int = 0) -> None:
    """Values are equal; at most some are one step of float16 off, for float32 arithmetic."""
    assert found.keys() == wanted.keys()
    num_off = 0
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype == torch.float16, name
        steps = (_steps(found[name]) - _steps(values)).abs()
        assert steps.max() <= 1, (name, int(steps.max()))
        num_off += int((steps > 0).sum())
    assert num_off <= most_off


def _steps(halves: Tensor) -> Tensor:
    """Return the place of each value among all float16 values in order."""
    bits = halves.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


# What the model answers


def drawn() -> Image.Image:
    image = Image.new("RGB", (80, 60), "white")
    ImageDraw.Draw(image).rectangle((10, 10, 40, 50), fill="red")
    return image


def answer(folder: Path, image: Image.Image | None = None) -> tuple[Tensor, list[int]]:
    """Return logits and greedy tokens of a folder, which must load without a remark."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    content = [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=image or drawn(), text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == NUM_TOKENS).sum()) == 16  # 4 × 4 patches
    with torch.no_grad():
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return logits, tokens[0, inputs["input_ids"].shape[1] :].tolist()


def hand_made(root: Path, folder: Path, rule: Rule) -> Path:
    """Save the merge made by hand with the base's own files."""
    folder.mkdir()
    save_file(expected(root, rule), folder / "model.safetensors", metadata={"format": "pt"})
    for path in (root / HF_BASE).iterdir():
        if not path.name.startswith("model"):
            shutil.copy(path, folder)
    return folder


def assert_answers_alike(found: Path, wanted: Path) -> None:
    logits, tokens = answer(found)
    wanted_logits, wanted_tokens = answer(wanted)
    assert tokens == wanted_tokens
    torch.testing.assert_close(logits, wanted_logits, rtol=0, atol=1e-5)


# The shipped specs


def test_the_shipped_spec_merges_the_published_checkpoints(world, merged, tmp_path):
    assert_same_halves(load_raw(merged), expected(world, min_sigma(2)))
    assert_answers_alike(merged, hand_made(world, tmp_path / "by_hand", min_sigma(2)))


def test_the_merged_model_sees_the_image_and_differs_from_its_base(world, merged):
    logits, tokens = answer(merged)
    assert (logits - answer(merged, Image.new("RGB", (80, 60), "blue"))[0]).abs().max() > 0.1
    assert tokens != answer(world / HF_BASE)[1]


def test_the_shipped_merge_verifies(merged, capsys):
    assert cli.main(["verify", str(merged)]) == 0
    assert "every tensor and file is as its manifest says" in capsys.readouterr().out


def test_the_rows_of_image_pad_and_padding_are_the_base_models_bit_for_bit(world, merged):
    base, found = load_raw(world / HF_BASE), load_raw(merged)
    for name in (EMBEDDINGS, HEAD):
        assert found[name].shape[0] == NUM_ROWS
        own, theirs = found[name].view(torch.int16), base[name].view(torch.int16)
        assert torch.equal(own[NUM_TOKENS:], theirs[NUM_TOKENS:])
        assert (own[:NUM_TOKENS] != theirs[:NUM_TOKENS]).float().mean() > 0.5


def test_the_output_has_the_base_models_files(world, merged):
    for path in (world / HF_BASE).iterdir():
        if not path.name.startswith("model"):
            assert (merged / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("tower", [False, True], ids=["without_tower", "with_tower"])
@pytest.mark.parametrize("name", RULES)
def test_every_sibling_follows_its_rule(own_world, name, tower):
    shutil.rmtree(own_world / MATHS)
    save_maths(own_world / MATHS, tower=tower)
    assert cli.main(["run", str(SPECS / f"{name}.yaml")]) == 0
    output = own_world / "merged" / name
    # 0.4 is no float32: of 300,000 values a few round to the other neighbour.
    most_off = 30 if name == "llava_math_task_arithmetic" else 0
    assert_same_halves(load_raw(output), expected(own_world, RULES[name]), most_off=most_off)
    assert outliermerge.verify(output) == []


def test_the_siblings_merge_the_same_models():
    own = ("merge_method", "parameters", "output")
    shared = {k: v for k, v in spec().items() if k not in own}
    for name in RULES:
        document = spec(name)
        assert {k: v for k, v in document.items() if k not in own} == shared
        assert document["output"] == f"merged/{name}"


@pytest.mark.parametrize(
    ("tower", "action", "sources"),
    [(False, "copy", [INSTRUCT]), (True, "merge", [HF_BASE, INSTRUCT, MATHS])],
)
def test_n_counts_the_models_that_have_the_tower(own_world, capsys, tower, action, sources):
    shutil.rmtree(own_world / MATHS)
    save_maths(own_world / MATHS, tower=tower)
    assert cli.main(["plan", str(SPECS / "llava_math.yaml"), "--json", "--tensors"]) == 0
    jobs = json.loads(capsys.readouterr().out)["tensors"]
    of_tower = [job for job in jobs if job["name"].startswith(TOWER)]
    assert len(of_tower) == 55
    assert {job["action"] for job in of_tower} == {action}
    assert all(job["sources"] == sources for job in of_tower)
    others = [job for job in jobs if not job["name"].startswith(TOWER)]
    assert all(job["sources"] == [HF_BASE, INSTRUCT, MATHS] for job in others)


def test_without_the_tower_of_math_llava_the_tower_is_llava_1_6s(world, merged):
    found, tuned = load_raw(merged), load_original(world / INSTRUCT)
    towers = [name for name in found if name.startswith(TOWER)]
    assert len(towers) == 55
    for name in towers:
        assert torch.equal(found[name], tuned[name].half()), name


def test_the_merge_with_math_llavas_tower_answers_as_one_made_by_hand(own_world, tmp_path):
    shutil.rmtree(own_world / MATHS)
    save_maths(own_world / MATHS, tower=True)
    assert cli.main(["run", str(SPECS / "llava_math.yaml")]) == 0
    wanted = hand_made(own_world, tmp_path / "by_hand", min_sigma(2))
    assert_answers_alike(own_world / "merged" / "llava_math", wanted)


# The base in other names


def _save_base(root: Path, names: str) -> None:
    published = root / HF_BASE
    if names == "4.52":
        shutil.rmtree(published)
        save_hf_base(published, names="4.52")
        return
    fresh = root / "fresh"
    save_by_transformers(published, fresh, names_in_memory=names == "in memory")
    shutil.rmtree(published)
    fresh.rename(published)


@pytest.mark.parametrize(
    ("names", "rename", "name"),
    [
        ("in memory", "transformers_v5_to_v4", "model.vision_tower.pre_layrnorm.bias"),
        ("4.52", "transformers_v5_to_v4", "model.vision_tower.vision_model.pre_layrnorm.bias"),
        (
            "fresh",
            ["transformers_v4_to_v5", "transformers_v5_to_v4"],
            "vision_tower.pre_layrnorm.bias",
        ),
    ],
)
def test_a_base_in_newer_names_gives_the_same_merge(own_world, merged, names, rename, name):
    _save_base(own_world, names)
    assert name in load_raw(own_world / HF_BASE)
    result = outliermerge.run(spec(base_model={"model": HF_BASE, "rename": rename}))
    found, wanted = load_raw(result.output), load_raw(merged)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert_answers_alike(result.output, merged)


def test_the_output_can_have_the_names_of_newer_transformers(own_world, merged):
    result = outliermerge.run(spec(rename="transformers_v4_to_v5"))
    names = load_raw(result.output)
    assert {name.rpartition("layers")[0] for name in names if "layers" in name} == {
        "model.language_model.",
        "model.vision_tower.encoder.",
    }
    assert "lm_head.weight" in names
    assert_answers_alike(result.output, merged)
    assert outliermerge.verify(result.output) == []


# The original layout as the base


def original_spec(**changes: Any) -> dict[str, Any]:
    document = {
        "merge_method": "min_sigma",
        "base_model": ORIGINAL_BASE,
        "models": [
            {
                "model": INSTRUCT,
                "extra": [
                    {"filter": "image_newline", "value": "drop"},
                    {"filter": "vision_tower", "value": "copy"},
                ],
            },
            {"model": MATHS},
        ],
        "missing": [{"filter": "inv_freq", "value": "base"}],
        "output": "merged/original",
    }
    return document | changes


def test_the_original_layout_is_merged_in_its_own_names(own_world):
    result = outliermerge.run(original_spec())
    base, instruct = load_raw(own_world / ORIGINAL_BASE), load_raw(own_world / INSTRUCT)
    found = load_raw(result.output)
    towers = {name: values for name, values in instruct.items() if "vision_tower" in name}
    assert found.keys() == base.keys() | towers.keys()
    for name, values in towers.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found.pop(name), values), name
    frequencies = [name for name in base if name.endswith("inv_freq")]
    assert len(frequencies) == 4
    for name in frequencies:
        own = base.pop(name)
        assert own.dtype == torch.float32
        assert torch.equal(found.pop(name), own), name
    wanted = by_hand(base, [instruct, load_raw(own_world / MATHS)], min_sigma(2))
    assert_same_halves(found, {name: values.half() for name, values in wanted.items()})
    assert outliermerge.verify(result.output) == []
    assert (result.output / "tokenizer.model").is_file()


def test_names_go_to_hugging_faces_and_back_to_the_original_ones(own_world):
    plain = load_raw(outliermerge.run(original_spec()).output)
    document = original_spec(
        base_model={"model": ORIGINAL_BASE, "rename": "llava_original_to_hf"},
        rename="llava_hf_to_original",
        output="merged/back",
    )
    for entry in document["models"]:
        entry["rename"] = "llava_next_original_to_hf" if entry["model"] == INSTRUCT else (
            "llava_original_to_hf"
        )  # fmt: skip
    back = load_raw(outliermerge.run(document).output)
    assert back.keys() == plain.keys()
    assert all(torch.equal(back[name], plain[name]) for name in plain)


def test_the_extra_projector_file_of_the_original_is_not_read(own_world):
    (own_world / ORIGINAL_BASE / "mm_projector.bin").write_bytes(b"broken")
    plan = outliermerge.plan(original_spec())
    assert not any(
        stamp.path.name == "mm_projector.bin"
        for entry in plan.inputs
        for stamp in entry.checkpoint.weight_files
    )


# What a person is told


def refusal(document: dict[str, Any]) -> str:
    with pytest.raises(outliermerge.OutlierMergeError) as caught:
        outliermerge.plan(document)
    return str(caught.value)


def test_without_rename_the_error_names_the_maps(world, monkeypatch):
    monkeypatch.chdir(world)
    message = refusal(without("rename"))
    for model, pairs in ((INSTRUCT, "98 of its 99"), (MATHS, "43 of its 43")):
        assert f"`rename: llava_original_to_hf` on {model} pairs {pairs} tensors" in message


def test_without_a_vocabulary_policy_the_error_names_the_rows(world, monkeypatch):
    monkeypatch.chdir(world)
    message = refusal(without("vocabulary"))
    assert f"{HF_BASE}: {NUM_ROWS} rows" in message
    for model in (INSTRUCT, MATHS):
        assert f"{model}: {NUM_TOKENS} rows" in message
    assert f"'<image>' {NUM_TOKENS}, '<pad>' {NUM_TOKENS + 1}" in message
    assert "base: the rows of" in message


def test_without_the_drop_the_error_names_image_newline(world, monkeypatch):
    monkeypatch.chdir(world)
    message = refusal(without("extra"))
    assert f"image_newline: in {INSTRUCT}, not in {HF_BASE}" in message
    assert "`extra: drop` leaves them out" in message


def test_without_the_policy_the_error_names_the_missing_tower(world, monkeypatch):
    monkeypatch.chdir(world)
    message = refusal(without("missing"))
    assert "55 tensor(s) missing" in message
    assert f"not in {MATHS}" in message


def test_the_plan_shows_what_differs_between_the_published_models(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    assert cli.main(["plan", str(SPECS / "llava_math.yaml")]) == 0
    printed = capsys.readouterr()
    shown = " ".join(f"{printed.out} {printed.err}".split())
    for difference in (
        f"image_aspect_ratio: not given in {HF_BASE}, anyres in {INSTRUCT}",
        f"image_aspect_ratio: not given in {HF_BASE}, pad in {MATHS}",
        f"mm_patch_merge_type: not given in {HF_BASE}, spatial_unpad in {INSTRUCT}",
        f"mm_patch_merge_type: not given in {HF_BASE}, flat in {MATHS}",
        f"vocab_size: {NUM_ROWS} in {HF_BASE}, {NUM_TOKENS} in {INSTRUCT}",
        f"the output has the config of {HF_BASE}",
        "dtypes differ between models",
        "float16, bfloat16, bfloat16",
        "extra tensor(s) are left out: image_newline",
        f"{INSTRUCT} lacks 2 tokens ('<image>' {NUM_TOKENS}, '<pad>' {NUM_TOKENS + 1})",
    ):
        assert difference in shown, difference


def test_it_is_fetched_from_the_hub_by_its_ids(world, merged, tmp_path, warm_torch):
    """Unchanged, from a hub that has the three repositories: the same bytes as from folders."""
    ids = (HF_BASE, INSTRUCT, MATHS)
    with HubServer({name: world / name for name in ids}) as hub:
        done = subprocess.run(
            [warm_torch, "-m", "outliermerge", "run", str(SPECS / "llava_math.yaml")],
            cwd=tmp_path,
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            check=False,
        )
        fetched = hub.fetched()
    assert done.returncode == 0, done.stderr
    assert not any(name.endswith((".bin", "README.md")) for name in fetched)
    fetched_output = tmp_path / "merged" / "llava_math"
    weights = sorted(path.name for path in merged.glob("*.safetensors"))
    assert sorted(path.name for path in fetched_output.glob("*.safetensors")) == weights
    for name in (*weights, "config.json", "tokenizer.json"):
        assert (fetched_output / name).read_bytes() == (merged / name).read_bytes(), name
    card = (fetched_output / "README.md").read_text()
    assert all(f'- "{name}"' in card for name in ids)
