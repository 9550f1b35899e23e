"""Chooses what scores the merges of a search, by what a command line names."""

from __future__ import annotations

from outliermerge.errors import SpecError, shown
from outliermerge.search.functions import FunctionScorer, is_function
from outliermerge.search.scorer import Scorer


def find_scorer(name: str, *, device: str) -> Scorer:
    """Return a scorer.

    Args:
        name: package.module:function.
        device: where models are loaded.

    Raises:
        SpecError: there is no such scorer.
    """
    if is_function(name):
        return FunctionScorer(name, device=device)
    raise SpecError(f"{shown(name)}: expected a function package.module:function")
