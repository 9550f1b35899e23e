"""What a model's path may be besides a transformers folder: one file, or a diffusers pipeline."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import small_unet
from safetensors.torch import load_file, save_file

import outliermerge
from outliermerge import OutlierMergeError
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Checkpoint

STATE = {"conv.weight": torch.arange(6.0).view(2, 3), "conv.bias": torch.tensor([1.0, -2.0])}


def _read(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    with Reader() as reader:
        return {
            name: reader.values(source, 0, source.num_elements).view(source.shape)
            for name, source in checkpoint.tensors.items()
        }


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Assert that two state dicts hold the same bytes."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        as_bytes = [
            t.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
            for t in (found[name], tensor)
        ]
        assert torch.equal(*as_bytes), name


def _refused(path: Path) -> str:
    with pytest.raises(OutlierMergeError) as caught:
        open_checkpoint(path)
    return str(caught.value).replace(str(path.parent), "DIR")


def _wrap(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


# One file.


@pytest.mark.parametrize("file", ["net.pt", "net.pth", "net.bin", "net.v2.ckpt", "net.safetensors"])
def test_a_file_is_a_model_of_its_own(file, tmp_path):
    path = tmp_path / file
    (save_file if path.suffix == ".safetensors" else torch.save)(STATE, path)
    (tmp_path / "config.json").write_text("{}")

    checkpoint = open_checkpoint(path)

    _assert_same(_read(checkpoint), STATE)
    assert checkpoint.root == path
    assert [stamp.path for stamp in checkpoint.weight_files] == [path]
    assert (checkpoint.sidecars, checkpoint.left_behind) == ((), ())
    assert checkpoint.components == {"": file.rpartition(".")[0]}
    assert checkpoint.notes == ()


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "module", "params", "params_ema"]
)
def test_tensors_nested_in_a_training_state_are_taken_with_a_note(key, tmp_path):
    path = tmp_path / "net.ckpt"
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, key: STATE, "optimizer": optimizer}, path)

    checkpoint = open_checkpoint(path)

    _assert_same(_read(checkpoint), STATE)
    assert checkpoint.notes == (
        f"{path}: its tensors are those under {key!r}; what is beside them is not taken:\n"
        "  'epoch'\n  'optimizer'",
    )


def test_tensors_nested_one_level_deeper_are_taken_with_a_note(tmp_path):
    path = tmp_path / "net.pt"
    torch.save({"model": {"state_dict": STATE, "name": "net"}, "epoch": 3}, path)

    checkpoint = open_checkpoint(path)

    _assert_same(_read(checkpoint), STATE)
    assert checkpoint.notes == (
        f"{path}: its tensors are those under 'model' → 'state_dict'; what is beside them is not "
        "taken:\n  'epoch'\n  'name'",
    )


def test_a_nested_file_of_a_folder_is_taken_with_the_note(tmp_path):
    torch.save({"state_dict": STATE}, tmp_path / "pytorch_model.bin")

    checkpoint = open_checkpoint(tmp_path)

    _assert_same(_read(checkpoint), STATE)
    assert checkpoint.notes == (
        f"{tmp_path / 'pytorch_model.bin'}: its tensors are those under 'state_dict'",
    )


@pytest.mark.parametrize(
    ("content", "places", "example"),
    [
        (
            {"params": STATE, "params_ema": STATE},
            "  under 'params'\n  under 'params_ema'",
            "['params_ema']",
        ),
        (
            {"step": torch.tensor(3), "model": {"module": STATE}},
            "  at the top\n  under 'model' → 'module'",
            "['model']['module']",
        ),
    ],
    ids=["two state dicts", "a tensor beside one"],
)
def test_a_file_with_tensors_in_two_places_is_refused_naming_them(
    content, places, example, tmp_path
):
    torch.save(content, tmp_path / "net.pth")

    assert _refused(tmp_path / "net.pth") == (
        f"DIR/net.pth: holds tensors in several places, expected one state dict:\n{places}\n"
        "Save the one that is meant alone: torch.save(torch.load('net.pth', weights_only=True)"
        f"{example}, path)"
    )


def test_what_is_no_tensor_beside_tensors_is_refused_where_they_are_nested_too(tmp_path):
    torch.save({"state_dict": STATE | {"num_batches": 3}}, tmp_path / "net.pth")

    assert _refused(tmp_path / "net.pth") == (
        "DIR/net.pth: 'num_batches' is a int, expected a tensor. Save the model's state_dict() "
        "alone."
    )


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({}, tmp_path / "net.pth")

    assert _refused(tmp_path / "net.pth") == "DIR/net.pth: holds no tensors"


def _compile(net: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(net, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [torch.nn.DataParallel, _compile, lambda net: _compile(torch.nn.DataParallel(net))],
    ids=["DataParallel", "compile", "both"],
)
@pytest.mark.parametrize("file", ["net.pt", "net.safetensors"])
def test_the_prefix_of_a_wrapper_is_stripped_with_a_note(wrap, file, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    wrapped = wrap(net).state_dict()
    path = tmp_path / file
    (save_file if file.endswith(".safetensors") else torch.save)(wrapped, path)

    checkpoint = open_checkpoint(path)

    _assert_same(_read(checkpoint), net.state_dict())
    prefix = next(iter(wrapped)).removesuffix("0.weight")
    assert checkpoint.notes == (f"{path}: {prefix!r} is stripped from the start of all names",)


@pytest.mark.parametrize(
    "state",
    [
        _wrap("module.") | {"n_averaged": torch.tensor(2)},
        {"module.": torch.ones(1), "module.a": torch.ones(1)},
        {"modules.a": torch.ones(1)},
    ],
    ids=["not of all", "nothing would be left", "another word"],
)
def test_a_prefix_that_is_no_wrapper_of_all_stays(state, tmp_path):
    torch.save(state, tmp_path / "net.pt")

    checkpoint = open_checkpoint(tmp_path / "net.pt")

    assert set(checkpoint.tensors) == set(state)
    assert checkpoint.notes == ()


def test_a_shard_alone_is_refused(tmp_path):
    save_file(STATE, tmp_path / "model-00001-of-00002.safetensors")

    assert _refused(tmp_path / "model-00001-of-00002.safetensors") == (
        "DIR/model-00001-of-00002.safetensors: is one of 2 shards: name the folder that holds "
        "them all"
    )


# Odd tensors.

ODD = {
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(1.5),
    "bool": torch.tensor([True, False, True]),
    "uint16": torch.tensor([0, 65535], dtype=torch.uint16),
    "uint64": torch.tensor([2**63], dtype=torch.uint64),
    "complex64": torch.tensor([1 + 2j, -3j], dtype=torch.complex64),
    "bfloat16": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
    "float8_e4m3fn": torch.tensor([1.0, -448.0, 0.0]).to(torch.float8_e4m3fn),
    "float8_e5m2": torch.tensor([1.0, float("inf")]).to(torch.float8_e5m2),
}


def test_odd_tensors_of_a_safetensors_file_are_read_as_the_library_reads_them(tmp_path):
    save_file(ODD, tmp_path / "net.safetensors")

    checkpoint = open_checkpoint(tmp_path / "net.safetensors")

    _assert_same(_read(checkpoint), load_file(tmp_path / "net.safetensors"))
    floats = {name for name, source in checkpoint.tensors.items() if source.dtype.is_float}
    assert floats == {"empty", "scalar", "bfloat16", "float8_e4m3fn", "float8_e5m2"}


def test_odd_tensors_of_a_pickle_are_read_as_torch_reads_them(tmp_path):
    weight = torch.arange(12.0).view(3, 4)
    state = OrderedDict(
        ODD,
        parameter=torch.nn.Parameter(weight),
        tied=weight,
        tied_too=weight,
        row_of_tied=weight[1],
        transposed=weight.t(),
        strided=weight[:, ::2],
        expanded=torch.tensor([2.0]).expand(4, 3),
        conjugate=ODD["complex64"].conj(),
        negative=torch.tensor([1 + 2j, -3j]).conj().imag,
    )
    path = tmp_path / "net.pt"
    torch.save(state, path)

    checkpoint = open_checkpoint(path)

    _assert_same(_read(checkpoint), torch.load(path, weights_only=True))
    with Reader() as reader:
        middle = reader.values(checkpoint.tensors["transposed"], 2, 7)
    torch.testing.assert_close(middle, weight.t().reshape(-1)[2:7])


# torch's own warnings, of making and loading such tensors.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(2).to_sparse(), "torch.float32, torch.sparse_coo"),
        (lambda: torch.eye(2).to_sparse_csr(), "torch.float32, torch.sparse_csr"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "torch.qint8, torch.strided",
        ),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "torch.float32, torch.strided",
        ),
    ],
    ids=["COO", "CSR", "quantised", "nested"],
)
def test_a_tensor_that_is_not_dense_is_refused_by_name(make, kind, tmp_path):
    torch.save({"w": make()}, tmp_path / "net.pt")

    assert _refused(tmp_path / "net.pt") == (
        f"DIR/net.pt: tensor 'w': sparse, nested or quantised ({kind}), expected a dense one"
    )


@pytest.mark.parametrize("name", ["__metadata__", "w\ud800"])
def test_a_name_that_safetensors_cannot_store_is_refused(name, tmp_path):
    torch.save({name: torch.ones(1)}, tmp_path / "net.pt")

    assert _refused(tmp_path / "net.pt") == (
        f"DIR/net.pt: no tensor of a safetensors file can be named {name!r}"
    )


# Pipelines.

UNET = {"conv_in.weight": torch.ones(2, 2), "conv_out.bias": torch.zeros(3)}
TEXT = {"embed.weight": torch.arange(4.0)}


def _pipeline(root: Path, **components: object) -> Path:
    """Make a pipeline of a unet, a text encoder, a tokenizer and a scheduler."""
    index: dict[str, object] = {
        "_class_name": "Pipe",
        "requires_safety_checker": True,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    files = {
        "scheduler": ["scheduler_config.json"],
        "text_encoder": ["config.json"],
        "tokenizer": ["tokenizer_config.json", "merges.txt", "vocab.json"],
        "unet": ["config.json"],
    }
    for folder, names in files.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / name).write_text("{}")
    (root / "model_index.json").write_text(json.dumps(index | components))
    return root


def _good_pipeline(root: Path) -> Path:
    _pipeline(root)
    save_file(UNET, root / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(TEXT, root / "text_encoder" / "model.safetensors")
    return root


def _named(**components: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{c}/{name}": t for c, state in components.items() for name, t in state.items()}


def test_a_pipeline_is_a_model_with_its_components_before_the_names(tmp_path):
    root = _good_pipeline(tmp_path / "pipe")
    (root / "README.md").write_text("# Pipe")
    save_file(UNET, root / "pipe-pruned.safetensors")
    (root / "unet" / "model.onnx").write_bytes(b"")

    checkpoint = open_checkpoint(root)

    _assert_same(_read(checkpoint), _named(text_encoder=TEXT, unet=UNET))
    assert checkpoint.tensors["unet/conv_in.weight"].name == "conv_in.weight"
    assert checkpoint.components == {"text_encoder": "model", "unet": "diffusion_pytorch_model"}
    assert sorted(checkpoint.sidecars) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
    ]
    assert sorted(checkpoint.left_behind) == [
        "README.md",
        "pipe-pruned.safetensors",
        "unet/model.onnx",
    ]
    assert checkpoint.other_files == ()
    assert checkpoint.notes == (
        "not read, as older states or copies in other formats:\n  unet/model.onnx",
        "not read, as the pipeline does not name them; copies in another layout, mostly:\n"
        "  pipe-pruned.safetensors",
    )


def test_pytorch_files_and_plain_files_beside_variants_are_taken(tmp_path):
    root = _pipeline(tmp_path / "pipe")
    half = {name: tensor.half() for name, tensor in UNET.items()}
    torch.save(UNET, root / "unet" / "diffusion_pytorch_model.bin")
    torch.save(half, root / "unet" / "diffusion_pytorch_model.non_ema.bin")
    save_file(half, root / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    torch.save(TEXT, root / "text_encoder" / "pytorch_model.bin")

    checkpoint = open_checkpoint(root)

    _assert_same(_read(checkpoint), _named(text_encoder=TEXT, unet=UNET))
    assert checkpoint.components == {"text_encoder": "model", "unet": "diffusion_pytorch_model"}
    assert checkpoint.notes == (
        f"{root}/unet: diffusion_pytorch_model.bin is read, as from_pretrained takes it; passed "
        "over:\n  diffusion_pytorch_model.fp16.safetensors\n  diffusion_pytorch_model.non_ema.bin",
    )


@pytest.mark.parametrize("in_pipeline", [True, False], ids=["pipeline", "folder"])
def test_a_variant_is_taken_with_a_note_where_it_is_alone(in_pipeline, tmp_path):
    if in_pipeline:
        root = _good_pipeline(tmp_path / "pipe")
        folder = root / "text_encoder"
        (folder / "model.safetensors").unlink()
    else:
        root = folder = tmp_path
    save_file(TEXT, folder / "model.fp16.safetensors")

    checkpoint = open_checkpoint(root)

    assert checkpoint.notes == (f"{folder}: there is only the variant fp16, which is taken",)
    found = _read(checkpoint)
    _assert_same(found, _named(text_encoder=TEXT, unet=UNET) if in_pipeline else TEXT)


def test_several_variants_without_a_plain_one_are_refused(tmp_path):
    save_file(TEXT, tmp_path / "model.fp16.safetensors")
    torch.save(TEXT, tmp_path / "pytorch_model.non_ema.bin")

    assert _refused(tmp_path).endswith(
        f"{tmp_path.name}: its weights are there only as variants, and as several: fp16, non_ema. "
        "Move all but one of them away."
    )


def test_the_folder_of_one_component_keeps_the_name_of_its_files(tmp_path):
    save_file(UNET, tmp_path / "diffusion_pytorch_model.safetensors")

    checkpoint = open_checkpoint(tmp_path)

    _assert_same(_read(checkpoint), UNET)
    assert checkpoint.components == {"": "diffusion_pytorch_model"}


def test_safetensors_files_of_any_name_are_preferred_to_pytorch_files_of_any_name(tmp_path):
    save_file(TEXT, tmp_path / "language.safetensors")
    save_file(UNET, tmp_path / "vision.safetensors")
    torch.save(STATE, tmp_path / "model.pt")

    checkpoint = open_checkpoint(tmp_path)

    _assert_same(_read(checkpoint), TEXT | UNET)
    assert checkpoint.components == {"": "model"}
    assert checkpoint.left_behind == ("model.pt",)


@pytest.fixture(scope="module")
def diffusers_pipeline():
    """A real pipeline, of random weights."""
    logging.disable(logging.WARNING)
    import diffusers

    logging.disable(logging.NOTSET)
    return diffusers.DDPMPipeline(small_unet(), diffusers.DDPMScheduler())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_shard_size": "5KB"},
        {"safe_serialization": False, "max_shard_size": "5KB"},
        {"variant": "fp16"},
        {"variant": "fp16", "max_shard_size": "5KB"},
    ],
    ids=["plain", "sharded", "pickled", "variant", "sharded variant"],
)
def test_what_diffusers_saves_is_read(options, diffusers_pipeline, tmp_path):
    diffusers_pipeline.save_pretrained(tmp_path / "pipe", **options)

    checkpoint = open_checkpoint(tmp_path / "pipe")

    _assert_same(_read(checkpoint), _named(unet=diffusers_pipeline.unet.state_dict()))
    assert len(checkpoint.weight_files) == (11 if "max_shard_size" in options else 1)
    assert checkpoint.components == {"unet": "diffusion_pytorch_model"}
    assert bool(checkpoint.notes) == ("variant" in options)
    assert sorted(checkpoint.sidecars) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
    ]


def _lose_weights(root: Path) -> None:
    (root / "unet" / "diffusion_pytorch_model.safetensors").rename(root / "unet" / "x.onnx")


def _lose_folder(root: Path) -> None:
    for path in (root / "scheduler").iterdir():
        path.unlink()
    (root / "scheduler").rmdir()


def _lose_shard(root: Path) -> None:
    stem = root / "unet" / "diffusion_pytorch_model"
    stem.with_suffix(".safetensors").rename(f"{stem}-00001-of-00002.safetensors")


def _without_components(root: Path) -> None:
    (root / "model_index.json").write_text('{"scheduler": ["diffusers", "DDPMScheduler"]}')


def _index(text: str) -> Callable[[Path], None]:
    return lambda root: (root / "model_index.json").write_text(text) and None


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            _lose_weights,
            "DIR/pipe/model_index.json: names the component 'unet', a model without its weights.\n"
            "DIR/pipe/unet: no weights that can be read, only ONNX: x.onnx. Take the model that "
            "it was exported from.",
        ),
        (
            _lose_folder,
            "DIR/pipe/model_index.json: names the component 'scheduler', but there is no such "
            "folder. Fetch the model again.",
        ),
        (
            _lose_shard,
            "DIR/pipe/unet: shards are missing:\n"
            "  diffusion_pytorch_model-00002-of-00002.safetensors\nFetch the model again.",
        ),
        (
            _without_components,
            "DIR/pipe/model_index.json: names no component that has weights",
        ),
        (
            _index("[]"),
            "DIR/pipe/model_index.json: not an index of a pipeline: no JSON object",
        ),
        (
            _index('{"../pipe/unet": ["diffusers", "UNet2DModel"]}'),
            "DIR/pipe/model_index.json: names the component '../pipe/unet', but there is no such "
            "folder. Fetch the model again.",
        ),
    ],
    ids=["weights", "folder", "shard", "components", "list", "way out"],
)
def test_a_broken_pipeline_is_refused(break_it, message, tmp_path):
    root = _good_pipeline(tmp_path / "pipe")
    break_it(root)

    assert _refused(root) == message


# Weights of other formats.

GGUF = "GGUF{}. Name the file itself as the model."
MSGPACK = "Flax{}. Convert it to safetensors: from_pretrained(…, from_flax=True) of "
MSGPACK += "transformers before 5, then save_pretrained()."


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("m.Q4_K_M.gguf", GGUF),
        (
            "consolidated.00.pth",
            "the original Llama format{}. Convert it with transformers' "
            "convert_llama_weights_to_hf.py.",
        ),
        (
            "tf_model.h5",
            "TensorFlow{}. Convert it to safetensors: from_pretrained(…, from_tf=True) of "
            "transformers before 5, then save_pretrained().",
        ),
        ("flax_model.msgpack", MSGPACK),
        ("model.onnx", "ONNX{}. Take the model that it was exported from."),
        ("last.ckpt", "a training checkpoint{}. Name the file itself as the model."),
    ],
)
def test_a_folder_with_only_another_format_is_told_what_to_do(file, told, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / file).write_bytes(b"")
    (tmp_path / "m" / "config.json").write_text("{}")

    assert _refused(tmp_path / "m") == (
        "DIR/m: no weights that can be read, only " + told.format(f": {file}")
    )


def test_a_file_of_another_format_is_told_what_to_do(tmp_path):
    (tmp_path / "m.msgpack").write_bytes(b"")

    assert _refused(tmp_path / "m.msgpack") == "DIR/m.msgpack: is " + MSGPACK.format("")


def test_a_part_of_the_original_llama_format_is_a_file_like_any_other(tmp_path):
    torch.save(STATE, tmp_path / "consolidated.00.pth")

    _assert_same(_read(open_checkpoint(tmp_path / "consolidated.00.pth")), STATE)


def test_empty_markers_of_no_module_are_kept(tmp_path):
    """NoobAI's v_pred and ztsnr: Comfy-Org/ComfyUI #7840. Weights so empty are refused."""
    tensors = {"model.a.weight": torch.ones(2, 2), "v_pred": torch.empty(0)}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors | {"model.a.weight": torch.zeros(2, 2)}, tmp_path / "b.safetensors")
    models = [{"model": str(tmp_path / name)} for name in ("a.safetensors", "b.safetensors")]
    spec = {"merge_method": "linear", "models": models}
    output = outliermerge.run(spec, output=tmp_path / "out.safetensors").output
    assert load_file(output)["v_pred"].shape == (0,)
    save_file(tensors | {"model.a.bias": torch.empty(0)}, tmp_path / "b.safetensors")
    with pytest.raises(OutlierMergeError, match="ZeRO-3"):
        outliermerge.plan(spec)
