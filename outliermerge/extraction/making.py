"""An adapter in the making: what is compared, factored, saved whole, written and read back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from outliermerge.checkpoint.adapters.tensors import LowRankSum
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import DTYPES
from outliermerge.checkpoint.tokens import token_files
from outliermerge.errors import ArgumentError, OutlierMergeError, argument, listing, shown
from outliermerge.execution.threads import torch_threads
from outliermerge.extraction.classes import Classes
from outliermerge.extraction.factors import Change, Factors, factored, matrix_shape, most_bytes
from outliermerge.extraction.holding import FACTORED, How, Model, is_of_tokens
from outliermerge.extraction.low_rank import in_core_space, is_unchanged, joined, low_rank_of
from outliermerge.extraction.merges import reader_of_merges
from outliermerge.extraction.pair import Pairs
from outliermerge.extraction.peft_config import peft_config, saved_whole
from outliermerge.extraction.reading import blocks, difference, in_order
from outliermerge.extraction.report import Extracted, Extraction, Settings
from outliermerge.extraction.written import AdapterFolder
from outliermerge.planning.inputs import open_written
from outliermerge.planning.merged import bytes_of_merges
from outliermerge.storage.machine import keep_freed_memory, num_threads
from outliermerge.storage.stamps import current_watch

if TYPE_CHECKING:
    from torch import Tensor

TIED_BY_PEFT = "embed_tokens"
_PREFIX = "base_model.model."


class Making:
    """An adapter in the making.

    Args:
        pairs: the model and its base.
        settings: what is asked.
        device: torch's device.
        threads: as for `extract`.
        memory_bytes: most memory for what is computed at once.
        classes: the kinds of the model's modules, where they are known.

    Raises:
        ArgumentError: the memory is too little for one matrix.
    """

    def __init__(
        self,
        pairs: Pairs,
        settings: Settings,
        *,
        device: str,
        threads: int,
        memory_bytes: int,
        classes: Classes,
    ) -> None:
        self.pairs, self.settings = pairs, settings
        self.wanted = settings.wanted(of_merge=bool(pairs.model.made_of))
        self._device, self.tensors, self._memory_bytes = device, pairs.tensors, memory_bytes
        self.model = Model({name: pair[1] for name, pair in self.tensors.items()}, classes.kinds)
        self.classes = classes
        self.low_rank = {n: low for n, pair in self.tensors.items() if (low := low_rank_of(*pair))}
        self.hows: dict[str, How] = {name: self._how(name) for name in self.tensors}
        self.changing = {name for name, pair in self.tensors.items() if not is_unchanged(*pair)}
        self.matrices = [
            n for n, how in self.hows.items() if how in FACTORED and n in self.changing
        ]
        self._refuse_full_rank()
        needed = {
            name: bytes_of_merges(self.tensors[name]) + most_bytes(*self.tensors[name], self.wanted)
            for name in self.matrices
            if not self._is_small(name)
        }
        largest = max(needed, key=lambda name: needed[name], default="")
        self.peak_bytes = needed.get(largest, 0)
        if self.peak_bytes > memory_bytes:
            raise ArgumentError(
                f"{argument('memory')}: {memory_bytes:,} B is too little for {shown(largest)} "
                f"{list(self.tensors[largest][1].shape)}, which takes {self.peak_bytes:,} B to be "
                f"factored. Give {argument('memory', f'{-(-self.peak_bytes // 2**20)}MiB')} or more"
                + ("" if settings.randomized else f", or {argument('randomized', True)}")
            )
        most = memory_bytes // max(1, self.peak_bytes)
        self.workers = 1 if device != "cpu" else max(1, min(num_threads(threads), most))
        self._whole: dict[str, None] = {}
        self._ranks: dict[str, int] = {}
        self._found: dict[str, Extracted] = {}
        self._norms: dict[str, float] = {}  # of matrices of which the factors would be larger
        self._heads_apart: set[str] = set()
        self._has_biases = False

    def _how(self, name: str) -> How:
        base, model = self.tensors[name]
        if base.shape == model.shape and base.dtype.is_float and model.dtype.is_float:
            wanted = self.settings.factor_embeddings or name in self.low_rank
            return self.model.how(name, factor_embeddings=wanted)
        module = name.rpartition(".")[0]
        is_grown = base.dtype.is_float and model.dtype.is_float and is_of_tokens(module)
        return "whole" if is_grown and self.model.is_leaf(module) else "not held"

    def _is_small(self, name: str) -> bool:
        """Tell whether a matrix is made of the factors of adapters, and never whole."""
        low = self.low_rank.get(name)
        return low is not None and (low.coefficients is not None or self.settings.core)

    def _refuse_full_rank(self) -> None:
        """Refuse a merge whose changes are not of low rank, if they are to be kept exactly."""
        if self.wanted.is_bounded and not self.settings.core:
            return
        full = [name for name in self.matrices if not self._is_small(name)]
        if full and self.settings.core:
            raise OutlierMergeError(
                f"{shown(self.pairs.model.reference)}: core space merges LoRAs of one base, and "
                f"other things change:\n{listing(map(shown, full))}"
            )
        if full:
            raise ArgumentError(
                f"nothing says how much is kept, and the change of these tensors is no weighted "
                f"sum of LoRAs, which could be kept whole:\n{listing(map(shown, full), limit=5)}\n"
                f"Give {argument('rank')}, {argument('energy')} or {argument('error')}; or "
                f"{argument('core', True)}, which merges in a basis of the adapters"
            )

    @property
    def work_bytes(self) -> int:
        """The bytes of all passes."""
        return sum(
            (self.wanted.num_passes if self.hows[name] in FACTORED else 1)
            * sum(source.num_bytes for source in self.tensors[name])
            for name in self.changing
            if name not in self.matrices or not self._is_small(name)
        )

    def make(self, output: Path, on_progress: Callable[[int], None]) -> Extraction:
        """Write the adapter, and return what it is."""
        started = time.perf_counter()
        keep_freed_memory()
        with ExitStack() as stack:
            folder = stack.enter_context(AdapterFolder(output, list(self._names())))
            place = folder.final.parent
            reader = stack.enter_context(
                reader_of_merges(self._memory_bytes, self.workers, place)
                if self.pairs.model.made_of
                else Reader(folder=place)
            )
            alone = stack.enter_context(torch_threads())
            pool = stack.enter_context(ThreadPoolExecutor(self.workers, initializer=alone))
            stack.callback(pool.shutdown, cancel_futures=True)
            changed, left_out = self._compare(reader, pool, on_progress)
            self._write_factors(reader, pool, folder, on_progress)
            self._write_whole(reader, folder, changed)
            self._write_biases(reader, folder, changed)
            if not self._found:
                raise OutlierMergeError(
                    f"{shown(self.pairs.model.reference)}: has the values of "
                    f"{shown(self.pairs.base.reference)}: there is nothing to extract"
                )
            self._write_nothing(folder)
            self.classes.refuse_unknown([*self._ranks, *self._whole])
            folder.close_weights(self._config())
            self._read_back(folder.folder)
            result = Extraction(
                output=output,
                model=self.pairs.model.reference,
                base=self.pairs.base.reference,
                settings=self.settings,
                tensors=tuple(self._found[n] for n in self.tensors if n in self._found),
                num_unchanged=len(self.tensors) - len(self._found) - len(left_out),
                left_out=left_out,
                notes=self._notes(),
                num_bytes=folder.num_bytes,
                seconds=time.perf_counter() - started,
            )
            if (watched := current_watch()) is not None:
                watched.check()
            report = result.as_dict()
            del report["seconds"]  # so that the same command writes the same bytes
            folder.finish(report, self._tokenizer())
        return result

    def _compare(
        self, reader: Reader, pool: ThreadPoolExecutor, on_progress: Callable[[int], None]
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Return the norms of changes of what is not factored, and what no adapter can hold."""
        for message, head, twins in self.pairs.twins:
            if difference(head, *twins, reader):
                raise OutlierMergeError(message)
        others = [n for n, how in self.hows.items() if how not in FACTORED and n in self.changing]

        def compare(name: str) -> float:
            norm = difference(name, *self.tensors[name], reader)
            on_progress(sum(source.num_bytes for source in self.tensors[name]))
            return norm

        norms = dict(zip(others, in_order(pool, compare, others, self.workers), strict=True))
        changed = {name: norm for name, norm in norms.items() if norm}
        held = {name for name in changed if self.hows[name] != "not held"}
        left_out = {name: self._why_not(name) for name in changed if name not in held}
        left_out |= self.pairs.apart
        if left_out and not self.settings.partial:
            rows = listing(f"{shown(name)}: {why}" for name, why in left_out.items())
            raise OutlierMergeError(
                f"{shown(self.pairs.model.reference)}: an adapter of "
                f"{shown(self.pairs.base.reference)} cannot hold:\n{rows}\n"
                f"{argument('partial', True)} makes one without them, and lists them."
            )
        return {name: changed[name] for name in changed if name in held}, left_out

    def _why_not(self, name: str) -> str:
        base, model = self.tensors[name]
        if base.shape != model.shape:
            return f"is {list(base.shape)} in the base, and {list(model.shape)}"
        if not (base.dtype.is_float and model.dtype.is_float):
            return f"is {model.dtype.name}"
        return "is a parameter of a module that has other modules, or experts in one tensor"

    def _names(self) -> Iterator[str]:
        """Yield the names that the file may have, or ones as long."""
        for name in [*self.tensors, *self.pairs.heads]:
            module = name.rpartition(".")[0]
            yield f"{_PREFIX}{module}.lora_embedding_A"
            yield f"{_PREFIX}{module}.lora_embedding_B"
            yield f"{_PREFIX}{module}.base_layer.{name.rpartition('.')[2]}"

    def _write_factors(
        self,
        reader: Reader,
        pool: ThreadPoolExecutor,
        folder: AdapterFolder,
        on_progress: Callable[[int], None],
    ) -> None:
        def factor(name: str) -> Factors | None:
            base, model = self.tensors[name]
            if self._is_small(name):
                merge = in_core_space if self.settings.core else joined
                return merge(self.low_rank[name], reader, self.wanted)
            change = Change(
                name, base, model, reader=reader, device=self._device, on_progress=on_progress
            )
            found = factored(change, self.wanted)
            reader.release(enumerate((base, model)))
            return found

        reader.read_ahead(enumerate(self.tensors[name]) for name in self.matrices)
        results = in_order(pool, factor, self.matrices, self.workers)
        for name, found in zip(self.matrices, results, strict=True):
            if found is None:
                continue
            if found.b_Rr is None or found.a_rC is None:
                self._whole[name.rpartition(".")[0]] = None
                self._norms[name] = found.norm
                continue
            before = folder.num_bytes
            for key, tensor in self._keys(name, found.b_Rr, found.a_rC):
                folder.add(key, self.wanted.dtype, tuple(tensor.shape), iter([tensor]))
            self._ranks[name.rpartition(".")[0]] = found.rank
            self._add(name, found.rank, found.norm, found.error, folder.num_bytes - before)

    def _keys(self, name: str, b_Rr: Tensor, a_rC: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and values of the factors, as peft's layer of that kind has them."""
        how, module = self.hows[name], _PREFIX + name.rpartition(".")[0]
        if how == "embedding":
            yield f"{module}.lora_embedding_A", b_Rr.T
            yield f"{module}.lora_embedding_B", a_rC.T
            for head in self._heads_of(name):
                if not name.endswith(f"{TIED_BY_PEFT}.weight"):
                    self._ranks[head.rpartition(".")[0]] = a_rC.shape[0]
                module = _PREFIX + head.rpartition(".")[0]
                yield f"{module}.lora_A.weight", a_rC
                yield f"{module}.lora_B.weight", b_Rr
            return
        if how == "transposed":
            a_rC, b_Rr = b_Rr.T, a_rC.T
        elif how == "convolution":
            a_rC = a_rC.view(-1, *self.tensors[name][1].shape[1:])
            b_Rr = b_Rr[:, :, None, None]
        yield f"{module}.lora_A.weight", a_rC
        yield f"{module}.lora_B.weight", b_Rr

    def _heads_of(self, original: str) -> list[str]:
        return [head for head, other in self.pairs.heads.items() if other == original]

    def _add(self, name: str, rank: int, norm: float, error: float, num_bytes: int) -> None:
        how = self.hows[name] if rank or self.hows[name] == "bias" else "whole"
        shape = self.tensors[name][1].shape
        self._found[name] = Extracted(name, shape, how, rank, norm, error, num_bytes)

    def _write_whole(
        self, reader: Reader, folder: AdapterFolder, changed: Mapping[str, float]
    ) -> None:
        """Write the modules that are saved whole, with all tensors that they have."""
        modules = [n.rpartition(".")[0] for n in changed if self.hows[n] == "whole"]
        self._whole |= dict.fromkeys(modules)
        every = dict.fromkeys(name.rpartition(".")[0] for name in self.tensors)
        self._whole = dict.fromkeys(saved_whole(self._whole, every))
        if clash := next((module for module in self._whole if module in self._ranks), None):
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
            source, before = self.tensors[name][1], folder.num_bytes
            folder.add(_PREFIX + key, source.dtype, source.shape, blocks(source, reader))
            reader.release([(0, source)])
            norm = changed.get(name, self._norms.get(name, 0.0))
            if norm and key == name:
                self._add(name, 0, norm, 0.0, folder.num_bytes - before)

    def _write_biases(
        self, reader: Reader, folder: AdapterFolder, changed: Mapping[str, float]
    ) -> None:
        for name, norm in changed.items():
            module = name.rpartition(".")[0]
            if self.hows[name] != "bias" or name in self._found:
                continue
            inner = "base_layer.bias" if module in self._ranks else "bias"
            source, before = self.tensors[name][1], folder.num_bytes
            key = f"{_PREFIX}{module}.{inner}"
            folder.add(key, source.dtype, source.shape, blocks(source, reader))
            self._add(name, 0, norm, 0.0, folder.num_bytes - before)
            self._has_biases = True

    def _write_nothing(self, folder: AdapterFolder) -> None:
        """Give an adapter without factors those of a change of 0: peft loads none without."""
        import torch

        if self._ranks:
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
            folder.add(key, DTYPES["float32"], tuple(tensor.shape), iter([tensor]))
        self._ranks[free[0]] = 1

    def _config(self) -> dict[str, object]:
        tied = {original.rpartition(".")[0] for original in self.pairs.heads.values()}
        tied &= {*self._whole, *self._ranks}
        # peft sees embeddings of other names by their head.
        is_named = any(name.endswith(TIED_BY_PEFT) for name in tied)
        return peft_config(
            base=self.pairs.base.reference,
            architectures=self.pairs.architectures,
            ranks=self._ranks,
            whole=[*self._whole, *(() if is_named else self._heads_apart)],
            all_modules=self.model.all_modules,
            has_biases=self._has_biases,
            is_tied=bool(tied),
            is_transposed="transposed" in {self.hows.get(f"{m}.weight") for m in self._ranks},
        )

    def _read_back(self, folder: Path) -> None:
        """Open the adapter as a merge would, and see that it changes what was written."""
        read = open_written(folder, self.pairs.base).checkpoint.tensors
        for name, found in self._found.items():
            source = read.get(name)
            if found.rank and not (isinstance(source, LowRankSum) and source.scale == 1.0):
                raise OutlierMergeError(
                    f"{folder}: {shown(name)} is not read back as it was written. This is an error "
                    "of outliermerge: please report it"
                )

    def _tokenizer(self) -> dict[str, Path]:
        """Return the tokenizer's files, if the model has other tokens than the base."""
        is_grown = any(base.shape != model.shape for base, model in self.tensors.values())
        home = self.pairs.model.tokenizer_home
        return {path.name: path for path in token_files(home)} if is_grown else {}

    def _notes(self) -> tuple[str, ...]:
        notes = [*self.pairs.notes]
        if self.classes.why_not:
            notes.append(f"modules are told by names, not their class: {self.classes.why_not}")
        if self._tokenizer():
            notes.append(
                "the model has other tokens than the base, so its tokenizer is beside the adapter: "
                "before peft loads it, give the base its rows (resize_token_embeddings)"
            )
        return tuple(dict.fromkeys(notes))
