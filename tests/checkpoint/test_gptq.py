"""GPTQ and AWQ: packed here bit by bit, as the formats define it, and multiplied out in float64."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import PLAIN, checkpoint, read

from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.quantized.opened import dequantize
from outliermerge.checkpoint.reader import Reader
from outliermerge.errors import OutlierMergeError

IN, OUT, GROUP = 64, 48, 16
# Where autoawq puts eight neighbouring columns in a word, from the lowest bits on.
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


def words(codes: list[list[int]], bits: int, places: list[int] | None = None) -> torch.Tensor:
    """Pack each row of codes into whole numbers of 32 bits."""
    if bits == 3:  # 32 codes fill three words
        return torch.tensor([_three_bits(row) for row in codes], dtype=torch.int32)
    number = 32 // bits
    places = places or list(range(number))
    rows = []
    for row in codes:
        packed = []
        for start in range(0, len(row), number):
            part = row[start : start + number]
            word = sum(code << bits * place for code, place in zip(part, places, strict=True))
            packed.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.int32)


def _three_bits(row: list[int]) -> list[int]:
    packed = []
    for start in range(0, len(row), 32):
        whole = sum(code << 3 * place for place, code in enumerate(row[start : start + 32]))
        packed += [whole >> 32 * n & 0xFFFFFFFF for n in range(3)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in packed]


def codes_of(*shape: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=generator)


def model(
    kind: str, bits: int, order: torch.Tensor | None = None, width: int = OUT, rows: int = IN
):
    """Return the tensors of a layer, and its weight (out, in) in float64.

    Args:
        kind: "gptq" (zero points less 1), "gptq_v2" or "awq".
        order: the group of each input.
    """
    codes = codes_of(rows, width, bits=bits, seed=0)  # (in, out)
    zeros = codes_of(rows // GROUP, width, bits=bits, seed=1)
    scales = (
        torch.rand(rows // GROUP, width, generator=torch.Generator().manual_seed(2)) / 50
    ).half()
    groups = torch.arange(rows) // GROUP if order is None else order
    if kind == "gptq":
        zeros = zeros.clamp(min=1)
    weight = (codes - zeros[groups]).double() * scales[groups].double()
    if kind == "awq":
        qweight = words(codes.tolist(), bits, AWQ_PLACES)
        qzeros = words(zeros.tolist(), bits, AWQ_PLACES)
    else:
        qweight = words(codes.T.tolist(), bits).T.contiguous()
        qzeros = words((zeros - int(kind == "gptq")).tolist(), bits)
    stored = {"a.qweight": qweight, "a.qzeros": qzeros, "a.scales": scales}
    return stored, weight.T


def config(kind: str, bits: int = 4, **more) -> dict:
    if kind == "awq":
        return {"quant_method": "awq", "bits": bits, "group_size": GROUP, "version": "gemm",
                "zero_point": True, **more}  # fmt: skip
    layout = {} if kind == "gptq" else {"checkpoint_format": kind}
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, **layout, **more}


KINDS = [
    ("gptq", 2),
    ("gptq", 3),
    ("gptq_v2", 3),
    ("gptq", 4),
    ("gptq", 8),
    ("gptq_v2", 4),
    ("awq", 4),
]


@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_weights_are_what_the_format_says(tmp_path, kind, bits):
    stored, expected = model(kind, bits, width=64)
    plain = PLAIN | {"a.bias": torch.ones(64)}
    opened = dequantize(checkpoint(tmp_path, stored | plain, config(kind, bits), dtype="float16"))
    source = opened.tensors["a.weight"]
    assert set(opened.tensors) == {"a.weight", *plain}
    assert (source.shape, source.out_dtype.name) == ((64, IN), "float16")
    assert torch.equal(read(source).double(), expected)  # a product of so few bits is exact


def test_groups_may_be_in_any_order(tmp_path):
    order = (torch.arange(IN) // GROUP)[
        torch.randperm(IN, generator=torch.Generator().manual_seed(3))
    ]
    stored, expected = model("gptq", 4, order)
    stored["a.g_idx"] = order.int()
    opened = dequantize(checkpoint(tmp_path, stored, config("gptq", desc_act=True)))
    assert list(opened.tensors) == ["a.weight"]
    assert torch.equal(read(opened.tensors["a.weight"]).double(), expected)


def test_zero_points_of_zero_borrow_from_the_next_one_in_version_1(tmp_path):
    stored, _ = model("gptq_v2", 4)
    zeros = stored["a.qzeros"].long() - 0x11111111
    first, _ = model("gptq_v2", 4)
    first["a.qzeros"] = ((zeros + (1 << 31)) % (1 << 32) - (1 << 31)).int()
    both = [
        dequantize(checkpoint(tmp_path / kind, tensors, config(kind))).tensors["a.weight"]
        for kind, tensors in (("gptq", first), ("gptq_v2", stored))
    ]
    assert torch.equal(*map(read, both))


def test_gptqmodel_takes_its_own_numbers_off_zero_points_of_3_bits(tmp_path):
    stored, expected = model("gptq_v2", 3, width=64)
    less = torch.tensor([0x24924924, 0x92492492, 0x49249249] * 2)
    words = stored["a.qzeros"].long() - less
    stored["a.qzeros"] = ((words + (1 << 31)) % (1 << 32) - (1 << 31)).int()
    said = config("gptq", 3, meta={"quantizer": ["gptqmodel:5.0.0"]})
    opened = dequantize(checkpoint(tmp_path, stored, said))
    assert torch.equal(read(opened.tensors["a.weight"]).double(), expected)


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": GROUP, "desc_act": False}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": GROUP, "zero_point": True,
                               "version": "GEMM"}, "awq"),
    ],
)  # fmt: skip
def test_settings_may_be_in_a_file_of_their_own(tmp_path, file, content, kind):
    stored, expected = model(kind, 4)
    checkpoint(tmp_path, stored)
    (tmp_path / file).write_text(json.dumps(content))
    opened = dequantize(open_checkpoint(tmp_path))
    assert torch.equal(read(opened.tensors["a.weight"]).double(), expected)
    assert file in opened.left_behind and file not in opened.sidecars


def test_layers_may_have_other_bits_where_the_config_says_so(tmp_path):
    (four, expected), (eight, _) = model("gptq", 4), model("gptq", 8)
    stored = four | {name.replace("a.", "b."): value for name, value in eight.items()}
    said = config("gptq", dynamic={"+:b": {"bits": 8}})
    opened = dequantize(checkpoint(tmp_path, stored, said))
    assert torch.equal(read(opened.tensors["a.weight"]).double(), expected)
    assert torch.equal(read(opened.tensors["b.weight"]).double(), model("gptq", 8)[1])


GPTQ, AWQ = model("gptq", 4)[0], model("awq", 4)[0]
INTS = torch.ones(8, 48, dtype=torch.int32)


@pytest.mark.parametrize(
    ("stored", "said", "name", "message"),
    [
        (GPTQ | {"a.scales": None}, config("gptq"), "a.qweight", "its scales is missing"),
        (GPTQ | {"a.qzeros": None}, config("gptq"), "a.qweight", "its qzeros is missing"),
        (GPTQ | {"a.qweight": None}, config("gptq"), "a.qzeros", "is no part of a complete"),
        (GPTQ | {"a.weight": torch.ones(4, 4)}, config("gptq"), "a.qweight", "stored beside"),
        (GPTQ | {"a.qweight": INTS.float()}, config("gptq"), "a.qweight",
         "qweight float32 (8, 48), qzeros int32 (4, 6), scales float16 (4, 48)"),
        (GPTQ | {"a.scales": torch.ones(3, 48)}, config("gptq"), "a.qweight", "do not fit"),
        (GPTQ | {"a.scales": torch.ones(4, 47)}, config("gptq"), "a.scales",
         "(4, 47), expected (4, 48)"),
        (GPTQ | {"a.qzeros": INTS[:4, :5]}, config("gptq"), "a.qweight", "matrices of 4 bits"),
        (GPTQ, config("gptq", bits=8), "a.qweight", "matrices of 8 bits"),
        (GPTQ | {"a.g_idx": torch.ones(63, dtype=torch.int32)}, config("gptq"), "a.g_idx",
         "int32 (63,), expected int32 (64,)"),
        (AWQ | {"a.qzeros": INTS[:4, :5]}, config("awq"), "a.qweight", "do not fit together"),
        (AWQ | {"a.scales": torch.ones(4, 40)}, config("awq"), "a.qweight", "do not fit together"),
        (AWQ | {"a.qweight": INTS[:0]}, config("awq"), "a.qweight", "do not fit together"),
        (AWQ | {"a.scales": torch.ones(4, 48, dtype=torch.int32)}, config("awq"), "a.qweight",
         "int32 and floats"),
    ],
)  # fmt: skip
def test_broken_tensors_are_refused_by_name(tmp_path, stored, said, name, message):
    kept = {name: value for name, value in stored.items() if value is not None}
    with pytest.raises(OutlierMergeError) as error:
        dequantize(checkpoint(tmp_path, kept, said))
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'model.safetensors'}: tensor {name!r}: ")
    assert message in text


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (config("gptq", checkpoint_format="marlin"), "checkpoint_format 'marlin' cannot be read"),
        (config("gptq", checkpoint_format=["gptq"]), "checkpoint_format ['gptq'] cannot be read"),
        (config("gptq", bits=5), "GPTQ of 5 bits cannot be read (2, 3, 4, 8 can)"),
        (config("gptq", bits="4"), "GPTQ of '4' bits cannot be read"),
        (config("awq", version="gemv"), "AWQ's version 'gemv' with 4 bits"),
        (config("awq", bits=8), "AWQ's version 'gemm' with 8 bits"),
        (config("awq", zero_point=False), "and zero_point: False cannot be read"),
    ],
)
def test_other_versions_are_refused_by_name(tmp_path, said, message):
    with pytest.raises(OutlierMergeError) as error:
        dequantize(checkpoint(tmp_path, GPTQ, said))
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'config.json'}: quantization_config: ")
    assert message in text and "quantised from instead" in text


def test_groups_that_are_not_there_are_refused_as_they_are_read(tmp_path):
    stored = GPTQ | {"a.g_idx": torch.full((IN,), 4, dtype=torch.int32)}
    source = dequantize(checkpoint(tmp_path, stored, config("gptq"))).tensors["a.weight"]
    with pytest.raises(OutlierMergeError, match=r"'a.g_idx': has the groups 4 to 4, expected 0 to"):
        read(source)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Return tensors of several groups of rows, and their values."""
    found = []
    for kind in ("gptq", "awq"):
        stored, expected = model(kind, 4, width=160, rows=512)
        folder = tmp_path_factory.mktemp(kind)
        opened = dequantize(checkpoint(folder, stored, config(kind)))
        found.append((opened.tensors["a.weight"], expected.flatten()))
    return found


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_values_do_not_depend_on_how_they_are_read(large, data):
    source, whole = data.draw(st.sampled_from(large))
    start = data.draw(st.integers(0, source.num_elements))
    stop = data.draw(st.integers(start, source.num_elements))
    with Reader(held_bytes=data.draw(st.sampled_from([0, 1 << 30]))) as reader:
        assert torch.equal(reader.values(source, start, stop).double(), whole[start:stop])
