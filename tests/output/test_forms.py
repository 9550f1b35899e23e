"""Quantised, adapted and packed models in, and quantised outputs, where something goes wrong.

What fails at each call is in test_output_faults.py and tests/execution/test_input_faults.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from bucket_server import BucketServer
from forms import FORMS, assert_same, identities, num_tensors, save_models, spec
from outputs_elsewhere import bucket_served, files_of, weights_in
from stopping import stopping_after

import outliermerge
from outliermerge import OutlierMergeError
from outliermerge.cli.main import main
from outliermerge.output.parts import join, run_part

FORM = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forms") / "models"
    save_models(root)
    return root


_MADE: dict[str, Path] = {}


@pytest.fixture
def whole(form: str, models: Path, own_cache: Path) -> Path:
    """Return the output of an undisturbed run, which is made once."""
    if form not in _MADE:
        _MADE[form] = models.parent / "whole" / form / "out"
        outliermerge.run(spec(form, models), output=_MADE[form], threads=1)
    return _MADE[form]


def copied(models: Path, target: Path) -> Path:
    """Copy models with their times, as a backup or a synchronised disk does."""
    return Path(shutil.copytree(models, target))


@FORM
@pytest.mark.sampled(6)
def test_a_run_that_is_stopped_anywhere_goes_on_with_other_threads_and_memory(
    form: str, models: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, num_tensors(whole), 3):
        output = tmp_path / "out"
        with stopping_after(monkeypatch, number), pytest.raises(KeyboardInterrupt):
            outliermerge.run(spec(form, models), output=output, threads=1)
        assert not output.exists()
        options = outliermerge.RunOptions(threads=3, memory="16MiB")
        done = outliermerge.run(spec(form, models), output=output, options=options)
        assert done.num_resumed == number
        assert_same(output, whole)
        shutil.rmtree(output)


@FORM
@pytest.mark.sampled(6)
def test_a_run_goes_on_where_models_were_copied_again_and_not_where_they_are_others(
    form: str, models: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files with other inodes are compared with what was read; a cache may have been cleared."""
    place, output = models.parent / "moved", tmp_path / "out"
    number = num_tensors(whole) // 2
    models.rename(place)
    try:
        copied(place, models)
        with stopping_after(monkeypatch, number), pytest.raises(KeyboardInterrupt):
            outliermerge.run(spec(form, models), output=output, threads=1)
        shutil.rmtree(models)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        copied(place, models)
        done = outliermerge.run(spec(form, models), output=output)
        assert done.num_resumed <= number if form.startswith("to-") else done.num_resumed == number
        assert_same(output, whole)
        shutil.rmtree(output)
        with stopping_after(monkeypatch, number), pytest.raises(KeyboardInterrupt):
            outliermerge.run(spec(form, models), output=output, threads=1)
        with pytest.raises(OutlierMergeError, match="begun by another merge: the spec"):
            outliermerge.run(spec(form, models, weight=0.25), output=output)
    finally:
        shutil.rmtree(models, ignore_errors=True)
        place.rename(models)


@FORM
@pytest.mark.sampled(6)
def test_parts_are_joined_to_the_bytes_of_a_run(
    form: str, models: Path, whole: Path, tmp_path: Path
) -> None:
    for part in (3, 1, 2):
        run_part(outliermerge.plan(spec(form, models)), tmp_path / "out", part, 3)
    join(outliermerge.plan(spec(form, models)), tmp_path / "out")
    assert_same(tmp_path / "out", whole)


IDENTITIES = (
    "import json, sys, pathlib, forms; "
    "print(json.dumps(forms.identities(pathlib.Path(sys.argv[1]))))"
)


def test_what_a_run_that_goes_on_compares_is_the_same_in_every_process(
    models: Path, own_cache: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IDENTITIES, str(models)],
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    here = json.loads(json.dumps(identities(models)))
    there = json.loads(done.stdout)
    for form in FORMS:
        assert there[form] == here[form], form


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    pytest.importorskip("obstore")
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    with bucket_served(tmp_path / "served", monkeypatch) as served:
        yield served


@FORM
@pytest.mark.parametrize("num_parts", [0, 3])
@pytest.mark.sampled(8)
def test_an_output_in_a_store_has_the_same_weights(
    form: str, num_parts: int, models: Path, whole: Path, bucket: BucketServer
) -> None:
    document, output = spec(form, models), "s3://bucket/out"
    if num_parts:
        for part in range(num_parts, 0, -1):
            run_part(outliermerge.plan(document), output, part, num_parts)
        join(outliermerge.plan(document), output)
    else:
        outliermerge.run(document, output=output)
    found = bucket.objects("out/")
    assert weights_in(found) == weights_in(files_of(whole))
    assert "outliermerge.json" in found
    if "format" in document:  # no part of it is read by ranges
        with pytest.raises(OutlierMergeError, match=r"only safetensors .*\n.*model\.gguf"):
            outliermerge.verify(output)
    else:
        assert outliermerge.verify(output) == []


@FORM
@pytest.mark.sampled(6)
def test_models_in_a_store_give_the_same_weights(
    form: str, models: Path, whole: Path, bucket: BucketServer, tmp_path: Path
) -> None:
    copied(models, bucket.folder / "bucket" / "models")
    document = json.loads(json.dumps(spec(form, models)).replace(str(models), "s3://bucket/models"))
    if form == "gguf":
        with pytest.raises(OutlierMergeError, match="only safetensors are read by ranges"):
            outliermerge.run(document, output=tmp_path / "out")
        return
    outliermerge.run(document, output=tmp_path / "out")
    assert weights_in(files_of(tmp_path / "out")) == weights_in(files_of(whole))


@FORM
@pytest.mark.sampled(6)
def test_a_sweep_makes_what_each_run_makes_and_goes_on(
    form: str, models: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec(form, models)))
    line = ["sweep", str(file), "--set", "weight=0.5,0.25", "--output", str(tmp_path / "swept")]
    with stopping_after(monkeypatch, num_tensors(whole) // 2):
        assert main([*line, "-q"]) == 130
    assert main([*line, "-q"]) == 0
    assert weights_in(files_of(tmp_path / "swept" / "weight=0.5")) == weights_in(files_of(whole))
    other = outliermerge.run(spec(form, models, weight=0.25), output=tmp_path / "other").output
    assert weights_in(files_of(tmp_path / "swept" / "weight=0.25")) == weights_in(files_of(other))
    assert outliermerge.verify(tmp_path / "swept" / "weight=0.25") == []


@FORM
@pytest.mark.sampled(6)
def test_a_stage_is_the_base_and_a_model_of_the_output(
    form: str, models: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a form has of its output is asked of the last merge, not of a stage."""
    last = {key: value for key, value in spec(form, models).items() if key != "convert"}
    of_output = ("quantize", "format", "rounding", "seed")
    stage = {key: value for key, value in spec(form, models).items() if key not in of_output}
    stages = {"stages": [{"name": "stage", **stage}]}
    final, output = stages | last | {"models": [{"model": "stage"}]}, tmp_path / "out"
    with stopping_after(monkeypatch, num_tensors(whole) // 2), pytest.raises(KeyboardInterrupt):
        outliermerge.run(final, output=output, threads=1)
    outliermerge.run(final, output=output)
    outliermerge.run(final, output=tmp_path / "again" / "out", threads=1, memory="16MiB")
    assert files_of(output) == files_of(tmp_path / "again" / "out")
    assert outliermerge.verify(output) == []


@pytest.mark.parametrize(("form", "package"), [("gguf", "gguf"), ("to-gguf", "gguf")])
def test_a_package_that_is_gone_when_a_run_goes_on_is_named(
    form: str, package: str, models: Path, tmp_path: Path, own_cache: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file, output = tmp_path / "spec.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(spec(form, models)))
    line = ["run", str(file), "-o", str(output), "-q", "--threads", "1"]
    with stopping_after(monkeypatch, 3):
        assert main(line) == 130
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        assert main(line) in (1, 2)
    said = capsys.readouterr().err
    assert "pip install" in said and package in said and "Traceback" not in said
    assert main(line) == 0
    assert outliermerge.verify(output) == []
