"""The configs of the two kinds of adapters, saved as adapter_config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass

from peft import PeftConfig

from outliermerge.errors import OutlierMergeError, suggest
from outliermerge.peft.initial import INITIAL

SCALED_LORA, SCALED_NOISE = "SCALED_LORA", "SCALED_NOISE"


@dataclass
class ScaledLoraConfig(PeftConfig):
    """LoRA with a trained scale of the base (arXiv 2501.10661, Algorithm 1).

    W' = (1 + s) · W + lora_alpha / r · B·A, with one s for each matrix. s and B start at 0, so the
    model starts as the base. A bias is not scaled.

    Attributes:
        r: the rank of A (r, inputs) and B (outputs, r).
        lora_alpha: lora_alpha / r is the factor of B·A.
        lora_dropout: the dropout rate of A's inputs in training, in [0, 1).
        target_modules: names, a regular expression or "all-linear", as LoraConfig takes them; the
            default is LoRA's for the model's architecture.
        exclude_modules: names or a regular expression of modules that are not targets.
        modules_to_save: names of modules that are trained and saved whole.
        init: the initial distribution of A: "kaiming" (as in the paper; uniform, as in peft),
            "gaussian" (standard deviation 1 / r, as in peft) or "gp_pareto" (see `gp_pareto`).
        seed: A is a function of the seed and of each layer's name; torch's generator is not used.
        train_scale: False omits s, which gives plain LoRA.
        fan_in_fan_out: whether the layers store their weights (inputs, outputs), as GPT-2's do; set
            when the adapter's layers are made.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init: str = "kaiming"
    seed: int = 0
    train_scale: bool = True
    fan_in_fan_out: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call] # peft's has no types
        self.peft_type = SCALED_LORA
        _as_sets(self)
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise OutlierMergeError(f"r: found {self.r!r}, expected a positive integer")
        if self.init not in INITIAL:
            raise OutlierMergeError(f"init: found {self.init!r}. {suggest(self.init, INITIAL)}")
        if not _is_number(self.lora_alpha):
            raise OutlierMergeError(f"lora_alpha: found {self.lora_alpha!r}, expected a number")
        if not (_is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1):
            raise OutlierMergeError(
                f"lora_dropout: found {self.lora_dropout!r}, expected a number in [0, 1)"
            )


@dataclass
class NoiseConfig(PeftConfig):
    """A trained amount of fixed noise (arXiv 2501.10661, eq. 3 and section 3.2).

    W' = W + s · N, with one s for each matrix, from 0. N is standard Gaussian noise in the shape of
    W as the layer stores it: `rng.standard_normal(seed, name of the layer)`, never saved.

    Attributes:
        target_modules: names, a regular expression or "all-linear", as in LoraConfig; the default
            is LoRA's for the model's architecture. The paper uses Q, K, V, O, up and down.
        exclude_modules: names or a regular expression of modules that are not targets.
        modules_to_save: names of modules that are trained and saved whole.
        seed: the seed of the noise. With another seed, saved scales are useless.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call] # peft's has no types
        self.peft_type = SCALED_NOISE
        _as_sets(self)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def _as_sets(config: ScaledLoraConfig | NoiseConfig) -> None:
    """Convert lists of names to sets, as peft's own configs do, and check the seed."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(names := getattr(config, key), list):
            setattr(config, key, set(names))
    if isinstance(config.seed, bool) or not isinstance(config.seed, int):
        raise OutlierMergeError(f"seed: found {config.seed!r}, expected an integer")
