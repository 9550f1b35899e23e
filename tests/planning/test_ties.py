"""What a config ties is one tensor or equal ones, however it is stored, adapted or filtered.

Each output is loaded in three ways: by transformers, by a loader that trusts the config (it takes
the embeddings for the head where the config ties them, as transformers 4 and vLLM do), and by one
that trusts the file (it takes the head that is stored). All must compute the same.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from checkpoints import load_folder
from families import edit_json
from safetensors.torch import load_file, save_file

import outliermerge
from outliermerge.checkpoint.config import text_config
from outliermerge.errors import OutlierMergeError
from outliermerge.planning.tied import WAYS_OUT
from outliermerge.planning.tied_names import original_of, ties_head

IDS = torch.arange(12)[None]
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SIZES: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def small(kind: str, *, tied: bool, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
    }
    config, model = classes[kind]
    return model(config(**SIZES, tie_word_embeddings=tied))


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# How a model that ties its head says so and is stored.
STORED = ("once", "twice", "as the head", "once, silent", "twice, silent")


def keep(model: Any, folder: Path, how: str) -> Path:
    """Save a tied model: its tensor under one name or both; the config may leave the key out."""
    model.save_pretrained(folder)
    tensors = load_folder(folder)
    if how.startswith("twice"):
        tensors[HEAD] = tensors[EMBEDDINGS].clone()
    elif how == "as the head":
        tensors[HEAD] = tensors.pop(EMBEDDINGS)
    if how.endswith("silent"):
        edit_json(folder / "config.json", lambda config: config.pop("tie_word_embeddings"))
    return store(folder, tensors)


def tuned(model: Any, seed: int) -> Any:
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return other


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def assert_loaders_agree(folder: Path) -> torch.Tensor:
    """Return the logits of an output after loading it in three ways."""
    stored = load_folder(folder)
    said = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings")
    model = loaded(folder)
    found = logits(model)
    if said is None:
        said = model.config.tie_word_embeddings
    # Loading takes most of the time: the other loaders' tensors take their places in this model.
    for head in (EMBEDDINGS if said else HEAD, HEAD if HEAD in stored else EMBEDDINGS):
        model.lm_head.weight = torch.nn.Parameter(stored[head])
        model.model.embed_tokens.weight = torch.nn.Parameter(stored[EMBEDDINGS])
        torch.testing.assert_close(logits(model), found, rtol=0, atol=0)
    return found


def spec_of(base: Path | None, models: list[Path], **keys: Any) -> dict[str, Any]:
    spec = {"merge_method": "task_arithmetic", "models": [{"model": str(m)} for m in models]}
    return spec | ({"base_model": str(base)} if base else {}) | keys


def run(spec: dict[str, Any], output: Path) -> Path:
    outliermerge.run(spec, output=output, overwrite=True)
    assert outliermerge.verify(output) == []
    return output


# Whole models


@pytest.mark.sampled(3)
@pytest.mark.parametrize("base", STORED)
@pytest.mark.parametrize("task", STORED)
def test_a_tied_model_merges_the_same_however_it_is_stored(base, task, tmp_path):
    # A silent Gemma is tied by default, a silent Llama is not.
    model = small("gemma" if "silent" in base + task else "llama", tied=True)
    tasks = [tuned(model, seed) for seed in (1, 2)]
    folders = [
        keep(model, tmp_path / "base", base),
        keep(tasks[0], tmp_path / "one", task),
        keep(tasks[1], tmp_path / "two", "once"),
    ]
    before, one, two = (m.model.embed_tokens.weight.detach().double() for m in (model, *tasks))
    for spec, expected in (
        (spec_of(folders[0], folders[1:]), one + two - before),
        (spec_of(None, folders[:2], merge_method="linear"), (before + one) / 2),
        (spec_of(folders[1], [folders[0]], merge_method="linear"), before),
    ):
        output = run(spec, tmp_path / "out")
        assert_loaders_agree(output)
        found = load_folder(output)[EMBEDDINGS].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_model_that_names_its_tensor_otherwise_than_a_base_pairs(tmp_path):
    """A T5 whose embeddings are under the decoder's name: huggingface/transformers #48154."""
    config = transformers.T5Config(vocab_size=24, d_model=8, d_kv=4, d_ff=8, num_layers=1,
                                   num_heads=2)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config)
    other = tuned(model, 1)
    model.save_pretrained(tmp_path / "shared")
    other.save_pretrained(tmp_path / "decoder")
    tensors = load_folder(tmp_path / "decoder")
    tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    store(tmp_path / "decoder", tensors)
    expected = (model.shared.weight.double() + other.shared.weight.double()) / 2
    for names in (("shared", "decoder"), ("decoder", "shared")):
        folders = [tmp_path / name for name in names]
        output = run(spec_of(folders[0], folders, merge_method="linear"), tmp_path / "out")
        found = load_folder(output)
        assert "decoder.embed_tokens.weight" not in found
        torch.testing.assert_close(found["shared.weight"].double(), expected.detach())
        _, info = transformers.T5ForConditionalGeneration.from_pretrained(
            output, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("stored", ["once", "twice"])
@pytest.mark.parametrize(
    "weights", [{EMBEDDINGS: 0.0}, {HEAD: 0.0}, {EMBEDDINGS: 0.5, HEAD: 2.0}], ids=str
)
def test_filters_do_not_part_what_is_tied(stored, weights, tmp_path):
    model = small("llama", tied=True)
    base = keep(model, tmp_path / "base", stored)
    task = keep(tuned(model, 1), tmp_path / "task", "twice")
    weight = [{"filter": name, "value": value} for name, value in weights.items()]
    spec = spec_of(base, [task], parameters={"weight": [*weight, {"value": 1.0}]})
    if stored == "once" and HEAD in weights:
        with pytest.raises(OutlierMergeError, match=r"the filter 'lm_head.weight'"):
            outliermerge.plan(spec)
        return
    plan = outliermerge.plan(spec)
    noted = f"{HEAD} is tied to {EMBEDDINGS} in the output, and takes its parameters" in plan.notes
    assert noted is (stored == "twice")
    output = run(spec, tmp_path / "out")
    assert_loaders_agree(output)
    before, after, found = (load_folder(f)[EMBEDDINGS] for f in (base, task, output))
    share = weights.get(EMBEDDINGS, 1.0)
    torch.testing.assert_close(found, before + share * (after - before), rtol=0, atol=1e-6)


def parted(folder: Path, *, said: bool) -> Path:
    """Save a model with a head of its own, which its config may still tie."""
    model = tuned(small("llama", tied=False), 5)
    model.config.tie_word_embeddings = said
    model.save_pretrained(folder)
    return store(folder, dict(model.state_dict()))


@pytest.mark.parametrize("stored", ["once", "twice"])
@pytest.mark.parametrize("said", [True, False])
def test_a_head_that_a_model_parted_is_refused_or_kept_as_the_spec_says(stored, said, tmp_path):
    base = keep(small("llama", tied=True), tmp_path / "base", stored)
    task = parted(tmp_path / "task", said=said)
    with pytest.raises(OutlierMergeError) as caught:
        run(spec_of(base, [task]), tmp_path / "out")
    assert WAYS_OUT in str(caught.value) and str(task) in str(caught.value)
    shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)

    before, own = load_folder(base)[EMBEDDINGS], load_folder(task)
    output = run(spec_of(base, [task], tie_word_embeddings=False), tmp_path / "apart")
    found = load_folder(output)
    assert_loaders_agree(output)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(found[HEAD], before + (own[HEAD] - before))
    if not said:
        by_config = run(spec_of(base, [task], config_source=str(task)), tmp_path / "by_config")
        assert all(torch.equal(found[name], t) for name, t in load_folder(by_config).items())
    joined = spec_of(base, [task], tie_word_embeddings=True)
    assert f"{HEAD} of {task} is left out, as the output ties it" in outliermerge.plan(joined).notes
    output = run(joined, tmp_path / "joined")
    found = load_folder(output)
    assert_loaders_agree(output)
    assert (HEAD in found) is (stored == "twice")
    torch.testing.assert_close(found[EMBEDDINGS], own[EMBEDDINGS])


def test_a_tied_base_gets_a_head_where_the_spec_unties_it(tmp_path):
    model = small("llama", tied=True)
    base = keep(model, tmp_path / "base", "once")
    task = keep(tuned(model, 1), tmp_path / "task", "once")
    output = run(spec_of(base, [task], tie_word_embeddings=False), tmp_path / "out")
    found = load_folder(output)
    assert torch.equal(found[HEAD], found[EMBEDDINGS])
    torch.testing.assert_close(assert_loaders_agree(output), logits(loaded(task)))


def test_an_untied_base_is_not_tied(tmp_path):
    small("llama", tied=False).save_pretrained(tmp_path / "base")
    small("llama", tied=False, seed=1).save_pretrained(tmp_path / "task")
    spec = spec_of(tmp_path / "base", [tmp_path / "task"], tie_word_embeddings=True)
    with pytest.raises(OutlierMergeError, match="does not tie its lm_head"):
        outliermerge.plan(spec)


@pytest.mark.parametrize("said", [True, False, None])
def test_embeddings_under_a_name_that_does_not_pair_are_not_taken_for_tied(said, tmp_path):
    """With a head that stood for them, the trained embeddings would be lost."""
    small("llama", tied=False).save_pretrained(tmp_path / "base")
    small("llama", tied=False, seed=1).save_pretrained(tmp_path / "task")
    tensors = load_folder(tmp_path / "task")
    for name, tensor in [(n, t) for n, t in tensors.items() if n.startswith("model.")]:
        tensors[name.removeprefix("model.") if "embed" in name else name] = tensor
    del tensors[EMBEDDINGS]
    store(tmp_path / "task", tensors)

    def say(config: dict[str, Any]) -> None:
        config.pop("tie_word_embeddings")
        config |= {} if said is None else {"tie_word_embeddings": said}

    edit_json(tmp_path / "task" / "config.json", say)
    with pytest.raises(OutlierMergeError, match="not in") as caught:
        outliermerge.plan(spec_of(tmp_path / "base", [tmp_path / "task"]))
    assert "rename" in str(caught.value)


# Where a config says it


def at_levels(outer: bool | None, inner: bool | None) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    for level, value in ((config, outer), (config["text_config"], inner)):
        if value is not None:
            level["tie_word_embeddings"] = value
    return config


@pytest.mark.parametrize("outer", [True, False, None])
@pytest.mark.parametrize("inner", [True, False, None])
def test_a_nested_config_ties_what_transformers_ties(outer, inner):
    found = ties_head(at_levels(outer, inner))
    loads = transformers.LlavaConfig.from_dict(at_levels(outer, inner)).tie_word_embeddings
    if outer is True and inner is False:
        assert found is None  # transformers 4 asks the inner level, 5 the outer one
    else:
        assert found is loads


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_any_level_of_a_deeply_nested_config_says_counts(depth, said):
    config: dict[str, Any] = {"model_type": "qwen2_5_omni"}
    level = config
    for key in ("thinker_config", "text_config"):
        level[key] = {"model_type": "qwen2"}
        level = level[key]
    levels = [config, config["thinker_config"], level]
    levels[depth]["tie_word_embeddings"] = said
    assert ties_head(config) is said
    assert text_config(config) is level


def test_a_head_that_the_spec_unties_is_untied_at_every_level(tmp_path):
    names = ("thinker.model.embed_tokens.weight", "thinker.model.layers.0.mlp.weight")
    for seed, name in enumerate(("base", "task")):
        torch.manual_seed(seed)
        (tmp_path / name).mkdir()
        store(tmp_path / name, {tensor: torch.rand(4, 4) for tensor in names})
        text = {"model_type": "qwen2", "vocab_size": 4, "tie_word_embeddings": True}
        config = {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": text}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    spec = spec_of(tmp_path / "base", [tmp_path / "task"], tie_word_embeddings=False)

    output = run(spec, tmp_path / "out")

    assert "thinker.lm_head.weight" in load_file(output / "model.safetensors")
    said = json.loads((output / "config.json").read_text())
    levels = (said, said["thinker_config"], said["thinker_config"]["text_config"])
    assert [level["tie_word_embeddings"] for level in levels] == [False] * 3


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "bart", "bert", "qwen2", "mamba"])
def test_a_silent_config_ties_what_its_class_ties(kind):
    expected = transformers.CONFIG_MAPPING[kind]().tie_word_embeddings
    assert ties_head({"model_type": kind}) is expected


def test_without_transformers_a_silent_config_says_nothing(monkeypatch):
    from outliermerge.planning import tied_names

    monkeypatch.setattr(tied_names, "effective_config", lambda config: None)
    assert tied_names.ties_head({"model_type": "gemma"}) is None


# What the names of these do not tell; that the output loads is proved by transformers itself.
UNTOLD = {
    "blt", "csm", "ctrl", "flava", "fsmt", "granite_speech5", "luke",
    "neomme", "openai", "prophetnet", "rwkv", "udop",
}  # fmt: skip


def declared() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield model type and ties that the model classes of transformers declare name by name."""
    folder = Path(transformers.__file__).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        # Parsing the files whole takes ten seconds.
        for text in re.findall(r"^ +_tied_weights_keys = (\{[^{}]*\})$", path.read_text(), re.M):
            ties = ast.literal_eval(text)
            names = (*ties, *ties.values())
            if all(re.fullmatch(r"[\w.]+(weight|bias)", name) for name in names):
                yield path.parent.name, ties


def test_names_tell_what_transformers_ties():
    found = list(declared())
    assert len(found) > 300
    untold = set()
    for kind, ties in found:
        names = {name: SimpleNamespace(shape=(4, 2)) for name in (*ties, *ties.values())}
        for name, original in ties.items():
            told = original_of(name, names)
            if told is None or original not in (told, original_of(told, names)):
                untold.add(kind)
    assert untold == UNTOLD


# Adapters

Q = {"target_modules": ["q_proj"]}
BOTH_ENDS = ["q_proj", "embed_tokens", "lm_head"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "layers": Q,
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": BOTH_ENDS},
    "embeddings saved": Q | {"modules_to_save": ["embed_tokens"]},
    "head saved": Q | {"modules_to_save": ["lm_head"]},
    "both saved": Q | {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": Q | {"trainable_token_indices": [3, 5]},
    "one": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "one of both": {"target_modules": BOTH_ENDS, "ensure_weight_tying": True},
    "one saved": Q | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "one of both saved": Q
    | {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
}
TOKENS = {"embed_tokens": [1, 5], "lm_head": [1, 20]}
ADAPTERS |= {
    "head by DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "one by DoRA": ADAPTERS["one"] | {"use_dora": True},
    "tokens of the head": Q | {"trainable_token_indices": {"lm_head": [1, 5]}},
    "tokens of both": Q | {"trainable_token_indices": TOKENS},
}
PARTS = {
    *("head", "both", "embeddings saved", "head saved", "both saved"),
    *("head by DoRA", "one by DoRA", "tokens of the head", "tokens of both"),
}


@lru_cache
def family(root: Path, kind: str, how: str) -> Path:
    return keep(small(kind, tied=True), root / f"{kind} {how}", how)


@lru_cache
def adapted(root: Path, base: Path, case: str) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """Train an adapter; return its folder, the logits as trained, and those of peft's merge."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=8, **ADAPTERS[case])
        model = peft.get_peft_model(loaded(base), config)
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        trained = logits(model)
        folder = root / f"{case} of {base.name}"
        model.save_pretrained(folder)
        merged = peft.PeftModel.from_pretrained(loaded(base), folder).merge_and_unload()
    return folder, trained, logits(merged)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("ties")


BASES = [("llama", "once"), ("llama", "twice"), ("llama", "as the head"),
         ("gemma", "once, silent"), ("gemma", "twice, silent")]  # fmt: skip


# Each adapter on one of the bases; `make faults` tries it on the others.
@pytest.mark.parametrize(
    ("kind", "how", "case"),
    [
        pytest.param(*base, case, marks=pytest.mark.faults if (i - j) % len(BASES) else ())
        for j, base in enumerate(BASES)
        for i, case in enumerate(ADAPTERS)
    ],
)
@pytest.mark.sampled(2)
def test_an_adapter_of_a_tied_model_is_what_was_trained_or_peft_merges(
    kind, how, case, root, tmp_path
):
    base = family(root, kind, how)
    adapter, trained, merged = adapted(root, base, case)
    for spec in (spec_of(base, [adapter]), spec_of(None, [adapter], merge_method="passthrough")):
        try:
            found = assert_loaders_agree(run(spec, tmp_path / "out"))
        except OutlierMergeError as error:
            assert case in PARTS and WAYS_OUT in str(error)
        else:
            assert case not in PARTS
            error = min((found - wanted).abs().max() for wanted in (trained, merged))
            assert error < 1e-3
        apart = spec | {"tie_word_embeddings": False}
        found = assert_loaders_agree(run(apart, tmp_path / "apart"))
        if case in PARTS or case in ("layers", "one", "one saved"):
            torch.testing.assert_close(found, trained, rtol=0, atol=1e-3)
        assert_loaders_agree(run(spec | {"tie_word_embeddings": True}, tmp_path / "joined"))


# What only looks tied, and what is tied by its place


def test_a_head_that_was_lost_is_not_the_embeddings(tmp_path):
    """Where a silent config ties nothing by default: LLaVA-VL/LLaVA-NeXT #315."""
    small("llama", tied=False).save_pretrained(tmp_path / "base")
    small("llama", tied=False, seed=1).save_pretrained(tmp_path / "task")
    tensors = load_folder(tmp_path / "task")
    del tensors[HEAD]
    store(tmp_path / "task", tensors)
    edit_json(tmp_path / "task" / "config.json", lambda config: config.pop("tie_word_embeddings"))
    with pytest.raises(OutlierMergeError, match=rf"{HEAD}: not in {tmp_path / 'task'}"):
        outliermerge.plan(spec_of(tmp_path / "base", [tmp_path / "task"]))


@pytest.mark.parametrize("said", [{"tie_word_embeddings": False}, {}])
def test_a_head_that_no_model_has_is_told(said, tmp_path):
    for seed, name in enumerate(("base", "task")):
        small("llama", tied=True, seed=seed).save_pretrained(tmp_path / name)
        edit_json(tmp_path / name / "config.json", lambda c: c.update(said))
        if not said:  # which a Llama's class reads as false
            edit_json(tmp_path / name / "config.json", lambda c: c.pop("tie_word_embeddings"))
    notes = outliermerge.plan(spec_of(tmp_path / "base", [tmp_path / "task"])).notes
    assert any("no head is stored" in note for note in notes)


BLIP = {
    "text_decoder.cls.predictions.decoder.weight": (
        "text_decoder.bert.embeddings.word_embeddings.weight"
    ),
    "text_decoder.bert.embeddings.word_embeddings.weight": None,
    "text_encoder.embeddings.word_embeddings.weight": None,
}
DEEPSEEK = {
    "model.layers.2.embed_tokens.weight": EMBEDDINGS,
    "model.layers.2.shared_head.head.weight": HEAD,
    HEAD: EMBEDDINGS,
    EMBEDDINGS: None,
}


def masked_model(seed: int, *, tied: bool) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=24, hidden_size=8, intermediate_size=8,
                                     num_hidden_layers=1, num_attention_heads=2,
                                     tie_word_embeddings=tied)  # fmt: skip
    return transformers.BertForMaskedLM(config)


@pytest.mark.parametrize("tied", [True, False])
def test_the_biases_of_a_head_are_one_where_the_head_is_tied(tied, tmp_path):
    """transformers 5 trains the decoder's bias of an untied BERT, and leaves the other as it is."""
    base = masked_model(0, tied=tied)
    tasks = [tuned(base, seed) for seed in (1, 2)]
    for name, model in (("base", base), ("0", tasks[0]), ("1", tasks[1])):
        model.save_pretrained(tmp_path / name)
    out = run(spec_of(tmp_path / "base", [tmp_path / "0", tmp_path / "1"]), tmp_path / "out")
    merged = transformers.BertForMaskedLM.from_pretrained(out).state_dict()
    for name, start in base.state_dict().items():
        expected = start.double() + sum(t.state_dict()[name].double() - start for t in tasks)
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-6)
    biases = [merged[f"cls.predictions.{name}bias"] for name in ("", "decoder.")]
    assert torch.equal(*biases) is tied


@pytest.mark.parametrize("originals", [BLIP, DEEPSEEK], ids=["BLIP", "DeepSeek"])
def test_of_several_embeddings_the_nearest_is_the_original(originals):
    names: Any = {name: SimpleNamespace(shape=(4, 2)) for name in originals}
    assert {name: original_of(name, names) for name in names} == originals


@pytest.mark.parametrize("tied", [True, False])
def test_copies_in_a_layer_that_predicts_further_tokens_stay_copies(tied, tmp_path):
    """The layer behind the last of DeepSeek-V3, which a fine-tune by transformers lacks."""
    model = small("llama", tied=tied)
    model.save_pretrained(tmp_path / "base")
    tuned(model, 1).save_pretrained(tmp_path / "task")
    tensors = load_folder(tmp_path / "base")
    head = tensors[EMBEDDINGS if tied else HEAD]
    copies = {
        "model.layers.1.embed_tokens.weight": tensors[EMBEDDINGS].clone(),
        "model.layers.1.shared_head.head.weight": head.clone(),
    }
    store(tmp_path / "base", tensors | (copies if not tied else copies | {HEAD: head.clone()}))
    output = run(spec_of(tmp_path / "base", [tmp_path / "task"]), tmp_path / "out")
    found, task = load_folder(output), load_folder(tmp_path / "task")
    assert torch.equal(found["model.layers.1.embed_tokens.weight"], found[EMBEDDINGS])
    assert torch.equal(found["model.layers.1.shared_head.head.weight"], found[HEAD])
    torch.testing.assert_close(found[HEAD], task[EMBEDDINGS if tied else HEAD])
