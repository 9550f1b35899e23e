"""GGUF outputs by llama.cpp's converter: a stand-in for its failures, and the real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
from checkpoints import load_folder
from llama_cpp import real_converter, save_gemma3, save_phi3, stand_in
from stopping import stopping_after

import outliermerge
from outliermerge.checkpoint.checksum import file_checksum
from outliermerge.cli.main import main
from outliermerge.output import folder as output_folder
from outliermerge.output import names as output_names
from outliermerge.output import naming
from outliermerge.output.manifest import verify_folder
from outliermerge.output.parts import join, run_part
from outliermerge.planning.llama_cpp import PROGRAM, VARIABLE


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_phi3(tmp_path_factory.mktemp("phi3"))


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(stand_in(tmp_path / "llama.cpp")))
    return tmp_path / "llama.cpp" / PROGRAM


def test_without_a_converter_a_message_says_what_to_install(
    spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(outliermerge.SpecError, match=r"this is 'phi3'.*git clone .*LLAMA_CPP"):
        outliermerge.plan(spec)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(outliermerge.SpecError, match=rf"{PROGRAM} is not in this folder"):
        outliermerge.plan(spec)
    monkeypatch.delenv(VARIABLE)
    (tmp_path / PROGRAM).write_text('"LlamaForCausalLM"')
    (tmp_path / PROGRAM).chmod(0o755)
    with pytest.raises(outliermerge.SpecError, match="does not know Phi3ForCausalLM"):
        outliermerge.plan(spec)
    (tmp_path / PROGRAM).write_text("#!/bin/sh\necho no >&2; exit 3\n")  # it starts another
    with pytest.raises(outliermerge.OutlierMergeError, match=r"exit code 3\. .*lines:\n  no\n"):
        outliermerge.run(spec, output=tmp_path / "out")


def test_a_plan_says_that_the_time_is_without_the_conversion(
    spec: dict[str, Any], converter: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec))
    written = outliermerge.plan(spec)
    assert written.conversion is not None
    needed = written.num_written_bytes + written.conversion.num_bytes
    monkeypatch.setattr(output_names, "free_disk_bytes", lambda path: needed - 1)
    assert main(["plan", str(file), "--no-load-check"]) == 0
    told = capsys.readouterr()
    assert "then llama.cpp's converter for a time that is not known" in " ".join(told.out.split())
    assert f"{needed - 1:,} bytes free, the output needs {needed:,}" in told.err
    assert main(["plan", str(file), "--no-load-check", "--json"]) == 0
    told_json = json.loads(capsys.readouterr().out)
    assert told_json["summary"]["seconds"] is None
    assert told_json["estimate"]["then"] == "llama.cpp's converter"


def test_the_converted_merge_has_its_name_and_the_safetensors_are_gone(
    spec: dict[str, Any], converter: Path, tmp_path: Path
) -> None:
    planned = outliermerge.plan(spec)
    assert any(f"of which {converter} makes bf16" in note for note in planned.notes)
    waited = []
    done = outliermerge.run(
        planned, output=tmp_path / "out", on_waiting=lambda: waited.append(True)
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.gguf", "config.json", "tokenizer.model"} <= names
    assert not [name for name in names if "safetensors" in name]
    assert waited == [True]
    said = done.manifest["conversion"]
    assert said["by"] == str(converter) and said["outtype"] == "bf16" and len(said["sha256"]) == 64
    assert said["warnings"] == ["WARNING:hf-to-gguf:Unknown RoPE type: other"]
    file = tmp_path / "out" / "model.gguf"
    assert done.manifest["files"][file.name]["sha256"] == file_checksum(file)
    assert verify_folder(tmp_path / "out", threads=1) == []
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    assert verify_folder(tmp_path / "out", threads=1) == ["file model.gguf: its contents changed"]


def test_a_failure_is_told_and_the_merge_is_not_lost(
    spec: dict[str, Any], converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outliermerge.run(spec, output=tmp_path / "undisturbed")
    out = tmp_path / "out"
    for does, message in {
        "fails": r"exit code 1. Its last lines:(\n.*)+unknown pre-tokenizer\nThe merge",
        "truncates": "made no whole file: .*truncated.* has \\d+. Its last lines",
        "writes nothing": "made no file. Its last lines",
        "writes no tensors": "made a file without tensors. Its last lines",
    }.items():
        monkeypatch.setenv("STAND_IN", does)
        with pytest.raises(outliermerge.OutlierMergeError, match=message):
            outliermerge.run(spec, output=out)
        assert not out.exists() and (tmp_path / "out.partial").is_dir()
    monkeypatch.setenv("STAND_IN", "prints much")
    done = outliermerge.run(spec, output=out)
    assert [len(warning) for warning in done.manifest["conversion"]["warnings"]] == [43, 300]
    assert done.num_resumed == len(done.manifest["tensors"])
    assert (out / "model.gguf").read_bytes() == (tmp_path / "undisturbed/model.gguf").read_bytes()
    assert verify_folder(out, threads=1) == []


@pytest.mark.parametrize("where", ["while it merges", "before the name", "behind the name"])
def test_a_stopped_run_goes_on(
    where: str,
    spec: dict[str, Any],
    converter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "while it merges":
            with stopping_after(monkeypatch, 3):
                outliermerge.run(spec, output=out)
        elif where == "before the name":
            patch.setattr(output_folder, "begin_naming", stop)
            outliermerge.run(spec, output=out)
        else:  # it has its name, and the safetensors are there yet
            patch.setattr(naming, "remove_files", stop)
            outliermerge.run(spec, output=out)
    assert out.exists() == (where == "behind the name")
    if out.exists():
        assert list(out.glob("*.safetensors"))
        assert verify_folder(out, threads=1) == []
    done = outliermerge.run(spec, output=out, overwrite=True)
    assert done.num_resumed == {"while it merges": 3}.get(where, done.num_resumed)
    assert not list(out.glob("*.safetensors"))
    assert verify_folder(out, threads=1) == []
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_the_converter_of_a_killed_run_does_no_harm(
    spec: dict[str, Any], converter: Path, tmp_path: Path
) -> None:
    (tmp_path / "merge.yaml").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "outliermerge", "run", str(tmp_path / "merge.yaml"), "--json"]
    command += ["--output", str(tmp_path / "out")]
    flag = tmp_path / "flag"
    process = subprocess.Popen(
        command, env={**os.environ, "STAND_IN": f"waits:{flag}"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not (flag.exists() and flag.read_text()):
        time.sleep(0.05)
    process.kill()
    process.wait()
    try:
        assert len(list((tmp_path / "out.partial").glob("*.gguf"))) == 1
        done = outliermerge.run(spec, output=tmp_path / "out")
        assert done.num_resumed == len(done.manifest["tensors"])
        assert verify_folder(tmp_path / "out", threads=1) == []
    finally:
        with suppress(ProcessLookupError):
            os.kill(int(flag.read_text()), signal.SIGKILL)


def test_room_for_both_is_needed_before_the_merge(
    spec: dict[str, Any], converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = outliermerge.plan(spec)
    assert planned.conversion is not None
    both = planned.num_written_bytes + planned.conversion.num_bytes
    monkeypatch.setattr(output_folder, "free_disk_bytes", lambda _: both - 1)
    with pytest.raises(outliermerge.OutlierMergeError, match=rf"needs {both:,} \(.* for GGUF"):
        outliermerge.run(planned, output=tmp_path / "out")
    monkeypatch.setattr(output_folder, "free_disk_bytes", lambda _: both)
    done = outliermerge.run(planned, output=tmp_path / "out")
    size = (tmp_path / "out" / "model.gguf").stat().st_size
    assert abs(size - planned.conversion.num_bytes) < 0.1 * size
    assert done.written_bytes < both


def test_parts_are_joined_and_converted_and_old_outputs_replaced(
    spec: dict[str, Any], converter: Path, tmp_path: Path
) -> None:
    outliermerge.run(spec, output=tmp_path / "out")
    for part in (2, 1):
        run_part(outliermerge.plan(spec), tmp_path / "parts", part, 2)
    join(outliermerge.plan(spec), tmp_path / "parts")
    before = (tmp_path / "out" / "model.gguf").read_bytes()
    assert (tmp_path / "parts" / "model.gguf").read_bytes() == before
    assert not list((tmp_path / "parts").glob("*.safetensors"))
    changed = {**spec, "parameters": {"weight": 0.25}}
    outliermerge.run(changed, output=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.gguf").read_bytes() != before
    assert verify_folder(tmp_path / "out", threads=1) == []
    with pytest.raises(outliermerge.OutlierMergeError, match="files of this machine"):
        outliermerge.run(spec, output="s3://bucket/out")


@pytest.mark.llama_cpp
@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_the_real_converter_makes_what_was_merged(
    outtype: str, spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(real_converter()))
    more = {"f16": {"out_dtype": "float16"}, "q8_0": {"quantize": "q8_0"}}.get(outtype, {})
    done = outliermerge.run(spec | more, output=tmp_path / "out")
    plain = spec | more | {"format": "safetensors"}
    plain.pop("quantize", None)
    outliermerge.run(plain, output=tmp_path / "plain")
    assert done.manifest["conversion"]["outtype"] == outtype
    merged = load_folder(tmp_path / "plain")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert reader.fields["general.architecture"].contents() == "phi3"
    assert reader.fields["general.name"].contents() == "phi3 merged by task_arithmetic"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, 2)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(merged)
    for name, values in merged.items():
        tensor = found[names.get_name(name, (".weight", ".bias"))]
        kind = tensor.tensor_type
        assert kind.name == (outtype.upper() if values.ndim > 1 else "F32")
        wanted = gguf.quantize(values.float().numpy(), kind)
        assert numpy.array_equal(tensor.data.view(numpy.uint8), wanted.view(numpy.uint8)), name
    assert verify_folder(tmp_path / "out", threads=1) == []


@pytest.mark.llama_cpp
def test_a_vision_tower_has_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(real_converter()))
    base = save_gemma3(tmp_path / "base")
    spec = {"merge_method": "passthrough", "models": [{"model": str(base)}], "format": "gguf"}
    done = outliermerge.run(spec, output=tmp_path / "out")
    assert done.manifest["conversion"]["files"] == ["model.gguf", "mmproj-model.gguf"]
    counts = {}
    for file in done.manifest["conversion"]["files"]:
        assert file in done.manifest["files"]
        reader = gguf.GGUFReader(tmp_path / "out" / file)
        counts[reader.fields["general.type"].contents()] = sum(
            int(tensor.n_elements) for tensor in reader.tensors
        )
    assert counts["mmproj"] > 0
    assert sum(counts.values()) == sum(values.numel() for values in load_folder(base).values())
    assert "--mmproj" in (tmp_path / "out" / "README.md").read_text()
    assert verify_folder(tmp_path / "out", threads=1) == []
