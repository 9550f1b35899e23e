"""The names of tensors that may be tied, and whether a config ties them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from outliermerge.checkpoint.config import at_level, language_levels
from outliermerge.checkpoint.model_types import effective_config
from outliermerge.checkpoint.sources import Source

EMBEDDINGS = (
    "shared.weight",
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "backbone.embeddings.weight",
    "tokens_embed.weight",
    "word_embedding.weight",
    "transformer.embeddings.weight",
)
# For the end of a tied tensor's name, the ends of names that it may be tied to, the likeliest first
# (from `_tied_weights_keys` of transformers' model classes).
_ORIGINALS = {
    "lm_head.weight": EMBEDDINGS,
    "predictions.decoder.weight": EMBEDDINGS,
    "lm_head.decoder.weight": EMBEDDINGS,
    "embed_out.weight": EMBEDDINGS,
    "proj_out.weight": EMBEDDINGS,
    "vocab_projector.weight": EMBEDDINGS,
    "generator_lm_head.weight": EMBEDDINGS,
    "output_projection.weight": EMBEDDINGS,
    "mlm_score.decoder.weight": EMBEDDINGS,
    "lm_head.out_proj.weight": EMBEDDINGS,
    "pred_layer.proj.weight": EMBEDDINGS,
    "lm_loss.weight": EMBEDDINGS,
    "head.decoder.weight": EMBEDDINGS,
    "decoder.weight": EMBEDDINGS,
    "text_encoder.embed_tokens.weight": ("shared.weight",),
    "text_decoder.embed_tokens.weight": ("shared.weight",),
    "encoder.embed_tokens.weight": ("shared.weight",),
    "decoder.embed_tokens.weight": ("shared.weight",),
    "predictions.decoder.bias": ("predictions.bias",),
    "lm_head.decoder.bias": ("lm_head.bias",),
    "shared_head.head.weight": ("lm_head.weight",),  # in a layer for further tokens
}
_ENDS = tuple(_ORIGINALS)
# The head in Llama's original layout; names of other tensors end like it, too.
_OUTPUT = "output.weight"
# The embeddings' name in such a layer.
_EMBED_TOKENS = "embed_tokens.weight"
_LAYER_EMBEDDINGS = re.compile(rf"(?P<stem>^|.*\.)layers\.\d+\.(?P<end>{_EMBED_TOKENS})$")
# Classes with a head, by `architectures`; other classes have nothing to tie to the embeddings.
_HEADED = re.compile(
    r"CausalLM|LMHead|MaskedLM|PreTraining|ConditionalGeneration|ImageTextToText|Seq2Seq"
    r"|DoubleHeads|WithLM|Generator"
)
# Types of language models that tie nothing by default, so that transformers need not be asked.
_UNTIED = ("llama", "mistral", "mixtral", "qwen2", "qwen3")


def ties_head(config: Mapping[str, Any]) -> bool | None:
    """Tell whether a config ties the head to the embeddings; None if that is unclear.

    If all levels of a config that have the key agree, all loaders agree. If the language model's
    level says False and an outer level says True, loaders differ.

    >>> ties_head({"tie_word_embeddings": True, "text_config": {}}), ties_head({})
    (True, None)
    >>> ties_head({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}})
    """
    if config.get("scale_decoder_outputs") is False:
        return None  # transformers 5 writes True for every T5, even if its head is its own
    levels = [at_level(config, path) for path in language_levels(config)]
    said = {v for level in levels if isinstance(v := level.get("tie_word_embeddings"), bool)}
    text = levels[-1]
    inner = text.get("tie_word_embeddings")
    if said == {False} and inner is None and text is not config:
        # transformers takes the default of the language model's type, whatever the outer levels
        # say.
        asked = text.get("model_type") not in _UNTIED and effective_config(config)
        return bool(asked and asked.get("tie_word_embeddings"))
    if len(said) == 1:
        return said.pop()
    if said:
        return True if inner else None
    filled = effective_config(config)
    value = filled and filled.get("tie_word_embeddings")
    return value if isinstance(value, bool) else None


def is_head(name: str) -> bool:
    """Tell whether a tensor is a language model's output head, which a config may tie."""
    return _originals(name) is EMBEDDINGS


def head_beside(head: str, tensors: Mapping[str, Source]) -> str | None:
    """Return the head that a model has for the same embeddings under another name; else None.

    GPT-NeoX's is `embed_out` in its files, and `lm_head` to transformers 5 and what trains by it.
    """
    original = original_of(head, tensors)
    others = (name for name in tensors if name != head and is_head(name)) if original else ()
    return next((name for name in others if original_of(name, tensors) == original), None)


def head_rename(head: str, other: str) -> str:
    r"""Return the rule of a spec's `rename` that gives a head another's name.

    >>> print(head_rename("lm_head.weight", "embed_out.weight"))
    {from: '^lm_head\.', to: 'embed_out.'}
    """
    old, new = (name.removesuffix("weight") for name in (head, other))
    return f"{{from: '^{re.escape(old)}', to: '{new}'}}"


def may_have_head(config: Mapping[str, Any]) -> bool:
    """Tell whether a config's class has a head; it may have one if the config names no class."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return True
    return any(_HEADED.search(str(name)) for name in architectures)


def vocabulary_rows(shapes: Mapping[str, tuple[int, ...]]) -> set[int]:
    """Return the set of the numbers of rows of all embeddings and heads."""
    return {
        shape[0] for name, shape in shapes.items() if name.endswith(EMBEDDINGS) or is_head(name)
    }


def original_of(name: str, tensors: Mapping[str, Source]) -> str | None:
    """Return the name of the tensor that a tensor can be tied to; None if it is unclear.

    Of several candidates of the likeliest kind, the one in the same part of the model is taken, or
    else the outermost.
    """
    if name.endswith(_EMBED_TOKENS) and (layer := _LAYER_EMBEDDINGS.match(name)):
        outer = layer["stem"] + layer["end"]
        return outer if outer in tensors else None
    for ending in _originals(name):
        found = [
            other
            for other in tensors
            if (other == ending or other.endswith("." + ending))
            and other != name
            and component(other) == component(name)
            and (name not in tensors or tensors[other].shape[1:] == tensors[name].shape[1:])
        ]
        if found:
            near = sorted(found, key=lambda other: _distance(name, other))
            is_clear = len(near) == 1 or _distance(name, near[0]) < _distance(name, near[1])
            return near[0] if is_clear else None
    return None


def _distance(name: str, other: str) -> tuple[int, int]:
    """Return the distance of two names: how many parts follow the shared start, and the depth."""
    ours, theirs = name.split("."), other.split(".")
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    return -len(list(shared)), len(theirs)


def head_of(name: str) -> str | None:
    """Return the name that a head tied to these embeddings has, if no head is stored.

    >>> head_of("model.embed_tokens.weight"), head_of("language_model.model.embed_tokens.weight")
    ('lm_head.weight', 'language_model.lm_head.weight')
    >>> head_of("thinker.model.embed_tokens.weight")
    'thinker.lm_head.weight'
    """
    if name.startswith("gpt_neox."):
        return "embed_out.weight"
    match = re.match(
        r"^(?P<outer>(language_model|thinker)\.)?((model|transformer)\.|shared\.)", name
    )
    return f"{match['outer'] or ''}lm_head.weight" if match else None


def embeddings_of(head: str, names: Iterable[str]) -> str | None:
    """Return the name that the embeddings tied to a head have, if none are stored.

    >>> embeddings_of("lm_head.weight", ["model.layers.0.mlp.weight", "lm_head.weight"])
    'model.embed_tokens.weight'
    """
    found = set()
    for name in names:
        match = re.match(r"^(?P<stem>(\w+\.)*?)(?P<stack>layers|h)\.\d+\.", name)
        if match and not re.search(r"vision|visual|audio|encoder", match["stem"]):
            end = "wte.weight" if match["stack"] == "h" else "embed_tokens.weight"
            found.add(match["stem"] + end)
    fitting = [name for name in found if head_of(name) == head]
    return fitting[0] if len(fitting) == 1 else None


def component(name: str) -> str:
    """Return the folder of the pipeline's component that a tensor belongs to."""
    return name.rpartition("/")[0]


def _originals(name: str) -> tuple[str, ...]:
    """Return the ends of the names of tensors that a tensor may be tied to."""
    last = name.rpartition("/")[2]
    if last == _OUTPUT:
        return EMBEDDINGS
    if not last.endswith(_ENDS):
        return ()  # a fast answer, since a model may have many names
    end = next((end for end in _ORIGINALS if last == end or last.endswith("." + end)), None)
    return _ORIGINALS[end] if end else ()
