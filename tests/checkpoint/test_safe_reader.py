"""A model that was made to mislead is refused by name: links, pipes, pickles, names, archives."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import save_tensors
from safetensors.torch import load_file, save_file

from outliermerge import OutlierMergeError
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.formats.pytorch_file import read_file
from outliermerge.checkpoint.formats.safetensors_file import read_header
from outliermerge.checkpoint.reader import Reader

STATE = {"w": torch.arange(4.0)}
ADVICE = "Copy the file into the folder, or name the folder that it is in."


@pytest.fixture
def model(tmp_path):
    return save_tensors(tmp_path / "model", STATE)


def _refused(path: Path) -> str:
    with pytest.raises(OutlierMergeError) as caught:
        open_checkpoint(path)
    return str(caught.value).replace(str(path.parent), "DIR")


def _assert_read(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    with Reader() as reader:
        assert torch.equal(reader.values(checkpoint.tensors["w"], 0, 4), STATE["w"])


# Links.


def _move_and_link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(os.path.relpath(target, path.parent))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_a_link_out_of_the_folder_is_refused(name, model):
    _move_and_link(model / name, model.parent / "secret" / "x")

    assert _refused(model) == (
        f"DIR/model/{name}: is a link out of the folder to DIR/secret/x: refused. {ADVICE}"
    )


def test_a_shard_of_an_index_that_is_a_link_out_of_the_folder_is_refused(model):
    index = {"weight_map": {"w": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    _assert_read(model)
    _move_and_link(model / "model.safetensors", model.parent / "x")

    assert _refused(model) == (
        f"DIR/model/model.safetensors: is a link out of the folder to DIR/x: refused. {ADVICE}"
    )


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model_index.json"])
def test_an_index_that_is_a_link_out_of_the_folder_is_refused(name, model):
    (model.parent / "x").write_text("{}")
    (model / name).symlink_to("../x")

    assert _refused(model) == (
        f"DIR/model/{name}: is a link out of the folder to DIR/x: refused. {ADVICE}"
    )


def test_a_file_in_a_subfolder_that_is_a_link_out_of_the_folder_is_refused(model):
    other = model.parent / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (model / "1_Pooling").symlink_to("../other")

    assert _refused(model) == (
        "DIR/model/1_Pooling/config.json: is a link out of the folder to DIR/other/config.json: "
        f"refused. {ADVICE}"
    )


def test_a_component_in_a_folder_that_is_a_link_out_of_the_pipeline_is_refused(tmp_path):
    root, other = tmp_path / "pipe", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    (root / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DModel"]}')
    save_file(STATE, other / "diffusion_pytorch_model.safetensors")
    (root / "unet").symlink_to("../other")

    assert _refused(root) == (
        "DIR/pipe/unet/diffusion_pytorch_model.safetensors: is a link out of the folder to "
        f"DIR/other/diffusion_pytorch_model.safetensors: refused. {ADVICE}"
    )


def test_links_inside_the_folder_are_followed(model):
    _move_and_link(model / "model.safetensors", model / "files" / "x")
    _move_and_link(model / "config.json", model / "files" / "y")
    (model / "again").symlink_to("files")

    _assert_read(model)
    assert open_checkpoint(model).sidecars == ("config.json",)


def test_a_model_folder_and_a_file_may_be_reached_through_a_link(model):
    (model.parent / "link").symlink_to("model")
    (model.parent / "link.safetensors").symlink_to("model/model.safetensors")

    _assert_read(model.parent / "link")
    _assert_read(model.parent / "link.safetensors")


def _hub_cache(root: Path, name: str = "models--org--name") -> Path:
    """Make a snapshot as huggingface_hub lays it out, and return its folder."""
    snapshot = root / name / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_file(STATE, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text("{}")
    for number, file in enumerate(sorted(snapshot.iterdir())):
        _move_and_link(file, root / name / "blobs" / str(number))
    return snapshot


def test_a_snapshot_of_the_hub_cache_links_into_the_blobs_of_its_repository(tmp_path):
    snapshot = _hub_cache(tmp_path / "hub")
    (tmp_path / "cache").symlink_to("hub")
    shutil.copytree(snapshot, snapshot / "sub", symlinks=True)
    for link in (snapshot / "sub").iterdir():
        target = link.readlink()
        link.unlink()
        link.symlink_to(Path("..") / target)

    _assert_read(snapshot)
    _assert_read(snapshot / "sub")
    _assert_read(tmp_path / "cache" / "models--org--name" / "snapshots" / "abc")
    assert "config.json" in open_checkpoint(snapshot).sidecars


def test_a_snapshot_that_links_elsewhere_than_into_its_blobs_is_refused(tmp_path):
    other = _hub_cache(tmp_path, "models--org--other")
    snapshot = _hub_cache(tmp_path)
    blob = (other / "config.json").resolve()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(blob)

    assert _refused(snapshot) == (
        f"DIR/abc/config.json: is a link out of the folder to {blob}: refused. {ADVICE}"
    )


def test_blobs_that_are_a_link_themselves_are_refused(tmp_path):
    snapshot = _hub_cache(tmp_path)
    blobs = tmp_path / "models--org--name" / "blobs"
    _move_and_link(blobs, tmp_path / "elsewhere")

    assert "is a link out of the folder to" in _refused(snapshot)


@pytest.mark.parametrize("layout", ["names--org--name/snapshots/abc", "models--org--name/rev/abc"])
def test_a_folder_that_only_looks_like_the_hub_cache_may_not_link_out(layout, tmp_path):
    real = _hub_cache(tmp_path / "hub")
    folder = tmp_path / layout
    folder.mkdir(parents=True)
    shutil.copytree(real.parent.parent / "blobs", folder.parent.parent / "blobs")
    (folder / "model.safetensors").symlink_to("../../blobs/1")

    assert _refused(folder) == (
        "DIR/abc/model.safetensors: is a link out of the folder to "
        f"{folder.parent.parent / 'blobs' / '1'}: refused. {ADVICE}"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_to_what_is_gone_is_told_with_its_target(name, model):
    (model / name).unlink()
    (model / name).symlink_to("../../blobs/0a")

    assert _refused(model) == (
        f"DIR/model/{name}: is a link to ../../blobs/0a, which is not there. Fetch the model again."
    )


def test_a_link_to_itself_is_refused(model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("model.safetensors")

    assert _refused(model) == (
        "DIR/model/model.safetensors: cannot be read: Too many levels of symbolic links"
    )


# What is no regular file must not be opened: a pipe would wait forever.


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "kind"),
    [(_pipe, "a pipe, socket or device"), (_folder, "a folder"),
     (_device, "a pipe, socket or device")],
    ids=["pipe", "folder", "device"],
)  # fmt: skip
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "model_index.json"],
)
def test_what_is_no_regular_file_is_refused_by_name(name, make, kind, tmp_path):
    (tmp_path / "m").mkdir()
    make(tmp_path / "m" / name)

    assert _refused(tmp_path / "m") == f"DIR/m/{name}: is {kind}, expected a regular file"


@pytest.mark.parametrize("make", [_pipe, _device], ids=["pipe", "device"])
def test_a_sidecar_that_is_no_regular_file_is_refused_by_name(make, model):
    make(model / "tokenizer.json")

    assert _refused(model) == (
        "DIR/model/tokenizer.json: is a pipe, socket or device, expected a regular file"
    )


@pytest.mark.parametrize("read", [read_header, read_file])
def test_a_reader_of_one_file_refuses_a_pipe(read, tmp_path):
    os.mkfifo(tmp_path / "m")

    with pytest.raises(OutlierMergeError, match="is a pipe, socket or device, expected a regular"):
        read(tmp_path / "m")


def test_a_pipe_as_a_model_is_refused(tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")

    assert _refused(tmp_path / "m.safetensors") == (
        "DIR/m.safetensors: is neither a folder nor a regular file"
    )


# Pickles.


class _Calls:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("value", "called"),
    [
        (_Calls(os.system, "true"), f"{os.system.__module__}.system"),
        (_Calls(eval, "1"), "eval"),
        (_Calls(Path, "x"), "pathlib.Path"),
    ],
    ids=["system", "eval", "path"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_a_pickle_would_call_is_named(value, called, nested, tmp_path):
    state = STATE | {"v": value}
    torch.save({"state_dict": state} if nested else state, tmp_path / "m.pt")

    assert _refused(tmp_path / "m.pt") == (
        "DIR/m.pt: refused: the pickle holds more than tensors and could run code: it calls "
        f"{called}. Convert it to safetensors where you trust it."
    )


def _rewrite(path: Path, change: Callable[[str, bytes], bytes], **options: int) -> None:
    """Write a saved file again with its records changed."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in records:
            archive.writestr(name, change(name, data))


def test_a_pickle_that_is_broken_is_not_told_as_an_attack(tmp_path):
    torch.save(STATE, tmp_path / "m.pt")
    _rewrite(tmp_path / "m.pt", lambda name, data: b"ga" if name.endswith(".pkl") else data)

    assert _refused(tmp_path / "m.pt") == (
        "DIR/m.pt: its pickle is broken or not as torch.save writes it (Unsupported operand 103). "
        "Fetch it again."
    )


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "m.pt")
    _rewrite(
        tmp_path / "m.pt",
        # The 4 elements of storage and tensor become 65535.
        lambda name, data: data.replace(b"K\x04", b"M\xff\xff") if name.endswith(".pkl") else data,
    )

    assert _refused(tmp_path / "m.pt").startswith("DIR/m.pt: broken or truncated: ")


def test_a_compressed_file_is_refused_for_mapped_it_would_read_as_noise(tmp_path):
    path = tmp_path / "m.pt"
    torch.save(STATE, path)
    _rewrite(path, lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    assert torch.equal(torch.load(path, weights_only=True)["w"], STATE["w"])

    assert _refused(path) == (
        "DIR/m.pt: compressed, which cannot be read in pieces. Rewrite it once: "
        "torch.save(torch.load(path, weights_only=True), path)"
    )

    torch.save(torch.load(path, weights_only=True), path)
    _assert_read(path)


def test_a_torchscript_program_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt", "a") as archive:
        archive.writestr("m/constants.pkl", b"")

    assert _refused(tmp_path / "m.pt") == (
        "DIR/m.pt: a TorchScript program, which is code: refused. Save the state_dict() of "
        "torch.jit.load(path) where you trust it."
    )


# Sizes that only a header claims.


def test_a_shape_whose_size_overflows_is_refused_as_the_library_refuses_it(tmp_path):
    entry = {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(Exception, match="overflow"):
        load_file(path)

    assert _refused(path) == (
        f"DIR/m.safetensors: tensor 'w': shape [{2**62}, {2**62}, 0] is not a list of sizes"
    )
