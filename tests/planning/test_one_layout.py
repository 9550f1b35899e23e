"""Models in two layouts merge as transformers loads them, and the output has the base's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from advice import spec_of
from checkpoints import load_folder
from families import refusal
from safetensors.torch import load_file, save_file
from structures import STRUCTURES, add_tensors, loaded, save_both, without_config

import outliermerge

WEIGHT = 0.5


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Return by type the folders of a base and a fine-tune, with their tensors in memory."""
    made = {}

    def family(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            base = save_both(STRUCTURES[name], root / "base", 0)
            made[name] = root, base, save_both(STRUCTURES[name], root / "task", 1, base)
        return made[name]

    return family


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in load_folder(folder).items()}


@pytest.mark.parametrize(
    "layouts", [("old", "old"), ("new", "new"), ("old", "new"), ("new", "old")]
)
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.sampled(2)
def test_merges_in_any_layouts_are_the_merge_of_the_loaded_models(
    name, layouts, families, tmp_path
):
    root, base, task = families(name)
    ours, theirs = root / "base" / layouts[0], root / "task" / layouts[1]
    outliermerge.run(spec_of(ours, theirs), output=tmp_path / "out")
    assert shapes(tmp_path / "out") == shapes(ours)
    model = loaded(STRUCTURES[name], tmp_path / "out")
    for each, tensor in model.state_dict().items():
        wanted = base[each] + WEIGHT * (task[each].double() - base[each].double())
        torch.testing.assert_close(tensor.double(), wanted.double(), rtol=0, atol=1e-6, msg=each)


def test_the_layouts_of_the_replicas_differ_where_they_are_published_so(families):
    for name, structure in STRUCTURES.items():
        root, _, _ = families(name)
        same = shapes(root / "base" / "old") == shapes(root / "base" / "new")
        assert same == structure.is_one, name


def test_layout_gives_the_output_another_form(families, tmp_path):
    root, base, _task = families("qwen3_next")
    old, new = root / "base" / "old", root / "task" / "new"
    for layout, form in ((str(new), "new"), ("transformers", "new"), (str(old), "old")):
        out = tmp_path / Path(layout).name / form
        outliermerge.run(spec_of(old, new, layout=layout), output=out)
        assert shapes(out) == shapes(root / "base" / form)
        again = outliermerge.run(spec_of(old, new, layout=layout), output=out.with_name("again"))
        written = [folder / "model.safetensors" for folder in (out, again.output)]
        assert written[0].read_bytes() == written[1].read_bytes()
    alone = {"merge_method": "passthrough", "models": [{"model": str(old)}]}
    outliermerge.run(alone | {"layout": "transformers"}, output=tmp_path / "alone")
    for name, tensor in load_folder(tmp_path / "alone").items():
        assert torch.equal(tensor, base[name])


def test_what_transformers_passes_over_is_merged_in_either_layout(families, tmp_path):
    """Qwen3-Next's layers for further tokens are in no class; they have experts, too."""
    root, _base, _task = families("qwen3_next")
    more = {}
    for number, name in enumerate(("base", "task")):
        generator = torch.Generator().manual_seed(number)
        apart = {
            f"mtp.layers.0.mlp.experts.{n}.{part}_proj.weight": torch.randn(
                shape, generator=generator
            )
            for n in range(4)
            for part, shape in (("gate", (12, 16)), ("up", (12, 16)), ("down", (16, 12)))
        } | {"mtp.fc.weight": torch.randn(16, 32, generator=generator)}
        stem = "mtp.layers.0.mlp.experts"
        gate, up, down = (
            torch.stack([apart[f"{stem}.{n}.{part}_proj.weight"] for n in range(4)])
            for part in ("gate", "up", "down")
        )
        packed = {
            f"{stem}.gate_up_proj": torch.cat([gate, up], 1),
            f"{stem}.down_proj": down,
            "mtp.fc.weight": apart["mtp.fc.weight"],
        }
        more[name] = apart, packed
    folders = {}
    for name in ("base", "task"):
        for form, own in zip(("old", "new"), more[name], strict=True):
            folders[name, form] = tmp_path / name / form
            copy_model(root / name / form, folders[name, form])
            add_tensors(folders[name, form], {k: v.clone() for k, v in own.items()})
    for form, other in (("old", "new"), ("new", "old")):
        out = tmp_path / f"out-{form}"
        outliermerge.run(spec_of(folders["base", form], folders["task", other]), output=out)
        merged = load_folder(out)
        place = form == "new"
        for key, tensor in more["base"][place].items():
            wanted = tensor.double() + WEIGHT * (
                more["task"][place][key].double() - tensor.double()
            )
            torch.testing.assert_close(merged[key].double(), wanted, rtol=0, atol=1e-6)
    # Without a counterpart such tensors are refused by name, in either form.
    for one, other in (("old", "new"), ("new", "old")):
        message = refusal(spec_of(folders["base", one], root / "task" / other))
        assert "mtp.fc.weight" in message and "mtp.layers.0.mlp.experts" in message


def copy_model(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def edited(folder: Path, target: Path, change) -> Path:
    copy_model(folder, target)
    file = target / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: {k: v for k, v in t.items() if ".layers.1.mlp.experts.2.up" not in k},
            "are 0-1, 3",
        ),
        (
            lambda t: {k: v for k, v in t.items() if ".layers.1.mlp.experts.3.up" not in k},
            "are 0-2",
        ),
        (
            lambda t: {k: v.half() if "experts.1.down" in k else v for k, v in t.items()},
            "several dtypes",
        ),
        (
            lambda t: {k: v[:-1].clone() if "experts.1.gate" in k else v for k, v in t.items()},
            "several shapes",
        ),
        (lambda t: {k: v for k, v in t.items() if ".experts.3." not in k}, "[3, 16, 12]"),
        (
            lambda t: t | {"model.layers.0.mlp.experts.0.up_proj.bias": torch.zeros(12)},
            "model.layers.0.mlp.experts.0.up_proj.bias",
        ),
    ],
    ids=["a gap", "one less", "dtype", "shape", "fewer experts", "bias"],
)
def test_experts_that_do_not_fit_are_refused_by_name(change, says, families, tmp_path):
    root, _, _ = families("qwen3_moe")
    broken = edited(root / "task" / "old", tmp_path / "broken", change)
    for base, task in ((root / "base" / "new", broken), (broken, root / "base" / "new")):
        message = refusal(spec_of(base, task))
        assert says in message


def test_a_square_tensor_whose_layout_cannot_be_told_is_refused(families, tmp_path):
    root, _, _ = families("qwen3_vl_moe")

    def squared(tensors):
        return {k: v[:, :, :12].contiguous() if k.endswith("experts.down_proj") and v.shape[1] == 12
                else v[:, :12].contiguous() if k.endswith("experts.down_proj") else v
                for k, v in tensors.items()}  # fmt: skip

    ours = edited(root / "base" / "new", tmp_path / "new", squared)
    theirs = edited(root / "task" / "old", tmp_path / "old", squared)
    assert "cannot be told" in refusal(spec_of(ours, theirs))


def split_phi(tensors):
    """Return the tensors of Phi-3 with its fused matrices apart, as Llama has them."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("qkv_proj.weight"):
            for part, own in zip("qkv", tensor.split([16, 8, 8]), strict=True):
                result[name.replace("qkv_proj", f"{part}_proj")] = own.clone()
        elif name.endswith("gate_up_proj.weight"):
            for part, own in zip(("gate", "up"), tensor.chunk(2), strict=True):
                result[name.replace("gate_up_proj", f"{part}_proj")] = own.clone()
        else:
            result[name] = tensor
    return result


CONVERT = [
    {"from": [f"self_attn.{x}_proj.weight" for x in "qkv"], "to": "self_attn.qkv_proj.weight"},
    {"from": ["mlp.gate_proj.weight", "mlp.up_proj.weight"], "to": "mlp.gate_up_proj.weight"},
]


def test_written_rules_fuse_and_split(families, tmp_path):
    root, _base, _task = families("phi3")
    apart = edited(root / "task" / "old", tmp_path / "apart", split_phi)
    assert "`convert" in refusal(spec_of(root / "base" / "old", apart))
    for ours, theirs in ((root / "base" / "old", apart), (apart, root / "base" / "old")):
        out = tmp_path / f"{ours.name}-first"
        outliermerge.run(spec_of(ours, theirs, convert=CONVERT), output=out)
        assert shapes(out) == shapes(ours)
        one, other = load_folder(ours), load_folder(theirs)
        other = split_phi(other) if ours == apart else fuse_phi(other)
        for name, tensor in load_folder(out).items():
            wanted = one[name].double() + WEIGHT * (other[name].double() - one[name].double())
            torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=1e-6)
    spec = spec_of(root / "base" / "old", apart, convert=CONVERT, layout=str(apart))
    outliermerge.run(spec, output=tmp_path / "out")
    assert shapes(tmp_path / "out") == shapes(apart)


def fuse_phi(tensors):
    result = {
        k: v for k, v in tensors.items() if not any(f"{x}_proj" in k for x in ("q", "k", "v"))
    }
    result = {k: v for k, v in result.items() if "gate_proj" not in k and "up_proj" not in k}
    for layer in range(2):
        at = f"model.layers.{layer}"
        fused = [tensors[f"{at}.self_attn.{x}_proj.weight"] for x in "qkv"]
        result[f"{at}.self_attn.qkv_proj.weight"] = torch.cat(fused)
        fused = [tensors[f"{at}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        result[f"{at}.mlp.gate_up_proj.weight"] = torch.cat(fused)
    return result


def test_written_rules_stack_and_transpose_where_no_config_tells_the_type(families, tmp_path):
    root, _, _ = families("qwen3_moe")
    turned = edited(
        without_config(root / "task" / "new"),
        tmp_path / "turned",
        lambda t: {
            k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in t.items()
        },
    )
    rules = [
        {"from": ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"],
         "to": "experts.gate_up_proj", "axis": 1, "transpose": True},
        {"from": "experts.*.down_proj.weight", "to": "experts.down_proj", "transpose": True},
    ]  # fmt: skip
    base = without_config(root / "base" / "old")
    outs = []
    for ours, theirs in ((base, turned), (turned, base)):
        outs.append(tmp_path / f"out{len(outs)}")
        outliermerge.run(spec_of(ours, theirs, convert=rules), output=outs[-1])
        assert shapes(outs[-1]) == shapes(ours)
    again = tmp_path / "again"
    outliermerge.run(
        spec_of(outs[0], outs[1], convert=rules, parameters={"weight": 1.0}), output=again
    )
    assert shapes(again) == shapes(base)
    for name, tensor in load_folder(again).items():
        torch.testing.assert_close(tensor, load_folder(outs[0])[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([], "must not be empty"),
        ({"from": ["a.weight"]}, "needs `to`"),
        ({"from": "a", "to": "b"}, "only changes a name"),
        ({"from": ["a.*.x", "b.y"], "to": "c"}, "in some texts only"),
        ({"from": ["a", "a"], "to": "c"}, "twice"),
        ({"from": ["a", "b"], "to": "c.*"}, "without `*`"),
        ({"from": ["a", "b"], "to": "c", "axis": -1}, "from 0 on"),
        ({"from": ["a", "b"], "to": "c", "along": 1}, "unknown key 'along'"),
        ({"from": ["no.such", "nor.this"], "to": "c"}, "matches no tensor"),
        ({"from": ["a", "b"], "to": "c", "transpose": 1}, "true or false"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_rules_are_refused_with_their_place(rules, says, families):
    root, _, _ = families("phi3")
    spec = spec_of(root / "base" / "old", root / "task" / "old", convert=rules)
    message = refusal(spec)
    assert says in message and "convert" in message


def test_bytes_do_not_depend_on_threads_memory_or_parts(families, tmp_path):
    root, _, _ = families("qwen3_vl_moe")
    digests = set()
    for number, keys in enumerate(
        ({"threads": 1}, {"threads": 2, "memory": "1MiB"}, {"threads": 2, "kernels": False})
    ):
        out = tmp_path / f"out{number}"
        outliermerge.run(spec_of(root / "base" / "new", root / "task" / "old"), output=out, **keys)
        digests.add((out / "model.safetensors").read_bytes())
    assert len(digests) == 1


def test_the_plan_says_what_was_converted(families):
    root, _, _ = families("mixtral")
    plan = outliermerge.plan(spec_of(root / "base" / "new", root / "task" / "old"))
    (rule, (count, before, after)) = next(iter(plan.inputs[1].renamed.items()))
    assert "mixtral" in rule and count > 20
    assert "block_sparse_moe" in before and "block_sparse_moe" not in after
    json.dumps(plan.as_dict())
