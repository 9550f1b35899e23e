"""What servers refuse, and what names and signatures have to do with it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from models_elsewhere import INDEX, NAMES, spec_of, weights_of
from range_server import Handler, RangeServer

import outliermerge
from outliermerge.cli.main import main
from outliermerge.errors import OutlierMergeError
from outliermerge.planning.inputs import is_combined
from outliermerge.storage import ranges

FORMS = ("{url}/bucket", "s3://bucket")
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a request is made again."""

    def sleep(seconds: float) -> None:
        raise AssertionError("it is asked again")

    monkeypatch.setattr(ranges, "time", type("Time", (), {"sleep": sleep}))


def _at(form: str, server: RangeServer) -> str:
    if form.startswith("s3"):
        pytest.importorskip("obstore")
    return form.format(url=server.url)


def _forbidding(monkeypatch: pytest.MonkeyPatch, server: RangeServer, *, after: int = 1000) -> None:
    """Let the server answer 403 where a store that may not be listed does, or to all some time."""

    def get(handler: Any, get: Any = Handler.do_GET) -> None:
        parts = urlsplit(handler.path)
        path = server.folder / parts.path.strip("/")
        if "list-type" in parts.query or not path.is_file() or len(server.headers) >= after:
            server.headers.append({})
            handler._say(403, b"<Error><Code>AccessDenied</Code></Error>")
        else:
            get(handler)

    monkeypatch.setattr(Handler, "do_GET", get)


@pytest.mark.parametrize("form", FORMS)
def test_stores_that_may_not_be_listed_are_read(
    served: RangeServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    form: str,
) -> None:
    _forbidding(monkeypatch, served)
    local = outliermerge.run(spec_of(str(served.folder / "bucket"), "linear"), output="local")
    there = outliermerge.run(spec_of(_at(form, served), "linear"), output="there")
    assert weights_of(there.output) == weights_of(local.output)
    assert {path.name for path in there.output.iterdir()} == {
        path.name for path in local.output.iterdir()
    }
    assert "taken to be absent" in caplog.text
    with pytest.raises(OutlierMergeError, match=r"403|AccessDenied|permission"):
        outliermerge.plan(spec_of(_at(form, served) + "/absent", "linear"))


def test_a_signature_that_expires_meanwhile_hides_no_file(
    served: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _forbidding(monkeypatch, served, after=12)
    with pytest.raises(OutlierMergeError, match=r"answers 403.*expired"):
        outliermerge.plan(spec_of(f"{served.url}/bucket", "linear"))


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://bucket/a//model.safetensors", "is no valid address"),
        ("s3://bucket/../model.safetensors", "is no valid address"),
        ("s3://nobucket/a", "404"),
        ("http://nothing.invalid/a", "no server of the name nothing.invalid"),
    ],
)
def test_what_cannot_pass_is_asked_once(served: RangeServer, address: str, said: str) -> None:
    with pytest.raises(OutlierMergeError, match=said):
        outliermerge.plan({"merge_method": "passthrough", "models": [{"model": address}]})
    assert len(served.headers) <= 1


@pytest.mark.usefixtures("no_waiting")
def test_an_encoding_is_refused_at_once(
    served: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(handler: Any, name: str, value: str, send: Any = Handler.send_header) -> None:
        send(handler, name, value)
        if name == "ETag":
            send(handler, "Content-Encoding", "gzip")

    monkeypatch.setattr(Handler, "send_header", send)
    with pytest.raises(OutlierMergeError, match="answers in the encoding gzip"):
        outliermerge.plan(spec_of(f"{served.url}/bucket", "linear"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["a+b/model", "base+org/lora", "+/+"])
def test_a_plus_in_an_address_is_of_the_address(served: RangeServer, form: str, name: str) -> None:
    for each in NAMES:
        shutil.copytree(served.folder / "bucket" / each, served.folder / "bucket" / name / each)
    at = f"{_at(form, served)}/{name}"
    assert outliermerge.plan(spec_of(at, "linear")).num_read_bytes > 0
    assert is_combined(f"{at}+hf://org/lora") and is_combined(f"{at}+{served.folder}")
    assert not is_combined(f"{at}/base") and is_combined("org/base+org/lora")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("file", [SHARD, "config.json", INDEX])
def test_what_is_broken_is_named_by_its_address(
    served: RangeServer,
    form: str,
    file: str,
    own_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, at = served.folder / "bucket" / "a" / file, _at(form, served)
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + b"x" * 20 + raw[28:])
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.plan(spec_of(at, "linear"))
    assert main(["stats", f"{at}/a"]) == 1
    for told in (str(caught.value), capsys.readouterr().err):
        assert f"{at}/a" in told and file in told and str(own_cache) not in told
        assert ".new-" not in told


def test_verify_names_a_broken_header_by_its_address(
    served: RangeServer, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outliermerge.run(spec_of(str(served.folder / "bucket"), "linear"), output="local")
    there = served.folder / "bucket" / "merged"
    shutil.copytree("local", there)
    (weights,) = there.glob("*.safetensors")
    raw = weights.read_bytes()
    weights.write_bytes(raw[:8] + b"x" * 20 + raw[28:])
    assert main(["verify", f"{served.url}/bucket/merged"]) == 1
    told = "".join(capsys.readouterr())
    assert f"{served.url}/bucket/merged/{weights.name}" in told and str(own_cache) not in told


@pytest.mark.parametrize("form", FORMS)
def test_an_index_may_name_files_from_here(served: RangeServer, form: str) -> None:
    index = served.folder / "bucket" / "a" / INDEX
    index.write_text(index.read_text().replace('"model-0', '"./model-0'))
    assert "./model-0" in json.loads(index.read_text())["weight_map"]["model.layers.0.w"]
    local = outliermerge.run(spec_of(str(served.folder / "bucket"), "linear"), output="local")
    there = outliermerge.run(spec_of(_at(form, served), "linear"), output="there")
    assert weights_of(there.output) == weights_of(local.output)


def test_a_merge_whose_signatures_are_renewed_goes_on(
    served: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(handler: Any, get: Any = Handler.do_GET) -> None:
        if f"X-Amz-Signature={signature}" in handler.path:
            get(handler)
        else:
            handler._say(403, b"")

    monkeypatch.setattr(Handler, "do_GET", get)
    signature = "first"
    bucket = served.folder / "bucket"
    for name in NAMES:
        shutil.copy(bucket / name / SHARD, bucket / f"{name}.safetensors")

    def spec() -> dict[str, Any]:
        made = spec_of("", "linear")
        at = f"{served.url}/bucket/{{}}.safetensors?X-Amz-Date={time.monotonic_ns()}"
        at += f"&X-Amz-Signature={signature}"
        made["base_model"] = at.format("base")
        made["models"] = [{"model": at.format(name)} for name in ("a", "b")]
        return made

    end = (bucket / "b.safetensors").stat().st_size
    served.fault = lambda name, start, stop: "503" if start > 0 and stop == end else ""
    monkeypatch.setattr("outliermerge.storage.cached_files.CHUNK_BYTES", 1 << 12)
    with pytest.raises(OutlierMergeError, match="503"):
        outliermerge.run(spec(), output="out.safetensors", threads=1)
    served.fault = lambda name, start, stop: ""
    signature = "second"
    assert outliermerge.run(spec(), output="out.safetensors").num_resumed > 0
