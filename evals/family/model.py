"""The tiny LLaVA: architecture, tokenizer and processor in Hugging Face's layout.

0.9M parameters: a CLIP tower of 3 layers, the projector, a Llama of 3 layers, a tokenizer of whole
words. An answer is one word and the end token.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

try:  # transformers 5 has the image processor without torchvision under its own name
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

from evals.family.data import CELL, COLOURS, IMAGE_SIZE, SHAPES

SPECIAL = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>", "image": "<image>"}
NUM_IMAGE_TOKENS = (IMAGE_SIZE // CELL) ** 2
VOCABULARY_SIZE = 64
PIXEL_MEAN, PIXEL_STD = 0.5, 0.5
INIT_STD = 0.05
WORDS = (
    *("user", "assistant", ":", "?", "yes", "no"),
    *("is", "are", "does", "what", "how", "many", "more", "than", "and", "together", "there"),
    *("the", "a", "of", "in", "image", "contain", "present", "shape", "shapes", "color"),
    *COLOURS,
    *SHAPES,
    *map(str, range(10)),
)
# A message's content is a string, as lmms-eval gives it, or a list of images and texts.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] }} : "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: lower-case words and punctuation, one id each."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL.values(), *WORDS))}
    assert len(vocabulary) <= VOCABULARY_SIZE
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk"]))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=SPECIAL["pad"],
        bos_token=SPECIAL["bos"],
        eos_token=SPECIAL["eos"],
        unk_token=SPECIAL["unk"],
        additional_special_tokens=[SPECIAL["image"]],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """Return the processor: `IMAGE_SIZE` pixels to `NUM_IMAGE_TOKENS` tokens."""
    pixels = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=build_tokenizer(),
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=SPECIAL["image"],
    )


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """Return a model with random weights, float32."""
    ids = {name: i for i, name in enumerate(SPECIAL)}
    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=CELL,
        projection_dim=64,
        initializer_range=INIT_STD,
    )
    language = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=INIT_STD,
        tie_word_embeddings=False,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=language,
        image_token_index=ids["image"],
        image_seq_length=NUM_IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
        max_new_tokens=4,
    )
    return model.float()


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the model in bfloat16 with its processor to a new folder."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # A loaded model's parts name the dtype they were loaded in, a new one's none.
    for part in (model.config.text_config, model.config.vision_config):
        part.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    model.float().load_state_dict(state)


def load(folder: str | Path) -> LlavaForConditionalGeneration:
    """Return a saved model in float32.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape.
    """
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{folder}: {wrong}")
    return model.eval()


def prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """Return the text that lmms-eval's `llava_hf` makes of a question."""
    messages = [{"role": "user", "content": f"{SPECIAL['image']}\n{question}"}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
