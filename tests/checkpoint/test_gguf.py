"""GGUF files, made here as llama.cpp makes them: what transformers and the package gguf read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from checkpoints import load_folder
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import read
from stopping import stopping_after
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import outliermerge
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.quantized.opened import dequantize
from outliermerge.checkpoint.reader import Reader
from outliermerge.cli.main import main
from outliermerge.errors import OutlierMergeError

COMMON = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 64,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
          "rope_theta": 5000.0, "tie_word_embeddings": False}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
MODELS = {
    "llama": ("llama", {"head_dim": 64, "attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "qwen3moe": ("qwen3_moe", {"head_dim": 64, **MOE}),
    "qwen2moe": ("qwen2_moe", {"shared_expert_intermediate_size": 256, **MOE}),
    "phi3": ("phi3", {"pad_token_id": 0, "eos_token_id": 2}),
    "gemma2": ("gemma2", {"head_dim": 64, "sliding_window": 32, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"head_dim": 64, "sliding_window": 32, "tie_word_embeddings": True}),
}
# Bytes at which the half-precision scales of a block begin.
SCALES = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,), Kind.Q4_0: (0,), Kind.Q8_0: (0,)}


def blocks(kind: Kind, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return any blocks of a type: all bytes are some codes, only scales have to be numbers."""
    per_block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    count = int(np.prod(shape)) // per_block
    data = generator.integers(0, 256, (count, num_bytes), dtype=np.uint8)
    for place in SCALES[kind]:
        scale = (generator.random(count) / 100 + 0.001).astype(np.float16)
        data[:, place : place + 2] = scale.view(np.uint8).reshape(count, 2)
    return data.reshape(*shape[:-1], -1)


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return queries or keys as llama.cpp stores them, for Meta's rotary embeddings."""
    by_half = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return by_half.swapaxes(1, 2).reshape(weight.shape)


def name_of(arch: str, name: str, tensors: gguf.TensorNameMap) -> str | None:
    stem, end = name.rsplit(".", 1) if name.endswith(("weight", "bias")) else (name, "")
    found = tensors.get_name(stem)
    return found and (f"{found}.{end}" if end else f"{found}.weight")


def write(
    path: Path, arch: str, kinds: dict[str, Kind] | None = None
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a tiny model of random weights as llama.cpp would; return its folder and its tensors.

    Args:
        kinds: by a part of a tensor's name in GGUF the type of its blocks; others are float32.
    """
    torch.manual_seed(0)
    model_type, more = MODELS[arch]
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # norms and biases, too
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(path.parent / f"{path.stem}-plain")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(64)
    writer.add_key_length(64)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_token_list([f"t{n}" for n in range(64)])
    if "moe" in arch:
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(256)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(256)
    if arch.startswith("gemma"):
        writer.add_sliding_window(32)
    number = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    stored: dict[str, np.ndarray] = {}
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, value in state.items():
        array = value.numpy()
        if name.endswith("experts.gate_up_proj"):
            layer = f"blk.{name.split('.')[2]}"
            half = array.shape[1] // 2
            stored[f"{layer}.ffn_gate_exps.weight"] = array[:, :half]
            stored[f"{layer}.ffn_up_exps.weight"] = array[:, half:]
            continue
        new = name_of(arch, name, names)
        assert new, name
        if arch == "llama" and ".attn_q." in new:
            array = turned(array, config.num_attention_heads)
        elif arch == "llama" and ".attn_k." in new:
            array = turned(array, config.num_key_value_heads)
        if arch.startswith("gemma") and new.endswith("norm.weight"):
            array = array + 1
        stored[new] = array[0] if "inp_shexp" in new else array
    for seed, (name, array) in enumerate(stored.items()):
        kind = next((k for part, k in (kinds or {}).items() if part in name), Kind.F32)
        if kind in SCALES and array.ndim > 1:
            writer.add_tensor(name, blocks(kind, array.shape, seed), raw_dtype=kind)
        elif kind in (Kind.F16, Kind.BF16) and array.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.parent / f"{path.stem}-plain", state


MIXED = {"attn_q": Kind.Q4_K, "attn_k": Kind.Q5_K, "attn_v": Kind.Q6_K, "ffn_down": Kind.Q8_0,
         "ffn_gate": Kind.Q4_0, "ffn_up": Kind.Q4_0, "attn_output": Kind.F16,
         "token_embd": Kind.BF16}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_a_file_is_what_transformers_makes_of_it(tmp_path, arch):
    path = tmp_path / "model.gguf"
    folder, plain = write(path, arch, MIXED)
    opened = dequantize(open_checkpoint(path))
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder)
        empty = transformers.AutoModelForCausalLM.from_config(config)
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)
    tensors = {name: value for name, value in theirs["tensors"].items() if name in plain}
    assert opened.tensors.keys() == tensors.keys() == plain.keys()
    for name, source in opened.tensors.items():
        assert (source.shape, source.out_dtype.name) == (plain[name].shape, "bfloat16")
        assert torch.equal(read(source).float(), tensors[name].float()), name
        if not any(part in name for part in ("_proj", "embed", "gate")):
            torch.testing.assert_close(read(source), plain[name], rtol=0, atol=2e-7)

    spec = {"merge_method": "linear", "models": [{"model": str(path)}, {"model": str(folder)}]}
    output = outliermerge.run(spec, output=tmp_path / "out").output
    found = json.loads((output / "config.json").read_text())
    theirs["config"].pop("_model_name_or_path", None)
    assert {key: found.get(key) for key in theirs["config"]} == theirs["config"]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        output, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        if name in plain:
            mean = (plain[name].double() + tensors[name].double()) / 2
            torch.testing.assert_close(value.double(), mean, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "qwen3moe", "gemma3"])
def test_a_file_of_floats_gives_the_model_back(tmp_path, arch):
    _, plain = write(tmp_path / "model.gguf", arch)
    whole = dequantize(open_checkpoint(tmp_path / "model.gguf"))
    assert whole.tensors.keys() == plain.keys()
    for name, source in whole.tensors.items():
        is_moved = arch.startswith("gemma") and "norm" in name  # by one, and back
        torch.testing.assert_close(read(source), plain[name], rtol=0, atol=2e-7 * is_moved)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(path, "llama", MIXED)
    return path


@pytest.mark.parametrize("base", ["plain", "gguf"])
def test_a_merge_by_the_command_line_goes_on_after_a_stop(tiny, tmp_path, base, monkeypatch):
    plain, task = str(tiny.parent / "model-plain"), str(tiny)
    models = {"plain": (plain, task), "gguf": (task, plain)}[base]
    spec = tmp_path / "merge.yaml"
    spec.write_text(
        f"merge_method: task_arithmetic\nbase_model: {models[0]}\nmodels:\n"
        f"  - model: {models[1]}\nparameters:\n  weight: 0.5\nout_dtype: float32\n"
    )
    assert main(["run", str(spec), "--output", str(tmp_path / "whole")]) == 0
    arguments = ["run", str(spec), "--output", str(tmp_path / "out"), "--threads", "1"]
    with stopping_after(monkeypatch, 5):
        assert main(arguments) != 0
    assert main(arguments) == 0
    found, expected = load_folder(tmp_path / "out"), load_folder(tmp_path / "whole")
    theirs, ours = load_folder(Path(plain)), dequantize(open_checkpoint(tiny)).tensors
    assert found.keys() == expected.keys() == theirs.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name])
        mean = (theirs[name].double() + read(ours[name]).double()) / 2
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_values_do_not_depend_on_how_they_are_read(tiny, data):
    tensors = dequantize(open_checkpoint(tiny)).tensors
    source = tensors[data.draw(st.sampled_from(sorted(tensors)))]
    start = data.draw(st.integers(0, source.num_elements))
    stop = data.draw(st.integers(start, source.num_elements))
    with Reader() as reader:
        assert torch.equal(reader.values(source, start, stop), read(source).flatten()[start:stop])


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, magic=b"GGUF", version=3, tensors=(), values=(), counts=None) -> bytes:
    num_tensors, num_values = counts or (len(tensors), len(values))
    raw = magic + struct.pack("<IQQ", version, num_tensors, num_values)
    for key, kind, value in values:
        raw += text(key) + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        raw += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return raw + bytes(-len(raw) % 32)


LLAMA = ("general.architecture", 8, text("llama"))
MOE_ARCH = ("general.architecture", 8, text("qwen3moe"))
NORM = ("output_norm.weight", (8,), 0, 0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "truncated: it ends within its header"),
        (header(magic=b"GGML"), "not a GGUF file: it begins with b'GGML'"),
        (header(version=1), "GGUF of version 1, which cannot be read"),
        (header(version=1 << 24 | 0), "GGUF of version 16777216"),
        (header(version=3 << 24), "GGUF big-endian, which cannot be read"),
        (header(counts=(1 << 60, 0)), "claims 1,152,921,504,606,846,976 tensors"),
        (header(counts=(0, 1 << 40)), "more than the 1,000,000 and 10,000 allowed"),
        (header(tensors=[NORM], counts=(5, 0)), "'' is no name of a tensor"),
        (header(tensors=[NORM])[:50], "truncated: it ends within its header"),
        (header(values=[LLAMA, LLAMA]), "names 'general.architecture' twice"),
        (header(values=[("a", 13, b"")]), "'a' is a value of the type 13, which is not known"),
        (header(values=[("a", 9, struct.pack("<IQ", 9, 2))]), "is a list of values of the type 9"),
        (header(values=[("a", 9, struct.pack("<IQ", 4, 1 << 62))]), "'a' is a list of 4,611,686"),
        (header(values=[("a", 9, struct.pack("<IQ", 4, 9_000_000))]), "truncated: it ends within"),
        (header(values=[("a", 8, struct.pack("<Q", 1 << 50))]), "a text of 1,125,899,906,842,624"),
        (header(values=[("general.alignment", 4, struct.pack("<I", 0))]),
         "its general.alignment is 0, expected a power of two"),
        (header(values=[LLAMA], tensors=[("", (8,), 0, 0)]), "'' is no name of a tensor"),
        (header(values=[LLAMA], tensors=[("a", (8,) * 5, 0, 0)]), "has 5 axes, at most 4"),
        (header(values=[LLAMA], tensors=[("a", (0, 8), 0, 0)]), "[0, 8] are not the sizes"),
        (header(values=[LLAMA], tensors=[("a", (1 << 62, 8), 0, 0)]), "are not the sizes"),
        (header(values=[LLAMA], tensors=[("a", (8,), 99, 0)]), "its type 99 is not known"),
        (header(values=[LLAMA], tensors=[("a", (8,), 12, 0)]),
         "has the shape (8,), but 256 elements of a row make a block of the type 12"),
        (header(values=[LLAMA], tensors=[("a", (8,), 0, 5)]), "starts at 5, no multiple of 32"),
        (header(values=[LLAMA], tensors=[NORM]), "truncated: tensor 'output_norm.weight' ends at"),
        (header(values=[LLAMA], tensors=[NORM, NORM]) + bytes(99), "overlaps the tensor before it"),
        (header(values=[LLAMA], tensors=[NORM, (*NORM[:3], 32)]) + bytes(99),
         "names 'output_norm.weight' twice"),
        (header(values=[LLAMA]), "holds no tensors"),
        (header(tensors=[NORM]) + bytes(99), "its general.architecture is None, whose names"),
        (header(values=[("general.architecture", 8, text("rwkv"))], tensors=[NORM]) + bytes(99),
         "its general.architecture is 'rwkv', whose names of tensors are not known (llama, qwen2"),
        (header(values=[LLAMA, ("split.count", 2, b"\x03\0")], tensors=[NORM]) + bytes(99),
         "is one of 3 parts. Join them first by llama-gguf-split"),
        (header(values=[LLAMA], tensors=[("blk.0.ssm_a", (8,), 0, 0)]) + bytes(99),
         "tensor 'blk.0.ssm_a': is not known of the architecture llama"),
        (header(values=[LLAMA], tensors=[("blk.0.attn_q.weight", (8, 8), 0, 0)]) + bytes(999),
         "tensor 'blk.0.attn_q.weight': has 8 rows for None attention heads"),
        (header(values=[LLAMA], tensors=[(NORM[0], (8,), 28, 0)]) + bytes(99),
         "tensor 'output_norm.weight': is of the type F64, which the package gguf does not"),
        (header(values=[LLAMA], tensors=[("blk.0.ffn_up.weight", (8, 8), 0, 0),
                                         ("blk.00.ffn_up.weight", (8, 8), 0, 256)]) + bytes(999),
         "model.layers.0.mlp.up_proj.weight is made of 'blk.0.ffn_up.weight' [8, 8], 'blk.00.ffn"),
        (header(values=[MOE_ARCH], tensors=[("blk.0.ffn_up_exps.weight", (8, 8, 2), 0, 0)])
         + bytes(999), "expected ffn_gate_exps and ffn_up_exps of one shape"),
        (header(values=[MOE_ARCH], tensors=[("blk.0.ffn_up_exps.weight", (8, 8, 2), 0, 0),
                                            ("blk.0.ffn_gate_exps.weight", (8, 4, 2), 0, 512)])
         + bytes(999), "expected ffn_gate_exps and ffn_up_exps of one shape"),
        (header(values=[LLAMA], tensors=[("output.weight", (256,), 15, 0)]) + bytes(999),
         "tensor 'output.weight': is of the type Q8_K, which the package gguf does not dequantise"),
    ],
)  # fmt: skip
def test_broken_files_are_refused(tmp_path, raw, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    with pytest.raises(OutlierMergeError) as error:
        dequantize(open_checkpoint(path))
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_blocks_with_a_scale_that_is_nan_are_refused_as_they_are_read(tmp_path):
    block = np.zeros((8, 34), np.uint8)
    block[3, :2] = 0xFF
    raw = header(values=[LLAMA], tensors=[("output.weight", (32, 8), 8, 0)]) + block.tobytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    source = dequantize(open_checkpoint(path)).tensors["lm_head.weight"]
    with pytest.raises(OutlierMergeError, match=r"tensor 'output.weight': has a scale that is NaN"):
        read(source)


def test_a_config_that_cannot_be_written_is_told(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutlierMergeError, match="cannot be written"):
        outliermerge.plan({"merge_method": "linear", "models": [{"model": str(tiny)}]})


def test_a_folder_of_gguf_files_says_to_name_one(tmp_path):
    (tmp_path / "model.gguf").write_bytes(header())
    with pytest.raises(OutlierMergeError, match=r"only GGUF: model.gguf. Name the file itself"):
        open_checkpoint(tmp_path)
