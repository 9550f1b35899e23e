"""What can be wrong with addresses, and with servers: never another merge than of local files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from models_elsewhere import NAMES, spec_of, weights_of
from range_server import Handler, RangeServer

import outliermerge
from outliermerge.checkpoint.folders import remote
from outliermerge.errors import OutlierMergeError
from outliermerge.storage import range_cache


def test_models_whose_addresses_differ_only_in_keys_are_not_mixed_up(
    served: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = served.folder / "bucket"
    files = {name: bucket / f"{name}.safetensors" for name in NAMES}
    for name, file in files.items():
        shutil.copy(bucket / name / "model-00001-of-00002.safetensors", file)

    def get(handler: Any, get: Any = Handler.do_GET) -> None:
        name = parse_qs(urlsplit(handler.path).query)["key"][0]
        handler.path = f"/bucket/{name}.safetensors"
        get(handler)

    monkeypatch.setattr(Handler, "do_GET", get)
    made = []
    for number, at in enumerate((files.get, f"{served.url}/m.safetensors?key={{}}".format)):
        spec = spec_of("", "ties")
        spec["base_model"] = str(at("base"))
        spec["models"] = [{"model": str(at(name))} for name in ("a", "b")]
        result = outliermerge.run(spec, output=f"made{number}.safetensors")
        made.append(result.output.read_bytes())
    assert made[0] == made[1]


def test_without_versions_what_was_written_again_is_read_again(
    served: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all files keep their sizes: a header that is kept would give wrong tensors."""

    def send(handler: Any, name: str, value: str, send: Any = Handler.send_header) -> None:
        if name != "Last-Modified":
            send(handler, name, value)

    monkeypatch.setattr(Handler, "send_header", send)
    served.has_versions = False
    bucket = served.folder / "bucket"
    shards = [bucket / name / "model-00001-of-00002.safetensors" for name in NAMES]
    for shard in shards:  # with room in the header for longer numbers
        raw = shard.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        longer = raw[8:end].ljust(end)
        shard.write_bytes(len(longer).to_bytes(8, "little") + longer + raw[end:])
    outliermerge.run(spec_of(f"{served.url}/bucket", "linear"), output="before")
    for shard in shards:
        raw = shard.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        position, tensors = 0, []
        for key in reversed([key for key in header if key != "__metadata__"]):
            first, last = header[key]["data_offsets"]
            header[key]["data_offsets"] = [position, position + last - first]
            position += last - first
            tensors.append(raw[end + first : end + last])
        text = json.dumps(header, separators=(",", ":")).encode().ljust(end - 8)
        assert len(text) == end - 8
        shard.write_bytes(raw[:8] + text + b"".join(tensors))
        (shard.parent / "config.json").write_text('{"model_type": "tset"}')
    local = outliermerge.run(spec_of(str(bucket), "linear"), output="local")
    there = outliermerge.run(spec_of(f"{served.url}/bucket", "linear"), output="there")
    assert weights_of(there.output) == weights_of(local.output)
    config = (there.output / "config.json").read_bytes()
    assert config == (local.output / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:port/model", "no valid address"),
        ("http://127.0.0.1:99999/model", "no valid address"),
        ("http://[bad/model", "no valid address"),
        ("http://a..b/model", "no valid address"),
        ("hf://org/name/more", "expected hf://org/name"),
        ("hf://name", "expected hf://org/name"),
    ],
)
def test_what_is_no_address_is_refused(own_cache: Path, address: str, said: str) -> None:
    with pytest.raises(OutlierMergeError, match=said):
        outliermerge.plan({"merge_method": "passthrough", "models": [{"model": address}]})


@pytest.mark.parametrize("location", ["http://[bad", "http://host:port/", "http://host:99999/"])
def test_a_redirect_to_what_is_no_address_is_refused(
    served: RangeServer, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    monkeypatch.setattr(Handler, "do_GET", lambda handler: _redirect(handler, location))
    with pytest.raises(OutlierMergeError, match="leads to what is no valid address"):
        outliermerge.plan(spec_of(served.url, "linear"))


def test_a_redirect_on_the_same_host_keeps_the_user(
    served: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(handler: Any, get: Any = Handler.do_GET) -> None:
        if handler.path.startswith("/old/"):
            _redirect(handler, f"{served.url}/bucket/{handler.path[5:]}")
        elif "Authorization" in handler.headers:
            get(handler)
        else:
            handler._say(401, b"")

    monkeypatch.setattr(Handler, "do_GET", get)
    at = served.url.replace("//", "//me:c0ffee@") + "/old"
    assert outliermerge.plan(spec_of(at, "linear")).num_read_bytes


def _redirect(handler: Any, location: str) -> None:
    handler.send_response(302)
    handler.send_header("Location", location)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


@pytest.mark.parametrize("length", ["9" * 5000, str(10**30), "-5", "many"])
def test_lengths_that_no_file_has_are_refused(
    served: RangeServer, monkeypatch: pytest.MonkeyPatch, length: str
) -> None:
    def send(handler: Any, name: str, value: str, send: Any = Handler.send_header) -> None:
        send(handler, name, f"bytes 0-9/{length}" if name == "Content-Range" else value)

    monkeypatch.setattr(Handler, "send_header", send)
    with pytest.raises(OutlierMergeError, match="without saying which range"):
        outliermerge.plan(spec_of(f"{served.url}/bucket", "linear"))


def test_a_page_in_place_of_404_is_no_file(
    served: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(handler: Any, get: Any = Handler.do_GET) -> None:
        if (served.folder / handler.path.strip("/")).is_file():
            get(handler)
        else:
            handler._say(200, b"<!DOCTYPE html><html>Nothing is here.</html>")

    monkeypatch.setattr(Handler, "do_GET", get)
    local = outliermerge.run(spec_of(str(served.folder / "bucket"), "linear"), output="local")
    there = outliermerge.run(spec_of(f"{served.url}/bucket", "linear"), output="there")
    assert weights_of(there.output) == weights_of(local.output)
    assert {path.name for path in there.output.iterdir()} == {
        path.name for path in local.output.iterdir()
    }


@pytest.mark.parametrize("trim", ["tensor", "model"])
def test_parts_that_read_by_other_caches_are_joined(
    served: RangeServer, own_cache: Path, trim: str
) -> None:
    """As on machines of which each has a cache of its own, at the same path."""
    made = []
    for at in (str(served.folder / "bucket"), f"{served.url}/bucket"):
        spec = spec_of(at)
        spec["parameters"]["trim"] = trim
        made.append(spec)
    local = outliermerge.run(made[0], output="local")
    for part in (1, 2):
        outliermerge.run_part(outliermerge.plan(made[1]), "there", part, 2)
        shutil.rmtree(own_cache)
    there = outliermerge.join(outliermerge.plan(made[1]), "there")
    assert weights_of(there.output) == weights_of(local.output)


@pytest.mark.parametrize("where", ["ranges", "remote"])
def test_a_full_disk_for_the_cache_is_said_at_once(
    served: RangeServer, own_cache: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "ranges":
        monkeypatch.setattr(range_cache, "write_at", full)
    else:
        monkeypatch.setattr(remote, "write_record", full)
    with pytest.raises(OutlierMergeError, match=rf"{own_cache / where}.*No space left"):
        outliermerge.run(spec_of(f"{served.url}/bucket", "linear"), output="out")


def test_an_address_with_spaces_and_other_letters(served: RangeServer) -> None:
    for name in NAMES:
        shutil.copytree(served.folder / "bucket" / name, served.folder / "my modèl" / name)
    plan = outliermerge.plan(spec_of(f"{served.url}/my modèl", "linear"))
    escaped = outliermerge.plan(spec_of(f"{served.url}/my%20mod%C3%A8l", "linear"))
    assert plan.num_read_bytes == escaped.num_read_bytes > 0
