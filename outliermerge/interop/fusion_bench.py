"""The methods as an algorithm of FusionBench, for the models of any of its pools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from fusion_bench import BaseAlgorithm, BaseModelPool, LazyStateDict, auto_register_config
from fusion_bench.models.utils import get_target_state_dict, load_state_dict_into_target_modules
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import Module

from outliermerge.errors import OutlierMergeError
from outliermerge.tensors import merge_state_dicts


@auto_register_config
class OutlierMergeAlgorithm(BaseAlgorithm):  # type: ignore[misc]  # mypy does not see FusionBench
    """Merge a pool's models by a method of this package.

    The pool's pretrained model is the base model, if the pool has one.

    Args:
        name: the method, or your own as `package.module:function`.
        parameters: of the method; those of each model as one value for all, or as a list of one
            value a model in the pool's order.
        seed: of methods that draw random numbers.
    """

    name: str
    parameters: Mapping[str, Any] | None
    seed: int

    def __init__(
        self,
        name: str = "min_sigma",
        parameters: Mapping[str, Any] | None = None,
        seed: int = 0,
        **others: Any,
    ) -> None:
        super().__init__(**others)  # the decorator sets the other attributes

    def run(self, modelpool: BaseModelPool | dict[str, Module]) -> Module:
        """Return a new model: the merge of the pool's models, which are left as they are.

        Raises:
            OutlierMergeError: the models do not fit together.
            ArgumentError: an unknown method or parameter, or a value out of range.
        """
        pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)
        models = [*pool.models()]
        base = pool.load_pretrained_model() if pool.has_pretrained else None
        states = [_state(model) for model in models]
        base_state = None if base is None else _state(base)
        same = _tied(states if base_state is None else [base_state, *states])
        merged = merge_state_dicts(
            [_without(same, state) for state in states],
            base=None if base_state is None else _without(same, base_state),
            method=self.name,
            seed=self.seed,
            **_plain(self.parameters),
        )
        merged |= {name: merged[first] for name, first in same.items()}
        reference = _whole(models[0] if base is None else base)
        # Not strict: a file, read lazily, holds only one of tensors that are tied.
        load_state_dict_into_target_modules(reference, merged, strict=False)
        return reference


def _plain(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(parameters, DictConfig):
        return dict(OmegaConf.to_container(parameters, resolve=True))
    return dict(parameters or {})


def _state(model: Module | LazyStateDict) -> Mapping[str, Tensor]:
    """Return a model's tensors; of a module, those that FusionBench is to merge."""
    if isinstance(model, LazyStateDict):
        state: Mapping[str, Tensor] = model
    else:
        state = get_target_state_dict(model)
    return state


def _tied(states: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
    """Return the names of tensors that are another one in every model, with the other's name.

    Such are merged once, under the name that files have: random numbers depend on the name.
    """
    if any(isinstance(state, LazyStateDict) for state in states):
        return {}  # files hold each tensor once
    first: dict[Any, str] = {}
    tied = {}
    for name, tensor in states[0].items():
        held = [state[name] for state in states if name in state]
        place = tuple((one.data_ptr(), one.shape, one.stride()) for one in held)
        if tensor.numel() and first.setdefault(place, name) != name:
            tied[name] = first[place]
    return tied


def _without(names: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[name] for name in state if name not in names}


def _whole(model: Module | LazyStateDict) -> Module:
    """Return a module of one's own that has all tensors of a model, also those in no file."""
    if not isinstance(model, LazyStateDict):
        return deepcopy(model)
    if model.meta_module_class is None:
        raise OutlierMergeError("a pool with lazy loading must name the class of its models")
    loaded: Module = model.meta_module_class.from_pretrained(model.checkpoint, dtype=model.dtype)
    return loaded
