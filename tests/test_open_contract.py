"""What a method may declare besides task vectors, shown by methods of this file.

Each gives the same bytes for any blocks, threads, resumed runs and kernels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from annotated_types import Interval
from checkpoints import load_folder, save_tensors
from stopping import stopping_after
from torch import Tensor

import outliermerge
from outliermerge import OutlierMergeError, PerModel, SpecError
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import DTYPES
from outliermerge.engines.torch import TorchEngine
from outliermerge.execution.merged import Merges
from outliermerge.methods.context import Context
from outliermerge.methods.statistics.base import StandardDeviation
from outliermerge.methods.statistics.gram import Gram
from outliermerge.methods.statistics.trim import Trim
from outliermerge.methods.table import find_method
from outliermerge.methods.task import Task
from outliermerge.planning.merged import MergedSource

NAMES = (
    "model.layers.0.mlp.w",
    "model.layers.1.mlp.w",
    "model.layers.2.mlp.w",
    "model.norm",
    "long",
)
SHAPES = ((300, 260), (300, 260), (300, 260), (77,), (200_003,))


@outliermerge.merge_method(space="delta")
def dropped(
    deltas_ME: Tensor, *, context: Context, rate: Annotated[float, Interval(ge=0, lt=1)] = 0.5
) -> Tensor:
    """Drop task vectors' elements at random, and rescale what is left."""
    kept = [context.uniform(row, model=i) >= rate for i, row in enumerate(deltas_ME)]
    return (deltas_ME * torch.stack(kept) / (1 - rate)).mean(0)


@outliermerge.merge_method(space="delta", needs={"gram": Gram()}, min_models=2, max_models=2)
def slerped(deltas_ME: Tensor, *, gram: Tensor, share: float = 0.5) -> Tensor:
    """Spherical interpolation of two task vectors, a weighted sum of them."""
    lengths = gram.diagonal().sqrt()
    angle = (gram[0, 1] / lengths.prod()).clamp(-1, 1).acos()
    weights = torch.stack([((1 - share) * angle).sin(), (share * angle).sin()]) / angle.sin()
    mean_length = (1 - share) * lengths[0] + share * lengths[1]
    weights = (weights / lengths * mean_length).to(deltas_ME.dtype)
    return (deltas_ME * weights[:, None]).sum(0)


@outliermerge.merge_method(space="weight", auxiliary=("fisher",), workspace=lambda s: 2 * s + 2)
def by_fisher(weights_ME: Tensor, *, fisher: Tensor, floor: float = 1e-6) -> Tensor:
    """Average weights in proportion to Fisher diagonals."""
    share_ME = fisher + floor
    return (weights_ME * share_ME).sum(0) / share_ME.sum(0)


@outliermerge.merge_method(space="delta", needs={"trim": Trim(scope="model")})
def trimmed(deltas_ME: Tensor, *, trim: Tensor, density: PerModel = 0.3) -> Tensor:
    """Keep the largest elements of each whole task vector, and average."""
    limits = trim[0].to(deltas_ME.dtype)[:, None]
    return deltas_ME.where(deltas_ME.abs() >= limits, 0).mean(0)


@outliermerge.merge_method(space="both", cut="row")
def aligned(deltas_MRC: Tensor, *, base: Tensor) -> Tensor:
    """Take from the mean task vector what points along the base's rows."""
    mean_RC = deltas_MRC.mean(0)
    along = (mean_RC * base).sum(1, keepdim=True) / base.square().sum(1, keepdim=True)
    return along * base


@outliermerge.merge_method(space="merged")
def deeper(delta_E: Tensor, *, context: Context, least: float = 0.25) -> Tensor:
    """Scale by depth, as LiNeS does."""
    if context.layer is None:
        return delta_E
    place = context.layer / max(1, context.num_layers - 1)
    return delta_E * (least + (1 - least) * place)


@outliermerge.merge_method(space="merged", cut="tensor")
def centred(delta: Tensor) -> Tensor:
    """Take the mean away."""
    return delta - delta.mean()


METHODS = {
    "dropped": {},
    "slerped": {"parameters": {"share": 0.3}},
    "by_fisher": {},
    "trimmed": {},
    "aligned": {},
    "dropped, deeper, centred": {
        "modifiers": [
            {"modifier": f"{__name__}:deeper", "parameters": {"least": 0.5}},
            {"modifier": f"{__name__}:centred"},
        ]
    },
    "ties, deeper": {"modifiers": [{"modifier": f"{__name__}:deeper"}]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)

    def drawn(scale: float) -> dict[str, Tensor]:
        pairs = zip(NAMES, SHAPES, strict=True)
        return {name: torch.randn(shape, generator=generator) * scale for name, shape in pairs}

    base = drawn(1)
    save_tensors(folder / "base", base)
    for model in "ab":
        moved = drawn(0.1)
        save_tensors(folder / model, {name: base[name] + moved[name] for name in base})
        fisher = drawn(1)
        save_tensors(folder / f"fisher-{model}", {n: t.square() for n, t in fisher.items()})
    return folder


def spec_of(models: Path, case: str, **more: Any) -> dict[str, Any]:
    name = case.partition(",")[0]
    method = name if name == "ties" else f"{__name__}:{name}"
    entries: list[dict[str, Any]] = [{"model": str(models / model)} for model in "ab"]
    if name == "by_fisher":
        for entry, model in zip(entries, "ab", strict=True):
            entry["auxiliary"] = {"fisher": str(models / f"fisher-{model}")}
    base = {"base_model": str(models / "base")}
    return base | {"merge_method": method, "models": entries} | METHODS[case] | more


def expected(models: Path, case: str) -> dict[str, Tensor]:
    """Compute each tensor whole, in float64, without the library's machinery."""
    base, *tuned = (load_folder(models / name) for name in ("base", "a", "b"))
    base, *tuned = ({n: t.double() for n, t in state.items()} for state in (base, *tuned))
    deltas = {n: torch.stack([state[n] - base[n] for state in tuned]) for n in base}
    fishers = [load_folder(models / f"fisher-{model}") for model in "ab"]
    every = torch.cat([delta.flatten(1) for delta in deltas.values()], 1).abs()
    rank = max(1, int(0.3 * every.shape[1]))
    limits = every.sort(1, descending=True).values[:, rank - 1]
    result = {}
    for name, delta in deltas.items():
        layer = int(name.split(".")[2]) if "layers" in name else None
        context = Context(name, tuple(base[name].shape), layer, 3 if layer is not None else 0)
        match case.partition(",")[0]:
            case "dropped":
                kept = torch.stack([context.uniform(row, model=i) for i, row in enumerate(delta)])
                change = (delta * (kept >= 0.5) * 2).mean(0)
            case "slerped":
                u, v = delta.flatten(1)
                cosine = (u @ v / u.norm() / v.norm()).clamp(-1, 1)
                angle = cosine.acos()
                unit = ((0.7 * angle).sin() * u / u.norm()) + (0.3 * angle).sin() * v / v.norm()
                length = 0.7 * u.norm() + 0.3 * v.norm()
                change = (unit / angle.sin() * length).view(base[name].shape)
            case "by_fisher":
                shares = torch.stack([fisher[name].double() for fisher in fishers]) + 1e-6
                weights = torch.stack([state[name] for state in tuned])
                change = (weights * shares).sum(0) / shares.sum(0) - base[name]
            case "trimmed":
                limit = limits.view(2, *[1] * (delta.ndim - 1))
                change = delta.where(delta.abs() >= limit * (1 - 1e-6), 0).mean(0)
            case "aligned":
                rows, own = delta.mean(0), base[name]
                flat = rows.ndim < 2
                rows, own = (x[None] if flat else x for x in (rows, own))
                along = (rows * own).sum(1, keepdim=True) / own.square().sum(1, keepdim=True)
                change = (along * own)[0] if flat else along * own
            case _:
                change = find_method("ties").function(
                    delta.flatten(1), limits=torch.zeros(2, 2).add(torch.tensor([[0.0], [1.0]])),
                    weight=torch.ones(2, dtype=torch.float64),
                ).view(base[name].shape)  # fmt: skip
        least = 0.5 if "centred" in case else 0.25
        if "deeper" in case and layer is not None:
            change = change * (least + (1 - least) * layer / 2)
        if "centred" in case:
            change = change - change.mean()
        result[name] = base[name] + change
    return result


@pytest.mark.parametrize("case", METHODS)
def test_values_are_those_of_whole_tensors_in_float64(case, models, tmp_path):
    outliermerge.run(spec_of(models, case), output=tmp_path / "out")
    merged, wanted = load_folder(tmp_path / "out"), expected(models, case)
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), wanted[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", METHODS)
def test_bytes_depend_on_neither_blocks_threads_kernels_nor_resuming(
    case, models, tmp_path, monkeypatch
):
    spec = spec_of(models, case)

    def digest(name: str, **options: Any) -> bytes:
        outliermerge.run(spec, output=tmp_path / name, **options)
        return (tmp_path / name / "model.safetensors").read_bytes()

    first = digest("first", threads=1)
    assert digest("many", threads=3) == first
    least = 21_000_000 if "centred" in case or case == "aligned" else 7_000_000
    assert digest("small", threads=1, memory=least) == first
    if "slerped" not in case:  # inner products by torch agree to 1e-12 only
        assert digest("torch", kernels=False) == first
    with stopping_after(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        digest("stopped", threads=1)
    assert digest("stopped", threads=1) == first


def test_the_seed_and_the_model_change_random_numbers_and_nothing_else_does(models, tmp_path):
    def merged(name: str, **more: Any) -> dict[str, Tensor]:
        outliermerge.run(spec_of(models, "dropped", **more), output=tmp_path / name)
        return load_folder(tmp_path / name)

    one, same, other = merged("one"), merged("same", seed=0), merged("other", seed=1)
    base = load_folder(models / "base")
    for name in NAMES:
        assert one[name].equal(same[name])
        assert not one[name].equal(other[name])
    kept = (one["long"] != base["long"]).double().mean()  # where either model is kept
    assert abs(kept - 0.75) < 0.01


def test_a_plan_counts_workspace_and_auxiliary_tensors(models):
    plan = outliermerge.plan(spec_of(models, "by_fisher"))
    usual = outliermerge.plan(spec_of(models, "aligned"))
    assert plan.num_read_bytes > usual.num_read_bytes
    assert {len(job.auxiliary) for job in plan.jobs} == {2}


def test_what_a_method_needs_and_does_not_get_is_told(models, tmp_path):
    spec = spec_of(models, "by_fisher")
    del spec["models"][0]["auxiliary"]
    with pytest.raises(SpecError, match="by_fisher needs 'fisher' of each model"):
        outliermerge.plan(spec)
    spec = spec_of(models, "by_fisher")
    spec["models"][1]["auxiliary"]["fischer"] = "x"
    with pytest.raises(SpecError, match="by_fisher takes no 'fischer'"):
        outliermerge.plan(spec)
    save_tensors(tmp_path / "fisher", {name: torch.ones(3) for name in NAMES})
    spec = spec_of(models, "by_fisher")
    spec["models"][0]["auxiliary"]["fisher"] = str(tmp_path / "fisher")
    with pytest.raises(OutlierMergeError, match=r"float32 \[3\], expected a floating-point"):
        outliermerge.plan(spec)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"merge_method": f"{__name__}:deeper"}, "see `modifiers`"),
        ({"modifiers": [{"modifier": "linear"}]}, "linear is a merge method"),
        ({"modifiers": [{"modifier": f"{__name__}:deeper", "parameters": {"x": 1}}]}, "'x'"),
        ({"merge_method": "linear", "modifiers": [{"modifier": "x:y"}]}, "change task vectors"),
    ],
)
def test_modifiers_are_checked_with_the_spec(more, message, models):
    with pytest.raises(SpecError, match=message):
        outliermerge.plan(spec_of(models, "dropped") | more)


def test_a_statistic_of_whole_models_takes_what_one_lacks_as_the_bases(models, tmp_path):
    state = load_folder(models / "a")
    del state["long"]
    save_tensors(tmp_path / "a", state)
    spec = spec_of(models, "trimmed", missing="base")
    spec["models"][0]["model"] = str(tmp_path / "a")
    outliermerge.run(spec, output=tmp_path / "lacking")
    save_tensors(tmp_path / "a", state | {"long": load_folder(models / "base")["long"]})
    outliermerge.run(spec, output=tmp_path / "filled")
    found, filled = (load_folder(tmp_path / name) for name in ("lacking", "filled"))
    assert all(found[name].equal(filled[name]) for name in filled)


ENGINE = TorchEngine(["cpu"])
BY_TORCH = Merges(lambda task: ENGINE)


def merged_source(models: Path, method: Any, **parameters: Any) -> MergedSource:
    plan = outliermerge.plan(spec_of(models, "aligned"))
    (job,) = (job for job in plan.jobs if job.name == "model.layers.1.mlp.w")
    sources = tuple(source for _, source in job.sources)
    task = Task(
        method=method,
        parameters=method.resolve(len(sources) - method.uses_base, parameters),
        dtypes=tuple(source.dtype for source in sources),
        out_dtype=DTYPES["float32"],
        compute_dtype="float32",
        shape=job.output.shape,
        context=job.context,
    )
    return MergedSource("merged", task, sources)


@pytest.mark.parametrize("held_bytes", [0, 1 << 20])
@pytest.mark.parametrize(
    ("method", "cut"),
    [
        (find_method("min_sigma"), "element"),
        (find_method("task_arithmetic"), "element"),
        (aligned, "row"),
        (
            outliermerge.merge_method(
                space="delta", cut="tensor", needs={"sigma": StandardDeviation()}
            )(centred_by := lambda deltas, *, sigma: (deltas - deltas.mean()).sum(0) / sigma.max()),
            "tensor",
        ),
    ],
    ids=["min_sigma", "task_arithmetic", "row", "tensor"],
)
def test_a_merge_is_a_source_of_another(method, cut, held_bytes, models, tmp_path):
    source = merged_source(models, method)
    assert source.task.cut == cut
    assert (source.num_elements, source.num_bytes) == (300 * 260, 300 * 260 * 4)
    with Reader(held_bytes, tmp_path, BY_TORCH) as reader:
        whole = reader.values(source, 0, source.num_elements)
        for start, stop in ((0, 1), (5, 70_000), (77_999, 78_000), (259, 521), (3, 3)):
            assert reader.values(source, start, stop).equal(whole[start:stop])
        reader.release([(0, source)])
        assert reader.values(source, 7, 9).equal(whole[7:9])
        # What is merged of the merge is the merge of what was merged.
        inner = merged_source(models, find_method("linear"))
        outer = MergedSource(
            "outer",
            Task(
                method=find_method("linear"),
                parameters=find_method("linear").resolve(2, {}),
                dtypes=(source.dtype, inner.dtype),
                out_dtype=DTYPES["float32"],
                compute_dtype="float32",
                shape=source.shape,
            ),
            (source, inner),
        )
        found = reader.values(outer, 10, 5000)
        pair = torch.stack([whole[10:5000], reader.values(inner, 10, 5000)])
        assert found.equal((pair * torch.tensor([0.5, 0.5])[:, None]).sum(0))
    assert {meta.path.parent.name for meta in outer.stored} == {"base", "a", "b"}
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_what_was_measured_over_the_model(models, tmp_path):
    outliermerge.run(spec_of(models, "trimmed"), output=tmp_path / "out")
    tensors = json.loads((tmp_path / "out/outliermerge.json").read_text())["tensors"]
    assert len({str(entry["statistics"]["trim"]) for entry in tensors.values()}) == 1
