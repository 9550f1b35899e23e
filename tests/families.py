"""Small checkpoints of many model families, named and laid out as those on the hub are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from checkpoints import fine_tune, load_folder
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

import outliermerge
from outliermerge.errors import OutlierMergeError

Tensors = Mapping[str, Tensor]

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SMALL = {key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                    "num_attention_heads")}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "pad_token_id": None}
IMAGE_TOKEN = 90


@dataclass(frozen=True)
class Family:
    """A base model and two fine-tunes of it.

    Attributes:
        missing: what a spec says of tensors that a fine-tune lacks.
    """

    kind: str
    base: Path
    models: tuple[Path, Path]
    missing: Any = None


def replace_tensors(folder: Path, tensors: Tensors, *, shard_size: str = "5GB") -> Path:
    """Store tensors in place of those of a folder, in shards of at most a size."""
    stem = next(iter(sorted(folder.glob("*.safetensors")))).name
    stem = re.sub(r"(-\d{5}-of-\d{5})?\.safetensors$", "", stem)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        path.unlink()
    save_torch_state_dict(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder,
        max_shard_size=shard_size,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
    )
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2))


def tune(base: Path, folder: Path, *, seed: int, shard_size: str = "5GB") -> Path:
    """Make a fine-tune with heavy-tailed changes, in shards of its own."""
    fine_tune(base, folder, seed=seed)
    return replace_tensors(folder, load_folder(folder), shard_size=shard_size)


def build(kind: str, folder: Path) -> Family:
    """Build a family of a kind in KINDS."""
    return KINDS[kind](folder)


def _save(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a model whose vectors and scalars are not the ones and zeros of a fresh one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    if dtype != torch.float32:
        model.to(dtype)
    model.save_pretrained(folder)
    return folder


def _family(
    kind: str, base: Path, folder: Path, *, shards: tuple[str, str, str] = ("5GB",) * 3
) -> Family:
    replace_tensors(base, load_folder(base), shard_size=shards[0])
    first, second = (
        tune(base, folder / f"task{seed}", seed=seed, shard_size=shards[seed]) for seed in (1, 2)
    )
    return Family(kind, base, (first, second))


def save_qwen(folder: Path, *, tied: bool = False) -> Path:
    """Qwen2.5-VL as it is published: its language model's config is not nested.

    `text_config` came with transformers 4.52; https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct
    has what is in it at the top level. The 3B model ties its head.
    """
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_heads": 2,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
        tie_word_embeddings=tied,
    )
    _save(transformers.Qwen2_5_VLForConditionalGeneration(config), folder, torch.bfloat16)

    def flatten(content: dict[str, Any]) -> None:
        del content["text_config"], content["dtype"]
        content.update(TEXT, torch_dtype="bfloat16", rope_theta=1000000.0)
        content["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
        content["vision_config"] = vision | {"model_type": "qwen2_5_vl"}

    edit_json(folder / "config.json", flatten)
    return folder


def save_gemma(folder: Path) -> Path:
    """Gemma: ties its head, which the published config.json does not say.

    https://huggingface.co/google/gemma-2b has no tie_word_embeddings; true is the default of
    GemmaConfig in huggingface/transformers.
    """
    torch.manual_seed(0)
    config = transformers.GemmaConfig(**TEXT, head_dim=8)
    _save(transformers.GemmaForCausalLM(config), folder, torch.bfloat16)
    edit_json(folder / "config.json", lambda content: content.pop("tie_word_embeddings"))
    return folder


def save_llama(folder: Path, *, tied: bool = False) -> Path:
    """Llama, which stores a head unless it is tied."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=tied)
    return _save(transformers.LlamaForCausalLM(config), folder)


def _qwen(folder: Path) -> Family:
    return _family("qwen2_5_vl", save_qwen(folder / "base"), folder, shards=("60KB", "5GB", "90KB"))


def _qwen_tied(folder: Path) -> Family:
    return _family("qwen2_5_vl_tied", save_qwen(folder / "base", tied=True), folder)


def _gemma(folder: Path) -> Family:
    return _family("gemma", save_gemma(folder / "base"), folder, shards=("20KB", "20KB", "5GB"))


def _mixtral(folder: Path) -> Family:
    # Published with a name for every expert, block_sparse_moe.experts.N.w1
    # (https://huggingface.co/mistralai/Mixtral-8x7B-v0.1), though transformers 5 holds them as one
    # tensor; its save_pretrained goes back to the published names.
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**(TEXT | EXPERTS), num_local_experts=4)
    base = _save(transformers.MixtralForCausalLM(config), folder / "base", torch.bfloat16)
    assert "model.layers.1.block_sparse_moe.experts.3.w1.weight" in load_folder(base)
    return _family("mixtral", base, folder, shards=("30KB", "40KB", "30KB"))


def _qwen3_moe(folder: Path) -> Family:
    # As in https://huggingface.co/Qwen/Qwen3-30B-A3B
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **(TEXT | EXPERTS), moe_intermediate_size=16, num_experts=4, head_dim=8
    )
    base = _save(transformers.Qwen3MoeForCausalLM(config), folder / "base", torch.bfloat16)
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in load_folder(base)
    return _family("qwen3_moe", base, folder)


def _vit(folder: Path) -> Family:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=5)
    base = _save(transformers.ViTForImageClassification(config), folder / "base")
    # As in https://huggingface.co/google/vit-base-patch16-224
    assert "vit.encoder.layer.1.attention.attention.query.weight" in load_folder(base)
    return _family("vit", base, folder)


def _clip(folder: Path) -> Family:
    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config=SMALL | tokens | {"vocab_size": 96, "max_position_embeddings": 16},
        vision_config=SMALL | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    base = _save(transformers.CLIPModel(config), folder / "base")
    family = _family("clip", base, folder)
    # Before transformers 4.31 position_ids were stored (huggingface/transformers#24505), as they
    # are in https://huggingface.co/openai/clip-vit-base-patch32
    buffers = {
        "text_model.embeddings.position_ids": torch.arange(16)[None],
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    for path in (base, family.models[0]):
        replace_tensors(path, load_folder(path) | buffers)
    return Family(
        "clip", base, family.models, missing=[{"filter": "position_ids", "value": "base"}]
    )


def _bert(folder: Path) -> Family:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SMALL, vocab_size=96, max_position_embeddings=32, pad_token_id=0
    )
    base = _save(transformers.BertForPreTraining(config), folder / "base")
    family = _family("bert", base, folder)
    tensors = load_folder(base)
    replace_tensors(base, tensors | {"bert.embeddings.position_ids": torch.arange(32)[None]})
    return Family(
        "bert", base, family.models, missing=[{"filter": "position_ids", "value": "base"}]
    )


def old_layer_norms(folder: Path) -> Path:
    """Name a BERT's layer norms as TensorFlow did.

    https://huggingface.co/google-bert/bert-base-uncased has LayerNorm.gamma and LayerNorm.beta.
    """
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_folder(folder).items()
    }
    return replace_tensors(folder, tensors)


def gpt2(folder: Path) -> Family:
    """GPT-2 as published, and fine-tunes as transformers saves them.

    https://huggingface.co/openai-community/gpt2 has the names of GPT2Model (`h.0.…`), and causal
    masks (`h.0.attn.bias`) among its tensors; a saved GPT2LMHeadModel has `transformer.h.0.…` and
    no masks. Both leave the tied head out.
    """
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=96, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    saved = _save(transformers.GPT2LMHeadModel(config), folder / "base")
    first, second = (tune(saved, folder / f"task{seed}", seed=seed) for seed in (1, 2))
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_folder(saved).items()
    }
    mask = torch.tril(torch.ones(1, 1, 16, 16))
    masks = {f"h.{layer}.attn.bias": mask.clone() for layer in range(2)}
    return Family("gpt2", replace_tensors(saved, tensors | masks), (first, second))


def _unet_model() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def _unet(folder: Path) -> Family:
    base = _save(_unet_model(), folder / "base")
    assert (base / "diffusion_pytorch_model.safetensors").is_file()
    return _family("unet", base, folder, shards=("5GB", "50KB", "5GB"))


KINDS: dict[str, Callable[[Path], Family]] = {
    "qwen2_5_vl": _qwen,
    "qwen2_5_vl_tied": _qwen_tied,
    "gemma": _gemma,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "vit": _vit,
    "clip": _clip,
    "bert": _bert,
    "unet": _unet,
}


def architecture(folder: Path) -> Any:
    """Return the class that a folder's config.json names."""
    config = json.loads((folder / "config.json").read_text())
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"])
    return getattr(transformers, config["architectures"][0])


def load(folder: Path) -> nn.Module:
    """Load a folder in float32; no tensor may be missing, left over or of another shape."""
    model, info = architecture(folder).from_pretrained(
        folder, output_loading_info=True, torch_dtype=torch.float32
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], (problem, info[problem])
    return model.eval()


def forward(model: nn.Module) -> Tensor:
    """Return what a model makes of a fixed input, through every part of it, in float64."""
    generator = torch.Generator().manual_seed(9)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = torch.tensor([[1, 5, 17, 44, 7, 3, 60, 2]])
    name = type(model).__name__
    with torch.no_grad():
        if name.startswith("Qwen2_5_VL"):
            # An image of 4 × 4 patches, of which 2 × 2 become one token.
            image = torch.full((1, 4), IMAGE_TOKEN)
            tokens = torch.cat([tokens[:, :2], image, tokens[:, 2:]], 1)
            outputs = model(
                input_ids=tokens,
                pixel_values=noise(16, 3 * 2 * 14 * 14),
                image_grid_thw=torch.tensor([[1, 4, 4]]),
                mm_token_type_ids=(tokens == IMAGE_TOKEN).int(),
            )
            found = [outputs.logits]
        elif name == "ViTForImageClassification":
            found = [model(pixel_values=noise(2, 3, 16, 16)).logits]
        elif name == "CLIPModel":
            outputs = model(input_ids=tokens, pixel_values=noise(2, 3, 16, 16))
            found = [outputs.logits_per_image]
        elif name == "BertForPreTraining":
            outputs = model(input_ids=tokens, token_type_ids=(tokens > 10).long())
            found = [outputs.prediction_logits, outputs.seq_relationship_logits]
        elif name == "UNet2DConditionModel":
            found = [model(noise(1, 4, 8, 8), 7, encoder_hidden_states=noise(1, 5, 32)).sample]
        else:
            found = [model(input_ids=tokens).logits]
    return torch.cat([part.double().flatten() for part in found])


def copy_folder(source: Path, target: Path) -> Path:
    """Return a copy of a folder."""
    return Path(shutil.copytree(source, target))


def pipeline(folder: Path) -> Path:
    """Save a Stable Diffusion pipeline: three models, a tokenizer and a scheduler.

    The names are those of https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5: its
    VAE has the attention's names of before diffusers 0.18, its text encoder stores position_ids.
    """
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    config = transformers.CLIPTextConfig(
        **SMALL,
        vocab_size=8,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vocabulary = folder.with_name(f"{folder.name}-tokens")
    vocabulary.mkdir(parents=True)
    ids = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "t</w>": 3, "c": 4, "ca": 5,
           "cat</w>": 6, "a</w>": 7}  # fmt: skip
    (vocabulary / "vocab.json").write_text(json.dumps(ids))
    (vocabulary / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(vocabulary, model_max_length=16)
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=_unet_model(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    encoder = load_folder(folder / "text_encoder")
    encoder = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor
        for name, tensor in encoder.items()
    }
    encoder["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    replace_tensors(folder / "text_encoder", encoder)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_folder(folder / "vae").items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in renamed
    replace_tensors(folder / "vae", renamed)
    return folder


def tune_pipeline(base: Path, folder: Path, *, seed: int) -> Path:
    """Make a fine-tune of all models of a pipeline."""
    copy_folder(base, folder)
    for part in sorted(path.parent for path in base.glob("*/*.safetensors")):
        shutil.rmtree(folder / part.name)
        tune(part, folder / part.name, seed=seed)
    return folder


class ConvNet(nn.Sequential):
    """A plain net with batch norms, whose num_batches_tracked are int64 scalars."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )


def train_conv_net(base: ConvNet, *, seed: int, steps: int) -> ConvNet:
    """Return a net trained from another for some steps on noise."""
    net = ConvNet()
    net.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(steps):
        images = torch.randn(4, 3, 8, 8, generator=generator)
        labels = torch.randint(4, (4,), generator=generator)
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def refusal(spec: Any, output: Path | None = None) -> str:
    """Return what a plan, or a run where an output is given, is refused with."""
    with pytest.raises(OutlierMergeError) as caught:
        if output is None:
            outliermerge.plan(spec)
        else:
            outliermerge.run(spec, output=output)
    if output is not None:
        assert not output.exists()
    return str(caught.value)
