"""Every method on small families: a tiny CLIP from base to table, and what is committed."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1]))

from evals.every_method import clip, llava, run
from evals.evidence import vision
from outliermerge.methods.table import EVERY

COMPARED = ("linear", "ties", "regmean", "fisher")


@dataclasses.dataclass(frozen=True)
class TinyClip(clip.Clip):
    recipe: clip.Recipe = dataclasses.field(
        default_factory=lambda: clip.Recipe(
            width=8, hidden=8, layers=1, text_layers=1, heads=2, batch=4, base_steps=4,
            num_validation=10, num_test=20, num_measured=3,
        )
    )  # fmt: skip
    steps: dict = dataclasses.field(default_factory=lambda: {"far": 3})

    def world(self, seed):
        drawn = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (60, 28, 28), generator=drawn) / 255
        labels = torch.arange(60) % 10
        splits = {"training": (images, labels), "test": (images[:30], labels[:30])}
        return clip.ClipWorld(self.recipe, seed, dict.fromkeys(vision.SETS, splits))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(run, "METHODS", COMPARED)
    monkeypatch.setattr("evals.evidence.methods.BUDGET", 2)


def test_a_tiny_family_goes_from_its_base_to_the_table(few, tmp_path):
    seeds = [run.Small(TinyClip(), number, tmp_path) for number in (1, 2)]
    for seed in seeds:
        seed.train()
        seed.score()
    found = json.loads(json.dumps(run.collected({"clip": seeds})))
    merges = found["families"]["clip"]["seeds"]["1"]["merges"]
    compared = (*COMPARED, *TinyClip().by_files)
    assert set(merges) == {f"{n}-default" for n in compared} | {
        f"{n}-chosen" for n in compared if n != "linear"
    }
    lines = run.table(found).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:12]] == [
        "| the base", "| the first task's model", "| the second task's model",
        *(f"| `{name}`" for name in compared),
    ]  # fmt: skip
    gains = [
        50 * np.subtract(merged["ties-default"]["scores"], merged["linear-default"]["scores"]).sum()
        for merged in (one["merges"] for one in found["families"]["clip"]["seeds"].values())
    ]
    said = f"{np.mean(gains):+.1f} ± {np.std(gains, ddof=1) / 2**0.5:.1f}"
    assert lines[6].split(" | ")[2] == said
    one = run.table(json.loads(json.dumps(run.collected({"clip": seeds[:1]})))).splitlines()[6]
    errors = found["families"]["clip"]["seeds"]["1"]["merges"]["ties-default"]["errors"]
    assert one.split(" | ")[2] == f"{gains[0]:+.1f} ± {50 * np.hypot(*errors):.1f}"

    # What is scored anew replaces its row; the others stay, if the average scores the same.
    earlier = json.loads(json.dumps(found))
    own = earlier["families"]["clip"]["seeds"]["1"]["merges"]
    own["ties-default"] = {"scores": [0, 0]}
    for path in tmp_path.rglob("regmean-default.npz"):
        path.unlink()
    again = run.collected({"clip": seeds}, earlier)["families"]["clip"]["seeds"]["1"]["merges"]
    assert again == merges
    own["linear-default"] = {"scores": [0, 0], "errors": [0, 0]}
    with pytest.raises(SystemExit, match="score all again"):
        run.collected({"clip": seeds}, earlier)


def test_statistics_are_those_of_images_with_their_captions(tmp_path):
    family = TinyClip()
    world = family.world(1)
    base = world.base()
    found = world.statistics(base, base["state"], family.tasks[0])
    model = world._model(base["state"]).eval()
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert found["gram"].keys() == {
        f"{n}.weight" for n, module in model.named_modules() if type(module) is torch.nn.Linear
    }
    assert found["fisher"].keys() == dict(model.named_parameters()).keys()
    seen = []
    layer = model.get_submodule(name.removesuffix(".weight"))
    layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten(0, -2)))
    images, _, rows = world._rows("garments", "training")
    for row in rows[:3]:
        with torch.no_grad():
            turned = vision.CHANGES["turned"](images[[row]])
            clip._logits(model, turned, clip._captions(["garments"]))
    inputs = torch.cat(seen).double()
    wanted = inputs.T @ inputs / len(inputs)
    assert torch.allclose(found["gram"][name].double(), wanted, rtol=1e-4, atol=1e-6)


def test_an_image_is_told_by_the_nearest_caption():
    family = TinyClip()
    world = family.world(1)
    base = world.base()
    found = world.score(base, base["state"], "digits-inverted", "test")
    images, labels, _ = world._rows("digits", "test")
    model = world._model(base["state"]).eval()
    pixels = ((1 - images[:, None]) * 2 - 1).expand(-1, 3, -1, -1)
    with torch.no_grad():
        texts = clip._tokenizer()(clip.CAPTIONS["digits"], padding=True, return_tensors="pt")
        outputs = model(pixel_values=pixels, **texts)
    nearest = (outputs.image_embeds @ outputs.text_embeds.T).argmax(1)
    assert found.tolist() == (nearest == labels)[: len(found)].tolist()


def test_every_method_of_the_package_has_a_row():
    several = {n for n, m in EVERY.items() if m.space != "merged" and m.name != "passthrough"}
    assert several <= set(run.METHODS)


def test_the_committed_table_has_what_the_committed_results_say():
    found = json.loads(run.RESULTS.read_text())
    assert run.TABLE.read_text() == run.table(found)
    for family in (llava.Llava(), clip.Clip()):
        assert found["recipes"][family.name] == dataclasses.asdict(family.recipe)
        assert found["families"][family.name]["tasks"] == list(family.tasks)
