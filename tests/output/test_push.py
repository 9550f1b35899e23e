"""Outputs that the hub's own client uploads, to a hub on the loopback."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import save_tensors
from hub_server import STRANGERS_TOKEN, TOKEN
from hub_uploads import UploadHub

import outliermerge
from outliermerge.cli.main import main
from outliermerge.errors import OutlierMergeError
from outliermerge.output.push import Push

TO = "org/merged"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merge two models into a folder of two shards; tests that change it make copies."""
    folder = tmp_path_factory.mktemp("push")
    models = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"layer.{n}.w": torch.randn(100, 100, generator=generator) for n in range(2)}
        save_tensors(folder / f"model{seed}", tensors)
        (folder / f"model{seed}" / "config.json").write_text('{"model_type": "test"}')
        (folder / f"model{seed}" / "README.md").write_text("---\nlicense: mit\n---\n")
        models.append({"model": str(folder / f"model{seed}")})
    spec = {"merge_method": "linear", "models": models}
    return outliermerge.run(spec, output=folder / "out", shard_size="41kB").output


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with UploadHub(home=tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        hurried = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        monkeypatch.setattr(_http, "time", hurried)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "*")
        yield server


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".gitattributes"
    }


def test_a_push_sends_the_output_in_one_commit(
    hub: UploadHub, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(merged), TO, "--private"]) == 0
    printed = capsys.readouterr()
    assert _contents(hub.repositories[TO]) == _contents(merged)
    assert len(list(merged.glob("*.safetensors"))) == 2
    assert [commit["names"] for commit in hub.commits] == [sorted(_contents(merged))]
    assert list(hub.private) == [TO]
    assert f"{hub.endpoint}/{TO}/commit/" in printed.out
    assert TOKEN not in printed.out + printed.err
    assert outliermerge.verify(hub.repositories[TO]) == []
    # Once more: nothing is sent.
    hub.requests.clear()
    assert main(["push", str(merged), TO, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["is_there"] and not told["sent"] and told["commit"] is None
    assert {method for method, _ in hub.requests} == {"GET"}


def test_a_dry_run_changes_nothing(
    hub: UploadHub, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(merged), TO, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert f"would send to {TO}, a new repository: {len(_contents(merged))} files" in told
    assert all(name in told for name in _contents(merged))
    assert {method for method, _ in hub.requests} == {"GET"}
    assert not hub.repositories


def _error(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    assert main(["push", *words]) == code
    printed = capsys.readouterr()
    assert printed.err.count("error: ") == 1 and "Traceback" not in printed.err
    assert TOKEN not in printed.err and "c0ffee" not in printed.err
    return printed.err


def test_what_is_no_output_is_refused(
    hub: UploadHub, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = merged.parent / "model0"
    assert f"hf upload {TO} {model}" in _error([str(model), TO], capsys)
    assert "no such file or folder" in _error([str(tmp_path / "absent"), TO], capsys)
    assert "on this machine" in _error(["s3://bucket/merged", TO], capsys)
    for name in ("merged", "a/b/c", "org/name@main", ""):
        assert "expected org/name" in _error([str(merged), name], capsys, code=2)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["outside", "missing", "tensor", "file"])
def test_what_does_not_verify_is_refused(
    hub: UploadHub, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    output = Path(shutil.copytree(merged, tmp_path / "out"))
    shard = min(output.glob("*.safetensors"))
    manifest = json.loads((output / "outliermerge.json").read_text())
    if name == "outside":
        entry = {"num_bytes": 1, "sha256": "0"}
        manifest["files"]["../../secret"] = entry
        (output / "outliermerge.json").write_text(json.dumps(manifest))
        (tmp_path.parent / "secret").write_text("s")
        said = "names files outside"
    elif name == "missing":
        shard.unlink()
        said = "are missing"
    else:
        file = shard if name == "tensor" else output / "config.json"
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
        said = "is not as its manifest says, and is not pushed"
    assert said in _error([str(output), TO], capsys)
    assert not hub.repositories


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("", "run `hf auth login` or set HF_TOKEN"),
        ("hf_wrong", "the hub refuses the token that was sent"),
        (STRANGERS_TOKEN, "the rights to change this namespace (has your token the right to write"),
    ],
)
def test_a_token_that_may_not_write_is_told(
    hub: UploadHub,
    merged: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    token: str,
    said: str,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", token)
    assert said in _error([str(merged), TO], capsys)
    assert not hub.repositories


def test_what_is_there_is_replaced_only_on_demand(
    hub: UploadHub, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = hub.make(TO)
    (there / "config.json").write_text("{}")
    (there / "old").mkdir()
    (there / "old" / "model.safetensors").write_bytes(b"old")
    told = _error([str(merged), TO], capsys)
    assert "config.json" in told and "old/model.safetensors" in told and "--overwrite" in told
    assert "is there and public" in _error([str(merged), TO, "--private"], capsys)
    assert not hub.commits
    assert main(["push", str(merged), TO, "--overwrite", "--dry-run"]) == 0
    assert "removed  old/model.safetensors" in capsys.readouterr().out
    assert main(["push", str(merged), TO, "--overwrite"]) == 0
    assert _contents(there) == _contents(merged)
    assert len(hub.commits) == 1


def test_a_new_branch_has_only_the_output(
    hub: UploadHub, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hub.make(TO) / "other.safetensors").write_bytes(b"of main")
    assert main(["push", str(merged), TO, "--revision", "sigma-2"]) == 0
    assert f"sent to {TO}@sigma-2" in capsys.readouterr().out
    assert _contents(hub.repositories[f"{TO}@sigma-2"]) == _contents(merged)
    assert _contents(hub.repositories[TO]) == {"other.safetensors": b"of main"}
    other = hub.repositories[f"{TO}@sigma-2"] / "config.json"
    other.write_text("{}")
    assert "config.json" in _error([str(merged), TO, "--revision", "sigma-2"], capsys)


STEPS = {
    "look": ("GET", f"/api/models/{TO}"),
    "create": ("POST", "/api/repos/create"),
    "branch": ("POST", f"/api/models/{TO}/branch/next"),
    "preupload": ("POST", f"/api/models/{TO}/preupload/next"),
    "batch": ("POST", f"/{TO}.git/info/lfs/objects/batch"),
    "part": ("PUT", "/storage/2/"),
    "card": ("POST", "/api/validate-yaml"),
    "commit": ("POST", f"/api/models/{TO}/commit/next"),
}


# Each step once; `make faults` tries the rest.
@pytest.mark.parametrize(
    ("status", "step"),
    [
        pytest.param(status, step, marks=() if (number + place) % 3 == 0 else pytest.mark.faults)
        for number, status in enumerate((500, 403, -1))
        for place, step in enumerate(STEPS)
    ],
)
@pytest.mark.sampled(2)
def test_a_push_that_breaks_goes_on(
    hub: UploadHub, merged: Path, capsys: pytest.CaptureFixture[str], step: str, status: int
) -> None:
    method, start = STEPS[step]
    hub.fault = lambda did, path: status if (did, path[: len(start)]) == (method, start) else 0
    told = _error([str(merged), TO, "--revision", "next"], capsys)
    assert told.startswith(f"error: {TO}@next: ")
    assert {500: "500", 403: "403", -1: "connection"}[status] in told
    assert not hub.commits
    kept = len(list(hub.objects.iterdir()))
    assert kept == (2 if step in ("card", "commit") else 0)
    hub.fault = lambda did, path: 0
    hub.requests.clear()
    assert main(["push", str(merged), TO, "--revision", "next"]) == 0
    assert _contents(hub.repositories[f"{TO}@next"]) == _contents(merged)
    assert [path for did, path in hub.requests if did == "PUT"] == [] or not kept


def test_what_passes_is_asked_again(hub: UploadHub, merged: Path) -> None:
    left = [503, 500, 429]
    hub.fault = lambda did, path: left.pop() if did == "PUT" and left else 0
    assert main(["push", str(merged), TO]) == 0
    assert not left and _contents(hub.repositories[TO]) == _contents(merged)


def test_a_push_that_is_killed_goes_on_with_what_is_missing(hub: UploadHub, merged: Path) -> None:
    stopped, again = threading.Event(), threading.Event()

    def fault(method: str, path: str) -> int:
        if method == "PUT" and len(list(hub.objects.iterdir())) == 1:
            stopped.set()
            again.wait(20)
        return 0

    hub.fault = fault
    environment = hub.environment(hub.home, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    command = [sys.executable, "-m", "outliermerge", "push", str(merged), TO]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        assert stopped.wait(30)
        process.send_signal(signal.SIGKILL)
    again.set()
    (first,) = [path.name for path in hub.objects.iterdir()]
    hub.requests.clear()
    assert main(["push", str(merged), TO]) == 0
    assert _contents(hub.repositories[TO]) == _contents(merged)
    assert not [path for method, path in hub.requests if method == "PUT" and first in path]


def test_a_file_that_changes_meanwhile_is_not_published(
    hub: UploadHub, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(merged, tmp_path / "out"))

    def fault(method: str, path: str) -> int:
        if method == "PUT":
            (output / "config.json").write_text("{}")
        return 0

    hub.fault = fault
    assert "was changed while it was sent" in _error([str(output), TO], capsys)
    assert not hub.commits


def test_others_who_commit_meanwhile_are_not_overwritten(
    hub: UploadHub, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = hub.make(TO)

    def fault(method: str, path: str) -> int:
        if method == "PUT":
            (there / "theirs.txt").write_text("of others")
        return 0

    hub.fault = fault
    assert "A commit has happened since" in _error([str(merged), TO], capsys)
    assert not hub.commits


def test_what_the_hub_leaves_out_is_told(
    hub: UploadHub, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.ignored = ("config.json",)
    told = _error([str(merged), TO], capsys)
    assert "left out 1 file(s)" in told and "config.json" in told and ".gitignore" in told


def test_an_edited_card_is_sent_and_its_mistakes_are_told(
    hub: UploadHub, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(merged, tmp_path / "out"))
    card = output / "README.md"
    card.write_text("---\nlicense: My Own\n---\n# Mine\n")
    told = _error([str(output), TO], capsys)
    assert "Invalid metadata in README.md" in told and '"license" must be one of' in told
    card.write_text("---\nlicense: other\n---\n# Mine\n")
    assert main(["push", str(output), TO]) == 0
    assert (hub.repositories[TO] / "README.md").read_text() == card.read_text()
    notes = capsys.readouterr().err
    assert "different licences" in notes and "no `base_model`" in notes


def test_an_output_of_one_file_is_sent_with_its_manifest(
    hub: UploadHub, merged: Path, tmp_path: Path
) -> None:
    models = [{"model": str(merged.parent / f"model{n}" / "model.safetensors")} for n in (0, 1)]
    spec = {"merge_method": "linear", "models": models}
    outliermerge.run(spec, output=tmp_path / "one.safetensors")
    assert main(["push", str(tmp_path / "one.safetensors"), TO]) == 0
    names = ["one.safetensors", "one.safetensors.outliermerge.json"]
    assert sorted(_contents(hub.repositories[TO])) == names
    assert outliermerge.verify(hub.repositories[TO] / "one.safetensors") == []


def test_a_token_that_is_none_is_not_sent(
    hub: UploadHub, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}é")
    with pytest.raises(OutlierMergeError, match="a character that is not ASCII in it") as caught:
        Push(merged, TO)
    assert TOKEN not in str(caught.value) and not hub.requests


def test_a_hub_without_xet_is_told_with_what_to_do(
    hub: UploadHub,
    merged: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants

    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert main(["push", str(merged), TO]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and TOKEN not in said
    assert "If the server has no xet, set HF_HUB_DISABLE_XET=1." in said
    assert not hub.commits
