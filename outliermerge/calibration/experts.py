"""Sees what the experts of one packed tensor are given: the inputs of products with parts of it.

A packed tensor (experts, …, …) is no module of its own, and the inputs of its second matrices are
made inside the forward pass. So products of torch are looked at while that pass runs.

Shape suffixes: T tokens, C columns (inputs), E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm")

# Is given an expert's number, its inputs (T, C), and whether its matrix has the shape (C, …).
Note = Callable[[int, "Tensor", bool], None]


def watched(module: nn.Module, name: str, note: Note) -> Callable[[], None]:
    """Have a module tell the inputs of a packed parameter's experts; return what ends that.

    Args:
        module: the experts.
        name: of the parameter.
        note: is called for each product.
    """
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, given: Any = (), named: Any = None
        ) -> Any:
            if len(given) > 1 and getattr(function, "__name__", "") in _PRODUCTS:
                weight = getattr(module, name)
                _see(given[0], given[1], weight, function.__name__ == "linear", note)
            return function(*given, **(named or {}))

    forward = module.forward

    def run(*given: Any, **named: Any) -> Any:
        with Watch():
            return forward(*given, **named)

    module.forward = run
    return lambda: setattr(module, "forward", forward)


def _see(x: Tensor, factor: Tensor, weight: Tensor, is_linear: bool, note: Note) -> None:
    """Tell the inputs of a product, if its second factor is a part of the weight."""
    start = factor.data_ptr() - weight.data_ptr()
    if not 0 <= start < weight.nbytes or factor.ndim not in (2, 3):
        return
    summed = -1 if is_linear else -2
    turned = factor.stride(summed) == weight.stride(1)
    if factor.shape[summed] != weight.shape[1 if turned else 2]:
        return
    if factor.ndim == 2:
        note(start * len(weight) // weight.nbytes, x.detach().flatten(0, -2), turned)
    elif len(factor) == len(x) == len(weight):
        # Each expert is given all tokens here; those that are not routed to it are 0.
        for number, own_TC in enumerate(x.detach()):
            if (routed_T := own_TC.any(-1)).any():
                note(number, own_TC[routed_T], turned)
