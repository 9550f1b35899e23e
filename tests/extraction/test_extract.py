"""Adapters made of models: peft gives their answers, and reading them back gives their tensors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted import MODELS, llama
from checkpoints import load_folder, save_tensors
from safetensors.torch import load_file, save_file

import outliermerge
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Source
from outliermerge.cli.main import main
from outliermerge.errors import ArgumentError, OutlierMergeError
from outliermerge.extraction.report import Extraction
from outliermerge.planning.inputs import open_model
from outliermerge.spec.rename import Rename

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama factored": {"factor_embeddings": True},
    "llama tied": {},
    "llama tied factored": {"factor_embeddings": True},
    "gpt2": {},
    "gpt2 factored": {"factor_embeddings": True},
    "bert": {},
    "bert factored": {"factor_embeddings": True},
    "resnet": {},
}


def make(name: str) -> transformers.PreTrainedModel:
    kind = name.split()[0]
    return llama("tied" in name) if kind == "llama" else MODELS[kind]()


def tuned(name: str, folder: Path, seed: int = 1) -> transformers.PreTrainedModel:
    """Save a base and a model of a low-rank change and some noise; return the model."""
    base, model = make(name), make(name)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        rows, columns = parameter.shape[0], parameter.numel() // parameter.shape[0]
        if parameter.ndim > 1:
            low_rank = torch.randn(rows, 3) @ torch.randn(3, columns)
            parameter.data += 0.1 * low_rank.view(parameter.shape)
        parameter.data += 1e-3 * torch.randn_like(parameter)
    base.save_pretrained(folder / "base")
    model.save_pretrained(folder / "tuned")
    return model


def answers(model: Any) -> torch.Tensor:
    torch.manual_seed(2)
    given = torch.randint(0, 80, (2, 7))
    if "ResNet" in type(getattr(model, "base_model", model)).__name__ or hasattr(model, "resnet"):
        given = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(given).logits
    return logits


def in_peft(name: str, folder: Path) -> Any:
    """Load the base with the adapter; a missing or superfluous tensor is an error."""
    base = type(make(name)).from_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`|`is_gradient")
        loaded = peft.PeftModel.from_pretrained(base, folder / "adapter")
        found = loaded.load_adapter(folder / "adapter", "default")
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if "lora_" in key or "modules_to_save" in key]
    return loaded


def read(reader: Reader, source: Source) -> torch.Tensor:
    return reader.values(source, 0, source.num_elements).view(source.shape).double()


def check_read_back(made: Extraction, folder: Path, name: str = "adapter") -> None:
    """Compare what a merge reads of the adapter with the model, within the stated errors."""
    base = open_model(str(folder / "base"), Rename(), "base", None)
    adapted = open_model(str(folder / name), Rename(), "model", base).checkpoint.tensors
    model = open_model(str(folder / "tuned"), Rename(), "model", None).checkpoint.tensors
    stated = {tensor.name: tensor for tensor in made.tensors}
    with Reader() as reader:
        for key, source in model.items():
            if key not in adapted:
                continue  # a head that is tied
            ours, theirs = read(reader, adapted[key]), read(reader, source)
            lost = float((ours - theirs).norm())
            rounding = 1e-6 * float(theirs.norm())  # float32's, of W + BA
            allowed = stated[key].norm * stated[key].error if key in stated else 0.0
            assert lost <= allowed + rounding, key


@pytest.mark.parametrize("name", CASES)
def test_peft_gives_the_answers_of_the_model(name: str, tmp_path: Path) -> None:
    model = tuned(name, tmp_path)
    made = outliermerge.extract(
        tmp_path / "tuned",
        base=tmp_path / "base",
        output=tmp_path / "adapter",
        rank=80,
        **CASES[name],
    )
    assert made.error < 1e-6
    before = answers(type(model).from_pretrained(tmp_path / "base"))
    expected, found = answers(model), answers(in_peft(name, tmp_path))
    assert float((before - expected).abs().max()) > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    check_read_back(made, tmp_path)
    factored = {tensor.how for tensor in made.tensors}
    assert ("embedding" in factored) == ("factored" in name and "gpt2" not in name)
    assert ("transposed" in factored) == ("gpt2" in name)
    assert ("convolution" in factored) == ("resnet" in name)


@pytest.mark.parametrize(
    "asked",
    [{"rank": 3}, {"energy": 0.99}, {"error": 0.05}, {"error": 0.05, "dtype": "bfloat16"},
     {"energy": 0.9999, "rank": 8}, {"rank": 3, "randomized": True, "dtype": "float16"}],
    ids=str,
)  # fmt: skip
def test_what_is_lost_is_what_is_stated(asked: dict[str, Any], tmp_path: Path) -> None:
    tuned("llama", tmp_path)
    made = outliermerge.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "adapter", **asked
    )
    assert load_file(tmp_path / "adapter/adapter_model.safetensors")
    in_peft("llama", tmp_path)
    check_read_back(made, tmp_path)
    base, model = load_folder(tmp_path / "base"), load_folder(tmp_path / "tuned")
    factored = [tensor for tensor in made.tensors if tensor.rank]
    assert factored
    for tensor in factored:
        change = model[tensor.name].double() - base[tensor.name].double()
        values = torch.linalg.svdvals(change)
        tail = (values.square().flip(0).cumsum(0).flip(0) / values.square().sum()).sqrt().tolist()
        best = [*tail, 0.0][tensor.rank]
        rounding = {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3}[
            asked.get("dtype", "float32")
        ]
        slack = 1.02 if asked.get("randomized") else 1 + 1e-9
        assert best * (1 - 1e-9) <= tensor.error <= best * slack + rounding
        assert tensor.norm == pytest.approx(float(change.norm()))
        if "error" in asked:
            assert tensor.error <= asked["error"] < tail[tensor.rank - 1] + rounding
        elif "energy" in asked:
            least = 1 - asked["energy"]
            assert tensor.rank == asked.get("rank") or best**2 <= least < tail[tensor.rank - 1] ** 2
        else:
            assert tensor.rank == asked["rank"]


@pytest.mark.parametrize("randomized", [False, True])
def test_threads_and_runs_give_the_same_bytes(randomized: bool, tmp_path: Path) -> None:
    tuned("llama", tmp_path)
    files = []
    for threads in (1, 3):
        output = tmp_path / f"adapter-{threads}"
        outliermerge.extract(
            tmp_path / "tuned", base=tmp_path / "base", output=output, rank=4, threads=threads,
            randomized=randomized,
        )  # fmt: skip
        files.append((output / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_matrix_whose_factors_would_be_larger_is_saved_whole(tmp_path: Path) -> None:
    model = tuned("llama", tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    model.state_dict()[name] += torch.randn(32, 32)
    model.save_pretrained(tmp_path / "tuned")
    made = outliermerge.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "adapter", error=0.1
    )
    assert {t.how for t in made.tensors if t.name.endswith("q_proj.weight")} == {"linear", "whole"}
    torch.testing.assert_close(
        answers(in_peft("llama", tmp_path)), answers(model), rtol=0, atol=0.3
    )
    check_read_back(made, tmp_path)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert "model.layers.1.self_attn.q_proj" in config["target_modules"]
    assert "k_proj" in config["target_modules"]


def test_a_model_that_was_trained_in_its_norms_alone(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base.model.layers[1].input_layernorm.weight.data += 0.1
    base.model.layers[0].self_attn.k_proj.bias.data += 0.1
    base.save_pretrained(tmp_path / "tuned")
    made = outliermerge.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "adapter", rank=4
    )
    assert [tensor.how for tensor in made.tensors] == ["bias", "whole"]
    assert torch.equal(answers(in_peft("llama", tmp_path)), answers(base))
    check_read_back(made, tmp_path)


def test_an_adapter_is_made_smaller(tmp_path: Path) -> None:
    tuned("llama", tmp_path)
    big, small = tmp_path / "adapter", tmp_path / "small"
    outliermerge.extract(tmp_path / "tuned", base=tmp_path / "base", output=big, rank=16)
    made = outliermerge.extract(big, base=tmp_path / "base", output=small, rank=3)
    assert {tensor.rank for tensor in made.tensors} == {0, 3}
    check_read_back(
        outliermerge.extract(
            tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "direct", rank=3
        ),
        tmp_path, "small",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["names", pytest.param("norms", marks=pytest.mark.faults)])
def test_the_class_says_which_modules_there_are(kind: str, tmp_path: Path) -> None:
    model = llama()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = base | {"model.norm.weight": base["model.norm.weight"] + 1}
    if kind == "names":
        own, other = "model.layers.0.mlp.up_proj.weight", "model.layers.0.feed.up_proj.weight"
        for tensors in (base, tuned):
            tensors[other] = tensors.pop(own)
        tuned[other] = tuned[other] + 1
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_tensors(tmp_path / name, tensors)
        config = model.config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"]}
        (tmp_path / name / "config.json").write_text(json.dumps(config))

    def extract(**more: bool) -> Extraction:
        return outliermerge.extract(
            tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "adapter", rank=4, **more
        )

    if kind == "names":
        with pytest.raises(OutlierMergeError, match=r"LlamaForCausalLM has no modules(.|\n)*feed"):
            extract(load_check=True)
        assert not (tmp_path / "adapter").exists()
        made = extract()  # which goes on from there
    else:
        made = extract(load_check=True)
    check_read_back(made, tmp_path)


def two(folder: Path, base: dict[str, torch.Tensor], model: dict[str, torch.Tensor]) -> list[str]:
    """Save two models without configs, and return a command that makes an adapter."""
    save_tensors(folder / "base", base)
    save_tensors(folder / "tuned", model)
    names = [str(folder / name) for name in ("tuned", "base", "adapter")]
    return ["extract", names[0], "--base", names[1], "-o", names[2], "--rank", "2"]


PLAIN = {"a.weight": torch.zeros(4, 6), "norm.weight": torch.ones(4)}
CHANGED = {"a.weight": torch.ones(4, 6), "norm.weight": torch.ones(4)}
NOT_HELD: dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], str]] = {
    "parameter of a container": ({"b.d": torch.ones(3), "b.c.weight": torch.ones(2)},
                                 {"b.d": torch.zeros(3), "b.c.weight": torch.ones(2)}, "b.d: is a"),
    "top level": ({"cls_token": torch.ones(1, 3)}, {"cls_token": torch.zeros(1, 3)}, "cls_token"),
    "integers": ({"m.ids": torch.ones(2, dtype=torch.int64)},
                 {"m.ids": torch.zeros(2, dtype=torch.int64)}, "m.ids: is int64"),
    "new": ({}, {"new.weight": torch.ones(2, 2)}, "only"),
    "removed": ({"old.weight": torch.ones(2, 2)}, {}, "only"),
    "resized": ({"c.weight": torch.ones(2, 2)}, {"c.weight": torch.ones(3, 2)}, "[2, 2] in the"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_HELD)
def test_what_no_adapter_can_hold_is_refused_or_listed(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, model, said = NOT_HELD[kind]
    command = two(tmp_path, PLAIN | base, CHANGED | model)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert said in error and "--partial" in error and not (tmp_path / "adapter").exists()
    assert main([*command, "--partial", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["left_out"]) == [
        name for name in {**base, **model} if "c.weight" not in name or kind == "resized"
    ]


def test_a_mask_of_infinities_that_both_models_have_is_no_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = {"attn.mask": torch.tensor([0.0, -torch.inf, torch.inf])}
    command = two(tmp_path, PLAIN | mask, CHANGED | mask)
    assert main([*command, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [tensor["name"] for tensor in made["tensors"]] == ["a.weight"]
    save_tensors(tmp_path / "tuned", CHANGED | {"attn.mask": -mask["attn.mask"]})
    command[command.index("-o") + 1] += "-2"
    assert main(command) == 1
    assert "attn.mask: found values that are infinite" in capsys.readouterr().err


WRONG: dict[str, tuple[list[str], str]] = {
    "no rank": (["--rank"], "--rank"),
    "nothing": ([], "give --rank, --energy or --error"),
    "rank 0": (["--rank", "0"], "at least 1"),
    "energy": (["--energy", "1.5"], "--energy: found 1.5"),
    "error": (["--error", "nan"], "--error: found nan"),
    "two": (["--error", "0.1", "--rank", "2"], "--error: is a bound, and --rank another"),
    "rounding": (["--error", "0.001", "--dtype", "bfloat16"], "--dtype float32"),
    "randomized": (["--energy", "0.9", "--randomized"], "--randomized: needs --rank"),
    "dtype": (["--rank", "2", "--dtype", "float8"], "no dtype of factors"),
    "memory": (["--rank", "2", "--memory", "1KiB"], "--memory: 1,024 B is too little for a.weight"),
    "rename": (["--rank", "2", "--rename", "{"], "is not YAML"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_command_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, said = WRONG[kind]
    assert main([*two(tmp_path, PLAIN, CHANGED)[:-2], *flags]) == 2
    assert said in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a.weight": torch.full((4, 6), torch.nan)}, "a.weight: found values that are infinite"),
        ({"a.weight": torch.full((4, 6), 1e300, dtype=torch.float64)}, "too large to be squared"),
        ({"norm.weight": torch.full((4,), torch.inf)}, "norm.weight: found values that"),
        ({"a.weight": torch.zeros(4, 6)}, "there is nothing to extract"),
    ],
)
def test_models_of_which_nothing_can_be_made(
    change: dict[str, torch.Tensor], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(two(tmp_path, PLAIN, CHANGED | change)) == 1
    assert said in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}


def test_an_output_that_is_taken_and_what_a_killed_run_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = two(tmp_path, PLAIN, CHANGED)
    partial = tmp_path / "adapter.partial"
    partial.mkdir()
    (partial / "adapter_model.safetensors").write_bytes(b"half")
    assert main(command) == 0 and not partial.exists()
    assert main(command) == 1 and "exists already" in capsys.readouterr().err
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    assert main([*command[:4], "-o", str(tmp_path / "adapter"), "--rank", "2"]) == 1
    (tmp_path / "adapter").rename(tmp_path / "other")
    assert main(command) == 1 and "notes.txt" in capsys.readouterr().err
    assert (partial / "notes.txt").exists()


def test_names_that_end_alike(tmp_path: Path) -> None:
    """peft compares the ends of names: nothing of another name may be changed or looked for."""
    names = ["t.norm", "norm", "input_norm", "t.0.q", "0.q", "x.t.0.q"]
    base = {
        f"{name}.weight": torch.ones(4) if "norm" in name else torch.ones(4, 4) for name in names
    }
    model = base | {"norm.weight": torch.zeros(4), "0.q.weight": torch.zeros(4, 4)}
    model["x.t.0.q.weight"] = torch.eye(4)
    save_tensors(tmp_path / "base", base)
    save_tensors(tmp_path / "tuned", model)
    made = outliermerge.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "adapter", rank=4
    )
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["input_norm", "norm", "t.norm"]
    assert config["target_modules"] == ["0.q", "x.t.0.q"]
    assert {tensor.name: tensor.rank for tensor in made.tensors} == {
        "norm.weight": 0, "0.q.weight": 1, "x.t.0.q.weight": 4,
    }  # fmt: skip
    check_read_back(made, tmp_path)


def test_new_rows_of_embeddings_are_saved_whole_with_the_tokenizer(tmp_path: Path) -> None:
    model = tuned("llama", tmp_path)
    model.resize_token_embeddings(84)
    model.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned/tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    made = outliermerge.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "adapter", rank=8
    )
    assert (tmp_path / "adapter/tokenizer.json").exists()
    assert any("resize_token_embeddings" in note for note in made.notes)
    base = type(model).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(84)
    base.save_pretrained(tmp_path / "base")
    torch.testing.assert_close(
        answers(in_peft("llama", tmp_path)), answers(model), atol=0.1, rtol=0
    )


def test_tied_copies_that_differ(tmp_path: Path) -> None:
    tuned("llama tied", tmp_path)
    tensors = load_folder(tmp_path / "tuned")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "tuned/model.safetensors")
    with pytest.raises(OutlierMergeError, match=r"stores lm_head.weight and the embeddings"):
        outliermerge.extract(
            tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "adapter", rank=8
        )


def test_arguments_of_the_function(tmp_path: Path) -> None:
    two(tmp_path, PLAIN, CHANGED)
    with pytest.raises(ArgumentError, match="nothing says how much is kept"):
        outliermerge.extract(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "a")
    with pytest.raises(ArgumentError, match="rank"):
        outliermerge.extract(
            tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "a",
            rank="8",  # type: ignore[arg-type]
        )  # fmt: skip


def test_the_table_and_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned("llama", tmp_path)
    names = [str(tmp_path / name) for name in ("tuned", "base", "adapter")]
    command = ["extract", names[0], "--base", names[1], "-o", names[2], "--energy", "0.99"]
    assert main([*command, "--by", "tensor"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj.weight" in shown and "29 tensors differ" in shown
    report = json.loads((tmp_path / "adapter/extraction.json").read_text())
    assert report["settings"]["energy"] == 0.99 and len(report["tensors"]) == 29
    assert main([*command[:-3], f"{names[2]}2", "--rank", "3"]) == 0
    shown = capsys.readouterr().out
    assert "self_attn.q_proj   " in shown and "factors" in shown
