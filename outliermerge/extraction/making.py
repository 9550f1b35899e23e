"""An adapter in the making: what is compared, factored, written and read back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from outliermerge.checkpoint.adapters.packed import model_types
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.tokens import token_files
from outliermerge.errors import ArgumentError, OutlierMergeError, argument, listing, shown
from outliermerge.execution.threads import torch_threads
from outliermerge.extraction.card import adapter_card
from outliermerge.extraction.classes import Classes
from outliermerge.extraction.contents import Contents, is_factored
from outliermerge.extraction.experts import Experts
from outliermerge.extraction.factors import Change, Factors, factored, most_bytes
from outliermerge.extraction.holding import EXPERTS, FACTORED, PARAMETERS, How, Model, is_of_tokens
from outliermerge.extraction.low_rank import in_core_space, is_unchanged, joined, low_rank_of
from outliermerge.extraction.merges import reader_of_merges
from outliermerge.extraction.pair import Pairs, lacks_parts
from outliermerge.extraction.reading import difference, in_order
from outliermerge.extraction.report import Extraction, Settings
from outliermerge.extraction.written import AdapterFolder
from outliermerge.output.resumed import marks_of_files
from outliermerge.planning.inputs import open_written
from outliermerge.planning.merged import bytes_of_merges
from outliermerge.storage.machine import (
    free_memory_bytes,
    keep_freed_memory,
    most_memory_bytes,
    num_threads,
)
from outliermerge.storage.stamps import current_watch

_MEMORY_BYTES = 2**32


class Making:
    """An adapter in the making.

    Args:
        pairs: the model and its base.
        settings: what is asked.
        device: torch's device.
        threads: as for `extract`.
        memory_bytes: most memory for what is computed at once; None for 4 GiB, and for what a
            matrix needs if that is more and is free.
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
        memory_bytes: int | None,
        classes: Classes,
    ) -> None:
        self.pairs, self.settings = pairs, settings
        self.wanted = settings.wanted(of_merge=bool(pairs.model.made_of))
        self._device, self.tensors = device, pairs.tensors
        self.model = Model(
            {name: pair[1] for name, pair in self.tensors.items()},
            classes.kinds, classes.orders, model_types(pairs.base.home),
        )  # fmt: skip
        self.classes = classes
        self.low_rank = {n: low for n, pair in self.tensors.items() if (low := low_rank_of(*pair))}
        self.hows: dict[str, How] = {name: self._how(name) for name in self.tensors}
        self.changing = {name for name, pair in self.tensors.items() if not is_unchanged(*pair)}
        self.matrices = [
            n for n, how in self.hows.items() if how in FACTORED and n in self.changing
        ]
        self._refuse_full_rank()
        needed = {
            name: bytes_of_merges(self.tensors[name]) + self._most_bytes(name)
            for name in self.matrices
            if not self._is_small(name)
        }
        largest = max(needed, key=lambda name: needed[name], default="")
        self.peak_bytes = needed.get(largest, 0)
        most = memory_bytes or max(_MEMORY_BYTES, most_memory_bytes(free_memory_bytes()))
        if self.peak_bytes > most:
            raise ArgumentError(
                f"{argument('memory')}: {most:,} B is too little for {shown(largest)} "
                f"{list(self.tensors[largest][1].shape)}, which takes {self.peak_bytes:,} B to be "
                f"factored. Give {argument('memory', f'{-(-self.peak_bytes // 2**20)}MiB')} or more"
                + ("" if settings.randomized else f", or {argument('randomized', True)}")
            )
        self._memory_bytes = memory_bytes or max(_MEMORY_BYTES, self.peak_bytes)
        fitting = self._memory_bytes // max(1, self.peak_bytes)
        self.workers = 1 if device != "cpu" else max(1, min(num_threads(threads), fitting))
        self.modules = self._by_module(self.matrices)
        self.contents = Contents(pairs, self.model, self.hows, classes)

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

    def _by_module(self, matrices: Iterable[str]) -> list[list[str]]:
        """Return what is factored together: matrices, and those of modules with packed experts."""
        found: dict[str, list[str]] = {}
        for name in matrices:
            module = name.rpartition(".")[0]
            found.setdefault(module if self.hows[name] in PARAMETERS else name, []).append(name)
        return [self.model.in_order(names) for names in found.values()]

    def _most_bytes(self, name: str) -> int:
        pair = self.tensors[name]
        if self.hows[name] in EXPERTS:
            return Experts(name, *pair, self.wanted).most_bytes
        return most_bytes(*pair, self.wanted)

    def _bytes_of(self, name: str) -> int:
        """Return the bytes of all passes over a tensor."""
        num_bytes = sum(source.num_bytes for source in self.tensors[name])
        if self.hows[name] in EXPERTS:
            return num_bytes * Experts(name, *self.tensors[name], self.wanted).num_passes
        if self.hows[name] in FACTORED:
            return 0 if self._is_small(name) else num_bytes * self.wanted.num_passes
        return num_bytes

    @property
    def work_bytes(self) -> int:
        """The bytes of all passes."""
        return sum(map(self._bytes_of, self.changing))

    def make(
        self, output: Path, on_progress: Callable[[int], None], *, fresh: bool = False
    ) -> Extraction:
        """Write the adapter, and return what it is."""
        started = time.perf_counter()
        keep_freed_memory()
        with ExitStack() as stack:
            watched = current_watch()
            marks = marks_of_files(watched.stamps) if watched is not None else {}
            folder = stack.enter_context(
                AdapterFolder(
                    output, list(self.contents.names()), identity=self._identity(), marks=marks,
                    fresh=fresh,
                )
            )  # fmt: skip
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
            self.contents.write_whole(reader, folder, changed)
            self.contents.write_biases(reader, folder, changed)
            found = self.contents.found
            if not found:
                raise OutlierMergeError(
                    f"{shown(self.pairs.model.reference)}: has the values of "
                    f"{shown(self.pairs.base.reference)}: there is nothing to extract"
                )
            self.contents.write_nothing(folder)
            folder.close_weights(self.contents.config())
            self._read_back(folder.folder)
            excluded = len(self.pairs.excluded)
            result = Extraction(
                output=output,
                model=self.pairs.model.reference,
                base=self.pairs.base.reference,
                settings=self.settings,
                tensors=tuple(found[name] for name in self.tensors if name in found),
                num_unchanged=len(self.tensors) - len(found) - len(left_out) - excluded,
                num_excluded=excluded,
                left_out=left_out,
                notes=self._notes(),
                num_bytes=folder.num_bytes,
                seconds=time.perf_counter() - started,
            )
            card = adapter_card(self.pairs, result)
            if watched is not None:
                try:
                    watched.check()
                except OutlierMergeError:
                    folder.forget()
                    raise
            report = result.as_dict()
            del report["seconds"]  # so that the same command writes the same bytes
            folder.finish(report, card, self._tokenizer())
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
        whole = {n.rpartition(".")[0] for n in others if norms[n] and self.hows[n] == "whole"}
        beside = [n for n in self.matrices if n.rpartition(".")[0] in whole]
        for name in beside:  # the rest of a module that is saved whole
            norms[name] = difference(name, *self.tensors[name], reader)
            on_progress(self._bytes_of(name))
        self.modules = [names for names in self.modules if not {*names} & {*beside}]
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
            names = [{meta.name for meta in source.stored} for source in (base, model)]
            if why := lacks_parts(self.pairs.base, model, names[0]) or lacks_parts(
                self.pairs.model, base, names[1]
            ):
                return why
            return f"is {list(base.shape)} in the base, and {list(model.shape)}"
        if not (base.dtype.is_float and model.dtype.is_float):
            return f"is {model.dtype.name}"
        return "is a parameter of a module that has other modules; peft saves no such module whole"

    def _write_factors(
        self,
        reader: Reader,
        pool: ThreadPoolExecutor,
        folder: AdapterFolder,
        on_progress: Callable[[int], None],
    ) -> None:
        """Factor the matrices, those of a module with packed experts together."""

        def factor(names: Sequence[str]) -> list[Factors | None]:
            return [self._factored(name, reader, on_progress) for name in names]

        left = list[list[str]]()
        for names in self.modules:
            if (facts := folder.done.get(f"factors of {names[0]}")) is None:
                left.append(names)
                continue
            self.contents.take_factors(facts)
            on_progress(sum(map(self._bytes_of, names)))
        reader.read_ahead(enumerate(self.tensors[name]) for names in left for name in names)
        results = in_order(pool, factor, left, self.workers)
        for names, made in zip(left, results, strict=True):
            self.contents.write_factors(names, made, self.wanted.dtype, folder)

    def _factored(
        self, name: str, reader: Reader, on_progress: Callable[[int], None]
    ) -> Factors | None:
        base, model = self.tensors[name]
        if self._is_small(name):
            merge = in_core_space if self.settings.core else joined
            return merge(self.low_rank[name], reader, self.wanted)
        if self.hows[name] in EXPERTS:
            experts = Experts(name, base, model, self.wanted)
            found = experts.factored(reader, self._device, on_progress)
        else:
            change = Change(
                name, base, model, reader=reader, device=self._device, on_progress=on_progress
            )
            found = factored(change, self.wanted)
        reader.release(enumerate((base, model)))
        return found

    def _read_back(self, folder: Path) -> None:
        """Open the adapter as a merge would, and see that it changes what was written."""
        open_written(folder, self.pairs.stored)
        read = open_written(folder, self.pairs.base).checkpoint.tensors
        for name, found in self.contents.found.items():
            if found.rank and not is_factored(read.get(name), found.how):
                raise OutlierMergeError(
                    f"{folder}: {shown(name)} is not read back as it was written. This is an error "
                    "of outliermerge: please report it"
                )

    def _identity(self) -> dict[str, Any]:
        """Return the facts that must be equal for a killed run to be continued, in user's words."""
        held = repr([(name, how, self.tensors[name]) for name, how in self.hows.items()])
        return {
            "the outliermerge version": version("outliermerge"),
            "the torch version": version("torch"),
            "the device": self._device.partition(":")[0],
            "what was asked for": asdict(self.settings),
            "how tensors are paired and held": xxhash.xxh3_128_hexdigest(
                held.encode("utf-8", "surrogatepass")
            ),
        }

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
