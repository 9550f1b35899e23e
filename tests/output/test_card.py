"""The model card: how the model is used, and how far it has moved from its base."""

from __future__ import annotations

import ast
import json
import math

import pytest
import torch
import yaml
from checkpoints import load_folder, save_tensors
from families import save_llama, tune

import outliermerge
from outliermerge.output.card import usage, with_error

TOKENIZER, PROCESSOR = "tokenizer.json", "processor_config.json"


@pytest.mark.parametrize(
    ("config", "sidecars", "wanted"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, [TOKENIZER], "AutoModelForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"]}, [TOKENIZER], "AutoModelForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"]}, [], "AutoModelForCausalLM"),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}},
            [PROCESSOR],
            "AutoProcessor",
        ),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}},
            [],
            "AutoModelForImageTextToText",
        ),
        ({"architectures": ["T5ForConditionalGeneration"]}, [TOKENIZER], "AutoModelForSeq2SeqLM"),
        (
            {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"},
            [TOKENIZER],
            "AutoModelForSpeechSeq2Seq",
        ),
        ({"architectures": ["BertForMaskedLM"]}, [TOKENIZER], "AutoModelForMaskedLM"),
        ({"architectures": ["BertModel"]}, ["vocab.txt"], "AutoModel"),
        ({"architectures": ["BertModel"]}, [], "AutoModel"),
        ({"architectures": ["ViTForImageClassification"]}, [], "AutoModelForImageClassification"),
        ({"model_type": "bert"}, [TOKENIZER], "AutoModel"),
        (
            {"architectures": ["XForCausalLM"], "auto_map": {}},
            [TOKENIZER],
            "trust_remote_code=True",
        ),
        ({"_class_name": "UNet2DConditionModel"}, [], "from diffusers import UNet2DConditionModel"),
        (None, ["model_index.json"], "DiffusionPipeline"),
        (None, ["modules.json"], "SentenceTransformer"),
        (None, ["adapter_config.json"], "AutoPeftModel"),
    ],
)
def test_the_card_says_how_a_model_of_its_kind_is_loaded(config, sidecars, wanted):
    contents = {} if config is None else {"config.json": json.dumps(config).encode()}
    snippet = usage(contents, {*sidecars, *contents})
    assert wanted in snippet
    ast.parse(snippet)


@pytest.mark.parametrize(
    ("beside", "chats"),
    [
        ({"chat_template.jinja": b"{{ messages }}"}, True),
        ({"tokenizer_config.json": b'{"chat_template": "{{ messages }}"}'}, True),
        ({"tokenizer_config.json": b"{}"}, False),
    ],
)
def test_a_model_with_a_chat_template_is_shown_with_it(beside, chats):
    contents = {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', TOKENIZER: b"{}"}
    snippet = usage(contents | beside, {*contents, *beside})
    ast.parse(snippet)
    assert ("apply_chat_template" in snippet) == chats
    encoder = contents | {"config.json": b'{"architectures": ["BertModel"]}'}
    assert "apply_chat_template" not in usage(encoder | beside, {*encoder, *beside})


@pytest.mark.parametrize(
    "config",
    [b"{}", b"[]", b"no json", b'{"architectures": [3]}', b'{"_class_name": "x; import os"}'],
)
def test_what_is_not_known_is_left_out(config):
    assert usage({"config.json": config}, {"config.json"}) == ""
    assert usage({}, set()) == ""


@pytest.fixture
def models(tmp_path):
    torch.manual_seed(0)
    base = {
        "layers.0.w.weight": torch.randn(300, 700),
        "layers.1.w.weight": 3 * torch.randn(300, 500).bfloat16(),
        "half": torch.randn(5000).half(),
        "double": torch.randn(333).double(),
    }
    found = {"base": base}
    for name, scale in (("a", 0.1), ("b", 0.2)):
        found[name] = {
            key: (value + scale * torch.randn(value.shape)).to(value.dtype)
            for key, value in base.items()
        }
    for name, tensors in found.items():
        save_tensors(tmp_path / name, tensors)
    return found


def _spec(tmp_path, method):
    return {
        "merge_method": method,
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "a")}, {"model": str(tmp_path / "b")}],
    }


def _flat(tensors, base=None):
    return torch.cat(
        [
            (tensors[name].double() - (base[name].double() if base else 0)).flatten()
            for name in sorted(tensors)
        ]
    )


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "min_sigma"])
def test_the_drift_is_near_that_of_all_elements(models, tmp_path, method):
    result = outliermerge.run(_spec(tmp_path, method), output=tmp_path / "out")
    drift = result.manifest["drift"]

    from safetensors.torch import load_file

    moved = _flat(load_file(tmp_path / "out" / "model.safetensors"), models["base"])
    tasks = [_flat(models[name], models["base"]) for name in "ab"]
    size = float(moved.norm() / _flat(models["base"]).norm())
    assert drift["relative_size"] == pytest.approx(size, rel=0.05)
    for name, task in zip("ab", tasks, strict=True):
        cosine = float(moved @ task / moved.norm() / task.norm())
        assert drift["cosines"][str(tmp_path / name)] == pytest.approx(cosine, abs=0.05)
    length = float(moved.norm() / (tasks[0].norm() + tasks[1].norm()) * 2)
    assert drift["length"] == pytest.approx(length, rel=0.05)
    assert drift["num_sampled"] < drift["num_elements"] == len(moved)
    assert ("outliers_kept" in drift) == (method == "min_sigma")
    errors = drift["standard_errors"]
    card = (tmp_path / "out" / "README.md").read_text()
    shown = with_error(100 * drift["relative_size"], 100 * errors["relative_size"])
    assert f"the change is {shown}% of the base" in card and "± is the standard error" in card


@pytest.mark.parametrize("num_tensors", [1, 3, 300])  # of 300, every second is read
@pytest.mark.parametrize("is_even", [True, False])
def test_the_drift_is_as_near_as_its_standard_errors_say(tmp_path, num_tensors, is_even):
    generator = torch.Generator().manual_seed(num_tensors)

    def draw(shape):
        rows = torch.randn(shape, generator=generator)
        # Some rows changed more than others: a sample sees more or fewer of these.
        return rows if is_even else rows * (torch.rand(shape[0], 1, generator=generator) + 0.5)

    shape = (400, 900 // min(num_tensors, 30))
    base = {f"layers.{n}.w.weight": draw(shape) for n in range(num_tensors)}
    tasks = [{name: 0.1 * draw(shape) for name in base} for _ in "ab"]
    save_tensors(tmp_path / "base", base)
    for name, task in zip("ab", tasks, strict=True):
        save_tensors(tmp_path / name, {key: base[key] + task[key] for key in base})
    result = outliermerge.run(_spec(tmp_path, "min_sigma"), output=tmp_path / "out")
    drift = result.manifest["drift"]
    moved = _flat(load_folder(tmp_path / "out"), base)
    exact = {"relative_size": float(moved.norm() / _flat(base).norm())}
    exact["length"] = float(2 * moved.norm() / sum(_flat(task).norm() for task in tasks))
    found = {key: (drift[key], drift["standard_errors"][key]) for key in exact}
    for name, task in zip("ab", map(_flat, tasks), strict=True):
        exact[name] = float(moved @ task / moved.norm() / task.norm())
        found[name] = [each["cosines"][str(tmp_path / name)]
                       for each in (drift, drift["standard_errors"])]  # fmt: skip
    for key, (value, error) in found.items():
        assert 0 < error < 0.15 * exact[key]
        assert abs(value - exact[key]) < 4 * error + 0.005 * exact[key], key


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.41371, 0.0231, "0.41 ± 0.02"),
        (0.41371, 0.0144, "0.414 ± 0.014"),
        (0.41371, 0.31, "0.4 ± 0.3"),
        (12.345, 0.0001, "12.3"),
        (1234.5, 80.0, "1234 ± 80"),
        (-0.0021, 0.004, "-0.002 ± 0.004"),
        (0.0, 0.0, "0.00"),
        (0.99999, 0.0, "1.000"),
        (0.0, 0.02, "0.00 ± 0.02"),
    ],
)
def test_a_measured_value_has_the_digits_that_its_error_leaves(value, error, text):
    assert with_error(value, error) == text


def test_the_share_of_outliers_is_that_of_all_elements(models, tmp_path):
    result = outliermerge.run(_spec(tmp_path, "min_sigma"), output=tmp_path / "out")
    tensors = result.manifest["tensors"].values()
    counts = [sum(e["statistics"]["outliers"][model] for e in tensors) for model in (0, 1)]
    num = sum(math.prod(entry["shape"]) for entry in tensors)
    shares = list(result.manifest["drift"]["outliers_kept"].values())
    assert shares == [float(f"{count / num:.3g}") for count in counts]


def test_small_models_are_measured_whole(tmp_path):
    for number, name in enumerate(("base", "a", "b")):
        save_tensors(tmp_path / name, {"w": torch.full((4, 8), float(1 + number))})
    result = outliermerge.run(_spec(tmp_path, "task_arithmetic"), output=tmp_path / "out")
    assert result.manifest["drift"] == {
        "relative_size": 3.0,
        "cosines": {str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 1.0},
        "length": 2.0,
        "standard_errors": {
            "relative_size": 0.0,
            "cosines": {str(tmp_path / "a"): 0.0, str(tmp_path / "b"): 0.0},
            "length": 0.0,
        },
        "num_sampled": 32,
        "num_elements": 32,
    }
    assert "on all merged elements" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_without_task_vectors_no_drift_is_told(models, tmp_path, method):
    spec = _spec(tmp_path, method)
    spec["models"] = spec["models"][: 1 if method == "passthrough" else 2]
    result = outliermerge.run(spec, output=tmp_path / "out")
    assert "drift" not in result.manifest
    assert "Drift" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("has_base", [True, False])
def test_the_card_says_why_nothing_is_measured_of_stages(has_base, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    a, b = (
        {"model": str(save_tensors(tmp_path / name, {"w": torch.full((8, 8), value)}))}
        for name, value in (("a", 1.0), ("b", 2.0))
    )
    base = {"base_model": str(save_tensors(tmp_path / "base", {"w": torch.zeros(8, 8)}))}
    weights = {"parameters": {"weight": 0.5}}
    spec = {
        "stages": [{"name": "first", "merge_method": "linear", "models": [a, b], **weights}],
        "models": [{"model": "first"}, a],
        **({"merge_method": "task_arithmetic", **base} if has_base else {"merge_method": "linear"}),
        **weights,
    }
    outliermerge.run(spec, output=tmp_path / "out", threads=1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("Not measured: the merges of stages" in card) == has_base
    assert f"## Stages\n\n- `first`: `linear` of `{tmp_path / 'a'}`, `{tmp_path / 'b'}`" in card


def test_the_card_says_which_layers_of_slices_are_from_where(tmp_path):
    places = save_llamas(tmp_path)
    slices = [
        {"sources": [{"model": places[0], "layer_range": [0, 2]}]},
        {"sources": [{"model": places[1], "layer_range": [1, 2]}]},
    ]
    outliermerge.run({"merge_method": "passthrough", "slices": slices}, output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    rows = f"- layers 0 to 1: layers 0 to 1 of `{places[0]}`\n- layer 2: layer 1 of `{places[1]}`"
    assert f"## Layers\n\nA stack of 3 layers as they are:\n\n{rows}" in card


def save_llamas(folder):
    base = save_llama(folder / "base")
    return str(base), str(tune(base, folder / "task", seed=1))


def _card_of_merge(tmp_path, *cards):
    """Merge models whose cards have these texts; return the output's card and its front matter."""
    places = []
    for number, card in enumerate(cards):
        place = tmp_path / f"model{number}"
        save_tensors(place, {"w": torch.full((2, 2), float(number))})
        if card is not None:
            (place / "README.md").write_text(card)
        places.append({"model": str(place)})
    outliermerge.run({"merge_method": "linear", "models": places}, output=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    return text, yaml.safe_load(text[4:].partition("\n---\n")[0])


LLAMA = "---\nlicense: other\nlicense_name: llama3\nlicense_link: https://host/terms\n---\n# A"


@pytest.mark.parametrize(
    ("cards", "front", "said"),
    [
        (["---\nlicense: mit\ntags: [a]\n---\n", "---\nlicense: mit\n---"], {"license": "mit"}, ""),
        (["---\nlicense: [mit]\n---\n", "---\r\nlicense: mit\r\n---\r\n"], {"license": "mit"}, ""),
        (
            [LLAMA, LLAMA],
            {"license": "other", "license_name": "llama3", "license_link": "https://host/terms"},
            "",
        ),
        (["---\nlicense: mit\n---\n", LLAMA], {"license": "other"}, "different licences"),
        (["---\nlicense: mit\n---\n", None], {}, "licence of 1 of the 2 models is not known"),
        ([None, "# No front matter\n"], {}, "licence of any model is not known"),
        (["---\nlicense: mit\n---\n", "---\n: [\n---\n"], {}, "1 of the 2 models"),
        (
            ["---\nlicense: mit\n---\n", LLAMA, "---\nlicense: \n---\n"],
            {},
            "1 of the 3 models is not known here, and the others differ",
        ),
        (["---\nlicense: yes\n---\n", '---\nlicense: "True"\n---'], {"license": "True"}, ""),
    ],
)
def test_the_card_has_the_licence_that_all_models_have(tmp_path, cards, front, said):
    text, found = _card_of_merge(tmp_path, *cards)
    assert {key: value for key, value in found.items() if key.startswith("license")} == front
    assert ("licences" in text or "licence of" in text) == bool(said)
    assert said in text
    for number, card in enumerate(cards):
        (row,) = [
            line for line in text.splitlines() if f"model{number}`" in line and line[0] == "-"
        ][:1]
        assert ("licence `" in row) == ("license: " in (card or "").replace("license: \n", ""))


def test_a_card_that_cannot_be_read_is_no_reason_to_fail(tmp_path):
    (tmp_path / "model0" / "README.md").mkdir(parents=True)
    _, found = _card_of_merge(tmp_path, None, "---\nlicense: mit\n---\n")
    assert "license" not in found
