"""Models that huggingface_hub itself downloads, from a hub on the loopback."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from checkpoints import load_folder, save_tensors
from hub_server import STRANGERS_TOKEN, TOKEN, WARNING, Cut, HubServer, commit_of
from safetensors.torch import save_file

import outliermerge
from outliermerge.checkpoint.folders.folder import open_checkpoint

LIMITED = (
    "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); "
    "runpy.run_module('outliermerge', run_name='__main__')"
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(64, 64, generator=generator) for name in ("a.weight", "b.weight")}


def _save_sharded(folder: Path, seed: int) -> Path:
    folder.mkdir()
    tensors = _tensors(seed)
    weight_map = dict(zip(tensors, SHARDS, strict=True))
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "test"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _save_file(path: Path, seed: int) -> None:
    """Save weights where the name says so, and otherwise a few bytes of no other file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor = {f"weight.{path.name}": torch.full((2, 2), float(seed))}
    if path.suffix == ".safetensors":
        save_file(tensor, path, metadata={"format": "pt"})
    elif path.suffix in (".bin", ".pt", ".pth"):
        torch.save(tensor, path)
    else:
        path.write_text(json.dumps({"name": str(path)}))


def _weight_map(*files: str) -> dict[str, dict[str, str]]:
    return {"weight_map": {f"weight.{file}": file for file in files}}


@dataclass(frozen=True)
class Layout:
    """A repository: the files that a merge needs, those it does not, and what some files say."""

    needed: tuple[str, ...]
    idle: tuple[str, ...]
    contents: dict[str, object] = field(default_factory=dict)


PICKLED = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
LAYOUTS = {
    "every-format": Layout(
        ("1_Pooling/config.json", "LICENSE", "README.md", "config.json", "merges.txt",
         "model.safetensors"),
        ("assets/deep/config.json", "consolidated.safetensors",
         "flax_model.msgpack", "model.Q4_K_M.gguf", "model.fp16.safetensors",
         "onnx/config.json", "onnx/model.onnx", "optimizer.pt", "original/consolidated.00.pth",
         "original/params.json", "pytorch_model.bin", "tf_model.h5", "training_args.bin"),
    ),
    "llava": Layout(
        ("config.json", "pytorch_model.bin.index.json", *PICKLED),
        ("mm_projector.bin", "trainer_state.json"),
        {"pytorch_model.bin.index.json": _weight_map(*PICKLED)},
    ),
    "odd-shards": Layout(
        ("model.safetensors.index.json", "part-a.safetensors", "part-b.safetensors"),
        ("part-c.safetensors",),
        {"model.safetensors.index.json": _weight_map("part-a.safetensors", "part-b.safetensors")},
    ),
    "odd-name": Layout(("weights[1].safetensors",), ("weights1.bin",)),
    "only-fp16": Layout(("config.json", "model.fp16.safetensors"), ("pytorch_model.fp16.bin",)),
    "adapter": Layout(
        ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
        ("adapter_model.bin", "training_args.bin", "checkpoint-10/adapter_model.safetensors",
         "checkpoint-10/adapter_config.json"),
    ),
    "sentence-transformer": Layout(
        ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
         "config.json", "model.safetensors", "modules.json"),
        ("2_Dense/pytorch_model.bin", "onnx/model.onnx", "other/config.json", "other/model.pt"),
        {"modules.json": [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]},
    ),
    "pipeline": Layout(
        ("model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
         "text_encoder/model.safetensors", "tokenizer/merges.txt", "unet/config.json",
         "unet/diffusion_pytorch_model.safetensors"),
        ("sd_xl_base_1.0.safetensors", "text_encoder/pytorch_model.bin",
         "tokenizer/extra.safetensors", "unet/diffusion_pytorch_model.bin",
         "unet/diffusion_pytorch_model.fp16.safetensors",
         "vae_1_0/diffusion_pytorch_model.safetensors"),
        {"model_index.json": {
            "_class_name": "Pipeline",
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
        }},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders to be served, with the same tensors' names; one in shards."""
    place = tmp_path_factory.mktemp("repositories")
    folders = {name: save_tensors(place / name, _tensors(n)) for n, name in enumerate(("a", "b"))}
    folders["v1"] = save_tensors(place / "v1", _tensors(5))
    folders["sharded"] = _save_sharded(place / "sharded", 7)
    return folders


@pytest.fixture
def hub(models: dict[str, Path]) -> Iterator[HubServer]:
    repositories = {
        "org/a": models["a"],
        "org/b": models["b"],
        "org/b@v1": models["v1"],
        "org/sharded": models["sharded"],
        "org/gated": models["a"],
        "org/private": models["b"],
        "org/new-name": models["v1"],
    }
    with HubServer(
        repositories,
        gated={"org/gated"},
        private={"org/private"},
        renamed={"org/old-name": "org/new-name"},
    ) as server:
        yield server


def _call(
    place: Path, environment: dict[str, str], *names: str, command: str = "run", limit: int = 0
) -> tuple[int, str]:
    """Plan or run a merge of models in a process of its own; return exit code and messages."""
    lines = [f"  - model: {name}" for name in names]
    (place / "spec.yaml").write_text("\n".join(["merge_method: linear", "models:", *lines, ""]))
    program = ["-m", "outliermerge"]
    if limit:
        program = ["-c", LIMITED.format(limit)]
    more = ["--overwrite"] if command == "run" else []
    done = subprocess.run(
        [sys.executable, *program, command, "spec.yaml", "--output", "out", *more],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if not line.endswith(WARNING)]
    return done.returncode, "\n".join(told)


def _error(hub: HubServer, place: Path, name: str, reason: str, *, is_asked: bool = True) -> str:
    repo_id, _, revision = name.partition("@")
    asked = f", then at {hub.endpoint}" if is_asked else ""
    return (
        f"error: spec.yaml:3:12: models[0].model: model '{name}': {reason}\n"
        f"Looked for {place}/{name}, then in the hub's cache {place}/home/hub{asked}.\n"
        f"To fetch it: hf download {repo_id}" + (f" --revision {revision}" if revision else "")
    )


def _snapshot(place: Path, name: str, folder: Path) -> Path:
    return place / f"home/hub/models--org--{name}/snapshots/{commit_of(folder)}"


class TestFetching:
    def test_a_merge_of_hub_ids_is_that_of_the_folders_online_offline_and_from_a_moved_cache(
        self, hub: HubServer, models: dict[str, Path], tmp_path: Path
    ) -> None:
        names = ("org/a", "org/b@v1", f"org/b@{commit_of(models['b'])}", "org/sharded")
        local = [models[name] for name in ("a", "v1", "b", "sharded")]
        spec = {"merge_method": "linear", "models": [{"model": str(path)} for path in local]}
        outliermerge.run(spec, output=tmp_path / "expected", device="cpu")

        assert _call(tmp_path, hub.environment(tmp_path / "home"), *names)[0] == 0

        # The config of org/b is the same in both revisions, and the cache knows it.
        files = ["config.json", "config.json", *["model.safetensors"] * 3]
        assert hub.fetched() == sorted([*files, "config.json", INDEX, "tokenizer.json", *SHARDS])
        expected, merged = load_folder(tmp_path / "expected"), load_folder(tmp_path / "out")
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], expected[name]) for name in expected)

        note = (
            "note: the models' files differ; the output has the config of org/a, tokenizer of "
            "org/a:\n  tokenizer.json: in org/sharded, not in org/a\nnote: a run would stop: out: "
            "exists already. Use --overwrite to replace it when the merge is done, or choose "
            "another --output."
        )
        again = hub.environment(tmp_path / "home")
        assert _call(tmp_path, again, *names, command="plan") == (0, note)
        assert hub.fetched() == []

        (tmp_path / "home").rename(tmp_path / "moved")
        offline = hub.environment(tmp_path / "moved", HF_HUB_OFFLINE="1")
        assert _call(tmp_path, offline, *names, command="plan") == (0, note)
        assert hub.requests == []

    def test_a_token_opens_gated_and_private_repositories_and_an_old_name_leads_to_the_new(
        self, hub: HubServer, tmp_path: Path
    ) -> None:
        names = ("org/gated", "org/private", "org/old-name")
        environment = hub.environment(tmp_path / "home", HF_TOKEN=TOKEN)

        assert _call(tmp_path, environment, *names) == (0, "")

        assert hub.fetched() == ["config.json"] * 3 + ["model.safetensors"] * 3

    def test_a_download_that_breaks_is_told_and_the_next_run_fetches_the_rest(
        self, hub: HubServer, models: dict[str, Path], tmp_path: Path
    ) -> None:
        hub.cuts[SHARDS[1]] = Cut(after=1000, reset=True)
        environment = hub.environment(tmp_path / "home")

        code, told = _call(tmp_path, environment, "org/sharded")

        assert (code, told) == (
            1,
            _error(
                hub,
                tmp_path,
                "org/sharded",
                "the connection to the hub failed: [Errno 104] Connection reset by peer.\n"
                "Files that have arrived are kept: the same command goes on with the others.",
            ),
        )
        # The branch is looked up once for the listing, once for the download, and then pinned.
        assert hub.requests.count(("GET", "/api/models/org/sharded/revision/main")) == 1
        assert SHARDS[1] in hub.fetched()
        arrived = {
            path.name for path in _snapshot(tmp_path, "sharded", models["sharded"]).iterdir()
        }
        assert INDEX in arrived
        assert SHARDS[1] not in arrived

        assert _call(tmp_path, environment, "org/sharded") == (0, "")

        assert set(hub.fetched()) == {"config.json", "tokenizer.json", INDEX, *SHARDS} - arrived

    def test_a_short_break_is_bridged_within_the_run(self, hub: HubServer, tmp_path: Path) -> None:
        hub.cuts["model.safetensors"] = Cut(after=1000)

        code, told = _call(tmp_path, hub.environment(tmp_path / "home"), "org/a")

        assert code == 0
        assert "Trying to resume download" in told
        assert hub.fetched() == ["config.json", "model.safetensors", "model.safetensors"]

    def test_a_file_that_the_disk_does_not_take_is_told(
        self, hub: HubServer, tmp_path: Path
    ) -> None:
        code, told = _call(tmp_path, hub.environment(tmp_path / "home"), "org/a", limit=16_384)

        assert code == 1
        reason = (
            "[Errno 27] File too large.\n"
            "Files that have arrived are kept: the same command goes on with the others."
        )
        assert told == _error(hub, tmp_path, "org/a", reason)

    def test_only_what_is_read_of_a_repository_is_fetched(self, tmp_path: Path) -> None:
        for name, layout in LAYOUTS.items():
            for file in (*layout.needed, *layout.idle):
                _save_file(tmp_path / name / file, seed=len(file))
            for file, content in layout.contents.items():
                (tmp_path / name / file).write_text(json.dumps(content))
        script = (
            "import sys\n"
            "from outliermerge.checkpoint.folders.hub import resolve\n"
            "for name in sys.argv[1:]:\n"
            "    print(resolve(f'org/{name}'))\n"
        )
        with HubServer({f"org/{name}": tmp_path / name for name in LAYOUTS}) as hub:
            done = subprocess.run(
                [sys.executable, "-c", script, *LAYOUTS],
                env=hub.environment(tmp_path / "home"),
                capture_output=True,
                text=True,
                check=True,
            )
            fetched = hub.fetched()

        wanted = {name: sorted(layout.needed) for name, layout in LAYOUTS.items()}
        folders = {
            name: Path(line) for name, line in zip(LAYOUTS, done.stdout.split(), strict=True)
        }
        found = {
            name: sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
            for name, folder in folders.items()
        }
        assert found == wanted
        assert len(fetched) == sum(map(len, wanted.values()))
        for name in set(LAYOUTS) - {"adapter"}:
            whole, part = open_checkpoint(tmp_path / name), open_checkpoint(folders[name])
            assert part.tensors.keys() == whole.tensors.keys()
            assert [path.relative_to(part.root) for path in part.other_files] == [
                path.relative_to(whole.root) for path in whole.other_files
            ]
            assert [p.path.name for p in part.weight_files] == [
                p.path.name for p in whole.weight_files
            ]

    def test_tensors_that_are_not_fetched_are_refused_by_the_hub_s_listing(
        self, tmp_path: Path
    ) -> None:
        folder = save_tensors(tmp_path / "repository", _tensors(0))
        _save_file(folder / "value_head.bin", 0)
        with HubServer({"org/a": folder}) as hub:
            environment = hub.environment(tmp_path / "home")
            code, told = _call(tmp_path, environment, "org/a")
            assert "value_head.bin" not in hub.fetched()
        assert code == 1
        assert "  value_head.bin: in org/a\n" in told
        offline = environment | {"HF_HUB_OFFLINE": "1"}
        assert _call(tmp_path, offline, "org/a") == (1, told)


class TestRefusals:
    @pytest.mark.parametrize(
        ("files", "reason"),
        [
            (
                ("README.md", "model.Q4_K_M.gguf"),
                "the repository has no weights (*.safetensors, *.bin, *.pt, *.pth). It has:\n"
                "  README.md\n  model.Q4_K_M.gguf",
            ),
            (
                ("config.json", "model.bf16.safetensors", "model.fp16.safetensors"),
                "its weights are there only as variants, and as several: bf16, fp16. Fetch one "
                "with `hf download … --include … --local-dir …` and name that folder.",
            ),
        ],
    )
    def test_a_repository_without_weights_to_read_is_told_before_any_is_fetched(
        self, tmp_path: Path, files: tuple[str, ...], reason: str
    ) -> None:
        for file in files:
            _save_file(tmp_path / "repository" / file, seed=0)
        with HubServer({"org/a": tmp_path / "repository"}) as hub:
            told = _call(tmp_path, hub.environment(tmp_path / "home"), "org/a")
            assert {*hub.fetched()} <= {"config.json"}

        assert told == (1, _error(hub, tmp_path, "org/a", reason))

    @pytest.mark.parametrize(
        ("name", "token", "reason"),
        [
            (
                "org/gated",
                "",
                "the repository is gated: ask for access at ENDPOINT/org/gated; then run "
                "`hf auth login` or set HF_TOKEN.",
            ),
            (
                "org/gated",
                STRANGERS_TOKEN,
                "the repository is gated: ask for access at ENDPOINT/org/gated; your token has no "
                "access.",
            ),
            (
                "org/private",
                "",
                "the hub has no such repository, or it is private: run `hf auth login` or set "
                "HF_TOKEN.",
            ),
            (
                "org/absent",
                TOKEN,
                "the hub has no such repository, or your token may not read it.",
            ),
            (
                "org/a",
                "hf_outdated",
                "the hub refuses the token that was sent: run `hf auth login` or set HF_TOKEN.",
            ),
            ("org/a@v2", "", "the repository has no revision 'v2'."),
        ],
    )
    @pytest.mark.sampled(2)
    def test_what_the_hub_refuses_is_told_with_what_to_do(
        self, hub: HubServer, tmp_path: Path, name: str, token: str, reason: str
    ) -> None:
        environment = hub.environment(tmp_path / "home", **({"HF_TOKEN": token} if token else {}))

        assert _call(tmp_path, environment, name) == (
            1,
            _error(hub, tmp_path, name, reason.replace("ENDPOINT", hub.endpoint)),
        )

    def test_a_file_that_the_hub_refuses_is_told(self, hub: HubServer, tmp_path: Path) -> None:
        hub.forbidden = {"model.safetensors"}

        assert _call(tmp_path, hub.environment(tmp_path / "home", HF_TOKEN=TOKEN), "org/a") == (
            1,
            _error(
                hub,
                tmp_path,
                "org/a",
                "the hub answers 403: model.safetensors is not for your token.\n"
                "Files that have arrived are kept: the same command goes on with the others.",
            ),
        )

    def test_an_endpoint_that_is_no_hub_is_told(self, hub: HubServer, tmp_path: Path) -> None:
        hub.endpoint += "/elsewhere"

        assert _call(tmp_path, hub.environment(tmp_path / "home"), "org/a") == (
            1,
            _error(hub, tmp_path, "org/a", "the hub answers 404: Not found."),
        )

    def test_a_hub_that_does_not_answer_is_told(self, tmp_path: Path) -> None:
        with HubServer({}) as gone:
            environment = gone.environment(tmp_path / "home")
        reason = "the connection to the hub failed: [Errno 111] Connection refused."

        assert _call(tmp_path, environment, "org/a") == (
            1,
            _error(gone, tmp_path, "org/a", reason),
        )

    @pytest.mark.parametrize("token", ["hf_one\nhf_two", "hf_one\x0bhf_two"])
    def test_a_token_that_is_no_header_is_told_and_not_shown(
        self, hub: HubServer, tmp_path: Path, token: str
    ) -> None:
        code, told = _call(tmp_path, hub.environment(tmp_path / "home", HF_TOKEN=token), "org/a")

        assert code == 1 and not hub.requests
        assert "the token of the hub has a " in told and "set HF_TOKEN to the token and" in told
        assert "hf_one" not in told and "hf_two" not in told

    def test_an_answer_that_is_no_http_is_told_with_what_to_do(
        self, hub: HubServer, tmp_path: Path
    ) -> None:
        def answer() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nno header\r\n\r\n")

        with socket.create_server(("127.0.0.1", 0)) as listening:
            thread = threading.Thread(target=answer)
            thread.start()
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            environment = hub.environment(tmp_path / "home", HF_ENDPOINT=url)
            code, told = _call(tmp_path, environment, "org/a")
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()

        assert code == 1
        assert "is not to be understood (illegal header line: " in told
        assert f"HF_ENDPOINT is {url}: is a hub there, without a proxy before it?" in told


class TestCache:
    def test_an_incomplete_snapshot_is_told_offline_and_completed_online(
        self, hub: HubServer, models: dict[str, Path], tmp_path: Path
    ) -> None:
        online = hub.environment(tmp_path / "home")
        offline = online | {"HF_HUB_OFFLINE": "1"}
        folder = _snapshot(tmp_path, "sharded", models["sharded"])
        listings = folder.parent.parent / "trees"

        def lacking(*names: str) -> tuple[int, str]:
            reason = f"the hub is not asked, as HF_HUB_OFFLINE is set, and the snapshot {folder} "
            rows = "".join(f"\n  {name}" for name in names)
            return 1, _error(hub, tmp_path, "org/sharded", f"{reason}lacks:{rows}", is_asked=False)

        assert _call(tmp_path, offline, "org/sharded") == (
            1,
            _error(
                hub,
                tmp_path,
                "org/sharded",
                "the hub is not asked, as HF_HUB_OFFLINE is set.",
                is_asked=False,
            ),
        )
        assert _call(tmp_path, online, "org/sharded") == (0, "")
        for name in ("tokenizer.json", SHARDS[1]):
            (folder / name).resolve().unlink()
            (folder / name).unlink()
        assert _call(tmp_path, offline, "org/sharded") == lacking(SHARDS[1], "tokenizer.json")

        shutil.rmtree(listings)
        assert _call(tmp_path, offline, "org/sharded") == lacking(SHARDS[1])

        hub.fetched()
        assert _call(tmp_path, online, "org/sharded") == (0, "")
        assert hub.fetched() == [SHARDS[1], "tokenizer.json"]

        shutil.rmtree(listings)
        for path in list(folder.iterdir()):
            if path.name != "config.json":
                path.unlink()
        assert _call(tmp_path, offline, "org/sharded") == lacking(
            "weights (*.safetensors, *.bin, *.pt, *.pth)"
        )

    def test_a_snapshot_is_used_with_a_warning_where_the_hub_does_not_answer(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        with HubServer({"org/a": models["a"]}) as hub:
            environment = hub.environment(tmp_path / "home")
            assert _call(tmp_path, environment, "org/a") == (0, "")

        assert _call(tmp_path, environment, "org/a") == (
            0,
            "WARNING: org/a: the connection to the hub failed: [Errno 111] Connection refused; "
            "the snapshot in the cache is used",
        )

    def test_a_revision_that_the_hub_no_longer_has_is_not_taken_from_it(
        self, models: dict[str, Path], tmp_path: Path
    ) -> None:
        with HubServer({"org/a": models["a"], "org/a@v1": models["v1"]}) as hub:
            environment = hub.environment(tmp_path / "home")
            assert _call(tmp_path, environment, "org/a@v1") == (0, "")
            hub.repositories = {"org/a": models["a"]}

            assert _call(tmp_path, environment, "org/a@v1") == (
                1,
                _error(hub, tmp_path, "org/a@v1", "the repository has no revision 'v1'."),
            )

    def test_weights_in_the_store_that_all_repositories_share_are_read(
        self, hub: HubServer, models: dict[str, Path], tmp_path: Path
    ) -> None:
        """As huggingface_hub 2.4.0 stores what it fetched by Xet (utils/_shared_blobs.py)."""
        environment = hub.environment(tmp_path / "home")
        assert _call(tmp_path, environment, "org/a") == (0, "")
        blob = (_snapshot(tmp_path, "a", models["a"]) / "model.safetensors").resolve()
        shared = tmp_path / "home/hub/blobs" / blob.name[:2] / blob.name
        shared.parent.mkdir(parents=True)
        blob.rename(shared)
        blob.symlink_to(Path("../../blobs") / blob.name[:2] / blob.name)

        assert _call(tmp_path, environment, "org/a") == (0, "")
