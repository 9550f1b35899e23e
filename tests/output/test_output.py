"""The output folder: its layout, what is in it, what it refuses, and its proof."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import struct
from collections import namedtuple
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
import yaml
from checkpoints import load_folder, save_tensors
from safetensors import safe_open

import outliermerge
from outliermerge.checkpoint.folders.hub import is_hub_id
from outliermerge.cli import main as cli
from outliermerge.output.journal import Journal

CPU = {"threads": 1}
SHARD = "model.safetensors"


def _moved(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor + 0.01 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    generator = torch.Generator().manual_seed(0)
    base = {
        "embed.weight": torch.randn(40, 100, generator=generator),
        "layers.0.weight": torch.randn(10, 100, generator=generator),
        "layers.0.half": torch.randn(33, generator=generator).half(),
        "layers.0.steps": torch.arange(7, dtype=torch.uint8),
        "layers.1.weight": torch.randn(10, 100, generator=generator),
        "layers.1.brain": torch.randn(21, 3, generator=generator).bfloat16(),
        "layers.1.scalar": torch.tensor(0.5),
        "head.weight": torch.randn(10, 100, generator=generator),
    }
    folders = {"base": save_tensors(tmp_path / "base", base)}
    for number in (1, 2):
        folders[f"task{number}"] = save_tensors(tmp_path / f"task{number}", _moved(base, number))
    return folders


def _spec(models: dict[str, Path], **more: object) -> dict:
    return {
        "merge_method": "min_sigma",
        "base_model": str(models["base"]),
        "models": [{"model": str(models["task1"])}, {"model": str(models["task2"])}],
        **more,
    }


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _header(path: Path) -> tuple[int, dict]:
    """The header's length and contents, read by the published rules."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return length, json.loads(data[8 : 8 + length])


def _manifest(folder: Path) -> dict:
    return json.loads((folder / "outliermerge.json").read_text("utf-8"))


class TestLayout:
    def test_one_file_has_no_index(self, models: dict[str, Path], tmp_path: Path) -> None:
        outliermerge.run(_spec(models), output=tmp_path / "out", **CPU)
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == [
            "README.md", "config.json", "model.safetensors", "outliermerge.json", "recipe.yaml",
        ]  # fmt: skip

    @pytest.mark.parametrize("shard_size", [1, 100, 4_000, 4_044, 8_300, 12_345, 16_000, 20_000])
    def test_shards_keep_to_the_shard_size_and_the_index_matches(
        self, models: dict[str, Path], tmp_path: Path, shard_size: int
    ) -> None:
        output = tmp_path / "out"
        outliermerge.run(_spec(models), output=output, shard_size=shard_size, **CPU)
        shards = sorted(output.glob("*.safetensors"))
        total = len(shards)
        assert total > 1
        assert [path.name for path in shards] == [
            f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)
        ]
        index = json.loads((output / "model.safetensors.index.json").read_text())
        weight_map, num_bytes = {}, 0
        for path in shards:
            length, header = _header(path)
            assert header.pop("__metadata__") == {"format": "pt"}
            data = sum(stop - start for start, stop in (e["data_offsets"] for e in header.values()))
            assert data <= shard_size or len(header) == 1
            assert path.stat().st_size == 8 + length + data
            weight_map |= dict.fromkeys(header, path.name)
            num_bytes += data
        assert index == {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        assert load_folder(output).keys() == load_folder(models["base"]).keys()
        assert cli.main(["verify", str(output)]) == 0

    def test_no_shard_is_there_without_need(self, models: dict[str, Path], tmp_path: Path) -> None:
        """Two neighbours would not have fitted into one file."""
        output = tmp_path / "out"
        outliermerge.run(_spec(models), output=output, shard_size=9_000, **CPU)
        headers = [_header(path)[1] for path in sorted(output.glob("*.safetensors"))]
        sizes = [
            [e["data_offsets"][1] - e["data_offsets"][0] for n, e in h.items() if n[0] != "_"]
            for h in headers
        ]
        assert any(len(shard) > 1 for shard in sizes)
        for shard, following in itertools.pairwise(sizes):
            # A neighbour starts with one of the next shard's tensors, at most the largest.
            assert sum(shard) + max(following) > 9_000

    def test_a_tensor_larger_than_the_shard_size_has_its_own(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        outliermerge.run(_spec(models), output=output, shard_size="10kB", **CPU)
        files = {name: entry["file"] for name, entry in _manifest(output)["tensors"].items()}
        shared = [name for name, file in files.items() if file == files["embed.weight"]]
        assert shared == ["embed.weight"]  # 16,000 bytes
        assert len(set(files.values())) < len(files)

    @pytest.mark.parametrize("shard_size", [5_000, 10**9])
    def test_data_and_every_tensor_are_aligned(
        self, models: dict[str, Path], tmp_path: Path, shard_size: int
    ) -> None:
        output = tmp_path / "out"
        outliermerge.run(_spec(models), output=output, shard_size=shard_size, **CPU)
        sizes = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
        seen = set()
        for path in output.glob("*.safetensors"):
            length, header = _header(path)
            assert (8 + length) % 8 == 0
            header.pop("__metadata__")
            for entry in header.values():
                assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0
                seen.add(entry["dtype"])
        assert seen == set(sizes)

    def test_the_safetensors_library_loads_every_tensor_with_shape_and_dtype(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        outliermerge.run(_spec(models), output=output, shard_size=5_000, **CPU)
        base = load_folder(models["base"])
        found = {}
        for path in output.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                assert file.metadata() == {"format": "pt"}
                found |= {name: file.get_tensor(name) for name in file.keys()}
        assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
            n: (t.dtype, t.shape) for n, t in base.items()
        }
        assert torch.equal(found["layers.0.steps"], base["layers.0.steps"])
        assert not torch.equal(found["embed.weight"], base["embed.weight"])

    def test_the_tensors_do_not_depend_on_the_shard_size(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        for name, size in (("one", "5GB"), ("many", 5_000)):
            outliermerge.run(_spec(models), output=tmp_path / name, shard_size=size, **CPU)
        one, many = load_folder(tmp_path / "one"), load_folder(tmp_path / "many")
        assert one.keys() == many.keys()
        assert all(one[name].equal(many[name]) for name in one)

    def test_a_full_output_has_the_planned_size(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        planned = outliermerge.plan(_spec(models), shard_size=5_000)
        outliermerge.run(planned, output=tmp_path / "out", **CPU)
        assert {shard.file: shard.num_bytes for shard in planned.shards} == {
            path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
        }


class TestTarget:
    def test_an_existing_output_is_refused(self, models: dict[str, Path], tmp_path: Path) -> None:
        output = tmp_path / "out"
        outliermerge.run(_spec(models), output=output, **CPU)
        before = _bytes(output)
        with pytest.raises(outliermerge.OutlierMergeError, match=r"exists already.*overwrite=True"):
            outliermerge.run(_spec(models, parameters={"t": 3}), output=output, **CPU)
        assert _bytes(output) == before
        assert not (tmp_path / "out.partial").exists()

    @pytest.mark.parametrize("kind", ["file", "empty folder", "folder"])
    def test_what_is_not_an_output_of_ours_is_never_replaced(
        self, models: dict[str, Path], tmp_path: Path, kind: str
    ) -> None:
        output = tmp_path / "out"
        if kind == "file":
            output.write_text("mine")
        else:
            output.mkdir()
            if kind == "folder":
                (output / "thesis.txt").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(outliermerge.OutlierMergeError, match=f"^{output}: "):
                outliermerge.run(_spec(models), output=output, overwrite=overwrite, **CPU)
        if kind == "file":
            assert output.read_text() == "mine"
        else:
            assert len(list(output.iterdir())) == (kind == "folder")

    def test_overwrite_replaces_only_at_the_end(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        outliermerge.run(_spec(models), output=output, shard_size=5_000, **CPU)
        before, seen = _bytes(output), []

        outliermerge.run(
            _spec(models, parameters={"t": 3}),
            output=output,
            overwrite=True,
            on_progress=lambda num_bytes: seen.append(_bytes(output) == before),
            **CPU,
        )

        assert seen
        assert all(seen)
        assert not (output / "model.safetensors.index.json").exists(), "an old file is left"
        assert _manifest(output)["spec"]["parameters"] == {"t": 3}
        assert cli.main(["verify", str(output)]) == 0
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "task1", "task2"]

    def test_overwrite_is_fine_where_nothing_is(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        outliermerge.run(_spec(models), output=tmp_path / "out", overwrite=True, **CPU)
        assert cli.main(["verify", str(tmp_path / "out")]) == 0

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_failure_leaves_the_output_that_was_to_be_replaced(
        self, models: dict[str, Path], tmp_path: Path, overwrite: bool
    ) -> None:
        output = tmp_path / "out"
        outliermerge.run(_spec(models), output=output, **CPU)
        before = _bytes(output)
        tensors = load_folder(models["task2"])
        tensors["head.weight"][0, 0] = float("inf")
        save_tensors(models["task2"], tensors)
        with pytest.raises(outliermerge.OutlierMergeError):
            outliermerge.run(_spec(models), output=output, overwrite=overwrite, **CPU)
        assert _bytes(output) == before

    @pytest.mark.parametrize("model", ["base", "task1", "task2"])
    @pytest.mark.parametrize("place", [".", "merged", "..", "linked"])
    def test_an_output_that_touches_a_model_is_refused(
        self, models: dict[str, Path], tmp_path: Path, model: str, place: str
    ) -> None:
        output = models[model] / place
        if place == "linked":
            output = tmp_path / "link"
            output.symlink_to(models[model])
        before = _bytes(tmp_path)
        # Even where a manifest says that the folder is ours.
        for overwrite in (False, True):
            with pytest.raises(outliermerge.OutlierMergeError, match="choose another output"):
                outliermerge.run(_spec(models), output=output, overwrite=overwrite, **CPU)
        assert _bytes(tmp_path) == before

    def test_an_output_that_was_an_input_is_refused_with_overwrite(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        outliermerge.run(_spec(models), output=tmp_path / "out", **CPU)
        again = _spec(models | {"task1": tmp_path / "out"})
        before = _bytes(tmp_path / "out")
        with pytest.raises(outliermerge.OutlierMergeError, match="choose another output"):
            outliermerge.run(again, output=tmp_path / "out", overwrite=True, **CPU)
        assert _bytes(tmp_path / "out") == before

    @pytest.mark.parametrize("suffix", ["partial", "replaced"])
    def test_a_model_that_the_work_would_be_done_on_is_never_harmed(
        self, models: dict[str, Path], tmp_path: Path, suffix: str
    ) -> None:
        model = tmp_path / f"out.{suffix}"
        models["task1"].rename(model)
        before = _bytes(model)
        try:
            outliermerge.run(_spec(models | {"task1": model}), output=tmp_path / "out", **CPU)
        except outliermerge.OutlierMergeError:
            pass
        assert model.exists()
        assert _bytes(model) == before

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_of_the_user_beside_the_output_is_not_deleted(
        self, models: dict[str, Path], tmp_path: Path, overwrite: bool
    ) -> None:
        outliermerge.run(_spec(models), output=tmp_path / "out", **CPU)
        if not overwrite:
            shutil.rmtree(tmp_path / "out")
        mine = tmp_path / "out.replaced"
        mine.mkdir()
        (mine / "thesis.txt").write_text("mine")
        try:
            outliermerge.run(_spec(models), output=tmp_path / "out", overwrite=overwrite, **CPU)
        except outliermerge.OutlierMergeError:
            pass
        assert _bytes(mine) == {"thesis.txt": b"mine"}

    def test_a_folder_of_the_user_where_the_work_is_done_is_not_taken_into_the_output(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        mine = tmp_path / "out.partial"
        mine.mkdir()
        (mine / "thesis.txt").write_text("mine")
        try:
            outliermerge.run(_spec(models), output=tmp_path / "out", **CPU)
        except outliermerge.OutlierMergeError:
            pass
        assert not (tmp_path / "out" / "thesis.txt").exists()

    @pytest.mark.parametrize(
        "name", ["notes.txt", "photos/cat.jpg", ".git/config", "x.safetensors"]
    )
    def test_files_that_were_added_to_an_old_output_stop_it(
        self, models: dict[str, Path], tmp_path: Path, name: str
    ) -> None:
        output = tmp_path / "out"
        outliermerge.run(_spec(models), output=output, **CPU)
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("mine")
        before = _bytes(output)
        with pytest.raises(outliermerge.OutlierMergeError, match=f"did not write:\n  {name}"):
            outliermerge.run(_spec(models), output=output, overwrite=True, **CPU)
        assert _bytes(output) == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "task1", "task2"]

    def test_an_old_output_with_a_large_manifest_is_replaced(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        """That of a model of 46,000 tensors has tens of megabytes."""
        output = tmp_path / "out"
        outliermerge.run(_spec(models), output=output, **CPU)
        with (output / "outliermerge.json").open("ab") as file:
            file.write(b" " * (20 << 20))
        outliermerge.run(_spec(models), output=output, overwrite=True, **CPU)
        assert cli.main(["verify", str(output)]) == 0
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "task1", "task2"]

    def test_weights_that_were_put_in_the_place_of_ours_stop_it(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        outliermerge.run(_spec(models), output=output, **CPU)
        shutil.copy(save_tensors(tmp_path / "mine", {"a": torch.ones(2)}) / SHARD, output / SHARD)
        before = _bytes(output)
        with pytest.raises(outliermerge.OutlierMergeError, match="is not the file that"):
            outliermerge.run(_spec(models), output=output, overwrite=True, **CPU)
        assert _bytes(output) == before

    @pytest.mark.parametrize("content", ["mine", "{}", '{"shards": {"a": 1}}', "[]"])
    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("has_weights", [False, True])
    def test_a_foreign_file_of_the_manifests_name_is_left_alone(
        self, models: dict[str, Path], tmp_path: Path, content, overwrite, has_weights
    ) -> None:
        files = {name: folder / SHARD for name, folder in models.items()}
        output = tmp_path / "out.safetensors"
        mine = tmp_path / "out.safetensors.outliermerge.json"
        mine.write_text(content)
        if has_weights:
            output.write_text("mine too")
        before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
        with pytest.raises(outliermerge.OutlierMergeError):
            outliermerge.run(_spec(files), output=output, overwrite=overwrite, **CPU)
        assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before

    @pytest.mark.parametrize("one_file", [False, True])
    def test_an_output_through_a_link_is_written_where_it_leads(
        self, models: dict[str, Path], tmp_path: Path, one_file: bool
    ) -> None:
        suffix = ".safetensors" if one_file else ""
        named = {n: folder / SHARD if one_file else folder for n, folder in models.items()}
        real, link = tmp_path / f"real{suffix}", tmp_path / f"link{suffix}"
        outliermerge.run(_spec(named), output=real, **CPU)
        link.symlink_to(real)
        for t in (3, 4):  # the second time too
            spec = _spec(named, parameters={"t": t})
            with pytest.raises(outliermerge.OutlierMergeError, match="exists already"):
                outliermerge.run(spec, output=link, **CPU)
            result = outliermerge.run(spec, output=link, overwrite=True, **CPU)
            assert result.manifest["spec"]["parameters"] == {"t": t}
            assert link.readlink() == real
            assert cli.main(["verify", str(link)]) == 0
        names = {"real", "link"} if not one_file else {
            "real.safetensors", "link.safetensors", "real.safetensors.outliermerge.json"
        }  # fmt: skip
        assert {path.name for path in tmp_path.iterdir()} == {*names, *models}

    @pytest.mark.parametrize("overwrite", [False, True])
    @pytest.mark.parametrize("target", ["gone", "link"])
    def test_a_link_that_leads_nowhere_is_refused(
        self, models: dict[str, Path], tmp_path: Path, overwrite: bool, target: str
    ) -> None:
        link = tmp_path / "link"
        link.symlink_to(tmp_path / target)
        with pytest.raises(outliermerge.OutlierMergeError, match="is a link to"):
            outliermerge.run(_spec(models), output=link, overwrite=overwrite, **CPU)
        assert {path.name for path in tmp_path.iterdir()} == {"link", *models}

    @pytest.mark.parametrize("name", ["/", "a" * 241, os.fsdecode(b"out\xff")])
    def test_a_name_that_no_output_can_have_is_refused(
        self, models: dict[str, Path], tmp_path: Path, name: str, capsys
    ) -> None:
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(_spec(models)))
        code = cli.main(["run", str(tmp_path / "spec.yaml"), "--output", str(tmp_path / name)])
        printed = capsys.readouterr()
        assert code == 1
        assert "cannot be an output" in printed.err
        assert {path.name for path in tmp_path.iterdir()} == {"spec.yaml", *models}

    def test_parents_of_the_output_are_made(self, models: dict[str, Path], tmp_path: Path) -> None:
        result = outliermerge.run(_spec(models), output=tmp_path / "a" / "b" / "out", **CPU)
        assert result.output == tmp_path / "a" / "b" / "out"
        assert cli.main(["verify", str(result.output)]) == 0

    def test_a_path_under_a_file_is_one_message(
        self, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(_spec(models)))
        output = tmp_path / "file" / "out"
        code = cli.main(["run", str(tmp_path / "spec.yaml"), "--output", str(output)])
        printed = capsys.readouterr()
        assert code == 1
        assert printed.out == ""
        place = output.parent
        expected = f"error: {place}: {place} is no folder. Choose another output.\n"
        assert printed.err == expected

    def test_no_output_at_all_is_a_wrong_spec(self, models: dict[str, Path]) -> None:
        with pytest.raises(outliermerge.SpecError, match="no output"):
            outliermerge.run(_spec(models), **CPU)

    def test_the_output_of_the_spec_is_used_and_an_argument_wins(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        spec = _spec(models, output=str(tmp_path / "named"))
        assert outliermerge.run(spec, **CPU).output == tmp_path / "named"
        assert outliermerge.run(spec, output=tmp_path / "b", **CPU).output == tmp_path / "b"

    @pytest.mark.parametrize("existing", [False, True])
    def test_a_disk_that_is_too_small_is_refused_before_a_file_is_written(
        self,
        models: dict[str, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        existing: bool,
    ) -> None:
        output = tmp_path / "disk" / "out"
        if existing:
            outliermerge.run(_spec(models), output=output, **CPU)
        planned = outliermerge.plan(_spec(models))
        needed = planned.num_written_bytes
        before = _bytes(tmp_path)
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed - 1))
        with pytest.raises(
            outliermerge.OutlierMergeError, match=f"{needed - 1:,} bytes free.* needs {needed:,}"
        ):
            outliermerge.run(planned, output=output, overwrite=existing, **CPU)
        assert _bytes(tmp_path) == before
        assert not output.with_name("out.partial").exists()

        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed))
        outliermerge.run(planned, output=output, overwrite=existing, **CPU)
        assert cli.main(["verify", str(output)]) == 0

    def test_plan_warns_of_a_disk_that_is_too_small(
        self,
        models: dict[str, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(_spec(models)))
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 1_234))
        assert cli.main(["plan", str(tmp_path / "spec.yaml")]) == 0
        needed = outliermerge.plan(_spec(models)).num_written_bytes
        assert f"1,234 bytes free, the output needs {needed:,}" in capsys.readouterr().err


class TestSidecars:
    @pytest.fixture
    def output(self, models: dict[str, Path], tmp_path: Path) -> Path:
        base = models["base"]
        self.carried = {
            "config.json": b'{"model_type":   "test",\r\n"x": "\xc3\xa9"}',
            "tokenizer.json": b'{"version": "1.0"}\n',
            "tokenizer.model": bytes(range(256)),
            "chat_template.jinja": "{{ 'ü' }}\r\n".encode(),
            "modeling_test.py": b"x = 1\n",
            "merges.txt": b"#version: 0.2\r\n",
            "vocab.tiktoken": b"IQ== 0\n",
            "LICENSE": b"terms\n",
            "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
        }
        self.left = [
            "optimizer.pt",
            "training_args.bin",
            "scheduler.pt",
            "rng_state_0.pth",
            "trainer_state.json",
            "pytorch_model.bin",
            "consolidated.00.pth",
            "pytorch_model.bin.index.json",
            "model.safetensors.index.json.bak",
            ".git/config.json",
            ".gitattributes",
            ".hidden.json",
            "1_Pooling/.hidden.json",
            "events.out.tfevents",
        ]
        for name, data in self.carried.items():
            (base / name).parent.mkdir(exist_ok=True)
            (base / name).write_bytes(data)
        for name in self.left:
            (base / name).parent.mkdir(exist_ok=True)
            (base / name).write_bytes(b"{}")
        (base / "README.md").write_text("# The base's own card\n")
        (models["task1"] / "only_of_the_task.json").write_text("{}")
        self.planned = outliermerge.plan(_spec(models))
        return outliermerge.run(self.planned, output=tmp_path / "out", **CPU).output

    def test_files_of_the_base_are_carried_over_byte_for_byte(self, output: Path) -> None:
        found = _bytes(output)
        assert {name: found.get(name) for name in self.carried} == self.carried
        assert sorted(file.name for file in self.planned.sidecars) == sorted(self.carried)

    def test_nothing_else_is_there(self, output: Path) -> None:
        ours = {"README.md", "model.safetensors", "outliermerge.json", "recipe.yaml"}
        assert set(_bytes(output)) == set(self.carried) | ours
        assert b"base's own" not in (output / "README.md").read_bytes()

    def test_what_is_left_behind_is_noted(self, output: Path) -> None:
        [note] = [note for note in self.planned.notes if "not carried over" in note]
        assert "optimizer.pt" in note or "… and" in note
        assert "tokenizer.json" not in note

    def test_every_file_is_in_the_manifest_with_its_sha256(self, output: Path) -> None:
        files = _manifest(output)["files"]
        assert set(files) == set(self.carried) | {"README.md", "recipe.yaml"}
        for name, entry in files.items():
            data = (output / name).read_bytes()
            assert entry == {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def test_the_configuration_tells_the_stored_dtype(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        config = {
            "torch_dtype": "float32",
            "text_config": {"dtype": "float32", "other": "float32"},
            "vocab_size": 5,
        }
        (models["base"] / "config.json").write_text(json.dumps(config))
        for name, more in (("same", {}), ("bf16", {"out_dtype": "bfloat16"})):
            outliermerge.run(_spec(models, **more), output=tmp_path / name, **CPU)
        same = (tmp_path / "same" / "config.json").read_bytes()
        assert same == (models["base"] / "config.json").read_bytes()
        assert json.loads((tmp_path / "bf16" / "config.json").read_text()) == {
            "torch_dtype": "bfloat16",
            "text_config": {"dtype": "bfloat16", "other": "float32"},
            "vocab_size": 5,
        }
        assert cli.main(["verify", str(tmp_path / "bf16")]) == 0


class TestCard:
    def _front(self, folder: Path) -> dict:
        text = (folder / "README.md").read_text("utf-8")
        assert text.startswith("---\n")
        return yaml.safe_load(text[4:].partition("\n---\n")[0])

    def test_front_matter_names_hub_ids_only(
        self, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Folders stand in for the hub's cache; a local folder may look like a hub id."""
        monkeypatch.chdir(tmp_path)
        names = {"base": "org/base-7b", "task1": "org/task.1@main", "task2": "models/task2"}
        assert all(is_hub_id(name) for name in names.values())
        (tmp_path / "models").mkdir()
        models["task2"].rename(tmp_path / "models" / "task2")
        cached = {"org/base-7b": models["base"], "org/task.1@main": models["task1"]}
        monkeypatch.setattr(
            "outliermerge.planning.inputs.resolve",
            lambda name: cached.get(name) or (tmp_path / name),
        )
        outliermerge.run(_spec(names), output="out", **CPU)  # type: ignore[arg-type]
        front = self._front(tmp_path / "out")
        assert front == {
            "base_model": ["org/base-7b", "org/task.1"],
            "base_model_relation": "merge",
            "library_name": "transformers",
            "tags": ["merge", "outliermerge"],
        }

    def test_front_matter_of_local_models_names_none(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        (models["base"] / "config.json").unlink()
        outliermerge.run(_spec(models), output=tmp_path / "out", **CPU)
        assert self._front(tmp_path / "out") == {"tags": ["merge", "outliermerge"]}

    def test_the_recipe_in_it_is_the_spec(self, models: dict[str, Path], tmp_path: Path) -> None:
        spec = _spec(models, parameters={"t": 3}, out_dtype="bfloat16")
        outliermerge.run(spec, output=tmp_path / "out", **CPU)
        text = (tmp_path / "out" / "README.md").read_text("utf-8")
        recipe = text.partition("```yaml\n")[2].partition("```")[0]
        assert yaml.safe_load(recipe) == spec
        assert "arXiv 2501.10661" in text
        (tmp_path / "again.yaml").write_text(recipe)
        outliermerge.run(tmp_path / "again.yaml", output=tmp_path / "again", **CPU)
        assert _bytes(tmp_path / "again") == _bytes(tmp_path / "out")


class TestManifest:
    def test_it_tells_what_was_merged(self, models: dict[str, Path], tmp_path: Path) -> None:
        spec = _spec(models, parameters={"t": 2.5})
        result = outliermerge.run(spec, output=tmp_path / "out", shard_size=5_000, **CPU)
        manifest = _manifest(tmp_path / "out")
        assert manifest == result.manifest
        assert manifest["format"] == 1
        assert manifest["spec"] == spec
        assert manifest["versions"]["torch"] == torch.__version__
        assert manifest["device"] == "cpu"
        assert [(e["model"], e["role"], e["path"]) for e in manifest["inputs"]] == [
            (str(models["base"]), "base", str(models["base"])),
            (str(models["task1"]), "model", str(models["task1"])),
            (str(models["task2"]), "model", str(models["task2"])),
        ]
        for entry in manifest["inputs"]:
            file = Path(entry["path"]) / "model.safetensors"
            assert entry["files"] == {"model.safetensors": file.stat().st_size}
        base = load_folder(models["base"])
        assert manifest["num_parameters"] == sum(t.numel() for t in base.values())
        num_bytes = 3 * sum(t.nbytes for t in base.values())
        assert manifest["input_bytes"] == num_bytes
        # The first piece, which is all of a small tensor, tells whether models are equal; then a
        # pass measures σ and one merges. Of what is equal, one is read again.
        assert 2 * num_bytes < manifest["read_bytes"] <= 3 * num_bytes
        tensors = manifest["tensors"]
        assert set(tensors) == set(base)
        for name, entry in tensors.items():
            assert entry["shape"] == list(base[name].shape)
            assert entry["dtype"] == str(base[name].dtype).removeprefix("torch.")
            assert name in _header(tmp_path / "out" / entry["file"])[1]
            assert entry["sources"] == [str(folder) for folder in models.values()]
        assert tensors["head.weight"]["action"] == "merge"
        assert tensors["head.weight"]["parameters"] == {
            "t": 2.5, "weight": [1.0, 1.0], "lambda": 1.0,
            "sigma": "tensor", "scale": "std", "conflict": "sum",
        }  # fmt: skip
        assert tensors["layers.0.steps"]["action"] == "copy"
        assert "statistics" not in tensors["layers.0.steps"]

    def test_checksums_are_as_documented(self, tmp_path: Path) -> None:
        """Pieces of 65,536 elements; the last is shorter."""
        base = {
            "long": torch.randn(3 * 65_536 + 5),
            "two_d": torch.randn(2, 65_536).bfloat16(),
            "short": torch.tensor(2.0),
        }
        models = {"base": save_tensors(tmp_path / "base", base)}
        for n in (1, 2):
            models[f"task{n}"] = save_tensors(tmp_path / f"task{n}", _moved(base, n))
        outliermerge.run(_spec(models), output=tmp_path / "out", **CPU)

        def checksum(tensor: torch.Tensor) -> str:
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            step = 65_536 * tensor.element_size()
            pieces = [data[start : start + step] for start in range(0, len(data), step)]
            return xxhash.xxh3_128_hexdigest(b"".join(map(xxhash.xxh3_128_digest, pieces)))

        manifest = _manifest(tmp_path / "out")
        merged = load_folder(tmp_path / "out")
        assert {n: e["checksum"] for n, e in manifest["tensors"].items()} == {
            name: checksum(tensor) for name, tensor in merged.items()
        }
        for entry in manifest["inputs"]:
            read = load_folder(Path(entry["path"]))
            lines = [f"{name} {checksum(read[name])}\n" for name in manifest["tensors"]]
            assert entry["checksum"] == xxhash.xxh3_128_hexdigest("".join(lines).encode())

    def test_statistics_are_those_of_numpy_in_float64(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        outliermerge.run(_spec(models, parameters={"t": 1.5}), output=tmp_path / "out", **CPU)
        read = {
            key: {n: t.float().numpy() for n, t in load_folder(folder).items()}
            for key, folder in models.items()
        }
        num_checked = 0
        for name, entry in _manifest(tmp_path / "out")["tensors"].items():
            if entry["action"] != "merge":
                continue
            deltas = [read[f"task{n}"][name] - read["base"][name] for n in (1, 2)]
            sigma = [delta.astype(np.float64).std() for delta in deltas]
            statistics = entry["statistics"]
            assert statistics["sigma"] == pytest.approx(sigma, rel=1e-12, abs=1e-300)
            threshold = 1.5 * min(statistics["sigma"])
            assert statistics["threshold"] == pytest.approx(threshold, rel=1e-15)
            outliers = [int((np.abs(d) > np.float32(threshold)).sum()) for d in deltas]
            assert statistics["outliers"] == outliers
            num_checked += 1
            if len(deltas[0].ravel()) > 100:
                assert 0 < outliers[0] < deltas[0].size
        assert num_checked == 7

    def test_models_that_lack_a_tensor_are_not_its_sources(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        tensors = load_folder(models["task2"])
        del tensors["head.weight"]
        save_tensors(models["task2"], tensors)
        outliermerge.run(_spec(models, missing="base"), output=tmp_path / "out", **CPU)
        entries = _manifest(tmp_path / "out")["tensors"]
        base, one, two = (str(folder) for folder in models.values())
        # min_sigma gives one model back as it is, so that only it is read.
        assert entries["head.weight"]["sources"] == [one]
        assert entries["embed.weight"]["sources"] == [base, one, two]

    def test_two_runs_are_the_same_bytes_whenever_they_are(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        outliermerge.run(_spec(models), output=tmp_path / "one", threads=1)
        for path in (models["task1"] / "model.safetensors", models["base"] / "config.json"):
            os.utime(path, ns=(10**18, 10**18))
        outliermerge.run(_spec(models), output=tmp_path / "two", threads=3, memory="50MB")
        assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


class TestVerify:
    @pytest.fixture
    def output(self, models: dict[str, Path], tmp_path: Path) -> Path:
        (models["base"] / "1_Pooling").mkdir()
        (models["base"] / "1_Pooling" / "config.json").write_text("{}")
        run = outliermerge.run(_spec(models), output=tmp_path / "out", shard_size=8_300, **CPU)
        return run.output

    @pytest.fixture(autouse=True)
    def _captured(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def _differences(self, output: Path) -> list[str]:
        """What the command finds, as text, as JSON and by the library: all three agree."""
        self.capsys.readouterr()
        code = cli.main(["verify", str(output), "--json"])
        printed = self.capsys.readouterr()
        found = json.loads(printed.out)
        assert found.keys() == {"folder", "ok", "differences", "notes"}
        assert found["folder"] == str(output)
        assert found["ok"] == (found["differences"] == []) == (code == 0)
        assert code in (0, 1)
        assert cli.main(["verify", str(output)]) == code
        text = self.capsys.readouterr()
        assert text.err == printed.err == ""
        assert all(difference in text.out for difference in found["differences"])
        assert (" NEW` repeats the merge." in text.out) == (code == 1)
        assert outliermerge.verify(output) == found["differences"]
        return found["differences"]

    def test_a_good_folder_is_as_its_manifest_says(self, output: Path) -> None:
        assert self._differences(output) == []
        assert cli.main(["verify", str(output), "--threads", "3"]) == 0

    def test_a_folder_can_be_moved(self, output: Path, tmp_path: Path) -> None:
        output.rename(tmp_path / "elsewhere")
        assert self._differences(tmp_path / "elsewhere") == []

    @pytest.mark.parametrize(
        "name",
        ["embed.weight", "layers.0.half", "layers.0.steps", "layers.1.brain", "layers.1.scalar"],
    )
    @pytest.mark.parametrize("place", ["first", "last"])
    def test_a_flipped_bit_in_a_tensor_names_it(self, output: Path, name: str, place: str) -> None:
        shard = output / _manifest(output)["tensors"][name]["file"]
        length, header = _header(shard)
        start, stop = header[name]["data_offsets"]
        position = 8 + length + (start if place == "first" else stop - 1)
        data = bytearray(shard.read_bytes())
        data[position] ^= 1
        shard.write_bytes(data)
        [difference] = self._differences(output)
        assert f"tensor {name!r}" in difference
        assert shard.name in difference
        assert _manifest(output)["tensors"][name]["checksum"] in difference

    @pytest.mark.parametrize(
        "name",
        ["config.json", "model.safetensors.index.json", "1_Pooling/config.json"],
    )
    def test_a_changed_or_missing_file_is_named(self, output: Path, name: str) -> None:
        data = (output / name).read_bytes()
        (output / name).write_bytes(data + b" ")
        [difference] = self._differences(output)
        assert difference == f"file {name}: its contents changed"
        (output / name).unlink()
        [difference] = self._differences(output)
        assert difference == f"file {name}: is missing"

    def test_a_changed_model_card_is_a_note(self, output: Path, capsys) -> None:
        card = output / "README.md"
        card.write_text(card.read_text() + "More of it.\n")
        assert outliermerge.verify(output) == []
        assert cli.main(["verify", str(output)]) == 0
        assert "note: README.md is another; no loader reads it" in capsys.readouterr().err
        card.unlink()
        assert cli.main(["verify", str(output), "--json"]) == 0
        assert "README.md is missing" in json.loads(capsys.readouterr().out)["notes"][0]

    @pytest.mark.parametrize(
        "name",
        [
            ".git/HEAD",
            ".git/lfs/objects/aa/bb",
            ".gitattributes",
            ".gitignore",
            ".cache/huggingface/.gitignore",
            ".cache/huggingface/download/model.safetensors.metadata",
            ".huggingface/download/config.json.lock",
            ".locks/models--a/x.lock",
        ],
    )
    def test_what_git_and_the_hub_leave_is_passed_over(self, output: Path, name: str) -> None:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("*")
        assert self._differences(output) == []

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "sub/new.json", "b.safetensors", ".x",
                                      ".cache/x", "sub/.git", ".github/x"])  # fmt: skip
    def test_an_extra_file_is_named(self, output: Path, name: str) -> None:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("{}")
        [difference] = self._differences(output)
        assert difference == f"file {name}: is not in the manifest"

    def test_a_removed_shard_is_named(self, output: Path) -> None:
        shard = sorted(output.glob("*.safetensors"))[1]
        shard.unlink()
        [difference] = self._differences(output)
        assert difference == f"{shard}: cannot be read: No such file or directory"

    @pytest.mark.parametrize("num_left", [0, 5, 100, -1])
    def test_a_truncated_shard_is_named(self, output: Path, num_left: int) -> None:
        shard = sorted(output.glob("*.safetensors"))[0]
        size = shard.stat().st_size
        os.truncate(shard, num_left % size)
        [difference] = self._differences(output)
        assert str(shard) in difference

    def test_bytes_behind_a_shard_are_named(self, output: Path) -> None:
        shard = sorted(output.glob("*.safetensors"))[0]
        with shard.open("ab") as file:
            file.write(b"\0" * 8)
        [difference] = self._differences(output)
        assert str(shard) in difference
        assert "longer" in difference

    def _rewrite_header(self, shard: Path, change) -> None:
        data = shard.read_bytes()
        length, header = _header(shard)
        change(header)
        raw = json.dumps(header).encode()
        shard.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    @pytest.mark.parametrize(
        ("entry", "found"),
        [
            ({"dtype": "I32"}, "int32 [10, 100]"),
            ({"shape": [100, 10]}, "float32 [100, 10]"),
            ({"shape": [1000]}, "float32 [1000]"),
            ({"dtype": "BF16", "shape": [10, 200]}, "bfloat16 [10, 200]"),
        ],
    )
    def test_another_dtype_or_shape_in_a_header_is_named(
        self, output: Path, entry: dict, found: str
    ) -> None:
        shard = output / _manifest(output)["tensors"]["head.weight"]["file"]
        self._rewrite_header(shard, lambda header: header["head.weight"].update(entry))
        [difference] = self._differences(output)
        assert "tensor 'head.weight'" in difference
        assert f"found {found}" in difference
        assert "expected float32 [10, 100]" in difference

    def test_a_renamed_tensor_is_named_twice(self, output: Path) -> None:
        shard = output / _manifest(output)["tensors"]["head.weight"]["file"]

        def rename(header: dict) -> None:
            header["tail.weight"] = header.pop("head.weight")

        self._rewrite_header(shard, rename)
        missing, added = self._differences(output)
        assert missing == f"tensor 'head.weight': is not in {shard.name}"
        assert added == "tensor 'tail.weight': is not in the manifest"

    def _add_tensor(self, shard: Path, name: str) -> None:
        def add(header: dict) -> None:
            end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
            header[name] = {"dtype": "U8", "shape": [8], "data_offsets": [end, end + 8]}

        self._rewrite_header(shard, add)
        with shard.open("ab") as file:
            file.write(b"12345678")

    def test_an_added_tensor_is_named(self, output: Path) -> None:
        self._add_tensor(sorted(output.glob("*.safetensors"))[0], "backdoor")
        [difference] = self._differences(output)
        assert difference == "tensor 'backdoor': is not in the manifest"

    @pytest.mark.parametrize("number", [0, -1])
    def test_an_added_tensor_with_the_name_of_another_shard_s_is_noticed(
        self, output: Path, number: int
    ) -> None:
        shards = sorted(output.glob("*.safetensors"))
        shard, other = (shards[0], shards[-1]) if number == 0 else (shards[-1], shards[0])
        name = next(n for n in _header(other)[1] if n != "__metadata__")
        self._add_tensor(shard, name)
        differences = self._differences(output)
        assert any(repr(name) in difference for difference in differences)

    def test_a_changed_header_is_noticed_even_if_its_tensors_are_the_same(
        self, output: Path
    ) -> None:
        shard = sorted(output.glob("*.safetensors"))[0]
        data = shard.read_bytes()
        assert data.count(b'"format":"pt"') == 1
        shard.write_bytes(data.replace(b'"format":"pt"', b'"format":"tf"'))
        differences = self._differences(output)
        assert any(shard.name in difference for difference in differences)

    def test_several_differences_are_all_named(self, output: Path) -> None:
        (output / "config.json").unlink()
        (output / "new.txt").write_text("")
        sorted(output.glob("*.safetensors"))[0].unlink()
        assert len(self._differences(output)) == 3

    @pytest.mark.parametrize(
        ("contents", "message"),
        [
            (None, "no outliermerge.json: not an output of outliermerge"),
            ("{", "cannot be read"),
            ("[]", "not a manifest of format 1"),
            ("{}", "not a manifest of format 1"),
            ('{"format": 2, "tensors": {}, "files": {}}', "not a manifest of format 1"),
            ('{"format": 1, "tensors": {"a": {}}, "files": {}}', "not a manifest of format 1"),
            ('{"format": 1, "tensors": {"a": 3}, "files": {}}', "not a manifest of format 1"),
            ('{"format": 1, "tensors": {}, "files": {"a": {}}}', "not a manifest of format 1"),
        ],
    )
    def test_a_folder_without_a_manifest_of_ours_is_one_message(
        self, output: Path, contents: str | None, message: str
    ) -> None:
        (output / "a").write_text("")
        if contents is None:
            (output / "outliermerge.json").unlink()
        else:
            (output / "outliermerge.json").write_text(contents)
        self.capsys.readouterr()
        for options in ([], ["--json"]):
            assert cli.main(["verify", str(output), *options]) == 1
            printed = self.capsys.readouterr()
            assert printed.out == ""
            assert printed.err.startswith(f"error: {output}")
            assert message in printed.err
            assert printed.err.count("\n") == 1

    def test_an_unfinished_output_is_told_from_what_is_none(self, tmp_path: Path) -> None:
        with closing(Journal(tmp_path / "out")) as journal:
            journal.begin({})
        self.capsys.readouterr()
        assert cli.main(["verify", str(tmp_path / "out")]) == 1
        assert f"not finished: it is written in {tmp_path / 'out.partial'}" in (
            self.capsys.readouterr().err
        )

    @pytest.mark.parametrize(
        "words",
        ["verify OUT", "verify OUT --load", "stats OUT", "layers OUT", "report OUT -o page.html",
         "compare-weights OUT base", "stats base --base OUT", "plan spec.yaml", "run spec.yaml to"],
    )  # fmt: skip
    def test_an_unfinished_output_is_no_model(
        self, tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("base", "out.partial"):
            save_tensors(tmp_path / name, {"layers.0.w": torch.ones(4, 4)})
        spec = "merge_method: linear\nmodels: [{model: base}, {model: out.partial}]\n"
        (tmp_path / "spec.yaml").write_text(spec)
        with closing(Journal(tmp_path / "out")) as journal:
            journal.begin({})
        before = sorted(path.name for path in tmp_path.iterdir())
        assert cli.main(words.replace("OUT", "out.partial").split()) != 0
        said = self.capsys.readouterr().err
        assert "out.partial: is an output that is not finished" in said
        assert "start the same command again" in said
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    def test_no_folder_is_one_message(self, tmp_path: Path) -> None:
        assert cli.main(["verify", str(tmp_path / "absent")]) == 1
        assert "absent: no such file or folder\n" in self.capsys.readouterr().err

    def test_a_slip_in_its_name_is_told(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "merged" / "both").mkdir(parents=True)
        assert cli.main(["verify", "merged/btoh"]) == 1
        said = self.capsys.readouterr().err
        assert said == "error: merged/btoh: no such file or folder. Did you mean 'merged/both'?\n"
