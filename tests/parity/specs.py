"""Random specs that outliermerge and mergekit both take, by hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

FILTERS = {
    "llama": ["self_attn", "mlp", "layernorm", "embed_tokens", "lm_head"],
    "gpt2": ["attn", "mlp", "ln_", "wte"],
    "bert": ["attention", "output", "intermediate", "embeddings"],
    "t5": ["SelfAttention", "DenseReluDense", "layer_norm", "shared", "decoder"],
    "qwen2_vl": ["self_attn", "mlp", "visual", "norm", "embed_tokens"],
    "mixtral": ["self_attn", "experts", "gate", "norm", "lm_head"],
}
KINDS = tuple(FILTERS)

Strategy = st.SearchStrategy[Any]


def _number(low: float, high: float) -> Strategy:
    return st.integers(round(low * 100), round(high * 100)).map(lambda value: value / 100)


_WEIGHT, _SIGNED = _number(0.05, 1.5), _number(-0.6, 1.5)
_DENSITY, _LAMBDA = _number(0.02, 1), _number(-1, 1.5)
_OF_SUMS = {"weight": _SIGNED, "normalize": st.booleans(), "lambda": _LAMBDA}
_DRAWN = _OF_SUMS | {"density": _DENSITY, "rescale": st.booleans()}
_RANKED = _OF_SUMS | {"density": _number(0.3, 0.7), "epsilon": _number(0, 0.25),
                      "rescale": st.booleans()}  # fmt: skip
_MIDDLE = _DRAWN | {"gamma": _number(0, 0.3)}

PARAMETERS: dict[str, dict[str, Strategy]] = {
    "linear": {"weight": _WEIGHT, "normalize": st.booleans()},
    "task_arithmetic": _OF_SUMS,
    "ties": _DRAWN,
    "dare_linear": _DRAWN,
    "dare_ties": _DRAWN,
    "breadcrumbs": _MIDDLE,
    "breadcrumbs_ties": _MIDDLE,
    "della": _RANKED,
    "della_linear": _RANKED,
    "sce": {"select_topk": _number(0, 1)},
    "ram": {"epsilon": _number(0, 0.03)},
    "ramplus_tl": {"epsilon": _number(0, 0.03), "r": _number(0, 1), "alpha": _number(0, 3)},
    "slerp": {"t": _number(0, 1)},
    "nuslerp": {
        "weight": _WEIGHT,
        "nuslerp_flatten": st.booleans(),
        "nuslerp_row_wise": st.booleans(),
    },
    "multislerp": {"weight": _WEIGHT, "normalize_weights": st.booleans()},
    "karcher": {"max_iter": st.integers(1, 20), "tol": st.sampled_from([1e-3, 1e-5, "1e-7"])},
    "model_stock": {"filter_wise": st.booleans()},
    "nearswap": {"t": st.sampled_from([1e-4, 0.001, "1e-2", 0.1])},
    "arcee_fusion": {},
    "passthrough": {"scale": _number(-1, 2)},
}
_PER_MODEL = {"weight", "density", "gamma"}
_REQUIRED = {"weight", "t"}
_BOTH_ON_ONE_LEVEL = {"density", "epsilon"}  # their sum and difference must stay within (0, 1)
_COUNTS: dict[str, tuple[int, int]] = {
    "slerp": (1, 1), "nuslerp": (2, 2), "nearswap": (1, 1), "arcee_fusion": (1, 1),
    "passthrough": (1, 1), "model_stock": (2, 4), "karcher": (2, 4), "multislerp": (2, 4),
    "sce": (2, 5), "ram": (2, 5), "ramplus_tl": (2, 5),
}  # fmt: skip
_NO_BASE = ("linear", "passthrough")
_OPTIONAL_BASE = ("nuslerp", "multislerp", "karcher")
_COMPAT = ("sce", "model_stock", "arcee_fusion")  # the peer's faults, imitated
RANKING = ("ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce")
"""Methods that rank elements: of equal ones, as in bfloat16, each tool keeps others."""


@st.composite
def specs(draw: Callable[[Strategy], Any], method: str) -> dict[str, Any]:
    """Draw a spec whose models are called `base`, `m0`, `m1`, …, with the kind of model it is for.

    Its keys `kind` and `stored` say which models to take; they are not keys of a spec.
    """
    kind = draw(st.sampled_from(KINDS))
    few, many = _COUNTS.get(method, (1, 5))
    models: list[dict[str, Any]] = [
        {"model": f"m{number}"} for number in range(draw(st.integers(few, many)))
    ]
    shared: dict[str, Any] = {}
    for name, values in PARAMETERS[method].items():
        if name not in _REQUIRED and draw(st.booleans()):
            continue
        setting = _setting(values, FILTERS[kind], name)
        if name in _PER_MODEL and draw(st.booleans()):
            for model in models:
                model.setdefault("parameters", {})[name] = draw(setting)
        else:
            shared[name] = draw(setting)
    if method in _COMPAT:
        shared["compat"] = "mergekit"
    if method in ("dare_linear", "dare_ties"):
        shared["rescale_by"] = "l1"
    stored = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    spec = {
        "kind": kind,
        "stored": "float32" if method in RANKING else stored,
        "merge_method": method,
        "models": models,
        "parameters": shared,
        "dtype": "float32",
    }
    if method not in _NO_BASE and (method not in _OPTIONAL_BASE or draw(st.booleans())):
        spec["base_model"] = "base"
        if method != "nuslerp" and draw(st.booleans()):
            place = draw(st.integers(0, len(models)))
            models.insert(place, {"model": "base"})
    return spec


def _setting(values: Strategy, filters: list[str], name: str) -> Strategy:
    """Return a strategy for a value, a gradient, or values by filter."""
    if name in _BOTH_ON_ONE_LEVEL | {"max_iter", "tol"}:
        one: Strategy = values
    else:
        one = st.one_of(values, st.lists(values, min_size=1, max_size=5))
    by_filter = st.lists(
        st.fixed_dictionaries({"filter": st.sampled_from(filters), "value": one}),
        max_size=3,
        unique_by=lambda entry: entry["filter"],
    ).flatmap(lambda entries: one.map(lambda last: [*entries, {"value": last}]))
    return st.one_of(one, by_filter)
