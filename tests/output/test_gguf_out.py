"""GGUF outputs: as the gguf package writes them, and read back by transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import tokenizers
import torch
import transformers
from checkpoints import fine_tune, load_folder
from llama_cpp import TEXT, real_converter, save_tokenizer
from quantizing import read
from safetensors.torch import save_file

import outliermerge
from outliermerge.checkpoint.checksum import header_checksum
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.quantized.opened import dequantize
from outliermerge.output.manifest import verify_folder
from outliermerge.output.parts import join, run_part
from outliermerge.planning.gguf import CUTS
from outliermerge.planning.gguf_settings import check_config
from outliermerge.planning.llama_cpp import VARIABLE

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
KINDS = {
    "llama": lambda size: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, vocab_size=size, rope_theta=5e5)
    ),
    "qwen2": lambda size: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, vocab_size=size, tie_word_embeddings=True)
    ),
}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
MORE = {
    "llama3": lambda size: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, vocab_size=size, rope_parameters=_LLAMA3)
    ),
    "qwen2moe": lambda size: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **SIZES, **_MOE, vocab_size=size, shared_expert_intermediate_size=32
        )
    ),
    "qwen3moe": lambda size: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SIZES, **_MOE, vocab_size=size, head_dim=16, norm_topk_prob=True
        )
    ),
    "gemma2": lambda size: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, vocab_size=size, head_dim=16, query_pre_attn_scalar=16)
    ),
    "gemma3": lambda size: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SIZES, vocab_size=size, head_dim=16, query_pre_attn_scalar=16
        )
    ),
}
_SLIDES = {"sliding_window": 32, "num_hidden_layers": 2}
SLIDING = {  # of which llama.cpp attends to all tokens, and has no key
    "mistral": lambda size: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES | _SLIDES, vocab_size=size)
    ),
    "qwen2 sliding": lambda size: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **SIZES | _SLIDES, vocab_size=size, use_sliding_window=True, max_window_layers=1
        )
    ),
    "qwen3": lambda size: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **SIZES | _SLIDES, vocab_size=size, use_sliding_window=True, max_window_layers=1,
            head_dim=32,
        )
    ),
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "F16": {"out_dtype": "float16"},
    "BF16": {},
    "Q8_0": {"quantize": "q8_0"},
}
PRE = {"llama": "llama-bpe", "qwen2": "qwen2"}


def _tokenizer(folder: Path, pre: str) -> int:
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    cut = next(cut for cut, name in CUTS.items() if name == pre)
    own.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(cut), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    own.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    own.train_from_iterator([TEXT] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return int(own.get_vocab_size()) + 3  # rows without tokens


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = KINDS[request.param](_tokenizer(folder / "base", PRE[request.param]))
    model.bfloat16().save_pretrained(folder / "base")
    fine_tune(folder / "base", folder / "task", seed=1)
    outliermerge.run(spec_of(folder, out_dtype="float32"), output=folder / "plain")
    return folder


def spec_of(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "task")}],
        "parameters": {"weight": 0.5},
    } | more


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", FORMS)
def test_transformers_reads_back_what_was_merged(folder: Path, tmp_path: Path, form: str) -> None:
    spec = spec_of(folder, format="gguf", **FORMS[form])
    planned = outliermerge.plan(spec)
    done = outliermerge.run(spec, output=tmp_path / "out")
    file = tmp_path / "out" / "model.gguf"
    assert file.stat().st_size == planned.num_written_bytes
    assert not [*(tmp_path / "out").glob("*.safetensors*")]
    assert verify_folder(tmp_path / "out", threads=1) == []
    plain = load_folder(folder / "plain")
    reader = gguf.GGUFReader(file)
    assert len(reader.tensors) == len(plain)
    embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")
    assert embedding.tensor_type.name == form
    if form == "Q8_0":
        wanted = plain["model.embed_tokens.weight"].numpy()
        assert numpy.array_equal(embedding.data, gguf.quantize(wanted, embedding.tensor_type))
        said = done.manifest["tensors"]["token_embd.weight"]["statistics"]["quantization_error"]
        back = gguf.dequantize(embedding.data, embedding.tensor_type)
        off = numpy.linalg.norm(back - wanted) / numpy.linalg.norm(wanted)
        assert said == pytest.approx(off, rel=1e-3)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=file.name, dtype=torch.float32
    )
    close = {"F16": 2e-3, "BF16": 6e-3, "Q8_0": 1e-2}[form]
    found = loaded.state_dict()
    for name, values in plain.items():
        assert (found[name].float() - values).norm() <= close * values.norm(), name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "plain")
    ids = torch.arange(32)[None]
    with torch.no_grad():
        ours, theirs = (each(ids).logits for each in (model, loaded))
    assert (ours - theirs).norm() < 5 * close * ours.norm()


def test_the_tokenizer_is_in_the_file(folder: Path, tmp_path: Path) -> None:
    outliermerge.run(spec_of(folder, format="gguf"), output=tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    own = json.loads((folder / "base" / "tokenizer.json").read_text())
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert {text: tokens.index(text) for text in own["model"]["vocab"]} == own["model"]["vocab"]
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert fields["tokenizer.ggml.token_type"].contents()[:3] == [3, 3, 1]
    pre = PRE[fields["general.architecture"].contents()]
    assert fields["tokenizer.ggml.pre"].contents() == pre
    assert len(fields["tokenizer.ggml.merges"].contents()) == len(own["model"]["merges"])
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    plain = transformers.AutoTokenizer.from_pretrained(folder / "base")
    assert again(TEXT)["input_ids"] == plain(TEXT)["input_ids"]


@pytest.mark.sampled(2)
def test_the_bytes_are_the_same_on_all_ways_and_changes_are_found(
    folder: Path, tmp_path: Path
) -> None:
    spec = spec_of(folder, format="gguf", quantize="q8_0")
    outliermerge.run(spec, output=tmp_path / "out")
    options = outliermerge.RunOptions(threads=3, memory="32MiB")
    outliermerge.run(spec, output=tmp_path / "threads", options=options)
    for part in (2, 1):
        run_part(outliermerge.plan(spec), tmp_path / "parts", part, 2)
    join(outliermerge.plan(spec), tmp_path / "parts")
    run_part(outliermerge.plan(spec), tmp_path / "goes_on", 2, 3)
    outliermerge.run(spec, output=tmp_path / "goes_on")
    file = tmp_path / "out" / "model.gguf"
    for way in ("threads", "parts", "goes_on"):
        assert (tmp_path / way / "model.gguf").read_bytes() == file.read_bytes()
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    assert ["checksum" in text for text in verify_folder(tmp_path / "out", threads=1)] == [True]
    before = header_checksum(file)
    data[120] ^= 1
    file.write_bytes(data)
    assert header_checksum(file) != before
    assert any("header changed" in text for text in verify_folder(tmp_path / "out", threads=1))


def _change(folder: Path, target: Path, file: str, **values: Any) -> dict[str, Any]:
    base = target / "base"
    base.mkdir(parents=True)
    for path in (folder / "base").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    said = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps(said | values))
    return spec_of(folder, base_model=str(base), format="gguf")


@pytest.mark.sampled(2)
def test_what_cannot_be_written_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)  # where llama.cpp's converter is
    with pytest.raises(outliermerge.SpecError, match="quantize: found 'fp8', expected q8_0"):
        outliermerge.plan(spec_of(folder, format="gguf", quantize="fp8"))
    with pytest.raises(outliermerge.SpecError, match=r"'q4_k', expected q8_0.*llama-quantize"):
        outliermerge.plan(spec_of(folder, format="gguf", quantize="q4_k"))
    with pytest.raises(outliermerge.SpecError, match="quantize: found 'q8_0', expected `format"):
        outliermerge.plan(spec_of(folder, quantize="q8_0"))
    spec = _change(folder, tmp_path, "config.json", rope_parameters={"rope_type": "dynamic"})
    with pytest.raises(outliermerge.OutlierMergeError, match=r"format: .*rope of type 'dynamic'"):
        outliermerge.plan(spec)
    both = {"type": "longrope", "factor": 2.0}  # transformers takes it before rope_parameters
    spec = _change(folder, tmp_path / "both", "config.json", rope_scaling=both)
    with pytest.raises(outliermerge.OutlierMergeError, match=r"format: .*rope of type 'longrope'"):
        outliermerge.plan(spec)
    spec = _change(folder, tmp_path / "gelu", "config.json", hidden_act="gelu")
    with pytest.raises(outliermerge.OutlierMergeError, match=r"format: .*hidden_act is 'gelu'"):
        outliermerge.plan(spec)
    by_bytes = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", **by_bytes}]
    cut = {"type": "Sequence", "pretokenizers": steps}  # SmolLM's
    spec = _change(folder, tmp_path / "digits", "tokenizer.json", pre_tokenizer=cut)
    with pytest.raises(outliermerge.OutlierMergeError, match="format: the tokenizer cuts texts"):
        outliermerge.plan(spec)


def test_values_beyond_the_scales_of_q8_0_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_folder(folder / "base")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][0, 0] = 1e7
    (tmp_path / "base").mkdir()
    for path in (folder / "base").glob("*.json"):
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    spec = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "base")}]}
    with pytest.raises(outliermerge.OutlierMergeError, match=r"beyond 8,319,008, which Q8_0"):
        outliermerge.run(spec | {"format": "gguf", "quantize": "q8_0"}, output=tmp_path / "out")


def _save(kind: str, folder: Path) -> None:
    """Save a model of a kind, with another value for each parameter."""
    if kind.startswith("gemma"):
        size = save_tokenizer(folder)
    else:
        size = _tokenizer(folder, "qwen2" if "qwen" in kind else "llama-bpe")
    model = (KINDS | MORE | SLIDING)[kind](size)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.02
    model.bfloat16().save_pretrained(folder)


@pytest.fixture(scope="module", params=MORE)
def further(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    _save(request.param, folder / "base")
    fine_tune(folder / "base", folder / "task", seed=1)
    outliermerge.run(spec_of(folder, out_dtype="float32"), output=folder / "plain")
    return folder


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", ["F16", "Q8_0"])
def test_further_architectures_are_read_back_as_they_were_merged(
    further: Path, tmp_path: Path, form: str
) -> None:
    spec = spec_of(further, format="gguf", **FORMS[form])
    planned = outliermerge.plan(spec)
    done = outliermerge.run(spec, output=tmp_path / "out")
    file = tmp_path / "out" / "model.gguf"
    assert planned.num_parameters == done.manifest["num_parameters"]
    assert planned.num_parameters == outliermerge.plan(spec_of(further)).num_parameters
    plain = transformers.AutoModelForCausalLM.from_pretrained(further / "plain").state_dict()
    config = transformers.AutoConfig.from_pretrained(further / "plain")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=file.name, config=config, dtype=torch.float32
    ).state_dict()
    ours = {
        name: read(source) for name, source in dequantize(open_checkpoint(file)).tensors.items()
    }
    close = {"F16": 2e-3, "Q8_0": 1e-2}[form]
    assert ours.keys() - plain.keys() == set()
    for name, values in plain.items():
        for found in (loaded, ours) if name in ours else (loaded,):
            assert (found[name].float() - values).norm() <= close * values.norm(), name
    assert verify_folder(tmp_path / "out", threads=1) == []


# What llama.cpp takes anyway where it is not said, and what is ours.
_FURTHER = ("vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length",
            "rope.freq_base", "general.tags", "outliermerge.header_bytes")  # fmt: skip


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kind", [*KINDS, *MORE, *SLIDING])
def test_llama_cpps_own_converter_says_the_same(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _save(kind, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"top_p": 0.5, "temperature": 0.75}')
    spec = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "base")}]}
    outliermerge.run(spec | {"format": "gguf"}, output=tmp_path / "out")
    driver = Path(__file__).parents[1] / "llama_cpp_driver.py"
    pre = "qwen2" if "qwen" in kind else "llama-bpe"
    command = [sys.executable, str(driver), str(real_converter()), pre, str(tmp_path / "base")]
    subprocess.run([*command, str(tmp_path / "theirs.gguf"), "bf16"], check=True)
    ours = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    theirs = gguf.GGUFReader(tmp_path / "theirs.gguf")
    found, wanted = (
        {key: (field.types, field.contents()) for key, field in reader.fields.items()
         if not key.startswith("GGUF.")}
        for reader in (ours, theirs)
    )  # fmt: skip
    differing = {key for key in wanted if found.get(key) != wanted[key]} - {"general.name"}
    if kind.startswith("qwen2") and "moe" not in kind:  # transformers adds a token of its own
        differing -= {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type"}
    assert differing == set()
    assert [key for key in found.keys() - wanted.keys() if not key.endswith(_FURTHER)] == []
    mine, its = ({t.name: t for t in reader.tensors} for reader in (ours, theirs))
    assert mine.keys() == its.keys()
    for name, tensor in its.items():
        assert mine[name].tensor_type == tensor.tensor_type
        if name == "rope_freqs.weight":  # computed in float32 there
            assert numpy.allclose(mine[name].data, tensor.data, rtol=3e-7)
        else:
            assert mine[name].data.tobytes() == tensor.data.tobytes(), name
            shape = [*tensor.shape] if tensor.shape[-1] > 1 else [*tensor.shape[:-1]]
            assert [*mine[name].shape] == shape  # the gate of shared experts is a row


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_llama3_frequencies_are_divided_as_transformers_does(folder: Path, tmp_path: Path) -> None:
    spec = _change(folder, tmp_path, "config.json", rope_parameters=_LLAMA3)
    outliermerge.run(spec, output=tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    factors = next(t for t in reader.tensors if t.name == "rope_freqs.weight").data
    config = transformers.AutoConfig.from_pretrained(tmp_path / "base")
    theirs, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 5e5 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / torch.from_numpy(factors.copy()), theirs, rtol=1e-6)
    assert len({float(value) for value in factors}) > 2


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
         {"type": "linear", "factor": 2.0}),
        (
            {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "beta_fast": 16.0,
             "original_max_position_embeddings": 32},
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
        ),
    ],
)  # fmt: skip
def test_scaled_ropes_are_in_the_header(
    folder: Path, tmp_path: Path, rope: dict[str, Any], said: dict[str, Any]
) -> None:
    outliermerge.run(
        _change(folder, tmp_path, "config.json", rope_parameters=rope), output=tmp_path / "out"
    )
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    start = f"{fields['general.architecture'].contents()}.rope."
    found = {
        key.removeprefix(f"{start}scaling."): field.contents()
        for key, field in fields.items()
        if key.startswith(f"{start}scaling.")
    }
    assert found == said
    assert fields[f"{start}freq_base"].contents() == 5e5


REFUSED = {
    "qwen3moe": ({"norm_topk_prob": False}, "norm_topk_prob is False, and llama.cpp .* True"),
    "qwen2moe": ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], and"),
    "gemma2": ({"query_pre_attn_scalar": 20}, "query_pre_attn_scalar is 20, .* with 16"),
    "gemma3": ({"layer_types": ["full_attention"] * 2}, r"layer_types is \['full_att"),
    "llama3": ({"rope_parameters": {"rope_type": "longrope"}}, "rope of type 'longrope'"),
}


@pytest.mark.sampled(3)
def test_what_is_fixed_in_llama_cpp_must_be_as_the_config_says(
    further: Path, tmp_path: Path
) -> None:
    kind = next(name for name in REFUSED if further.name.startswith(name))
    values, message = REFUSED[kind]
    with pytest.raises(outliermerge.OutlierMergeError, match=message):
        outliermerge.plan(_change(further, tmp_path, "config.json", **values))


def test_queries_of_gemma_27b_are_scaled_as_llama_cpp_does_with_so_many_layers() -> None:
    layers = [f"{'full' if n % 6 == 5 else 'sliding'}_attention" for n in range(62)]
    config = {
        "model_type": "gemma3_text", "num_hidden_layers": 62, "hidden_size": 5376, "head_dim": 128,
        "num_attention_heads": 32, "query_pre_attn_scalar": 168, "layer_types": layers,
    }  # fmt: skip
    assert check_config(config).name == "gemma3"
    config |= {"num_hidden_layers": 61, "layer_types": layers[:61]}
    with pytest.raises(outliermerge.OutlierMergeError, match=r"scalar is 168, .* with 128"):
        check_config(config)
