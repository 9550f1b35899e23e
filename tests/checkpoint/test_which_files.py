"""Which of a model's files are read: what from_pretrained takes; the others are not lost unsaid."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import save_lora, save_tensors, small_unet
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import outliermerge
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.reader import Reader
from outliermerge.errors import OutlierMergeError, SpecError

CPU = {"device": "cpu", "memory": "64MB"}
STATE = {"w": torch.arange(6.0).view(2, 3)}


def _read(folder: Path) -> dict[str, torch.Tensor]:
    tensors = open_checkpoint(folder).tensors
    with Reader() as reader:
        return {
            name: reader.values(source, 0, source.num_elements).view(source.shape)
            for name, source in tensors.items()
        }


def _assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


# What from_pretrained takes, of every combination of files that it knows.


def _store(folder: Path, state: dict, stem: str, suffix: str, *, sharded: bool) -> None:
    def save(part: dict, name: str) -> None:
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})

    if not sharded:
        save(state, f"{stem}.{suffix}")
        return
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        save({name: state[name] for name in part}, file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


TRANSFORMERS_KINDS = {
    "single": ("model", "safetensors", False),
    "index": ("model", "safetensors", True),
    "single bin": ("pytorch_model", "bin", False),
    "index bin": ("pytorch_model", "bin", True),
    "variant": ("model.fp16", "safetensors", False),
    "named": ("chosen", "safetensors", False),
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The smallest model, and the folder of its config."""
    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=4,
        max_position_embeddings=4,
        architectures=["BertModel"],
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    config.save_pretrained(home := tmp_path_factory.mktemp("bert"))
    return home / "config.json", {name: t.clone() for name, t in model.state_dict().items()}


def _moved(state: dict, by: float) -> dict[str, torch.Tensor]:
    return {name: t + by if t.is_floating_point() else t for name, t in state.items()}


@pytest.mark.parametrize("named", [False, True], ids=["", "with transformers_weights"])
def test_what_transformers_takes_of_every_combination_is_read(named, bert, tmp_path):
    config, state = bert
    told = json.loads(config.read_text())
    if named:
        told["transformers_weights"] = "chosen.safetensors"
    kinds = list(TRANSFORMERS_KINDS)[: None if named else -1]
    for present in itertools.product([False, True], repeat=len(kinds)):
        chosen = [kind for kind, there in zip(kinds, present, strict=True) if there]
        folder = tmp_path / ("-".join(chosen).replace(" ", "_") or "none")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(told))
        for number, kind in enumerate(chosen):
            stem, suffix, sharded = TRANSFORMERS_KINDS[kind]
            _store(folder, _moved(state, number), stem, suffix, sharded=sharded)
        try:
            wanted = transformers.AutoModel.from_pretrained(folder).state_dict()
        except OSError:
            if chosen == ["variant"] and not named:
                _assert_same(_read(folder), state)
            else:
                with pytest.raises(OutlierMergeError):
                    open_checkpoint(folder)
        else:
            _assert_same(_read(folder), wanted)
            [*notes] = open_checkpoint(folder).notes
            assert (len(chosen) > 1) == any("passed over" in note for note in notes), chosen
        shutil.rmtree(folder)


DIFFUSERS_KINDS = {
    "single": ("diffusion_pytorch_model", "safetensors", False),
    "index": ("diffusion_pytorch_model", "safetensors", True),
    "single bin": ("diffusion_pytorch_model", "bin", False),
    "variant": ("diffusion_pytorch_model.fp16", "safetensors", False),
    "transformers": ("model", "safetensors", False),
}


def test_what_diffusers_takes_of_every_combination_is_read(tmp_path):
    logging.disable(logging.WARNING)
    import diffusers

    unet = small_unet()
    unet.save_config(tmp_path)
    state = {name: t.clone() for name, t in unet.state_dict().items()}
    num_loaded = 0
    for present in itertools.product([False, True], repeat=len(DIFFUSERS_KINDS)):
        chosen = [kind for kind, there in zip(DIFFUSERS_KINDS, present, strict=True) if there]
        folder = tmp_path / ("-".join(chosen).replace(" ", "_") or "none")
        folder.mkdir()
        shutil.copy(tmp_path / "config.json", folder)
        for number, kind in enumerate(chosen):
            stem, suffix, sharded = DIFFUSERS_KINDS[kind]
            _store(folder, _moved(state, number), stem, suffix, sharded=sharded)
        try:
            loaded = diffusers.UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
        except OSError:
            continue
        _assert_same(_read(folder), loaded.state_dict())
        num_loaded += 1
    logging.disable(logging.NOTSET)
    assert num_loaded == 28  # of 32: not where there is none, or only files that it never takes


def test_shards_without_an_index_are_read_only_where_nothing_else_is(bert, tmp_path):
    config, state = bert
    shutil.copy(config, tmp_path)
    _store(tmp_path, state, "model", "safetensors", sharded=True)
    (tmp_path / "model.safetensors.index.json").unlink()
    _assert_same(_read(tmp_path), state)

    torch.save(_moved(state, 1), tmp_path / "pytorch_model.bin")
    wanted = transformers.AutoModel.from_pretrained(tmp_path).state_dict()
    _assert_same(_read(tmp_path), wanted)
    assert torch.equal(wanted["pooler.dense.bias"], state["pooler.dense.bias"] + 1)


@pytest.mark.parametrize("name", ["cls.weight", "mtp.fc.weight", "encoder.layer.7.norm.weight"])
def test_an_index_that_lists_what_no_shard_holds_is_read_as_transformers_reads_it(
    name, bert, tmp_path
):
    config, state = bert
    shutil.copy(config, tmp_path)
    _store(tmp_path, state, "model", "safetensors", sharded=True)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))

    wanted = transformers.AutoModel.from_pretrained(tmp_path).state_dict()
    _assert_same(_read(tmp_path), wanted)
    [note] = open_checkpoint(tmp_path).notes
    assert name in note


def test_a_hole_among_the_layers_that_an_index_lists_is_refused(tmp_path):
    state = {
        f"layers.{number}.{part}.weight": torch.ones(2) for number in range(3) for part in "ab"
    }
    _store(tmp_path, state, "model", "safetensors", sharded=True)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("layers.1.b.weight", "layers.2.a.weight"):
        file = tmp_path / index["weight_map"][name]
        held = load_file(file)
        del held[name]
        save_file(held, file)

    with pytest.raises(OutlierMergeError, match=r"layers\.1\.b\.weight") as caught:
        open_checkpoint(tmp_path)
    assert "layers.2.a.weight" in str(caught.value)


def test_weights_of_two_loaders_are_refused_where_no_config_tells(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    save_file(STATE, tmp_path / "diffusion_pytorch_model.safetensors")

    with pytest.raises(OutlierMergeError, match="does not tell which loads it"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "said", [3, "x.bin", "gone.safetensors", "../x.safetensors"], ids=["no", "bin", "gone", "out"]
)
def test_a_config_that_names_weights_wrongly_is_refused(said, tmp_path):
    save_tensors(tmp_path, STATE)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": said}))

    with pytest.raises(OutlierMergeError, match="transformers_weights") as caught:
        open_checkpoint(tmp_path)
    assert "Move" not in str(caught.value)


def test_an_output_does_not_name_the_file_that_its_base_named(tmp_path):
    save_tensors(tmp_path / "m", STATE)
    save_file(_moved(STATE, 1), tmp_path / "m" / "other.safetensors")
    config = {"model_type": "test", "transformers_weights": "other.safetensors"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))

    plan = outliermerge.plan(_passthrough(tmp_path / "m"))
    outliermerge.run(plan, output=tmp_path / "out", **CPU)

    assert any("do not know the key" in note for note in plan.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "test"}
    _assert_same(_read(tmp_path / "out"), _moved(STATE, 1))


def test_a_distributed_checkpoint_is_refused(tmp_path):
    save_tensors(tmp_path, STATE)
    save_file(STATE, tmp_path / "shard-00001-model-00001-of-00001.safetensors")

    with pytest.raises(OutlierMergeError, match="distributed checkpoint"):
        open_checkpoint(tmp_path)


# Files of tensors beside the weights.


def _passthrough(model: Path, **more: object) -> dict:
    return {"merge_method": "passthrough", "models": [{"model": str(model)}], **more}


def _delta(base: Path, task: Path, **more: object) -> dict:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(task)}],
        **more,
    }


def _put(path: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write a file of tensors, of others than those of the model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = state or {"other": torch.ones(2)}
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix in (".bin", ".pt", ".pth"):
        torch.save(state, path)
    else:
        path.write_bytes(b"\x80weights")


OTHERS = (
    "non_lora_state_dict.bin",
    "non_lora_trainables.bin",
    "new_embeddings.safetensors",
    "value_head.bin",
    "v_head.safetensors",
    "mm_projector.bin",
    "2_Dense/model.safetensors",
    "2_Dense/pytorch_model.bin",
    "classifier.pt",
    "head.pth",
    "ema/deep/model.safetensors",
    "lora/adapter_model.safetensors",
    "model_head.pkl",
    "prompts.npz",
    "pruned.safetensors",
)


@pytest.fixture
def pair(tmp_path):
    save_tensors(tmp_path / "base", STATE)
    save_tensors(tmp_path / "task", _moved(STATE, 1))
    return tmp_path / "base", tmp_path / "task"


@pytest.mark.parametrize("which", ["base", "task"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_tensors_that_is_not_read_is_refused_or_left_by_word(name, which, pair, tmp_path):
    _put(tmp_path / which / name)
    (tmp_path / which / name).with_name("beside.json").write_text("{}")

    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(_delta(*pair))
    assert f"  {name}: in {tmp_path / which}\n" in str(caught.value)
    assert "`other_files: drop`" in str(caught.value)

    for word in ("drop", [{"filter": Path(name).name, "value": "drop"}, {"value": "error"}]):
        plan = outliermerge.plan(_delta(*pair, other_files=word))
        assert any(name in note for note in plan.notes)
        # What lies in another model's subfolder is left with it.
        carried = {sidecar.name for sidecar in plan.sidecars}
        assert carried <= {"config.json", "beside.json"}

    with pytest.raises(OutlierMergeError, match="not read"):
        outliermerge.plan(_delta(*pair, other_files="error"))
    with pytest.raises(SpecError, match="file of tensors"):
        outliermerge.plan(_delta(*pair, other_files={"filter": "nowhere", "value": "drop"}))


LORA = {"l.lora_A.weight": torch.ones(1, 3), "l.lora_B.weight": torch.ones(2, 1)}


@pytest.mark.parametrize("name", ["new_embeddings.safetensors", "non_lora_state_dict.bin", "x.pt"])
def test_a_file_of_tensors_beside_an_adapter_is_refused_or_left_by_word(name, pair, tmp_path):
    adapter = save_lora(tmp_path / "adapter", LORA)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    base = save_tensors(tmp_path / "b", {"l.weight": torch.zeros(2, 3)})
    assert any(
        "adapter_model.bin" in note for note in outliermerge.plan(_delta(base, adapter)).notes
    )
    _put(adapter / name)

    with pytest.raises(OutlierMergeError, match=name):
        outliermerge.plan(_delta(base, adapter))
    plan = outliermerge.plan(_delta(base, adapter, other_files="drop"))
    assert any(name in note for note in plan.notes)


def test_a_value_head_beside_the_base_of_an_adapter_counts_too(pair, tmp_path):
    adapter = save_lora(tmp_path / "adapter", LORA)
    base = save_tensors(tmp_path / "b", {"l.weight": torch.zeros(2, 3)})
    _put(base / "v_head.bin")

    with pytest.raises(OutlierMergeError, match=r"v_head\.bin"):
        outliermerge.plan(_passthrough(f"{base}+{adapter}"))


# What holds again what is read, and what holds no weights.


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod.", "ema."])
@pytest.mark.parametrize("name", ["pruned.safetensors", "mm_projector.bin", "ema/model.pt"])
def test_a_file_of_what_is_read_is_a_copy_and_noted(name, prefix, pair, tmp_path):
    task = save_tensors(tmp_path / "t", {"model.a.w": torch.ones(2), "b": torch.ones(3)})
    _put(task / name, {f"{prefix}a.w": torch.zeros(2)})

    plan = outliermerge.plan(_passthrough(task))

    assert any("copies or other states" in note and name in note for note in plan.notes)
    _put(task / name, {f"{prefix}a.w": torch.zeros(3)})
    with pytest.raises(OutlierMergeError, match=name):
        outliermerge.plan(_passthrough(task))


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "lora/adapter_model.safetensors"])
def test_what_is_trained_beside_the_weights_is_no_copy_of_them(name, pair):
    _put(pair[1] / name, STATE)

    with pytest.raises(OutlierMergeError, match=name):
        outliermerge.plan(_delta(*pair))


def test_a_whole_model_under_other_names_is_a_copy(tmp_path):
    state = {f"w{number}": torch.ones(number + 1, 4) for number in range(10)}
    task = save_tensors(tmp_path / "t", state)
    original = {f"original.{name}": tensor for name, tensor in state.items()}
    torch.save(original, task / "sam2_large.pt")

    assert any("sam2_large.pt" in note for note in outliermerge.plan(_passthrough(task)).notes)

    save_file(dict([*original.items()][:8]), task / "half.safetensors")
    with pytest.raises(OutlierMergeError, match=r"half\.safetensors"):
        outliermerge.plan(_passthrough(task))


@pytest.mark.parametrize("name", ["mm_projector.bin", "value_head.bin", "2_Dense/model.bin"])
def test_of_a_file_that_is_not_fetched_the_name_decides(name, monkeypatch, tmp_path):
    state = {"model.mm_projector.0.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
    task = save_tensors(tmp_path / "t", state)
    monkeypatch.setattr("outliermerge.checkpoint.folders.beside.listed_files", lambda root: [name])

    if name == "mm_projector.bin":
        assert any(name in note for note in outliermerge.plan(_passthrough(task)).notes)
    else:
        with pytest.raises(OutlierMergeError, match=name):
            outliermerge.plan(_passthrough(task))


def test_data_beside_the_weights_refuses_nothing_and_is_noted(pair):
    names = (
        "voices/af.pt",
        "speaker_embeddings/v2/en_speaker_0_coarse_prompt.npy",
        "assets/sample.npz",
        "tokenizer.pkl",
        "spk2info.pt",
        "mel_filters.npz",
    )
    for name in names:
        _put(pair[0] / name)

    [note] = [n for n in outliermerge.plan(_delta(*pair)).notes if "samples and tables" in n]

    for told in ("voices/", "speaker_embeddings/", "assets/", "tokenizer.pkl", "spk2info.pt"):
        assert f"  {told}\n" in f"{note}\n"


@pytest.mark.parametrize(
    ("name", "is_read"),
    [
        ("v1-5-pruned-emaonly.safetensors", True),
        ("v1-5-pruned.ckpt", True),
        ("learned_embeds.safetensors", True),
        ("vae_1_0/diffusion_pytorch_model.safetensors", True),
        ("text_encoders/clip_g.safetensors", True),
        ("pytorch_lora_weights.safetensors", False),
        ("lora/adapter_model.safetensors", False),
        ("unet/extra.safetensors", False),
    ],
)
def test_beside_a_pipeline_s_components_only_what_was_trained_is_refused(name, is_read, tmp_path):
    root = tmp_path / "pipeline"
    (root / "unet").mkdir(parents=True)
    save_file(STATE, root / "unet" / "diffusion_pytorch_model.safetensors")
    (root / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (root / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    _put(root / name)

    if is_read:
        assert any(name in note for note in outliermerge.plan(_passthrough(root)).notes)
    else:
        with pytest.raises(OutlierMergeError, match=name):
            outliermerge.plan(_passthrough(root))


def test_other_names_of_what_is_read_are_no_other_files(pair):
    (pair[0] / "again").symlink_to(".")
    (pair[0] / "pruned.safetensors").symlink_to("model.safetensors")

    outliermerge.plan(_delta(*pair))


NOT_WEIGHTS = (
    "checkpoint-500/model.safetensors",
    "checkpoint-500/optimizer.pt",
    "checkpoint-500/config.json",
    "checkpoint_2/pytorch_model.bin",
    "global_step10/mp_rank_00_model_states.pt",
    "zero_to_fp32.py",
    "latest",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "random_states_0.pkl",
    "lr_scheduler.pt",
    "fp16/model.safetensors",
    "torchscript/model.pt",
    "grad_scaler.pt",
    "optim.pt",
    "trainer_args.bin",
    "float32.mlpackage/Data/weights/weight.pt",
    "trainer_state.json",
    "training_args.bin",
    "all_results.json",
    "train_results.json",
    "runs/Jan01/events.out.tfevents.1.host.2.0",
    "runs/config.json",
    "wandb/settings.json",
    "events.out.tfevents.1",
    ".ipynb_checkpoints/config-checkpoint.json",
    ".ipynb_checkpoints/model.safetensors",
    "onnx/model.onnx",
    "onnx/config.json",
    "onnx/decoder.pt",
    "openvino/openvino_model.bin",
    "openvino/config.json",
    "openvino_model.bin",
    "original/consolidated.00.pth",
    "original/params.json",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "tf_model.h5",
    "flax_model.msgpack",
    "model.Q4_K_M.gguf",
    "rust_model.ot",
    "open_clip_pytorch_model.bin",
)


@pytest.mark.parametrize("which", ["base", "task"])
def test_leavings_of_training_and_copies_stay_behind_and_refuse_nothing(which, pair, tmp_path):
    for name in NOT_WEIGHTS:
        _put(tmp_path / which / name)
    (tmp_path / which / "notes.bin").write_bytes(b"no tensors")

    plan = outliermerge.plan(_delta(*pair))

    assert [sidecar.name for sidecar in plan.sidecars] == ["config.json"]
    [note] = [note for note in plan.notes if "not read" in note]
    for told in (
        "checkpoint-500/",
        "onnx/",
        "original/",
        "consolidated.safetensors",
        "tf_model.h5",
    ):
        assert f"  {told}\n" in f"{note}\n"
    assert "optimizer" not in note
    _assert_same(_read(tmp_path / which), _moved(STATE, which == "task"))


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_each_of_them_alone_does_so_too(name, pair):
    _put(pair[0] / name)
    plan = outliermerge.plan(_delta(*pair))
    assert [sidecar.name for sidecar in plan.sidecars] == ["config.json"]


# SentenceTransformers, whose modules have weights of their own.


def _sentence_transformer(
    root: Path, k: float, *, layout: str = "", dense: str | None = "model.safetensors"
) -> dict[str, torch.Tensor]:
    """Save one as sentence-transformers does, and return its tensors as a merge names them."""
    modules = [(layout, "Transformer"), ("1_Pooling", "Pooling")]
    modules += [("2_Dense", "Dense"), ("3_LayerNorm", "LayerNorm")] if dense else []
    modules += [("4_Normalize", "Normalize")]  # its folder is empty, so that git drops it
    root.mkdir()
    described = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (root / "modules.json").write_text(json.dumps(described))
    (root / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    save_tensors(root / layout, _moved(STATE, k))
    (root / "1_Pooling").mkdir()
    (root / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    prefix = f"{layout}/" if layout else ""
    tensors = {f"{prefix}w": STATE["w"] + k}
    if dense:
        generator = torch.Generator().manual_seed(int(k * 10))
        weights = {
            "2_Dense": {"linear.weight": torch.randn(4, 3, generator=generator)},
            "3_LayerNorm": {"norm.weight": torch.randn(4, generator=generator)},
        }
        for folder, state in weights.items():
            (root / folder).mkdir()
            (root / folder / "config.json").write_text('{"in_features": 3}')
            if dense.endswith(".bin"):
                torch.save(state, root / folder / dense)
            else:
                save_file(state, root / folder / dense)
            tensors |= {f"{folder}/{name}": t for name, t in state.items()}
    return tensors


@pytest.mark.parametrize("layout", ["", "0_Transformer"])
@pytest.mark.parametrize(
    "files",
    [
        ("model.safetensors", "pytorch_model.bin"),
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.bin", "pytorch_model.bin"),
    ],
    ids=["bin in a task", "bin in the base", "bin in both"],
)
def test_the_modules_of_a_sentence_transformer_are_merged(layout, files, tmp_path):
    a = _sentence_transformer(tmp_path / "a", 0.0, layout=layout, dense=files[0])
    b = _sentence_transformer(tmp_path / "b", 1.0, layout=layout, dense=files[1])
    spec = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / name)} for name in "ab"],
    }

    output = outliermerge.run(spec, output=tmp_path / "out", **CPU).output

    _assert_same(_read(output), {name: (a[name] + b[name]) / 2 for name in a})
    assert outliermerge.verify(output) == []
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    prefix = f"{layout}/" if layout else ""
    assert found == {
        "README.md",
        "recipe.yaml",
        "outliermerge.json",
        "modules.json",
        "sentence_bert_config.json",
        f"{prefix}config.json",
        f"{prefix}model.safetensors",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "3_LayerNorm/config.json",
        "3_LayerNorm/model.safetensors",
    }
    stored = load_file(output / "2_Dense" / "model.safetensors")
    assert set(stored) == {"linear.weight"}


def test_modules_are_not_sharded_as_their_loader_knows_no_shards(tmp_path):
    for name in "ab":
        _sentence_transformer(tmp_path / name, 0.5)
        state = {f"linear.{number}": torch.ones(64) for number in range(3)}
        save_file(state, tmp_path / name / "2_Dense" / "model.safetensors")
        save_file(state, tmp_path / name / "model.safetensors")

    spec = _delta(tmp_path / "a", tmp_path / "b")
    output = outliermerge.run(spec, output=tmp_path / "out", shard_size="256", **CPU).output

    assert [path.name for path in output.glob("2_Dense/*.safetensors")] == ["model.safetensors"]
    assert len([*output.glob("*.safetensors")]) == 3


@pytest.mark.parametrize("without", ["base", "task"])
@pytest.mark.parametrize("extra", [None, "copy"])
def test_a_module_that_one_model_lacks_is_refused(without, extra, tmp_path):
    for name in ("base", "task"):
        dense = None if name == without else "model.safetensors"
        _sentence_transformer(tmp_path / name, 0.5, dense=dense)
    more = {"extra": extra} if extra else {}

    with pytest.raises(OutlierMergeError, match=r"2_Dense/linear\.weight"):
        outliermerge.plan(_delta(tmp_path / "base", tmp_path / "task", **more))


@pytest.mark.parametrize("folder", ["1_Pooling", "2_Dense"])
def test_modules_of_another_config_are_told(folder, tmp_path):
    for name in ("base", "task"):
        _sentence_transformer(tmp_path / name, 0.5)
    spec = _delta(tmp_path / "base", tmp_path / "task")
    assert outliermerge.plan(spec).notes == ()
    (tmp_path / "task" / folder / "config.json").write_text('{"pooling_mode_cls_token": true}')

    [note] = outliermerge.plan(spec).notes

    assert "pooling_mode_cls_token" in note and str(tmp_path / "base" / folder) in note


def test_a_tokenizer_in_a_part_that_is_another_is_told(tmp_path):
    for name in ("base", "task"):
        _sentence_transformer(tmp_path / name, 0.5, layout="0_Transformer")
        (tmp_path / name / "0_Transformer" / "vocab.txt").write_text(f"a\n{name}\n")

    [note] = outliermerge.plan(_delta(tmp_path / "base", tmp_path / "task")).notes

    assert "the tokenizer in 0_Transformer/ of" in note


@pytest.mark.parametrize("path", ["../other", "/etc", "a/b", 3, None])
def test_a_modules_json_cannot_lead_out_of_the_folder(path, tmp_path):
    save_tensors(tmp_path / "other", STATE)
    save_tensors(tmp_path / "m", STATE)
    (tmp_path / "m" / "modules.json").write_text(json.dumps([{"path": path}, "x"]))

    _assert_same(_read(tmp_path / "m"), STATE)


# What headers say beside the tensors.

TRUE = {
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.prediction_type": "v",
    "ss_network_dim": "16",
    "ss_new_sd_model_hash": "ab",
    "config": '{"transformer": {"num_layers": 2}}',
    "author": "é",
}
UNTRUE = {
    "modelspec.hash_sha256": "0xab",
    "sshs_model_hash": "cd",
    "sshs_legacy_hash": "ef",
    "_quantization_metadata": '{"layers": {}}',
    "modelspec.dtype": "float8_e4m3fn",
    "modelspec.precision": "fp16",
    "settings": '{"quantization_config": {"bits": 4}}',
    "modelspec.thumbnail": "x" * 2**21,
}


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "folder"])
def test_what_a_header_says_is_kept_where_it_stays_true(as_file, tmp_path):
    paths = []
    for name in "ab":
        folder = save_tensors(tmp_path / name, STATE)
        save_file(STATE, folder / "model.safetensors", metadata={"format": "pt"} | TRUE | UNTRUE)
        paths.append(folder / "model.safetensors" if as_file else folder)
    output = tmp_path / ("out.safetensors" if as_file else "out")

    plan = outliermerge.plan(_delta(*paths))
    outliermerge.run(plan, output=output, **CPU)

    file = output if as_file else output / "model.safetensors"
    assert _metadata(file) == {"format": "pt"} | TRUE
    assert file.stat().st_size < 2**17
    assert outliermerge.verify(output) == []
    told = "\n".join(plan.notes)
    assert "modelspec.architecture" in told
    assert "_quantization_metadata" in told
    again = outliermerge.plan(_delta(*paths))
    assert [shard.header for shard in again.shards] == [shard.header for shard in plan.shards]


@pytest.mark.parametrize("name", UNTRUE)
def test_each_of_what_is_not_true_of_the_output_is_named(name, tmp_path):
    for folder in "ab":
        save_tensors(tmp_path / folder, STATE)
    save_file(STATE, tmp_path / "a" / "model.safetensors", metadata={name: UNTRUE[name]})

    plan = outliermerge.plan(_delta(tmp_path / "a", tmp_path / "b"))

    assert any(name in note and "left out" in note for note in plan.notes)


def test_shards_say_what_any_of_the_base_s_say(tmp_path):
    state = {f"w{number}": torch.ones(64) for number in range(4)}
    for folder in "ab":
        (tmp_path / folder).mkdir()
        _store(tmp_path / folder, state, "model", "safetensors", sharded=True)
        (tmp_path / folder / "config.json").write_text("{}")
    file = tmp_path / "a" / "model-00002-of-00002.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "author": "x"})

    spec = _delta(tmp_path / "a", tmp_path / "b")
    outliermerge.run(spec, output=tmp_path / "out", shard_size="512", **CPU)

    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [_metadata(file) for file in files] == [{"format": "pt", "author": "x"}] * len(files)
    assert len(files) == 2


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        (("epsilon", "v"), "'epsilon' in A, 'v' in B"),
        ((None, "v"), "nothing in A, 'v' in B"),
        (("v", None), "'v' in A, nothing in B"),
        (("v", "v"), None),
    ],
)
def test_headers_that_say_that_the_models_differ_are_noted(kinds, told, tmp_path):
    paths = {name: tmp_path / f"{name}.safetensors" for name in "AB"}
    for path, kind in zip(paths.values(), kinds, strict=True):
        metadata = {"modelspec.prediction_type": kind} if kind else {"author": "x"}
        save_file(STATE, path, metadata=metadata)

    notes = "\n".join(outliermerge.plan(_delta(*paths.values())).notes)

    for name, path in paths.items():
        notes = notes.replace(str(path), name)
    assert (f"modelspec.prediction_type: {told}" in notes) == (told is not None)


def test_metadata_that_is_no_unicode_is_left_out(tmp_path):
    """The json of a header may hold halves of characters, which no file can."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": {"half": "\ud800", "whole": "x"}, "w": entry}).encode()
    for name in "ab":
        raw = len(header).to_bytes(8, "little") + header + bytes(4)
        (tmp_path / f"{name}.safetensors").write_bytes(raw)

    spec = _delta(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    plan = outliermerge.plan(spec)
    outliermerge.run(plan, output=tmp_path / "out.safetensors", **CPU)

    assert _metadata(tmp_path / "out.safetensors") == {"format": "pt", "whole": "x"}
    assert any("half" in note and "left out" in note for note in plan.notes)
