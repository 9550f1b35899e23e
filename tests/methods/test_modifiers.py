"""LiNeS and singular value calibration after methods on task vectors, against their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import load_folder, save_tensors
from torch import Tensor

import outliermerge
from outliermerge.cli import main as cli

SHAPES = {
    "embed_tokens.weight": (40, 12),
    "model.layers.0.mlp.weight": (23, 17),
    "model.layers.1.mlp.weight": (17, 23),
    "model.layers.2.experts.up": (2, 9, 11),
    "model.layers.2.norm.weight": (19,),
    "tower.blocks.0.weight": (6, 6),
}
DEPTHS = {"model.layers.1": 0.5, "model.layers.2": 1.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, list[Path]]:
    generator = torch.Generator().manual_seed(9)
    place = tmp_path_factory.mktemp("models")

    def drawn() -> dict[str, Tensor]:
        return {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}

    base, common = drawn(), drawn()
    moved = [{n: base[n] + common[n] + own for n, own in drawn().items()} for _ in range(3)]
    saved = [save_tensors(place / f"m{n}", model) for n, model in enumerate(moved)]
    return save_tensors(place / "base", base), saved


def merged(folders: tuple[Path, list[Path]], output: Path, *modifiers: dict[str, Any], **more: Any):
    spec = {
        "base_model": str(folders[0]), "merge_method": "task_arithmetic",
        "models": [{"model": str(path)} for path in folders[1]], "modifiers": [*modifiers],
    }  # fmt: skip
    outliermerge.run(spec | more, output=output, memory="200MB")
    assert outliermerge.verify(output) == []
    return load_folder(output)


def deltas_of(folders: tuple[Path, list[Path]]) -> dict[str, list[Tensor]]:
    base, *models = (load_folder(path) for path in (folders[0], *folders[1]))
    return {name: [(m[name] - base[name]).double() for m in models] for name in base}


def calibrated(change: Tensor, deltas: list[Tensor], alpha: float) -> Tensor:
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    factors = []
    for r in range(len(s)):
        responses = [u[:, r] @ delta for delta in deltas]
        counts = [max(alpha, float(s[r] * v[r] @ a / (a @ a))) for a in responses]
        factors.append(len(deltas) / sum(counts))
    return u @ torch.diag(torch.tensor(factors, dtype=torch.float64) * s) @ v


def test_lines_scales_by_depth(folders, tmp_path):
    found = merged(folders, tmp_path / "a", {"modifier": "lines", "parameters": {"alpha": 0.2}})
    base = load_folder(folders[0])
    for name, deltas in deltas_of(folders).items():
        depth = next((place for start, place in DEPTHS.items() if name.startswith(start)), 0.0)
        wanted = base[name].double() + (0.2 + 0.5 * depth) * sum(deltas)
        assert torch.allclose(found[name].double(), wanted, atol=1e-5), name


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_svc_calibrates_matrices_and_leaves_others(alpha, folders, tmp_path):
    found = merged(folders, tmp_path / "a", {"modifier": "svc", "parameters": {"alpha": alpha}})
    base = load_folder(folders[0])
    for name, deltas in deltas_of(folders).items():
        change = sum(deltas)
        if "experts" in name:
            pairs = zip(change, *(delta.unbind() for delta in deltas), strict=True)
            change = torch.stack([calibrated(one, list(own), alpha) for one, *own in pairs])
        elif "norm" not in name and "embed" not in name:
            change = calibrated(change, deltas, alpha)
        wanted = base[name].double() + change
        assert torch.allclose(found[name].double(), wanted, atol=1e-5), name


def test_what_is_counted_once_stays_and_what_all_share_is_counted_once(tmp_path):
    values = torch.tensor([[2.0, 0, 0], [0, 1, 0]])
    base = save_tensors(tmp_path / "base", {"w": torch.zeros(2, 3)})
    same = [save_tensors(tmp_path / name, {"w": values}) for name in "ab"]
    found = merged((base, same), tmp_path / "out", {"modifier": "svc"})
    assert torch.allclose(found["w"], values)  # the sum is twice that
    apart = [values * torch.tensor([[row == n] for row in range(2)]) for n in range(2)]
    saved = [save_tensors(tmp_path / f"own{n}", {"w": own}) for n, own in enumerate(apart)]
    found = merged((base, saved), tmp_path / "other", {"modifier": "svc"})
    assert torch.allclose(found["w"], values)


def test_modifiers_follow_methods_on_matrices_in_order(folders, tmp_path):
    both = [{"modifier": "svc", "parameters": {"alpha": 0.5}}, {"modifier": "lines"}]
    found = merged(folders, tmp_path / "a", *both, merge_method="iso_c")
    first = merged(folders, tmp_path / "b", both[0], merge_method="iso_c")
    base, name = load_folder(folders[0]), "model.layers.1.mlp.weight"
    wanted = base[name] + 0.75 * (first[name] - base[name])
    assert torch.allclose(found[name], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"merge_method": "lines"}, "changes what a method has merged: see `modifiers`"),
        (
            {"merge_method": "linear", "modifiers": [{"modifier": "svc"}]},
            "modifiers change task vectors",
        ),
        (
            {"modifiers": [{"modifier": "iso_c"}]},
            "is a merge method, not a modifier",
        ),
        (
            {
                "merge_method": "ties",
                "modifiers": [{"modifier": "svc", "parameters": {"alpha": 0}}],
            },
            "found 0, expected a number > 0",
        ),
    ],
)
def test_a_modifier_in_a_wrong_place_or_with_a_wrong_value_is_refused(document, words, folders):
    models = [{"model": str(path)} for path in folders[1]]
    whole = {"merge_method": "ties", "base_model": str(folders[0]), "models": models} | document
    with pytest.raises(outliermerge.SpecError) as caught:
        outliermerge.plan(whole)
    assert words in str(caught.value)


def test_a_plan_says_by_what_a_merge_a_stage_and_a_module_are_modified(folders, tmp_path, capsys):
    modifiers = [{"modifier": "svc"}, {"modifier": "lines", "parameters": {"beta": 0.25}}]
    merge = {
        "merge_method": "ties", "models": [{"model": str(path)} for path in folders[1]],
        "modifiers": modifiers,
    }  # fmt: skip
    base = {"base_model": str(folders[0])}
    stage = {"stages": [base | merge | {"name": "one"}]}
    specs = [
        base | merge,
        stage | {"merge_method": "linear", "models": [{"model": "one"}]},
        base | {"modules": {"tower": merge}},
    ]
    for spec in specs:
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
        assert cli.main(["plan", str(tmp_path / "spec.yaml"), "--no-load-check"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "modified by svc (alpha 1.0), then lines (alpha 0.5, beta 0.25)" in said


def test_methods_says_of_a_modifier_where_it_is_named(capsys):
    assert cli.main(["methods", "lines"]) == 0
    assert "A modifier: a spec names it under `modifiers`" in capsys.readouterr().out
    assert cli.main(["methods", "ties"]) == 0
    assert "A modifier" not in capsys.readouterr().out
