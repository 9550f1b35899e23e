"""Flags of mergekit-yaml and mergekit-multi: what they mean here, or why they have no effect."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from outliermerge.cli.parts import count
from outliermerge.errors import quoted

_WITH_VALUE = (
    "--transformers-cache",
    "--lora-merge-cache",
    "--lora-merge-dtype",
    "--write-threads",
    "--intermediate-dir",
)
_MEMORY = "--memory bounds what is held"
_ADAPTERS = "adapters are added to their models block by block"
_WRITING = "tensors are written while others are computed"
WITHOUT_EFFECT = {
    "--allow-crimes": "`missing`, `extra` and `rename` in the spec allow what differs",
    "--unsafe-truncate-embeddings": "the spec says it: `vocabulary: common`",
    "--trust-remote-code": "no code of a model is run",
    "--transformers-cache": "set HF_HUB_CACHE",
    "--lora-merge-cache": _ADAPTERS,
    "--lora-merge-dtype": _ADAPTERS,
    "--low-cpu-memory": _MEMORY,
    "--read-to-gpu": _MEMORY,
    "--lazy-unpickle": "files are never loaded whole",
    "--multi-gpu": "--device cuda uses all GPUs",
    "--async-write": _WRITING,
    "--write-threads": _WRITING,
    "--intermediate-dir": "stages are computed as they are read; --keep NAME writes one, too",
    "--clone-tensors": "every tensor is written by itself",
    "--no-copy-tokenizer": "the tokenizer is always written",
    "--no-write-model-card": "the model card is always written",
    "--no-safe-serialization": "weights are always written as safetensors",
}
"""mergekit-yaml's flags that have no effect here, each with the reason."""

# These ask for what is done anyway.
_AS_HERE = (
    *("--copy-tokenizer", "--write-model-card", "--safe-serialization", "--no-quiet", "--no-cuda"),
    *("--no-allow-crimes", "--no-unsafe-truncate-embeddings", "--no-trust-remote-code"),
    *("--no-low-cpu-memory", "--no-read-to-gpu", "--no-lazy-unpickle", "--no-multi-gpu"),
    *("--no-async-write", "--no-clone-tensors"),
)


class _WithoutEffect(argparse.Action):
    """Remembers which flags were given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.without_effect = [*namespace.without_effect, option_string]


def add_mergekit_flags(parser: argparse.ArgumentParser) -> None:
    """Add mergekit-yaml's flags, so that its command lines are understood."""
    hidden: dict[str, Any] = {"help": argparse.SUPPRESS}
    parser.set_defaults(without_effect=[])
    parser.add_argument("--cuda", action="store_true", **hidden)
    parser.add_argument("--gpu-rich", action="store_true", dest="cuda", **hidden)
    parser.add_argument("-j", "--num-threads", type=count, dest="threads", **hidden)
    parser.add_argument("--out-shard-size", type=_shard_size, dest="shard_size", **hidden)
    parser.add_argument("--out-path", dest="output", **hidden)  # of mergekit-multi
    parser.add_argument("--random-seed", type=int, **hidden)
    for flag in WITHOUT_EFFECT:
        nargs = None if flag in _WITH_VALUE else 0
        parser.add_argument(flag, action=_WithoutEffect, nargs=nargs, dest="_unused", **hidden)
    for flag in _AS_HERE:
        parser.add_argument(flag, action="store_true", dest="_unused", **hidden)


def note_of(options: argparse.Namespace) -> list[str]:
    """Return a note on the flags that were given and have no effect, if there are any."""
    given = list(dict.fromkeys(options.without_effect))
    reasons: dict[str, list[str]] = {}
    for flag in given:
        reasons.setdefault(WITHOUT_EFFECT[flag], []).append(flag)
    said = "; ".join(f"{', '.join(flags)} ({reason})" for reason, flags in reasons.items())
    return [f"flags of mergekit without effect here: {said}"] if said else []


def _shard_size(text: str) -> str:
    """Return mergekit's shard size as ours; its B is a billion bytes, whatever its help says.

    >>> _shard_size("5B"), _shard_size("500m"), _shard_size("1000")
    ('5GB', '500MB', '1000')
    """
    found = re.fullmatch(r"(\d{1,15})([kKmMbB]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a size such as 5B")
    return found[1] + {"": "", "k": "kB", "m": "MB", "b": "GB"}[found[2].lower()]
