"""How an adapter of peft holds each tensor that was changed.

A matrix is factored if the module that has it is a layer that peft adapts; biases are saved beside
it (`bias="all"`); a module that has parameters and no further modules is saved whole
(`modules_to_save`). The experts of a layer in one tensor, and matrices beside them, are factored as
parameters (`target_parameters`). What is none of these cannot be in an adapter.

Which class a module has is told by the model's class where that can be asked, or else guessed from
names and shapes. Of a wrong guess peft warns, as of a missing key, when it loads the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from outliermerge.checkpoint.adapters.packed import TURNED_TYPES
from outliermerge.checkpoint.sources import Source
from outliermerge.planning.tied_names import is_head

How = Literal[
    "linear", "transposed", "embedding", "convolution", "experts", "turned experts", "parameter",
    "bias", "whole", "not held",
]  # fmt: skip
LAYERS = ("linear", "transposed", "embedding", "convolution")
EXPERTS = ("experts", "turned experts")
PARAMETERS = (*EXPERTS, "parameter")
FACTORED = (*LAYERS, *PARAMETERS)
# In a model that packs its experts, peft takes targets of these names for experts (as transformers
# 4 had them), so that layers of these names are adapted as parameters. So are routers, whose
# classes are no layers to peft.
_AS_PARAMETERS = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj", "router"}

# The last parts of the names of modules whose class is nn.Embedding.
_EMBEDDING = re.compile(
    r"(embed_tokens|tok_embeddings|word_embeddings?|position_embeddings?|token_type_embeddings"
    r"|tokens_embed|embed_in|embed_positions|wte|wpe|shared|relative_attention_bias)$"
)


@dataclass(frozen=True)
class Model:
    """What is known of a model before a tensor is read.

    Attributes:
        tensors: its tensors by name.
        kinds: the kinds of its modules by name, where its class could be asked; of the others a
            guess is made.
        orders: by name of a module with packed experts its parameters, as its class makes them.
        model_types: of its config.
    """

    tensors: Mapping[str, Source]
    kinds: Mapping[str, str] = field(default_factory=dict)
    orders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    model_types: Collection[str] = ()
    _containers: frozenset[str] = field(init=False)
    _is_transposed: bool = field(init=False)
    _packed: Mapping[str, How] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_containers", _containers(self.tensors))
        object.__setattr__(self, "_is_transposed", _stores_transposed(self.tensors))
        object.__setattr__(self, "_packed", self._find_packed())

    def _find_packed(self) -> dict[str, How]:
        """Return how the experts of each module that packs them are held."""
        found: dict[str, How] = {}
        for name, source in self.tensors.items():
            module, _, part = name.rpartition(".")
            if len(source.shape) != 3 or source.shape[0] < 2 or not self.is_leaf(module):
                continue
            kind = self.kinds.get(module)
            if kind is None and part != "weight":
                kind = "turned experts" if TURNED_TYPES & {*self.model_types} else "experts"
            if kind in EXPERTS:
                found[module] = kind  # type: ignore[assignment]
        return found

    def is_leaf(self, module: str) -> bool:
        """Tell whether a module has parameters, and no module in it has."""
        return bool(module) and module not in self._containers

    @property
    def all_modules(self) -> set[str]:
        """The names of all modules with parameters, and of those that they are in."""
        return {name.rpartition(".")[0] for name in self.tensors} | self._containers

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Return parameters of a module with packed experts in the order of its class.

        Where that is not known, what makes the outputs (`down_proj`) comes last.
        """

        def place(name: str) -> tuple[int, bool, str]:
            module, _, part = name.rpartition(".")
            order = self.orders.get(module, ())
            return order.index(part) if part in order else 0, part.startswith("down_"), part

        return sorted(names, key=place)

    def members(self, module: str) -> list[str]:
        """Return the names of a module's tensors."""
        return [name for name in self.tensors if name.rpartition(".")[0] == module]

    def how(self, name: str, *, factor_embeddings: bool = False) -> How:
        """Return how an adapter would hold a tensor if it was changed."""
        module, _, part = name.rpartition(".")
        shape = self.tensors[name].shape
        weight = self.tensors.get(f"{module}.weight")
        if (packed := self._packed.get(module)) is not None:
            return packed if len(shape) == 3 else "parameter" if len(shape) == 2 else "whole"
        if part == "bias" and weight is not None and len(weight.shape) > 1:
            return "bias"
        if part == "weight" and len(shape) > 1 and module:
            if (how := self._how_matrix(module, shape, factor_embeddings)) != "whole":
                return how
        return "whole" if self.is_leaf(module) else "not held"

    def _how_matrix(self, module: str, shape: tuple[int, ...], factor_embeddings: bool) -> How:
        kind, last = self.kinds.get(module), module.rpartition(".")[2]
        # Not among layers that are stored transposed: fan_in_fan_out would not hold for the head.
        factors = factor_embeddings and not self._is_transposed
        if min(shape) < 1 or (is_of_tokens(module) and not factors):
            return "whole"
        if (kind or "linear") == "linear" and self._packed and last in _AS_PARAMETERS:
            return "parameter" if len(shape) == 2 else "whole"
        if kind is not None:
            return kind if kind in LAYERS else "whole"  # type: ignore[return-value]
        if len(shape) == 4 and shape[1] > 1:
            return "convolution"
        if len(shape) != 2:
            return "whole"
        if _EMBEDDING.search(last):
            return "embedding"
        if "embed" in last and not is_head(f"{module}.weight"):
            return "whole"
        return "transposed" if self._is_transposed and self._may_be_transposed(module) else "linear"

    def _may_be_transposed(self, module: str) -> bool:
        """Tell whether a layer can be a Conv1D, which has a bias of one value for each column."""
        bias = self.tensors.get(f"{module}.bias")
        return bias is not None and bias.shape == self.tensors[f"{module}.weight"].shape[1:]


def is_of_tokens(module: str) -> bool:
    """Tell whether a module is embeddings or a head, which are saved whole by default."""
    last = module.rpartition(".")[2]
    return "embed" in last or bool(_EMBEDDING.search(last)) or is_head(f"{module}.weight")


def _containers(names: Collection[str]) -> frozenset[str]:
    """Return the modules that have modules with parameters in them."""
    found = set[str]()
    for name in names:
        module = name.rpartition(".")[0].rpartition(".")[0]
        while module and module not in found:
            found.add(module)
            module = module.rpartition(".")[0]
    return frozenset(found)


def _stores_transposed(tensors: Mapping[str, Source]) -> bool:
    """Tell whether a model has Conv1D layers, as GPT-2 has: their biases are as long as rows."""
    ways = set()
    for name, weight in tensors.items():
        bias = tensors.get(name.removesuffix("weight") + "bias")
        if name.endswith(".weight") and bias is not None and len(weight.shape) == 2:
            rows, columns = weight.shape
            if rows != columns and bias.shape in ((rows,), (columns,)):
                ways.add(bias.shape == (columns,))
    return ways == {True}
