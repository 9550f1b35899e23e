"""What a config means where it is silent: the defaults of its model type, as transformers has them.

Nothing here is needed to merge. It is asked only where a config leaves out a key that matters,
since transformers imports torch with its first config, which takes seconds.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any


def has_transformers() -> bool:
    """Tell whether transformers is installed, without importing it."""
    return find_spec("transformers") is not None


def effective_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a config with its model type's defaults filled in, nested parts too.

    None where transformers is not installed, does not know the model type, or refuses the config.

    >>> effective_config({"model_type": "no such type"}) is None
    True
    """
    if not isinstance(config.get("model_type"), str) or not has_transformers():
        return None
    try:
        text = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError):
        return None
    return _effective(text)


@lru_cache(maxsize=64)
def _effective(text: str) -> dict[str, Any] | None:
    from transformers import CONFIG_MAPPING

    config = json.loads(text)
    if config["model_type"] not in CONFIG_MAPPING:
        return None
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = CONFIG_MAPPING[config["model_type"]].from_dict(config)
            filled: dict[str, Any] = found.to_dict()
            # to_dict leaves out attributes that a class sets itself.
            filled["tie_word_embeddings"] = getattr(found, "tie_word_embeddings", None)
    except Exception:  # a class may raise anything for a config that is not of its kind
        return None
    finally:
        logger.setLevel(level)
    return filled
