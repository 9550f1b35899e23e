"""What an adapter holds: factors, modules that are whole, biases, and the config that says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.adapters.products import ExpertSum
from outliermerge.checkpoint.adapters.tensors import LowRankSum
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import DTYPES, DType
from outliermerge.errors import OutlierMergeError, argument, shown
from outliermerge.extraction.classes import Classes
from outliermerge.extraction.experts import turned
from outliermerge.extraction.factors import Factors, matrix_shape
from outliermerge.extraction.holding import EXPERTS, PARAMETERS, How, Model
from outliermerge.extraction.pair import Pairs
from outliermerge.extraction.peft_config import peft_config, saved_whole
from outliermerge.extraction.reading import blocks
from outliermerge.extraction.report import Extracted
from outliermerge.extraction.written import AdapterFolder

if TYPE_CHECKING:
    from torch import Tensor

_TIED_BY_PEFT = "embed_tokens"
_PREFIX = "base_model.model."


class Contents:
    """What an adapter in the making holds.

    Attributes:
        found: the tensors that it changes, by name.

    Args:
        pairs: the model and its base.
        model: what is known of the model.
        hows: by name of a tensor how it would be held.
        classes: the kinds of the model's modules, where they are known.
    """

    def __init__(
        self, pairs: Pairs, model: Model, hows: Mapping[str, How], classes: Classes
    ) -> None:
        self.pairs, self.tensors, self.model = pairs, pairs.tensors, model
        self.hows, self.classes = hows, classes
        self.found: dict[str, Extracted] = {}
        self._whole: dict[str, None] = {}
        self._ranks: dict[str, int] = {}  # by name of a module
        self._parameters: dict[str, int] = {}  # by name of a tensor
        self._norms: dict[str, float] = {}  # of what is saved whole
        self._heads_apart: set[str] = set()
        self._has_biases = False

    def names(self) -> Iterator[str]:
        """Yield the names that the file may have, or ones as long."""
        for name in [*self.tensors, *self.pairs.heads]:
            module = name.rpartition(".")[0]
            yield f"{_PREFIX}{module}.lora_embedding_A"
            yield f"{_PREFIX}{module}.lora_embedding_B"
            yield f"{_PREFIX}{module}.base_layer.{name.rpartition('.')[2]}"
            if self.hows.get(name) in PARAMETERS:
                levels = ".base_layer" * len(self.model.members(module))
                yield from (f"{_PREFIX}{module}{levels}.lora_{part}.weight" for part in "AB")

    def write_factors(
        self, names: Sequence[str], made: Sequence[Factors | None], dtype: DType,
        folder: AdapterFolder,
    ) -> None:  # fmt: skip
        """Write what was made of the matrices of a module, in the order of its class.

        If one of them takes less than its factors, the module is saved whole.
        """
        changed = {name: one for name, one in zip(names, made, strict=True) if one}
        is_whole = any(one.b_Rr is None for one in changed.values())
        facts: dict[str, Any] = {}
        for level, (name, one) in enumerate(reversed(changed.items())):
            before = folder.num_bytes
            if not is_whole and one.b_Rr is not None and one.a_rC is not None:
                for key, tensor in self._keys(name, one.b_Rr, one.a_rC, level):
                    folder.add(key, dtype, tuple(tensor.shape), [tensor])
            rank, error = (0, 0.0) if is_whole else (one.rank, one.error)
            facts[name] = [rank, one.norm, error, folder.num_bytes - before, one.worst]
        folder.record(f"factors of {names[0]}", facts)
        self.take_factors(facts)

    def take_factors(self, facts: Mapping[str, Any]) -> None:
        """Note what is written of the matrices of a module."""
        for name, (rank, norm, error, num_bytes, worst) in facts.items():
            module = name.rpartition(".")[0]
            if not rank:
                self._whole[module], self._norms[name] = None, norm
                continue
            if self.hows[name] in PARAMETERS:
                self._parameters[name] = rank
            else:
                self._ranks[module] = rank
            if self.hows[name] == "embedding" and not name.endswith(f"{_TIED_BY_PEFT}.weight"):
                heads = (head.rpartition(".")[0] for head in self._heads_of(name))
                self._ranks |= dict.fromkeys(heads, rank)
            self._add(name, rank, norm, error, num_bytes, worst)

    def _keys(
        self, name: str, b_Rr: Tensor, a_rC: Tensor, level: int = 0
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and values of the factors, as peft's layer of that kind has them.

        Args:
            level: how many parameters of the module come later, as peft wraps it once for each.
        """
        how, shape = self.hows[name], self.tensors[name][1].shape
        module = _PREFIX + name.rpartition(".")[0] + ".base_layer" * level
        if how == "embedding":
            yield f"{module}.lora_embedding_A", b_Rr.T
            yield f"{module}.lora_embedding_B", a_rC.T
            for head in self._heads_of(name):
                module = _PREFIX + head.rpartition(".")[0]
                yield f"{module}.lora_A.weight", a_rC
                yield f"{module}.lora_B.weight", b_Rr
            return
        if how == "transposed":
            a_rC, b_Rr = b_Rr.T, a_rC.T
        elif how == "turned experts":
            b_Rr, a_rC = turned(b_Rr, a_rC, shape[0])
        elif how == "convolution":
            a_rC = a_rC.view(-1, *shape[1:])
            b_Rr = b_Rr[:, :, None, None]
        yield f"{module}.lora_A.weight", a_rC
        yield f"{module}.lora_B.weight", b_Rr

    def _heads_of(self, original: str) -> list[str]:
        return [head for head, other in self.pairs.heads.items() if other == original]

    def _add(
        self, name: str, rank: int, norm: float, error: float, num_bytes: int,
        worst: float | None = None,
    ) -> None:  # fmt: skip
        how = self.hows[name] if rank or self.hows[name] == "bias" else "whole"
        shape = self.tensors[name][1].shape
        self.found[name] = Extracted(name, shape, how, rank, norm, error, num_bytes, worst)

    @property
    def _wrapped(self) -> dict[str, None]:
        """The modules that peft wraps for factors."""
        return dict.fromkeys([*self._ranks, *(n.rpartition(".")[0] for n in self._parameters)])

    def write_whole(
        self, reader: Reader, folder: AdapterFolder, changed: Mapping[str, float]
    ) -> None:
        """Write the modules that are saved whole, with all tensors that they have."""
        modules = [n.rpartition(".")[0] for n in changed if self.hows[n] == "whole"]
        self._whole |= dict.fromkeys(modules)
        every = dict.fromkeys(name.rpartition(".")[0] for name in self.tensors)
        self._whole = dict.fromkeys(saved_whole(self._whole, every))
        if clash := next((module for module in self._whole if module in self._wrapped), None):
            raise OutlierMergeError(
                f"{shown(clash)}: ends with the name of a module that is saved whole, and peft "
                f"tells them apart by their ends. {argument('rank')} factors all matrices"
            )
        keys = {name: name for module in self._whole for name in self.model.members(module)}
        for head, original in self.pairs.heads.items():
            module = head.rpartition(".")[0]
            if {module, original.rpartition(".")[0]} & self._whole.keys():
                keys |= {head: original, **{name: name for name in self.model.members(module)}}
                self._heads_apart.add(module)
        for key, name in keys.items():
            self._write(_PREFIX + key, name, reader, folder)
            norm = changed.get(name, self._norms.get(name, 0.0))
            if norm and key == name:
                self._add(name, 0, norm, 0.0, folder.bytes_of(_PREFIX + key))

    def write_biases(
        self, reader: Reader, folder: AdapterFolder, changed: Mapping[str, float]
    ) -> None:
        """Write the biases that have changed, beside the factors."""
        for name, norm in changed.items():
            module = name.rpartition(".")[0]
            if self.hows[name] != "bias" or name in self.found:
                continue
            inner = "base_layer.bias" if module in self._wrapped else "bias"
            key = f"{_PREFIX}{module}.{inner}"
            self._write(key, name, reader, folder)
            self._add(name, 0, norm, 0.0, folder.bytes_of(key))
            self._has_biases = True

    def _write(self, key: str, name: str, reader: Reader, folder: AdapterFolder) -> None:
        """Write a tensor of the model, unless an earlier run has."""
        source = self.tensors[name][1]
        if not folder.has(key):
            folder.add(key, source.dtype, source.shape, blocks(source, reader))
            folder.record(key, None)
        reader.release([(0, source)])

    def write_nothing(self, folder: AdapterFolder) -> None:
        """Give an adapter without factors those of a change of 0: peft loads none without."""
        import torch

        if self._wrapped:
            return
        linear = [n.removesuffix(".weight") for n, how in self.hows.items() if how == "linear"]
        free = [m for m in linear if self.classes.may_have(m) and m not in self._whole]
        if not free:
            raise OutlierMergeError(
                f"{shown(self.pairs.model.reference)}: the factors of each matrix would be larger "
                f"than the matrix itself. Give {argument('rank')}, a smaller "
                f"{argument('energy')} or a larger {argument('error')}"
            )
        name = f"{free[0]}.weight"
        rows, columns = matrix_shape(self.tensors[name][0])
        for key, tensor in self._keys(name, torch.zeros(rows, 1), torch.zeros(1, columns)):
            if not folder.has(key):
                folder.add(key, DTYPES["float32"], tuple(tensor.shape), [tensor])
        self._ranks[free[0]] = 1

    def config(self) -> dict[str, object]:
        """Return what adapter_config.json says.

        Raises:
            OutlierMergeError: the model's class has no modules of these names.
        """
        self.classes.refuse_unknown([*self._wrapped, *self._whole])
        tied = {original.rpartition(".")[0] for original in self.pairs.heads.values()}
        tied &= {*self._whole, *self._ranks}
        # peft sees embeddings of other names by their head.
        is_named = any(name.endswith(_TIED_BY_PEFT) for name in tied)
        # What the model lacks, peft finds in the base: the names of targets must not mean it, too.
        in_base = self.pairs.base.checkpoint.tensors
        return peft_config(
            base=self.pairs.base.reference,
            architectures=self.pairs.architectures,
            ranks=self._ranks,
            parameters=self._parameters,
            whole=[*self._whole, *(() if is_named else self._heads_apart)],
            all_modules=self.model.all_modules | {name.rpartition(".")[0] for name in in_base},
            all_tensors={**self.tensors, **in_base},
            has_biases=self._has_biases,
            is_tied=bool(tied),
            is_transposed="transposed" in {self.hows.get(f"{m}.weight") for m in self._ranks},
        )


def is_factored(source: object, how: str) -> bool:
    """Tell whether a tensor that is read of an adapter is what was written of it."""
    kind = ExpertSum if how in EXPERTS else LowRankSum
    return isinstance(source, kind) and source.scale == 1.0
