"""Models by their addresses: web servers, S3, the hub without a download."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer, commit_of
from models_elsewhere import INDEX, NAMES, save_model, spec_of, weights_of
from range_server import RangeServer
from safetensors.torch import save_file

import outliermerge
from outliermerge.cli.main import main
from outliermerge.errors import OutlierMergeError
from outliermerge.storage.range_cache import RangeCache

FORMS = ("{url}/bucket", "s3://bucket")


def _at(form: str, server: RangeServer) -> str:
    if form.startswith("s3"):
        pytest.importorskip("obstore")
    return form.format(url=server.url)


@pytest.mark.parametrize(
    ("method", "form"),
    [("ties", FORMS[0]), ("min_sigma", FORMS[1]), ("della", FORMS[0]), ("linear", FORMS[1])],
)
def test_a_merge_of_models_elsewhere_is_that_of_local_ones(
    served: RangeServer, method: str, form: str, own_cache: Path
) -> None:
    local = outliermerge.run(spec_of(str(served.folder / "bucket"), method), output="local")
    at = _at(form, served)
    there = outliermerge.run(spec_of(at, method), output="there")
    assert weights_of(there.output) == weights_of(local.output)
    for name in ("config.json", "tokenizer.json"):
        assert (there.output / name).read_bytes() == (local.output / name).read_bytes()
    inputs = there.manifest["inputs"]
    assert [entry["checksum"] for entry in inputs] == [
        entry["checksum"] for entry in local.manifest["inputs"]
    ]
    assert [entry["path"] for entry in inputs] == [f"{at}/{name}" for name in NAMES]
    assert list((own_cache / "ranges").iterdir()) == []
    assert "key-of-the-test" not in "".join(map(str, served.headers)) or form.startswith("s3")


@pytest.mark.parametrize("form", FORMS)
def test_a_plan_reads_headers_only(served: RangeServer, form: str) -> None:
    plan = outliermerge.plan(spec_of(_at(form, served)))
    assert (
        plan.num_read_bytes
        == outliermerge.plan(spec_of(str(served.folder / "bucket"))).num_read_bytes
    )
    weights = [(name, stop) for name, _, stop in served.ranges if name.endswith(".safetensors")]
    assert len(weights) == 6
    assert all(stop <= ranges_first() for _, stop in weights)


def ranges_first() -> int:
    from outliermerge.checkpoint.folders import remote

    return remote._FIRST_BYTES


def test_the_commands_take_addresses(
    served: RangeServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    at = f"{served.url}/bucket"
    outliermerge.run(spec_of(str(served.folder / "bucket")), output="local")
    shutil.copytree("local", served.folder / "bucket" / "merged")
    assert main(["verify", f"{at}/merged"]) == 0
    assert "as its manifest says" in capsys.readouterr().out
    found = []
    for place in (at, str(served.folder / "bucket")):
        assert main(["stats", f"{place}/a", "--base", f"{place}/base", "--json", "-"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    there, here = found
    assert there["tensors"] == here["tensors"]
    assert main(["compare-weights", f"{at}/a", f"{at}/b", "--base", f"{at}/base"]) == 0


def test_a_report_of_a_merge_elsewhere_has_its_recipe(served: RangeServer, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    at = f"{served.url}/bucket"
    outliermerge.run(spec_of(at), output="local")
    shutil.copytree("local", served.folder / "bucket" / "merged")
    assert main(["report", f"{at}/merged", "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "density" in page and "drift" in page


def test_verify_finds_what_differs_elsewhere(
    served: RangeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("obstore")
    outliermerge.run(spec_of(str(served.folder / "bucket")), output="local")
    there = served.folder / "bucket" / "merged"
    shutil.copytree("local", there)
    (weights,) = there.glob("*.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    (there / "more.txt").write_text("more")
    (there / "config.json").write_text("{}")
    assert main(["verify", "s3://bucket/merged"]) == 1
    told = capsys.readouterr().out
    assert "model.layers" in told and "found checksum" in told
    assert "more.txt: is not in the manifest" in told
    assert "config.json: its contents changed" in told


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_is_absent_is_told_by_name(served: RangeServer, form: str) -> None:
    at = _at(form, served)
    with pytest.raises(OutlierMergeError, match=rf"{at}/absent.*is there"):
        outliermerge.plan({"merge_method": "linear", "models": [{"model": f"{at}/absent"}]})


def test_a_changed_model_is_refused(served: RangeServer) -> None:
    at = f"{served.url}/bucket"
    plan = outliermerge.plan(spec_of(at))
    path = served.folder / "bucket" / "a" / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes())
    with pytest.raises(OutlierMergeError, match=r"bucket/a/model-00002.*since the merge was plan"):
        outliermerge.run(plan, output="out")
    assert not Path("out").exists()


def test_one_file_by_an_address_with_a_signature(
    served: RangeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "5ec2e7"
    for name in ("a", "b"):
        save_file({"w": torch.full((4, 4), 1.5)}, served.folder / f"{name}.safetensors")
    models = [
        {"model": f"{served.url}/{name}.safetensors?X-Amz-Signature={secret}"} for name in "ab"
    ]
    spec = {"merge_method": "linear", "models": models}
    Path("spec.yaml").write_text(json.dumps(spec))
    result = outliermerge.run("spec.yaml", output="out.safetensors")
    assert result.manifest["inputs"][0]["model"].endswith("X-Amz-Signature=REDACTED")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [p for p in written if p.name != "spec.yaml" and secret.encode() in p.read_bytes()]
    Path(served.folder / "b.safetensors").unlink()
    with pytest.raises(OutlierMergeError) as caught:
        outliermerge.run(spec, output="other.safetensors")
    assert "b.safetensors" in str(caught.value) and secret not in str(caught.value)
    assert secret not in caplog.text


def test_a_run_that_was_stopped_goes_on(served: RangeServer) -> None:
    at = f"{served.url}/bucket"
    outliermerge.run(spec_of(str(served.folder / "bucket")), output="local")
    last = "bucket/b/model-00002-of-00002.safetensors"
    plan = outliermerge.plan(spec_of(at))
    served.fault = lambda name, start, stop: "503" if name == last else ""
    with pytest.raises(OutlierMergeError, match=r"model-00002.*503, in"):
        outliermerge.run(plan, output="out")
    served.fault = lambda name, start, stop: ""
    outliermerge.run(spec_of(at), output="out")
    assert weights_of(Path("out")) == weights_of(Path("local"))


def test_pickles_elsewhere_are_refused(served: RangeServer) -> None:
    pytest.importorskip("obstore")
    folder = served.folder / "bucket" / "pickled"
    folder.mkdir()
    torch.save({"w": torch.zeros(3)}, folder / "pytorch_model.bin")
    with pytest.raises(OutlierMergeError, match="only safetensors are read by ranges"):
        outliermerge.plan({"merge_method": "linear", "models": [{"model": "s3://bucket/pickled"}]})


def test_a_name_that_leads_out_of_the_folder_is_refused(served: RangeServer) -> None:
    folder = served.folder / "bucket" / "hostile"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "../../../x.safetensors"}}))
    with pytest.raises(OutlierMergeError, match="leads out of its folder"):
        outliermerge.plan(
            {"merge_method": "linear", "models": [{"model": f"{served.url}/bucket/hostile"}]}
        )


def _run(
    server: HubServer, home: Path, *words: str, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "outliermerge", *words],
        env=server.environment(home, XDG_CACHE_HOME=str(home / "cache"), **more),
        capture_output=True,
        text=True,
    )


def test_the_hub_is_read_by_ranges(tmp_path: Path) -> None:
    folders = {f"org/{name}": save_model(tmp_path / name, seed) for seed, name in enumerate(NAMES)}
    spec = spec_of("org") | {"base_model": "hf://org/base"}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    outliermerge.run(spec_of(str(tmp_path)), output=tmp_path / "local")
    words = str(tmp_path / "spec.yaml"), str(tmp_path / "out")
    with HubServer(folders, gated=["org/b"], renamed={"old/a": "org/a"}) as server:
        refused = _run(server, tmp_path / "home", "plan", words[0])
        assert refused.returncode == 1
        assert "gated" in refused.stderr or "401" in refused.stderr
        server.sent.clear()
        planned = _run(server, tmp_path / "home", "plan", words[0], HF_TOKEN=TOKEN)
        assert planned.returncode == 0, planned.stderr
        assert not list((tmp_path / "home" / "hub").rglob("*.safetensors"))
        done = _run(server, tmp_path / "home", "run", *words, "--stream", HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
    manifest = json.loads((tmp_path / "out" / "outliermerge.json").read_text())
    assert [entry["version"] for entry in manifest["inputs"]] == [
        commit_of(folder) for folder in folders.values()
    ]
    assert not list((tmp_path / "home" / "hub").rglob("*.safetensors"))
    assert f"org/a@{commit_of(tmp_path / 'a')}" in (tmp_path / "out" / "recipe.yaml").read_text()
    texts = [p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()]
    texts += [p.read_bytes() for p in (tmp_path / "home").rglob("*") if p.is_file()]
    assert not [text for text in texts if TOKEN.encode() in text]
    assert TOKEN not in done.stdout + done.stderr


def test_a_real_s3_server(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    boto3 = pytest.importorskip("boto3")
    moto_server = pytest.importorskip("moto.server")
    monkeypatch.chdir(tmp_path)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "a-key",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-this-test",
            "AWS_REGION": "us-east-1",
        }
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=keys["AWS_ENDPOINT_URL"], region_name="us-east-1")
        client.create_bucket(Bucket="models")
        for seed, name in enumerate(NAMES):
            for path in save_model(tmp_path / name, seed).iterdir():
                client.upload_file(str(path), "models", f"deep/{name}/{path.name}")
        local = outliermerge.run(spec_of(str(tmp_path)), output="local")
        there = outliermerge.run(spec_of("s3://models/deep"), output="there")
    finally:
        server.stop()
    assert weights_of(there.output) == weights_of(local.output)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if b"a-secret-of-this-test" in path.read_bytes()]


def _spec_file(at: str, method: str = "ties", **parameters: object) -> str:
    spec = spec_of(at, method)
    spec.setdefault("parameters", {}).update(parameters)
    Path("spec.json").write_text(json.dumps(spec))
    return "spec.json"


def test_inputs_are_deleted_as_they_are_read_and_never_a_users(
    served: RangeServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    own_cache: Path,
) -> None:
    at, flag = f"{served.url}/bucket", "--delete-inputs-as-read"
    monkeypatch.setattr("outliermerge.storage.cached_files.CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr("outliermerge.storage.range_cache._AHEAD_BYTES", 1 << 16)
    kept: list[int] = []
    close = RangeCache.close

    def note(cache: RangeCache) -> None:
        kept.append(cache.kept_bytes)
        close(cache)

    monkeypatch.setattr(RangeCache, "close", note)
    local = outliermerge.run(spec_of(str(served.folder / "bucket")), output="local")
    assert main(["run", _spec_file(at), "there", flag, "--threads", "1"]) == 0
    assert weights_of(Path("there")) == weights_of(local.output)
    largest = 3 * 300 * 257 * 2  # bytes of all models' tensors of one name
    assert max(kept) <= largest + 6 * 3 * (1 << 12)  # and chunks of which a part is not done
    assert list((own_cache / "ranges").iterdir()) == []
    capsys.readouterr()
    assert main(["run", _spec_file(str(served.folder / "bucket")), "other", flag]) == 1
    assert "nothing of yours is deleted" in capsys.readouterr().err
    assert main(["run", _spec_file(at, trim="model"), "other", flag]) == 1
    told = capsys.readouterr().err
    assert "of the whole models before it merges" in told and flag in told
    assert not Path("other.partial").exists()
