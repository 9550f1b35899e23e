"""Computes the routers of a mixture of experts, and where they send the prompts' tokens.

Legend: L layers, K experts with a router, P prompts, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.reader import Reader
from outliermerge.display import short_repr
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.execution.layerwise import (
    embeddings_of,
    forward,
    require_transformers,
    tokens_of,
)
from outliermerge.optional import require_torch
from outliermerge.planning.moe import Mixture
from outliermerge.rng import standard_normal, uniform
from outliermerge.storage.stamps import Watched, watching

if TYPE_CHECKING:
    from torch import Tensor

_ALIKE = 0.99  # the cosine above which two routers send tokens to the same places
_IDLE = 0.01  # the share of tokens below which an expert is said to be idle
_TINY = 1e-8


@dataclass(frozen=True)
class Routing:
    """Where the router of each layer sends the tokens of each expert's positive prompts.

    It is computed from what goes into each MLP layer of the base model: what the experts of earlier
    layers change is not in it. The token that begins every text is not counted.

    Attributes:
        num_tokens: of each expert's prompts.
        tokens: by layer, by the expert whose prompts they are, the share of its tokens that each
            expert gets; each row adds up to the number of experts per token.
        weights: in the same way the mean weight of each expert; each row adds up to 1.
    """

    num_tokens: list[int]
    tokens: list[list[list[float]]]
    weights: list[list[list[float]]]

    def __repr__(self) -> str:
        return short_repr(
            self,
            f"{len(self.tokens)} layers, {len(self.num_tokens)} experts, "
            f"{sum(self.num_tokens):,} tokens of their prompts",
            "shares of the tokens in .tokens[layer][prompts of][expert]; mean weights in .weights",
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the routing as JSON values."""
        return {"num_tokens": self.num_tokens, "tokens": self.tokens, "weights": self.weights}


class _Prompts:
    """The prompts of all experts as tokens, each text once."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        places: dict[str, int] = {}
        self.positive, self.negative = (
            [[places.setdefault(t, len(places)) for t in texts] for texts in kind]
            for kind in (
                [entry.positive_prompts for _, entry in mixture.gated],
                [entry.negative_prompts for _, entry in mixture.gated],
            )
        )
        self.tokens, self.begin = tokens_of(mixture.base, list(places))

    def directions(self, states_PH: Tensor, *, mean: bool) -> Tensor:
        """Return for each expert where its prompts are, away from its negative ones: (K, H)."""
        import torch

        rows = []
        for positive, negative in zip(self.positive, self.negative, strict=True):
            row = _direction(states_PH[positive], mean=mean)
            if negative:
                row = row - _direction(states_PH[negative], mean=mean)
            rows.append(_unit(row))
        return torch.stack(rows)

    def by_embeddings(self, reader: Reader) -> Tensor:
        """Return the directions of the sums of the prompts' embeddings: (K, H)."""
        import torch

        known = sorted({token for own in self.tokens for token in own})
        rows = embeddings_of(self.mixture.base, reader, known)
        place = {token: at for at, token in enumerate(known)}
        sums = [rows[[place[token] for token in own]].sum(0) for own in self.tokens]
        return self.directions(torch.stack(sums), mean=False)


def _direction(states_PH: Tensor, *, mean: bool) -> Tensor:
    return states_PH.mean(0) if mean else _unit(states_PH.sum(0))


def _unit(row_H: Tensor) -> Tensor:
    unit: Tensor = row_H / row_H.norm().clamp(min=_TINY)
    return unit


def add_routers(
    mixture: Mixture, *, device: str = "cpu", show_routing: bool = True
) -> tuple[Mixture, Routing | None]:
    """Compute a mixture's routers; return it with them, and where they send the prompts.

    `hidden`: for each expert and layer the mean of the base's hidden states before the layer at the
    last token of the positive prompts, minus that of the negative ones, at length 1. `cheap_embed`:
    the same with sums of embeddings at length 1, for all layers. `random`: N(0, 1).
    `uniform_random`: uniform in ±1/√H.

    Args:
        device: where the forward pass is computed.
        show_routing: compute the routing as well. It takes a forward pass of the base model over
            the prompts, as the routers of `hidden` do.

    Raises:
        OutlierMergeError: torch or transformers is needed and not installed, or the base model has
            no tokenizer.
    """
    mode, notes = mixture.spec.moe.gate_mode, list[str]()
    needs_prompts, prompts = mode in ("hidden", "cheap_embed"), None
    require_torch(f"gate_mode {mode}")
    with watching(Watched(mixture.plan.files)) as watched, Reader() as reader:
        if needs_prompts or (show_routing and all(e.positive_prompts for _, e in mixture.gated)):
            try:
                require_transformers(f"gate_mode {mode}" if needs_prompts else "the routing")
                prompts = _Prompts(mixture)
            except OutlierMergeError as error:
                if needs_prompts:
                    raise
                notes.append(f"where the prompts are routed is not shown: {error}")
        rows: list[Tensor] = []
        if mode == "cheap_embed" and prompts is not None:
            rows = [prompts.by_embeddings(reader)] * len(mixture.layers)
        elif not needs_prompts:
            rows = _drawn(mixture)
        routing = None
        if prompts is not None and (mode == "hidden" or show_routing):
            routing = _pass(mixture, prompts, rows, reader, device)
        watched.check()
    notes += _alike(mixture, rows) if needs_prompts else []
    notes += _idle(routing) if routing is not None else []
    made = mixture.with_routers([row.float().cpu().contiguous().numpy() for row in rows], notes)
    return made, routing if show_routing else None


def _drawn(mixture: Mixture) -> list[Tensor]:
    """Return random routers; each expert's in each layer has a stream of its own."""
    import torch

    moe, width = mixture.spec.moe, mixture.hidden_size
    is_normal, rows = moe.gate_mode == "random", []
    for layer in range(len(mixture.layers)):
        names = [f"router of {path[0]}[{path[1]}] in layer {layer}" for path, _ in mixture.gated]
        if is_normal:
            own = [standard_normal(moe.seed, name, 0, width) for name in names]
        else:
            own = [(2 * uniform(moe.seed, n, 0, width) - 1) / width**0.5 for n in names]
        rows.append(torch.stack(own))
    return rows


def _pass(
    mixture: Mixture, prompts: _Prompts, rows: list[Tensor], reader: Reader, device: str
) -> Routing:
    """Run the base model over the prompts; add the routers of `hidden` to `rows`."""
    import torch

    last = torch.tensor([len(own) - 1 for own in prompts.tokens])
    every = torch.arange(len(prompts.tokens))
    is_hidden = mixture.spec.moe.gate_mode == "hidden"
    num_routed, num_chosen = len(mixture.spec.moe.experts), mixture.spec.moe.experts_per_token
    counted = [[(p, t) for p in prompts.positive[expert] for t, token in
                enumerate(prompts.tokens[p]) if t or token != prompts.begin]
               for expert in range(num_routed)]  # fmt: skip
    routing = Routing([len(own) for own in counted], [], [])

    def on_layer(number: int, states_PTH: Tensor) -> None:
        if is_hidden:
            rows.append(prompts.directions(states_PTH[every, last].float(), mean=True))

    def on_mlp(number: int, states_PTH: Tensor) -> None:
        logits = states_PTH.float() @ rows[number][:num_routed].to(states_PTH.device).float().T
        chosen = logits.topk(num_chosen, dim=-1)
        weights = torch.zeros_like(logits).scatter(-1, chosen.indices, chosen.values.softmax(-1))
        kinds = [(weights, routing.weights)]
        kinds += [(torch.zeros_like(logits).scatter(-1, chosen.indices, 1.0), routing.tokens)]
        for values, shares in kinds:
            shares.append([_mean(values, own) for own in counted])

    forward(
        mixture.base, mixture.layers, prompts.tokens, reader,
        device=device, on_layer=on_layer, on_mlp=on_mlp,
    )  # fmt: skip
    return routing


def _mean(values_PTK: Tensor, places: Sequence[tuple[int, int]]) -> list[float]:
    """Return the mean at some tokens; prompts without a token of their own give zeros."""
    if not places:
        return [0.0] * values_PTK.shape[-1]
    texts, tokens = zip(*places, strict=True)
    found: list[float] = values_PTK[list(texts), list(tokens)].double().mean(0).tolist()
    return [round(value, 6) for value in found]


def _alike(mixture: Mixture, rows: Sequence[Tensor]) -> list[str]:
    """Return notes on routers that are zero, and on those that are alike."""
    notes, found = [], []
    num_routed, num_layers = len(mixture.spec.moe.experts), len(rows)
    zero = [sum(float(row[k].norm()) < 0.5 for row in rows) for k in range(num_routed)]
    if any(zero):
        of_each = [f"expert {k}: {n} of {num_layers} layers" for k, n in enumerate(zero) if n]
        notes.append(
            "routers are zero, since the positive and the negative prompts of an expert come to "
            f"the same there; give it other prompts (counted from 0):\n{listing(of_each)}"
        )
    for one in range(num_routed):
        for other in range(one + 1, num_routed):
            number = sum(float(row[one] @ row[other]) > _ALIKE for row in rows)
            if number:
                found.append(f"experts {one} and {other}: {number} of {num_layers} layers")
    if found:
        notes.append(
            f"routers are alike (cosine above {_ALIKE}), so that such experts get the same tokens; "
            f"give them prompts that differ more (counted from 0):\n{listing(found)}"
        )
    return notes


def _idle(routing: Routing) -> list[str]:
    """Return a note on experts that hardly a token of any prompts is sent to."""
    layers, every = len(routing.tokens), range(len(routing.num_tokens))
    share = [sum(la[i][k] for la in routing.tokens for i in every) for k in every]
    idle = [k for k in every if share[k] / (layers * len(every)) < _IDLE]
    if not idle:
        return []
    numbers = ", ".join(map(str, idle))
    return [
        f"expert(s) {numbers} (counted from 0) get less than {_IDLE:.0%} of the tokens of all "
        "prompts, and have hardly an effect"
    ]
