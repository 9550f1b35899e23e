"""The proof that an output loads: what does not is found by plan, run and verify, and only that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import checkpoints
import families
import llava_replicas
import pytest
import torch
import transformers
import yaml
from checkpoints import load_folder
from families import edit_json, replace_tensors, save_llama, tune

import outliermerge
from outliermerge.cli import main as cli
from outliermerge.cli import terminal
from outliermerge.errors import OutlierMergeError
from outliermerge.output import load_check, load_worker
from outliermerge.output.load_check import LoadCheck, Verdict
from outliermerge.output.verify_load import check_folder

pytestmark = pytest.mark.usefixtures("own_cache")
DROPPED = "model.layers.1.mlp.up_proj.weight"
HEADS = "lm_head.weight"
BY = f"transformers {transformers.__version__}, LlamaForCausalLM"


def planned(spec: Any) -> Verdict:
    with LoadCheck.of_plans([outliermerge.plan(spec)]) as check:
        return check.verdicts()[0]


def merge_of(base: Path, *models: Path, **more: Any) -> dict[str, Any]:
    named = [{"model": str(model)} for model in models]
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": named} | more


def config_of(folder: Path, **changes: Any) -> None:
    edit_json(folder / "config.json", lambda config: config.update(changes))


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Give a spec that merges a small Llama with a fine-tune of it, in folders of its own."""
    base = save_llama(tmp_path / "base")
    tune(base, tmp_path / "task", seed=1)
    return lambda **more: merge_of(base, tmp_path / "task", **more)


# Each breaks what is to be merged of the folders base and task.


def says_more_layers(place: Path) -> dict[str, Any]:
    return config_source(place, num_hidden_layers=3)


def says_nonsense(place: Path) -> dict[str, Any]:
    return config_source(place, num_attention_heads="four")


def says_biases(place: Path) -> dict[str, Any]:
    return config_source(place, attention_bias=True)


def says_another_width(place: Path) -> dict[str, Any]:
    return config_source(place, intermediate_size=64)


def says_nonsense_of_no_tensor(place: Path) -> dict[str, Any]:
    return config_source(place, initializer_range="wide")


def lacks_a_tensor(place: Path) -> dict[str, Any]:
    """The base and a model are of a class without head; the config's has one."""
    for name in ("base", "task"):
        tensors = load_folder(place / name)
        del tensors[HEADS]
        replace_tensors(place / name, tensors)
        config_of(place / name, architectures=["LlamaModel"])
    return config_source(place, architectures=["LlamaForCausalLM"])


def says_a_rope_that_is_none(place: Path) -> dict[str, Any]:
    return config_source(place, rope_parameters={"rope_type": "yarnish", "rope_theta": 1e4})


def has_a_head_of_another_class(place: Path) -> dict[str, Any]:
    tensors = load_folder(place / "task")
    replace_tensors(place / "task", tensors | {"score.weight": torch.randn(2, 32)})
    return {"models": ["task"], "extra": "copy"}


def is_of_a_class_without_head(place: Path) -> dict[str, Any]:
    return config_source(place, architectures=["LlamaModel"])


def is_of_a_class_with_another_head(place: Path) -> dict[str, Any]:
    return config_source(place, architectures=["LlamaForSequenceClassification"])


def config_source(place: Path, **changes: Any) -> dict[str, Any]:
    """Break the output's config, and not the base's."""
    shutil.copytree(place / "task", place / "other")
    config_of(place / "other", **changes)
    return {"models": ["task", "other"], "config_source": str(place / "other")}


BROKEN = {
    lacks_a_tensor: ("that LlamaForCausalLM has and the output lacks", HEADS),
    says_biases: ("that LlamaForCausalLM has and the output lacks", "self_attn.q_proj.bias"),
    says_another_width: ("[48, 32], LlamaForCausalLM expects [64, 32]", "up_proj.weight"),
    says_nonsense_of_no_tensor: ("LlamaForCausalLM refuses it", "initializer_range"),
    says_a_rope_that_is_none: ("LlamaForCausalLM refuses it", "yarnish"),
    has_a_head_of_another_class: ("that LlamaForCausalLM does not know", "score.weight"),
    is_of_a_class_without_head: ("that LlamaModel does not know", HEADS),
    is_of_a_class_with_another_head: ("LlamaForSequenceClassification has", "score.weight"),
}


def broken(break_: Callable[[Path], dict[str, Any]], place: Path) -> dict[str, Any]:
    base = save_llama(place / "base")
    tune(base, place / "task", seed=1)
    more = break_(place)
    return merge_of(base, *(place / name for name in more.pop("models")), **more)


@pytest.mark.parametrize("break_", BROKEN)
def test_what_would_not_load_is_found_before_and_after(break_, tmp_path, in_process):
    spec, out = broken(break_, tmp_path), tmp_path / "out"
    verdict = planned(spec)
    assert verdict.status == "does not load"
    said = "\n".join(verdict.problems)
    assert all(words in said for words in BROKEN[break_]), said

    with pytest.raises(OutlierMergeError, match="would not load") as caught:
        outliermerge.run(spec, output=out, load_check=True)
    assert all(words in str(caught.value) for words in BROKEN[break_])
    assert not out.exists()
    outliermerge.run(spec, output=out)
    found = "\n".join(outliermerge.verify(out, load=True))
    assert all(words in found for words in BROKEN[break_]), found
    assert outliermerge.verify(out) == []


@pytest.mark.parametrize("break_", [says_more_layers, says_nonsense])
def test_configs_that_no_merge_has_are_refused_by_the_plan(break_, tmp_path):
    with pytest.raises(OutlierMergeError, match="the models' configs say"):
        outliermerge.plan(broken(break_, tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3}, "9 tensor(s) that LlamaForCausalLM has and the output lacks"),
        ({"num_hidden_layers": 1}, "9 tensor(s) that LlamaForCausalLM does not know"),
        ({"vocab_size": 128}, "embed_tokens.weight: [96, 32], LlamaForCausalLM expects [128, 32]"),
        ({"intermediate_size": 64}, "mlp.up_proj.weight: [48, 32]"),
        ({"num_attention_heads": "four"}, "LlamaForCausalLM refuses it"),
        ({"architectures": ["LlamaModel"]}, "that LlamaModel does not know"),
    ],
)
def test_a_config_that_was_edited_is_found(changes, said, llama, tmp_path, in_process):
    out = outliermerge.run(llama(), output=tmp_path / "out", load_check=True).output
    config_of(out, **changes)
    verdict = check_folder(out)
    assert verdict.status == "does not load"
    assert said in "\n".join(verdict.problems)


def test_a_tensor_that_is_lost_is_found(llama, tmp_path, in_process):
    out = outliermerge.run(llama(), output=tmp_path / "out").output
    tensors = load_folder(out)
    del tensors[DROPPED]
    replace_tensors(out, tensors)
    assert DROPPED in check_folder(out).problems[0]


def test_a_run_goes_on_when_the_config_is_mended(tmp_path, in_process):
    spec = broken(says_biases, tmp_path)
    with pytest.raises(OutlierMergeError, match="would not load"):
        outliermerge.run(spec, output=tmp_path / "out", load_check=True)
    config_of(tmp_path / "other", attention_bias=False)
    result = outliermerge.run(spec, output=tmp_path / "out", load_check=True)
    assert result.load_check.status == "loads"
    assert result.manifest["load_check"]["by"] == [BY]
    assert outliermerge.verify(tmp_path / "out", load=True) == []


def unknown_class(config: dict[str, Any]) -> None:
    config["architectures"] = ["LlavaLlamaForCausalLM"]


def own_code(config: dict[str, Any]) -> None:
    config["architectures"] = ["SomeForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_some.SomeForCausalLM"}


def no_class(config: dict[str, Any]) -> None:
    del config["architectures"]


def no_model_type(config: dict[str, Any]) -> None:
    del config["model_type"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (unknown_class, "has no LlavaLlamaForCausalLM"),
        (own_code, "SomeForCausalLM needs its own code, which is not run"),
        (no_class, "config.json names no architectures"),
        (no_model_type, "config.json names no architectures and model_type"),
    ],
)
def test_what_cannot_be_told_is_a_note_and_no_refusal(change, why, llama, tmp_path, in_process):
    for name in ("base", "task"):
        edit_json(tmp_path / name / "config.json", change)
    result = outliermerge.run(llama(), output=tmp_path / "out", load_check=True)
    assert result.load_check.status == "not checked"
    assert result.load_check.problems == ()
    (note,) = result.load_check.notes
    assert note.startswith("not checked that the output loads: ") and why in note
    shutil.rmtree(tmp_path / "base")  # the manifest knows of its mistake
    assert outliermerge.verify(tmp_path / "out", load=True) == []


def test_without_transformers_the_check_says_so(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(load_check, "has_transformers", lambda: False)
    verdict = planned(llama())
    assert verdict.status == "not checked"
    assert verdict.notes == ("not checked that the output loads: transformers is not installed",)


def test_no_accelerate_is_needed(llama, tmp_path, in_process, monkeypatch):
    for home in ("transformers.integrations.accelerate", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{home}.is_accelerate_available", lambda *_: False, raising=False)
    monkeypatch.setattr(
        load_worker, "find_spec", lambda name: None if name == "accelerate" else find_spec(name)
    )
    assert planned(llama()).status == "loads"


def test_a_single_file_has_nothing_that_loads_it(tmp_path, in_process):
    base = save_llama(tmp_path / "base") / "model.safetensors"
    spec = {"merge_method": "linear", "models": [{"model": str(base)}]}
    out = tmp_path / "out.safetensors"
    result = outliermerge.run(spec, output=out, load_check=True)
    assert result.load_check.status == "not checked"
    assert "single file" in result.load_check.notes[0]
    assert check_folder(out).status == "not checked"


def test_what_the_base_lacks_or_has_too_much_is_a_note(llama, tmp_path, in_process):
    for name in ("base", "task"):
        tensors = load_folder(tmp_path / name)
        tensors.pop(DROPPED)
        replace_tensors(tmp_path / name, tensors | {"model.old.weight": torch.ones(2)})
    result = outliermerge.run(llama(), output=tmp_path / "out", load_check=True)
    assert result.load_check.status == "loads"
    said = "\n".join(result.load_check.notes)
    assert DROPPED in said and "model.old.weight" in said
    shutil.rmtree(tmp_path / "base")  # the manifest knows it
    assert outliermerge.verify(tmp_path / "out", load=True) == []
    assert check_folder(tmp_path / "out").notes == result.load_check.notes


FAULTS = {
    "another shape": (dict(intermediate_size=64), "another shape"),
    "an unknown type": (dict(model_type="zzz"), "'zzz'"),
    "what the class refuses": (dict(num_attention_heads="four"), "four"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_base_does_not_load_for_either_is_no_loading(
    fault, llama, tmp_path, in_process, capsys
):
    changes, word = FAULTS[fault]
    for name in ("base", "task"):
        config_of(tmp_path / name, **changes)
    result = outliermerge.run(llama(), output=tmp_path / "out", load_check=True)
    verdict = result.load_check
    assert (verdict.status, verdict.by) == ("does not load, as the base does not", ())
    assert any("does not load, as the base does not" in n and word in n for n in verdict.notes)
    terminal.print_result(result)
    assert "loads in" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "base")  # the manifest knows it
    assert check_folder(tmp_path / "out").status == verdict.status
    assert outliermerge.verify(tmp_path / "out", load=True) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_base_loads_is_refused_with_another_config(fault, llama, tmp_path, in_process):
    config_of(tmp_path / "task", **FAULTS[fault][0])
    try:
        verdict = planned(llama(config_source=str(tmp_path / "task")))
    except OutlierMergeError:  # numbers of heads are compared before
        return
    assert verdict.status == "does not load" and verdict.problems != ()


def test_verify_asks_the_base_where_the_run_did_not(llama, tmp_path, in_process):
    for name in ("base", "task"):
        tensors = load_folder(tmp_path / name)
        replace_tensors(tmp_path / name, tensors | {"model.old.weight": torch.ones(2)})
    outliermerge.run(llama(), output=tmp_path / "out")
    assert outliermerge.verify(tmp_path / "out", load=True) == []
    shutil.rmtree(tmp_path / "base")
    (found,) = outliermerge.verify(tmp_path / "out", load=True)
    assert "model.old.weight" in found


# Families whose outputs load


def assert_it_loads(spec: dict[str, Any], out: Path) -> Verdict:
    result = outliermerge.run(spec, output=out, load_check=True)
    assert result.load_check.status == "loads", result.load_check
    assert result.load_check.problems == result.load_check.notes == ()
    verdict = check_folder(out)
    assert verdict.status == "loads" and not verdict.problems, verdict
    return verdict


@pytest.mark.parametrize("kind", families.KINDS)
def test_published_layouts_are_no_false_alarm(kind, tmp_path, in_process):
    family = families.build(kind, tmp_path)
    more = {} if family.missing is None else {"missing": family.missing}
    assert_it_loads(merge_of(family.base, *family.models, **more), tmp_path / "out")


@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_layouts_of_transformers_are_no_false_alarm(kind, tmp_path, in_process):
    base, models = checkpoints.family(kind, tmp_path, shard_size="40KB")
    result = outliermerge.run(
        merge_of(base, *models), output=tmp_path / "out", shard_size="30KB", load_check=True
    )
    assert result.load_check.status == "loads"
    assert outliermerge.verify(tmp_path / "out", load=True) == []


def test_gpt2_as_published_is_no_false_alarm(tmp_path, in_process):
    family = families.gpt2(tmp_path)
    models = [
        {"model": str(model), "rename": {"from": r"transformer\.(.+)", "to": r"\1"}}
        for model in family.models
    ]
    spec = merge_of(family.base) | {"models": models, "missing": "base"}
    assert_it_loads(spec, tmp_path / "out")


@pytest.mark.parametrize("names", ["published", "4.52"])
def test_llava_by_old_and_new_names_is_no_false_alarm(names, tmp_path, in_process):
    llava_replicas.save_hf_base(tmp_path / "base", names=names)
    tune(tmp_path / "base", tmp_path / "task", seed=1)
    verdict = assert_it_loads(merge_of(tmp_path / "base", tmp_path / "task"), tmp_path / "out")
    assert verdict.num_rows == {"": llava_replicas.NUM_ROWS}


def test_a_pipeline_is_checked_in_every_part(tmp_path, in_process):
    base = families.pipeline(tmp_path / "base")
    task = families.tune_pipeline(base, tmp_path / "task", seed=1)
    verdict = assert_it_loads(merge_of(base, task), tmp_path / "out")
    assert sorted(verdict.checked) == ["text_encoder", "unet", "vae"]

    config_of(tmp_path / "out" / "unet", cross_attention_dim=48)
    edit_json(
        tmp_path / "out" / "text_encoder" / "config.json",
        lambda config: config.update(num_hidden_layers=3),
    )
    problems = check_folder(tmp_path / "out").problems
    assert [problem.partition(":")[0] for problem in problems] == ["text_encoder", "unet"]


@pytest.mark.parametrize("config", ["t5", "bart", "whisper", "phi3", "deepseek_v3", "mamba",
                                    "roberta", "modernbert", "gemma3", "gpt_neox"])  # fmt: skip
def test_a_saved_model_is_no_false_alarm(config, tmp_path, in_process):
    torch.manual_seed(0)
    _MODELS[config]().save_pretrained(tmp_path / "base")
    tune(tmp_path / "base", tmp_path / "task", seed=1)
    assert_it_loads(merge_of(tmp_path / "base", tmp_path / "task"), tmp_path / "out")


_TEXT = families.TEXT
_PLAIN = families.SMALL | {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1,
                           "eos_token_id": 2}  # fmt: skip
_HALVES = {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
           "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
           "decoder_ffn_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
           "decoder_start_token_id": 2, "forced_eos_token_id": 2}  # fmt: skip
_MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=2,
                              num_heads=4, decoder_start_token_id=0)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**_HALVES)),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**_HALVES)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**_TEXT)),
    "deepseek_v3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **_TEXT, moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1,
            num_experts_per_tok=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
        )
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)
    ),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**_PLAIN)),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**_PLAIN, cls_token_id=1, sep_token_id=2)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**_TEXT, head_dim=8)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**_PLAIN)),
}  # fmt: skip


# The finished folder: tokens, indexes, and what needs no transformers


def save_tokenizer(folder: Path, num_tokens: int) -> None:
    import tokenizers

    model = tokenizers.models.WordLevel({f"t{n}": n for n in range(num_tokens)}, unk_token="t0")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))


def test_ids_without_rows_are_differences(llama, tmp_path, in_process):
    save_tokenizer(tmp_path / "base", 96)
    out = tmp_path / "out"
    outliermerge.run(llama(), output=out)
    assert outliermerge.verify(out, load=True) == []
    save_tokenizer(out, 98)
    config_of(out, image_token_id=97, pad_token_id=-1)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 99]}))
    problems = check_folder(out).problems
    assert [problem.splitlines()[1].strip() for problem in problems] == [
        "96: 't96'", "97: image_token_id", "99: eos_token_id",
    ]  # fmt: skip
    assert "2 id(s) beyond the 96 rows" in problems[0]


def test_ids_that_the_base_has_no_rows_for_either_are_a_note(llama, tmp_path, in_process):
    save_tokenizer(tmp_path / "base", 97)
    config_of(tmp_path / "base", image_token_id=96)
    config_of(tmp_path / "task", image_token_id=96)
    outliermerge.run(llama(), output=tmp_path / "out")
    verdict = check_folder(tmp_path / "out")
    assert verdict.problems == ()
    assert len(verdict.notes) == 2 and all("as in the base" in note for note in verdict.notes)


def test_an_index_that_is_not_what_the_shards_hold_is_a_difference(llama, tmp_path, in_process):
    out = outliermerge.run(llama(), output=tmp_path / "out", shard_size="20KB").output
    assert outliermerge.verify(out, load=True) == []

    def move(index: dict[str, Any]) -> None:
        places = index["weight_map"]
        places["model.norm.weight"] = next(
            file for file in sorted(set(places.values())) if file != places["model.norm.weight"]
        )
        del places[DROPPED]

    edit_json(out / "model.safetensors.index.json", move)
    (problem,) = check_folder(out).problems
    assert "model.norm.weight: model-" in problem and f"{DROPPED}: in model-" in problem


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 128}, "config.json says vocab_size 128, embeddings and head have 96"),
        ({"num_hidden_layers": 3}, "config.json says num_hidden_layers 3, the tensors have 2"),
        ({"pad_token_id": 96}, "beyond the 96 rows"),
        ({}, None),
    ],
)
def test_without_transformers_the_config_is_compared(changes, said, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(load_check, "has_transformers", lambda: False)
    out = outliermerge.run(llama(), output=tmp_path / "out").output
    config_of(out, **changes)
    verdict = check_folder(out)
    assert "transformers is not installed" in verdict.notes[0]
    assert verdict.status == ("does not load" if said else "not checked")
    assert [said in problem for problem in verdict.problems] == ([True] if said else [])


def test_a_head_that_is_neither_stored_nor_tied_is_found_without_transformers(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(load_check, "has_transformers", lambda: False)
    base = save_llama(tmp_path / "base", tied=True)
    spec = merge_of(base, tune(base, tmp_path / "task", seed=1))
    out = outliermerge.run(spec, output=tmp_path / "out").output
    assert outliermerge.verify(out, load=True) == []
    config_of(out, tie_word_embeddings=False)
    (problem,) = check_folder(out).problems
    assert "ties no head" in problem


# In processes, as a person meets it


def call(*arguments: object, check: str = "1", **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run(
        [Path(sys.executable).with_name("outliermerge"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OUTLIERMERGE_LOAD_CHECK": check},
        **options,
    )


def test_a_run_is_refused_and_nothing_has_the_outputs_name(tmp_path):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(broken(says_biases, tmp_path)))
    (tmp_path / "torch.py").write_text("raise SystemExit('of a model, not torch')")
    done = call("run", "spec.yaml", "--output", "out", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "error: the output would not load:\n8 tensor(s) that LlamaForC" in done.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()
    assert "\nout.partial is left: the same command without the check goes on" in done.stderr
    done = call("verify", "out", cwd=tmp_path)
    assert done.returncode == 1 and "which says so if it cannot be finished" in done.stderr
    done = call("run", "spec.yaml", "--output", "out", check="0", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "out" / "outliermerge.json").is_file()


def test_a_run_says_what_it_loads_in(llama, tmp_path):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(llama()))
    done = call("run", tmp_path / "spec.yaml", "--output", tmp_path / "out", "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["load_check"]["by"] == [BY]


def test_plan_and_verify_say_whether_it_loads(llama, tmp_path, in_process, capsys):
    spec, out = str(tmp_path / "spec.yaml"), tmp_path / "out"
    Path(spec).write_text(yaml.safe_dump(llama()))
    assert cli.main(["plan", spec, "--load-check"]) == 0
    assert BY in " ".join(capsys.readouterr().out.split())
    assert cli.main(["plan", spec, "--load-check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["load_check"]["status"] == "loads"
    assert cli.main(["plan", spec, "--no-load-check", "--json"]) == 0
    assert "load_check" not in json.loads(capsys.readouterr().out)

    assert cli.main(["run", spec, "--output", str(out)]) == 0
    assert "load_check" not in json.loads((out / "outliermerge.json").read_text())
    capsys.readouterr()
    assert cli.main(["verify", str(out), "--load"]) == 0
    assert f"checked by {BY}" in capsys.readouterr().out
    config_of(out, attention_bias=True)
    assert cli.main(["verify", str(out), "--load", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["load_check"]["status"] == "does not load" and not found["ok"]
    assert [text.partition(":")[0] for text in found["differences"]] == [
        "file config.json", "8 tensor(s) that LlamaForCausalLM has and the output lacks; they "
        "would be drawn at random",
    ]  # fmt: skip


def test_a_plan_that_would_not_load_is_refused(tmp_path, in_process, capsys):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(broken(says_biases, tmp_path)))
    assert cli.main(["plan", str(tmp_path / "spec.yaml"), "--load-check"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "the output would not load" in printed.err


def test_a_sweep_is_checked_too(llama, tmp_path, in_process, capsys):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(llama()))
    words = ["--set", "lambda=0.5,1", "--output", str(tmp_path / "out"), "--load-check", "--json"]
    assert cli.main(["sweep", str(tmp_path / "spec.yaml"), *words]) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert [output["load_check"]["status"] for output in outputs] == ["loads", "loads"]


def test_a_base_with_other_names_is_asked_by_its_own(llama, tmp_path, in_process):
    """Its own names load, so that it excuses nothing."""
    rule = {"from": r"model\.(.+)", "to": r"decoder.\1"}
    base, task = str(tmp_path / "base"), str(tmp_path / "task")
    spec = {
        "merge_method": "linear",
        "models": [{"model": base, "rename": rule}, {"model": task, "rename": rule}],
    }
    verdict = planned(spec)
    assert verdict.status == "does not load" and verdict.as_base == {}


def test_a_process_that_dies_is_a_note(llama, monkeypatch):
    monkeypatch.setattr(load_check, "_START", "raise ValueError('broken install')")
    verdict = planned(llama())
    assert verdict.status == "not checked"
    assert "ended with code 1: ValueError: broken install" in verdict.notes[0]


def test_no_process_is_a_note(llama, monkeypatch):
    monkeypatch.setattr(load_check.sys, "executable", "/no/such/python")
    verdict = planned(llama())
    assert verdict.status == "not checked"
    assert "no process can be started for it: No such file" in verdict.notes[0]


def test_a_model_of_70_billion_parameters_takes_no_memory():
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    part = {
        "library": "transformers",
        "class": "LlamaForCausalLM",
        "config": config.to_dict(),
        "tensors": {name: list(tensor.shape) for name, tensor in shapes.items()},
    }
    program = (
        "import json, sys; from outliermerge.output.load_worker import check_part; "
        "found = check_part(json.load(sys.stdin)); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); "
        "print(json.dumps(found))"
    )  # getrusage's ru_maxrss would count this process's own memory, from before the exec
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(part), capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    peak_kib, found = done.stdout.splitlines()[-2:]
    assert json.loads(found)["missing"] == json.loads(found)["mismatched"] == []
    assert int(peak_kib) < 1.5 * 2**20


def test_help_tells_of_the_variable(capsys):
    assert cli.main(["run", "--help"]) == 0
    assert "OUTLIERMERGE_LOAD_CHECK=0" in " ".join(capsys.readouterr().out.split())


def test_a_tie_of_the_class_that_a_plan_does_not_know_is_refused(tmp_path, in_process):
    base = save_llama(tmp_path / "base", tied=True)
    tensors = load_folder(base)
    replace_tensors(base, tensors | {HEADS: tensors["model.embed_tokens.weight"].clone()})
    plan = outliermerge.plan(merge_of(base, tune(base, tmp_path / "task", seed=1)))
    said = f"{HEADS} is merged otherwise than model.embed_tokens.weight"
    for parameters, is_told in (({}, False), ({"t": 9.0}, True)):
        jobs = tuple(
            replace(job, parameters=job.parameters | parameters) if job.name == HEADS else job
            for job in plan.jobs
        )
        with LoadCheck.of_plans([replace(plan, jobs=jobs)]) as check:
            assert (said in check.verdicts()[0].parted) is is_told
            if is_told:
                with pytest.raises(OutlierMergeError, match="ties to one tensor"):
                    check.raise_if_bad([tmp_path / "out.partial"])


def test_embeddings_that_one_model_stores_three_times_are_not_parted(tmp_path, in_process):
    """`missing: base` would keep the base's copies beside what was merged."""
    torch.manual_seed(0)
    config = transformers.ProphetNetConfig(
        vocab_size=24, hidden_size=8, encoder_ffn_dim=8, num_encoder_layers=1,
        num_encoder_attention_heads=2, decoder_ffn_dim=8, num_decoder_layers=1,
        num_decoder_attention_heads=2, max_position_embeddings=16, ngram=2,
    )  # fmt: skip
    model = transformers.ProphetNetForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    task = tune(tmp_path / "base", tmp_path / "task", seed=1)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replace_tensors(tmp_path / "base", whole)
    spec = merge_of(tmp_path / "base", task) | {"missing": "base"}
    with pytest.raises(OutlierMergeError, match="ties to one tensor"):
        outliermerge.run(spec, output=tmp_path / "out", load_check=True)
    again = type(model).from_pretrained(tmp_path / "base")
    again.save_pretrained(tmp_path / "again")
    outliermerge.run(merge_of(tmp_path / "again", task), output=tmp_path / "out", load_check=True)


def test_verify_tells_of_a_config_that_cannot_be_read(llama, tmp_path, in_process, capsys):
    outliermerge.run(llama(), output=tmp_path / "out")
    with (tmp_path / "out" / "config.json").open("a") as file:
        file.write("x")
    assert cli.main(["verify", str(tmp_path / "out"), "--load"]) == 1
    said = capsys.readouterr().out
    assert "file config.json: its contents changed" in said and "Extra data" in said
