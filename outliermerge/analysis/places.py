"""The place of a tensor in its model, from its name alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from outliermerge.spec.settings import find_layers

_NUMBER = re.compile(r"\.(\d+)\.(?=.+\.)")
_EXPERT = re.compile(r"\bexperts\.\d+\b")


@dataclass(frozen=True, slots=True)
class ModulePlace:
    """The layer and the type of module of a tensor.

    Attributes:
        layer: the tensor's name up to the layer's number, such as `model.layers.3`; None outside
            layers.
        depth: the numbers in `layer`, outermost first.
        module: the name without `.weight`, layers' numbers replaced by `*`.
    """

    layer: str | None
    depth: tuple[int, ...]
    module: str


def find_places(names: Iterable[str]) -> dict[str, ModulePlace]:
    """Return the place of each tensor.

    Layers are the same as for gradients in a spec. In stages (`stages.2.layers.10`) both numbers
    belong to the layer. All experts of a layer are one type of module.

    >>> find_places(["model.layers.3.mlp.up_proj.weight"])["model.layers.3.mlp.up_proj.weight"]
    ModulePlace(layer='model.layers.3', depth=(3,), module='model.layers.*.mlp.up_proj')
    >>> find_places(["experts.0.w1.weight"])["experts.0.w1.weight"]
    ModulePlace(layer=None, depth=(), module='experts.*.w1')
    >>> find_places(["stages.2.layers.10.pwconv1.bias"])["stages.2.layers.10.pwconv1.bias"]
    ModulePlace(layer='stages.2.layers.10', depth=(2, 10), module='stages.*.layers.*.pwconv1.bias')
    """
    names = list(names)
    layers = find_layers(names)
    return {
        name: _place(name)
        if name in layers
        else ModulePlace(None, (), name.removesuffix(".weight"))
        for name in names
    }


def _place(name: str) -> ModulePlace:
    shared = _EXPERT.sub("experts.*", name)
    numbers = list(_NUMBER.finditer(f".{shared}"))
    if not numbers:  # the only number is that of an expert
        return ModulePlace(None, (), shared.removesuffix(".weight"))
    last = numbers[-1]
    layer = f".{shared}"[1 : last.end() - 1]
    depth = tuple(int(match[1]) for match in numbers)
    module = _NUMBER.sub(".*.", f".{shared}")[1:].removesuffix(".weight")
    return ModulePlace(layer, depth, module)


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names with their numbers as numbers.

    >>> sorted(["layers.10", "layers.9", "head"], key=natural)
    ['head', 'layers.9', 'layers.10']
    """
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def short_names(modules: Iterable[str]) -> dict[str, str]:
    """Return for each type of module the text after the layer's number, if it is unique.

    >>> short_names(["a.layers.*.q_proj", "a.layers.*.k_proj", "head"])
    {'a.layers.*.q_proj': 'q_proj', 'a.layers.*.k_proj': 'k_proj', 'head': 'head'}
    """
    modules = list(dict.fromkeys(modules))
    ends = [re.sub(r"^(.*?\.)?\*\.((?:\w+\.)*?\*\.)?(?!experts)", "", name) for name in modules]
    return {
        name: end if ends.count(end) == 1 else name for name, end in zip(modules, ends, strict=True)
    }
