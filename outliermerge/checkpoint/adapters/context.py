"""What the layers of an adapter have in common: its config, its base, how names are mapped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.adapters.config import (
    CONFIG_NAME,
    LayerPatterns,
    alpha_key,
    without_wrappers,
)
from outliermerge.checkpoint.sources import Checkpoint, Source
from outliermerge.errors import OutlierMergeError, shown


@dataclass(frozen=True)
class Context:
    """What the layers of an adapter have in common.

    Attributes:
        file: the adapter's weights.
        config: what its config says.
        patterns: tells which layers the config's expressions match.
        base: the model that it changes.
        rename: maps its names for the base's tensors to the base's own names.
    """

    file: Path
    config: Mapping[str, Any]
    patterns: LayerPatterns
    base: Checkpoint
    rename: Callable[[str], str]

    def refuse(self, what: str) -> OutlierMergeError:
        """Return an error about the adapter's file."""
        return OutlierMergeError(f"{self.file}: {what}")

    def names(self, parameter: str) -> list[str]:
        """Return the names that a layer or parameter may have: in training, bare, in the base."""
        renamed = self.rename(parameter).removesuffix(".weight")
        module = parameter.removesuffix(".weight")
        return list(dict.fromkeys([module, without_wrappers(module), renamed]))

    def rank(self, names: list[str]) -> int:
        """Return the rank that the config gives a layer."""
        found: int = self.patterns.value(
            self.config.get("rank_pattern"), names, self.config.get("r")
        )
        return found

    def scale(self, names: list[str]) -> float:
        """Return the factor of a layer's change, by its alpha and rank.

        Raises:
            OutlierMergeError: they give none.
        """
        key, rank = alpha_key(self.config), self.rank(names)
        alpha = self.patterns.value(self.config.get("alpha_pattern"), names, self.config.get(key))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not rank:
            raise self.refuse(f"{shown(names[0])}: {key} {alpha!r} and r {rank!r} give no scale")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def check_rank(self, names: list[str], found: object, what: str) -> None:
        """Refuse a factor of another rank than the config says."""
        if found != self.rank(names):
            raise self.refuse(
                f"{shown(names[0])}: {what} is not of rank {self.rank(names)}, as {CONFIG_NAME} "
                "says"
            )

    def check_floats(self, *sources: Source) -> None:
        """Refuse tensors of other types than floats."""
        for source in sources:
            if not source.dtype.is_float:
                raise self.refuse(f"{shown(source.name)}: is {source.dtype.name}, expected floats")

    def is_fan_in_fan_out(self, module: str, shape: tuple[int, ...], seen: set[bool]) -> bool:
        """Tell whether a square weight is stored (in, out), by the config and by other layers.

        Args:
            seen: whether other layers are, whose shapes show it.

        Raises:
            OutlierMergeError: the two disagree.
        """
        said = bool(self.config.get("fan_in_fan_out"))
        if seen <= {said}:
            return said
        advice = (
            "Merge it with peft's merge_and_unload(), then save_pretrained()."
            if said in seen
            else f"Correct it in {CONFIG_NAME}."
        )
        raise self.refuse(
            f"{shown(module)}: its weight {list(shape)} is square, so its shape does not tell "
            "whether it "
            f"is stored transposed, and fan_in_fan_out {said} is wrong for other layers. {advice}"
        )
