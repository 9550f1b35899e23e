"""The library's functions that run models over data: `measure` and `fit`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from outliermerge.arguments import checked, nothing
from outliermerge.calibration import fit as fitting
from outliermerge.calibration import measure as measuring
from outliermerge.calibration.by_layer import fits_whole, measure_by_layer
from outliermerge.calibration.data import Sample, read_samples
from outliermerge.calibration.fit import By, Fitted
from outliermerge.calibration.measure import held
from outliermerge.calibration.model import load
from outliermerge.calibration.regmean_pp import alternation_of, measure_alternating
from outliermerge.calibration.sums import Fisher
from outliermerge.checkpoint.layout import parse_bytes
from outliermerge.checkpoint.measured import KINDS
from outliermerge.errors import ArgumentError, argument, as_path, quoted, suggest
from outliermerge.execution.threads import choose_device
from outliermerge.spec.check import MergeSpec, load_spec


@checked
def measure(
    model: str | Path | Mapping[str, Any] | MergeSpec,
    data: str | Path | Sequence[str | Path],
    *,
    output: str | Path | None = None,
    statistics: str | Sequence[str] = KINDS,
    fisher: Fisher = "empirical",
    samples: int | None = None,
    max_tokens: int = 512,
    column: str = "text",
    split: str = "train",
    memory: int | str = "4GiB",
    save_every: int = 50,
    seed: int = 0,
    device: str = "cpu",
    by_layer: bool = False,
    fresh: bool = False,
    on_progress: Callable[[int, int], None] = nothing,
) -> dict[Path, Mapping[str, Any]]:
    """Run a model over data, and write statistics that merge methods take.

    Args:
        model: a folder or a hub id; or a spec of a merge by regmean, for RegMean++: its models are
            measured behind the merge of the layers before, into the folders that it names.
        data: a .jsonl or .parquet file of samples, or a data set of the hub; for a spec one for
            each model, in its order.
        output: the folder to write; the model's name and `-statistics` by default.
        statistics: what is measured: "gram", "fisher", "mean".
        fisher: whose labels Fisher information is of: the data's ("empirical"), or drawn by the
            model ("sampled").
        samples: take only so many, the first ones.
        max_tokens: of a sample; the rest is left out.
        column: the key of the text.
        split: of a data set of the hub.
        memory: most memory for sums, besides the model.
        save_every: how many samples are lost at most if it is killed.
        seed: of labels that are drawn.
        device: what runs the model: "cpu", "cuda" or "cuda:N".
        by_layer: have one layer in memory at a time, for `gram` and `mean`; so is a model measured
            that does not fit in memory.
        fresh: start over instead of going on with a killed run.
        on_progress: called with the samples done, of all passes, and how many there are.

    Returns:
        What the manifest says, by folder.

    Raises:
        SpecError: a file of samples, or the spec, is wrong.
        ArgumentError: an argument is wrong.
        OutlierMergeError: the folder is there, or holds part of something else; the model fails.

    Example:
        >>> import outliermerge
        >>> outliermerge.measure("models/chat", "chats.jsonl")  # doctest: +SKIP
    """
    kinds = _kinds(statistics)
    names = [str(one) for one in ([data] if isinstance(data, (str, Path)) else data)]
    of_spec = not isinstance(model, (str, Path)) or str(model).endswith((".yaml", ".yml"))
    if not of_spec and len(names) != 1:
        raise ArgumentError(f"{argument('data')}: given {len(names)}, expected one for a model")
    if of_spec and output is not None:
        raise ArgumentError(f"{argument('output')}: the spec names the folders: leave it out")
    memory_bytes = parse_bytes(str(memory), "memory")
    chosen = _device(device)
    given = [read_samples(name, limit=samples, column=column, split=split) for name in names]
    if of_spec:
        return _measure_merge(
            model, given, names, chosen, max_tokens=max_tokens, fresh=fresh, news=on_progress
        )
    folder = as_path(str(output or f"{Path(str(model).rstrip('/')).name}-statistics"))
    wanted = measuring.Wanted(kinds, fisher, max_tokens, seed)
    with held(folder, fresh=fresh):
        if by_layer or not fits_whole(str(model), chosen):
            manifest = measure_by_layer(
                str(model),
                given[0],
                output=folder,
                wanted=wanted,
                device=chosen,
                data=names[0],
                on_progress=on_progress,
            )
            return {folder: manifest}
        manifest = measuring.measure(
            load(str(model), device=chosen, what="measure"),
            given[0],
            output=folder,
            wanted=wanted,
            data=names[0],
            memory_bytes=memory_bytes,
            save_every=save_every,
            on_progress=on_progress,
        )
    return {folder: manifest}


def _measure_merge(
    model: Any,
    samples: Sequence[Sequence[Sample]],
    names: Sequence[str],
    device: str,
    *,
    max_tokens: int,
    fresh: bool,
    news: Callable[[int, int], None],
) -> dict[Path, Mapping[str, Any]]:
    merge = alternation_of(_spec(model))
    if len(samples) != len(merge.models):
        raise ArgumentError(
            f"{argument('data')}: given {len(samples)} time(s), expected {len(merge.models)}: one "
            "for each model of the spec"
        )
    with ExitStack() as stack:
        for folder in merge.folders:
            stack.enter_context(held(folder, fresh=fresh))
        found = measure_alternating(
            merge, samples, device=device, data=names, max_tokens=max_tokens, on_progress=news
        )
    return dict(zip(merge.folders, found, strict=True))


@checked
def fit(
    spec: str | Path | Mapping[str, Any] | MergeSpec,
    data: str | Path | Sequence[str | Path],
    *,
    by: By = "layer",
    steps: int = 100,
    rate: float = 1e-3,
    batch: int = 4,
    samples: int | None = None,
    max_tokens: int = 512,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = nothing,
) -> Fitted:
    """Fit the weights of a merge by `task_arithmetic` to data without labels (AdaMerging).

    The weights are moved so that the merged model is surer of what it predicts for the samples.
    Surer is not better: score the merge, too.

    Args:
        spec: the merge; its weights are the start (0.3 is usual).
        data: samples as for `measure`, usually one file for each model's task.
        by: fit a weight for each "model", for each of its layers ("layer"), or for each "tensor".
        steps: of Adam.
        rate: its learning rate.
        batch: samples of each file in a step.
        samples: take only so many of each file, the first ones.
        max_tokens: of a sample; the rest is left out.
        device: what runs the model: "cpu", "cuda" or "cuda:N".
        on_progress: called with the steps done, and how many there are.

    Returns:
        The spec with the weights as `document`, which `run` takes, and the mean entropy in nats
        `before` and `after`.

    Raises:
        SpecError: the spec or a file of samples is wrong.
        ArgumentError: an argument is wrong.
        OutlierMergeError: a model does not fit, or fails.

    Example:
        >>> import outliermerge
        >>> fitted = outliermerge.fit("merge.yaml", "chats.jsonl")  # doctest: +SKIP
        >>> outliermerge.run(fitted.document, output="merged")  # doctest: +SKIP
    """
    if not 0 < rate <= sys.float_info.max:
        raise ArgumentError(f"{argument('rate')}: found {quoted(rate)}, expected a number above 0")
    names = [data] if isinstance(data, (str, Path)) else data
    if not names:
        raise ArgumentError(f"{argument('data')}: none given, expected one or more")
    loaded = _spec(spec)
    return fitting.fit(
        loaded,
        [read_samples(str(name), limit=samples) for name in names],
        wanted=fitting.Wanted(by, steps, rate, batch, max_tokens),
        device=_device(device),
        on_progress=on_progress,
    )


def _spec(given: Any) -> MergeSpec:
    return given if isinstance(given, MergeSpec) else load_spec(given)


def _device(name: str) -> str:
    chosen = choose_device(name)
    return "cuda:0" if chosen == "cuda" else chosen


def _kinds(given: str | Sequence[str]) -> tuple[str, ...]:
    every = given.split(",") if isinstance(given, str) else given
    kinds = tuple(dict.fromkeys(str(one).strip() for one in every))
    for kind in kinds:
        if kind not in KINDS:
            raise ArgumentError(
                f"{argument('statistics')}: no statistic {quoted(kind)}. {suggest(kind, KINDS)}"
            )
    if not kinds:
        raise ArgumentError(f"{argument('statistics')}: none, expected some of {', '.join(KINDS)}")
    return kinds
