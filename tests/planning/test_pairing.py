"""Tensors of models that are laid out differently: paired rightly, or refused in plain words."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import transformers
import yaml
from checkpoints import as_many_as, load_folder, save_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import ORIGINAL_TO_HF
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import outliermerge
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.cli import main as cli
from outliermerge.errors import OutlierMergeError, SpecError
from outliermerge.methods.table import METHODS
from outliermerge.output.folder import OutputFolder
from outliermerge.output.manifest_file import read_manifest
from outliermerge.planning.vocabulary_runs import RearrangedRows
from outliermerge.spec.check import load_spec
from outliermerge.spec.schema import json_schema

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = ["[UNK]", "one", "two", "three", "four", "five", "six", "seven"]


def model(
    folder: Path, tensors: Mapping[str, Tensor], *, words: list[str] | None = None, **config: Any
) -> Path:
    """Save a model with a config, and a tokenizer of words where there are some."""
    save_tensors(folder, {name: tensor.clone() for name, tensor in tensors.items()})
    (folder / "config.json").write_text(json.dumps({"model_type": "test"} | config))
    if words is not None:
        Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]")).save(
            str(folder / "tokenizer.json")
        )
    return folder


def pipeline(folder: Path, components: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Save a diffusers pipeline of components."""
    folder.mkdir()
    index = {"_class_name": "Pipeline"} | {name: ["diffusers", "Part"] for name in components}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, tensors in components.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        save_file(dict(tensors), folder / name / "diffusion_pytorch_model.safetensors")
    return folder


def randoms(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def spec_of(base: Any, *entries: Any, method: str = "task_arithmetic", **keys: Any) -> dict:
    """Return a spec; a model is a path, or an entry whose `model` is one."""
    listed = [entry if isinstance(entry, dict) else {"model": str(entry)} for entry in entries]
    spec: dict[str, Any] = {"merge_method": method, "models": listed} | keys
    if base is not None:
        spec["base_model"] = base if isinstance(base, dict) else str(base)
    return spec


def named(model: Path, *rules: Any) -> dict:
    """Return a spec's entry of a model with a `rename`."""
    return {"model": str(model), "rename": list(rules)}


def rule(before: str, after: str) -> dict:
    return {"from": before, "to": after}


def refusal(spec: Any) -> str:
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec)
    return str(caught.value)


def merged(spec: Any, output: Path) -> dict[str, Tensor]:
    """Run a spec; return what it stored after checking it against its plan and manifest."""
    planned = outliermerge.plan(spec)
    result = outliermerge.run(spec, output=output, threads=1)
    assert outliermerge.verify(result.output) == []
    assert list(result.manifest["tensors"]) == [job.name for job in planned.jobs]
    paths = sorted(output.rglob("*.safetensors")) if output.is_dir() else [output]
    found: dict[str, Tensor] = {}
    for path in paths:
        component = path.parent.relative_to(output).as_posix() if output.is_dir() else "."
        before = "" if component == "." else f"{component}/"
        for name, tensor in load_file(path).items():
            assert before + name not in found
            found[before + name] = tensor
    stored = {job.name: (job.output.dtype.name, job.output.shape) for job in planned.jobs}
    assert stored == {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in found.items()
    }
    return found


def sums(base: Tensor, *tuned: Tensor, weight: float = 1.0) -> Tensor:
    """Task arithmetic in float64."""
    return base.double() + sum(weight * (other.double() - base.double()) for other in tuned)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


# Any set of models


SHAPES = st.sampled_from([(2, 3), (2, 3), (2, 3), (3,)])
NAMES = ("a.w", "b.w", "c.d.w", "bias")


@st.composite
def sets_of_models(draw: st.DrawFn) -> dict[str, Any]:
    """Draw what models hold and what a spec says of it; most tensors are in most models."""
    common = {name: draw(SHAPES) for name in NAMES}

    def held() -> dict[str, tuple[int, ...]]:
        chosen = draw(st.sets(st.sampled_from(NAMES), min_size=2))
        odd = draw(st.sampled_from([None] * 6 + sorted(chosen)))
        return {name: (5,) if name == odd else common[name] for name in NAMES if name in chosen}

    words = {"missing": [None, "base", "base", "error"], "extra": [None, "copy", "drop", "error"]}
    policies = {key: st.sampled_from(values) for key, values in words.items()}
    return {
        "base": held(),
        "models": [held() for _ in range(draw(st.integers(1, 3)))],
        "prefixes": draw(st.lists(st.sampled_from(["", "m.", "x.y."]), min_size=4, max_size=4)),
        "top": {key: draw(policy) for key, policy in policies.items()},
        "own": [{key: draw(policy) for key, policy in policies.items()} for _ in range(3)],
        "to": draw(st.sampled_from(["", "out."])),
    }


def expected_names(drawn: dict[str, Any]) -> dict[str, list[int]] | None:
    """Return, by name of the merge, the models that have a say; None where it is refused."""
    found: dict[str, list[int]] = {}

    def word(key: str, number: int) -> str:
        return drawn["own"][number][key] or drawn["top"][key] or "error"

    for name in NAMES:
        holders = [n for n, held in enumerate(drawn["models"]) if name in held]
        lacking = [n for n in range(len(drawn["models"])) if n not in holders]
        if name in drawn["base"]:
            shapes = {drawn["models"][n][name] for n in holders} | {drawn["base"][name]}
            if len(shapes) > 1 or any(word("missing", n) != "base" for n in lacking):
                return None
            found[name] = holders
            continue
        if any(word("extra", n) == "error" for n in holders):
            return None
        copied = [n for n in holders if word("extra", n) == "copy"]
        if len({drawn["models"][n][name] for n in copied}) > 1:
            return None
        if copied:
            found[name] = copied
    return found


@settings(max_examples=60, deadline=None)
@given(drawn=sets_of_models())
def test_any_models_are_merged_by_their_names_or_refused(drawn):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = randoms(drawn["base"], 0)
        tuned = []
        for seed, held in enumerate(drawn["models"], start=1):
            tensors = randoms(held, seed)
            for name in tensors.keys() - base.keys():  # what is copied must be equal
                tensors[name] = torch.full_like(tensors[name], 2.5)
            tuned.append(tensors)
        entries = []
        for number, (tensors, prefix) in enumerate(
            zip([base, *tuned], drawn["prefixes"], strict=False)
        ):
            stored = {prefix + name: tensor for name, tensor in tensors.items()}
            entry: dict[str, Any] = {"model": str(save_tensors(folder / f"m{number}", stored))}
            if prefix:
                entry["rename"] = rule("^" + prefix.replace(".", r"\."), "")
            entries.append(entry)
        for entry, own in zip(entries[1:], drawn["own"], strict=False):
            entry |= {key: value for key, value in own.items() if value}
        spec = spec_of(*entries, parameters={"weight": 0.5})
        spec |= {key: value for key, value in drawn["top"].items() if value}
        if drawn["to"]:
            spec["rename"] = rule("^", drawn["to"])

        expected = expected_names(drawn)
        if expected is None:
            assert "the models do not hold the same tensors" in refusal(spec)
            return
        copied = {number for name in expected.keys() - base.keys() for number in expected[name]}
        if any(base.keys().isdisjoint(held) and n not in copied for n, held in enumerate(tuned)):
            assert "the output would have nothing of it" in refusal(spec)
            return
        found = merged(spec, folder / "out")
        assert set(found) == {drawn["to"] + name for name in expected}
        for name, holders in expected.items():
            tensor = found[drawn["to"] + name]
            if name in base:
                close(tensor, sums(base[name], *(tuned[n][name] for n in holders), weight=0.5))
            else:
                assert torch.equal(tensor, tuned[holders[0]][name])
        unused = {name for held in drawn["models"] for name in held} - set(expected)
        assert set(outliermerge.plan(spec).dropped) == unused


# Odd tensors


def odd_tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "scalar": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 3),
        "matrix": torch.randn(3, 4, generator=generator),
        "wide": torch.randn(2, generator=generator, dtype=torch.float64),
        "complex": torch.tensor([1 + 2j, complex(0.0, -0.0)], dtype=torch.complex64),
        "flags": torch.tensor([True, False]),
        "counts": torch.zeros(0, dtype=torch.int64),
        "steps": torch.tensor(7),
    }


@pytest.mark.parametrize("method", sorted(METHODS))
def test_scalars_empty_complex_and_bool_tensors_go_through_a_rename(method, tmp_path):
    base = model(tmp_path / "base", odd_tensors(0))
    tuned = [
        model(tmp_path / f"m{seed}", {f"x.{k}": v for k, v in odd_tensors(seed).items()})
        for seed in (1, 2)
    ]
    tuned = as_many_as(method, tuned)
    has_base = METHODS[method].needs_base
    spec = spec_of(
        base if has_base else None,
        *(named(path, rule(r"^x\.", "")) for path in tuned),
        method=method,
        rename=rule("^", "y/"),
    )
    found = merged(spec, tmp_path / "out")
    assert set(found) == {f"y/{name}" for name in odd_tensors(0)}
    for name in ("empty", "complex", "flags", "counts", "steps"):
        assert torch.equal(found[f"y/{name}"], odd_tensors(0)[name]), name
    if method == "task_arithmetic":
        for name in ("scalar", "matrix", "wide"):
            expected = sums(*(odd_tensors(seed)[name] for seed in range(3)))
            close(found[f"y/{name}"], expected)


@pytest.mark.parametrize("name", ["complex", "flags", "steps"])
@pytest.mark.parametrize("has_base", [True, False], ids=["base", "no base"])
def test_a_tensor_that_is_no_float_and_differs_is_refused_or_the_bases(name, has_base, tmp_path):
    changed = odd_tensors(1)
    other = changed[name].clone()
    other.view(-1)[-1] = not other.view(-1)[-1] if name == "flags" else 5
    base = model(tmp_path / "base", odd_tensors(0))
    task = model(tmp_path / "task", {f"x.{k}": v for k, v in (changed | {name: other}).items()})
    entry = named(task, rule(r"^x\.", ""))
    spec = (
        spec_of(base, entry) if has_base else spec_of(None, {"model": str(base)}, entry,
                                                      method="linear")
    )  # fmt: skip
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.run(spec, output=tmp_path / "out")
    assert f"tensor '{name}'" in str(caught.value)
    assert str(base) in str(caught.value) and str(task) in str(caught.value)
    assert not (tmp_path / "out").exists()
    if has_base:
        found = merged(spec | {"unequal": "base"}, tmp_path / "base-s")
        assert torch.equal(found[name], odd_tensors(0)[name])


def test_the_advice_for_buffers_that_differ_holds_without_a_base(tmp_path):
    ours = model(tmp_path / "a", {"w": torch.ones(2), "n": torch.tensor(1)})
    theirs = model(tmp_path / "b", {"w": torch.ones(2), "n": torch.tensor(2)})
    spec = spec_of(None, ours, theirs, method="linear")
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.run(spec, output=tmp_path / "out")
    if "`unequal: base`" in str(caught.value):
        outliermerge.plan(spec | {"unequal": "base"})


def test_the_advice_for_extra_buffers_that_differ_holds(tmp_path):
    base = model(tmp_path / "base", {"w": torch.ones(2)})
    tuned = [model(tmp_path / f"m{n}", {"w": torch.ones(2), "n": torch.tensor(n)}) for n in (1, 2)]
    spec = spec_of(base, *tuned, extra="copy")
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.run(spec, output=tmp_path / "out")
    if "`unequal: base`" in str(caught.value):
        merged(spec | {"unequal": "base"}, tmp_path / "again")


# Eight-bit floats without scales


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("out_dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_plain_fp8_tensors_are_merged_in_float32_and_rounded_once(dtype, out_dtype, tmp_path):
    values = [(3 * torch.randn(40, 30, generator=torch.Generator().manual_seed(n))).to(dtype)
              for n in range(3)]  # fmt: skip
    folders = [model(tmp_path / str(n), {"w": value}) for n, value in enumerate(values)]
    keys = {"out_dtype": out_dtype} if out_dtype else {}
    spec = spec_of(*folders, parameters={"weight": 0.5}, **keys)
    found = merged(spec, tmp_path / "out")["w"]
    # Sums of so few bits are exact in float32, so that there is one rounding.
    expected = sums(*values, weight=0.5).float()
    assert torch.equal(found.float(), expected.to(found.dtype).float())


@pytest.mark.parametrize(
    "dtype",
    [
        FP8[0],
        FP8[1],
    ],
    ids=str,
)
def test_fp8_values_too_large_to_store_are_named(dtype, tmp_path):
    largest = torch.full((4,), torch.finfo(dtype).max).to(dtype)
    base = model(tmp_path / "base", {"w": torch.zeros(4).to(dtype)})
    spec = spec_of(base, model(tmp_path / "task", {"w": largest}), parameters={"weight": 2})
    with pytest.raises(OutlierMergeError, match=r"'w' has values that are infinite or NaN"):
        outliermerge.run(spec, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    wide = merged(spec | {"out_dtype": "float32"}, tmp_path / "wide")["w"]
    assert torch.equal(wide, 2 * largest.float())


def test_a_value_that_rounds_to_the_largest_fp8_is_stored(tmp_path):
    # 456 is nearer to 448 than to where 512 would be, as float8_e4m3fn has steps of 32 there.
    base = model(tmp_path / "base", {"w": torch.zeros(2).to(FP8[0])})
    task = model(tmp_path / "task", {"w": torch.full((2,), 448.0).to(FP8[0])})
    spec = spec_of(base, task, parameters={"weight": 456 / 448})
    assert merged(spec, tmp_path / "out")["w"].float().tolist() == [448, 448]


@pytest.mark.parametrize("policy", ["base", "common", "union"])
def test_rows_of_fp8_embeddings_are_picked(policy, tmp_path):
    rows = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (8, 10)]
    stored = [value.to(FP8[0]) for value in rows]
    base, task = (
        model(tmp_path / str(len(value)), {EMBEDDINGS: value}, vocab_size=len(value))
        for value in stored
    )
    found = merged(spec_of(base, task, vocabulary=policy), tmp_path / "out")[EMBEDDINGS]
    assert torch.equal(found[:8].float(), stored[1][:8].float())
    assert len(found) == (10 if policy == "union" else 8)
    assert torch.equal(found[8:].float(), stored[1][8 : len(found)].float())


# Renames


def test_the_map_that_is_advised_pairs_where_there_is_a_rename_already(tmp_path):
    tensors = randoms({name: (4, 4) for name in ORIGINAL_TO_HF}, 0)
    base = model(tmp_path / "base", {ORIGINAL_TO_HF[name]: t for name, t in tensors.items()})
    task = model(tmp_path / "task", {f"module.{name}": t for name, t in tensors.items()})
    spec = spec_of(base, named(task, rule(r"^module\.", "")))
    message = refusal(spec)
    assert "Added to its own, `rename: " in message
    advice = yaml.safe_load(message.split("`rename: ")[1].split("`")[0])
    spec["models"][0]["rename"] = [rule(r"^module\.", ""), advice]
    outliermerge.plan(spec)


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "a.b.",
        "x y/",
        "[0].",
        "é.",
        "it's.",
    ],
)
def test_the_rule_that_is_advised_for_a_prefix_pairs(prefix, tmp_path):
    shapes = {"p.w": (3,), "q.w": (2,)}
    base = model(tmp_path / "base", randoms(shapes, 0))
    task = model(tmp_path / "task", {prefix + k: v for k, v in randoms(shapes, 1).items()})
    advice = refusal(spec_of(base, task)).split("`rename: ")[1].split("` on ")[0]
    found = merged(spec_of(base, named(task, *yaml.safe_load(advice))), tmp_path / "out")
    assert set(found) == set(shapes)


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "[0].",
        "a\\1.",
        "it's.",
    ],
)
def test_the_rule_that_is_advised_for_a_prefix_of_the_base_pairs(prefix, tmp_path):
    shapes = {"p.w": (3,), "q.w": (2,)}
    base = model(tmp_path / "base", {prefix + k: v for k, v in randoms(shapes, 0).items()})
    task = model(tmp_path / "task", randoms(shapes, 1))
    advice = refusal(spec_of(base, task)).split("`rename: ")[1].split("` on ")[0]
    outliermerge.plan(spec_of(base, named(task, *yaml.safe_load(advice))))


def test_the_rule_that_makes_two_names_one_is_pointed_at(tmp_path):
    base = model(tmp_path / "base", randoms({"y": (2,)}, 0))
    task = model(tmp_path / "task", randoms({"a": (2,), "b": (2,)}, 1))
    spec = spec_of(base, named(task, rule("^[ab]$", "x"), rule("x", "y")))
    assert "models[0].rename[0]: 'a' and 'b' both become 'x'" in refusal(spec)


def test_names_that_change_places_take_their_tensors_along(tmp_path):
    swap = [rule("^a$", "tmp"), rule("^b$", "a"), rule("^tmp$", "b")]
    base, task = (randoms({"a": (3,), "b": (3,)}, seed) for seed in (0, 1))
    spec = spec_of(model(tmp_path / "base", base), named(model(tmp_path / "task", task), *swap))
    found = merged(spec | {"rename": swap}, tmp_path / "out")
    # The merge pairs the base's a with the task's b, and writes it as b.
    assert torch.equal(found["b"], task["b"]) and torch.equal(found["a"], task["a"])
    shapes = {"a": (3,), "b": (2,)}
    spec = spec_of(
        model(tmp_path / "base2", randoms(shapes, 0)),
        named(model(tmp_path / "task2", randoms(shapes, 1)), *swap),
    )
    assert "a: float32 [3]" in refusal(spec)


@pytest.mark.parametrize(
    "name",
    [
        "__metadata__",
        "w\ud800",
    ],
    ids=["reserved", "surrogate"],
)
def test_an_output_name_that_safetensors_cannot_store_is_refused(name, tmp_path):
    base, task = (model(tmp_path / str(n), randoms({"a": (2,), "b": (2,)}, n)) for n in (0, 1))
    with pytest.raises(SpecError, match=r"rename\[0\]"):
        outliermerge.plan(spec_of(base, task, rename=[rule("^b$", name)]))


# Pipelines


PARTS = {"unet": {"a": (4, 4), "b": (3,)}, "vae": {"a": (4, 4), "c": (2,)}}


def parts(seed: int) -> dict[str, dict[str, Tensor]]:
    return {name: randoms(shapes, seed) for name, shapes in PARTS.items()}


@pytest.fixture
def pipelines(tmp_path: Path) -> tuple[Path, Path]:
    return pipeline(tmp_path / "base", parts(0)), pipeline(tmp_path / "task", parts(1))


def test_a_tensor_of_a_pipeline_may_be_renamed_within_its_component(pipelines, tmp_path):
    spec = spec_of(*pipelines, rename=rule(r"^(\w+)/a$", r"\1/block.a"))
    found = merged(spec, tmp_path / "out")
    assert set(found) == {"unet/block.a", "unet/b", "vae/block.a", "vae/c"}
    for component in PARTS:
        close(found[f"{component}/block.a"], sums(parts(0)[component]["a"],
                                                  parts(1)[component]["a"]))  # fmt: skip
    assert set(open_checkpoint(tmp_path / "out").tensors) == set(found)


def test_names_of_a_pipeline_that_collide_only_across_components_are_refused(pipelines):
    message = refusal(spec_of(*pipelines, rename=rule("^(unet|vae)/", "unet/")))
    assert "rename: 'unet/a' and 'vae/a' both become 'unet/a'" in message


def test_a_base_pipeline_with_other_names_is_paired_and_written_under_its_own(tmp_path):
    stored = {part: {f"m.{k}": v for k, v in held.items()} for part, held in parts(0).items()}
    base, task = pipeline(tmp_path / "base", stored), pipeline(tmp_path / "task", parts(1))
    there, back = rule(r"/m\.", "/"), rule("/", "/m.")
    found = merged(spec_of(named(base, there), task, rename=back), tmp_path / "out")
    assert set(found) == set(open_checkpoint(base).tensors)
    close(found["vae/m.c"], sums(parts(0)["vae"]["c"], parts(1)["vae"]["c"]))


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [("^unet/", "", "a"), ("^vae/", "decoder/", "decoder/a"), ("^unet/a", "a", "a")],
)
def test_a_name_outside_of_all_components_is_refused(before, after, name, pipelines):
    spec = spec_of(*pipelines, rename=[rule(before, after)])
    if before == "^unet/":
        spec["rename"].append(rule("^b$", "unet/b"))
    message = refusal(spec)
    assert f"becomes {name!r}, which is not of the same component" in message


def test_a_base_rename_out_of_all_components_is_refused(pipelines):
    base, task = pipelines
    strip = rule("^unet/", "")
    message = refusal(spec_of(named(base, strip), named(task, strip)))
    assert "of no component of" in message and "\n  a\n" in message and "unet" in message


def test_a_component_that_the_base_lacks_cannot_be_copied(pipelines, tmp_path):
    more = pipeline(tmp_path / "more", parts(1) | {"text_encoder": randoms({"w": (2,)}, 1)})
    spec = spec_of(pipelines[0], more)
    assert "text_encoder/w: in " in refusal(spec)
    assert set(merged(spec | {"extra": "drop"}, tmp_path / "out")) == {
        f"{part}/{name}" for part, held in PARTS.items() for name in held
    }
    assert "text_encoder/w" in refusal(spec | {"extra": "copy"})


def test_a_tensor_of_no_component_cannot_be_copied_into_a_pipeline(pipelines, tmp_path):
    plain = {f"{part}/{k}": v for part, held in parts(1).items() for k, v in held.items()}
    task = model(tmp_path / "plain", plain | {"stray": torch.ones(2)})
    assert "stray" in refusal(spec_of(pipelines[0], task, extra="copy"))


def test_a_component_is_not_left_without_weights(pipelines, tmp_path):
    spec = spec_of(*pipelines, rename=rule(r"^vae/(.*)", r"unet/vae.\1"))
    try:
        output = outliermerge.run(spec, output=tmp_path / "out").output
    except OutlierMergeError as error:
        assert "vae" in str(error)
    else:
        open_checkpoint(output)


# Single files


@pytest.mark.parametrize("kinds", [("pt", "safetensors"), ("safetensors", "pt")])
def test_a_file_of_either_kind_is_merged_with_one_of_the_other(kinds, tmp_path):
    base, task = ({k: v for k, v in odd_tensors(seed).items() if v.numel()} for seed in (0, 1))
    paths = []
    for name, kind, tensors in zip(("base", "task"), kinds, (base, task), strict=True):
        paths.append(tmp_path / f"{name}.{kind}")
        stored = {f"module.{k}": v for k, v in tensors.items()}
        if kind == "pt":
            torch.save({"state_dict": stored}, paths[-1])
        else:
            save_file(stored, paths[-1])
    spec = spec_of(*paths, rename=rule("^", "net."))
    found = merged(spec, tmp_path / "out.safetensors")
    assert set(found) == {f"net.{name}" for name in base}
    close(found["net.matrix"], sums(base["matrix"], task["matrix"]))
    close(found["net.scalar"], sums(base["scalar"], task["scalar"]))
    assert sorted(p.name for p in tmp_path.glob("out*")) == [
        "out.safetensors",
        "out.safetensors.outliermerge.json",
    ]


def test_a_file_verifies_whatever_the_config_is_taken_from(tmp_path):
    save_file(randoms({"w": (3,)}, 0), tmp_path / "base.safetensors")
    task = model(tmp_path / "task", randoms({"w": (3,)}, 1))
    spec = spec_of(tmp_path / "base.safetensors", task, config_source=str(task))
    try:
        result = outliermerge.run(spec, output=tmp_path / "out.safetensors")
    except OutlierMergeError as error:
        assert "config_source" in str(error)
    else:
        assert outliermerge.verify(result.output) == []


def test_an_output_without_a_config_is_told(tmp_path):
    base, task = (model(tmp_path / n, randoms({"w": (3,)}, 0)) for n in ("base", "task"))
    (base / "config.json").unlink()
    told = [note for note in outliermerge.plan(spec_of(base, task)).notes if "config.json" in note]
    assert told == [f"{base} has no config.json: transformers cannot load it"]
    output = outliermerge.run(spec_of(base, task), output=tmp_path / "out").output
    assert not (output / "config.json").exists()
    sourced = spec_of(base, task, config_source=str(task))
    assert not any("no config.json" in note for note in outliermerge.plan(sourced).notes)


def test_a_config_source_without_a_config_is_refused(tmp_path):
    base, task = (model(tmp_path / n, randoms({"w": (3,)}, 0)) for n in ("base", "task"))
    (task / "config.json").unlink()
    with pytest.raises(SpecError, match=r"config_source: .* has no config files"):
        outliermerge.plan(spec_of(base, task, config_source=str(task)))


def test_the_base_may_be_named_as_a_source(tmp_path):
    base, task = (model(tmp_path / n, randoms({"w": (3,)}, 0)) for n in ("base", "task"))
    spec = spec_of(base, task, config_source=str(base))
    try:
        outliermerge.plan(spec)
    except SpecError as error:
        assert "'base'" in str(error)


# One model, named twice


def adapter(folder: Path, base: Path, seed: int) -> Path:
    shapes = {"A": (2, 4), "B": (4, 2)}
    folder.mkdir()
    save_file(
        {f"base_model.model.model.proj.lora_{part}.weight": tensor
         for part, tensor in randoms(shapes, seed).items()},
        folder / "adapter_model.safetensors",
    )  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj"]}
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(base)})
    )
    return folder


def test_an_adapter_named_in_two_ways_is_refused(tmp_path):
    base = model(tmp_path / "base", randoms({"model.proj.weight": (4, 4)}, 0))
    lora = adapter(tmp_path / "lora", base, 1)
    spec = spec_of(
        base,
        {"model": str(lora), "parameters": {"weight": 0.25}},
        {"model": f"{base}+{lora}", "parameters": {"weight": 0.5}},
    )
    with pytest.raises(SpecError, match=r"models\[1\]\.model: .* is the same model as "):
        outliermerge.plan(spec)


def test_a_link_to_a_model_is_that_model(tmp_path):
    base, task = (model(tmp_path / n, randoms({"w": (3,)}, 0)) for n in ("base", "task"))
    (tmp_path / "link").symlink_to(task)
    assert "models[1].model" in refusal(spec_of(base, task, tmp_path / "link"))


# Vocabularies and tied heads


def language_model(
    folder: Path,
    num_rows: int,
    *,
    head: int | bool = False,
    seed: int = 0,
    words: list[str] = WORDS,
    tie: bool | None = None,
) -> Path:
    """Save embeddings and perhaps a head: True for a copy of them, or its number of rows."""
    tensors = randoms({EMBEDDINGS: (num_rows, 4), "model.norm.weight": (4,)}, seed)
    if head is True:
        tensors[HEAD] = tensors[EMBEDDINGS]
    elif head:
        tensors |= randoms({HEAD: (head, 4)}, seed + 100)
    config = {} if tie is None else {"tie_word_embeddings": tie}
    return model(folder, tensors, words=words, vocab_size=num_rows, **config)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where rows are read without end."""
    num_left = 1000
    rows = RearrangedRows.rows

    def counted(self: RearrangedRows, *arguments: Any) -> Tensor:
        nonlocal num_left
        num_left -= 1
        assert num_left, "rows are read without end"
        return rows(self, *arguments)

    monkeypatch.setattr(RearrangedRows, "rows", counted)


@pytest.mark.parametrize("policy", ["base", "common"])
@pytest.mark.parametrize("num_rows", [9, 72])
@pytest.mark.usefixtures("guarded")
def test_a_copy_of_larger_tied_embeddings_is_left_out(policy, num_rows, tmp_path):
    base = language_model(tmp_path / "base", 8, tie=True)
    words = [*WORDS, "<x>"] if num_rows == 9 else WORDS
    task = language_model(tmp_path / "task", num_rows, head=True, words=words, seed=1, tie=True)
    found = merged(spec_of(base, task, vocabulary=policy), tmp_path / "out")
    assert set(found) == {EMBEDDINGS, "model.norm.weight"}
    theirs = load_folder(task)[EMBEDDINGS][:8]
    close(found[EMBEDDINGS], sums(load_folder(base)[EMBEDDINGS], theirs))


def test_a_copy_of_tied_embeddings_in_another_order_is_left_out(tmp_path):
    base = language_model(tmp_path / "base", 8, tie=True)
    words = [WORDS[0], *reversed(WORDS[1:])]
    task = language_model(tmp_path / "task", 8, head=True, words=words, seed=1, tie=True)
    found = merged(spec_of(base, task, vocabulary="base"), tmp_path / "out")
    order = [words.index(word) for word in WORDS]
    theirs = load_folder(task)[EMBEDDINGS][order]
    close(found[EMBEDDINGS], sums(load_folder(base)[EMBEDDINGS], theirs))


def test_a_stray_head_with_more_rows_than_its_embeddings_is_named(tmp_path):
    base = language_model(tmp_path / "base", 8, tie=True)
    task = language_model(tmp_path / "task", 8, head=72, seed=1, tie=True)
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.run(spec_of(base, task), output=tmp_path / "out")
    assert HEAD in str(caught.value) and "`extra: drop`" in str(caught.value)
    assert "the file ends" not in str(caught.value)


@pytest.mark.parametrize("policy", ["base", "common", "union"])
def test_a_tied_model_with_64_more_rows_serves_an_untied_base(policy, tmp_path):
    base = language_model(tmp_path / "base", 8, head=8, tie=False)
    task = language_model(tmp_path / "task", 72, seed=1, tie=True)
    assert "72 rows" in refusal(spec_of(base, task))
    found = merged(spec_of(base, task, vocabulary=policy), tmp_path / "out")
    ours, theirs = load_folder(base), load_folder(task)[EMBEDDINGS]
    num_rows = 72 if policy == "union" else 8
    for name in (EMBEDDINGS, HEAD):
        assert len(found[name]) == num_rows
        close(found[name][:8], sums(ours[name], theirs[:8]))
        close(found[name][8:], theirs[8:num_rows].double())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == num_rows and config["tie_word_embeddings"] is False


@pytest.mark.parametrize("tie", [None, False])
def test_an_extra_head_has_the_rows_of_the_embeddings(tie, tmp_path):
    base = language_model(tmp_path / "base", 8, tie=tie)
    words = [*WORDS, "<x>"]
    task = language_model(tmp_path / "task", 9, head=9, words=words, seed=1, tie=tie)
    spec = spec_of(base, task, vocabulary="base", extra="copy")
    try:
        found = merged(spec, tmp_path / "out")
    except OutlierMergeError as error:
        assert HEAD in str(error)
    else:
        assert found[HEAD].shape == found[EMBEDDINGS].shape


def causal_model(folder: Path, num_rows: int, tokens: list[str], *, tied: bool, seed: int) -> Path:
    """Save a Llama and its tokenizer as transformers do."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=num_rows,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    network = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    network.save_pretrained(folder)
    words = {word: number for number, word in enumerate([*WORDS, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    fast.add_special_tokens({"additional_special_tokens": tokens})
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("policy", ["union", "common", "base"])
def test_what_transformers_saves_with_added_tokens_is_merged_and_loads(policy, tied, tmp_path):
    base = causal_model(tmp_path / "base", 10, [], tied=tied, seed=1)
    first = causal_model(tmp_path / "a", 11, ["<a>"], tied=tied, seed=2)
    second = causal_model(tmp_path / "b", 12, ["<b>", "<a>"], tied=tied, seed=3)
    spec = spec_of(base, first, second, vocabulary=policy, parameters={"weight": 0.5})
    found = merged(spec, tmp_path / "out")
    a, b = load_folder(first)[EMBEDDINGS], load_folder(second)[EMBEDDINGS]
    close(found[EMBEDDINGS][:10], sums(load_folder(base)[EMBEDDINGS], a[:10], b[:10], weight=0.5))
    assert (HEAD in found) is not tied

    network, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == len(found[EMBEDDINGS]) == network.config.vocab_size
    if policy != "union":
        assert len(tokenizer) == 10
        return
    close(found[EMBEDDINGS][10], (a[10].double() + b[11].double()) / 2)
    assert torch.equal(found[EMBEDDINGS][11], b[10])
    ids = tokenizer("two <a> <b>")["input_ids"]
    assert ids == [2, 10, 11]
    assert tokenizer.convert_ids_to_tokens(ids) == ["two", "<a>", "<b>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "two"
    embedded = network.get_input_embeddings()(torch.tensor(ids))
    assert torch.equal(embedded, found[EMBEDDINGS][ids])
    with torch.no_grad():
        assert network(torch.tensor([ids])).logits.shape == (1, 3, 12)


@pytest.mark.parametrize("policy", ["base", "common"])
def test_quantised_models_with_other_names_and_rows_are_paired(policy, tmp_path):
    settings_ = {"quant_method": "fp8", "weight_block_size": [128, 128]}

    def quantised(folder: Path, num_rows: int, before: str) -> dict[str, Tensor]:
        """Save with the head in eight bits and return what it means."""
        plain = randoms({EMBEDDINGS: (num_rows, 4), HEAD: (num_rows, 4)}, num_rows)
        scale = plain[HEAD].abs().amax().reshape(1, 1) / 448
        codes = (plain[HEAD] / scale).to(FP8[0])
        stored = {EMBEDDINGS: plain[EMBEDDINGS], HEAD: codes, f"{HEAD}_scale_inv": scale}
        words = [*WORDS, "<x>"][:num_rows]
        keys: dict[str, Any] = {"vocab_size": num_rows, "quantization_config": settings_}
        model(folder, {before + k: v for k, v in stored.items()}, words=words, **keys)
        return plain | {HEAD: codes.float() * scale}

    ours = quantised(tmp_path / "base", 8, "")
    theirs = quantised(tmp_path / "task", 9, "x.")
    spec = spec_of(
        tmp_path / "base",
        named(tmp_path / "task", rule(r"^x\.", "")),
        vocabulary=policy,
        out_dtype="float32",
    )
    found = merged(spec, tmp_path / "out")
    assert set(found) == {EMBEDDINGS, HEAD}
    for name in found:
        close(found[name], sums(ours[name], theirs[name][:8]))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


# The spec, written and read again


def test_the_manifests_spec_and_the_readmes_recipe_give_the_same_bytes(tmp_path, monkeypatch):
    (tmp_path / "far/away").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "far/away")  # so that the README has absolute paths
    shapes = {"a.w": (6, 4), "b.w": (3,)}
    base = model(tmp_path / "base", {f"x.{k}": v for k, v in randoms(shapes, 0).items()})
    task = model(
        tmp_path / "task", randoms(shapes | {"extra: 'é'": (2,)}, 1), vision_feature_layer=-2
    )
    odd = "the: 'name' \\\\ é\u2028#`\U0001f600 "
    spec = spec_of(
        named(base, rule(r"^x\.", ""), rule(r"^b\.w$", odd)),
        named(task, rule(r"^b\.w$", odd))
        | {"missing": [{"filter": "the: 'name'", "value": "base"}], "parameters": {"weight": 0.3}},
        rename={"from": "^a", "to": "```z"},
        extra=[{"filter": "extra: 'é'", "value": "drop"}, {"value": "error"}],
        unequal={"value": "base"},
        vocabulary="common",
        config_source=str(task),
        dtype="float64",
        out_dtype="bfloat16",
    )
    first = merged(spec, tmp_path / "first")
    assert set(first) == {"```z.w", odd.replace("\\\\", "\\")}
    manifest = read_manifest(tmp_path / "first")
    assert manifest["spec"] == spec

    card = (tmp_path / "first/README.md").read_text("utf-8")
    recipe = card.split("```yaml\n")[1].split("\n```\n")[0]
    (tmp_path / "recipe.yaml").write_text(recipe, "utf-8")
    merged(manifest["spec"], tmp_path / "second")
    merged(tmp_path / "recipe.yaml", tmp_path / "third")
    for path in (tmp_path / "first").iterdir():
        for other in ("second", "third"):
            assert (tmp_path / other / path.name).read_bytes() == path.read_bytes(), path.name


RULES = [
    ("base_model", {"model": "b"}, True),
    ("base_model", {"model": "b", "rename": "transformers_v4_to_v5"}, True),
    ("base_model", {"model": ""}, False),
    ("base_model", {"model": "b", "missing": "base"}, False),
    ("base_model", 5, False),
    ("rename", None, True),
    ("rename", [], False),
    ("rename", {"from": "x", "to": ""}, True),
    ("rename", {"from": "", "to": "x"}, False),
    ("rename", {"from": "x"}, False),
    ("rename", ["transformers_v4_to_v5", {"from": "x", "to": "y"}], True),
    ("rename", [["transformers_v4_to_v5"]], False),
    ("rename", "nope", False),
    ("missing", "base", True),
    ("missing", "copy", False),
    ("missing", ["base"], False),
    ("missing", [], False),
    ("missing", [{"filter": "x", "value": "base"}, {"value": "error"}], True),
    ("missing", [{"filter": "", "value": "base"}], False),
    ("missing", {"value": "base", "filter": None}, True),
    ("missing", {"filter": "x"}, False),
    ("extra", "drop", True),
    ("extra", "base", False),
    ("extra", [{"filter": "x", "value": "copy", "also": 1}], False),
    ("unequal", "base", True),
    ("unequal", "drop", False),
    ("vocabulary", "union", True),
    ("vocabulary", None, True),
    ("vocabulary", "all", False),
    ("config_source", "m", True),
    ("config_source", "", False),
    ("tokenizer_source", "base", True),
    ("tokenizer", {}, True),
    ("tokenizer", {"source": "base", "tokens": None}, True),
    ("tokenizer", {"pad_to_multiple_of": 0}, False),
    ("tokenizer", "union", False),
    ("chat_template", "chatml", True),
    ("chat_template", "", False),
    ("processor_source", None, True),
    ("processor_source", 1, False),
    ("output", "x.safetensors", True),
    ("output", "", False),
    ("models", [{"model": "m", "extra": "copy", "missing": "base"}], True),
    ("models", [{"model": "m", "rename": "llava_hf_to_original"}], True),
    ("models", [{"model": "m", "unequal": "base"}], False),
    ("models", [{"model": "m", "rename": []}], False),
]  # fmt: skip


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize(("key", "value", "is_valid"), RULES)
def test_the_schema_takes_what_the_package_takes(key, value, is_valid, method):
    spec = spec_of("b", "m", method=method) | {key: value}
    try:
        load_spec(spec)
    except SpecError as error:
        assert not is_valid, error
    else:
        assert is_valid
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(spec) is is_valid


# Runs that are killed


class Killed(Exception):
    pass


def kill(spec: Any, output: Path, monkeypatch: pytest.MonkeyPatch, *, after: int = 1) -> None:
    """Run until so many tensors are recorded."""
    record = OutputFolder.record

    def stop(self: OutputFolder, name: str, result: Any) -> None:
        if len(self.done) == after:
            raise Killed
        record(self, name, result)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(OutputFolder, "record", stop)
        outliermerge.run(spec, output=output, threads=1)
    assert not output.exists()


def renamed_case(folder: Path) -> tuple[dict, str]:
    shapes = {f"w{n}": (5, 3) for n in range(4)}
    base = model(folder / "base", {f"x.{k}": v for k, v in randoms(shapes, 0).items()})
    task = model(folder / "task", randoms(shapes, 1))
    return spec_of(named(base, rule(r"^x\.", "")), task, rename=rule("^w", "v")), "out"


def vocabulary_case(folder: Path) -> tuple[dict, str]:
    base = language_model(folder / "base", 8, head=8, tie=False)
    words = [WORDS[0], *reversed(WORDS[1:])]
    task = language_model(folder / "task", 12, seed=1, words=words, tie=True)
    return spec_of(base, task, vocabulary="union"), "out"


def pipeline_case(folder: Path) -> tuple[dict, str]:
    base, task = (pipeline(folder / str(seed), parts(seed)) for seed in (0, 1))
    return spec_of(base, task, rename=rule("/a$", "/block.a")), "out"


def file_case(folder: Path) -> tuple[dict, str]:
    torch.save(odd_tensors(0), folder / "base.pt")
    save_file({f"x.{k}": v for k, v in odd_tensors(1).items()}, folder / "task.safetensors")
    entry = named(folder / "task.safetensors", rule(r"^x\.", ""))
    return spec_of(folder / "base.pt", entry), "out.safetensors"


Case = Callable[[Path], tuple[dict, str]]


@pytest.mark.parametrize("case", [renamed_case, vocabulary_case, pipeline_case, file_case])
def test_a_killed_run_of_any_pairing_goes_on_to_the_same_bytes(case: Case, tmp_path, monkeypatch):
    spec, name = case(tmp_path)
    whole = outliermerge.run(spec, output=tmp_path / f"whole-{name}", threads=1)
    kill(spec, tmp_path / name, monkeypatch)
    with pytest.raises(OutlierMergeError, match="was begun by another merge: the spec"):
        changed = spec | {"rename": rule("^", "q.") if name == "out" else rule("^m", "q")}
        if case is pipeline_case:
            changed["rename"] = rule("/a$", "/other.a")
        outliermerge.run(changed, output=tmp_path / name)
    result = outliermerge.run(spec, output=tmp_path / name, threads=1)
    assert result.num_resumed == 1
    assert result.manifest["tensors"] == whole.manifest["tensors"]
    assert outliermerge.verify(result.output) == []
    assert not (tmp_path / f"{name}.partial").exists()
    if name == "out":
        for path in whole.output.rglob("*"):
            if path.is_file():
                other = result.output / path.relative_to(whole.output)
                assert other.read_bytes() == path.read_bytes()
    else:
        assert result.output.read_bytes() == whole.output.read_bytes()


def test_a_tokenizer_that_moved_rows_since_a_kill_is_refused(tmp_path, monkeypatch):
    spec, name = vocabulary_case(tmp_path)
    kill(spec, tmp_path / name, monkeypatch)
    shutil.copy(tmp_path / "base/tokenizer.json", tmp_path / "task/tokenizer.json")
    with pytest.raises(OutlierMergeError, match=r"tokenizers\) changed since\. Use fresh=True"):
        outliermerge.run(spec, output=tmp_path / name)
    result = outliermerge.run(spec, output=tmp_path / name, fresh=True)
    assert outliermerge.verify(result.output) == []


def test_a_config_that_pairs_other_tensors_since_a_kill_is_noticed(tmp_path, monkeypatch):
    # Without `tie_word_embeddings: false` the task's embeddings stand for the head that it lacks.
    base = language_model(tmp_path / "base", 8, head=8, tie=False)
    task = language_model(tmp_path / "task", 8, seed=1, tie=False)
    spec = spec_of(base, task, missing="base")
    kill(spec, tmp_path / "out", monkeypatch)
    language_model(tmp_path / "again", 8, seed=1, tie=None)
    shutil.copy(tmp_path / "again/config.json", task / "config.json")
    whole = merged(spec, tmp_path / "whole")
    close(whole[HEAD], sums(load_folder(base)[HEAD], load_folder(task)[EMBEDDINGS]))
    try:
        found = merged(spec, tmp_path / "out")
    except OutlierMergeError as error:
        assert "changed since" in str(error)
    else:
        assert torch.equal(found[HEAD], whole[HEAD])


# The command line


def test_the_command_line_plans_runs_and_verifies_a_spec_with_everything(tmp_path, capsys):
    base, task = (pipeline(tmp_path / str(seed), parts(seed)) for seed in (0, 1))
    decoder = randoms({"first_stage.a": (4, 4), "first_stage.c": (2,), "loss": (1,)}, 2)
    lone = model(tmp_path / "lone", decoder)
    spec = spec_of(
        base,
        task,
        named(lone, rule(r"^first_stage\.", "vae/")) | {"missing": "base", "extra": "drop"},
        rename=rule("/a$", "/block.a"),
        output=str(tmp_path / "out"),
    )
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    assert cli.main(["plan", str(path), "--json", "--tensors"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["dropped"] == ["loss"]
    sources = {tensor["name"]: tensor["stored_names"] for tensor in planned["tensors"]}
    assert sources["vae/block.a"] == ["a", "a", "first_stage.a"]
    assert sources["unet/b"] == ["b"]  # of one model, which the method leaves as it is
    assert cli.main(["run", str(path)]) == 0
    assert f"2 tensor(s) are not in {lone}" in capsys.readouterr().err
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    found = load_folder(tmp_path / "out/vae")
    close(found["c"], sums(parts(0)["vae"]["c"], parts(1)["vae"]["c"], decoder["first_stage.c"]))
