"""Inputs that change between the plan and the end of a merge: each is noticed, none is merged."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import save_lora
from every_method import NEEDS_BASE, SEVERAL
from kinds import save_models, spec
from safetensors.torch import save_file

import outliermerge
from outliermerge import OutlierMergeError
from outliermerge.api import plan_moe
from outliermerge.engines.cpu import KernelEngine
from outliermerge.engines.torch import TorchEngine
from outliermerge.execution.jobs import JobRunner
from outliermerge.execution.routers import add_routers
from outliermerge.output import run as runs
from outliermerge.output.folder import OutputFolder
from outliermerge.output.options import RunOptions
from outliermerge.planning.moe import Mixture
from outliermerge.spec.moe import load_moe_spec
from outliermerge.storage.stamps import Watched

NAMES = ("a.weight", "b.weight", "frozen.weight")


@outliermerge.merge_method(space="weight", cut="row")
def by_rows(weights):
    """Take the mean, row by row."""
    return weights.mean(0)


BY_ROWS = f"{__name__}:by_rows"
METHODS: dict[str, dict] = {name: {} for name in SEVERAL} | {
    "linear": {},
    "min_sigma": {"t": 1.0},
    "ties": {"density": 0.4, "rescale": True},
    "task_arithmetic": {"weight": 0.5},
    BY_ROWS: {},
}
TWO_PASSES = ("min_sigma", "ties", BY_ROWS)


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frozen = torch.ones(300, 260)
    values = [torch.randn(300, 260, generator=generator) for _ in NAMES[:2]]
    return dict(zip(NAMES, [*values, frozen], strict=True))


def _single(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    files = {name: f"model-{i + 1:05d}-of-00003.safetensors" for i, name in enumerate(NAMES)}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickled(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    odd = tensors | {"b.weight": tensors["b.weight"].t().contiguous().t()}
    torch.save(odd, folder / "pytorch_model.bin")


def _quantized(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    stored = {}
    for name, values in tensors.items():
        stored[name] = values.clamp(-4, 4).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.full((3, 3), 0.5)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "t", "quantization_config": config})
    )


def _adapter(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    factors = {
        "a.lora_A.weight": tensors["a.weight"][:1].clone(),
        "a.lora_B.weight": tensors["a.weight"][:, :1].clone(),
    }
    save_lora(folder, factors, target_modules=["a"])


FORMATS: dict[str, tuple[Callable[[Path, dict[str, torch.Tensor]], None], str]] = {
    "single": (_single, "model.safetensors"),
    "shard": (_sharded, "model-00002-of-00003.safetensors"),
    "index": (_sharded, "model.safetensors.index.json"),
    "pickle": (_pickled, "pytorch_model.bin"),
    "quantized": (_quantized, "model.safetensors"),
    "adapter": (_adapter, "adapter_model.safetensors"),
    "adapter's config": (_adapter, "adapter_config.json"),
    "config": (_single, "config.json"),
    "tokenizer": (_single, "tokenizer_config.json"),
    "sidecar": (_single, "LICENSE"),
    "code": (_single, "modeling_t.py"),
}


def _models(folder: Path, kind: str) -> Path:
    """Build three models, and return the file that is to change."""
    write, file = FORMATS[kind]
    for number, name in enumerate(("base", "first", "second")):
        model = folder / name
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"model_type": "t"}))
        (model / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
        (model / "LICENSE").write_text("MIT\n")
        (model / "modeling_t.py").write_text("import math\n")
        is_adapter = write is _adapter and name == "first"
        (write if write is not _adapter or is_adapter else _single)(model, _tensors(number))
    beside = file in ("config.json", "tokenizer_config.json", "LICENSE", "modeling_t.py")
    return folder / ("base" if beside else "first") / file


def _spec(folder: Path, method: str) -> dict:
    needs_base = method in NEEDS_BASE
    first = folder / "first"
    if (first / "adapter_config.json").exists():
        first = f"{folder / 'base'}+{first}"
    models = [{"model": str(first)}, {"model": str(folder / "second")}]
    return {
        "merge_method": method,
        "models": models,
        "parameters": METHODS[method],
        **({"base_model": str(folder / "base")} if needs_base else {}),
    }


# Ways of changing.


def _others(path: Path) -> bytes:
    """Return other bytes of the same number, of which a header stays right."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    middle = len(data) * 2 // 3
    data[middle] ^= 1
    return bytes(data)


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(_others(path))


def put_back(path: Path) -> None:
    status = path.stat()
    overwritten(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def renamed_over(path: Path) -> None:
    other, status = path.with_name("other"), path.stat()
    other.write_bytes(_others(path))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def linked(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(_others(path))
    path.unlink()
    path.symlink_to(other)


def deleted(path: Path) -> None:
    path.unlink()


def made_again(path: Path) -> None:
    data = _others(path)
    path.unlink()
    path.write_bytes(data)


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def touched(path: Path) -> None:
    os.utime(path)


WAYS = (overwritten, put_back, truncated, grown, renamed_over, linked, deleted, made_again,
        piped, a_folder, a_loop, touched)  # fmt: skip
MOMENTS = ("planned", "first tensor", "second pass", "end")


def _sample() -> Iterator[tuple]:
    """Yield each way at each moment, and all else in turn."""
    others = itertools.cycle(itertools.product(FORMATS, (True, False)))
    methods = itertools.cycle(METHODS)
    for way, moment in itertools.product(WAYS, MOMENTS):
        kind, kernels = next(others)
        yield way, moment, kind, next(methods), kernels


def _at(moment: str, change: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Have a change made once at a moment of the run that follows."""
    left = [change]

    def fire() -> None:
        while left:
            left.pop()()

    if moment == "planned":
        fire()
    elif moment == "first tensor":
        record = OutputFolder.record

        def recorded(*arguments):
            record(*arguments)
            fire()

        patch.setattr(OutputFolder, "record", recorded)
    elif moment in ("second pass", "rows"):
        for engine in (KernelEngine, TorchEngine) if moment != "rows" else ():
            prepare = engine.prepare

            def prepared(*arguments, prepare=prepare):
                fire()
                return prepare(*arguments)

            patch.setattr(engine, "prepare", prepared)
        again = JobRunner._checksum_again

        def checksummed(*arguments):
            fire()
            return again(*arguments)

        patch.setattr(JobRunner, "_checksum_again", checksummed)
    else:
        write = runs.write_sidecars

        def written(*arguments, **keywords):
            fire()
            return write(*arguments, **keywords)

        patch.setattr(runs, "write_sidecars", written)


def _assert_noticed(case: tuple, folder: Path) -> None:
    way, moment, kind, method, kernels = case
    path = _models(folder, kind)
    if method in NEEDS_BASE:
        assert (folder / "base").is_dir()
    else:  # the first model is the reference: its files are those that are carried over
        path = folder / "first" / path.name if kind != "adapter's config" else path
        if not path.exists():
            path = folder / "base" / path.name
    with pytest.MonkeyPatch.context() as patch:
        planned = outliermerge.plan(_spec(folder, method))
        _at(moment, lambda: way(path), patch)
        with pytest.raises(OutlierMergeError) as caught:
            outliermerge.run(planned, output=folder / "out", kernels=kernels, threads=3)
    assert str(path) in str(caught.value), case
    assert not (folder / "out").exists(), case


@pytest.mark.parametrize(
    "case", [*_sample()], ids=lambda case: "-".join(getattr(p, "__name__", str(p)) for p in case)
)
def test_a_changed_input_is_refused_by_its_name(case, tmp_path):
    _assert_noticed(case, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("way", WAYS)
def test_every_change_at_every_moment_in_every_format_is_noticed(way, tmp_path, record_property):
    cases = [*itertools.product([way], MOMENTS, FORMATS, METHODS, (True, False))]
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        _assert_noticed(case, folder)
        shutil.rmtree(folder)
    record_property("points", len(cases))


# Files that each kind of spec reads, each to be changed.
FILES_OF = {
    "slices": ("one/model.safetensors", "base/model.safetensors", "base/config.json"),
    "stages": ("one/model.safetensors", "base/model.safetensors", "base/config.json"),
    "modules": ("one/model.safetensors", "base/model.safetensors", "base/config.json"),
    "tokenizer": (
        *("told/model.safetensors", "told/tokenizer.json", "told/tokenizer_config.json"),
        *("base/tokenizer.json", "told/config.json", "base/config.json"),
    ),
    "moe": (
        *("one/model.safetensors", "one/config.json", "base/model.safetensors"),
        *("base/tokenizer.json", "base/config.json"),
    ),
}


def _of_kinds(ways: Iterable[Callable], kernels: bool) -> Iterator[tuple]:
    """Yield each way and moment with each file of each kind of spec."""
    for way, moment, (kind, files) in itertools.product(ways, MOMENTS, FILES_OF.items()):
        # Experts are copied, or merged with noise, which takes one pass.
        for file in files if (kind, moment) != ("moe", "second pass") else ():
            yield way, moment, kind, file, kernels


def _assert_noticed_in(case: tuple, folder: Path) -> None:
    way, moment, kind, file, kernels = case
    save_models(folder / "models")
    path, content = folder / "models" / file, spec(kind, folder / "models")
    options = RunOptions(kernels=kernels, threads=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        planned = plan_moe(load_moe_spec(content)) if kind == "moe" else outliermerge.plan(content)
        _at(moment, lambda: way(path), patch)
        with pytest.raises(OutlierMergeError) as caught:
            if isinstance(planned, Mixture):
                planned = add_routers(planned, show_routing=False)[0].plan
            runs.run_plans([(planned, folder / "out")], options)
    assert str(path) in str(caught.value), case
    assert not (folder / "out").exists(), case


@pytest.mark.parametrize(
    "case",
    [case for number, case in enumerate(_of_kinds(WAYS, True)) if number % 17 == 0],
    ids=lambda case: "-".join(getattr(p, "__name__", str(p)) for p in case),
)
def test_a_changed_input_of_any_kind_of_spec_is_refused_by_its_name(case, tmp_path):
    _assert_noticed_in(case, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_every_change_of_an_input_of_every_kind_of_spec_is_noticed(
    way, kernels, tmp_path, record_property
):
    cases = [*_of_kinds([way], kernels)]
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        _assert_noticed_in(case, folder)
        shutil.rmtree(folder)
    record_property("points", len(cases))


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("method", TWO_PASSES)
@pytest.mark.parametrize("kind", ["single", "pickle", "quantized", "adapter"])
def test_what_stamps_do_not_tell_a_second_pass_does(method, kind, kernels, tmp_path, monkeypatch):
    path = _models(tmp_path, kind)
    planned = outliermerge.plan(_spec(tmp_path, method))
    monkeypatch.setattr(Watched, "note", lambda *_: None)

    def change() -> None:
        for file in {path, tmp_path / "second" / path.name}:
            if file.exists():
                data = bytearray(file.read_bytes())
                for part in (1, 3, 5):  # the middle of each tensor
                    data[len(data) * part // 6] ^= 1
                with file.open("r+b") as opened:
                    opened.write(data)

    with monkeypatch.context() as patch:
        _at("second pass" if method != BY_ROWS else "rows", change, patch)
        with pytest.raises(OutlierMergeError, match="a second reading gave other bytes"):
            outliermerge.run(planned, output=tmp_path / "out", kernels=kernels, threads=1)
    assert not (tmp_path / "out").exists()
    # Nothing of it is taken over.
    result = outliermerge.run(_spec(tmp_path, method), output=tmp_path / "out", kernels=kernels)
    assert result.num_resumed == 0


@pytest.mark.parametrize("kernels", [True, False])
def test_a_copy_of_models_that_were_equal_is_of_the_bytes_that_were_compared(
    kernels, tmp_path, monkeypatch
):
    path = _models(tmp_path, "single")
    planned = outliermerge.plan(_spec(tmp_path, "linear"))
    monkeypatch.setattr(Watched, "note", lambda *_: None)
    copy = JobRunner._copy

    def copied(*arguments):
        data = bytearray(path.read_bytes())
        data[-8:] = bytes(8)
        path.write_bytes(data)
        return copy(*arguments)

    monkeypatch.setattr(JobRunner, "_copy", copied)
    with pytest.raises(OutlierMergeError, match=r"frozen\.weight.*a second reading"):
        outliermerge.run(planned, output=tmp_path / "out", kernels=kernels, threads=1)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("way", [put_back, renamed_over, touched])
def test_a_resumed_run_takes_over_only_what_was_made_of_these_bytes(
    way, kernels, tmp_path, monkeypatch
):
    path = _models(tmp_path, "single")
    spec, out = _spec(tmp_path, "linear"), tmp_path / "out"
    status = path.stat()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        record, seen = OutputFolder.record, []

        def stop(*arguments):
            record(*arguments)
            seen.append(1)
            if len(seen) == 3:
                raise KeyboardInterrupt

        patch.setattr(OutputFolder, "record", stop)
        outliermerge.run(spec, output=out, kernels=kernels, threads=1)
    way(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    result = outliermerge.run(spec, output=out, kernels=kernels, threads=1)
    assert result.num_resumed == (3 if way is touched else 1)
    outliermerge.run(spec, output=tmp_path / "anew", kernels=kernels, threads=1)
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "anew" / "model.safetensors"
    ).read_bytes()


# What cannot be read is not absent.


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("put", [_pipe, _folder, _loop, _dangling])
@pytest.mark.parametrize("model", ["first", "second"])
@pytest.mark.parametrize(
    "file",
    ["config.json", "tokenizer_config.json", "generation_config.json", "modeling_t.py",
     "chat_template.jinja", "tokenizer.json", "added_tokens.json", "modules.json",
     "model_index.json", "model.safetensors"],
)  # fmt: skip
def test_what_cannot_be_read_is_not_absent(file, model, put, tmp_path):
    _models(tmp_path, "single")
    path = tmp_path / model / file
    path.unlink(missing_ok=True)
    put(path)
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(_spec(tmp_path, "linear"))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("error", ["EACCES", "EIO", "ELOOP", "ENAMETOOLONG", "ESTALE", "EMFILE"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "modeling_t.py"])
def test_no_error_of_opening_counts_as_absent(file, error, tmp_path, monkeypatch):
    _models(tmp_path, "single")
    path, real = tmp_path / "second" / file, os.open

    def refuse(name, *arguments, **keywords):
        if str(name) == str(path):
            code = getattr(errno, error)
            raise OSError(code, os.strerror(code), str(path))
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutlierMergeError, match=f"second/{file}.*cannot be read") as caught:
        outliermerge.plan(_spec(tmp_path, "min_sigma"))
    assert "Traceback" not in str(caught.value)


def _plan_with_a_failure(spec: dict, folder: Path, number: int, code: int) -> tuple:
    """Plan, a call of the file system failing; return the plan or the refusal, and the calls."""
    calls = []

    def failing(name: str) -> Callable:
        real = getattr(os, name)

        def call(path=".", *arguments, **keywords):
            if str(path).startswith(str(folder)):
                calls.append(name)
                if len(calls) == number:
                    raise OSError(code, os.strerror(code), str(path))
            return real(path, *arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "stat", "lstat", "listdir", "scandir", "readlink"):
            patch.setattr(os, name, failing(name))
        try:
            planned = outliermerge.plan(spec)
            return (planned.as_dict(), planned.files), len(calls)
        except OutlierMergeError:
            return None, len(calls)


def _fail_each(folder: Path, kind: str, step: int) -> int:
    """Assert that a plan in which a call fails is refused or the same; return how many failed."""
    _models(folder, kind)
    spec = _spec(folder, "min_sigma")
    clean, num_calls = _plan_with_a_failure(spec, folder, 0, 0)
    assert clean is not None
    for number in range(1, num_calls + 1, step):
        for code in (errno.EIO, errno.EACCES, errno.ESTALE):
            found, _ = _plan_with_a_failure(spec, folder, number, code)
            assert found in (None, clean), (number, code)
    return 3 * len(range(1, num_calls + 1, step))


def test_a_failure_while_planning_never_makes_another_plan(tmp_path):
    assert _fail_each(tmp_path, "adapter", step=9) > 100


@pytest.mark.faults
@pytest.mark.parametrize("kind", FORMATS)
def test_no_failure_while_planning_makes_another_plan(kind, tmp_path, record_property):
    record_property("points", _fail_each(tmp_path, kind, step=1))


# What can be known before the first byte.


@pytest.mark.parametrize("name", ["caf\udce9.txt", "caf\udce9.safetensors", "caf\udce9/x.json"])
def test_names_that_are_not_utf8_are_refused_by_the_plan(name, tmp_path):
    _models(tmp_path, "single")
    path = tmp_path / "first" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    with pytest.raises(OutlierMergeError, match=r"caf\\xe9.*is not UTF-8"):
        outliermerge.plan(_spec(tmp_path, "linear"))


def test_a_folder_whose_name_is_not_utf8_is_refused_by_the_plan(tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    _models(folder, "single")
    with pytest.raises(OutlierMergeError, match=r"first.*unicode"):
        outliermerge.plan(_spec(folder, "linear"))


def test_a_config_that_cannot_be_written_again_is_refused_by_the_plan(tmp_path):
    _models(tmp_path, "single")
    for model in ("base", "first", "second"):
        text = '{"model_type": "t", "deep": ' + "[" * 900 + "]" * 900 + "}"
        (tmp_path / model / "config.json").write_text(text)
    spec = _spec(tmp_path, "linear") | {"out_dtype": "bfloat16"}
    try:
        planned = outliermerge.plan(spec)
    except OutlierMergeError:
        return
    outliermerge.run(planned, output=tmp_path / "out")


def test_a_pickle_is_read_where_its_tensors_lie(tmp_path):
    _models(tmp_path, "pickle")
    planned = outliermerge.plan(_spec(tmp_path, "linear"))
    found = {meta.name: meta for meta in planned.inputs[0].stored}
    assert found["a.weight"].offset is not None
    assert found["b.weight"].offset is None  # its rows lie across each other
    outliermerge.run(planned, output=tmp_path / "out")
    single = tmp_path / "single"
    single.mkdir()
    _models(single, "single")
    outliermerge.run(_spec(single, "linear"), output=tmp_path / "same")
    merged, same = (
        json.loads((tmp_path / out / "outliermerge.json").read_text())["tensors"]
        for out in ("out", "same")
    )
    assert {n: t["checksum"] for n, t in merged.items()} == {
        n: t["checksum"] for n, t in same.items()
    }
