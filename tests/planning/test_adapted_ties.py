"""Adapters over a base that ties its head: what comes does not depend on how the base stores it.

The base keeps its one tensor as the embeddings, as the head, or as both. peft says what an adapter
trained: the embeddings and the head that its layers compute with.
"""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from checkpoints import load_folder
from families import edit_json
from safetensors.torch import load_file, save_file

import outliermerge
from outliermerge.errors import OutlierMergeError
from outliermerge.planning.tied import WAYS_OUT

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED = {"once": [EMBEDDINGS], "as the head": [HEAD], "twice": [EMBEDDINGS, HEAD]}
WIDTH, TOKENS = 8, 12
SIZES: dict[str, Any] = {
    "vocab_size": TOKENS, "hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
    "max_position_embeddings": 16, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": True,
}  # fmt: skip
ENDS = {"head": ["lm_head"], "embeddings": ["embed_tokens"], "both": ["embed_tokens", "lm_head"]}
ROWS = {"embed_tokens": [3, 5], "lm_head": [1, 5]}


def case(kind: str, end: str, *, one: bool) -> dict[str, Any]:
    """Return the config of an adapter of a kind, at an end of the model, that trains it as one."""
    config: dict[str, Any] = {"target_modules": ["q_proj"], "ensure_weight_tying": one}
    if kind == "saved":
        return config | {"modules_to_save": list(ENDS[end])}
    if kind == "tokens":
        return config | {"trainable_token_indices": {name: ROWS[name] for name in ENDS[end]}}
    return config | {"target_modules": ["q_proj", *ENDS[end]], "use_dora": kind == "dora"}


KINDS = [*itertools.product(("lora", "dora", "saved"), ENDS, (False, True))]
CASES = {
    f"{kind} {end}{' as one' if one else ''}": case(kind, end, one=one)
    for kind, end, one in [*KINDS, *(("tokens", end, False) for end in ENDS)]
} | {
    "layers": {"target_modules": ["q_proj"]},
    "tokens as one": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]},
        "ensure_weight_tying": True,
    },
    "another scale as one": case("lora", "both", one=True) | {"alpha_pattern": {"lm_head": 5}},
}


@dataclass(frozen=True)
class Trained:
    folder: Path
    embeddings: torch.Tensor
    head: torch.Tensor

    @property
    def is_one(self) -> bool:
        return torch.allclose(self.embeddings, self.head, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapted")


@lru_cache
def base(root: Path, how: str) -> Path:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    folder = root / how
    model.save_pretrained(folder)
    tensors = load_folder(folder)
    value = tensors.pop(EMBEDDINGS)
    return store(folder, tensors | {name: value.clone() for name in STORED[how]})


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@lru_cache
def adapter(root: Path, name: str) -> Trained:
    folder = root / name
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        under = transformers.AutoModelForCausalLM.from_pretrained(base(root, "once"))
        torch.manual_seed(3)
        model = peft.get_peft_model(under, peft.LoraConfig(r=2, lora_alpha=4, **CASES[name]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder)
        edit_json(folder / "adapter_config.json", lambda c: c.pop("base_model_name_or_path"))
        model.eval()
        embeddings = model.get_input_embeddings()(torch.arange(TOKENS))
        head = model.base_model.model.lm_head(torch.eye(WIDTH)).T
    return Trained(folder, embeddings.clone(), head.clone())


def spec_of(under: Path, task: Path, tie: bool | None) -> dict[str, Any]:
    spec: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": str(under)}
    spec["models"] = [{"model": str(task)}]
    return spec if tie is None else spec | {"tie_word_embeddings": tie}


def ends_of(output: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings and head of an output as its config has them used."""
    found = load_folder(output)
    if not json.loads((output / "config.json").read_text())["tie_word_embeddings"]:
        return found[EMBEDDINGS], found[HEAD]
    assert torch.equal(found[EMBEDDINGS], found.get(HEAD, found[EMBEDDINGS]))
    return found[EMBEDDINGS], found[EMBEDDINGS]


def outcome(under: Path, task: Path, tie: bool | None, output: Path) -> object:
    """Return an output's two ends, or how it is refused; with what is noted of the adapter."""
    try:
        plan = outliermerge.plan(spec_of(under, task, tie))
        outliermerge.run(plan, output=output, overwrite=True)
    except OutlierMergeError as error:
        return str(error).replace(str(under), "BASE")
    notes = [note.replace(str(under), "BASE") for note in plan.notes if str(task) in note]
    kept = sorted(note for note in notes if "stands for it" not in note)
    return [end.tolist() for end in ends_of(output)], kept


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tie", [None, False, True])
@pytest.mark.parametrize("name", CASES)
def test_what_was_trained_comes_however_the_base_is_stored(name, tie, root, tmp_path):
    trained = adapter(root, name)
    first, *others = (
        outcome(base(root, how), trained.folder, tie, tmp_path / "out") for how in STORED
    )
    assert all(other == first for other in others)
    follows = name in ("lora embeddings", "dora embeddings")  # as when peft merges them
    if tie is None and not trained.is_one and not follows:
        assert isinstance(first, str) and WAYS_OUT in first
        return
    assert isinstance(first, tuple)
    (embeddings, head), notes = first
    expected = trained.head if tie is False else trained.embeddings
    torch.testing.assert_close(torch.tensor(embeddings), trained.embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(head), expected, rtol=0, atol=1e-5)
    noted = any("though it did not in training" in note for note in notes)
    assert noted is (follows and tie is not False)


def test_the_cases_part_the_ends_that_peft_parts(root):
    """`ensure_weight_tying` ties LoRA's factors, and not DoRA's norms or another scale."""
    one = {name for name in CASES if adapter(root, name).is_one}
    lora = {f"lora {end} as one" for end in ENDS} | {f"saved {end} as one" for end in ENDS}
    assert one == {*lora, "layers", "tokens as one", "tokens embeddings"}


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("changed", ["lm_head.lora_A", "lm_head.lora_B"])
def test_factors_that_should_be_one_and_are_not_are_refused(how, changed, root, tmp_path):
    """A tie that a trainer has lost, by moving parameters for example."""
    tensors = load_file(adapter(root, "lora both as one").folder / "adapter_model.safetensors")
    config = (adapter(root, "lora both as one").folder / "adapter_config.json").read_text()
    task = tmp_path / "task"
    task.mkdir()
    (task / "adapter_config.json").write_text(config)
    tensors[f"base_model.model.{changed}.weight"][0, 0] += 1
    save_file(tensors, task / "adapter_model.safetensors")
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.run(spec_of(base(root, how), task, None), output=tmp_path / "out")
    assert WAYS_OUT in str(caught.value) and str(task) in str(caught.value)
    outliermerge.run(spec_of(base(root, how), task, False), output=tmp_path / "apart")
    embeddings, head = ends_of(tmp_path / "apart")
    assert not torch.allclose(embeddings, head, atol=0.01)


@pytest.mark.parametrize("name", ["lora embeddings", "lora embeddings as one", "layers"])
def test_a_base_that_holds_two_ends_and_ties_them_is_not_made_one(name, root, tmp_path):
    """Whose file has a head of its own, which transformers 5 uses."""
    under = tmp_path / "base"
    under.mkdir()
    tensors = load_folder(base(root, "twice"))
    own = tensors[HEAD] + 1
    store(under, tensors | {HEAD: own})
    (under / "config.json").write_text((base(root, "twice") / "config.json").read_text())
    task = adapter(root, name).folder
    alone = {"merge_method": "passthrough", "models": [{"model": f"{under}+{task}"}]}
    for spec in (spec_of(under, task, None), alone):
        with pytest.raises(OutlierMergeError, match="right only where they are equal"):
            outliermerge.run(spec, output=tmp_path / "out")
    if name != "lora embeddings as one":
        outliermerge.run(spec_of(under, task, False), output=tmp_path / "apart")
        assert torch.equal(ends_of(tmp_path / "apart")[1], own)


# Bases with further names of the one tensor


def t5(folder: Path, names: tuple[str, ...], *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=TOKENS, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tensors = load_folder(folder)
    value = tensors.pop("shared.weight")
    return store(folder, tensors | {name: value.clone() for name in names})


def test_a_head_whose_embeddings_cannot_be_named_is_not_changed_alone(tmp_path):
    under = t5(tmp_path / "base", (HEAD,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.T5ForConditionalGeneration.from_pretrained(
            t5(tmp_path / "whole", ("shared.weight",))
        )
        config = peft.LoraConfig(r=2, target_modules=["q", "lm_head"])
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "task")
    for tie in (None, False, True):
        with pytest.raises(OutlierMergeError, match=r"lm_head.*whose name cannot be told"):
            outliermerge.plan(spec_of(under, tmp_path / "task", tie))


def test_a_base_without_the_first_of_its_names_pairs_with_a_model_that_has_it(tmp_path):
    copies = ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight")
    folders = [t5(tmp_path / "base", copies), t5(tmp_path / "task", ("shared.weight",), seed=1)]
    spec = spec_of(*folders, None)
    output = outliermerge.run(spec, output=tmp_path / "out").output
    found = load_folder(output)
    assert not {HEAD, *copies} & found.keys()
    torch.testing.assert_close(found["shared.weight"], load_folder(folders[1])["shared.weight"])
    tensors = load_folder(folders[0])
    tensors["encoder.embed_tokens.weight"] += 1
    store(folders[0], tensors)
    with pytest.raises(OutlierMergeError, match="right only where they are equal"):
        outliermerge.run(spec, output=tmp_path / "parted")


def test_a_tied_head_is_not_filled_up_from_the_base_beside_other_embeddings(tmp_path):
    """CPM-Ant's head is its first rows of embeddings: huggingface/transformers #46835."""
    sizes = {
        "vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "dim_head": 4, "dim_ff": 8,
        "num_hidden_layers": 1, "prompt_types": 2, "prompt_length": 2,
    }  # fmt: skip
    for seed, name in enumerate(("base", "task")):
        torch.manual_seed(seed)
        model = transformers.CpmAntForCausalLM(transformers.CpmAntConfig(**sizes))
        model.save_pretrained(tmp_path / name)
        edit_json(tmp_path / name / "config.json", lambda c: c.update(tie_word_embeddings=True))
    tensors = load_folder(tmp_path / "task")
    del tensors[HEAD]
    store(tmp_path / "task", tensors)
    spec = spec_of(tmp_path / "base", tmp_path / "task", None) | {"missing": "base"}
    with pytest.raises(OutlierMergeError, match=rf"{HEAD}.*task.*ties it"):
        outliermerge.plan(spec)
