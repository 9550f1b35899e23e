"""Measures a model that is too large for memory: one layer after the other, over all samples.

Each sample is a forward pass in a greenlet of its own. It stops before each layer. When all passes
have come there, the layer's weights are read, the passes go through it in turn up to their next
layer, and the weights are forgotten. So masks, positions and all else that a layer is given are
those of the model's own class, and the sums are those of whole passes, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.arguments import nothing
from outliermerge.calibration.data import Sample
from outliermerge.calibration.measure import Partial, Wanted
from outliermerge.calibration.model import Feeder, Loaded, candidates_of, class_of, quiet
from outliermerge.calibration.sums import Summing, Sums, Unit, units_of
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.folders.hub import resolve
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import Checkpoint, Source
from outliermerge.display import human_bytes
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.optional import require_package
from outliermerge.spec.settings import find_layers
from outliermerge.storage.machine import free_memory_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

_WHOLE = 0.8  # of the free memory: a model that takes more is measured layer by layer
_FILLED = 4  # times its input is what a pass holds between layers, at most: residuals, masks


def fits_whole(reference: str, device: str) -> bool:
    """Tell whether a model fits in the free memory of what computes it; True where none tells."""
    import torch

    tensors = open_checkpoint(resolve(reference)).tensors.values()
    if device == "cpu":
        free, size = free_memory_bytes(), sum(4 * one.num_elements for one in tensors)
    else:
        free, size = torch.cuda.mem_get_info(device)[0], sum(one.num_bytes for one in tensors)
    return free is None or size <= _WHOLE * free


def measure_by_layer(
    reference: str,
    samples: Sequence[Sample],
    *,
    output: Path,
    wanted: Wanted,
    device: str = "cpu",
    data: str = "",
    on_progress: Callable[[int, int], None] = nothing,
) -> Mapping[str, Any]:
    """Run a model over samples with one layer in memory, and write its statistics.

    Besides a layer's weights and sums, what each sample's pass holds between two layers is in
    memory.

    Args:
        reference: a folder or a hub id.
        samples: the data.
        output: the folder.
        wanted: what is measured: `gram`, `mean`.
        device: where the model computes.
        data: what the data are called.
        on_progress: called with the layers of samples that are done, and how many there are.

    Returns:
        What the manifest says.

    Raises:
        OutlierMergeError: the model is of a kind that cannot be run so, or fails; Fisher
            information is wanted; the samples do not fit in memory; the folder is there.
    """
    import torch

    if "fisher" in wanted.statistics:
        raise OutlierMergeError(
            f"{shown(reference)}: Fisher information needs the whole model in memory at once. "
            "Measure gram and mean only, or on a machine with more memory."
        )
    require_package("greenlet", "measuring layer by layer", "measure")
    loaded, layers = _loaded(reference, device)
    _refuse_too_many(loaded, samples, wanted.max_tokens)
    units = units_of(loaded, wanted.statistics)
    groups = _groups(layers, units)
    written = Partial(
        loaded, samples, output, wanted, data=data, groups=[group for _, group in groups]
    )
    feeder = Feeder(
        loaded, with_images=any(one.images for one in samples), max_tokens=wanted.max_tokens
    )
    sums = Sums()
    summing = Summing(
        loaded, feeder, units, wanted.statistics, fisher="empirical", seed=0, sums=sums
    )

    def write(layer: str | None) -> None:
        for number, (name, group) in enumerate(groups, start=1):
            if name == layer:
                if not written.has(number):
                    written.write_group(number, group, sums)
                for unit in group:
                    for kind in wanted.statistics:
                        sums.tensors.pop(f"{kind}/{unit.inputs}", None)

    # The passes' own contexts of torch begin and end in turns, so one is around them all.
    with torch.no_grad(), Reader() as reader, summing.hooked():
        passes = _Passes([partial(summing.add, one, n) for n, one in enumerate(samples)], layers)
        try:
            for name, layer in passes.layers(on_progress):
                with layer.in_memory(reader):
                    passes.go_through(name)
                write(name)
        finally:
            passes.end()
    write(None)
    return written.finish()


@dataclass
class _Layer:
    """A module whose weights are read when it is needed.

    Attributes:
        module: the layer.
        sources: its tensors by the names of its parameters.
        empty: its parameters without memory.
    """

    module: nn.Module
    sources: Mapping[str, Source]
    dtype: Any
    device: str
    empty: Mapping[str, Tensor]

    @contextmanager
    def in_memory(self, reader: Reader) -> Iterator[None]:
        """Read the weights, and forget them."""
        read = {n: _value(one, reader, self.dtype, self.device) for n, one in self.sources.items()}
        self.module.load_state_dict(read, assign=True, strict=False)
        del read
        try:
            yield
        finally:
            self.module.load_state_dict(self.empty, assign=True, strict=False)


@dataclass
class _Passes:
    """Forward passes that stop before each layer.

    Args:
        runs: each is a whole pass.
        modules: the layers by name, in their order.
    """

    runs: Sequence[Callable[[], None]]
    modules: Mapping[str, _Layer]
    _waiting: dict[str, dict[int, Any]] = field(default_factory=dict)

    def layers(self, on_progress: Callable[[int, int], None]) -> Iterator[tuple[str, _Layer]]:
        """Yield the layer that passes wait for, the first of them, until all are at their end."""
        from greenlet import getcurrent, greenlet

        main = getcurrent()
        order, done = list(self.modules), set[str]()
        total = len(self.runs) * (len(order) + 1)
        with ExitStack() as stack:
            for name, layer in self.modules.items():
                hook = layer.module.register_forward_pre_hook(partial(_stop, main, name))
                stack.callback(hook.remove)
            for number, run in enumerate(self.runs):
                self._go_on(number, greenlet(run))
            while self._waiting:
                name = min(self._waiting, key=order.index)
                if name in done:
                    raise OutlierMergeError(
                        f"the layer {shown(name)} is called more than once in a pass: such a model "
                        "cannot be measured layer by layer"
                    )
                on_progress(len(done) * len(self.runs), total)
                yield name, self.modules[name]
                done.add(name)
            on_progress(total, total)

    def go_through(self, name: str) -> None:
        """Let all passes that wait for a layer go on to their next one, in their order."""
        for number, one in sorted(self._waiting.pop(name).items()):
            self._go_on(number, one)

    def _go_on(self, number: int, one: Any) -> None:
        name = one.switch()
        if not one.dead:
            self._waiting.setdefault(name, {})[number] = one

    def end(self) -> None:
        """End the passes that are under way."""
        for each in self._waiting.values():
            for one in each.values():
                one.throw()


def _stop(main: Any, name: str, module: nn.Module, given: Any) -> None:
    main.switch(name)  # what it returns would be taken for the layer's inputs


def _loaded(reference: str, device: str) -> tuple[Loaded, dict[str, _Layer]]:
    """Return a model without the weights of its layers, and its layers."""
    import torch

    root, checkpoint, kind = class_of(reference, "measure")
    with quiet(), _parameters_without_memory():
        try:
            config = kind.config_class.from_pretrained(root)
            dtype = torch.float32 if device == "cpu" else config.dtype or torch.float32
            module = kind._from_config(config, dtype=dtype).eval()
        except Exception as error:  # of many kinds
            raise OutlierMergeError(f"{shown(reference)}: does not load: {error}") from error
    names = _named(reference, module, checkpoint)
    places = find_layers(names)
    layers: dict[str, _Layer] = {}
    for name in names:
        if name in places and (own := f"{places[name].stack}{places[name].index}") not in layers:
            one = module.get_submodule(own)
            sources = {
                inner: checkpoint.tensors[names[f"{own}.{inner}"]]
                for inner, _ in one.named_parameters()
            }
            empty = {inner: parameter.data for inner, parameter in one.named_parameters()}
            layers[own] = _Layer(one, sources, dtype, device, empty)
    if not layers:
        raise OutlierMergeError(f"{shown(reference)}: has no layers that could be run one by one")
    with Reader() as reader:
        outside = {
            id(parameter): torch.nn.Parameter(
                _value(checkpoint.tensors[names[name]], reader, dtype, device)
            )
            for name, parameter in module.named_parameters()
            if name not in places
        }
    for each in module.modules():  # a parameter may be that of several modules
        for inner, parameter in each._parameters.items():
            if parameter is not None and id(parameter) in outside:
                each._parameters[inner] = outside[id(parameter)]
        for inner, buffer in each._buffers.items():
            each._buffers[inner] = None if buffer is None else buffer.to(device)
    return Loaded(reference, checkpoint, module, names, (), device), layers


def _value(source: Source, reader: Reader, dtype: Any, device: str) -> Tensor:
    values = reader.values(source, 0, source.num_elements).view(source.shape).to(device, dtype)
    reader.release([(0, source)])
    return values


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Give modules that are made parameters without memory; buffers have their values."""
    import torch

    register = torch.nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = without_memory  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _named(reference: str, module: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the tensor of the files for each parameter, by the longest end that names have alike.

    Raises:
        OutlierMergeError: one has none, or several.
    """
    found: dict[str, str] = {}
    for name, parameter, candidates in candidates_of(module, checkpoint):
        shape = tuple(parameter.shape)
        fitting = [each for each in candidates if checkpoint.tensors[each].shape == shape]
        if len(fitting) != 1 or fitting[0] in found.values():
            raise OutlierMergeError(
                f"{shown(reference)}: {shown(name)} is no tensor of its files as it is, so that "
                "the model cannot be measured layer by layer, but only whole, in memory. A merge "
                "with `layout: transformers` brings it into the form that its class has."
            )
        found[name] = fitting[0]
    return found


def _groups(
    layers: Mapping[str, _Layer], units: Sequence[Unit]
) -> list[tuple[str | None, list[Unit]]]:
    """Return the layers that have something to measure with their modules; last what is in none."""
    layer_of = {
        id(module): name for name, layer in layers.items() for module in layer.module.modules()
    }
    found: dict[str | None, list[Unit]] = {}
    for unit in units:
        found.setdefault(layer_of.get(id(unit.module)), []).append(unit)
    last = found.pop(None, [])
    return [*found.items(), (None, last)]


def _refuse_too_many(loaded: Loaded, samples: Sequence[Sample], max_tokens: int) -> None:
    """Refuse samples whose passes do not fit in memory between two layers."""
    config: Any = loaded.module.config
    width = getattr(config.get_text_config(), "hidden_size", 0)
    lengths = [min(max_tokens, len((one.prompt + one.text).encode()) + 8) for one in samples]
    needed, free = _FILLED * 4 * width * sum(lengths), free_memory_bytes()
    if loaded.device == "cpu" and free is not None and needed > free:
        raise OutlierMergeError(
            f"{len(samples):,} samples hold up to {human_bytes(needed)} between two layers, and "
            f"{human_bytes(free)} are free: take fewer samples, or fewer tokens of each"
        )
