"""PEFT adapters as models: the base's tensors as the adapter changes them, computed when read.

The file layout is that of peft 0.21's `get_peft_model_state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from outliermerge.checkpoint.adapters.config import (
    BESIDE_NAMES,
    CONFIG_NAME,
    FILE_NAMES,
    SCALED_LORA,
    SCALED_NOISE,
    LayerPatterns,
    is_saved_whole,
    read_adapter_config,
)
from outliermerge.checkpoint.adapters.context import Context
from outliermerge.checkpoint.adapters.ia3 import Ia3Layers
from outliermerge.checkpoint.adapters.keys import (
    FACTOR,
    KEY,
    OWN_PARTS,
    PREFIX,
    WRAPPED,
    LayerParts,
)
from outliermerge.checkpoint.adapters.lora import LoraLayers
from outliermerge.checkpoint.adapters.lycoris import LycorisLayers
from outliermerge.checkpoint.adapters.packed import PackedLayers
from outliermerge.checkpoint.adapters.promises import broken_promises, notes_of
from outliermerge.checkpoint.adapters.tensors import (
    ReplacedRows,
    as_of,
    in_dtype_of,
    stores_head,
)
from outliermerge.checkpoint.folders.copies import beside_adapter
from outliermerge.checkpoint.folders.foreign import refuse_ungathered
from outliermerge.checkpoint.formats.table import read_file
from outliermerge.checkpoint.sources import Checkpoint, Source, TensorMeta
from outliermerge.errors import OutlierMergeError, listing, shown
from outliermerge.storage.files import check_file
from outliermerge.storage.stamps import FileStamp, is_there

_TOKENS = "token_adapter.trainable_tokens_delta"
_Layers = LoraLayers | LycorisLayers | Ia3Layers
_KINDS: dict[str, type[_Layers]] = {
    "IA3": Ia3Layers,
    "LOHA": LycorisLayers,
    "LOKR": LycorisLayers,
}  # all others are LoRA's
_NAMES = {
    "IA3": "(IA)³",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    SCALED_LORA: "scaled LoRA",
    SCALED_NOISE: "scaled noise",
}


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
        OutlierMergeError: an adapter of a kind that is not read, one that cannot be merged, or one
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
            elif FACTOR.search(name):
                raise self.refuse(f"tensor {meta.name!r} is of no known kind")
            elif ".original_module." not in name:  # the same as in the base
                self._add_whole(WRAPPED.sub(".", name), meta)
        beside = [folder / name for name in BESIDE_NAMES if is_there(folder / name)]
        self.files = [self.file, *filter(self._adds_trained, beside)]
        self.other_files, self.notes = beside_adapter(self.files, FILE_NAMES, metas)
        self.context = Context(self.file, self.config, self.patterns, self.base, self.rename)
        self.packed = PackedLayers(self.context, self.modules)
        self._check_names()
        names = [rename(name) for name in self._changed_names()]
        heads = {name: tied(name) for name in names if name not in base.tensors}
        found = {name: base.tensors[original] for name, original in heads.items() if original}
        self.base = replace(base, tensors={**base.tensors, **found})
        self.context = replace(self.context, base=self.base)

    def _changed_names(self) -> list[str]:
        """Return the names of the tensors that it changes or replaces, as it has them."""
        return [*(f"{m}.weight" for m in self.modules), *self.packed.parameters, *self.whole]

    def _add_whole(self, name: str, meta: TensorMeta) -> None:
        # With bias="all", peft saves a bias of modules_to_save twice.
        other = self.whole.setdefault(name, meta)
        if other is not meta and ".modules_to_save." not in other.name + meta.name:
            raise self.refuse(f"{other.name!r} and {meta.name!r} are the same tensor of the base")

    def _adds_trained(self, file: Path) -> bool:
        """Add what LLaVA's trainer saved of other weights, such as the projector, by its rules.

        Returns:
            Whether it is read: where the base has none of it, it is for another kind of model.
        """
        check_file(file, self.folder)
        metas, _, _ = read_file(file)
        refuse_ungathered(metas)
        starts = ("model." if m.name.startswith("model.model.") else PREFIX for m in metas)
        names = [
            (WRAPPED.sub(".", meta.name.removeprefix(start)), meta)
            for meta, start in zip(metas, starts, strict=True)
        ]
        if not any(self.rename(name) in self.base.tensors for name, _ in names):
            return False
        for name, meta in names:
            if FACTOR.search(name):
                raise OutlierMergeError(f"{file}: tensor {meta.name!r} is of an adapter")
            self._add_whole(name, meta)
        return True

    def _check_names(self) -> None:
        unknown = [
            f"{meta.name} ({meta.path.name})" if meta.path != self.file else meta.name
            for name, meta in self.whole.items()
            if self.rename(name) not in self.base.tensors and not is_saved_whole(self.config, name)
        ]
        if unknown:
            raise self.refuse(
                f"it holds tensors that are neither LoRA's nor the base's:\n{listing(unknown)}\n"
                "If the base names them otherwise, `rename` on this model maps the names; if it "
                "lacks a part that was trained (a projector), take a base that has it."
            )
        origin: dict[str, str] = {}
        for name in dict.fromkeys(self._changed_names()):
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
        self._change(tensors)
        return replace(
            self.base,
            root=self.folder,
            tensors=tensors,
            weight_files=(*self.base.weight_files, *map(FileStamp.of, self.files)),
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
        kind = _NAMES.get(self.kind, "DoRA" if self.config.get("use_dora") else "LoRA")
        kind = f"rank-stabilised {kind}" if self.config.get("use_rslora") else kind
        pairs = (found.pair() for found in self.modules.values())
        ranks = sorted({pair[0].shape[0] for pair in pairs if pair})
        kind += f" (r={', '.join(map(str, ranks))})" if ranks else ""
        what = [f"{len(self.modules)} layers"] if self.modules or not self.packed.owners else []
        what += [f"{len(self.packed.parameters)} parameters"] if self.packed.owners else []
        whole = f", {len(self.whole)} tensors stored whole" if self.whole else ""
        return f"{kind} of {' and '.join(what)}{whole}, computed when it is read"

    def _check_promises(self) -> None:
        tokens = [module for module, found in self.modules.items() if _TOKENS in found.parts]
        self.layers = {
            module: self.context.names(f"{module}.weight")
            for module in self.modules
            if module not in tokens
        }
        self.layers |= {name: self.packed.names(name) for name in self.packed.parameters}
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

    def _change(self, tensors: dict[str, Source]) -> None:
        """Put what the adapter changes in the place of the base's tensors."""
        self.packed.change(tensors)
        plain = {m: found for m, found in self.modules.items() if _TOKENS not in found.parts}
        kind: _Layers = _KINDS.get(self.kind, LoraLayers)(self.context, plain, tensors)
        for module, found in self.modules.items():
            if module in plain:
                kind.change(tensors, module, found)
                continue
            if len(found.parts) > 1:
                raise self.refuse(f"{shown(module)}: LoRA and trainable tokens in one layer")
            target = self.rename(f"{module}.weight")
            tensors[target] = self._replaced_rows(module, tensors[target], found.parts[_TOKENS])

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
        return ReplacedRows(**as_of(base), dtype=base.dtype, base=base, new=new, indices=indices)
