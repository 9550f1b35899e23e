"""Outputs in one GGUF file: names, metadata, tokenizer and layout, by the `gguf` package.

A GGUF file is a header and then tensors, as a safetensors file is. So a run writes it as it writes
any other: each tensor has its place before a byte is read.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.checksum import GGUF_KEY
from outliermerge.checkpoint.layout import OutputTensor, Shard
from outliermerge.checkpoint.made import HeldTensor, Shifted
from outliermerge.checkpoint.quantized.grouped import GROUP, Q8Blocks
from outliermerge.checkpoint.rearranged import Swapped, cut, reshaped, stack
from outliermerge.checkpoint.sources import DTYPES, Source
from outliermerge.display import human_bytes
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.optional import is_installed, require_package
from outliermerge.planning.gguf_settings import (
    ARCHITECTURES,
    Architecture,
    NotWrittenError,
    add_sampling,
    add_settings,
    check_config,
    rope_factors,
)
from outliermerge.planning.llama_cpp import Conversion, check_known, find_converter
from outliermerge.planning.plan import Job, Plan
from outliermerge.planning.quantized_jobs import copy_of, sources_of
from outliermerge.planning.sidecars import sidecar_contents
from outliermerge.storage.files import small_bytes

FILE = "model.gguf"
_ALIGNMENT = 32
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# By the dtype of matrices the converter's word for the type, and by that the bytes of an element.
_OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How texts are cut before they become tokens, and llama.cpp's name for it.
CUTS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}
_EXPERT = re.compile(
    r"(?P<start>.+\.experts)\.(?P<number>\d+)\.(?P<part>(?:gate|up|down)_proj)\.weight"
)
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5


def as_gguf(plan: Plan) -> Plan:
    """Return a plan whose output is one GGUF file, and the files beside it.

    What is not written here is planned as safetensors, of which llama.cpp's converter makes it.

    Raises:
        SpecError: the model is of a kind that cannot be written so, or `gguf` is not installed.
    """
    try:
        require_package("gguf", "a GGUF output", "gguf")
        if plan.is_one_file or set(plan.components) != {""}:
            raise OutlierMergeError("the base is no folder of one model, of which gguf is made")
        contents = {name: _read(content) for name, content in sidecar_contents(plan).items()}
        config = json.loads(contents.get("config.json", b"{}"))
        try:
            return _written_here(plan, config, contents)
        except NotWrittenError as error:
            return _by_converter(plan, config, str(error))
    except OutlierMergeError as error:
        raise plan.spec.source.error(("format",), str(error)) from error


def _by_converter(plan: Plan, config: Mapping[str, Any], why: str) -> Plan:
    """Return the plan of safetensors that llama.cpp's converter makes a GGUF file of.

    Raises:
        OutlierMergeError: it is not here, or does not know the model.
    """
    try:
        program, is_program = find_converter()
        check_known(program, config)
    except OutlierMergeError as error:
        raise OutlierMergeError(f"{why}. {error}") from error
    entry = plan.spec.document.quantize
    outtype = "q8_0" if entry is not None else _OUTTYPES.get(_common_dtype(plan.jobs), "f32")
    num_bytes = sum(
        job.num_elements * (_BYTES[outtype] if len(job.output.shape) > 1 else 4)
        for job in plan.jobs
    )
    has_tower = any(config.get(f"{kind}_config") for kind in ("vision", "audio"))
    conversion = Conversion(
        program, is_program, _name(plan, config), outtype,
        files=(FILE, *([f"mmproj-{FILE}"] if has_tower else [])), num_bytes=math.ceil(num_bytes),
    )  # fmt: skip
    note = (
        f"{why}. So safetensors are written ({human_bytes(plan.num_written_bytes)}), of which "
        f"{program} makes {outtype} (about {human_bytes(conversion.num_bytes)}), and then removed"
    )
    return replace(plan, conversion=conversion, notes=(*plan.notes, note))


def _written_here(plan: Plan, config: Mapping[str, Any], contents: Mapping[str, bytes]) -> Plan:
    known = check_config(config)
    jobs = tuple(_jobs(plan, config, known))
    header = _header(jobs, plan, config, contents)
    placed, end = [], len(header)
    for job in jobs:
        output = replace(job.output, file=FILE, offset=end)
        placed.append(replace(job, output=output))
        end += -(-output.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return replace(plan, jobs=tuple(placed), shards=(Shard(FILE, header, end),))


def _read(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else small_bytes(content)


def _jobs(plan: Plan, config: Mapping[str, Any], known: Architecture) -> Iterator[Job]:
    """Yield the jobs under llama.cpp's names, matrices in the type that the spec says."""
    import gguf

    kind = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[known.name]
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    is_q8 = (entry := plan.spec.document.quantize) is not None and entry.to == "q8_0"
    jobs = [job for job in plan.jobs if not job.name.endswith("rotary_emb.inv_freq")]
    groups = _groups(jobs)
    new = {name: names.get_name(name, (".weight", ".bias")) or "" for name in groups}
    if unknown := [name for name, found in new.items() if not found]:
        raise OutlierMergeError(
            f"llama.cpp's {known.name} has no such tensors:\n{listing(unknown)}"
        )
    if other := [job.name for job in jobs if job.output.dtype.name not in _TYPES]:
        raise OutlierMergeError(f"gguf cannot hold these as they are:\n{listing(other)}")
    heads = {"q_proj": config["num_attention_heads"]}
    heads["k_proj"] = config.get("num_key_value_heads") or heads["q_proj"]
    swapped = {
        name: heads[module]
        for name in groups
        if known.is_turned and (module := name.split(".")[-2]) in heads
    }
    gates = {name for name in groups if name.endswith("shared_expert_gate.weight")}
    shifted = {name for name in groups if known.norm and name.endswith("norm.weight")}
    packed = {
        name
        for name, parts in groups.items()
        if is_q8
        and len(parts[0][0].output.shape) in (2, 3)
        and not _is_vector(name, parts[0][0].output)
        and parts[0][0].output.shape[-1] % GROUP == 0
    }
    changed = {*packed, *swapped, *shifted, *gates, *(n for n, own in groups.items() if own[0][1])}
    sources = sources_of(jobs, {job.name for name in changed for job, _ in groups[name]})
    for name, parts in groups.items():
        (job, part), *others = parts
        source = sources.get(job.name)
        own = replace(job.output, name=new[name])
        own = replace(own, dtype=DTYPES["float32"]) if _is_vector(name, own) else own
        if source is None:
            yield replace(job, output=own)
            continue
        if part is not None:
            found = [part(sources[one.name]) for one, _ in parts]
            source = stack(found) if others or len(found[0].shape) == 2 else found[0]
            job = _of_experts(job, parts, source.shape)
        if number := swapped.get(name):
            rows = job.output.shape[0]
            source = Swapped(source, number, 2, rows // number // 2, job.output.shape)
        if name in gates:  # one row
            source = reshaped(source, source.shape[1:])
        if name in shifted:
            source = Shifted(
                name=job.name, shape=source.shape, out_dtype=DTYPES["float32"], source=source,
                plus=known.norm,
            )  # fmt: skip
        if name in packed:
            yield copy_of(job, new[name], Q8Blocks(source))
        else:
            copied = copy_of(job, new[name], source, is_merge=True)
            yield replace(copied, output=replace(own, shape=source.shape))
    if (factors := rope_factors(config)) is not None:
        shape = (len(factors) // 4,)
        table = HeldTensor("rope_freqs", shape, f"factors of {config['model_type']}", factors)
        made = copy_of(jobs[0], "rope_freqs.weight", table, is_companion=True)
        yield replace(made, of=None)


_Part = Callable[[Source], Source]


def _groups(jobs: Sequence[Job]) -> dict[str, list[tuple[Job, _Part | None]]]:
    """Return the tensors of the file by transformers' names, with what they are made of.

    Experts lie in one tensor, gate and up apart: those that are stored one by one are stacked.
    """
    groups: dict[str, list[tuple[Job, _Part | None]]] = {}
    numbered: dict[str, dict[int, Job]] = {}
    for job in jobs:
        if found := _EXPERT.fullmatch(job.name):
            name = f"{found['start']}.{found['part']}.weight"
            numbered.setdefault(name, {})[int(found["number"])] = job
            groups.setdefault(name, [])
        elif job.name.endswith(".experts.gate_up_proj"):
            half = job.output.shape[1] // 2
            for place, part in enumerate(("gate_proj", "up_proj")):
                name = job.name.removesuffix("gate_up_proj") + f"{part}.weight"
                cuts = partial(cut, axis=1, start=place * half, stop=(place + 1) * half)
                groups[name] = [(job, cuts)]
        elif job.name.endswith(".experts.down_proj"):
            groups[f"{job.name}.weight"] = [(job, _same)]
        else:
            groups[job.name] = [(job, None)]
    for name, own in numbered.items():
        groups[name] = [(own[number], _same) for number in sorted(own)]
    return groups


def _same(source: Source) -> Source:
    return source


def _of_experts(job: Job, parts: Sequence[tuple[Job, _Part | None]], shape: tuple[int, ...]) -> Job:
    """Return the job that stands for a tensor of experts, of several or of a part of one."""
    made = []
    for place, (owner, _) in enumerate(job.sources):
        each = [part(one.sources[place][1]) for one, part in parts if part is not None]
        made.append((owner, stack(each) if len(each[0].shape) == 2 else each[0]))
    return replace(job, sources=tuple(made), output=replace(job.output, shape=shape))


def _is_vector(name: str, output: OutputTensor) -> bool:
    """Tell whether llama.cpp has a tensor in float32: vectors, and the routers of experts."""
    return len(output.shape) < 2 or name.endswith((".mlp.gate.weight", "shared_expert_gate.weight"))


def _header(
    jobs: tuple[Job, ...],
    plan: Plan,
    config: Mapping[str, Any],
    contents: Mapping[str, bytes],
) -> bytes:
    """Return the bytes of the file before its first tensor."""
    import gguf
    import numpy

    arch = ARCHITECTURES[config["model_type"]].name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, FILE)
        writer = gguf.GGUFWriter(path, arch)
        writer.kv_data[0] = {GGUF_KEY: _length(0), **writer.kv_data[0]}
        _add_settings(writer, plan, config, jobs)
        add_sampling(writer, json.loads(contents.get("generation_config.json", b"{}")))
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
        writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    header += bytes(-len(header) % _ALIGNMENT)
    at = header.index(GGUF_KEY.encode()) + len(GGUF_KEY) + 4
    return header[:at] + struct.pack("<Q", len(header)) + header[at + 8 :]


def _name(plan: Plan, config: Mapping[str, Any]) -> str:
    return f"{config['model_type']} merged by {plan.spec.title}"


def _common_dtype(jobs: Sequence[Job]) -> str:
    """Return the dtype that most matrices have."""
    types = [job.output.dtype.name for job in jobs if len(job.output.shape) > 1]
    return max(types, key=types.count, default="")


def _length(num_bytes: int) -> Any:
    import gguf
    from gguf.gguf_writer import GGUFValue

    return GGUFValue(num_bytes, gguf.GGUFValueType.UINT64)


def _add_settings(
    writer: Any, plan: Plan, config: Mapping[str, Any], jobs: tuple[Job, ...]
) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(_name(plan, config))
    writer.add_tags(["merge", "outliermerge"])
    add_settings(writer, config, ARCHITECTURES[config["model_type"]])
    by_dtype = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    file_type = by_dtype.get(_common_dtype(jobs), "MOSTLY_Q8_0")
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(
    writer: Any, config: Mapping[str, Any], contents: Mapping[str, bytes], folder: Path
) -> None:
    """Add the tokens, their kinds, merges, and special tokens.

    Raises:
        NotWrittenError: it is of a kind that is not known here.
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
        every += [(f"[PAD{n}]".encode(), -1e4, _UNUSED) for n in range(len(every), num_rows)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        if config["model_type"].startswith("gemma"):
            writer.add_add_space_prefix(False)
        writer.add_token_list([text for text, _, _ in every])
        writer.add_token_scores([score for _, score, _ in every])
        writer.add_token_types([int(kind) for _, _, kind in every])
    else:
        raise NotWrittenError(
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
        NotWrittenError: it is not known, and llama.cpp would cut texts otherwise.
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
        raise NotWrittenError(
            "the tokenizer cuts texts as no tokenizer does that is known here (Llama 3, Qwen 2, "
            "GPT-2)"
        )
    return found
