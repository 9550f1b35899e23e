"""The published LLaVA checkpoints at small width: same files, names, dtypes, configs, shards.

Real sizes stand beside the small ones. Where a fact is not from a named source, it says what it is
derived from. Sources, by their short names here:

- issue N: github.com/haotian-liu/LLaVA/issues/N, which quotes listings and configs of the files
- llava: the code of github.com/haotian-liu/LLaVA
- scripts: src/transformers/models/llava/convert_llava_weights_to_hf.py and
  llava_next/convert_llava_next_weights_to_hf.py in github.com/huggingface/transformers
"""

from __future__ import annotations

import io
import json
import shutil
from argparse import Namespace
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

HF_BASE = "llava-hf/llava-1.5-13b-hf"
ORIGINAL_BASE = "liuhaotian/llava-v1.5-13b"
INSTRUCT = "liuhaotian/llava-v1.6-vicuna-13b"
MATHS = "Zhiqiang007/Math-LLaVA"

HIDDEN, INTERMEDIATE, LAYERS, HEADS = 64, 176, 4, 4  # 5120, 13824, 40, 40 (issue 1378)
TOWER_HIDDEN, TOWER_INTERMEDIATE, TOWER_LAYERS, TOWER_HEADS = 32, 48, 3, 2  # 1024, 4096, 24, 16
IMAGE_SIZE, PATCH_SIZE = 56, 14  # 336, 14
# 32000 and 32064: two tokens are added, then rows up to a multiple of 64 (scripts).
NUM_TOKENS, NUM_ROWS = 320, 384

State = Mapping[str, Tensor]

_TEXTS = (
    "USER: What is in the image? ASSISTANT: a red square and two blue lines",
    "the area of the triangle is half of the base times the height, so the answer is 12",
    "How many more cubes than spheres are there? Choices: (A) 3 (B) 4 (C) 5 (D) 6",
    "Question: what is the sum of the angles? Answer the question using a single word or phrase.",
)
_TOWER = "model.vision_tower.vision_tower.vision_model."
_PREFIXES = {  # scripts, KEYS_TO_MODIFY_MAPPING, as whole prefixes
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    _TOWER: "vision_tower.vision_model.",
    "model.image_newline": "image_newline",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def hf_name(name: str) -> str:
    """Return the name that the conversion scripts give a tensor of the original layout."""
    old, new = next(pair for pair in _PREFIXES.items() if name.startswith(pair[0]))
    return new + name.removeprefix(old)


# Weights, in original names


def _language_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (NUM_TOKENS, HIDDEN)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        for part in "qkvo":
            shapes[f"{start}self_attn.{part}_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{start}mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{start}mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{start}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[f"{start}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{start}post_attention_layernorm.weight"] = (HIDDEN,)
    return shapes | {"model.norm.weight": (HIDDEN,)}


def _tower_shapes() -> dict[str, tuple[int, ...]]:
    # Names of CLIPVisionModel, `pre_layrnorm` as it is misspelt there (llava's clip_encoder.py
    # holds one as `vision_tower` within `vision_tower`).
    patches = (IMAGE_SIZE // PATCH_SIZE) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (TOWER_HIDDEN,),
        "embeddings.patch_embedding.weight": (TOWER_HIDDEN, 3, PATCH_SIZE, PATCH_SIZE),
        "embeddings.position_embedding.weight": (patches + 1, TOWER_HIDDEN),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (TOWER_HIDDEN,)

    norm("pre_layrnorm")
    for layer in range(TOWER_LAYERS):
        start = f"encoder.layers.{layer}."
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"{start}self_attn.{part}", TOWER_HIDDEN, TOWER_HIDDEN)
        norm(f"{start}layer_norm1")
        linear(f"{start}mlp.fc1", TOWER_INTERMEDIATE, TOWER_HIDDEN)
        linear(f"{start}mlp.fc2", TOWER_HIDDEN, TOWER_INTERMEDIATE)
        norm(f"{start}layer_norm2")
    norm("post_layernorm")
    return {_TOWER + name: shape for name, shape in shapes.items()}


@cache
def _base_values() -> dict[str, Tensor]:
    """Return LLaVA-v1.5's weights with CLIP's tower, before they were rounded to a dtype."""
    # Order of the modules as llava makes them: language model, tower, projector, head.
    shapes = _language_shapes() | _tower_shapes()
    for number, columns in ((0, TOWER_HIDDEN), (2, HIDDEN)):  # mlp2x_gelu: 1024→5120, 5120→5120
        shapes[f"model.mm_projector.{number}.weight"] = (HIDDEN, columns)
        shapes[f"model.mm_projector.{number}.bias"] = (HIDDEN,)
    shapes["lm_head.weight"] = (NUM_TOKENS, HIDDEN)
    generator = torch.Generator().manual_seed(15)
    return {
        name: float("norm" in name and name.endswith("weight"))
        + torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 0.02)
        for name, shape in shapes.items()
    }


def _fine_tune(seed: int) -> dict[str, Tensor]:
    """Return the base's weights moved a little, with heavy tails: 2% of the changes 8 times."""
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, values in _base_values().items():
        noise = torch.randn(values.shape, generator=generator) * (
            0.005 if values.dim() > 1 else 0.002
        )
        outlier = torch.rand(values.shape, generator=generator) < 0.02
        tuned[name] = values + torch.where(outlier, noise * 8, noise)
    return tuned


def _cast(state: State, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: values.to(dtype) for name, values in state.items()}


# The four repositories


def save_all(root: Path, *, maths_tower: bool = False) -> None:
    """Save every repository in a folder of its id's name."""
    save_hf_base(root / HF_BASE)
    save_original_base(root / ORIGINAL_BASE)
    save_instruct(root / INSTRUCT)
    save_maths(root / MATHS, tower=maths_tower)


def save_original_base(folder: Path) -> None:
    """liuhaotian/llava-v1.5-13b.

    Three pickled shards (issues 830, 507) of float16, without the vision tower: it is frozen and
    loaded from openai/clip-vit-large-patch14-336. For every layer inv_freq in float32: the index of
    the 7B names it, and its total_size, 13,518,798,848, is exact only so.
    """
    folder.mkdir(parents=True)
    state: dict[str, Tensor] = {}
    for name, values in _cast(_base_values(), torch.float16).items():
        if not name.startswith(_TOWER):
            state[name] = values
        if name.endswith("self_attn.o_proj.weight"):
            size = HIDDEN // HEADS
            inverse = 10000.0 ** -(torch.arange(0, size, 2) / size)
            state[name.replace("o_proj.weight", "rotary_emb.inv_freq")] = inverse
    _save_shards(folder, state, "pytorch_model-{:05}-of-{:05}.bin", 3)
    # Not in the index. Users' scripts name it; llava's loader reads it beside a language model.
    projector = {name: values for name, values in state.items() if "mm_projector" in name}
    torch.save(projector, folder / "mm_projector.bin")
    _save_json(
        folder / "config.json",
        _original_config("float16", "4.31.0") | {"image_aspect_ratio": "pad", "max_length": 4096},
    )
    _save_original_tokenizer(folder)


def save_instruct(folder: Path) -> None:
    """liuhaotian/llava-v1.6-vicuna-13b.

    bfloat16 with the tuned tower (llama.cpp pull request 5267) and image_newline, a parameter of
    its own module, which a state dict lists before the submodules' (llava_arch.py). Six safetensors
    shards: derived from 26.7 GB at transformers' limit of 5 GB. transformers 4.36 no longer stores
    inv_freq.
    """
    folder.mkdir(parents=True)
    newline = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(4))
    state = {"model.image_newline": newline, **_fine_tune(seed=16)}
    _save_shards(folder, _cast(state, torch.bfloat16), "model-{:05}-of-{:05}.safetensors", 6)
    # The config of the 7B, which is published likewise, with the 13B's sizes.
    _save_json(
        folder / "config.json",
        _original_config("bfloat16", "4.36.2")
        | {
            "image_aspect_ratio": "anyres",
            "image_crop_resolution": 224,
            "image_grid_pinpoints": [
                [336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]
            ],
            "image_split_resolution": 224,
            "mm_patch_merge_type": "spatial_unpad",
            "mm_vision_tower_lr": 2e-06,
            "rope_theta": 10000.0,
            "tokenizer_model_max_length": 4096,
            "unfreeze_mm_vision_tower": True,
        },
    )  # fmt: skip
    _save_original_tokenizer(folder)


def save_maths(folder: Path, *, tower: bool) -> None:
    """Zhiqiang007/Math-LLaVA: all but the tower tuned in bfloat16.

    From finetune_task.sh of github.com/HZQ950419/Math-LLaVA and from what llava of that time
    (transformers 4.37.2) saves: model_type llava_llama, mm_patch_merge_type flat, safetensors, the
    Trainer's files. Whether the frozen tower was saved is not known.
    """
    folder.mkdir(parents=True)
    frozen = {name: v for name, v in _base_values().items() if name.startswith(_TOWER)}
    state = {
        name: values
        for name, values in (_fine_tune(seed=17) | frozen).items()
        if tower or name not in frozen
    }
    _save_shards(folder, _cast(state, torch.bfloat16), "model-{:05}-of-{:05}.safetensors", 6)
    _save_json(
        folder / "config.json",
        _original_config("bfloat16", "4.37.2")
        | {
            "image_aspect_ratio": "pad",
            "mm_patch_merge_type": "flat",
            "model_type": "llava_llama",
            "rope_theta": 10000.0,
            "tokenizer_model_max_length": 2048,
        },
    )
    torch.save(Namespace(learning_rate=3e-5), folder / "training_args.bin")
    _save_json(folder / "trainer_state.json", {"epoch": 2.0})
    _save_original_tokenizer(folder)


def save_hf_base(folder: Path, *, names: Literal["published", "4.52"] = "published") -> None:
    """llava-hf/llava-1.5-13b-hf: what the conversion script makes of LLaVA-v1.5 and CLIP.

    float16 throughout; tower, projector, language model is the order of transformers 4.36's
    LlavaForConditionalGeneration. Six shards: derived from 26.7 GB at 5 GB. Names "4.52" are those
    that transformers 4.52 to 4.57 have in memory.
    """
    folder.mkdir(parents=True)
    state = {hf_name(name): values for name, values in _cast(_base_values(), torch.float16).items()}
    start = ("vision_tower.", "multi_modal_projector.", "language_model.")
    state = {name: state[name] for prefix in start for name in state if name.startswith(prefix)}
    embeddings = state["language_model.model.embed_tokens.weight"].float()
    generator = torch.Generator().manual_seed(5)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        # New rows of both are drawn from a Gaussian with the embeddings' mean and 1e-5 of their
        # covariance (scripts).
        noise = torch.randn((NUM_ROWS - NUM_TOKENS, NUM_TOKENS), generator=generator)
        centred = embeddings - embeddings.mean(0)
        rows = embeddings.mean(0) + noise @ centred * (1e-5 / NUM_TOKENS) ** 0.5
        state[name] = torch.cat([state[name], rows.half()])
    if names == "4.52":
        state = {_name_in_memory(name): values for name, values in state.items()}
    _save_shards(folder, state, "model-{:05}-of-{:05}.safetensors", 6)
    # As published for the 7B, text_config sparse; with the sizes that issue 1378 shows for a 13B.
    text = {
        "_name_or_path": "lmsys/vicuna-13b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": NUM_ROWS,
    }
    vision = {
        "hidden_size": TOWER_HIDDEN,
        "image_size": IMAGE_SIZE,
        "intermediate_size": TOWER_INTERMEDIATE,
        "model_type": "clip_vision_model",
        "num_attention_heads": TOWER_HEADS,
        "num_hidden_layers": TOWER_LAYERS,
        "patch_size": PATCH_SIZE,
        "projection_dim": 768,
        "vocab_size": 32000,
    }
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": NUM_TOKENS,  # 32000
        "model_type": "llava",
        "pad_token_id": NUM_TOKENS + 1,  # 32001
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": vision,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    _save_json(folder / "config.json", config)
    _save_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2,
               "pad_token_id": NUM_TOKENS + 1})  # fmt: skip
    _save_processor(folder)


def save_by_transformers(published: Path, folder: Path, *, names_in_memory: bool) -> None:
    """Save the HF base as the installed transformers does for a model that was not loaded.

    A loaded model is saved with the names of its files; this is how other names come about.
    """
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(published)
    fresh = transformers.LlavaForConditionalGeneration(loaded.config).half()
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder, max_shard_size="200KB", save_original_format=not names_in_memory)
    for path in published.iterdir():
        if not path.name.startswith("model") and not (folder / path.name).exists():
            shutil.copy(path, folder)


def _name_in_memory(name: str) -> str:
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def _save_shards(folder: Path, state: State, pattern: str, count: int) -> None:
    """Save tensors in order in a number of files of about the same size, with their index."""
    total = sum(values.nbytes for values in state.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    done = 0
    for name, values in state.items():
        shards[count * done // total][name] = values.contiguous()
        done += values.nbytes
    places = {}
    for number, shard in enumerate(shards, start=1):
        path = folder / pattern.format(number, count)
        if path.suffix == ".bin":
            torch.save(shard, path)
        else:
            save_file(shard, path, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, path.name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    stem = pattern.partition("-")[0]
    _save_json(folder / f"{stem}{Path(pattern).suffix}.index.json", index)


def _save_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _original_config(dtype: str, version: str) -> dict[str, Any]:
    """Return what the configs of the original layout share: llava-v1.5-13b's, which is public."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 4096,
        "mm_hidden_size": TOWER_HIDDEN,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": version,
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": NUM_TOKENS,
    }


# Tokenizers: Llama's sentencepiece model, and the same as tokenizer.json with two tokens more


@cache
def _sentencepiece() -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXTS),
        model_writer=written,
        model_type="bpe",
        vocab_size=NUM_TOKENS,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return written.getvalue()


def _pieces() -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=_sentencepiece())
    return [processor.id_to_piece(number) for number in range(NUM_TOKENS)]


def _merges(pieces: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs that make each piece, in the order of the pieces, which is by score."""
    ids = {piece: number for number, piece in enumerate(pieces)}
    return [
        (piece[:cut], piece[cut:])
        for piece in ids
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids and not piece.startswith("<")
    ]


def _save_original_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(_sentencepiece())
    _save_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "legacy": False,
            "model_max_length": 2048,
            "pad_token": None,
            "padding_side": "right",
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
        },
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    _save_json(folder / "special_tokens_map.json", special)
    _save_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2,
               "pad_token_id": 0})  # fmt: skip


def _save_processor(folder: Path) -> None:
    pieces = _pieces()
    ids = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            ids, _merges(pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    space = "▁"  # as in the published tokenizer.json of Llama
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend(space), tokenizers.normalizers.Replace(" ", space)]
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    added = {"<image>": NUM_TOKENS, "<pad>": NUM_TOKENS + 1}
    special = [*pieces[:3], *added]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=True) for token in special]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").write_bytes(_sentencepiece())
    _save_json(folder / "added_tokens.json", added)
    decoder = {
        str(number): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                      "single_word": False, "special": True}
        for token, number in {**dict(zip(pieces[:3], range(3), strict=True)), **added}.items()
    }  # fmt: skip
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _save_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": decoder,
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 4096,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
            "tokenizer_class": "LlamaTokenizer",
            **names,
        },
    )
    _save_json(folder / "special_tokens_map.json", names)
    template = (
        "{% for message in messages %}{{ message['role'] | upper }}: "
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    _save_json(folder / "chat_template.json", {"chat_template": template})
    _save_json(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": PATCH_SIZE,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
    _save_json(  # of openai/clip-vit-large-patch14-336
        folder / "preprocessor_config.json",
        {
            "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "CLIPImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "processor_class": "LlavaProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": IMAGE_SIZE},
        },
    )
