"""The package as a library: on disk, in memory, and with methods of one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import yaml
from annotated_types import Interval
from checkpoints import load_folder, save_tensors
from every_method import OF_DELTAS, OF_ONE_TENSOR, SEVERAL
from hypothesis import given, settings
from hypothesis import strategies as st

import outliermerge
from outliermerge.cli.parser import COMMANDS
from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.table import METHODS


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    """Every kind of tensor: dtypes, sizes around chunks and pieces, scalars and empty ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "matrix": normal(70, 90),
        "brain": normal(50, 40).bfloat16(),
        "half": normal(33).half(),
        "double": normal(12, 3).double(),
        "long": normal(65_536 * 3 + 17),
        "long_brain": normal(3, 65_537).bfloat16(),
        "scalar": normal(1)[0],
        "none": torch.zeros(0, 5),
        "steps": torch.arange(10),
        "mask": torch.tensor([True, False]),
    }


def alone(method: str) -> dict[str, Any]:
    """Return the parameters that let a method merge one tensor."""
    return OF_ONE_TENSOR.get(method, {})


def _family(num_models: int = 2) -> tuple[dict, list[dict]]:
    base = _tensors(0)
    models = []
    for number in range(1, num_models + 1):
        noise = _tensors(number)
        models.append(
            {
                name: (tensor + 0.05 * noise[name]).to(tensor.dtype)
                if tensor.is_floating_point()
                else tensor.clone()
                for name, tensor in base.items()
            }
        )
    return base, models


def _spec(folder: Path, method: str, num_models: int = 2, **parameters: object) -> dict:
    """A spec; lists are values of each model, as in merge_state_dicts."""
    own = {name: value for name, value in parameters.items() if isinstance(value, list)}
    return {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [
            {
                "model": str(folder / f"task{number}"),
                "parameters": {name: values[number] for name, values in own.items()},
            }
            for number in range(num_models)
        ],
        "parameters": {
            name.removesuffix("_"): value for name, value in parameters.items() if name not in own
        },
    }


def _save(folder: Path, base: dict, models: list[dict]) -> None:
    save_tensors(folder / "base", base)
    for number, model in enumerate(models):
        save_tensors(folder / f"task{number}", model)


def _same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(raw(one), raw(two))


class TestOnDisk:
    def test_a_dict_a_path_and_a_plan_give_the_same_bytes(self, tmp_path: Path) -> None:
        _save(tmp_path, *_family())
        spec = _spec(tmp_path, "min_sigma", t=3)
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
        kinds = {
            "dict": spec,
            "path": tmp_path / "spec.yaml",
            "text": str(tmp_path / "spec.yaml"),
            "plan": outliermerge.plan(spec),
        }
        contents = {}
        for name, kind in kinds.items():
            result = outliermerge.run(kind, output=tmp_path / name)
            assert result.output == tmp_path / name
            assert result.num_resumed == 0
            assert result.non_finite == {}
            assert result.seconds > 0
            assert outliermerge.verify(tmp_path / name) == []
            contents[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert all(content == contents["dict"] for content in contents.values())

    def test_a_plan_reads_no_tensor_and_writes_nothing(self, tmp_path: Path) -> None:
        _save(tmp_path, *_family())
        before = sorted(tmp_path.rglob("*"))
        planned = outliermerge.plan(_spec(tmp_path, "ties"))
        assert {job.name for job in planned.jobs} == set(_tensors(0))
        assert sorted(tmp_path.rglob("*")) == before

    def test_shard_size_is_the_plan_s(self, tmp_path: Path) -> None:
        _save(tmp_path, *_family())
        planned = outliermerge.plan(_spec(tmp_path, "linear"), shard_size="100kB")
        assert len(planned.shards) > 1
        outliermerge.run(planned, output=tmp_path / "out")
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(planned.shards)

    def test_progress_adds_up_to_the_planned_work_where_nothing_can_be_skipped(
        self, tmp_path: Path
    ) -> None:
        base, models = _family()
        names = ("matrix", "brain", "long")
        _save(tmp_path, {n: base[n] for n in names}, [{n: m[n] for n in names} for m in models])
        planned = outliermerge.plan(_spec(tmp_path, "min_sigma"))
        seen: list[int] = []
        outliermerge.run(planned, output=tmp_path / "out", on_progress=seen.append)
        total = sum(planned.num_work_bytes(job) for job in planned.jobs)
        # Besides, the first 65,536 elements of two sources are compared.
        assert total <= sum(seen) <= 1.7 * total

    def test_a_wrong_spec_is_a_spec_error_and_a_value_error(self, tmp_path: Path) -> None:
        with pytest.raises(outliermerge.SpecError, match="merge_method"):
            outliermerge.plan({"models": [{"model": "x"}]})
        with pytest.raises(outliermerge.SpecError, match="no such spec file"):
            outliermerge.run(tmp_path / "absent.yaml", output=tmp_path / "out")
        assert issubclass(outliermerge.SpecError, outliermerge.OutlierMergeError)
        assert issubclass(outliermerge.OutlierMergeError, ValueError)

    def test_verify_without_a_manifest_raises(self, tmp_path: Path) -> None:
        with pytest.raises(outliermerge.OutlierMergeError, match=r"no outliermerge\.json"):
            outliermerge.verify(tmp_path)

    def test_spaces_and_unicode_in_paths(self, tmp_path: Path) -> None:
        folder = tmp_path / "ein Ördner 模型"
        _save(folder, *_family())
        outliermerge.run(_spec(folder, "linear"), output=folder / "aus gabe")
        assert outliermerge.verify(folder / "aus gabe") == []


CASES = [
    ("min_sigma", {}),
    ("min_sigma", {"t": 0.5, "weight": [0.3, 1.2], "lambda_": 0.7}),
    ("linear", {"weight": [0.2, 0.5]}),
    ("linear", {"normalize": False, "weight": [0.2, 0.5]}),
    ("task_arithmetic", {"weight": [1.0, -0.5], "lambda_": 0.3}),
    ("task_arithmetic", {"normalize": True, "weight": 0.4}),
    ("ties", {"density": [0.3, 0.7]}),
    ("ties", {"density": 0.5, "weight": [0.4, 0.9], "rescale": True, "normalize": False}),
    ("ties", {"density": [0.0, 1.0]}),
    ("nuslerp", {"weight": [0.2, 0.5]}),
    ("nuslerp", {"nuslerp_flatten": False, "weight": [0.2, 0.5]}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", {"weight": [0.2, 0.5]}),
    ("karcher", {"max_iter": 3}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
]


class TestStateDicts:
    @pytest.mark.parametrize(("method", "parameters"), CASES)
    def test_they_are_bit_for_bit_what_a_run_on_disk_gives(
        self, tmp_path: Path, method: str, parameters: dict
    ) -> None:
        base, models = _family()
        _save(tmp_path, base, models)
        outliermerge.run(_spec(tmp_path, method, **parameters), output=tmp_path / "out")
        on_disk = load_folder(tmp_path / "out")
        in_memory = outliermerge.merge_state_dicts(models, base=base, method=method, **parameters)
        assert in_memory.keys() == on_disk.keys()
        assert [n for n in on_disk if not _same_bits(in_memory[n], on_disk[n])] == []
        assert not _same_bits(in_memory["brain"], base["brain"])

    @pytest.mark.parametrize(
        "method", [n for n, m in METHODS.items() if m.min_models < 2 or m.base_as == "first"]
    )
    def test_one_model_is_bit_for_bit_what_a_run_on_disk_gives(
        self, tmp_path: Path, method: str
    ) -> None:
        base, models = _family(1)
        _save(tmp_path, base, models)
        own = {"consensus": 1} if method == "consensus_ta" else {}  # 2, the default, is refused
        spec = _spec(tmp_path, method, num_models=1, **own)
        outliermerge.run(spec, output=tmp_path / "out")
        on_disk = load_folder(tmp_path / "out")
        in_memory = outliermerge.merge_state_dicts(models, base=base, method=method, **own)
        assert [n for n in on_disk if not _same_bits(in_memory[n], on_disk[n])] == []

    @pytest.mark.parametrize("method", SEVERAL)
    def test_mixed_dtypes_are_bit_for_bit_what_a_run_on_disk_gives(
        self, tmp_path: Path, method: str
    ) -> None:
        dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
        bases, tasks = {}, [{}, {}]
        values = [t["matrix"] for t in (_tensors(0), *_family()[1])]
        for first in dtypes:
            for second in dtypes:
                name = f"{first}-{second}"
                bases[name] = values[0].to(first, copy=True)
                tasks[0][name] = values[1].to(second, copy=True)
                tasks[1][name] = values[2].to(first, copy=True)
        _save(tmp_path, bases, tasks)
        outliermerge.run(_spec(tmp_path, method), output=tmp_path / "out")
        on_disk = load_folder(tmp_path / "out")
        in_memory = outliermerge.merge_state_dicts(tasks, base=bases, method=method)
        assert [n for n in on_disk if not _same_bits(in_memory[n], on_disk[n])] == []

    def test_the_base_gives_names_dtypes_and_shapes(self) -> None:
        base, models = _family()
        models = [{n: t.float() if t.is_floating_point() else t for n, t in m.items()}
                  for m in models]  # fmt: skip
        merged = outliermerge.merge_state_dicts(models, base=base)
        assert list(merged) == list(base)
        for name, tensor in merged.items():
            assert (tensor.dtype, tensor.shape, tensor.device) == (
                base[name].dtype,
                base[name].shape,
                base[name].device,
            )
            assert tensor.is_contiguous()

    def test_without_a_base_the_first_model_does(self) -> None:
        one = {"w": torch.tensor([1.0, 3.0]).bfloat16()}
        two = {"w": torch.tensor([2.0, 5.0], dtype=torch.float64)}
        merged = outliermerge.merge_state_dicts([one, two], method="linear")
        assert merged["w"].dtype == torch.bfloat16
        assert merged["w"].tolist() == [1.5, 4.0]

    def test_inputs_are_left_as_they_are_and_not_shared(self) -> None:
        base, models = _family()
        models[0]["matrix"] = base["matrix"].clone()
        models[1]["matrix"] = base["matrix"].clone()  # nothing to merge: a copy
        before = [{n: t.clone() for n, t in m.items()} for m in (base, *models)]
        merged = outliermerge.merge_state_dicts(models, base=base)
        inputs = (base, *models)
        for name, tensor in merged.items():
            if tensor.numel():
                pointers = [model[name].data_ptr() for model in inputs]
                assert tensor.data_ptr() not in pointers
            tensor.zero_()
        for model, copy in zip(inputs, before, strict=True):
            assert all(torch.equal(model[name], copy[name]) for name in copy)

    def test_integers_that_differ_are_refused_by_name(self) -> None:
        base, models = _family()
        models[1]["steps"] = models[1]["steps"] + 1
        with pytest.raises(
            outliermerge.OutlierMergeError, match=r"tensor 'steps': torch\.int64 .*differ"
        ):
            outliermerge.merge_state_dicts(models, base=base)

    def test_integers_of_another_width_are_an_error_of_ours(self) -> None:
        base, models = _family()
        models[1]["steps"] = models[1]["steps"].int() + 1
        with pytest.raises(outliermerge.OutlierMergeError, match="tensor 'steps'"):
            outliermerge.merge_state_dicts(models, base=base)

    @pytest.mark.parametrize("with_base", [True, False])
    @pytest.mark.parametrize("change", ["missing", "extra"])
    def test_other_names_are_refused_and_listed(self, with_base: bool, change: str) -> None:
        base, models = _family()
        if change == "missing":
            del models[1]["half"], models[1]["mask"]
        else:
            models[1] |= {"half2": torch.zeros(1), "mask2": torch.zeros(1)}
        with pytest.raises(outliermerge.OutlierMergeError) as caught:
            outliermerge.merge_state_dicts(
                models, base=base if with_base else None, method="linear"
            )
        message = str(caught.value)
        whose = "the base" if with_base else "models[0]"
        assert message.startswith(f"models[1] does not hold the same tensors as {whose}:")
        suffix = "2" if change == "extra" else ""
        rows = [f"  {name}{suffix}: {change}" for name in ("half", "mask")]
        assert message.splitlines()[1:] == rows

    @pytest.mark.parametrize("with_base", [True, False])
    def test_another_shape_is_refused_by_name(self, with_base: bool) -> None:
        base, models = _family()
        models[1]["matrix"] = models[1]["matrix"].T
        with pytest.raises(outliermerge.OutlierMergeError) as caught:
            outliermerge.merge_state_dicts(
                models, base=base if with_base else None, method="linear"
            )
        assert str(caught.value) == (
            "tensor 'matrix': models[1] is torch.float32 [90, 70], expected torch.float32 [70, 90]"
        )

    def test_a_float_for_an_integer_is_refused_by_name(self) -> None:
        base, models = _family()
        models[0]["steps"] = models[0]["steps"].float()
        with pytest.raises(outliermerge.OutlierMergeError, match=r"'steps'.*expected torch\.int64"):
            outliermerge.merge_state_dicts(models, base=base)

    def test_a_method_object_is_its_name(self) -> None:
        base, models = _family()
        by_name = outliermerge.merge_state_dicts(models, base=base, method="ties", density=0.4)
        method = METHODS["ties"]
        by_object = outliermerge.merge_state_dicts(models, base=base, method=method, density=0.4)
        assert all(_same_bits(by_name[name], by_object[name]) for name in base)

    def test_min_sigma_is_the_default(self) -> None:
        base, models = _family()
        default = outliermerge.merge_state_dicts(models, base=base)
        named = outliermerge.merge_state_dicts(models, base=base, method="min_sigma")
        assert all(_same_bits(default[name], named[name]) for name in base)

    @pytest.mark.parametrize(
        ("keywords", "said"),
        [
            ({"method": "tise"}, "Did you mean 'ties'"),
            ({"method": "ties", "densty": 0.5}, "Did you mean 'density'"),
            ({"method": "ties", "density": 1.5}, "found 1.5, expected a number ≥ 0, ≤ 1"),
            ({"method": "ties", "density": [0.5]}, "found 1 values, expected 2"),
            ({"method": "ties", "density": [0.5] * 3}, "found 3 values, expected 2"),
            ({"method": "ties", "density": "half"}, "found 'half', expected a number"),
            ({"method": "ties", "normalize": 2}, "found 2, expected true or false"),
            ({"method": "ties", "lambda_": [1.0, 2.0]}, "expected a number"),
            ({"method": "min_sigma", "t": -1}, "found -1, expected a number ≥ 0"),
            ({"method": "min_sigma", "t": float("nan")}, "finite"),
            ({"method": "linear", "weight": [1.0, -1.0]}, "add up to 0"),
            ({"method": "passthrough"}, "passthrough does not take 2 models"),
        ],
    )
    def test_wrong_arguments_are_told(self, keywords: dict, said: str) -> None:
        base, models = _family()
        with pytest.raises(outliermerge.ArgumentError) as caught:
            outliermerge.merge_state_dicts(models, base=base, **keywords)
        assert said in str(caught.value)

    def test_a_method_on_task_vectors_needs_a_base(self) -> None:
        _, models = _family()
        with pytest.raises(outliermerge.ArgumentError, match="needs a base model: give `base`"):
            outliermerge.merge_state_dicts(models)

    @pytest.mark.parametrize("base", [None, {"w": torch.ones(1)}])
    def test_no_models_are_refused(self, base: dict | None) -> None:
        with pytest.raises(outliermerge.OutlierMergeError, match="no models"):
            outliermerge.merge_state_dicts([], base=base)
        with pytest.raises(outliermerge.OutlierMergeError, match="no models"):
            outliermerge.merge_tensors([], base=base and base["w"])


class TestTensors:
    @pytest.mark.parametrize("method", SEVERAL)
    def test_strides_do_not_matter(self, method: str) -> None:
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(3, 40, 60, generator=generator)
        base, one, two = (tensor.T for tensor in whole)
        assert not base.is_contiguous()
        strided = outliermerge.merge_tensors([one, two], base=base, method=method, **alone(method))
        plain = outliermerge.merge_tensors(
            [one.contiguous(), two.contiguous()],
            base=base.contiguous(),
            method=method,
            **alone(method),
        )
        every_second = torch.zeros(3, 60, 80)
        every_second[:, :, ::2] = torch.stack([base, one, two])
        views = every_second[:, :, ::2]
        sliced = outliermerge.merge_tensors(
            [views[1], views[2]], base=views[0], method=method, **alone(method)
        )
        assert _same_bits(strided, plain)
        assert _same_bits(sliced, plain)
        assert strided.is_contiguous()

    @pytest.mark.parametrize("method", SEVERAL)
    @pytest.mark.parametrize("equal", [False, True])
    def test_the_result_needs_no_gradient(self, method: str, equal: bool) -> None:
        base = torch.nn.Parameter(torch.ones(4, 5))
        models = [torch.nn.Parameter(base.detach() + (0 if equal else n)) for n in (1, 2)]
        merged = outliermerge.merge_tensors(models, base=base, method=method, **alone(method))
        plain = outliermerge.merge_tensors(
            [model.detach() for model in models], base=base.detach(), method=method, **alone(method)
        )
        assert torch.equal(merged, plain)
        assert not merged.requires_grad
        assert merged.grad_fn is None

    @pytest.mark.parametrize("method", ["min_sigma", "ties", "task_arithmetic", "linear"])
    def test_scalars_and_empty_tensors(self, method: str) -> None:
        base, one, two = torch.tensor(1.0), torch.tensor(1.5), torch.tensor(2.5)
        expected = {"min_sigma": 3.0, "ties": 2.0, "task_arithmetic": 3.0, "linear": 2.0}
        merged = outliermerge.merge_tensors([one, two], base=base, method=method)
        assert merged.shape == ()
        assert merged.item() == expected[method]
        for shape in ((0,), (0, 5), (3, 0)):
            empty = torch.zeros(shape)
            merged = outliermerge.merge_tensors([empty, empty], base=empty, method=method)
            assert merged.shape == shape
            merged = outliermerge.merge_tensors(
                [empty.double(), empty.double()], base=empty, method=method
            )
            assert (merged.shape, merged.dtype) == (shape, torch.float32)

    def test_list_parameters_go_to_their_models(self) -> None:
        base, one, two = torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        merged = outliermerge.merge_tensors(
            [one, two], base=base, method="task_arithmetic", weight=[0.25, 3.0]
        )
        assert merged.tolist() == [0.25, 3.0]

    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        num_models=st.integers(2, 4),
        num_elements=st.integers(1, 300),
        t=st.floats(0, 4),
    )
    def test_min_sigma_is_the_formula_in_float64(
        self, seed: int, num_models: int, num_elements: int, t: float
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(num_elements, generator=generator, dtype=torch.float64)
        models = [
            base + torch.randn(num_elements, generator=generator, dtype=torch.float64) * 0.1
            for _ in range(num_models)
        ]
        deltas = torch.stack(models) - base
        threshold = t * deltas.std(1, correction=0).min()
        # Elements so near the threshold that rounding decides are left out of the comparison.
        clear = ((deltas.abs() - threshold).abs() > 1e-9).all(0)
        kept = torch.where(deltas.abs() > threshold, deltas, deltas / num_models)
        merged = outliermerge.merge_tensors(models, base=base, t=t)
        assert merged.dtype == torch.float64
        torch.testing.assert_close(
            merged[clear], (base + kept.sum(0))[clear], rtol=1e-12, atol=1e-12
        )

    @pytest.mark.parametrize("method", [name for name in OF_DELTAS if name in SEVERAL])
    def test_models_equal_to_the_base_give_the_base(self, method: str) -> None:
        base = torch.tensor([0.1, -0.0, 3e-41, 1e30])
        merged = outliermerge.merge_tensors(
            [base.clone()] * 3, base=base, method=method, **alone(method)
        )
        assert _same_bits(merged, base)


@outliermerge.merge_method(space="delta", paper="none")
def largest(
    deltas: torch.Tensor,
    *,
    scale: Annotated[float, Interval(gt=0, le=2)] = 1.0,
    weight: outliermerge.PerModel = 1.0,
) -> torch.Tensor:
    """Keep the largest weighted task vector's elements.

    W* = W + scale · max wᵢΔWᵢ
    """
    return (deltas * weight[:, None]).amax(0) * scale


class TestOwnMethods:
    def test_the_decorator_reads_the_signature(self) -> None:
        assert isinstance(largest, MergeMethod)
        assert (largest.name, largest.space, largest.cut) == ("largest", "delta", "element")
        assert largest.summary == "Keep the largest weighted task vector's elements."
        assert list(largest.parameters) == ["scale", "weight"]
        scale, weight = largest.parameters.values()
        assert (scale.default, scale.per_model, scale.range) == (1.0, False, "> 0, ≤ 2")
        assert (weight.default, weight.per_model) == (1.0, True)

    def test_it_is_used_in_memory(self) -> None:
        base = torch.zeros(3)
        models = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 1.0, -1.0])]
        merged = outliermerge.merge_tensors(
            models, base=base, method=largest, scale=2, weight=[1.0, 0.5]
        )
        assert merged.tolist() == [3.0, 4.0, 6.0]
        with pytest.raises(outliermerge.ArgumentError, match="expected a number > 0, ≤ 2"):
            outliermerge.merge_tensors(models, base=base, method=largest, scale=0)

    def test_it_can_be_called_on_a_block(self) -> None:
        block = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        assert largest(block, scale=0.5).tolist() == [1.0, 1.0]

    def test_one_in_a_module_runs_from_the_command_line(
        self, tmp_path: Path, warm_torch: Path
    ) -> None:
        base, models = _family()
        _save(tmp_path, base, models)
        (tmp_path / "my_methods.py").write_text(
            textwrap.dedent('''
            import torch
            import outliermerge
            from outliermerge import PerModel, StandardDeviation, merge_method

            @merge_method(space="delta", needs={"spread": StandardDeviation()})
            def by_spread(deltas, *, spread, power: float = 1.0, weight: PerModel = 1.0):
                """Weigh task vectors by their spread."""
                share = spread / spread.sum().clamp_min(1e-30)
                share = (share**power).to(deltas.dtype) * weight
                merged = (deltas * share[:, None]).sum(0)
                return merged, {"positive": (deltas > 0).sum(1), "share": share}

            @merge_method(space="weight", cut="row")
            def row_max(weights_MRC, *, shift: float = 0.0):
                """Rows."""
                assert weights_MRC.ndim == 3
                return weights_MRC.amax(0) + shift

            @merge_method(space="delta", cut="tensor")
            def whole(deltas, *, lambda_: float = 1.0):
                """The whole tensor, in its shape."""
                return deltas.flip(-1).mean(0) * lambda_ if deltas.ndim > 1 else deltas.mean(0)
            ''')
        )
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        for method, parameters in (
            ("by_spread", {"power": 2, "weight": [0.5, 2.0]}),
            ("row_max", {"shift": 0.25}),
            ("whole", {"lambda_": 0.5}),
        ):
            path = f"my_methods:{method}"
            (tmp_path / "spec.yaml").write_text(yaml.safe_dump(_spec(tmp_path, path, **parameters)))
            only_run = method != "by_spread"  # a process a command takes its time
            for command in (
                ["plan", tmp_path / "spec.yaml", "--json"],
                ["methods", path],
                ["run", tmp_path / "spec.yaml", "--output", tmp_path / method, "--threads", "2"],
                ["verify", tmp_path / method],
            ):
                if only_run and command[0] != "run":
                    continue
                done = subprocess.run(
                    [warm_torch, "-m", "outliermerge", *map(str, command)],
                    capture_output=True,
                    text=True,
                    env=environment,
                    timeout=600,
                )
                assert done.returncode == 0, done.stderr
            on_disk = load_folder(tmp_path / method)
            with pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend(str(tmp_path))
                in_memory = outliermerge.merge_state_dicts(
                    models, base=base, method=path, **parameters
                )
            assert [n for n in on_disk if not _same_bits(in_memory[n], on_disk[n])] == []
        manifest = json.loads((tmp_path / "by_spread" / "outliermerge.json").read_text())
        statistics = manifest["tensors"]["long"]["statistics"]
        deltas = torch.stack([model["long"] - base["long"] for model in models])
        assert statistics["positive"] == (deltas > 0).sum(1).tolist()
        spread = deltas.double().std(1, correction=0)
        assert statistics["spread"] == pytest.approx(spread.tolist(), rel=1e-12)
        share = (spread / spread.sum()) ** 2 * torch.tensor([0.5, 2.0])
        assert statistics["share"] == pytest.approx(share.tolist(), rel=1e-6)

    def test_wrong_signatures_are_type_errors(self) -> None:
        def positional(deltas, scale: float = 1.0):
            return deltas

        def without_default(deltas, *, scale: float):
            return deltas

        def other_type(deltas, *, scale: float = 1):
            return deltas

        def list_type(deltas, *, scale: list = []):  # noqa: B006
            return deltas

        def unannotated(deltas, *, scale=1.0):
            return deltas

        def catches_all(deltas, **scale):
            return deltas

        for function in (
            positional, without_default, other_type, list_type, unannotated, catches_all
        ):  # fmt: skip
            with pytest.raises(TypeError, match=f"^{function.__name__}: parameter 'scale' must be"):
                outliermerge.merge_method(space="delta")(function)

    def test_a_need_that_no_keyword_takes_is_a_type_error(self) -> None:
        def function(deltas, *, scale: float = 1.0):
            return deltas

        with pytest.raises(TypeError, match=r"^function: the need 'sigma' is not a keyword of it"):
            outliermerge.merge_method(
                space="delta", needs={"sigma": outliermerge.StandardDeviation()}
            )(function)

    def test_a_result_of_a_wrong_shape_is_an_error_that_names_the_method(self) -> None:
        @outliermerge.merge_method(space="weight")
        def keeps_models(weights):
            return weights

        with pytest.raises(ValueError, match="keeps_models returned shape"):
            outliermerge.merge_tensors([torch.ones(4), torch.zeros(4)], method=keeps_models)


class TestImport:
    def test_import_is_light(self) -> None:
        code = "import sys, outliermerge; print(*sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True
        )
        modules = set(done.stdout.split())
        assert "outliermerge" in modules
        assert modules.isdisjoint({"torch", "transformers", "pydantic", "yaml", "numpy", "rich"})

    def test_every_name_resolves_in_a_new_process(self, warm_torch: Path) -> None:
        code = (
            "import outliermerge\n"
            "for name in outliermerge.__all__:\n"
            "    value = getattr(outliermerge, name)\n"
            "    print(name, getattr(value, '__name__', name))\n"
            "from outliermerge import *\n"
            "assert callable(merge_state_dicts)\n"
        )
        done = subprocess.run([warm_torch, "-c", code], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        pairs = [line.split() for line in done.stdout.splitlines()]
        assert [name for name, _ in pairs] == list(outliermerge.__all__)
        assert [pair for pair in pairs if pair[0] != pair[1] and pair[0] != "PerModel"] == []

    @pytest.mark.parametrize(
        ("command", "name"),
        [("stats", "weight_stats"), ("report", "build_report"), ("layers", "layer_spectra"),
         ("merge", "run")],
    )  # fmt: skip
    def test_the_name_of_a_command_leads_to_its_function(self, command: str, name: str) -> None:
        with pytest.raises(AttributeError, match=f"'{command}'. Did you mean '{name}'"):
            getattr(outliermerge, command)
        assert getattr(outliermerge, name)

    def test_all_commands_are_functions_or_lead_to_one_or_are_told_as_commands(self) -> None:
        for command in COMMANDS:
            name = command.replace("-", "_")
            if name in outliermerge.__all__ or name in ("methods", "search"):  # also rooms
                continue
            with pytest.raises(AttributeError, match=rf"Did you mean|only a command.*{command}`"):
                getattr(outliermerge, name)

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="module 'outliermerge' has no attribute 'mege'"):
            outliermerge.mege  # noqa: B018
        assert not hasattr(outliermerge, "importlib_not_there")

    @pytest.mark.parametrize(
        ("asked", "meant"),
        [
            ("stats", "weight_stats"),
            ("compare", "compare_weights"),
            ("spectra", "layer_spectra"),
            ("report", "build_report"),
            ("weights_stats", "weight_stats"),
            ("weightstats", "WeightStats"),
            ("mege_tensors", "merge_tensors"),
            ("plans", "plan"),
        ],
    )
    def test_an_unknown_name_gets_the_one_that_has_its_word(self, asked: str, meant: str) -> None:
        with pytest.raises(AttributeError, match=f"Did you mean '{meant}'"):
            getattr(outliermerge, asked)

    def test_the_caller_s_threads_are_left_as_they_are(
        self, tmp_path: Path, warm_torch: Path
    ) -> None:
        """In a new process: torch's settings are of the process."""
        _save(tmp_path, *_family())
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(_spec(tmp_path, "min_sigma")))
        code = textwrap.dedent(f"""
            import torch, outliermerge
            torch.set_num_threads(3)
            before = torch.get_num_threads(), torch.get_num_interop_threads()
            generator = torch.get_rng_state()
            outliermerge.run({str(tmp_path / "spec.yaml")!r}, output={str(tmp_path / "out")!r})
            assert (torch.get_num_threads(), torch.get_num_interop_threads()) == before, "run"
            big = torch.randn(3, 300_000, generator=torch.Generator().manual_seed(0))
            outliermerge.merge_tensors([big[1], big[2]], base=big[0])
            assert torch.get_num_threads() == 3, "merge_tensors"
            outliermerge.verify({str(tmp_path / "out")!r})
            assert torch.get_num_threads() == 3, "verify"
            assert torch.get_default_dtype() == torch.float32
            assert torch.equal(torch.get_rng_state(), generator), "the random generator moved"
        """)
        done = subprocess.run([warm_torch, "-c", code], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr

    def test_threads_that_the_caller_starts_later_are_left_as_they_are(
        self, warm_torch: Path
    ) -> None:
        code = textwrap.dedent("""
            import threading, torch, outliermerge
            torch.set_num_threads(3)

            def in_a_new_thread():
                seen = []
                thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
                thread.start()
                thread.join()
                return seen[0]

            before = in_a_new_thread()
            outliermerge.merge_tensors([torch.ones(9), torch.zeros(9)], method="linear")
            print(before, in_a_new_thread())
        """)
        done = subprocess.run([warm_torch, "-c", code], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["3", "3"]
