"""Checkpoints of real shapes with random weights: a base, fine-tunes, and statistics of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

FILE = "model.safetensors"
BASE_STD, DELTA_STD = 0.02, 0.002
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Shape:
    """What the tensors of a Qwen2 model are determined by."""

    hidden: int
    intermediate: int
    layers: int
    key_value: int
    heads: int
    vocabulary: int = 151_936
    tied: bool = True


# Of Qwen2.5 but for the first two, which are shaped alike.
SHAPES = {
    "tiny": Shape(256, 1024, 4, 64, 4, vocabulary=4096),
    "0.1B": Shape(512, 2816, 8, 128, 8),
    "0.5B": Shape(896, 4864, 24, 128, 14),
    "1.5B": Shape(1536, 8960, 28, 256, 12),
    "3B": Shape(2048, 11008, 36, 256, 16),
    "7B": Shape(3584, 18944, 28, 512, 28, vocabulary=152_064, tied=False),
}


def tensor_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model by name."""
    s = SHAPES[size]
    embeddings = (s.vocabulary, s.hidden)
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": embeddings}
    for layer in range(s.layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": (s.hidden,),
            prefix + "mlp.down_proj.weight": (s.hidden, s.intermediate),
            prefix + "mlp.gate_proj.weight": (s.intermediate, s.hidden),
            prefix + "mlp.up_proj.weight": (s.intermediate, s.hidden),
            prefix + "post_attention_layernorm.weight": (s.hidden,),
            prefix + "self_attn.k_proj.bias": (s.key_value,),
            prefix + "self_attn.k_proj.weight": (s.key_value, s.hidden),
            prefix + "self_attn.o_proj.weight": (s.hidden, s.hidden),
            prefix + "self_attn.q_proj.bias": (s.hidden,),
            prefix + "self_attn.q_proj.weight": (s.hidden, s.hidden),
            prefix + "self_attn.v_proj.bias": (s.key_value,),
            prefix + "self_attn.v_proj.weight": (s.key_value, s.hidden),
        }
    head = {} if s.tied else {"lm_head.weight": embeddings}
    return tensors | {"model.norm.weight": (s.hidden,)} | head


def num_parameters(size: str) -> int:
    return sum(map(math.prod, tensor_shapes(size).values()))


def num_model_bytes(size: str) -> int:
    """Return the size of a model's weights in bfloat16."""
    return 2 * num_parameters(size)


def build(size: str, folder: Path, *, num_models: int = 2) -> list[Path]:
    """Write a base model and num_models fine-tunes in bfloat16, and return their folders.

    Weights are normal with a standard deviation of 0.02, changes of 0.002.
    """
    folders = [folder / name for name in ("base", *(f"task{i}" for i in range(num_models)))]
    header = _header(size)
    files = []
    for path in folders:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(_config(size), indent=2))
        files.append(os.open(path / FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        os.posix_fallocate(files[-1], 0, len(header) + num_model_bytes(size))
        os.write(files[-1], header)
    # A tensor's bytes are a range of one stream, so the stream is made instead of the tensors.
    for start, blocks in _stream(num_parameters(size), len(files)):
        for file, block in zip(files, blocks, strict=True):
            os.pwrite(file, block.view(torch.uint8).numpy(), len(header) + 2 * start)
    for file in files:
        os.fsync(file)
        os.close(file)
    return folders


def build_statistics(kind: str, size: str, models: Sequence[Path]) -> None:
    """Write statistics of each model, in float32, into a folder beside it, where it lacks them.

    Args:
        kind: `gram`, of twice as many random inputs as a layer has; or `fisher`, of random numbers.
            Layers with as many inputs have the same Gram matrix.
    """
    for number, model in enumerate(models):
        folder = statistics_of(model, kind)
        if folder.exists():
            continue
        drawn = torch.Generator().manual_seed(number)
        found: dict[str, torch.Tensor] = {}
        grams: dict[int, torch.Tensor] = {}
        for name, shape in tensor_shapes(size).items():
            if kind == "fisher":
                found[name] = torch.randn(shape, generator=drawn).square_().mul_(1e-6)
            elif len(shape) == 2 and "layers" in name:
                if shape[1] not in grams:
                    inputs = torch.randn(2 * shape[1], shape[1], generator=drawn)
                    grams[shape[1]] = inputs.T @ inputs / len(inputs)
                found[name] = grams[shape[1]].clone()
        folder.mkdir()
        save_file(found, folder / FILE, {"format": "pt"})
        (folder / "config.json").write_text("{}")


def statistics_of(model: Path, kind: str) -> Path:
    """Return the folder of a model's statistics."""
    return model.with_name(f"{model.name}-{kind}")


def _header(size: str) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in tensor_shapes(size).items():
        end = start + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stream(num_elements: int, num_files: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yield the blocks of all models, each with its first element's number.

    Drawing normal numbers is slow: each block is a window, chosen at random, of numbers drawn once.
    """
    generator = torch.Generator().manual_seed(0)
    weights, deltas = torch.randn(2, 4 * BLOCK_ELEMENTS, generator=generator)
    weights, deltas = weights * BASE_STD, deltas * DELTA_STD
    total = torch.empty(BLOCK_ELEMENTS)
    blocks = list(torch.empty(num_files, BLOCK_ELEMENTS, dtype=torch.bfloat16))
    for start in range(0, num_elements, BLOCK_ELEMENTS):
        size = min(BLOCK_ELEMENTS, num_elements - start)
        places = torch.randint(3 * BLOCK_ELEMENTS, (num_files,), generator=generator).tolist()
        base = weights[places[0] :][:size]
        blocks[0][:size].copy_(base)
        for place, block in zip(places[1:], blocks[1:], strict=True):
            torch.add(base, deltas[place:][:size], out=total[:size])
            block[:size].copy_(total[:size])
        yield start, [block[:size] for block in blocks]


def _config(size: str) -> dict[str, object]:
    s = SHAPES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.key_value // (s.hidden // s.heads),
        "vocab_size": s.vocabulary,
        "tie_word_embeddings": s.tied,
        "torch_dtype": "bfloat16",
    }
