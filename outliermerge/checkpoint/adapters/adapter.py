"""PEFT adapters as models: the base's tensors as the adapter changes them, computed when read.

The file layout is that of peft 0.21's `get_peft_model_state_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.adapters.config import (
    CONFIG_NAME,
    FILE_NAMES,
    SCALED_LORA,
    SCALED_NOISE,
    LayerPatterns,
    is_saved_whole,
    read_adapter_config,
    without_wrappers,
)
from outliermerge.checkpoint.adapters.keys import KEY, OWN_PARTS, PREFIX, WRAPPED, LayerParts
from outliermerge.checkpoint.adapters.promises import broken_promises, notes_of
from outliermerge.checkpoint.adapters.scaled import NoiseSum, ScaledSum
from outliermerge.checkpoint.adapters.tensors import (
    LowRankSum,
    ReplacedRows,
    Rescaled,
    ShiftedBias,
    in_dtype_of,
    makes,
    stores_head,
)
from outliermerge.checkpoint.folders.copies import beside_adapter
from outliermerge.checkpoint.folders.foreign import refuse_ungathered
from outliermerge.checkpoint.formats.table import read_file
from outliermerge.checkpoint.sources import Checkpoint, Source, TensorMeta
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.storage.files import check_file
from outliermerge.storage.stamps import FileStamp, is_there


def open_adapter(
    folder: Path,
    base: Checkpoint,
    rename: Callable[[str], str] = lambda name: name,
    tied: Callable[[str], str | None] = lambda name: None,
) -> Checkpoint:
    """Return the model that a base with an adapter is.

    Args:
        folder: the folder with adapter_config.json and adapter_model.safetensors or .bin.
        base: the model that the adapter changes.
        rename: maps the adapter's names for the base's tensors to the base's own names.
        tied: maps the name of a tied head that the base does not store to its embeddings.

    Returns:
        The base's tensors in their order, then tensors that only the adapter has. Tensors that the
        adapter changes are computed when they are read.

    Raises:
        OutlierMergeError: an adapter of another kind than LoRA, one that cannot be merged, or one
            that does not fit the base.
    """
    return _Adapter(folder, base, rename, tied).checkpoint()


class _Adapter:
    def __init__(
        self,
        folder: Path,
        base: Checkpoint,
        rename: Callable[[str], str],
        tied: Callable[[str], str | None],
    ) -> None:
        self.folder, self.base, self.rename = folder, base, rename
        self.config = read_adapter_config(folder)
        self.kind = str(self.config["peft_type"])
        self.patterns = LayerPatterns(folder / CONFIG_NAME, self.config)
        self.file = next(folder / name for name in FILE_NAMES if is_there(folder / name))
        check_file(self.file, folder)
        metas, _, _ = read_file(self.file)
        if not metas:
            raise self.refuse("holds no tensors. Save the adapter again.")
        refuse_ungathered(metas)
        self.other_files, self.notes = beside_adapter(self.file, FILE_NAMES, metas)
        self.modules: dict[str, LayerParts] = {}
        self.whole: dict[str, TensorMeta] = {}
        for meta in metas:
            name = meta.name.removeprefix(PREFIX)
            match = KEY.match(name)
            if match and match["part"].startswith(OWN_PARTS.get(self.kind, ("lora_", "token_"))):
                part = match["part"]
                if part in ("lora_A", "lora_B"):
                    part += f".{match['end']}"
                parts = self.modules.setdefault(match["module"], LayerParts()).parts
                if (other := parts.setdefault(part, meta)) is not meta:
                    raise self.refuse(f"{other.name!r} and {meta.name!r} are the same factor")
            elif match:
                raise self.refuse(f"tensor {meta.name!r} is not of an adapter of type {self.kind}")
            elif "lora_" in name or "token_adapter.trainable" in name:
                raise self.refuse(f"tensor {meta.name!r} is of no known kind")
            elif ".original_module." not in name:  # the same as in the base
                self._add_whole(WRAPPED.sub(".", name), meta)
        self._check_names()
        names = [rename(name) for name in (*(f"{m}.weight" for m in self.modules), *self.whole)]
        heads = {name: tied(name) for name in names if name not in base.tensors}
        found = {name: base.tensors[original] for name, original in heads.items() if original}
        self.base = replace(base, tensors={**base.tensors, **found})

        self.seen_transposed: set[bool] = set()

    def _add_whole(self, name: str, meta: TensorMeta) -> None:
        # With bias="all", peft saves a bias of modules_to_save twice.
        other = self.whole.setdefault(name, meta)
        if other is not meta and ".modules_to_save." not in other.name + meta.name:
            raise self.refuse(f"{other.name!r} and {meta.name!r} are the same tensor of the base")

    def _check_names(self) -> None:
        unknown = [
            meta.name
            for name, meta in self.whole.items()
            if self.rename(name) not in self.base.tensors and not is_saved_whole(self.config, name)
        ]
        if unknown:
            raise self.refuse(
                f"it holds tensors that are neither LoRA's nor the base's:\n{listing(unknown)}\n"
                "If the base names them otherwise, `rename` on this model maps the names."
            )
        origin: dict[str, str] = {}
        names = [*(f"{module}.weight" for module in self.modules), *self.whole]
        for name in dict.fromkeys(names):
            if (other := origin.setdefault(self.rename(name), name)) != name:
                raise self.refuse(f"{other!r} and {name!r} both become {self.rename(name)!r}")

    def refuse(self, what: str) -> OutlierMergeError:
        return OutlierMergeError(f"{self.file}: {what}")

    def checkpoint(self) -> Checkpoint:
        tensors = dict(self.base.tensors)
        for name, meta in self.whole.items():
            target = self.rename(name)
            tensors[target] = in_dtype_of(meta, self.base.tensors.get(target))
        self._check_targets(tensors)
        self._check_promises()
        self.seen_transposed = self._told_by_shapes(tensors)
        for module, found in self.modules.items():
            self._change(tensors, module, found)
        return replace(
            self.base,
            root=self.folder,
            tensors=tensors,
            weight_files=(*self.base.weight_files, FileStamp.of(self.file)),
            sidecars=(),
            left_behind=(),
            notes=(
                *self.base.notes,
                self._note(),
                *notes_of(self.config, self.layers, self.base.tensors),
                *self.notes,
            ),
            other_files=(*self.base.other_files, *self.other_files),
        )

    def _note(self) -> str:
        kind = "DoRA" if self.config.get("use_dora") else "LoRA"
        kind = {SCALED_LORA: "scaled LoRA", SCALED_NOISE: "scaled noise"}.get(self.kind, kind)
        kind = f"rank-stabilised {kind}" if self.config.get("use_rslora") else kind
        pairs = (found.pair() for found in self.modules.values())
        ranks = sorted({pair[0].shape[0] for pair in pairs if pair})
        kind += f" (r={', '.join(map(str, ranks))})" if ranks else ""
        whole = f", {len(self.whole)} tensors stored whole" if self.whole else ""
        return f"{kind} of {len(self.modules)} layers{whole}, computed when it is read"

    def _check_promises(self) -> None:
        tokens = [
            module
            for module, found in self.modules.items()
            if "token_adapter.trainable_tokens_delta" in found.parts
        ]
        self.layers = {m: self._names(m) for m in self.modules if m not in tokens}
        base = self.base.tensors
        broken = broken_promises(self.config, self.patterns, self.layers, tokens, self.whole, base)
        for what in broken:
            raise self.refuse(f"{CONFIG_NAME}: {what}")

    def _check_targets(self, tensors: Mapping[str, Source]) -> None:
        absent = [
            target
            for module in self.modules
            if (target := self.rename(f"{module}.weight")) not in tensors
        ]
        if not absent:
            return
        head = [name for name in absent if name.endswith("lm_head.weight")]
        if head == absent and not stores_head(self.base.tensors):
            raise self.refuse(
                f"it changes {head[0]}, which {self.base.root} ties to its embeddings. The two "
                "would part: untie them in the base first, then take that as the base model."
            )
        raise self.refuse(
            f"it changes tensors that {self.base.root} does not have:\n{listing(absent)}\n"
            f"That has for example {next(iter(self.base.tensors), 'none')!r}; `rename` on this "
            "model maps the adapter's names to those."
        )

    def _told_by_shapes(self, tensors: Mapping[str, Source]) -> set[bool]:
        """Return whether weights are stored transposed, for those whose shapes show it."""
        ways = set()
        for module, found in self.modules.items():
            pair = self._pair(module, found)
            if pair is not None and not pair[2]:
                shape = tensors[self.rename(f"{module}.weight")].shape
                fits = makes(shape, pair, transposed=False), makes(shape, pair, transposed=True)
                if fits[0] != fits[1]:
                    ways.add(fits[1])
        return ways

    def _pair(self, module: str, found: LayerParts) -> tuple[TensorMeta, TensorMeta, bool] | None:
        try:
            return found.pair()
        except KeyError as error:
            raise self.refuse(f"{shown(module)}: has no {error.args[0]}") from error

    def _change(self, tensors: dict[str, Source], module: str, found: LayerParts) -> None:
        target = self.rename(f"{module}.weight")
        parts = dict(found.parts)
        base = tensors[target]
        if (new := parts.pop("token_adapter.trainable_tokens_delta", None)) is not None:
            if parts:
                raise self.refuse(f"{shown(module)}: LoRA and trainable tokens in one layer")
            tensors[target] = self._replaced_rows(module, base, new)
            return
        if self.kind == SCALED_NOISE:
            tensors[target] = self._noisy(module, base, parts)
            return
        pair = self._pair(module, found)
        if pair is None:
            raise self.refuse(f"{shown(module)}: has {', '.join(parts)} without lora_A and lora_B")
        lora_a, lora_b, is_embedding = pair
        for source in (base, lora_a, lora_b):
            if not source.dtype.is_float:
                raise self.refuse(f"{shown(source.name)}: is {source.dtype.name}, expected floats")
        if is_embedding and not makes(base.shape, pair, transposed=True):
            raise self._misfit(module, base.shape, pair)
        scale = self._scale(module, lora_a)
        low_rank = LowRankSum(
            name=base.name,
            shape=base.shape,
            out_dtype=base.out_dtype,
            base=base,
            lora_a=lora_a,
            lora_b=lora_b,
            scale=scale,
            transposed=is_embedding or self._is_transposed(module, base.shape, pair),
        )
        if self.kind == SCALED_LORA:
            tensors[target] = self._scaled(module, low_rank, parts)
            return
        magnitude = parts.pop("lora_magnitude_vector", None)
        is_dora = bool(self.config.get("use_dora"))
        if (magnitude is not None) != is_dora:
            has = "a" if magnitude else "no"
            raise self.refuse(
                f"{shown(module)}: has {has} lora_magnitude_vector, but use_dora is {is_dora} in "
                f"{CONFIG_NAME}"
            )
        tensors[target] = self._rescaled(module, low_rank, magnitude) if magnitude else low_rank
        if (change := parts.pop("lora_B.bias", None)) is not None:
            self._shift_bias(tensors, module, change, scale)
        if left := [part for part, meta in parts.items() if meta not in (lora_a, lora_b)]:
            raise self.refuse(f"{shown(module)}: {', '.join(left)} has no use")

    def _is_transposed(
        self, module: str, shape: tuple[int, ...], pair: tuple[TensorMeta, TensorMeta, bool]
    ) -> bool:
        """Tell whether a layer stores its weight (in, out), as GPT-2's Conv1D does.

        The config's fan_in_fan_out holds for the layer that was adapted last, so shapes decide
        first.
        """
        fits = makes(shape, pair, transposed=False), makes(shape, pair, transposed=True)
        if not any(fits):
            raise self._misfit(module, shape, pair)
        if not all(fits):
            return fits[1]
        said = bool(self.config.get("fan_in_fan_out"))
        if self.seen_transposed <= {said}:
            return said
        advice = (
            "Merge it with peft's merge_and_unload(), then save_pretrained()."
            if said in self.seen_transposed
            else f"Correct it in {CONFIG_NAME}."
        )
        raise self.refuse(
            f"{shown(module)}: its weight {list(shape)} is square, so its shape does not tell "
            "whether it "
            f"is stored transposed, and fan_in_fan_out {said} is wrong for other layers. {advice}"
        )

    def _misfit(
        self, module: str, shape: tuple[int, ...], pair: tuple[TensorMeta, TensorMeta, bool]
    ) -> OutlierMergeError:
        return self.refuse(
            f"{shown(module)}: A {list(pair[0].shape)} and B {list(pair[1].shape)} do not make a "
            "change "
            f"of {list(shape)}: is it an adapter of {self.base.root}?"
        )

    def _names(self, module: str) -> list[str]:
        """Return the names that a layer may have: as in training, without wrappers, in the base."""
        renamed = self.rename(f"{module}.weight").removesuffix(".weight")
        return list(dict.fromkeys([module, without_wrappers(module), renamed]))

    def _scale(self, module: str, lora_a: TensorMeta) -> float:
        names = self._names(module)
        rank = self.patterns.value(self.config.get("rank_pattern"), names, self.config.get("r"))
        alphas = self.config.get("alpha_pattern")
        alpha = self.patterns.value(alphas, names, self.config.get("lora_alpha"))
        if not lora_a.shape or lora_a.shape[0] != rank:
            raise self.refuse(
                f"{shown(module)}: A {list(lora_a.shape)} is not of rank {rank}, as {CONFIG_NAME} "
                "says"
            )
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not rank:
            raise self.refuse(f"{shown(module)}: lora_alpha {alpha!r} and r {rank!r} give no scale")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _noisy(self, module: str, base: Source, parts: dict[str, TensorMeta]) -> NoiseSum:
        s = self._scalar(module, base, parts.pop("scaled_noise_s"))
        return NoiseSum(
            name=base.name,
            shape=base.shape,
            out_dtype=base.out_dtype,
            base=base,
            s=s,
            seed=self.config["seed"],
            module=module,
        )

    def _scaled(self, module: str, sum_: LowRankSum, parts: dict[str, TensorMeta]) -> ScaledSum:
        s = parts.get("scaled_lora_s")
        if bool(self.config.get("train_scale")) != (s is not None):
            raise self.refuse(
                f"{shown(module)}: has {'a' if s else 'no'} scaled_lora_s, but train_scale is "
                f"{self.config.get('train_scale')} in {CONFIG_NAME}"
            )
        s = self._scalar(module, sum_.base, s) if s else None
        return ScaledSum(**{one.name: getattr(sum_, one.name) for one in fields(sum_)}, s=s)

    def _scalar(self, module: str, base: Source, s: TensorMeta) -> TensorMeta:
        if s.num_elements != 1 or not s.dtype.is_float or not base.dtype.is_float:
            raise self.refuse(
                f"{shown(module)}: {s.name} is {s.dtype.name} {list(s.shape)} and its weight "
                f"{base.dtype.name}, expected one float and floats"
            )
        return s

    def _rescaled(self, module: str, low_rank: LowRankSum, magnitude: TensorMeta) -> Rescaled:
        outputs = low_rank.num_columns if low_rank.transposed else low_rank.num_rows
        if magnitude.num_elements != outputs:
            raise self.refuse(
                f"{shown(module)}: lora_magnitude_vector has {magnitude.num_elements} values, "
                "expected "
                f"{outputs}"
            )
        return Rescaled(**_as(low_rank), direction=low_rank, magnitude=magnitude)

    def _shift_bias(
        self, tensors: dict[str, Source], module: str, change: TensorMeta, scale: float
    ) -> None:
        target = self.rename(f"{module}.bias")
        base = tensors.get(target)
        if base is None or base.shape != change.shape:
            raise self.refuse(
                f"{shown(module)}: lora_bias needs a bias {list(change.shape)} in the base"
            )
        tensors[target] = ShiftedBias(**_as(base), base=base, change=change, scale=scale)

    def _replaced_rows(self, module: str, base: Source, new: TensorMeta) -> ReplacedRows:
        said = self.config.get("trainable_token_indices")
        if isinstance(said, Mapping):
            said = next(
                (rows for name, rows in said.items() if self.patterns.ends_with(module, name)), None
            )
        indices = tuple(said) if isinstance(said, list) else ()
        valid = all(type(index) is int and 0 <= index < base.shape[0] for index in indices)
        if not indices or not valid or new.shape != (len(indices), *base.shape[1:]):
            raise self.refuse(
                f"{shown(module)}: {list(new.shape)} rows do not fit trainable_token_indices "
                f"({len(indices)}) and the base's {list(base.shape)}"
            )
        return ReplacedRows(**_as(base), dtype=base.dtype, base=base, new=new, indices=indices)


def _as(source: Source) -> dict[str, Any]:
    """Return the attributes that a computed tensor takes from the tensor that it changes."""
    return {"name": source.name, "shape": source.shape, "out_dtype": source.out_dtype}
