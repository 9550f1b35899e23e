"""LoRA files over pipelines of diffusers: what diffusers itself makes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from checkpoints import load_folder
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import outliermerge

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers' own loading
# The names of the original U-Net, as kohya's scripts train SDXL, for those of diffusers.
_ORIGINAL = (
    (r"down_blocks_(\d+)_attentions_(\d+)_", lambda b, n: f"input_blocks_{1 + 3 * b + n}_1_"),
    (r"up_blocks_(\d+)_attentions_(\d+)_", lambda b, n: f"output_blocks_{3 * b + n}_1_"),
    (r"mid_block_attentions_(0)_", lambda n: "middle_block_1_"),
)


def _clip(seed: int) -> transformers.CLIPTextModel:
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=99,
        bos_token_id=0,
        eos_token_id=2,
    )
    return transformers.CLIPTextModel(config)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a small pipeline, and its parts."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=2,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    made = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2),
        text_encoder=_clip(1),
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(folder / "base")
    return folder / "base", made


def _trained(model: torch.nn.Module, targets: list[str], seed: int) -> dict[str, torch.Tensor]:
    """Add an adapter to a part, and return its factors, none of which are 0."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(seed)
    model.add_adapter(config)
    return {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}


@pytest.fixture(scope="module")
def files(pipeline, tmp_path_factory) -> dict[str, Path]:
    """One LoRA as diffusers saves it, and as kohya's scripts do, with both kinds of names."""
    folder = tmp_path_factory.mktemp("files")
    _, made = pipeline
    unet = _trained(made.unet, ["to_q", "to_out.0", "proj_in", "conv1", "ff.net.2"], 1)
    text = _trained(made.text_encoder, ["q_proj", "fc1"], 2)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder / "diffusers", unet_lora_layers=unet, text_encoder_lora_layers=text
    )
    kohya: dict[str, torch.Tensor] = {}
    for start, factors in (("lora_unet", unet), ("lora_te", text)):
        for name, tensor in factors.items():
            layer, end = re.match(r"(.+)\.lora_([AB])\.weight", name).groups()
            inner = "text_model." if start == "lora_te" else ""  # as older ones have it
            flat = f"{start}_{(inner + layer).replace('.', '_')}"
            kohya[f"{flat}.lora_{'down' if end == 'A' else 'up'}.weight"] = tensor
            kohya[f"{flat}.alpha"] = torch.tensor(6.0)
    save_file(kohya, folder / "kohya.safetensors")
    original = {}
    for name, tensor in kohya.items():
        for pattern, rename in _ORIGINAL:
            name = re.sub(pattern, lambda m, f=rename: f(*map(int, m.groups())), name)
        original[name] = tensor
    assert original.keys() != kohya.keys()
    save_file(original, folder / "original.safetensors")
    return {
        "diffusers": folder / "diffusers",
        "kohya": folder / "kohya.safetensors",
        "original": folder / "original.safetensors",
    }


def _add_text(kohya: dict[str, torch.Tensor], base: Path, target: Path) -> None:
    """Write a text encoder with the change of its layers, by their formula."""
    tensors = load_folder(base / "text_encoder")
    for name, before in tensors.items():
        layer = f"lora_te_text_model_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{layer}.alpha" in kohya:
            up, down = (kohya[f"{layer}.lora_{end}.weight"] for end in ("up", "down"))
            tensors[name] = before + up @ down * 6 / 4
    save_file(tensors, target / "text_encoder/model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def expected(pipeline, files, tmp_path_factory) -> dict[str, Path]:
    """What diffusers makes of the two files that differ in their alphas."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in ("diffusers", "kohya")}
    base, _ = pipeline
    for kind, folder in made.items():
        reference = diffusers.StableDiffusionPipeline.from_pretrained(
            base, safety_checker=None, tokenizer=None, feature_extractor=None
        )
        reference.load_lora_weights(files[kind])
        reference.fuse_lora()
        reference.unload_lora_weights()
        for part in ("unet", "text_encoder"):
            getattr(reference, part).save_pretrained(folder / part)
    # Of kohya's file it loses layers of a text encoder that transformers 5 made.
    _add_text(load_file(files["kohya"]), base, made["kohya"])
    return made


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "original"])
def test_a_file_is_what_diffusers_merges_into_a_pipeline(kind, pipeline, files, expected, tmp_path):
    base, _ = pipeline
    spec = {
        "merge_method": "passthrough",
        "models": [{"model": f"{base}+{files[kind]}"}],
    }
    output = outliermerge.run(spec, output=tmp_path / "out").output
    assert outliermerge.verify(output) == []
    merged = expected["diffusers" if kind == "diffusers" else "kohya"]
    num_changed = 0
    for part in ("unet", "text_encoder"):
        before = load_folder(base / part)
        found, wanted = load_folder(output / part), load_folder(merged / part)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
            num_changed += not torch.equal(found[name], before[name])
    assert num_changed > 20
