"""Makes an adapter of what a model and its base differ by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.arguments import checked, nothing
from outliermerge.checkpoint.layout import parse_bytes
from outliermerge.errors import ArgumentError, argument
from outliermerge.execution.threads import choose_device
from outliermerge.extraction.classes import Classes, classes_of
from outliermerge.extraction.making import Making
from outliermerge.extraction.merges import is_merge, pairs_of_merge
from outliermerge.extraction.pair import Pairs, open_pairs
from outliermerge.extraction.report import Extraction, Settings
from outliermerge.notebook import with_bar
from outliermerge.optional import require_torch
from outliermerge.output.names import as_local
from outliermerge.planning.plan import Plan
from outliermerge.spec.check import MergeSpec
from outliermerge.storage.stamps import Watched, watching


@checked
@with_bar("the extraction")
def extract(
    model: str | Path | Mapping[str, Any] | MergeSpec | Plan,
    *,
    base: str | Path | None = None,
    output: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    factor_embeddings: bool = False,
    partial: bool = False,
    randomized: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    core: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: str | None = None,
    fresh: bool = False,
    device: str = "cpu",
    threads: int = 0,
    memory: int | str | None = None,
    load_check: bool = False,
    on_total: Callable[[int], None] = nothing,
    on_progress: Callable[[int], None] = nothing,
) -> Extraction:
    """Write what a model, or a merge, and its base differ by as an adapter of peft.

    Each matrix that differs is factored: W' − W ≈ BA, by its largest singular values. Embeddings,
    heads, vectors, and matrices of which the factors would be larger, are saved whole. Of experts
    that the model's class packs into one tensor each is factored, all with the rank of the one
    that needs most. The error of each tensor is measured of the factors as they are written.
    Nothing is left out in silence. A killed extraction goes on when it is called again.

    A weighted sum of adapters (`task_arithmetic`, `linear`) is made of their factors. Without
    `rank`, `energy` and `error` all of it is kept: the factors are joined, and the ranks add up.

    Args:
        model: a folder, a file, a hub id, an adapter, or `base+adapter`; or a merge: a YAML file,
            the same as a dict, or a plan.
        base: the model that it was made of; of a merge it is the spec's `base_model`.
        output: the folder to write.
        rank: the rank of every matrix, or with `energy` the most.
        energy: the least share of each change's squared norm that is kept, up to 1.
        error: the most that may be lost of each change: ‖W' − W − BA‖ / ‖W' − W‖.
        factor_embeddings: also factor embeddings and heads.
        partial: leave out changed tensors that no adapter can hold, and list them.
        randomized: find singular vectors from a random start: faster, and a little less is kept.
        seed: of the random start.
        dtype: of the factors: float32, bfloat16 or float16.
        core: merge adapters in core space (arXiv 2509.17786): the method merges small matrices
            between bases of all adapters, and the result has the sum of their ranks at most.
        include: parts of names, as a spec's filters; only tensors with one of them are compared.
            The others stay the base's.
        exclude: parts of names; tensors with one of them stay the base's.
        rename: from the model's tensor names to the base's: a named map, or rules as YAML.
        fresh: start over instead of going on with a killed extraction.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        threads: how many matrices are factored at once; 0 chooses by processors and `memory`.
        memory: most memory for what is computed at once; by default 4 GiB, and what a matrix needs
            if that is more and no more than three quarters of the free memory.
        load_check: ask the class that the base's config names, where transformers is installed, of
            which kinds its modules are, and refuse what peft would not load; else names and shapes
            tell.
        on_total: called once, before reading, with the bytes to read, of all passes.
        on_progress: called with the bytes just read, by any thread.

    Raises:
        ArgumentError: an argument is wrong, or the memory is too little.
        OutlierMergeError: a model is absent or broken, the output is taken, a changed tensor
            cannot be held, or nothing differs.
    """
    settings = Settings(
        rank, energy, error, factor_embeddings, partial, randomized, seed, dtype, core,
        tuple(include), tuple(exclude),
    )  # fmt: skip
    settings.wanted(of_merge=is_merge(model))
    require_torch("an extraction")
    with watching(Watched()):
        pairs = _pairs(model, base, rename).chosen(include, exclude)
        making = Making(
            pairs, settings, device=choose_device(device), threads=threads,
            memory_bytes=None if memory is None else parse_bytes(str(memory), "memory"),
            classes=classes_of(pairs.base) if load_check else Classes(),
        )  # fmt: skip
        on_total(making.work_bytes)
        return making.make(as_local(output), on_progress, fresh=fresh)


def _pairs(
    model: str | Path | Mapping[str, Any] | MergeSpec | Plan,
    base: str | Path | None,
    rename: str | None,
) -> Pairs:
    if is_merge(model):
        for name, given in (("base", base), ("rename", rename)):
            if given is not None:
                raise ArgumentError(f"{argument(name)}: the spec says it for a merge: leave it out")
        return pairs_of_merge(model)
    if base is None:
        raise ArgumentError(f"{argument('base')}: not given: the model that this one was made of")
    assert isinstance(model, (str, Path))
    return open_pairs(model, base, rename=rename)
