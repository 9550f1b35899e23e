"""LoRA of parameters (`target_parameters`), such as the experts of a mixture in one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from outliermerge.checkpoint.adapters.config import CONFIG_NAME, matches_end, without_wrappers
from outliermerge.checkpoint.adapters.context import Context
from outliermerge.checkpoint.adapters.keys import LayerParts
from outliermerge.checkpoint.adapters.products import ExpertSum
from outliermerge.checkpoint.adapters.tensors import LowRankSum, as_of
from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.model_types import effective_config
from outliermerge.checkpoint.sources import Source, TensorMeta
from outliermerge.errors import listing, shown

_LEVEL = ".base_layer"
_MAX_PARAMETERS = 4  # of one module, whose order is to be found
# Which axis of an expert A belongs to: peft before 0.19 took the first, for all models; since then
# it takes the second, but for models that multiply by their experts as they are stored.
_FIRST_AXIS, _SECOND_AXIS = True, False
TURNED_TYPES = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
"""The types of model whose classes in transformers 5 do so, with experts of (in, out)."""
_Factors = tuple[TensorMeta, TensorMeta]
_Order = tuple[str, ...]


@dataclass(frozen=True)
class _Owner:
    """A module whose parameters are adapted.

    Attributes:
        parameters: their names.
        factors: A and B of each level, the outermost wrapper first.
    """

    module: str
    parameters: tuple[str, ...]
    factors: tuple[_Factors, ...]


class PackedLayers:
    """The layers of an adapter that are for parameters, taken out of all its layers.

    peft wraps a module once for each of its parameters, in the order in which the module's class
    makes them, so that the names in the file have a level `base_layer` for each but the last.

    Args:
        layers: all layers; those for parameters are taken out.
    """

    def __init__(self, context: Context, layers: dict[str, LayerParts]) -> None:
        self.context = context
        self.targets: list[str] = context.config.get("target_parameters") or []
        self.owners = [*self._owners(layers)] if self.targets else []

    @property
    def parameters(self) -> list[str]:
        """The names of the adapted parameters, by the adapter's names."""
        return [name for owner in self.owners for name in owner.parameters]

    def names(self, parameter: str) -> list[str]:
        """Return the names of a parameter that patterns may match: in training, bare, the base's.

        Those of layers are without `.weight`; of a parameter peft matches the whole name.
        """
        names = [parameter, without_wrappers(parameter), self.context.rename(parameter)]
        return list(dict.fromkeys(names))

    def _owners(self, layers: dict[str, LayerParts]) -> Iterator[_Owner]:
        levels: dict[str, dict[int, str]] = {}
        for name in layers:
            module = name
            while module.endswith(_LEVEL):
                module = module.removesuffix(_LEVEL)
            levels.setdefault(module, {})[(len(name) - len(module)) // len(_LEVEL)] = name
        ends = dict.fromkeys(target.rpartition(".")[2] for target in self.targets)
        for module, names in levels.items():
            found = [f"{module}.{end}" for end in ends]
            found = [
                name
                for name in found
                if any(matches_end(name, target) for target in self.targets)
                and self.context.rename(name) in self.context.base.tensors
            ]
            if not found and set(names) == {0}:
                continue  # a layer
            if sorted(names) != [*range(len(found))] or len(found) > _MAX_PARAMETERS:
                raise self.context.refuse(
                    f"{shown(module)}: the file has LoRA factors at {len(names)} level(s), for "
                    f"{len(found)} parameter(s) of {self.context.base.root} that target_parameters "
                    f"names:\n{listing(found or self.targets)}\n"
                    f"`rename` on this model maps the adapter's names to those of the base, which "
                    f"has for example {shown(next(iter(self.context.base.tensors), 'none'))}."
                )
            factors = tuple(
                self._factors(names[level], layers.pop(names[level])) for level in range(len(found))
            )
            yield _Owner(module, tuple(found), factors)

    def _factors(self, name: str, found: LayerParts) -> _Factors:
        parts = dict(found.parts)
        a, b = parts.pop("lora_A.weight", None), parts.pop("lora_B.weight", None)
        if a is None or b is None or parts:
            raise self.context.refuse(
                f"{shown(name)}: has {', '.join(found.parts)}, expected lora_A.weight and "
                "lora_B.weight, as peft saves them for parameters"
            )
        return a, b

    def change(self, tensors: dict[str, Source]) -> None:
        """Put the changed parameters in the place of the base's.

        Raises:
            OutlierMergeError: factors do not fit the base, or fit it in several ways.
        """
        if not self.owners:
            return
        fitting = [self._fitting(owner, tensors) for owner in self.owners]
        axis = self._axis(fitting, tensors)
        for owner, ways in zip(self.owners, fitting, strict=True):
            order = self._order(owner, [order for order, axes in ways.items() if axis in axes])
            for name, (a, b) in zip(order, owner.factors, strict=True):
                target = self.context.rename(name)
                tensors[target] = self._changed(name, tensors[target], a, b, axis)

    def _fitting(
        self, owner: _Owner, tensors: Mapping[str, Source]
    ) -> dict[_Order, set[bool | None]]:
        """Return in which orders of a module's parameters its factors fit, and with which axes."""
        ways: dict[_Order, set[bool | None]] = {}
        for order in permutations(owner.parameters):
            axes: set[bool | None] = {_FIRST_AXIS, _SECOND_AXIS}
            for name, (a, b) in zip(order, owner.factors, strict=True):
                axes &= self._axes(name, tensors[self.context.rename(name)].shape, a, b)
            if axes:
                ways[order] = axes
        if not ways:
            said = [f"A {list(a.shape)}, B {list(b.shape)}" for a, b in owner.factors]
            has = [
                f"{name} {list(tensors[self.context.rename(name)].shape)}, rank "
                f"{self.context.rank(self.names(name))}"
                for name in owner.parameters
            ]
            raise self.context.refuse(
                f"{shown(owner.module)}: the factors\n{listing(said)}\ndo not make changes of\n"
                f"{listing(has)}\nIs it an adapter of {self.context.base.root}?"
            )
        return ways

    def _axes(
        self, name: str, shape: tuple[int, ...], a: TensorMeta, b: TensorMeta
    ) -> set[bool | None]:
        """Return the axes that A can belong to."""
        rank = self.context.rank(self.names(name))
        if len(shape) == 2:
            num_experts, (height, columns) = 1, shape
        elif len(shape) == 3:
            num_experts, height, columns = shape
        else:
            return set()
        wide = num_experts * rank
        ways = {
            _FIRST_AXIS: ((wide, height), (columns, wide)),
            _SECOND_AXIS: ((wide, columns), (height, wide)),
        }
        fits: set[bool | None] = {axis for axis, made in ways.items() if made == (a.shape, b.shape)}
        if num_experts == 1:  # of one expert, peft adds BA as it is
            return {_FIRST_AXIS, _SECOND_AXIS} if _SECOND_AXIS in fits else set()
        return fits

    def _axis(
        self,
        fitting: list[dict[_Order, set[bool | None]]],
        tensors: Mapping[str, Source],
    ) -> bool:
        """Return the axis that A belongs to, which is the same in the whole file."""
        common = {_FIRST_AXIS, _SECOND_AXIS}
        for ways in fitting:
            common &= set[bool | None]().union(*ways.values())
        if len(common) == 1:
            return bool(common.pop())
        if not common:
            raise self.context.refuse(
                "its factors for packed experts are in several layouts: of some A belongs to the "
                "first axis of an expert, of others to the second. Save the adapter again."
            )
        names = [self.context.rename(name) for name in self.parameters]
        if all(len(tensors[n].shape) == 2 or tensors[n].shape[0] == 1 for n in names):
            return _SECOND_AXIS
        version = str(self.context.config.get("peft_version") or "")
        if _is_before_swap(version):
            return _FIRST_AXIS
        root = self.context.base.root
        if _is_before_swap(version) is False and not model_types(root) & TURNED_TYPES:
            if root.is_dir() and effective_config(read_json(root / "config.json")) is not None:
                return _SECOND_AXIS  # transformers knows the class
        raise self.context.refuse(
            f"{shown(names[0])}: its experts {list(tensors[names[0]].shape)} are square, so that "
            "their shapes do not tell which axis A belongs to, which changed in peft 0.19, and "
            f"{CONFIG_NAME} says {'peft_version ' + shown(version) if version else 'no version'}. "
            "Merge it with the peft that trained it: merge_and_unload(), then save_pretrained()."
        )

    def _order(self, owner: _Owner, orders: list[_Order]) -> _Order:
        """Return the parameters in the order of their wrappers, the outermost first."""
        if len(orders) > 1:  # all classes of transformers make down_proj last
            orders = [order for order in orders if order[0].endswith(".down_proj")] or orders
        if len(orders) > 1:
            raise self.context.refuse(
                f"{shown(owner.module)}: which factors are for which of its parameters cannot be "
                f"told, because they have the same shapes:\n{listing(owner.parameters)}\n"
                "Merge it with peft's merge_and_unload(), then save_pretrained()."
            )
        return orders[0]

    def _changed(
        self, name: str, base: Source, a: TensorMeta, b: TensorMeta, axis: bool
    ) -> LowRankSum | ExpertSum:
        self.context.check_floats(base, a, b)
        scale = self.context.scale(self.names(name))
        if len(base.shape) == 2:
            return LowRankSum(**as_of(base), base=base, lora_a=a, lora_b=b, scale=scale)
        return ExpertSum(
            **as_of(base),
            base=base,
            lora_a=a,
            lora_b=b,
            scale=scale,
            transposed=axis is _FIRST_AXIS and base.shape[0] > 1,
        )


def model_types(folder: Path) -> set[str]:
    """Return the types of model that a folder's config names, of its parts too."""
    said = read_json(folder / "config.json") if folder.is_dir() else {}
    parts = [said, *(part for part in said.values() if isinstance(part, dict))]
    return {part["model_type"] for part in parts if isinstance(part.get("model_type"), str)}


def _is_before_swap(version: str) -> bool | None:
    """Tell whether a version of peft is before 0.19; None if it is none.

    >>> _is_before_swap("0.18.1"), _is_before_swap("0.19.0"), _is_before_swap("")
    (True, False, None)
    """
    numbers = version.split(".")[:2]
    if len(numbers) < 2 or not all(number.isdigit() for number in numbers):
        return None
    return (int(numbers[0]), int(numbers[1])) < (0, 19)


def lacks_parameters(config: Mapping[str, object], names: Mapping[str, Source]) -> bool:
    """Tell whether a config names parameters, or whole modules, of which a model has none."""
    modules = {name.rpartition(".")[0] for name in names}
    for key, every in (("target_parameters", names), ("modules_to_save", modules)):
        targets = config.get(key)
        for target in targets if isinstance(targets, list) else ():
            if not any(matches_end(name, str(target)) for name in every):
                return True
    return False
