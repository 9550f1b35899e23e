"""Folders whose files are links: into the hub's cache they are models, elsewhere refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from checkpoints import save_tensors

import outliermerge
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.reader import Reader
from outliermerge.errors import OutlierMergeError

STATE = {"w": torch.arange(4.0)}
MARKER = ".huggingface-shared-blobs"


def _move(file: Path, target: Path) -> Path:
    """Move a file away and leave a link to it, as the hub's client does."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file.rename(target)
    file.symlink_to(os.path.relpath(target, file.parent))
    return target


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _snapshot(cache: Path, *, layout: str = "links", name: str = "models--org--name") -> Path:
    """Make a snapshot in a cache: of links, of links into the shared store, or of files."""
    snapshot = save_tensors(cache / name / "snapshots" / "0a1b", STATE)
    (snapshot / "1_Pooling").mkdir()
    (snapshot / "1_Pooling" / "config.json").write_text("{}")
    for file in sorted(path for path in snapshot.rglob("*") if path.is_file()):
        if layout == "files":  # as on a disk without links
            continue
        digest = _hash(file)
        blob = _move(file, cache / name / "blobs" / digest[: 40 if file.suffix == ".json" else 64])
        if layout == "shared":
            _move(blob, cache / "blobs" / digest[:2] / digest)
            (cache / "blobs" / MARKER).write_text("1\n")
    return snapshot


def _assert_read(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    with Reader() as reader:
        assert torch.equal(reader.values(checkpoint.tensors["w"], 0, 4), STATE["w"])
    assert "config.json" in checkpoint.sidecars
    spec = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    output = folder.parent / "merged"
    run = outliermerge.run(spec, output=output, device="cpu", memory="64MB", overwrite=True)
    assert outliermerge.verify(run.output) == []
    assert not any(path.is_symlink() for path in run.output.rglob("*"))


def _linked_to_files(snapshot: Path, folder: Path) -> Path:
    """`ln -s snapshot/* folder`."""
    folder.mkdir()
    for path in snapshot.iterdir():
        (folder / path.name).symlink_to(path.absolute())
    return folder


def _linked_to_blobs(snapshot: Path, folder: Path) -> Path:
    """`hf download --local-dir` before huggingface_hub 0.23: small files are files."""
    for path in sorted(snapshot.rglob("*")):
        target = folder / path.relative_to(snapshot)
        if path.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            target.write_bytes(path.read_bytes())
        else:
            target.symlink_to(path.resolve())
    return folder


def _all_linked_to_blobs(snapshot: Path, folder: Path) -> Path:
    for path in sorted(snapshot.rglob("*")):
        target = folder / path.relative_to(snapshot)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.path.relpath(path.resolve(), target.parent))
    return folder


def _is_link(snapshot: Path, folder: Path) -> Path:
    folder.symlink_to(snapshot)
    return folder


WAYS = [_linked_to_files, _linked_to_blobs, _all_linked_to_blobs, _is_link]


@pytest.mark.parametrize("layout", ["links", "shared", "files"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.strip("_"))
@pytest.mark.parametrize("place", ["home/.cache/huggingface/hub", "mnt/any name"])
def test_links_into_a_cache_of_the_hub_are_followed_wherever_it_is(place, way, layout, tmp_path):
    snapshot = _snapshot(tmp_path / place, layout=layout)

    _assert_read(way(snapshot, tmp_path / "mine"))


@pytest.mark.parametrize("layout", ["links", "shared", "files"])
def test_a_cache_that_is_reached_through_a_link_is_one_too(layout, tmp_path):
    snapshot = _snapshot(tmp_path / "disk", layout=layout)
    (tmp_path / "hub").symlink_to("disk")

    _assert_read(tmp_path / "hub" / snapshot.relative_to(tmp_path / "disk"))
    _assert_read(_linked_to_files(tmp_path / "hub" / snapshot.relative_to(tmp_path / "disk"),
                                  tmp_path / "mine"))  # fmt: skip


def test_a_pipeline_of_parts_of_several_repositories_is_read(tmp_path):
    """A component that is a link to a snapshot's folder, of another repository than the rest."""
    root = tmp_path / "pipe"
    root.mkdir()
    (root / "model_index.json").write_text(
        '{"a": ["transformers", "A"], "b": ["transformers", "B"]}'
    )
    for name in "ab":
        snapshot = _snapshot(tmp_path / "hub", name=f"models--org--{name}")
        (root / name).symlink_to(snapshot)

    assert set(open_checkpoint(root).tensors) == {"a/w", "b/w"}


SECRETS = [
    "etc/passwd",
    "home/.ssh/id_rsa",
    "blobs/" + "0a" * 32,  # no repository's
    "hub/blobs/0a/" + "0a" * 32,  # a store without its marker
    "models--org--name/blobs/id_rsa",  # not named by its hash
    "models--org--name/blobs/deep/" + "0a" * 32,
    "models--org--name/refs/main",
    "models--org--name/" + "0a" * 32,
    "snapshots/0a1b/config.json",
    "datasets--org--name/snapshots/0a1b/data.json",
    "store/model.safetensors",
]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "1_Pooling/config.json"])
@pytest.mark.parametrize("secret", SECRETS)
def test_links_elsewhere_are_refused_with_the_ways_out(secret, file, tmp_path):
    folder = save_tensors(tmp_path / "downloaded", STATE)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    target = _move(folder / file, tmp_path / "elsewhere" / secret)

    with pytest.raises(OutlierMergeError) as caught:
        open_checkpoint(folder)
    assert str(caught.value) == (
        f"{folder / file}: is a link out of the folder to {target}: refused. "
        "Copy the file into the folder, or name the folder that it is in."
    )


def test_a_way_out_of_the_cache_through_dots_is_refused(tmp_path):
    """What counts is where a link ends, not what its text looks like."""
    cache = tmp_path / "hub" / "models--org--name" / "blobs"
    cache.mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    folder = save_tensors(tmp_path / "downloaded", STATE)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(cache / ".." / ".." / ".." / "secret")

    with pytest.raises(OutlierMergeError, match="is a link out of the folder"):
        open_checkpoint(folder)


def test_a_blob_that_is_a_link_to_a_secret_is_refused(tmp_path):
    """A downloaded folder may bring a cache's layout with it."""
    folder = save_tensors(tmp_path / "downloaded", STATE)
    secret = _move(folder / "config.json", folder / "models--a--b" / "blobs" / ("0a" * 32))
    _move(secret, tmp_path / "secret")

    with pytest.raises(OutlierMergeError, match="is a link out of the folder"):
        open_checkpoint(folder)
