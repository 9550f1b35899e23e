"""The defaults of a config's model type for keys that the config lacks, from its library.

A merge works without this. It is used only if a config lacks a key that matters, because
transformers imports torch with its first config, which takes seconds.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

_log = logging.getLogger(__name__)


def has_transformers() -> bool:
    """Tell whether transformers is installed, without importing it."""
    try:
        return find_spec("transformers") is not None
    except ImportError:  # a hook refuses it
        return False


def effective_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a config with its model type's defaults filled in, nested parts too.

    The config of a part of a diffusers pipeline names its class instead of a model type. None if
    the library is not installed, does not know the type, or refuses the config.

    >>> effective_config({"model_type": "no such type"}) is None
    True
    """
    if isinstance(config.get("_class_name"), str):
        find = _of_diffusers if find_spec("diffusers") is not None else None
    else:
        named = isinstance(config.get("model_type"), str)
        find = _of_transformers if named and has_transformers() else None
    if find is None:
        return None
    try:
        return _effective(json.dumps(config, sort_keys=True), find)
    except (TypeError, ValueError):
        return None


@lru_cache(maxsize=64)
def _effective(
    text: str, find: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> dict[str, Any] | None:
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    library = "diffusers" if find is _of_diffusers else "transformers"
    if library not in sys.modules:
        _log.info(
            "a config leaves out values that another has: importing %s, which knows their "
            "defaults, takes some seconds",
            library,
        )
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = find(json.loads(text))
        # As JSON values: tuples become lists, and values that JSON lacks become texts.
        filled: dict[str, Any] | None = json.loads(json.dumps(found, default=str))
        return filled
    except Exception:  # a class may raise anything for a config of another kind
        return None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _of_transformers(config: dict[str, Any]) -> dict[str, Any] | None:
    import transformers
    from transformers import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        return None
    # Other code may use the same model type with other defaults, as LLaVA's original code uses
    # "llava".
    architectures = config.get("architectures") or ()
    if architectures and not set(dir(transformers)) & set(architectures):
        return None
    found = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    filled: dict[str, Any] = found.to_dict()
    # to_dict leaves out attributes that a class sets itself.
    filled["tie_word_embeddings"] = getattr(found, "tie_word_embeddings", None)
    return filled


def _of_diffusers(config: dict[str, Any]) -> dict[str, Any] | None:
    import diffusers

    found = getattr(diffusers, config["_class_name"], None)
    if not isinstance(found, type):
        return None
    parameters = inspect.signature(found).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | config
