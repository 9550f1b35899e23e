"""Small models for adapters to be trained on."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D


def llama(tie: bool = False) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=80,
        attention_bias=True,
        tie_word_embeddings=tie,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=80, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def bert() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=80,
        max_position_embeddings=32,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def resnet() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "resnet": resnet}
ATTENTION = ["q_proj", "v_proj"]


class Layers(nn.Module):
    """One layer of each kind that adapters are for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(12, 18)
        self.square = nn.Linear(12, 12)
        self.turned = Conv1D(18, 12)  # stores (in, out)
        self.conv1 = nn.Conv1d(8, 12, 3)
        self.conv2 = nn.Conv2d(8, 12, (3, 2))
        self.point = nn.Conv2d(8, 12, 1)
        self.same = nn.Conv2d(8, 8, 3)
        self.conv3 = nn.Conv3d(8, 12, (2, 3, 2))
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.embedding = nn.Embedding(16, 12)
