"""Quantised checkpoints: built by the libraries that define the formats, and compared with them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import PLAIN, checkpoint, compressed_config, fp8_quantized, read, scheme
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.quantized.opened import dequantize
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Checkpoint
from outliermerge.errors import OutlierMergeError

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 8]}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def four_bit(name: str, values: torch.Tensor, kind: str = "nf4", **options) -> tuple[dict, object]:
    codes, state = bnb.quantize_4bit(values, quant_type=kind, **options)
    parts = {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    return {name: codes, **parts}, (codes, state)


def four_bit_values(codes: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    # As one row: the AVX-512 kernel of bitsandbytes 0.50 takes the absmax of wrong blocks where a
    # row is no whole number of them.
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    return bnb.dequantize_4bit(codes, state).view(shape)


def compressed(name: str, values: torch.Tensor, scheme: QuantizationScheme, **parts) -> tuple:
    """Return what compressed_tensors stores for a weight, and what it makes of that."""
    compressor = BaseCompressor.get_value_from_registry("naive-quantized")
    stored = compressor.compress({"weight": values, **parts}, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    return {f"{name}.{part}": value for part, value in stored.items()}, expected


@pytest.mark.parametrize("shape", [(32, 24), (16, 8), (3, 32, 24), (2, 2, 16, 16)])
def test_fp8_weights_are_what_transformers_makes_of_them(tmp_path, shape):
    torch.manual_seed(0)
    name = "a.weight" if len(shape) == 2 else "experts.gate_up_proj"
    stored = fp8_quantized(name, torch.randn(shape), [16, 8])
    weight, scale = stored.values()
    opened = dequantize(checkpoint(tmp_path, stored | PLAIN, FP8, dtype="float16"))

    source = opened.tensors[name]
    assert set(opened.tensors) == {name, *PLAIN}
    assert (source.shape, source.dtype.name, source.out_dtype.name) == (shape, "float32", "float16")
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(read(source), expected)


@pytest.mark.parametrize("shape", [(33, 24), (32, 25), (5, 3), (17, 9), (300, 260), (3, 33, 25)])
def test_the_last_fp8_blocks_may_be_cut_off(tmp_path, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-2], -(-shape[-2] // 16), -(-shape[-1] // 8))
    opened = dequantize(
        checkpoint(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, FP8)
    )

    library = FP8BlockDequantizer(weight_block_size=(16, 8), dtype=torch.float32)
    stacks = weight.view(-1, *shape[-2:]), scale.view(-1, *scale.shape[-2:])
    matrices = [library._create_dequantized_weight(*pair) for pair in zip(*stacks, strict=True)]
    assert torch.equal(read(opened.tensors["a.weight"]), torch.stack(matrices).view(shape))


@pytest.mark.parametrize(
    ("suffix", "scale_shape"),
    [
        ("_scale_inv", ()),
        ("_scale_inv", (1,)),
        ("_scale", ()),
        ("_scale", (1,)),
        ("_scale", (6, 1)),
    ],
)
def test_fp8_scales_may_be_for_a_tensor_or_a_row(tmp_path, suffix, scale_shape):
    torch.manual_seed(0)
    weight, scale = torch.randn(6, 10).to(torch.float8_e4m3fn), torch.rand(scale_shape)
    stored = {"a.weight": weight, f"a.weight{suffix}": scale, "a.input_scale": torch.ones(())}
    stored |= {"a.activation_scale": torch.ones(()), "attn.k_scale": torch.ones(1)}
    quantization = FP8 | {"weight_block_size": None, "kv_cache_scheme": "static"}
    opened = dequantize(checkpoint(tmp_path, stored, quantization))

    assert list(opened.tensors) == ["a.weight"]
    assert torch.equal(read(opened.tensors["a.weight"]), weight.float() * scale)


def test_stacked_fp8_experts_may_have_a_scale_for_each_half(tmp_path):
    torch.manual_seed(0)
    weight, scale = torch.randn(3, 8, 10).to(torch.float8_e4m3fn), torch.rand(3, 2, 1)
    stored = {"e.gate_up_proj": weight, "e.gate_up_proj_scale_inv": scale,
              "e.gate_up_proj_activation_scale": torch.ones(3)}  # fmt: skip
    opened = dequantize(checkpoint(tmp_path, stored, FP8 | {"weight_block_size": None}))

    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert list(opened.tensors) == ["e.gate_up_proj"]
    assert torch.equal(read(opened.tensors["e.gate_up_proj"]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize(
    ("args", "scale_shape"),
    [
        ({"strategy": "tensor"}, (1,)),
        ({"strategy": "channel"}, (32, 1)),
        ({"strategy": "group", "group_size": 8}, (32, 3)),
        ({"strategy": "block", "block_structure": [16, 10]}, (2, 3)),
        ({"strategy": "block", "block_structure": [10, 8]}, (4, 3)),
    ],
)
def test_compressed_tensors_are_what_the_library_makes_of_them(
    tmp_path, args, scale_shape, kind, dtype
):
    torch.manual_seed(0)
    with_type = scheme(type=kind, **args)
    scale = (torch.rand(scale_shape) / 50 + 0.01).to(dtype)
    stored, expected = compressed("a", torch.randn(32, 24).to(dtype), with_type, weight_scale=scale)
    stored |= {"a.input_scale": torch.ones(1), "b.bias": torch.ones(3)}
    opened = dequantize(checkpoint(tmp_path, stored, compressed_config(with_type)))

    assert set(opened.tensors) == {"a.weight", "b.bias"}
    assert expected.dtype == dtype
    # The library multiplies in the scale's dtype: the same product, rounded to it.
    assert torch.equal(read(opened.tensors["a.weight"]).to(dtype), expected)


@pytest.mark.parametrize(
    ("args", "shape"),
    [({"strategy": "channel"}, (32, 1)), ({"strategy": "group", "group_size": 8}, (32, 3))],
)
def test_compressed_tensors_may_have_zero_points(tmp_path, args, shape):
    torch.manual_seed(0)
    uneven = scheme(type="int", symmetric=False, **args)
    zero_point = torch.randint(-100, 100, shape, dtype=torch.int8)
    stored, expected = compressed(
        "a",
        torch.randn(32, 24),
        uneven,
        weight_scale=torch.rand(shape),
        weight_zero_point=zero_point,
    )
    opened = dequantize(checkpoint(tmp_path, stored, compressed_config(uneven)))

    assert list(opened.tensors) == ["a.weight"]
    assert torch.equal(read(opened.tensors["a.weight"]), expected)


def test_compressed_tensors_may_mix_schemes(tmp_path):
    torch.manual_seed(0)
    by_row, by_group = (
        scheme(strategy="channel"),
        scheme(type="int", strategy="group", group_size=8),
    )
    a, a_expected = compressed("a", torch.randn(4, 24), by_row, weight_scale=torch.rand(4, 1))
    b, b_expected = compressed("b", torch.randn(4, 24), by_group, weight_scale=torch.rand(4, 3))
    config = compressed_config(by_row, by_group, layout="mixed-precision")
    config["config_groups"]["group_0"]["format"] = "float-quantized"
    config["config_groups"]["group_1"]["format"] = "int-quantized"
    opened = dequantize(checkpoint(tmp_path, a | b, config))

    assert torch.equal(read(opened.tensors["a.weight"]), a_expected)
    assert torch.equal(read(opened.tensors["b.weight"]), b_expected)


def test_a_group_without_zero_points_does_not_speak_for_whole_numbers(tmp_path):
    torch.manual_seed(0)
    of_floats = scheme(strategy="channel")
    of_ints = scheme(strategy="channel", type="int", symmetric=False)
    a, _ = compressed("a", torch.randn(4, 24), of_floats, weight_scale=torch.rand(4, 1))
    b, _ = compressed(
        "b", torch.randn(4, 24), of_ints, weight_scale=torch.rand(4, 1),
        weight_zero_point=torch.ones(4, 1, dtype=torch.int8),
    )  # fmt: skip
    config = compressed_config(of_floats, of_ints, layout="mixed-precision")
    config["config_groups"]["group_0"]["format"] = "float-quantized"
    config["config_groups"]["group_1"]["format"] = "int-quantized"
    assert set(dequantize(checkpoint(tmp_path / "whole", a | b, config)).tensors) == {
        "a.weight",
        "b.weight",
    }
    del b["b.weight_zero_point"]
    with pytest.raises(OutlierMergeError, match=r"there is a b\.weight_zero_point"):
        dequantize(checkpoint(tmp_path / "lacking", a | b, config))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 32), (11, 96), (7, 10), (33, 6), (300, 130)])
def test_four_bit_weights_are_what_bitsandbytes_makes_of_them(tmp_path, kind, nested, shape):
    torch.manual_seed(0)
    stored, (codes, state) = four_bit(
        "a.weight", torch.randn(shape), kind, compress_statistics=nested
    )
    opened = dequantize(checkpoint(tmp_path, stored | PLAIN, BNB))

    assert set(opened.tensors) == {"a.weight", *PLAIN}
    assert opened.tensors["a.weight"].out_dtype.name == "bfloat16"
    assert torch.equal(read(opened.tensors["a.weight"]), four_bit_values(codes, state))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_four_bit_codes_may_be_stored_as_another_dtype(tmp_path, storage):
    torch.manual_seed(0)
    stored, (codes, state) = four_bit("a.weight", torch.randn(12, 8), quant_storage=storage)
    opened = dequantize(checkpoint(tmp_path, stored, BNB))

    assert stored["a.weight"].dtype == storage
    assert torch.equal(read(opened.tensors["a.weight"]), four_bit_values(codes, state))


@pytest.mark.parametrize("shape", [(5, 7), (9,), (3, 3, 3)])
def test_four_bit_weights_may_have_an_odd_shape(tmp_path, shape):
    torch.manual_seed(0)
    stored, (codes, state) = four_bit("a.weight", torch.randn(shape), blocksize=32)
    opened = dequantize(checkpoint(tmp_path, stored, BNB))

    code = torch.stack((codes >> 4, codes & 15), dim=-1).flatten().tolist()
    values = [
        state.code[code[n]].double() * state.absmax[n // 32].double()
        for n in range(torch.Size(shape).numel())
    ]
    expected = torch.stack(values).view(shape).float()
    assert torch.equal(read(opened.tensors["a.weight"]), expected)


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}])  # fmt: skip
def test_what_transformers_saves_with_bitsandbytes_is_what_it_dequantises(tmp_path, options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=transformers.BitsAndBytesConfig(**options),
        device_map="cpu", dtype=torch.bfloat16,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "quantised")
    plain = open_checkpoint(tmp_path / "plain")
    opened = dequantize(open_checkpoint(tmp_path / "quantised"))

    assert set(opened.tensors) == set(plain.tensors)
    assert {s.out_dtype.name for s in opened.tensors.values()} == {"bfloat16"}
    num_quantised = 0
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit"):
            source = opened.tensors[f"{name}.weight"]
            expected = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
            assert source.shape == plain.tensors[f"{name}.weight"].shape
            assert torch.equal(read(source).to(expected.dtype), expected)
            num_quantised += 1
    assert num_quantised == 7
    assert (
        f"7 weights quantised with bitsandbytes ({8 if len(options) == 1 else 4} bits)"
        in (opened.notes[-1])
    )


def a_model(folder: Path) -> Checkpoint:
    """Return one folder that holds weights of every kind, as a pipeline of three components."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    stacked = fp8_quantized("e.gate_up_proj", torch.randn(3, 32, 24), [16, 8])
    nested, _ = four_bit("b.weight", torch.randn(70, 30), compress_statistics=True)
    by_group = scheme(type="int", strategy="group", group_size=6)
    grouped, _ = compressed("c", torch.randn(31, 12), by_group, weight_scale=torch.rand(31, 2))
    checkpoint(folder / "one", stacked, FP8)
    checkpoint(folder / "two", nested, BNB)
    checkpoint(folder / "three", grouped, compressed_config(by_group))
    index = {name: ["transformers", "Model"] for name in ("one", "two", "three")}
    (folder / "model_index.json").write_text(json.dumps(index))
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Checkpoint:
    return dequantize(a_model(tmp_path_factory.mktemp("pipeline") / "model"))


def test_each_component_of_a_pipeline_has_its_own_method(pipeline):
    assert set(pipeline.tensors) == {"one/e.gate_up_proj", "two/b.weight", "three/c.weight"}
    methods = ["with fp8", "with bitsandbytes (4 bits)", "with compressed-tensors"]
    assert all(method in note for method, note in zip(methods, pipeline.notes, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_values_do_not_depend_on_how_they_are_read(pipeline, data):
    source = pipeline.tensors[data.draw(st.sampled_from(sorted(pipeline.tensors)))]
    start = data.draw(st.integers(0, source.num_elements))
    stop = data.draw(st.integers(start, source.num_elements))
    with Reader() as reader:
        assert torch.equal(reader.values(source, start, stop), read(source).flatten()[start:stop])


def test_large_weights_are_read_in_groups_of_rows(tmp_path):
    torch.manual_seed(0)
    stored, (codes, state) = four_bit("a.weight", torch.randn(700, 210), compress_statistics=True)
    source = dequantize(checkpoint(tmp_path, stored, BNB)).tensors["a.weight"]
    expected = four_bit_values(codes, state)
    assert torch.equal(read(source), expected)
    with Reader() as reader:
        part = reader.values(source, 65_000, 140_001)
    assert torch.equal(part, expected.flatten()[65_000:140_001])


def test_a_dequantised_checkpoint_goes_to_other_processes(pipeline):
    again = pickle.loads(pickle.dumps(pipeline))
    assert again == pipeline
    assert {hash(source) for source in again.tensors.values()} == {
        hash(source) for source in pipeline.tensors.values()
    }


def test_stored_names_every_tensor_that_is_read(pipeline):
    names = {name: {meta.name for meta in s.stored} for name, s in pipeline.tensors.items()}
    assert names == {
        "one/e.gate_up_proj": {"e.gate_up_proj", "e.gate_up_proj_scale_inv"},
        "two/b.weight": {f"b.weight{part}" for part in (
            "", ".quant_map", ".absmax", ".nested_quant_map", ".nested_absmax")},
        "three/c.weight": {"c.weight", "c.weight_scale"},
    }  # fmt: skip


def test_the_order_of_tensors_stays(tmp_path):
    stored = fp8_quantized("b.weight", torch.randn(16, 8), [16, 8])
    stored |= {"a.weight": torch.ones(3), "z.weight": torch.ones(2).half()}
    before = checkpoint(tmp_path, stored, FP8)
    names = [name for name in before.tensors if name in ("a.weight", "b.weight", "z.weight")]
    assert list(dequantize(before).tensors) == names


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "bfloat16"),
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float64"}, "float64"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"dtype": "auto", "text_config": {"dtype": "float16"}}, "float16"),
    ],
)
def test_outputs_have_the_dtype_that_the_model_computes_in(tmp_path, config, expected):
    stored = fp8_quantized("a.weight", torch.randn(16, 8), [16, 8])
    opened = dequantize(checkpoint(tmp_path, stored, FP8, **config))
    assert opened.tensors["a.weight"].out_dtype.name == expected


def test_a_language_model_part_may_name_the_method(tmp_path):
    stored = fp8_quantized("a.weight", torch.randn(16, 8), [16, 8])
    config = {"model_type": "llava", "text_config": {"quantization_config": FP8}}
    assert list(dequantize(checkpoint(tmp_path, stored, **config)).tensors) == ["a.weight"]


def test_models_that_are_not_quantised_stay_the_same(tmp_path):
    stored = {"a.weight": torch.randn(4, 4).to(torch.float8_e4m3fn), "logit_scale": torch.ones(())}
    opened = checkpoint(tmp_path, stored)
    assert dequantize(opened) is opened
    raw = open_checkpoint(tmp_path / "model.safetensors")
    assert dequantize(raw) is raw


@pytest.mark.parametrize("quantization", [FP8, BNB, compressed_config(scheme(strategy="tensor"))])
def test_a_method_that_no_weight_uses_is_only_noted(tmp_path, quantization):
    opened = checkpoint(
        tmp_path, {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, quantization
    )
    after = dequantize(opened)
    assert after.tensors == opened.tensors
    assert f"0 weights quantised with {quantization['quant_method']}" in after.notes[-1]


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "hqq", "nbits": 4}, "hqq (4 bits), which cannot be read (awq, "
         "bitsandbytes, compressed-tensors, fbgemm_fp8, fp8, gptq, modelopt, mxfp4, quanto, "
         "torchao can). "
         "Name the model that it was quantised from instead."),
        ({"quant_method": "gguf"}, "gguf, .* gguf_file=…) of transformers, then save_pretrained"),
        ({"quant_method": "hqq"}, "hqq, which cannot be read .* quantised from instead"),
        ({"quant_method": "aqlm"}, "aqlm, which cannot"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt's NVFP4 cannot be read "
         "(FP8, FP8_PER_CHANNEL_PER_TOKEN can). Name the model"),
        ({"quant_method": "eetq"}, "eetq, which cannot"),
        ({"quant_method": "higgs"}, "higgs, which cannot"),
        ({"quant_method": "tomorrow"}, "tomorrow, which cannot"),
        ({"load_in_8bit": True}, "None (8 bits), which cannot"),
        ("nonsense", "nonsense, which cannot"),
        (FP8 | {"weight_block_size": [128, 0]}, "weight_block_size is [128, 0], expected two"),
        (FP8 | {"weight_block_size": 128}, "weight_block_size is 128, expected two"),
        ({"quant_method": "compressed-tensors"}, "not one of compressed-tensors: "
         "KeyError('config_groups')"),
        (compressed_config(scheme(strategy="tensor")) | {"config_groups": {"W8A8": ["Linear"]}},
         "not one of compressed-tensors"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {
            "g": {"weights": {"num_bits": 8, "strategy": ["channel"]}}}},
         "format int-quantized, 8 bits per ['channel'], cannot be read"),
        (compressed_config(scheme(num_bits=4, type="int", strategy="group", group_size=32),
                           layout="marlin-24"),
         "compressed-tensors of the format marlin-24, 4 bits per group, cannot be read "
         "(float-quantized, int-quantized, naive-quantized, pack-quantized, mxfp8-quantized, "
         "mxfp4-pack-quantized, nvfp4-pack-quantized can). Convert it with "
         "CompressedTensorsDequantizer"),
        (compressed_config(scheme(num_bits=6), layout="mxfp6-pack-quantized"),
         "mxfp6-pack-quantized, 6 bits per tensor, cannot be read"),
        (compressed_config(scheme(strategy="tensor")) | {"sparsity_config": {"format": "24"}},
         "with transforms or sparsity. Name the model"),
        (compressed_config(scheme(strategy="tensor")) | {"transform_config": {
            "config_groups": {"u": {}}}}, "with transforms or sparsity"),
    ],
)  # fmt: skip
def test_methods_that_cannot_be_read_are_refused_by_name(tmp_path, quantization, message):
    codes = {"a.codes": torch.ones(4, 4, dtype=torch.int32)}
    opened = checkpoint(tmp_path, PLAIN | codes, quantization)
    with pytest.raises(OutlierMergeError) as error:
        dequantize(opened)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'config.json'}: quantization_config: ")
    position = 0
    for part in message.split(".*"):
        position = text.index(part.strip(), position)


STALE = [
    *({"quant_method": m} for m in ("mxfp4", "gptq", "awq", "torchao", "hqq", "aqlm", "eetq")),
    {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    FP8 | {"weight_block_size": 128},
    BNB,
]
BUFFERS = {
    "position_ids": torch.arange(8)[None],
    "bn.num_batches_tracked": torch.tensor(3),
    "logit_scale": torch.ones(()),
    "query_norm.scale": torch.ones(4),
    "mask": torch.ones(2, 2).bool(),
}


@pytest.mark.parametrize("part", [None, "text_config"])
@pytest.mark.parametrize("quantization", STALE, ids=lambda said: said["quant_method"])
def test_plain_weights_under_a_config_left_from_quantising_are_read(tmp_path, quantization, part):
    stored = {name: tensor.bfloat16() for name, tensor in PLAIN.items()} | BUFFERS
    said = {part: {"quantization_config": quantization}} if part else {}
    opened = checkpoint(tmp_path, stored, None if part else quantization, **said)
    after = dequantize(opened)
    assert after.tensors == opened.tensors
    assert f"quantised with {quantization['quant_method']}" in after.notes[-1]
    assert "but none is" in after.notes[-1]


@pytest.mark.parametrize(
    "left",
    [
        {"a.qweight": torch.ones(4, 4, dtype=torch.int32)},
        {"a.weight_packed": torch.ones(4, 4, dtype=torch.uint8)},
        {"a.bitmask": torch.ones(4, 4, dtype=torch.uint8)},
        {"a.codes": torch.ones(4, 4, dtype=torch.int64)},
        {"a.weight_scale": torch.ones(4)},
        {"a.absmax": torch.ones(4)},
        {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)},
    ],
    ids=lambda left: next(iter(left)),
)
def test_one_quantised_tensor_or_companion_keeps_a_config_true(tmp_path, left):
    opened = checkpoint(tmp_path, PLAIN | left, {"quant_method": "eetq", "bits": 4})
    with pytest.raises(OutlierMergeError, match="eetq"):
        dequantize(opened)


CODES = torch.ones(4, 4, dtype=torch.int8)


@pytest.mark.parametrize(
    ("stored", "name", "method"),
    [
        ({"a.qweight": CODES, "a.qzeros": CODES, "a.scales": CODES}, "a.qweight", "gptq or awq"),
        ({"e_blocks": CODES, "e_scales": CODES}, "e_blocks", "mxfp4"),
        ({"a.weight": CODES, "a.SCB": torch.ones(4)}, "a.SCB", "bitsandbytes"),
        (four_bit("a.weight", torch.ones(4, 4))[0], "a.weight.quant_map", "bitsandbytes"),
        ({"a.weight_packed": CODES, "a.weight_scale": CODES}, "a.weight_packed",
         "compressed-tensors"),
        ({"a.weight": CODES.to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1)},
         "a.weight", "fp8"),
        ({"a.weight": CODES, "a.weight_scale": torch.ones(1)}, "a.weight",
         "compressed-tensors or fp8"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_file", [False, True])
def test_quantised_tensors_without_their_config_are_refused(
    tmp_path, stored, name, method, is_file
):
    opened = checkpoint(tmp_path, stored)
    if is_file:
        opened = open_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(OutlierMergeError) as error:
        dequantize(opened)
    assert str(error.value) == (
        f"{opened.root}: tensor {name!r} is quantised ({method}), but no config.json has a "
        "quantization_config: use the folder that has it. "
        "Name the model that it was quantised from instead."
    )


GOOD_FP8 = {"a.weight": torch.ones(32, 8).to(torch.float8_e4m3fn),
            "a.weight_scale_inv": torch.ones(2, 1)}  # fmt: skip
BAD_FP8 = torch.ones(32, 8).to(torch.float8_e4m3fn)
GOOD_NF4, (_, NF4_STATE) = four_bit("a.weight", torch.ones(4, 64), compress_statistics=True)
GOOD_INT8 = {"a.weight": CODES, "a.SCB": torch.ones(4)}
STATE = "a.weight.quant_state.bitsandbytes__nf4"


def state_bytes(**changed) -> torch.Tensor:
    good = json.loads(bytes(GOOD_NF4[STATE].tolist()))
    return torch.tensor(list(json.dumps(good | changed).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("stored", "quantization", "name", "message"),
    [
        (GOOD_FP8 | {"b.weight": BAD_FP8}, FP8, "b.weight",
         "quantised (float8_e4m3fn), but its weight_scale_inv or weight_scale is missing"),
        (GOOD_FP8 | {"a.weight_scale_inv": torch.ones(1, 2)}, FP8, "a.weight_scale_inv",
         "float32 (1, 2) for a weight (32, 8); config.json says a float of shape (2, 1)."),
        (GOOD_FP8 | {"a.weight_scale_inv": torch.ones(2, 1, dtype=torch.int8)}, FP8,
         "a.weight_scale_inv", "int8 (2, 1) for a weight (32, 8)"),
        (GOOD_FP8 | {"a.weight_scale_inv": torch.ones(3, 1, dtype=torch.uint8)}, FP8,
         "a.weight_scale_inv", "uint8 (3, 1) for a weight (32, 8)"),
        (GOOD_FP8 | {"b.weight_scale_inv": torch.ones(2, 1)}, FP8, "b.weight_scale_inv",
         "is no part of a complete quantised weight (fp8). All such:\n  b.weight_scale_inv"),
        (GOOD_FP8 | {"a.weight_scale": torch.ones(1)}, FP8, "a.weight_scale",
         "is no part of a complete"),
        (GOOD_FP8 | {"a.weight": torch.ones(32, 8)}, FP8, "a.weight_scale_inv",
         "is no part of a complete"),
        (GOOD_FP8 | {"b.weight": torch.ones(4).to(torch.float8_e4m3fn),
                     "b.weight_scale_inv": torch.ones(1)}, FP8, "b.weight",
         "has a scale, but is no matrix: its shape is (4,)"),
        ({"a.weight": CODES, "a.weight_scale": torch.ones(4, 1), "a.weight_zero_point":
          torch.ones(4, 2, dtype=torch.int8)},
         compressed_config(scheme(type="int", strategy="channel")), "a.weight_scale",
         "float32 (4, 1) (zero points: (4, 2)) for a weight (4, 4)"),
        ({"a.weight": CODES, "a.weight_scale": torch.ones(4, 1), "b.weight": CODES},
         compressed_config(scheme(type="int", strategy="channel")), "b.weight",
         "quantised (int8), but its weight_scale is missing"),
        ({"a.weight": CODES, "a.weight_scale": torch.ones(1, 1)},
         compressed_config(scheme(strategy="block", block_structure=[3, 4])), "a.weight_scale",
         "float32 (1, 1) for a weight (4, 4); config.json says a float of shape (2, 1)"),
        (GOOD_INT8 | {"a.SCB": torch.ones(3)}, BNB, "a.SCB",
         "float32 (3,) for a weight (4, 4); config.json says a float of shape (4, 1)"),
        (GOOD_INT8 | {"b.weight": CODES}, BNB, "b.weight",
         "quantised (int8), but its SCB or quant_state is missing"),
        (GOOD_INT8 | {"b.SCB": torch.ones(3)}, BNB, "b.SCB",
         "is no part of a complete quantised weight (bitsandbytes)"),
        (GOOD_INT8 | {"a.weight_format": torch.tensor(2, dtype=torch.uint8)}, BNB, "a.weight",
         "its weight_format is 2, of old bitsandbytes versions, expected 0 (rows). Name the model"),
        (GOOD_NF4 | {STATE: state_bytes()[:-1]}, BNB, STATE,
         "not a quant_state of bitsandbytes: JSONDecodeError("),
        (GOOD_NF4 | {STATE: torch.ones(3)}, BNB, STATE, "not a quant_state of bitsandbytes: "),
        (GOOD_NF4 | {STATE: state_bytes(shape=[4, 0])}, BNB, STATE,
         "ValueError('shape (4, 0), block sizes 64 and 256')"),
        (GOOD_NF4 | {STATE: state_bytes(shape=None)}, BNB, STATE, "TypeError("),
        (GOOD_NF4 | {STATE: state_bytes(blocksize="64")}, BNB, STATE, "ValueError("),
        (GOOD_NF4 | {STATE: state_bytes(shape=[4, 66])}, BNB, "a.weight",
         "has 128 bytes, its quant_state's shape (4, 66) needs 132"),
        (GOOD_NF4 | {STATE: state_bytes(blocksize=32)}, BNB, "a.weight.absmax",
         "has 4 bytes, its quant_state's shape (4, 64) needs 8"),
        (GOOD_NF4 | {"a.weight.absmax": torch.ones(4)}, BNB, "a.weight",
         "quantised, but its absmax (uint8) is missing"),
        (GOOD_NF4 | {"a.weight.nested_absmax": None}, BNB, "a.weight",
         "quantised, but its nested_absmax (float32) is missing"),
        (GOOD_NF4 | {"a.weight": None}, BNB, "a.weight.nested_absmax", "is no part of a"),
        (GOOD_NF4 | {STATE: None}, BNB, "a.weight.nested_absmax", "is no part of a"),
        (GOOD_NF4 | {"b.weight": CODES.to(torch.uint8)}, BNB, "b.weight",
         "quantised (uint8), but its SCB or quant_state is missing"),
    ],
)  # fmt: skip
def test_broken_tensors_are_refused_by_name(tmp_path, stored, quantization, name, message):
    kept = {name: value for name, value in stored.items() if value is not None}
    opened = checkpoint(tmp_path, kept, quantization)
    with pytest.raises(OutlierMergeError) as error:
        dequantize(opened)
    start = f"{tmp_path / 'model.safetensors'}: tensor {name!r}: "
    assert str(error.value).startswith(start)
    assert message in str(error.value)


def test_the_layers_that_bitsandbytes_transposes_are_refused(tmp_path):
    opened = checkpoint(tmp_path, GOOD_INT8, BNB, model_type="gpt2")
    with pytest.raises(OutlierMergeError, match="bitsandbytes transposes weights of gpt2: cannot"):
        dequantize(opened)


@pytest.mark.parametrize("root", [FP8 | {"weight_block_size": [16, 8]}, {"quant_method": "mxfp4"}])
def test_a_module_of_a_sentence_transformer_goes_by_its_own_config(tmp_path, root):
    is_fp8 = root["quant_method"] == "fp8"
    expected = torch.randn(16, 8)
    stored = fp8_quantized("a.weight", expected, [16, 8]) if is_fp8 else {"a.weight": expected}
    dense = tmp_path / "2_Dense"
    codes = {"linear.weight": torch.ones(4, 16, dtype=torch.int8), "linear.SCB": torch.ones(4)}
    checkpoint(dense, codes | {"linear.bias": torch.ones(4)}, BNB)
    checkpoint(tmp_path, stored, root)
    modules = [{"idx": i, "path": path} for i, path in enumerate(["", "2_Dense"])]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    opened = dequantize(open_checkpoint(tmp_path))
    assert set(opened.tensors) == {"a.weight", "2_Dense/linear.weight", "2_Dense/linear.bias"}
    torch.testing.assert_close(
        read(opened.tensors["2_Dense/linear.weight"]), torch.full((4, 16), 1 / 127)
    )
    torch.testing.assert_close(read(opened.tensors["a.weight"]), expected, rtol=0.07, atol=0.01)
    assert len(opened.notes) == 2


def test_a_plain_module_beside_a_quantised_root_stays_as_it_is(tmp_path):
    stored = fp8_quantized("a.weight", torch.randn(16, 8), [16, 8])
    checkpoint(tmp_path / "2_Dense", {"linear.weight": torch.ones(4, 16)})
    checkpoint(tmp_path, stored, FP8 | {"weight_block_size": [16, 8]}, dtype="bfloat16")
    modules = [{"idx": i, "path": path} for i, path in enumerate(["", "2_Dense"])]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    before = open_checkpoint(tmp_path)
    after = dequantize(before)
    assert after.tensors["2_Dense/linear.weight"] == before.tensors["2_Dense/linear.weight"]
    assert after.tensors["a.weight"].out_dtype.name == "bfloat16"
