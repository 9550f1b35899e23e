"""The evidence: each family from its base to the page at a tiny size, and the committed results."""

import dataclasses
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import load_file
from transformers import BertConfig, BertModel

import outliermerge
from evals.evidence import (
    encoder,
    from_files,
    language,
    page,
    results,
    run,
    search_language,
    training,
    vision,
)
from evals.evidence.facts import FACTS, facts
from evals.evidence.methods import BUDGET, LEFT_OUT, SPACES, VARIANTS, candidates, merged
from evals.evidence.significance import holm, p_value
from outliermerge.calibration.model import load
from outliermerge.methods.table import EVERY

STEPS = {"near": 2, "far": 4}
COMPARED = ("min_sigma", "linear", "task_arithmetic", "ties", "slerp")


@dataclasses.dataclass(frozen=True)
class TinyLanguage(language.Language):
    recipe: language.Recipe = dataclasses.field(
        default_factory=lambda: language.Recipe(
            width=16,
            hidden=16,
            layers=1,
            heads=2,
            batch=4,
            base_steps=6,
            num_validation=2,
            num_test=4,
        )
    )
    steps: dict = dataclasses.field(default_factory=lambda: STEPS)
    joint_steps: int = 2

    def world(self, seed):
        texts = {
            name: language.split(
                {f"{page}.1": bytes([65 + n, 97 + page % 9]) * 100 for page in range(60)}, seed
            )
            for n, name in enumerate((*language.BASE, *self.tasks))
        }
        return language.LanguageWorld(self.recipe, seed, texts)


@dataclasses.dataclass(frozen=True)
class TinyVision(vision.Vision):
    recipe: vision.Recipe = dataclasses.field(
        default_factory=lambda: vision.Recipe(
            width=8,
            hidden=8,
            layers=1,
            heads=2,
            batch=4,
            base_steps=6,
            probe_images=20,
            probe_steps=3,
            num_validation=10,
            num_test=20,
        )
    )
    steps: dict = dataclasses.field(default_factory=lambda: STEPS)
    joint_steps: int = 2

    def world(self, seed):
        drawn = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (60, 28, 28), generator=drawn) / 255
        labels = torch.arange(60) % 10
        splits = {"training": (images, labels), "test": (images[:30], labels[:30])}
        return vision.VisionWorld(self.recipe, seed, dict.fromkeys(vision.SETS, splits))


@dataclasses.dataclass(frozen=True)
class TinyEncoder(encoder.Encoder):
    recipe: encoder.Recipe = dataclasses.field(
        default_factory=lambda: encoder.Recipe(
            tuned_layers=1,
            max_tokens=6,
            num_training=16,
            num_validation=4,
            num_test=8,
            probe_steps=3,
            batch=4,
        )
    )
    steps: dict = dataclasses.field(default_factory=lambda: STEPS)
    joint_steps: int = 2

    def world(self, seed):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=8,
        )  # fmt: skip
        rows = [(f"{n} " * (2 + n % 3), n % 3) for n in range(80)]
        return encoder.EncoderWorld(
            self.recipe,
            seed,
            BertModel(config).eval(),
            lambda texts: [[1 + int(word) % 39 for word in text.split()] for text in texts],
            dict.fromkeys(self.tasks, rows),
        )


FAMILIES = pytest.mark.parametrize(
    "family", [TinyLanguage(), TinyVision(), TinyEncoder()], ids=lambda family: family.name
)


@pytest.fixture
def few(monkeypatch):
    """Measure few examples."""
    for module in (language, vision, run):
        monkeypatch.setattr(module, "MEASURED", 3)


@pytest.fixture
def small(monkeypatch):
    """Merge two models, by few methods with few parameters."""
    monkeypatch.setattr(run, "SIZES", (2,))
    monkeypatch.setattr(results, "SIZES", (2,))
    monkeypatch.setattr("evals.evidence.methods.BUDGET", 2)
    monkeypatch.setattr(run, "methods_of", lambda size: COMPARED)


@FAMILIES
def test_a_family_goes_from_its_base_to_the_page(family, small, tmp_path, monkeypatch):
    family = dataclasses.replace(family, from_files=())
    for number in (1, 2):
        seed = run.Seed(family, number, tmp_path)
        seed.train()
        seed.score()
        seed.score_joint()
    found = results.collect([family], tmp_path, (1, 2, 3))
    own = found["families"][family.name]
    assert list(own["seeds"]) == ["1", "2"]
    rows = own["seeds"]["1"]["merges"]["far/2"]["rows"]
    assert {name.rpartition("-")[0] for name in rows} == set(COMPARED)
    text = page.report(json.loads(json.dumps(found)))
    assert "`min_sigma`" in text and "± " in text and "nan" not in text
    page.draw(found, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").stat().st_size > 5000

    # Another machine's seeds stay, but not those of another recipe or of other texts.
    earlier = json.loads(json.dumps({**found, "packages": {"manpages": "6.03"}}))
    earlier["families"][family.name]["seeds"] = {"2": "kept", "3": "kept"}
    new = results.collect([family], tmp_path, (1, 2))
    both = results.with_earlier({**new, "packages": {}}, earlier)
    assert both["families"][family.name]["seeds"] == {**own["seeds"], "3": "kept"}
    assert both["packages"] == earlier["packages"]
    earlier["families"][family.name]["recipe"]["batch"] += 1
    new = results.collect([family], tmp_path, (1, 2))
    both = results.with_earlier({**new, "packages": {}}, earlier)
    assert both["families"][family.name]["seeds"] == own["seeds"]
    with pytest.raises(SystemExit, match=r"manpages: this machine has version 7"):
        results.with_earlier({**new, "packages": {"manpages": "7"}}, earlier)

    # A second run finds all in the folder, and gives the same.
    def refuse(*arguments):
        raise AssertionError("made again")

    again = run.Seed(family, 1, tmp_path)
    monkeypatch.setattr(again.world, "tune", refuse)
    monkeypatch.setattr(again, "_examples", refuse)
    again.train()
    again.score()
    assert results.collect([family], tmp_path, (1, 2, 3)) == found


def test_rows_are_added_to_a_seed_whose_average_scores_the_same(small, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "methods_of", lambda size: ("linear", "ties"))
    monkeypatch.setitem(run.SPACES_OF, "average+svc", {})
    family = dataclasses.replace(TinyEncoder(), tasks=("noun", "verb"), from_files=())
    for number in (1, 2):
        run.Seed(family, number, tmp_path).score()
    found = json.loads(json.dumps(results.collect([family], tmp_path, (1, 2))))
    seeds = found["families"][family.name]["seeds"]

    family = dataclasses.replace(family, from_files=("average+svc",))
    for number in (1, 2):
        run.Seed(family, number, tmp_path).score(["average+svc"])
    complete = results.collect([family], tmp_path, (1,))["families"][family.name]["seeds"]["1"]
    for cell in seeds["1"]["merges"].values():  # what is there stays
        cell["rows"]["ties-default"] = cell["rows"]["ties-chosen"]
    before = json.loads(json.dumps(seeds["1"]["merges"]))
    assert results.add_rows(family, "1", seeds["1"], tmp_path) == ["average+svc-default"]
    for name, cell in seeds["1"]["merges"].items():
        added = complete["merges"][name]["rows"]["average+svc-default"]
        assert cell["rows"] == {**before[name]["rows"], "average+svc-default": added}
    assert results.add_rows(family, "1", seeds["1"], tmp_path) == []

    # A row says of how many seeds it is; seed 2 is of other models.
    table = page.table("encoder", found["families"]["encoder"], "chosen")
    assert "| `average+svc` (1 of 2 seeds) |" in table and "| `ties` |" in table
    seeds["2"]["merges"]["far/2"]["rows"]["linear-default"]["scores"][0] += 1e-6
    with pytest.raises(SystemExit, match=r"seed 2, far/2: the average scored .* other models"):
        results.add_rows(family, "2", seeds["2"], tmp_path)
    (run.folder_of(family, 2, tmp_path) / "scores/far/2/average+svc-default.npz").unlink()
    assert results.add_rows(family, "2", seeds["2"], tmp_path) == []  # not of all settings


def test_a_default_stands_for_what_is_chosen_only_where_there_is_nothing_to_choose():
    rows = {"ties-default": "of ties", "karcher-default": "of karcher"}
    seed = {"merges": {"far/2": {"rows": rows}}}
    assert page.row_of({}, seed, "far/2", "karcher-chosen") == "of karcher"
    assert page.row_of({}, seed, "far/2", "ties-chosen") is None


@pytest.mark.faults  # it runs a command
def test_a_search_of_a_family_is_confirmed_on_test_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(search_language, "FAMILIES", {"language": TinyLanguage()})
    monkeypatch.setattr(search_language, "cache", lambda: tmp_path)
    monkeypatch.setattr(search_language, "NUM_VALIDATION", 8)
    monkeypatch.setattr(search_language, "NUM_TEST", 6)
    row = search_language.row_of(1, 2, 3, 1)
    assert sum(row["trials"].values()) == 3 and row["gains"].keys() == set(search_language.METHODS)
    folder = run.folder_of(TinyLanguage(), 1, tmp_path) / "search-2-1"
    best = search_language.LlamaForCausalLM.from_pretrained(folder / "merged" / "winner").eval()
    default = search_language.LlamaForCausalLM.from_pretrained(folder / "merged" / "ties").eval()
    differences = []
    for task in ("german", "french"):
        world = TinyLanguage().world(1)
        drawn = search_language.windows(world, task, "test", 6)
        own, theirs = (language.bits_per_byte(model, drawn) for model in (best, default))
        differences.append(theirs - own)
    assert row["gains"]["ties"][0] == pytest.approx(np.mean(differences), abs=1e-7)
    expected = np.hypot(*(one.std(ddof=1) / 6**0.5 for one in differences)) / 2
    assert row["gains"]["ties"][1] == pytest.approx(expected, abs=1e-7)
    assert f"| {row['bits']['winner']:.4f} |" in search_language.page_of([row])


def test_the_same_seed_gives_the_same_models_and_another_one_others():
    def far(seed):
        world = TinyLanguage().world(seed)
        return world.tune(world.base(), ["german"], 4, {4})[4]

    one, same, other = far(1), far(1), far(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_an_encoder_in_two_halves_is_the_whole_one():
    world = TinyEncoder().world(0)
    part = world._part("noun", "test")
    rows = np.arange(len(part.labels))
    halves = encoder._features(world._upper(), *part.batch(rows))
    drawn = sorted((world._draw(text), text) for text, _ in world.rows["noun"])
    (tokens,) = world.tokens_of([drawn[0][1]])
    with torch.inference_mode():
        whole = world.encoder(input_ids=torch.tensor([tokens])).last_hidden_state[0].mean(0)
    expected = torch.nn.functional.normalize(whole, dim=0) * len(whole) ** 0.5
    assert torch.allclose(halves[0], expected, atol=1e-5)


@pytest.mark.parametrize("family", [TinyLanguage(), TinyVision()], ids=lambda family: family.name)
def test_the_library_measures_the_same_of_the_folder_and_samples_of_a_model(family, few, tmp_path):
    seed = run.Seed(family, 1, tmp_path)
    task = family.tasks[1]
    state = seed.tuned(task)["far"]
    wanted = seed.measured(task, "far")["gram"]
    seed.world.save(state, tmp_path / "model")
    opened = seed.world.opened(tmp_path / "model")
    assert all(torch.allclose(opened[name], each) for name, each in state.items())
    samples = from_files.Folders(seed.world, state, [], [], tmp_path)._samples(task)
    outliermerge.measure(tmp_path / "model", samples, output=tmp_path / "out", statistics="gram")
    found = {}
    for path in (tmp_path / "out" / "gram").glob("*.safetensors"):
        found |= load_file(path)
    names = load(str(tmp_path / "model"), device="cpu", what="").names
    for name, each in wanted.items():
        (stored,) = (own for n, own in names.items() if n.endswith(seed.world.stored_as(name)))
        assert torch.allclose(found[stored], each, rtol=1e-3, atol=1e-5), name


@FAMILIES
def test_merges_of_files_are_of_the_models(family, few, tmp_path, monkeypatch):
    monkeypatch.setattr(outliermerge, "fit", partial(outliermerge.fit, steps=1, batch=1))
    seed = run.Seed(family, 1, tmp_path)
    tasks = family.tasks[:2]
    base, models = seed.base()["state"], [seed.tuned(task)["far"] for task in tasks]
    mean = merged("linear", base, models, {}, 1, lambda: [])
    folders = from_files.Folders(seed.world, base, models, tasks, tmp_path)
    for method in family.from_files:
        parameters = candidates(from_files.SPACES[method])[-1]
        found = folders.merged(method, parameters)
        assert found.keys() == base.keys()
        assert all(found[n].shape == base[n].shape and found[n].isfinite().all() for n in base)
        assert any(not torch.allclose(found[n], mean[n], atol=1e-4) for n in base), method
        if method in ("average+svc", "regmean++"):  # what is no matrix is averaged
            assert all(torch.allclose(found[n], mean[n], atol=1e-5) for n in base if "norm" in n)
    found = folders.merged("task_arithmetic+lines", {"lambda": 0.5})
    share = {"language": 0.5, "vision": 0.5, "encoder": 1.0}[family.name]  # of the only layer
    for name, each in base.items():
        wanted = each + share * (mean[name] - each)
        assert torch.allclose(found[name], wanted, atol=1e-5), name


def test_a_page_is_in_one_split_only_and_with_its_translations():
    pages = {f"man1/{number}.1.gz": f"page {number} ".encode() * 40 for number in range(300)}
    translated = {name: text.replace(b"page", b"Seite") for name, text in pages.items()}
    parts, others = language.split(pages, 1), language.split(translated, 1)
    names = {part: set(text.tobytes().split(b" ")[1::2]) for part, text in parts.items()}
    assert not names["test"] & names["training"] and not names["test"] & names["validation"]
    assert 0.05 < len(names["test"]) / 300 < 0.15
    for part, text in others.items():
        assert set(text.tobytes().split(b" ")[1::2]) == names[part]


def test_a_changed_image_is_told_by_what_was_done_to_it():
    images = torch.arange(28.0 * 28).reshape(1, 28, 28)
    turned = vision.CHANGES["turned"](images)[0]
    assert turned[0].tolist() == images[0, :, -1].tolist()
    swapped = vision.CHANGES["swapped"](images)[0]
    assert torch.equal(swapped[:, :14], images[0, :, 14:])


def test_all_methods_that_merge_several_models_are_compared():
    several = {n for n, m in EVERY.items() if m.space != "merged" and m.name != "passthrough"}
    assert set(SPACES) - set(VARIANTS) == several - set(LEFT_OUT)


@pytest.mark.parametrize("method", SPACES)
def test_what_is_tried_of_a_method_is_within_its_budget_and_merges(method):
    drawn = torch.Generator().manual_seed(0)
    base, *models = ({"w": torch.rand(8, 8, generator=drawn)} for _ in range(3))
    tried = candidates(SPACES[method])
    assert tried[0] == {} and len(tried) <= BUDGET
    assert len({json.dumps(one) for one in tried}) == len(tried)
    statistics_of = [
        {"gram": {"w": w.mT @ w}, "fisher": {"w": w}} for w in (one["w"] for one in models)
    ]
    found = [merged(method, base, models, one, 0, lambda: statistics_of)["w"] for one in tried]
    assert all(each.isfinite().all() for each in found)


@FAMILIES
def test_statistics_are_those_of_a_calculation_by_hand(family, tmp_path):
    seed = run.Seed(family, 1, tmp_path)
    task = family.tasks[0]
    state = seed.tuned(task)["far"]
    found = training.measured(*seed.world.examples(seed.base(), state, task), 3)
    model, loss = seed.world.examples(seed.base(), state, task)
    squares = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    for number in range(3):
        model.zero_grad()
        loss(number).backward()
        for name, each in model.named_parameters():
            squares[name] += 0 if each.grad is None else each.grad**2 / 3
    assert any(bool(each.any()) for each in squares.values())
    for name, each in squares.items():
        assert torch.allclose(found["fisher"][name], each, rtol=1e-4), name
    shapes = {name: m.in_features for name, m in model.named_modules() if hasattr(m, "in_features")}
    assert {f"{name}.weight" for name in shapes} == set(found["gram"])
    model, loss = seed.world.examples(seed.base(), state, task)
    name, seen = next(iter(shapes)), []
    layer = dict(model.named_modules())[name]
    layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten(0, -2)))
    for number in range(3):
        loss(number)
    inputs = torch.cat(seen).double()
    assert torch.allclose(
        found["gram"][f"{name}.weight"].double(), inputs.T @ inputs / len(inputs), rtol=1e-4
    )


def test_facts_of_task_vectors_are_those_of_a_calculation_by_hand():
    drawn = torch.Generator().manual_seed(0)
    base, one, two = ({"w": torch.rand(50, 40, generator=drawn)} for _ in range(3))
    left, right = ((each["w"] - base["w"]).double().flatten() for each in (one, two))
    found = facts(base, [one, two])
    assert found["w"] == found[""] and set(found["w"]) == set(FACTS)
    assert found[""]["cosine"] == pytest.approx(
        (left @ right / left.norm() / right.norm()).item(), rel=1e-5
    )
    assert found[""]["kurtosis"] == pytest.approx(
        np.mean([stats.kurtosis(each, fisher=False) for each in (left, right)]), rel=1e-5
    )
    assert found[""]["sign_conflicts"] == pytest.approx(((left * right) < 0).double().mean().item())
    sigma = min(left.std(correction=0), right.std(correction=0))
    kept = [(each.abs() > 2 * sigma).double().mean().item() for each in (left, right)]
    assert found[""]["outliers"] == pytest.approx(statistics.fmean(kept))


def test_p_values_are_those_of_a_paired_t_test_and_holm_orders_them():
    left, right = [1.0, 2.0, 4.0, 3.5], [0.5, 2.5, 2.0, 2.0]
    differences = [a - b for a, b in zip(left, right, strict=True)]
    assert p_value(differences) == pytest.approx(stats.ttest_rel(left, right).pvalue)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert p_value([0.0, 0.0]) == 1.0 and p_value([0.2]) == 1.0


def test_the_page_has_what_the_committed_results_say():
    found = json.loads(results.RESULTS.read_text())
    assert page.MARKS[0] + page.report(found) + page.MARKS[1] in page.PAGE.read_text()


def test_the_committed_results_are_of_the_recipes_in_the_code():
    found = json.loads(results.RESULTS.read_text())["families"]
    for name, family in run.FAMILIES.items():
        assert found[name]["recipe"] == dataclasses.asdict(family.recipe)
        assert found[name]["steps"] == family.steps and found[name]["tasks"] == list(family.tasks)
