"""Buffers in other dtypes: copied where the values are equal, else decided by `unequal`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder, save_tensors

import outliermerge
from outliermerge.checkpoint.sources import DTYPES
from outliermerge.errors import OutlierMergeError
from outliermerge.execution.exact import same_values

INTS = (torch.int64, torch.int32, torch.uint8, torch.bool)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
PAIRS = [
    (one, other)
    for one, other in itertools.permutations((*INTS, *FLOATS), 2)
    if not (one.is_floating_point and other.is_floating_point)
]
BUFFER = "embeddings.position_ids"


def values(dtype: torch.dtype, *, changed: bool = False) -> torch.Tensor:
    stored = torch.tensor([[1, 0, 1, 1]])
    if changed:
        stored[0, -1] = 0
    return stored.to(dtype)


def spec_of(folder: Path, buffers: dict[str, torch.Tensor], *, base: str = "base", **keys: Any):
    for number, (name, buffer) in enumerate(buffers.items()):
        save_tensors(folder / name, {"w": torch.full((3,), float(number)), BUFFER: buffer})
    models = [{"model": str(folder / name)} for name in buffers if name != base]
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / base),
        "models": models,
    } | keys


def merged(spec: dict[str, Any], output: Path) -> torch.Tensor:
    done = outliermerge.run(spec, output=output).output
    assert outliermerge.verify(done) == []
    return load_folder(done)[BUFFER]


def refused(spec: dict[str, Any], output: Path) -> str:
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.run(spec, output=output)
    assert not output.exists()
    return str(caught.value)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("unequal", [None, "error", "base"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_equal_values_are_written_as_the_base_has_them(dtypes, unequal, tmp_path):
    buffers = {"base": values(dtypes[0]), "same": values(dtypes[0]), "task": values(dtypes[1])}
    spec = spec_of(tmp_path, buffers, **({} if unequal is None else {"unequal": unequal}))
    if unequal != "base":
        assert any(BUFFER in note and "buffer" in note for note in outliermerge.plan(spec).notes)
    found = merged(spec, tmp_path / "out")
    assert found.dtype == dtypes[0]
    assert torch.equal(found, values(dtypes[0]))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("which", ["base", "first", "second"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_values_that_differ_are_decided_by_the_policy(dtypes, which, tmp_path):
    buffers = {
        name: values(dtypes[name == which], changed=name == which)
        for name in ("base", "first", "second")
    }
    message = refused(spec_of(tmp_path, buffers), tmp_path / "out")
    assert "its dtype and its values differ" in message and "`unequal: base`" in message
    for name, buffer in buffers.items():
        assert f"{tmp_path / name} ({str(buffer.dtype).removeprefix('torch.')})" in message
    for policy in ("base", [{"filter": "position_ids", "value": "base"}]):
        found = merged(spec_of(tmp_path, buffers, unequal=policy), tmp_path / f"out{policy}"[:60])
        assert found.dtype == buffers["base"].dtype
        assert torch.equal(found, buffers["base"])


def test_a_float_buffer_of_the_base_is_not_rounded_to_the_outputs_dtype(tmp_path):
    ids = torch.arange(300)[None]
    buffers = {"base": ids.half(), "task": ids}
    found = merged(spec_of(tmp_path, buffers, out_dtype="bfloat16"), tmp_path / "out")
    assert found.dtype == torch.float16 and torch.equal(found.long(), ids)


def test_weights_that_a_model_has_as_integers_are_no_buffer(tmp_path):
    weight = torch.tensor([[0.25, -1.5, 2.0]])
    buffers = {"base": weight, "task": weight.int()}
    message = refused(spec_of(tmp_path, buffers), tmp_path / "out")
    assert "a weight with fractions in one model and integers in another" in message
    assert "unequal" not in message


@pytest.mark.parametrize("unequal", ["error", "base"])
@pytest.mark.parametrize("in_base", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_of_a_quantised_weight_are_no_buffer(dtype, in_base, unequal, tmp_path):
    pair = [torch.ones(4, 4), torch.ones(4, 4).to(dtype)]
    buffers = dict(zip(("base", "task"), pair[::-1] if in_base else pair, strict=True))
    message = refused(spec_of(tmp_path, buffers, unequal=unequal), tmp_path / "out")
    assert "1 tensor(s) of another shape or kind" in message


def test_extra_buffers_are_compared_by_value_too(tmp_path):
    for number, name in enumerate(("base", "first", "second")):
        own = {"base": {}, "first": {"n": torch.arange(3)}, "second": {"n": torch.arange(3.0)}}
        save_tensors(tmp_path / name, {"w": torch.full((3,), float(number))} | own[name])
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [str(tmp_path / name) for name in ("first", "second")],
        "extra": "copy",
    }
    spec["models"] = [{"model": model} for model in spec["models"]]
    done = outliermerge.run(spec, output=tmp_path / "out").output
    assert torch.equal(load_folder(done)["n"], torch.arange(3))
    save_tensors(tmp_path / "second", {"w": torch.ones(3), "n": torch.ones(3)})
    with pytest.raises(OutlierMergeError, match="Give `extra: copy` to one of them"):
        outliermerge.run(spec, output=tmp_path / "again")


def test_long_buffers_are_compared_to_their_end(tmp_path):
    flags = torch.zeros(1, 300_001, dtype=torch.int64)
    buffers = {"base": flags, "task": flags.float()}
    assert torch.equal(merged(spec_of(tmp_path, buffers), tmp_path / "out"), flags)
    buffers["task"][0, -1] = 1
    assert "values differ" in refused(spec_of(tmp_path, buffers), tmp_path / "again")


BIG = 2**53
NUMBERS = [
    # dtype and values of one, of the other, whether they are equal
    ("int64", [BIG + 1], "float64", [float(BIG)], False),
    ("int64", [BIG], "float64", [float(BIG)], True),
    ("int64", [2**63 - 1], "float64", [2.0**63], False),
    ("int64", [-(2**63)], "float64", [-(2.0**63)], True),
    ("int64", [-(2**63)], "float32", [-(2.0**63)], True),
    ("uint64", [2**63], "float64", [2.0**63], True),
    ("uint64", [2**64 - 1], "int64", [-1], False),
    ("uint64", [2**64 - 1], "float64", [2.0**64], False),
    ("uint64", [2**63 + 2**20], "float64", [2.0**63 + 2.0**20], True),
    ("int32", [1], "float16", [1.5], False),
    ("int32", [0], "float32", [-0.0], True),
    ("int32", [0], "float32", [float("nan")], False),
    ("int64", [2**63 - 1], "float32", [float("inf")], False),
    ("bool", [True, False], "uint8", [1, 0], True),
    ("bool", [True], "int8", [2], False),
    ("float16", [1.5, float("nan")], "float32", [1.5, float("nan")], True),
    ("float16", [0.1], "float32", [0.1], False),
    ("complex64", [1 + 0j], "float32", [1.0], True),
    ("complex64", [1 + 1j], "float32", [1.0], False),
]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("one", "a", "other", "b", "equal"), NUMBERS)
def test_numbers_of_any_two_dtypes_are_compared_exactly(one, a, other, b, equal, swapped):
    def raw(name: str, numbers: list[Any]) -> memoryview:
        tensor = torch.tensor(numbers, dtype=getattr(torch, name))
        return memoryview(bytearray(tensor.view(torch.uint8).numpy().tobytes()))

    sides = [(DTYPES[one], raw(one, a)), (DTYPES[other], raw(other, b))]
    (x, raw_x), (y, raw_y) = sides[::-1] if swapped else sides
    assert same_values(x, raw_x, y, raw_y) == equal


MAPS = {
    "d2t": (torch.arange(3), torch.tensor([0, 2, 1]), 3),
    "draft.d2t": (torch.arange(3).int(), torch.tensor([0, 2, 1]).int(), 5),
    "t2d": (torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False]), 3),
    "model.kept_rows": (torch.arange(6), torch.arange(6).flip(0), 6),
    "gate.tid2eid": (torch.zeros(6, 2).long(), torch.ones(6, 2).long(), 6),
    "embed.id_map": (torch.arange(9), torch.arange(9).flip(0), 6),
}


def map_spec(folder: Path, buffers: list[torch.Tensor], name: str, rows: int, **keys: Any):
    for number, buffer in enumerate(buffers):
        weight = torch.full((rows, 2), float(number))
        save_tensors(folder / f"m{number}", {"lm_head.weight": weight, name: buffer})
    models = [{"model": str(folder / f"m{number}")} for number in range(1, len(buffers))]
    base = {"base_model": str(folder / "m0"), "merge_method": "task_arithmetic"}
    return {"models": models, **base, **keys}


@pytest.mark.parametrize("keys", [{}, {"unequal": "base"}], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_a_map_of_rows_is_never_another_models(tmp_path, name, keys):
    one, other, rows = MAPS[name]
    message = refused(map_spec(tmp_path, [one, other], name, rows, **keys), tmp_path / "out")
    assert f"tensor {name!r}" in message and "vocabularies differ" in message
    assert "`unequal: base`" not in message
    output = outliermerge.run(
        map_spec(tmp_path / "equal", [one, one], name, rows, **keys), output=tmp_path / "same"
    ).output
    assert torch.equal(load_folder(output)[name], one)


def test_maps_of_other_lengths_are_refused_under_every_policy(tmp_path):
    spec = map_spec(tmp_path, [torch.arange(3), torch.arange(4)], "d2t", 3, unequal="base")
    assert "d2t: int64 [3]" in refused(spec, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["embeddings.position_ids", "bn.num_batches_tracked", "mask", "row_count", "phases"]
)
def test_places_counts_and_masks_are_still_decided_by_unequal(tmp_path, name):
    one, other = torch.arange(6), torch.arange(6).flip(0)
    if name == "bn.num_batches_tracked":
        one, other = torch.tensor(3), torch.tensor(4)
    if name == "phases":  # complex numbers map nothing
        one, other = one.to(torch.complex64), other.to(torch.complex64)
    if name == "mask":
        one, other = torch.ones(6, 6).bool(), torch.zeros(6, 6).bool()
    assert "`unequal: base`" in refused(map_spec(tmp_path, [one, other], name, 6), tmp_path / "out")
    spec = map_spec(tmp_path / "base", [one, other], name, 6, unequal="base")
    output = outliermerge.run(spec, output=tmp_path / "out").output
    assert torch.equal(load_folder(output)[name], one)


COMPUTED = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.tensor([1.0, 0.1]),
    "bert.embeddings.position_ids": torch.arange(4)[None],
    "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(),
    "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("holders", [("base",), ("task",), ("base", "other"), ("task", "other")])
@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_what_a_class_computes_may_be_in_some_models_only(method, holders, name, tmp_path):
    """Older transformers stored these; a fine-tune saved today has none of them."""
    for number, model in enumerate(("base", "task", "other")):
        own = {name: COMPUTED[name]} if model in holders else {}
        save_tensors(tmp_path / model, {"w": torch.full((3,), float(number)), **own})
    base, task, other = (str(tmp_path / model) for model in ("base", "task", "other"))
    models = [base, task, other] if method == "linear" else [task, other]
    spec: dict[str, Any] = {"merge_method": method, "models": [{"model": m} for m in models]}
    if method != "linear":
        spec["base_model"] = base
    plan = outliermerge.plan(spec)
    assert any(name in note for note in plan.notes)
    output = outliermerge.run(plan, output=tmp_path / "out").output
    found = load_folder(output)
    assert (name in found) is ("base" in holders)
    assert name not in found or torch.equal(found[name], COMPUTED[name])
    torch.testing.assert_close(found["w"], torch.full((3,), 1.0 if method == "linear" else 3.0))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("h.0.attn.bias", torch.ones(8)), ("embeddings.position_ids", torch.ones(4, 8)),
     ("h.0.conv.bias", torch.ones(1, 1, 4, 4))],
)  # fmt: skip
def test_what_is_trained_by_such_a_name_is_not_left_out(name, tensor, tmp_path):
    save_tensors(tmp_path / "base", {"w": torch.ones(3)})
    save_tensors(tmp_path / "task", {"w": torch.ones(3), name: tensor})
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "task")}],
    }
    with pytest.raises(OutlierMergeError, match="extra"):
        outliermerge.plan(spec)


@pytest.mark.parametrize("dtype", FLOATS)
def test_other_frequencies_of_rope_are_no_weights_to_average(dtype, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for number, (model, base) in enumerate((("base", 10.0), ("same", 10.0), ("other", 50.0))):
        inverse = (base ** -torch.arange(3.0)).to(dtype)
        save_tensors(tmp_path / model, {"w": torch.full((3,), float(number)), name: inverse})

    def spec(model: str, **keys: Any) -> dict[str, Any]:
        models = [{"model": str(tmp_path / model)}]
        base = str(tmp_path / "base")
        return {"merge_method": "task_arithmetic", "base_model": base, "models": models} | keys

    with pytest.raises(OutlierMergeError, match=r"(?s)RoPE's frequencies.*unequal: base"):
        outliermerge.run(spec("other"), output=tmp_path / "out")
    stored = load_folder(tmp_path / "base")[name]
    for given in (spec("same"), spec("other", unequal="base")):
        result = outliermerge.run(given, output=tmp_path / f"out_{len(given)}")
        merged = load_folder(result.output)
        assert torch.equal(merged[name], stored)
