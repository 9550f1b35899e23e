"""Checks that an adapter's file contains everything that its config says was trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from outliermerge.checkpoint.adapters.config import PATTERNS, LayerPatterns, matches_end
from outliermerge.checkpoint.sources import Source
from outliermerge.errors import listing, quoted, shown


def broken_promises(
    config: Mapping[str, Any],
    patterns: LayerPatterns,
    layers: Mapping[str, Sequence[str]],
    tokens: Collection[str],
    whole: Mapping[str, Source],
    base: Mapping[str, Source],
) -> Iterator[str]:
    """Yield a message for each thing that the config names and the file lacks.

    Args:
        layers: for each layer with factors its possible names: in the file, without wrappers, in
            the base.
        patterns: tells which layers the config's expressions match.
        tokens: the layers with trained tokens.
        whole: the tensors stored whole, by the adapter's names.
        base: the tensors of the base.
    """
    yield from _patterns(config, patterns, layers)
    yield from _saved_modules(config, whole, base)
    yield from _trained_tokens(config, patterns, tokens)


def notes_of(
    config: Mapping[str, Any], layers: Mapping[str, Sequence[str]], base: Collection[str]
) -> Iterator[str]:
    """Yield a note for targets of the config that the base has and the file has nothing for."""
    names = [name for alternatives in layers.values() for name in alternatives]
    for key, end in (("target_modules", ".weight"), ("target_parameters", "")):
        targets = config.get(key)
        absent = [
            target
            for target in (targets if isinstance(targets, list) else ())
            if not any(matches_end(name, target) for name in names)
            and any(matches_end(name, f"{target}{end}") for name in base)
        ]
        if absent:
            yield (
                f"its config names {', '.join(map(shown, absent))} among its {key}, of which its "
                "file holds nothing: they stay as they are in the base"
            )


def _patterns(
    config: Mapping[str, Any], patterns: LayerPatterns, layers: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    for key in PATTERNS:
        for pattern in config.get(key) or () if layers else ():
            if not any(patterns.ends_with(n, pattern) for names in layers.values() for n in names):
                yield (
                    f"{key}: {quoted(pattern)} matches none of the {len(layers)} layers of the "
                    "adapter:\n"
                    f"{listing(layers, limit=5)}\n"
                    "The layer that it is for would get another scale than in training. Write the "
                    "pattern for these names, or remove it if it is for none of them."
                )


def _saved_modules(
    config: Mapping[str, Any], whole: Mapping[str, Source], base: Mapping[str, Source]
) -> Iterator[str]:
    named = [name for name in config.get("modules_to_save") or () if isinstance(name, str)]
    absent = [name for name in named if not any(f"{name}." in f"{key}." for key in whole)]
    # peft lists all names that a classifier's head may have; a model has one of them.
    for name in absent:
        shapes = {s.shape for key, s in base.items() if f".{name}." in f".{key}"}
        stands_for_it = any(source.shape in shapes for source in whole.values())  # it is tied
        if (shapes and not stands_for_it) or len(absent) == len(named):
            yield (
                f"modules_to_save names {quoted(name)}, which was trained, but the file holds no "
                "tensor "
                "of it. Save the adapter again, with all of its weights gathered."
            )


def _trained_tokens(
    config: Mapping[str, Any], patterns: LayerPatterns, tokens: Collection[str]
) -> Iterator[str]:
    said = config.get("trainable_token_indices")
    if isinstance(said, list) and said and not tokens:
        yield (
            "trainable_token_indices says that tokens were trained, but the file holds no row of "
            "them (token_adapter.trainable_tokens_delta). Save the adapter again."
        )
    if not isinstance(said, Mapping):
        return
    found = {name: [layer for layer in tokens if patterns.ends_with(layer, name)] for name in said}
    for name, layers in found.items():
        # If tied layers train the same tokens, the file has only one of them.
        tied = any(other and said[key] == said[name] for key, other in found.items())
        if not layers and not tied:
            has = f"; it has those of {', '.join(map(shown, tokens))}" if tokens else ""
            yield (
                f"trainable_token_indices: {quoted(name)} matches no layer whose trained tokens "
                "the file "
                f"holds{has}. Correct the name, or save the adapter again."
            )
