"""Small models with tokenizers of four kinds, and texts in six scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import trainers as train

KINDS = ("byte-level BPE", "BPE", "Unigram", "WordPiece")
TEXTS = {
    "Latin": "The quick brown fox",
    "Cyrillic": "Съешь ещё этих мягких булок",
    "Han": "天地玄黄 宇宙洪荒",
    "Arabic": "مرحبا بالعالم",
    "Devanagari": "नमस्ते दुनिया",
    "Greek": "Γειά σου κόσμε",
}
FURTHER_TEXTS = {
    "Kana": "いろはにほへと ちりぬるを カタカナ",
    "Hangul": "안녕하세요 세계",
    "Hebrew": "שלום עולם",
    "Thai": "สวัสดีชาวโลก",
    "emoji": "🙂 👩‍💻 🏳️‍🌈",
    "marks": "e\u0301 Å n̈ naïve",
    "mixed": "x = 3.14; // Привет, 世界 🙂",
}
"""In scripts that none of the tokenizers was trained on."""
_CORPORA = {
    "base": (
        *30 * ("the quick brown fox jumps over the lazy dog", "天地玄黄宇宙洪荒"),
        *TEXTS.values(),
    ),
    "other": (
        *30 * ("съешь же ещё этих мягких французских булок", "γειά σου κόσμε"),
        *TEXTS.values(),
    ),
}
_SIZES = {"byte-level BPE": 340, "BPE": 440, "Unigram": 160, "WordPiece": 220}
_LLAMA = ("<unk>", "<s>", "</s>")
_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BYTES = [f"<0x{number:02X}>" for number in range(256)]
SPECIAL: dict[str, dict[str, str]] = {
    "byte-level BPE": {"eos_token": "<|end|>"},
    "BPE": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Unigram": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "WordPiece": {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[SEP]"},
}


@cache
def _trained(kind: str, corpus: str) -> str:
    """Return the JSON of a tokenizer."""
    size: dict[str, Any] = {"vocab_size": _SIZES[kind], "show_progress": False}
    if kind == "byte-level BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = train.BpeTrainer(special_tokens=["<|end|>"], initial_alphabet=alphabet, **size)
    elif kind == "BPE":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
             decoders.Strip(" ", 1, 0)]
        )  # fmt: skip
        trainer = train.BpeTrainer(special_tokens=[*_LLAMA, *_BYTES], **size)
    elif kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = train.UnigramTrainer(special_tokens=[*_LLAMA], unk_token="<unk>", **size)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=False, strip_accents=False, lowercase=False
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = train.WordPieceTrainer(special_tokens=[*_BERT], **size)
    tokenizer.train_from_iterator(_CORPORA[corpus], trainer)
    return tokenizer.to_str()


def save_model(
    folder: Path,
    kind: str,
    corpus: str = "base",
    added: Sequence[str] = (),
    *,
    seed: int = 0,
    spare: int = 0,
    tokenizer: bool = True,
    config: dict[str, Any] | None = None,
) -> Path:
    """Save a Llama-shaped model with random rows, and a tokenizer with added special tokens.

    Args:
        spare: rows without a token.
        tokenizer: False leaves the tokenizer's files out.
        config: changes to the config.
    """
    folder.mkdir(parents=True)
    trained = Tokenizer.from_str(_trained(kind, corpus))
    trained.add_special_tokens([AddedToken(token, special=True) for token in added])
    if tokenizer:
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=trained, **SPECIAL[kind])
        fast.save_pretrained(folder)
    ids = {f"{word}_token_id": None for word in ("bos", "eos", "pad")}
    ids |= {f"{word}_id": trained.token_to_id(token) for word, token in SPECIAL[kind].items()
            if word != "unk_token"}  # fmt: skip
    size = trained.get_vocab_size() + spare
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": size,
             "max_position_embeddings": 64, "tie_word_embeddings": False}  # fmt: skip
    settings = shape | ids | (config or {})
    content = transformers.LlamaConfig(**settings).to_dict()
    content |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(content))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) for name, shape in _shapes(size).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _shapes(rows: int) -> dict[str, tuple[int, ...]]:
    layer = "model.layers.0."
    return {
        "model.embed_tokens.weight": (rows, 8),
        "lm_head.weight": (rows, 8),
        "model.norm.weight": (8,),
        f"{layer}input_layernorm.weight": (8,),
        f"{layer}post_attention_layernorm.weight": (8,),
        f"{layer}self_attn.q_proj.weight": (8, 8),
        f"{layer}self_attn.k_proj.weight": (4, 8),
        f"{layer}self_attn.v_proj.weight": (4, 8),
        f"{layer}self_attn.o_proj.weight": (8, 8),
        f"{layer}mlp.gate_proj.weight": (12, 8),
        f"{layer}mlp.up_proj.weight": (12, 8),
        f"{layer}mlp.down_proj.weight": (8, 12),
    }


def save_family(root: Path, kind: str) -> Path:
    """Save a base, a model with added tokens, and one with another tokenizer of the same kind."""
    save_model(root / "base", kind, spare=5)
    save_model(root / "chat", kind, added=["<|im_start|>", "<|im_end|>"], seed=1)
    save_model(root / "other", kind, "other", ["<|im_end|>", "<x>"], seed=2)
    return root
