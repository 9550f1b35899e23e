"""Measures the distribution of one tensor's elements, or of a task vector's, span by span."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outliermerge.analysis.sums import (
    Filtered,
    Tally,
    filtered_of_bytes,
    filtered_of_values,
    fold_filtered,
    fold_tallies,
    limits_of,
    tally_of_bytes,
    tally_of_values,
)
from outliermerge.analysis.table import BINS
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Source, TensorMeta
from outliermerge.engines.kernels import find_kernels
from outliermerge.execution.passes import Span, spans
from outliermerge.execution.rounds import Round, Steps
from outliermerge.methods.kernel_call import CODES, Place
from outliermerge.storage.failures import failure, naming

if TYPE_CHECKING:
    from torch import Tensor

_SPAN_ELEMENTS = 1 << 20
_PATTERN_SPAN_ELEMENTS = 1 << 24  # each span clears and adds up tables of 1 MB
_NUM_PATTERNS = 1 << 16
_FEWEST_COUNTED = 1 << 15  # for fewer elements, two readings are faster than the tables


def fit_kernels(sources: Sequence[Source]) -> bool:
    """Tell whether the kernels support these dtypes."""
    return all(source.dtype.name in CODES for source in sources)


def are_counted(sources: Sequence[Source]) -> bool:
    """Tell whether kernels can count bit patterns in one reading."""
    (source, *others) = sources
    is_half = fit_kernels(sources) and source.dtype.num_bytes == 2
    return is_half and not others and source.num_elements >= _FEWEST_COUNTED


@dataclass(frozen=True)
class Measured:
    """A tensor's sums, its histogram's counts, and the counts below and above the histogram."""

    tally: Tally
    filtered: Filtered
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Measurer:
    """Measures tensors, each in rounds that threads share.

    16-bit values are counted by their bit patterns in one reading, from which all else follows
    exactly; other values, and differences from a base, are read twice.

    Attributes:
        reader: reads the sources.
        kernels: the compiled module; None to compute by torch.
        device: torch's device.
        filter: elements within this many σ of the mean are kept.
        small: the magnitude below which an element is small.
        on_progress: called with the number of bytes just read, by any thread.
    """

    reader: Reader
    kernels: Any | None
    device: str
    filter: float
    small: float
    on_progress: Callable[[int], None]

    def measure(self, sources: Sequence[Source]) -> Steps[Measured]:
        """Measure a tensor (source,) or a task vector (base, model)."""
        if self.kernels is not None and are_counted(sources):
            return (yield from self._count(sources[0]))
        by_kernels = self.kernels is not None and fit_kernels(sources)
        read = spans(sources[0].num_elements, _SPAN_ELEMENTS)

        def tally(span: Span) -> Tally:
            if not by_kernels:
                return tally_of_values(self._values(sources, span), self.small)
            return tally_of_bytes(self._call("tally", sources, span, self.small))

        whole = fold_tallies((yield Round(tally, read)))
        limits = limits_of(whole, self.filter, self.small)
        shared = bytearray(8 * (BINS + 2))

        def filter_span(span: Span) -> tuple[Filtered, Sequence[int]]:
            if not by_kernels:
                return filtered_of_values(self._values(sources, span), limits)
            raw = self._call("filtered", sources, span, tuple(limits), shared)
            return filtered_of_bytes(raw), ()

        shares: list[tuple[Filtered, Sequence[int]]] = yield Round(filter_span, read)
        return _measured(whole, shares, _unpack(shared))

    def _count(self, source: Source) -> Steps[Measured]:
        assert self.kernels is not None
        code, patterns = CODES[source.dtype.name], bytearray(8 * _NUM_PATTERNS)

        def count(span: Span) -> None:
            self._call("patterns", [source], span, patterns)

        yield Round(count, spans(source.num_elements, _PATTERN_SPAN_ELEMENTS))
        raw = self.kernels.tally_patterns(code, patterns, self.small)
        whole = fold_tallies([tally_of_bytes(raw)])
        counts = bytearray(8 * (BINS + 2))
        limits = tuple(limits_of(whole, self.filter, self.small))
        raw = self.kernels.filtered_patterns(code, patterns, limits, counts)
        return Measured(whole, fold_filtered([filtered_of_bytes(raw)]), tuple(_unpack(counts)))

    def _call(self, name: str, sources: Sequence[Source], span: Span, *arguments: Any) -> Any:
        function = getattr(self.kernels, name)
        codes = "".join(CODES[source.dtype.name] for source in sources).encode()
        num_elements = span[1] - span[0]

        places = self._places(sources, span)
        try:
            found = function((codes, places, num_elements, len(sources) == 2), *arguments)
        except (OSError, EOFError) as error:
            place = error.filename if isinstance(error, OSError) else error.args[1]
            (stored,) = sources[place].stored
            raise failure(stored.path, "read", error, tensor=stored.name) from error
        self.on_progress(sum(source.dtype.num_bytes for source in sources) * num_elements)
        return found

    def _places(self, sources: Sequence[Source], span: Span) -> tuple[Place, ...]:
        stored = [s for s in sources if isinstance(s, TensorMeta) and s.offset is not None]
        others: dict[int, Place] = {id(s): self._bytes(s, span) for s in sources if s not in stored}
        wanted = []
        for source in stored:
            assert source.offset is not None
            size = source.dtype.num_bytes
            position = source.offset + span[0] * size
            wanted.append((source.path, position, (span[1] - span[0]) * size))
        for source in stored:
            with naming(source.path, "opened", tensor=source.name):
                self.reader.descriptor(source.path)
        found = dict(zip(map(id, stored), self.reader.places(wanted), strict=True))
        return tuple((others | found)[id(source)] for source in sources)

    def _bytes(self, source: Source, span: Span) -> memoryview:
        raw = memoryview(bytearray((span[1] - span[0]) * source.dtype.num_bytes))
        source.read(self.reader, *span, raw)
        return raw

    def _values(self, sources: Sequence[Source], span: Span) -> Tensor:
        """Return a span in float64, minus the base's span if there is one."""
        *bases, model = (
            self.reader.values(source, *span).to(self.device).double() for source in sources
        )
        self.on_progress(sum(source.dtype.num_bytes for source in sources) * (span[1] - span[0]))
        return model.sub_(bases[0]) if bases else model


def measure_values(values: Tensor, *, filter: float, small: float) -> Measured:
    """Measure a tensor in memory: by the kernels if they can, else by torch on its device."""
    flat_E = values.detach().reshape(-1)
    code, kernels = CODES.get(str(values.dtype).removeprefix("torch.")), find_kernels()
    if code is not None and kernels is not None and values.device.type == "cpu":
        block = code.encode(), (memoryview(_as_bytes(flat_E)),), len(flat_E), False
        whole, counts = tally_of_bytes(kernels.tally(block, small)), bytearray(8 * (BINS + 2))
        limits = limits_of(whole, filter, small)
        filtered = filtered_of_bytes(kernels.filtered(block, tuple(limits), counts))
        return Measured(whole, filtered, tuple(_unpack(counts)))
    read = spans(len(flat_E), _SPAN_ELEMENTS)
    whole = fold_tallies([tally_of_values(flat_E[a:b].double(), small) for a, b in read])
    limits = limits_of(whole, filter, small)
    shares = [filtered_of_values(flat_E[a:b].double(), limits) for a, b in read]
    return _measured(whole, shares, [0] * (BINS + 2))


def _as_bytes(flat_E: Tensor) -> Any:
    import torch

    return flat_E.contiguous().view(torch.uint8).numpy()


def _measured(
    tally: Tally, shares: Sequence[tuple[Filtered, Sequence[int]]], counts: list[int]
) -> Measured:
    """Combine the results of the second pass; add the spans' own counts, if any, to `counts`."""
    for _, own in shares:
        counts = [a + b for a, b in zip(counts, own, strict=True)] if own else counts
    return Measured(tally, fold_filtered([share for share, _ in shares]), tuple(counts))


def _unpack(counts: bytearray) -> list[int]:
    return array("Q", counts).tolist()
