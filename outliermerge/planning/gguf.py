"""Outputs in one GGUF file: names, metadata, tokenizer and layout, by the `gguf` package.

A GGUF file is a header and then tensors, as a safetensors file is. So a run writes it as it writes
any other: each tensor has its place before a byte is read.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.checksum import GGUF_KEY
from outliermerge.checkpoint.layout import OutputTensor, Shard
from outliermerge.checkpoint.quantized.grouped import GROUP, Q8Blocks
from outliermerge.checkpoint.rearranged import Swapped
from outliermerge.checkpoint.sources import DTYPES
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.optional import is_installed, require_package
from outliermerge.planning.plan import Job, Plan
from outliermerge.planning.quantized_jobs import copy_of, sources_of
from outliermerge.planning.sidecars import sidecar_contents
from outliermerge.storage.files import small_bytes

FILE = "model.gguf"
_ALIGNMENT = 32
# By model type the architecture of llama.cpp. Its llama has the rows of queries and keys in another
# order: pairs of a rotation lie side by side.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How texts are cut before they become tokens, and llama.cpp's name for it.
CUTS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5


def as_gguf(plan: Plan) -> Plan:
    """Return a plan whose output is one GGUF file, and the files beside it.

    Raises:
        SpecError: the model is of a kind that cannot be written so, or `gguf` is not installed.
    """
    spec = plan.spec
    try:
        return _as_gguf(plan)
    except OutlierMergeError as error:
        raise spec.source.error(("format",), str(error)) from error


def _as_gguf(plan: Plan) -> Plan:
    require_package("gguf", "a GGUF output", "gguf")
    if plan.is_one_file or set(plan.components) != {""}:
        raise OutlierMergeError("the base is no folder of one model, of which gguf could be made")
    contents = {name: _read(content) for name, content in sidecar_contents(plan).items()}
    config = json.loads(contents.get("config.json", b"{}"))
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise OutlierMergeError(
            f"gguf is written of the model types {', '.join(_ARCHITECTURES)}; this is {kind!r}. "
            "Write safetensors, and convert them by llama.cpp's convert_hf_to_gguf.py"
        )
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise OutlierMergeError(
                f"gguf is not written of models with a rope of type {rope_type!r}: write "
                "safetensors, and convert them by llama.cpp's convert_hf_to_gguf.py"
            )
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise OutlierMergeError(
            f"config.json: hidden_act is {activation!r}, and llama.cpp computes models of the type "
            f"{kind} with silu: write safetensors"
        )
    jobs = tuple(_jobs(plan, config))
    header = _header(jobs, plan, config, contents)
    placed, end = [], len(header)
    for job in jobs:
        output = replace(job.output, file=FILE, offset=end)
        placed.append(replace(job, output=output))
        end += -(-output.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return replace(plan, jobs=tuple(placed), shards=(Shard(FILE, header, end),))


def _read(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else small_bytes(content)


def _jobs(plan: Plan, config: Mapping[str, Any]) -> Iterator[Job]:
    """Yield the jobs under llama.cpp's names, matrices in the type that the spec says."""
    import gguf

    arch = _ARCHITECTURES[config["model_type"]]
    kind = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    is_q8 = (entry := plan.spec.document.quantize) is not None and entry.to == "q8_0"
    jobs = [job for job in plan.jobs if not job.name.endswith("rotary_emb.inv_freq")]
    new = {job.name: names.get_name(job.name, (".weight", ".bias")) or "" for job in jobs}
    if unknown := [name for name, found in new.items() if not found]:
        raise OutlierMergeError(f"llama.cpp's {arch} has no such tensors:\n{listing(unknown)}")
    if other := [job.name for job in jobs if job.output.dtype.name not in _TYPES]:
        raise OutlierMergeError(f"gguf cannot hold these as they are:\n{listing(other)}")
    heads = {"q_proj": config["num_attention_heads"]}
    heads["k_proj"] = config.get("num_key_value_heads") or heads["q_proj"]
    swapped = {
        job.name: heads[part]
        for job in jobs
        if arch == "llama" and (part := job.name.split(".")[-2]) in heads
    }
    packed = {
        job.name
        for job in jobs
        if is_q8 and len(job.output.shape) == 2 and job.output.shape[1] % GROUP == 0
    }
    sources = sources_of(jobs, packed | swapped.keys())
    for job in jobs:
        name, source = new[job.name], sources.get(job.name)
        own = job.output if len(job.output.shape) > 1 else _wide(job.output)
        if source is None:
            yield replace(job, output=replace(own, name=name))
            continue
        if number := swapped.get(job.name):
            rows = job.output.shape[0]
            source = Swapped(source, number, 2, rows // number // 2, job.output.shape)
        if job.name in packed:
            yield copy_of(job, name, Q8Blocks(source))
        else:
            copied = copy_of(job, name, source, is_merge=True)
            yield replace(copied, output=replace(own, name=name))


def _wide(output: OutputTensor) -> OutputTensor:
    """Return a vector as float32, as llama.cpp has them."""
    return replace(output, dtype=DTYPES["float32"])


def _header(
    jobs: tuple[Job, ...],
    plan: Plan,
    config: Mapping[str, Any],
    contents: Mapping[str, bytes],
) -> bytes:
    """Return the bytes of the file before its first tensor."""
    import gguf
    import numpy

    arch = _ARCHITECTURES[config["model_type"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, FILE)
        writer = gguf.GGUFWriter(path, arch)
        writer.kv_data[0] = {GGUF_KEY: _length(0), **writer.kv_data[0]}
        _add_settings(writer, plan, config, jobs)
        _add_tokenizer(writer, config, contents, Path(folder))
        for job in jobs:
            is_q8 = isinstance(job.sources[0][1], Q8Blocks)
            kind = "Q8_0" if is_q8 else _TYPES[job.output.dtype.name]
            writer.add_tensor_info(
                job.name,
                job.output.shape,
                numpy.dtype(numpy.uint8 if is_q8 else numpy.float32),
                job.output.num_bytes,
                raw_dtype=gguf.GGMLQuantizationType[kind],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    header += bytes(-len(header) % _ALIGNMENT)
    at = header.index(GGUF_KEY.encode()) + len(GGUF_KEY) + 4
    return header[:at] + struct.pack("<Q", len(header)) + header[at + 8 :]


def _length(num_bytes: int) -> Any:
    import gguf
    from gguf.gguf_writer import GGUFValue

    return GGUFValue(num_bytes, gguf.GGUFValueType.UINT64)


def _add_settings(
    writer: Any, plan: Plan, config: Mapping[str, Any], jobs: tuple[Job, ...]
) -> None:
    import gguf

    num_heads, size = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or size // num_heads
    rope = config.get("rope_parameters") or {}
    writer.add_name(f"{config['model_type']} merged by {plan.spec.title}")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(size)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or num_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))))
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config["vocab_size"])
    types = [job.output.dtype.name for job in jobs if len(job.output.shape) > 1]
    common = max(set(types), key=types.count)
    by_dtype = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    file_type = by_dtype.get(common, "MOSTLY_Q8_0")
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(
    writer: Any, config: Mapping[str, Any], contents: Mapping[str, bytes], folder: Path
) -> None:
    """Add the tokens, their kinds, merges, and special tokens.

    Raises:
        OutlierMergeError: it is of a kind that cannot be written.
    """
    import gguf

    for name, data in contents.items():
        if "/" not in name:
            (folder / name).write_bytes(data)
    num_rows = config["vocab_size"]
    said = json.loads(contents.get("tokenizer.json", b"{}"))
    is_bytes = "ByteLevel" in json.dumps([said.get("pre_tokenizer"), said.get("decoder")])
    if said.get("model", {}).get("type") == "BPE" and is_bytes:
        tokens, kinds = _tokens(said, num_rows)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre(said))
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
    elif "tokenizer.model" in contents and is_installed("sentencepiece"):
        vocab: Any = gguf.SentencePieceVocab(folder)
        every = [*vocab.all_tokens()][:num_rows]
        every += [(f"[PAD{n}]".encode(), -1e3, _UNUSED) for n in range(len(every), num_rows)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([text for text, _, _ in every])
        writer.add_token_scores([score for _, score, _ in every])
        writer.add_token_types([int(kind) for _, _, kind in every])
    else:
        raise OutlierMergeError(
            "gguf holds the tokenizer, too: found no tokenizer.json of BPE on bytes, and no "
            "tokenizer.model (which needs sentencepiece)"
        )
    special = gguf.SpecialVocab(folder, load_merges=is_bytes, n_vocab=num_rows)
    special.add_to_gguf(writer, quiet=True)


def _tokens(said: Mapping[str, Any], num_rows: int) -> tuple[list[str], list[int]]:
    tokens, kinds = [f"[PAD{n}]" for n in range(num_rows)], [_UNUSED] * num_rows
    added = {entry["content"]: entry for entry in said.get("added_tokens", ())}
    ids = said["model"]["vocab"] | {text: entry["id"] for text, entry in added.items()}
    for text, number in ids.items():
        if number >= num_rows:
            raise OutlierMergeError(
                f"the tokenizer has the token {shown(text)} as number {number}, and the model has "
                f"{num_rows} rows"
            )
        tokens[number] = text
        is_special = text in added and added[text].get("special")
        kinds[number] = _CONTROL if is_special else _USER if text in added else _NORMAL
    return tokens, kinds


def _pre(said: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how texts are cut before they become tokens.

    Raises:
        OutlierMergeError: it is not known, and llama.cpp would cut texts otherwise.
    """
    cut = said.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"} and any(step.get("use_regex", True) for step in steps):
        return "gpt-2"
    is_known = len(patterns) == 1 and kinds <= {"Split", "ByteLevel"}
    found = CUTS.get(patterns[0]) if is_known else None
    if found is None:
        raise OutlierMergeError(
            "the tokenizer cuts texts as no tokenizer does that is known here (Llama 3, Qwen 2, "
            "GPT-2): write safetensors, and convert them by llama.cpp's convert_hf_to_gguf.py"
        )
    return found
