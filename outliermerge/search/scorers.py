"""Chooses what scores the merges of a search, by what a command line names."""

from __future__ import annotations

from pathlib import Path

from outliermerge.errors import ArgumentError, argument
from outliermerge.evaluation.suite import load_suite
from outliermerge.search.functions import FunctionScorer, is_function
from outliermerge.search.scorer import Scorer
from outliermerge.search.suites import SuiteScorer
from outliermerge.search.unlabelled import KINDS, UnlabelledScorer


def find_scorer(
    name: str, *, device: str, folder: Path, threads: int = 1, limit: int | None = None
) -> Scorer:
    """Return a scorer.

    Args:
        name: the file of a suite, package.module:function, entropy:FILE or agreement:FILE.
        device: where models are loaded; a suite names its own, which another than cpu replaces.
        folder: for the files of a harness.
        threads: of a harness.
        limit: how many questions of each task of a suite there are.

    Raises:
        ArgumentError: a function is given a limit.
        SpecError: there is no such function or suite, or it is wrong.
        OutlierMergeError: the harness or its data are not there.
    """
    kind, colon, path = name.partition(":")
    if colon and kind in KINDS:
        return UnlabelledScorer(kind, path, device=device)
    if is_function(name):
        if limit is not None:
            raise ArgumentError(f"{argument('limit')}: a function has the questions that it has")
        return FunctionScorer(name, device=device)
    return SuiteScorer(
        load_suite(name, limit=limit, device=None if device == "cpu" else device),
        folder=folder,
        threads=threads,
    )
