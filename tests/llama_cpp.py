"""A model that only llama.cpp's converter knows; that converter, and one that stands for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from checkpoints import fine_tune
from safetensors.torch import load_file, save_file

from outliermerge.planning.llama_cpp import PROGRAM, VARIABLE
from outliermerge.storage.machine import cache_folder

SDIST = "llama-cpp-python==0.3.36"
TEXT = "A merge of models, that is all: 12 and 345."

# Writes the tensors as they are, in bfloat16; what it does otherwise is in STAND_IN.
STAND_IN = """
import json, os, pathlib, struct, sys, time
"Phi3ForCausalLM"
folder, out = pathlib.Path(sys.argv[1]), sys.argv[sys.argv.index("--outfile") + 1]
does = os.environ.get("STAND_IN", "")
print("INFO: Loading model")
if does == "fails":
    print("Traceback (most recent call last):\\nNotImplementedError: unknown pre-tokenizer")
    sys.exit(1)
infos, data = [], b""
for file in sorted(folder.glob("model*.safetensors")):
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in sorted(json.loads(content[8:start]).items()):
        if name != "__metadata__":
            shape, (begin, end) = entry["shape"][::-1], entry["data_offsets"]
            info = struct.pack("<Q", len(name)) + name.encode()
            info += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 30, len(data))
            infos.append(info)
            data += content[start + begin : start + end]
            data += bytes(-len(data) % 32)
print("WARNING:hf-to-gguf:Unknown RoPE type: other")
if does == "writes nothing":
    sys.exit()
if does == "writes no tensors":
    infos, data = [], b""
if does == "prints much":
    print("WARNING:" + "x" * 10**6)
header = b"GGUF" + struct.pack("<IQQ", 3, len(infos), 0) + b"".join(infos)
with open(out, "wb") as file:
    file.write(header + bytes(-len(header) % 32))
    if does.startswith("waits:"):
        file.flush()
        pathlib.Path(does[6:]).write_text(str(os.getpid()))
        time.sleep(100)
    file.write(data[:-100] if does == "truncates" else data)
"""


def stand_in(folder: Path) -> Path:
    """Make a folder with a converter that stands for llama.cpp's; return the folder."""
    folder.mkdir()
    (folder / PROGRAM).write_text(STAND_IN)
    return folder


def save_tokenizer(folder: Path) -> int:
    """Save a tokenizer of sentencepiece; return a number of rows, some without tokens."""
    folder.mkdir()
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT] * 20), model_writer=file, model_type="bpe",
            vocab_size=300, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>", '
        '"eos_token": "</s>"}'
    )
    processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    return int(processor.vocab_size()) + 3


def save_phi3(folder: Path) -> dict[str, Any]:
    """Save a tiny Phi 3 and a fine-tune of it; return a spec that merges them into GGUF."""
    torch.manual_seed(0)
    size = save_tokenizer(folder / "base")
    config = transformers.Phi3Config(
        vocab_size=size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        original_max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.Phi3ForCausalLM(config).bfloat16().save_pretrained(folder / "base")
    fine_tune(folder / "base", folder / "task", seed=1)
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "task")}],
        "parameters": {"weight": 0.5},
        "format": "gguf",
    }


def save_gemma3(folder: Path) -> Path:
    """Save a tiny Gemma 3 that sees, with the names that published ones have; return its folder."""
    size = save_tokenizer(folder)
    text = {
        "vocab_size": size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 64, "query_pre_attn_scalar": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4,
        image_token_index=size - 1, boi_token_index=size - 2, eoi_token_index=size - 3,
    )  # fmt: skip
    transformers.Gemma3ForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    short, published = "vision_tower.", "vision_tower.vision_model."
    save_file(
        {name.replace(published, short).replace(short, published): values
         for name, values in tensors.items()},
        file, metadata={"format": "pt"},
    )  # fmt: skip
    said = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_seq_length": 4}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


def real_converter() -> Path:
    """Return a folder of llama.cpp: that of LLAMA_CPP, or one from PyPI, kept in the user's cache.

    The sources of llama-cpp-python have llama.cpp's; pip makes their metadata, which takes minutes.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named)
    home = cache_folder("tests") / SDIST
    found = home / "llama.cpp"
    if not found.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as place:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*command, "--no-binary", ":all:", "-d", place, SDIST], check=True)
            (archive,) = Path(place).glob("*.tar.gz")
            with tarfile.open(archive) as packed:
                packed.extractall(Path(place, "sources"), filter="data")
            (inside,) = Path(place, "sources").glob("*/vendor/llama.cpp")
            inside.rename(found)
    return found
