"""Trains LoRA and DoRA on all-MiniLM-L6-v2 at the ranks of Table 6, and scores them."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from evals.peft.study import (
    MATRICES,
    Rater,
    Settings,
    fetch_texts,
    read_texts,
    score,
    split,
    train,
)

RANKS = (4, 8, 16, 32, 64)
SETTINGS = Settings(num_train=3200, num_validation=16, num_test=1024)
RATE, HEAD_RATE = 1e-3, 3e-3


@dataclass(frozen=True)
class Adapter:
    """One adapter: its method, rank, and whether A starts by Xavier, not peft's Kaiming."""

    method: str
    rank: int
    xavier: bool = False
    seed: int = 1

    @property
    def name(self) -> str:
        return self.title.replace(", ", "-").replace("=", "").replace(" ", "")

    @property
    def title(self) -> str:
        parts = [self.method, f"r={self.rank}"]
        parts += ["Xavier"] * self.xavier + [f"seed {self.seed}"] * (self.seed > 1)
        return ", ".join(parts)

    def apply(self, encoder: nn.Module) -> nn.Module:
        import peft

        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            use_dora=self.method == "DoRA",
            target_modules=MATRICES,
            exclude_modules=["pooler.dense"],  # the states that are rated do not pass it
        )
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            adapted = peft.get_peft_model(encoder, config)
            for name, parameter in adapted.named_parameters():
                if self.xavier and ".lora_A." in name:
                    nn.init.xavier_uniform_(parameter)
        return adapted.eval()  # no dropout: a run is a function of its seed


ADAPTERS = (
    *(Adapter(method, rank) for rank in RANKS for method in ("LoRA", "DoRA")),
    Adapter("LoRA", 64, xavier=True),
    Adapter("LoRA", 32, seed=2),
    Adapter("DoRA", 32, seed=2),
)


def train_all(base: Path, folder: Path) -> Iterator[tuple[Adapter, Path]]:
    """Train the adapters that are not there yet; each folder has a score.json too."""
    import transformers

    missing = [each for each in ADAPTERS if not (folder / each.name / "score.json").is_file()]
    if missing:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        training, _, test = split(read_texts(fetch_texts()), tokenizer, SETTINGS)
        encoder = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
    for adapter in missing:
        started = time.process_time()
        adapted = adapter.apply(copy.deepcopy(encoder))
        rater = Rater(adapted, encoder.config.hidden_size, adapter.seed)
        train(rater, training, HEAD_RATE, RATE, SETTINGS.batch, adapter.seed)
        found = score(rater, test) | {"cpu_seconds": round(time.process_time() - started, 1)}
        rater.encoder.save_pretrained(folder / adapter.name)
        (folder / adapter.name / "score.json").write_text(json.dumps(found) + "\n")
        print(f"{adapter.title}: {found}", flush=True)
    for adapter in ADAPTERS:
        yield adapter, folder / adapter.name
