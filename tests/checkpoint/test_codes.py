"""Numbers that are codes: read where the layout is known, refused by name where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import load_folder, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import read
from safetensors.torch import load_file, save_file

import outliermerge
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.quantized.opened import dequantize
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Checkpoint
from outliermerge.errors import OutlierMergeError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EIGHT_BITS = (E4M3, E5M2, torch.int8, torch.uint8)
INTEGERS = (torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)
R, C = 16, 32
SCALE_SHAPES = {
    "tensor": (), "tensor1": (1,), "tensor11": (1, 1), "rows": (R,), "rows1": (R, 1),
    "columns": (C,), "1columns": (1, C), "blocks": (2, 4), "groups": (R, 4), "groups1": (R, 4, 1),
}  # fmt: skip
NAMES = ("scale_weight", "weight_scale", "weight_scale_inv", "weight._scale", "scales", "scale",
         "weight.absmax", "s", "foo_quant_factor", "weight_s", "weight_quantizer._amax", "SCB",
         "delta", "per_token_scale", "norm_factor")  # fmt: skip
# What is read without a config: a float8's product with a scale per tensor, row or row's group.
READ_NAMES = ("scale_weight", "weight_scale")
READ_SHAPES = ("tensor", "tensor1", "tensor11", "rows", "rows1", "groups1")


def codes_of(dtype: torch.dtype, shape: tuple[int, ...] = (R, C)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * 20).to(dtype)
    low = -100 if dtype.is_signed else 0
    return torch.randint(low, 100, shape, generator=generator).to(dtype)


def a_scale(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) / 100 + 1e-3).to(dtype)


def product(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return codes × scale in float64, the scale one number, by row, or by group (R, G, 1)."""
    values, scale = codes.double(), scale.double()
    if scale.numel() == 1:
        return values * scale.flatten()
    rows, columns = values.shape[0], values[0].numel()
    groups = scale.numel() // rows
    by_group = scale.reshape(rows, groups, 1).expand(-1, -1, columns // groups)
    return (values.reshape(rows, -1) * by_group.reshape(rows, -1)).view(values.shape)


def opened(folder: Path, tensors: dict, *, metadata: dict | None = None, kind="file") -> Checkpoint:
    """Store tensors as one file, as a folder without config.json, with one, or as a pipeline."""
    home = folder / "unet" if kind == "pipeline" else folder
    home.mkdir(parents=True, exist_ok=True)
    name = "diffusion_pytorch_model" if kind == "pipeline" else "model"
    tensors = {name: value.clone().contiguous() for name, value in tensors.items()}
    save_file(tensors, home / f"{name}.safetensors", metadata=metadata)
    if kind in ("config", "pipeline"):
        (home / "config.json").write_text('{"model_type": "test"}')
    if kind == "pipeline":
        (folder / "model_index.json").write_text('{"unet": ["diffusers", "UNet"]}')
    return open_checkpoint(folder / f"{name}.safetensors" if kind == "file" else folder)


def refusal(checkpoint: Checkpoint) -> str:
    with pytest.raises(OutlierMergeError) as error:
        dequantize(checkpoint)
    return str(error.value)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [*EIGHT_BITS, *INTEGERS], ids=str)
def test_codes_with_a_scale_of_any_name_are_read_or_refused(tmp_path, dtype):
    codes = codes_of(dtype)
    for number, name in enumerate(NAMES):
        for kind, shape in SCALE_SHAPES.items():
            scale = a_scale(shape)
            stored = {"m.a.weight": codes, f"m.a.{name}": scale, "m.norm.weight": torch.ones(C)}
            checkpoint = opened(tmp_path / f"{number}{kind}", stored)
            if name in READ_NAMES and kind in READ_SHAPES and dtype.is_floating_point:
                result = dequantize(checkpoint)
                assert set(result.tensors) == {"m.a.weight", "m.norm.weight"}
                assert_close(read(result.tensors["m.a.weight"]), product(codes, scale))
            else:
                message = refusal(checkpoint)
                assert "m.a.weight" in message or f"m.a.{name}" in message, (name, kind)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32], ids=str)
@pytest.mark.parametrize("table", [(16,), (256,), (1, 16), (24, 16), (24, 256)])
def test_codes_with_a_lookup_table_are_refused(tmp_path, dtype, table):
    stored = {"a.weight": codes_of(dtype, (24, 40)), "a.t": torch.rand(table)}
    message = refusal(opened(tmp_path, stored))
    assert "tensor 'a.weight'" in message and "'a.t'" in message and "lookup table" in message


@pytest.mark.parametrize("kind", ["file", "folder", "config", "pipeline"])
def test_codes_are_refused_wherever_they_are_with_what_to_do(tmp_path, kind):
    stored = {"m.a.weight": codes_of(torch.int8), "m.a.s": a_scale((R, 1))}
    message = refusal(opened(tmp_path, stored, kind=kind))
    assert "tensor 'm.a.weight' (int8 [16, 32]) looks like codes" in message
    assert "'m.a.s' (float32 [16, 1]), of the shape of a scale for each row" in message
    assert "Name the model that it was quantised from instead, or dequantise it" in message


def packed(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return codes_of(dtype, shape)


# As these tools name and shape what they store for one layer (R, C) = (16, 32).
OTHERS = {
    "gptq": {"a.qweight": packed(torch.int32, 4, 16), "a.qzeros": packed(torch.int32, 2, 2),
             "a.scales": a_scale((2, 16)).half(), "a.g_idx": packed(torch.int32, 32)},
    "hqq": {"a.W_q": packed(torch.uint8, 32, 8), "a.scale": a_scale((32, 1)),
            "a.zero": a_scale((32, 1))},
    "torchao": {"a._weight_qdata": packed(torch.int8, 16, 32),
                "a._weight_scale": a_scale((16, 1)), "a._weight_zero_point": a_scale((16, 1))},
    "eetq": {"a.weight": packed(torch.int8, 32, 16), "a.weight_scales": a_scale((16,)).half()},
    "aqlm": {"a.codes": packed(torch.int8, 16, 4, 2), "a.codebooks": torch.rand(2, 256, 1, 8),
             "a.scales": a_scale((16, 1, 1, 1))},
    "vptq": {"a.indices": packed(torch.int32, 1, 4, 16), "a.centroids.weight": torch.rand(1, 2048)},
    "mlx": {"a.weight": packed(torch.uint32, 16, 4), "a.scales": a_scale((16, 1)),
            "a.biases": a_scale((16, 1))},
    "nvfp4": {"a.weight": packed(torch.uint8, 16, 16), "a.weight_scale": a_scale((16, 2)).to(E4M3),
              "a.weight_scale_2": a_scale(()), "a.input_scale": a_scale(())},
    "mxfp4": {"e.gate_up_proj_blocks": packed(torch.uint8, 2, 16, 1, 16),
              "e.gate_up_proj_scales": packed(torch.uint8, 2, 16, 1)},
    "mxfp8": {"a.weight": packed(E4M3, 16, 32), "a.weight_scale": packed(torch.uint8, 16, 1)},
    "bitnet": {"a.weight": packed(torch.uint8, 4, 32), "a.weight_scale": a_scale((1,))},
    "quip": {"a.Qidxs": packed(torch.int64, 16, 4), "a.SU": torch.ones(32),
             "a.Wscale": a_scale(())},
    "svdquant": {"a.qweight": packed(torch.int8, 16, 16), "a.wscales": a_scale((1, 16)),
                 "a.smooth_factor": torch.ones(32)},
    "modelopt": {"a.weight": packed(E4M3, 16, 32), "a.weight_quantizer._scale": a_scale(())},
    "quanto 4 bits": {"a.weight._data._data": packed(torch.uint8, 8, 32),
                      "a.weight._scale": a_scale((16, 1)), "a.weight._shift": a_scale((16, 1))},
    "musubi, two levels": {"a.weight": packed(E4M3, 16, 32), "a.scale_weight": a_scale((16, 4, 1)),
                           "a.scale_weight_tensor": a_scale(())},
    "smoothed": {"a.weight": packed(E4M3, 16, 32), "a.weight_scale": a_scale(()),
                 "a.pre_quant_scale": a_scale((32,))},
    "scales apart": {"layers.0.a.weight": packed(torch.int8, 16, 32),
                     "scales.layers.0.a": a_scale((16,))},
    "scales beside the module": {"layers.0.a.weight": packed(torch.int8, 16, 32),
                                 "layers.0.a_scale": a_scale((16,))},
    "no module": {"w": packed(torch.int8, 16, 32), "w_s": a_scale((16,))},
}  # fmt: skip


@pytest.mark.parametrize("tool", OTHERS)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_layouts_of_other_tools_are_refused_by_name(tmp_path, tool, kind):
    stored = OTHERS[tool] | {"a.bias": torch.zeros(16), "norm.weight": torch.ones(32)}
    message = refusal(opened(tmp_path, stored, kind=kind))
    assert any(f"tensor {name!r}" in message for name in OTHERS[tool]), message
    assert "quantised from instead" in message


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_other_codes_of_a_header_are_refused_by_name(tmp_path, code):
    entry = {"dtype": code, "shape": [2], "data_offsets": [0, 2]}
    header = json.dumps({"a.weight_scale": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(OutlierMergeError, match=f"'a.weight_scale': unknown dtype '{code}'.* Name"):
        open_checkpoint(path)


def blob(**values: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def comfy(codes: torch.Tensor, scale: torch.Tensor, form: str, **conf) -> tuple[dict, dict | None]:
    """Return a layer as ComfyUI stores it: old, with a tensor of its own, or with the header's."""
    stored = {"m.a.weight": codes, "m.a.bias": torch.ones(len(codes)).half()}
    if form == "marker":
        marker = {"m.scaled_fp8": torch.zeros(2).to(codes.dtype)}
        return stored | {"m.a.scale_weight": scale, "m.a.scale_input": torch.ones(1)} | marker, None
    stored |= {"m.a.weight_scale": scale, "m.a.input_scale": torch.ones(())}
    conf = {"format": str(codes.dtype).removeprefix("torch."), **conf}
    if form == "tensor":
        return stored | {"m.a.comfy_quant": blob(**conf)}, None
    layers = {"format_version": "1.0", "layers": {"m.a": conf}}
    return stored, {"_quantization_metadata": json.dumps(layers)}


@pytest.mark.parametrize("kind", ["file", "folder", "config", "pipeline"])
@pytest.mark.parametrize("form", ["marker", "tensor", "header"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("shape", [(R, C), (8, 3, 3, 3)])
def test_comfyui_layouts_are_dequantised(tmp_path, kind, form, dtype, shape):
    codes, scale = codes_of(dtype, shape), a_scale((1,))
    stored, metadata = comfy(codes, scale, form, full_precision_matrix_mult=True)
    result = dequantize(opened(tmp_path, stored, metadata=metadata, kind=kind))
    prefix = "unet/" if kind == "pipeline" else ""
    assert set(result.tensors) == {f"{prefix}m.a.weight", f"{prefix}m.a.bias"}
    source = result.tensors[f"{prefix}m.a.weight"]
    assert (source.shape, source.out_dtype.name) == (shape, "float16")
    assert_close(read(source), product(codes, scale))
    assert "1 weights quantised with ComfyUI's" in result.notes[-1]


@pytest.mark.parametrize("form", ["tensor", "header"])
@pytest.mark.parametrize(("shape", "fine"), [((), True), ((R, 1), True), ((2, 4), False)])
def test_comfyui_int8_is_read_where_its_format_is_a_product(tmp_path, form, shape, fine):
    codes, scale = codes_of(torch.int8), a_scale(shape)
    stored, metadata = comfy(codes, scale, form, format="int8_tensorwise", convrot=False)
    checkpoint = opened(tmp_path, stored, metadata=metadata)
    if fine:
        assert_close(read(dequantize(checkpoint).tensors["m.a.weight"]), product(codes, scale))
    else:
        assert "tensor 'm.a.weight_scale': float32 (2, 4) as the scale of" in refusal(checkpoint)


@pytest.mark.parametrize("form", ["tensor", "header"])
@pytest.mark.parametrize(
    ("dtype", "conf", "message"),
    [
        (
            torch.int8,
            {"format": "int8_tensorwise", "convrot": True},
            "int8_tensorwise with convrot",
        ),
        (torch.uint8, {"format": "nvfp4"}, "layout nvfp4, with uint8 codes"),
        (E4M3, {"format": "mxfp8"}, "layout mxfp8, with float8_e4m3fn codes"),
        (E4M3, {"format": "tomorrow"}, "layout tomorrow"),
        (E5M2, {"format": "float8_e4m3fn"}, "float8_e4m3fn, with float8_e5m2 codes"),
        (torch.bfloat16, {"format": "float8_e4m3fn"}, "float8_e4m3fn, with bfloat16 codes"),
        (E4M3, {"num_experts": 4}, "with num_experts"),
    ],
)
def test_other_comfyui_formats_are_refused_by_name(tmp_path, form, dtype, conf, message):
    stored, metadata = comfy(codes_of(dtype), a_scale(()), form, **conf)
    text = refusal(opened(tmp_path, stored, metadata=metadata))
    assert "tensor 'm.a.weight': quantised in ComfyUI's layout" in text and message in text


@pytest.mark.parametrize("text", [b"{", b"[1]", b"null", b"\xff\xfe"])
def test_a_comfyui_format_that_cannot_be_parsed_is_refused(tmp_path, text):
    stored, _ = comfy(codes_of(E4M3), a_scale(()), "tensor")
    stored["m.a.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    assert "tensor 'm.a.weight': quantised in ComfyUI's layout" in refusal(opened(tmp_path, stored))


def test_a_header_that_names_layers_of_another_file_is_refused(tmp_path):
    layers = json.dumps({"layers": {"b": {"format": "float8_e4m3fn"}}})
    stored, _ = comfy(codes_of(E4M3), a_scale(()), "header")
    text = refusal(opened(tmp_path, stored, metadata={"_quantization_metadata": layers}))
    assert "names b, which it does not have" in text


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"layers": [1]}'])
def test_a_header_that_cannot_be_parsed_is_refused(tmp_path, text):
    stored, _ = comfy(codes_of(E4M3), a_scale(()), "header")
    message = refusal(opened(tmp_path, stored, metadata={"_quantization_metadata": text}))
    assert "_quantization_metadata that is no JSON object with layers" in message


@pytest.mark.parametrize("dtype", [torch.int8, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("shape", [(R, C), (8, 3, 3, 3)])
def test_quanto_weights_are_dequantised_under_their_own_names(tmp_path, dtype, shape):
    codes, scale = codes_of(dtype, shape), a_scale((shape[0], *[1] * (len(shape) - 1)))
    activations = {
        f"{m}.{s}_scale": torch.ones(()) for m in ("a", "n") for s in ("input", "output")
    }
    stored = {
        "a.weight._data": codes,
        "a.weight._scale": scale.bfloat16(),
        "n.weight": torch.ones(4),
    }
    result = dequantize(opened(tmp_path, stored | activations, kind="config"))
    assert set(result.tensors) == {"a.weight", "n.weight"}
    assert result.tensors["a.weight"].out_dtype.name == "float32"
    assert_close(read(result.tensors["a.weight"]), product(codes, scale.bfloat16()))


@pytest.mark.parametrize(
    ("quantization", "more"),
    [
        ({"quant_method": "fbgemm_fp8"}, {"a.input_scale_ub": torch.ones(1)}),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
         {"a.input_scale": torch.ones(()), "attn.k_proj.k_scale": torch.ones(())}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (R, 1)])
def test_declared_scales_are_read(tmp_path, quantization, more, shape):
    codes, scale = codes_of(E4M3), a_scale(shape)
    opened(tmp_path, {"a.weight": codes, "a.weight_scale": scale} | more)
    config = {"quantization_config": quantization, "dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = dequantize(open_checkpoint(tmp_path))
    assert list(result.tensors) == ["a.weight"]
    assert result.tensors["a.weight"].out_dtype.name == "float16"
    assert_close(read(result.tensors["a.weight"]), product(codes, scale))


def test_what_stands_beside_a_config_of_a_quantised_model_stays_behind(tmp_path):
    opened(tmp_path, {"a.weight": codes_of(E4M3), "a.weight_scale": a_scale(()),
                      "a.k_scale": torch.ones(())}, kind="config")  # fmt: skip
    settings = {"producer": {}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(settings))
    result = dequantize(open_checkpoint(tmp_path))
    assert list(result.tensors) == ["a.weight"]
    assert result.sidecars == ("config.json",)
    assert "hf_quant_config.json" in result.left_behind


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"n.weight": torch.ones(3).half()}, "float16"),
        ({"n.weight": torch.ones(3)}, "float32"),
        ({"n.weight": torch.ones(3), "m.weight": torch.ones(3).half()}, "bfloat16"),
        ({}, "bfloat16"),
    ],
)
def test_without_a_config_weights_are_stored_as_the_other_floats(tmp_path, others, expected):
    stored = {"a.weight": codes_of(E4M3), "a.weight_scale": a_scale(())}
    result = dequantize(opened(tmp_path, stored | others))
    assert result.tensors["a.weight"].out_dtype.name == expected


CAST = {
    "cast as a whole": {
        "a.weight": codes_of(E4M3), "a.bias": codes_of(E4M3, (R,)),
        "n.weight": codes_of(E4M3, (C,)), "n.bias": codes_of(E4M3, (C,)),
        "logit_scale": codes_of(E4M3, ()),
        "text_projection": codes_of(E4M3), "v.class_embedding": codes_of(E4M3, (C,)),
        "v.pos_embed": codes_of(E4M3, (1, 9, C)), "b.scale_shift_table": codes_of(E4M3, (6, C)),
        "n2.scale": codes_of(E4M3, (C,)), "attn.null_kv": codes_of(E4M3, (2, C)),
        "attn.q_scale": codes_of(E4M3, (C,)),
    },
    "biases and norms kept": {
        "a.weight": codes_of(E5M2), "a.bias": torch.ones(R).half(), "n.weight": torch.ones(C),
        "attn.in_proj_weight": codes_of(E5M2), "attn.in_proj_bias": torch.ones(R),
        "ls.weight": codes_of(E5M2), "ls.gamma": torch.ones(R), "te.weight": codes_of(E5M2),
        "te.layer_norm_weight": torch.ones(C), "e.weight": codes_of(E5M2),
        "e.embed_scale": torch.ones(1), "gate.weight": codes_of(E5M2),
        "gate.e_score_correction_bias": torch.ones(R), "conv.weight_v": codes_of(E5M2),
        "conv.weight_g": torch.ones(R, 1), "logit_scale": torch.ones(()),
        "text_projection": codes_of(E5M2), "b.attn.logit_scale": torch.ones(4, 1, 1),
        "b.attn.qkv.weight": codes_of(E5M2), "b.gamma": torch.ones(C),
        "b.attn.k_norm.weight": torch.ones(C), "pe.position_embedding": codes_of(E5M2),
        "pe.class_embedding": torch.ones(C),
    },
}  # fmt: skip
BUFFERS = {
    "embeddings.position_ids": torch.arange(256)[None], "embeddings.token_type_ids":
    torch.zeros(1, 256, dtype=torch.int64), "embeddings.class_embedding": torch.ones(C),
    "embeddings.position_embedding.weight": torch.ones(256, C),
    "bn.num_batches_tracked": torch.tensor(3), "bn.weight": torch.ones(4),
    "bn.running_mean": torch.ones(4), "h.attn.bias": torch.ones(1, 1, 8, 8).to(torch.uint8),
    "h.attn.masked_bias": torch.tensor(-1e4), "h.attn.c_attn.weight": torch.ones(8, 8),
    "swin.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
    "swin.relative_position_bias_table": torch.ones(49, 4), "swin.logit_scale": torch.ones(4, 1, 1),
    "te.weight": torch.ones(8, 8), "te._extra_state": torch.ones(64, dtype=torch.uint8),
    "te.bias": torch.ones(8), "attn.attention_mask": torch.ones(8, 8, dtype=torch.bool),
    "attn.causal_mask": torch.ones(8, 8, dtype=torch.uint8), "attn.scale": torch.ones(1),
    "q.weight": torch.ones(8, 8), "q.weight_fake_quant.scale": torch.ones(8),
    "q.weight_fake_quant.zero_point": torch.zeros(8, dtype=torch.int32),
    "q.weight_fake_quant.fake_quant_enabled": torch.ones(1, dtype=torch.uint8),
    "fsq.implicit_codebook": torch.ones(64, 3), "fsq._levels": torch.ones(3, dtype=torch.int32),
    "spiece_model": torch.ones(64, dtype=torch.uint8), "logit_scale": torch.ones(()),
    "lone.weight": torch.ones(8, 8, dtype=torch.int8),
    "gate.tid2eid": torch.ones(64, 2, dtype=torch.int64), "gate.weight": torch.ones(4, 8),
    "table.ids": torch.ones(8, 2, dtype=torch.int32),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["file", "folder", "config", "pipeline"])
@pytest.mark.parametrize("stored", [*CAST.values(), BUFFERS], ids=[*CAST, "buffers"])
def test_plain_casts_and_ordinary_buffers_stay_as_they_are(tmp_path, stored, kind):
    checkpoint = opened(tmp_path, stored, kind=kind)
    assert dequantize(checkpoint) is checkpoint


def test_codes_in_a_pickle_are_found_too(tmp_path):
    stored = {"a.weight": codes_of(E4M3), "a.scale_weight": a_scale((1,))}
    torch.save(stored, tmp_path / "model.pt")
    source = dequantize(open_checkpoint(tmp_path / "model.pt")).tensors["a.weight"]
    assert_close(read(source), product(*stored.values()))
    torch.save(stored | {"a.foo": a_scale((R,))}, tmp_path / "other.pt")
    assert "tensor 'a.weight'" in refusal(open_checkpoint(tmp_path / "other.pt"))


@pytest.mark.parametrize("kind", ["llama", "bert", "llava", "mixtral"])
def test_models_of_transformers_cast_to_float8_stay_as_they_are(tmp_path, kind):
    save_model(kind, tmp_path / "whole", dtype=torch.float32)
    state = load_folder(tmp_path / "whole")
    for name, keeps_vectors in (("all", False), ("matrices", True)):
        stored = {
            key: value.to(E4M3)
            if value.is_floating_point() and not (keeps_vectors and value.ndim < 2)
            else value
            for key, value in state.items()
        }
        checkpoint = opened(tmp_path / name, stored)
        assert dequantize(checkpoint) is checkpoint


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_values_do_not_depend_on_how_they_are_read(tmp_path_factory, data):
    shape = data.draw(st.sampled_from([(R, C), (5, 3, 4), (7, 6), (3, 2, 2, 2)]))
    groups = data.draw(st.sampled_from([0, 1, 2])) if len(shape) == 2 else 1
    scale_shape = {0: (), 1: (shape[0], *[1] * (len(shape) - 1))}.get(groups, (shape[0], groups, 1))
    dtype = data.draw(st.sampled_from([E4M3, E5M2]))
    codes, scale = codes_of(dtype, shape), a_scale(scale_shape)
    stored = {"a.weight": codes, "a.scale_weight": scale}
    source = dequantize(opened(tmp_path_factory.mktemp("m"), stored)).tensors["a.weight"]
    start = data.draw(st.integers(0, codes.numel()))
    stop = data.draw(st.integers(start, codes.numel()))
    with Reader() as reader:
        found = reader.values(source, start, stop)
    assert_close(found, product(codes, scale).flatten()[start:stop])


@pytest.mark.parametrize("form", ["marker", "tensor", "header"])
@pytest.mark.parametrize("quantised", [("base",), ("task",), ("base", "task")])
def test_a_merge_takes_the_weights_by_their_names(tmp_path, form, quantised):
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(R, C, dtype=torch.float64)
    for name in ("base", "task"):
        values = torch.randn(R, C, generator=generator) * 0.02
        bias = {"m.a.bias": torch.ones(R).half()}
        if name in quantised:
            scale = (values.abs().max() / 448).reshape(1)
            stored, metadata = comfy((values / scale).to(E4M3), scale, form)
            expected += product(stored["m.a.weight"], scale) / 2
        else:
            stored, metadata = {"m.a.weight": values} | bias, None
            expected += values.double() / 2
        save_file(stored, tmp_path / f"{name}.safetensors", metadata=metadata)
    models = [{"model": str(tmp_path / f"{name}.safetensors")} for name in ("base", "task")]
    spec = {"merge_method": "linear", "models": models, "out_dtype": "float32"}
    output = outliermerge.run(spec, output=tmp_path / "out.safetensors").output
    found = load_file(output)
    assert set(found) == {"m.a.weight", "m.a.bias"}
    torch.testing.assert_close(found["m.a.weight"].double(), expected, rtol=1e-6, atol=1e-9)
    assert "_quantization_metadata" not in output.read_bytes().decode("latin-1")


def test_an_output_says_nowhere_that_it_is_quantised(tmp_path):
    base, task = tmp_path / "base", tmp_path / "task"
    for folder in (base, task):
        opened(folder, {"a.weight": codes_of(E4M3), "a.weight_scale": a_scale((R, 1))})
        config = {"model_type": "test", "dtype": "float16"}
        (folder / "config.json").write_text(
            json.dumps(config | {"quantization_config": {"quant_method": "fbgemm_fp8"}})
        )
        (folder / "quantize_config.json").write_text("{}")
    spec = {"merge_method": "linear", "models": [{"model": str(base)}, {"model": str(task)}]}
    output = outliermerge.run(spec, output=tmp_path / "out").output
    assert json.loads((output / "config.json").read_text()) == config
    assert not (output / "quantize_config.json").exists()
    found = load_folder(output)
    expected = product(codes_of(E4M3), a_scale((R, 1)))
    torch.testing.assert_close(found["a.weight"].double(), expected, rtol=1e-3, atol=1e-7)
    assert outliermerge.verify(output) == []
