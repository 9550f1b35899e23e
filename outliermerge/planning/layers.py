"""The stacks of layers of a model, and what lies before and after the layers of one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from outliermerge.errors import OutlierMergeError, quoted, shown
from outliermerge.planning.tied_names import is_head
from outliermerge.spec.settings import find_layers

_KINDS = (
    ("mtp", re.compile(r"(^|\.)mtp\.")),
    ("vision", re.compile(r"visi|visual|image|(^|\.)vit\.")),
    ("audio", re.compile(r"audio|speech")),
    ("decoder", re.compile(r"decoder\.")),
    ("encoder", re.compile(r"(^|\.)encoder\.")),
)
# Modules that models have before their layers, and behind them, by the names of the modules.
_BEFORE = re.compile(
    r"\w*(embed|embd)\w*(?<!embed_out)|w[tp]e|relative_pe|rotary\w*|pre_\w*norm|ln_pre|\w*norm_pre",
    re.I,
)
_AFTER = re.compile(
    r"\w*norm\w*|ln_?f|ln|pooler|\w*head\w*|\w*score\w*|\w*classifier|cls|output\w*|embed_out"
    r"|vocab_\w+|\w*_outputs|final\w*",
    re.I,
)


@dataclass(frozen=True)
class Stack:
    """A stack of layers.

    Attributes:
        name: what a spec may call it: its kind, or the start of its tensors' names.
        kind: `text`, `vision`, `audio`, `encoder`, `decoder`, or `mtp` for further tokens.
        prefix: the text before the layer's number, such as `model.layers.`.
        num_layers: how many there are.
        region: the start of the names that belong to the stack's part of the model.
        is_main: the model's output head follows it.
    """

    name: str
    kind: str
    prefix: str
    num_layers: int
    region: str
    is_main: bool

    def is_after(self, name: str) -> bool:
        """Tell whether a tensor outside the layers is behind them: a final norm, a head.

        >>> llama = stacks_of(["model.layers.0.mlp.up.weight", "model.norm.weight"])[0]
        >>> llama.is_after("model.norm.weight"), llama.is_after("model.embed_tokens.weight")
        (True, False)
        """
        if is_head(name):
            return self.is_main
        if not name.startswith(self.region):
            return False
        # The module beside the layers, or beside one of the modules that they are in.
        parts = zip(name.split("."), self.prefix.split("."), strict=False)
        module = next((ours for ours, theirs in parts if ours != theirs), "")
        return not _BEFORE.fullmatch(module) and _AFTER.fullmatch(module) is not None


def stacks_of(names: Iterable[str]) -> list[Stack]:
    """Return a model's stacks of layers, by the names of its tensors.

    >>> names = ["encoder.block.0.mlp.wi.weight", "decoder.block.1.mlp.wi.weight", "shared.weight"]
    >>> [(stack.name, stack.num_layers) for stack in stacks_of(names)]
    [('encoder', 1), ('decoder', 2)]
    """
    sizes = {layer.stack: layer.num_layers for layer in find_layers(names).values()}
    kinds = {prefix: _kind(prefix, sizes) for prefix in sizes}
    counts = Counter(kinds.values())
    writers = [p for p in sizes if kinds[p] in ("text", "decoder")]
    return [
        Stack(
            name=kinds[prefix] if counts[kinds[prefix]] == 1 else prefix.rstrip("."),
            kind=kinds[prefix],
            prefix=prefix,
            num_layers=num_layers,
            region=_region(prefix, sizes),
            is_main=len(sizes) == 1 or prefix in writers,
        )
        for prefix, num_layers in sizes.items()
    ]


def choose_stack(names: Iterable[str], wanted: str | None, reference: str) -> Stack:
    """Return the stack that a spec slices.

    Args:
        names: the names of the tensors of a model.
        wanted: the spec's `stack`.
        reference: the model, for messages.

    Raises:
        OutlierMergeError: there is none, it is not clear which, or none has that name.
    """
    stacks = stacks_of(names)
    if not stacks:
        raise OutlierMergeError(
            f"{shown(reference)} has no layers: no tensor's name has a number as in "
            "`model.layers.0.mlp.up_proj.weight`"
        )
    known = ", ".join(
        f"{shown(s.name)} ({s.num_layers} layers, {shown(s.prefix)}*)" for s in stacks
    )
    if wanted is None:
        candidates = [stack for stack in stacks if stack.name != "mtp"]
        if len(candidates) == 1:
            return candidates[0]
        raise OutlierMergeError(
            f"{shown(reference)} has several stacks of layers, and `stack` does not say which one "
            f"is sliced: {known}"
        )
    for stack in stacks:
        if wanted in (stack.name, stack.prefix, stack.prefix.rstrip(".")):
            return stack
    raise OutlierMergeError(
        f"found {quoted(wanted)}, expected one of the stacks of {shown(reference)}: {known}"
    )


def _kind(prefix: str, prefixes: Iterable[str]) -> str:
    found = next((kind for kind, pattern in _KINDS if pattern.search(prefix)), "text")
    if found in ("encoder", "decoder"):
        # BERT's layers are in an encoder, OPT's in a decoder, without the other.
        other = "decoder" if found == "encoder" else "encoder"
        paired = prefix.replace(f"{found}.", f"{other}.")
        return found if any(p == paired or _is_pair(p, other, prefix) for p in prefixes) else "text"
    return found


def _is_pair(prefix: str, kind: str, other: str) -> bool:
    """Tell whether a stack is the encoder or decoder beside another one."""
    outer = re.split(r"(?:en|de)coder\.", other)[0]
    return prefix.startswith(outer) and f"{kind}." in prefix and prefix != other


def _region(prefix: str, prefixes: Iterable[str]) -> str:
    """Return the longest start of names around a stack that no other stack shares."""
    others = [other for other in prefixes if other != prefix]
    parts: Sequence[str] = prefix.rstrip(".").split(".")[:-1]
    while parts:
        outer = "".join(f"{part}." for part in parts[:-1])
        if any(other.startswith(outer) for other in others):
            break
        parts = parts[:-1]
    return "".join(f"{part}." for part in parts)
