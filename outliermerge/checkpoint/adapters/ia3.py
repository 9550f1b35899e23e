"""Layers that (IA)³ changes: their weights, and biases, multiplied by vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping

from outliermerge.checkpoint.adapters.config import CONFIG_NAME
from outliermerge.checkpoint.adapters.context import Context
from outliermerge.checkpoint.adapters.keys import LayerParts
from outliermerge.checkpoint.adapters.products import Multiplied
from outliermerge.checkpoint.adapters.tensors import as_of
from outliermerge.checkpoint.sources import Source, TensorMeta
from outliermerge.errors import quoted, shown

Shape = tuple[int, ...]


class Ia3Layers:
    """Makes the tensors that (IA)³ changes, as peft merges it.

    A vector (outputs, 1) is for a layer's outputs, and its bias; (1, inputs) for its inputs. In
    convolutions both are (1, n, 1, …), and the config tells.
    """

    def __init__(
        self,
        context: Context,
        layers: Mapping[str, LayerParts],
        tensors: Mapping[str, Source],
    ) -> None:
        self.context = context
        self.seen_transposed: set[bool] = set()
        for module, found in layers.items():
            shape = tensors[context.rename(f"{module}.weight")].shape
            vector = found.parts.get("ia3_l")
            if vector is not None and len(shape) == 2 and shape[0] != shape[1]:
                number = vector.num_elements
                if (number == shape[0]) != (number == shape[1]):
                    self.seen_transposed.add((number == shape[0]) == self._is_of_inputs(vector))

    @staticmethod
    def _is_of_inputs(vector: TensorMeta) -> bool:
        """Tell whether a vector of a linear layer is (1, inputs)."""
        return vector.shape[0] == 1 and vector.num_elements > 1

    def change(self, tensors: dict[str, Source], module: str, found: LayerParts) -> None:
        """Put the changed weight of a layer, and its bias, in the place of the base's.

        Raises:
            OutlierMergeError: the vector does not fit the base's tensor.
        """
        target, bias = (self.context.rename(f"{module}.{end}") for end in ("weight", "bias"))
        base, vector = tensors[target], found.parts["ia3_l"]
        self.context.check_floats(base, vector)
        shape, number = base.shape, vector.num_elements
        is_linear = len(shape) == 2
        is_vector = len(vector.shape) == len(shape) and number == max(vector.shape, default=0)
        if not is_vector or len(shape) < 2 or 0 in shape:
            raise self._misfit(module, vector, shape)
        of_inputs = self._is_of_inputs(vector) if is_linear else self._is_feedforward(module)
        by_row = not of_inputs
        if is_linear and self._is_transposed(module, shape, number, of_inputs):
            by_row = of_inputs
        groups = 1 if by_row or is_linear else max(1, number // shape[1])
        if number != (shape[0] if by_row else groups * shape[1]) or shape[0] % groups:
            raise self._misfit(module, vector, shape)
        tensors[target] = Multiplied(**as_of(base), base=base, vector=vector, by_row=by_row)
        if not of_inputs and (old := tensors.get(bias)) is not None:
            if math.prod(old.shape) != number:
                raise self._misfit(module, vector, old.shape)
            tensors[bias] = Multiplied(**as_of(old), base=old, vector=vector, by_row=True)

    def _is_transposed(self, module: str, shape: Shape, number: int, of_inputs: bool) -> bool:
        """Tell whether a linear layer stores its weight (in, out), as GPT-2's Conv1D does."""
        if shape[0] == shape[1]:
            return self.context.is_fan_in_fan_out(module, shape, self.seen_transposed)
        return number == (shape[0] if of_inputs else shape[1])

    def _is_feedforward(self, module: str) -> bool:
        """Tell by peft's rule whether a layer's inputs are multiplied, not its outputs."""
        said = self.context.config.get("feedforward_modules")
        names = self.context.names(f"{module}.weight")
        if isinstance(said, str):
            return any(
                self.context.patterns.is_all(name, said, "feedforward_modules") for name in names
            )
        if not isinstance(said, list):
            raise self.context.refuse(
                f"{shown(module)}: its vector could be for its inputs or its outputs, because "
                f"feedforward_modules is {quoted(said)} in {CONFIG_NAME}. Write there which "
                "layers' inputs were multiplied."
            )
        return any(name.endswith(end) for name in names for end in said)

    def _misfit(self, module: str, vector: TensorMeta, shape: Shape) -> Exception:
        return self.context.refuse(
            f"{shown(module)}: ia3_l {list(vector.shape)} does not fit the base's {list(shape)}: "
            f"is it an adapter of {self.context.base.root}?"
        )
