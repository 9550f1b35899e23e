"""`measure`: run a model over data, and write statistics that merge methods take."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from outliermerge.cli.parts import Command, add_json, count, print_json, say
from outliermerge.cli.tables import NamedTable
from outliermerge.cli.terminal import counting_bars, open_console
from outliermerge.errors import ArgumentError, argument, as_path, suggest

if TYPE_CHECKING:
    from outliermerge.calibration.data import Sample

    Samples: TypeAlias = Sequence[Sequence[Sample]]
    Progress: TypeAlias = Callable[[int, int], None]
    Found: TypeAlias = Sequence[tuple[Path, Mapping[str, Any]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the data, and what is measured."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder or a hub id: org/name; or a spec of a merge by regmean, for RegMean++: its "
        "models are measured behind the merge of the layers before, into the folders that it names "
        "as their `statistics`",
    )
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="FILE",
        help="a .jsonl or .parquet file of samples, or a data set of the hub: org/name; for a spec "
        "one for each model, in its order",
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="the folder to write (default: MODEL-statistics)"
    )
    parser.add_argument(
        "--statistics",
        default="gram,fisher,mean",
        metavar="KINDS",
        help="what is measured: gram (of the inputs of linear layers), fisher (the diagonal of the "
        "Fisher information) and mean (of the inputs), with commas (default all)",
    )
    parser.add_argument(
        "--fisher",
        choices=("empirical", "sampled"),
        default="empirical",
        help="whose labels Fisher information is of: the data's (default), or drawn by the model",
    )
    parser.add_argument(
        "--samples", type=count, metavar="N", help="take only the first N samples (default all)"
    )
    parser.add_argument(
        "--max-tokens",
        type=count,
        default=512,
        metavar="N",
        help="tokens of a sample that are taken, without images (default 512)",
    )
    parser.add_argument(
        "--column", default="text", metavar="NAME", help="the key of the text (default text)"
    )
    parser.add_argument(
        "--split", default="train", metavar="NAME", help="of a data set of the hub (default train)"
    )
    parser.add_argument(
        "--memory",
        default="4GiB",
        metavar="SIZE",
        help="most memory for sums, besides the model; what does not fit is measured in further "
        "passes over the data (default 4GiB)",
    )
    parser.add_argument(
        "--save-every",
        type=count,
        default=50,
        metavar="N",
        help="save the sums after every N samples, to go on from (default 50)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of labels that are drawn (default 0)"
    )
    parser.add_argument(
        "--device", default="cpu", help="what runs the model: cpu (default), cuda or cuda:N"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over instead of going on with a killed run"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Measure, and print what was written."""
    from rich.console import Console

    from outliermerge.calibration.data import read_samples
    from outliermerge.execution.threads import choose_device

    _kinds(options.statistics)
    of_spec = options.model.endswith((".yaml", ".yml"))
    if not of_spec and len(options.data) > 1:
        raise ArgumentError(f"{argument('data')}: given twice, expected once for a model")
    device = choose_device(options.device)
    device = "cuda:0" if device == "cuda" else device
    samples = [
        read_samples(name, limit=options.samples, column=options.column, split=options.split)
        for name in options.data
    ]
    with counting_bars(Console(stderr=True), quiet=options.quiet) as bar:
        task = bar.add_task("loading the model", total=None)

        def on_progress(done: int, total: int) -> None:
            bar.update(task, description="samples of all passes", completed=done, total=total)

        measure = _measure_merge if of_spec else _measure_model
        found = measure(options, samples, device, on_progress)
    if options.json:
        print_json([{"output": str(output)} | dict(manifest) for output, manifest in found])
        return 0
    for output, manifest in found:
        table = NamedTable("statistic", "tensors", "norm")
        for kind, entry in manifest["statistics"].items():
            table.add_row(kind, str(entry["num_tensors"]), f"{entry['norm']:.4g}")
        table.print(open_console())
        data, unknown = manifest["data"], manifest.get("not_measured", ())
        say(
            f"wrote {output}: {data['num_samples']:,} samples, {data['num_tokens']:,} tokens",
            file=sys.stderr,
        )
        if unknown and not options.quiet:
            say(
                f"note: {len(unknown)} parameter(s) are no tensors of the files as they are, such "
                f"as {unknown[0]}, and were not measured",
                file=sys.stderr,
            )
    return 0


def _measure_model(
    options: argparse.Namespace, samples: Samples, device: str, on_progress: Progress
) -> Found:
    from outliermerge.calibration.measure import Wanted, measure, remove_unfinished
    from outliermerge.calibration.model import load
    from outliermerge.checkpoint.layout import parse_bytes

    memory_bytes = parse_bytes(options.memory, "memory")
    output = as_path(options.output or f"{Path(options.model.rstrip('/')).name}-statistics")
    if options.fresh:
        remove_unfinished(output)
    manifest = measure(
        load(options.model, device=device, what="measure"),
        samples[0],
        output=output,
        wanted=Wanted(_kinds(options.statistics), options.fisher, options.max_tokens, options.seed),
        data=options.data[0],
        memory_bytes=memory_bytes,
        save_every=options.save_every,
        on_progress=on_progress,
    )
    return [(output, manifest)]


def _measure_merge(
    options: argparse.Namespace, samples: Samples, device: str, on_progress: Progress
) -> Found:
    from outliermerge.calibration.measure import remove_unfinished
    from outliermerge.calibration.regmean_pp import alternation_of, measure_alternating
    from outliermerge.spec.check import load_spec

    if options.output is not None:
        raise ArgumentError(f"{argument('output')}: the spec names the folders: leave it out")
    merge = alternation_of(load_spec(options.model))
    if len(samples) != len(merge.models):
        raise ArgumentError(
            f"{argument('data')}: given {len(samples)} time(s), expected {len(merge.models)}: one "
            f"for each model of {options.model}"
        )
    for folder in merge.folders if options.fresh else ():
        remove_unfinished(folder)
    found = measure_alternating(
        merge,
        samples,
        device=device,
        data=options.data,
        max_tokens=options.max_tokens,
        on_progress=on_progress,
    )
    return list(zip(merge.folders, found, strict=True))


def _kinds(text: str) -> tuple[str, ...]:
    from outliermerge.checkpoint.measured import KINDS

    kinds = tuple(dict.fromkeys(one.strip() for one in text.split(",")))
    for kind in kinds:
        if kind not in KINDS:
            raise ArgumentError(
                f"{argument('statistics')}: no statistic {kind!r}. {suggest(kind, KINDS)}"
            )
    return kinds


COMMAND = Command(
    summary="run a model over data, and write statistics for methods such as regmean",
    examples=(
        "outliermerge measure models/chat --data chats.jsonl -o statistics/chat",
        "outliermerge measure models/chat --data chats.jsonl --statistics gram --samples 256 \\\n"
        "      --device cuda",
        "outliermerge measure models/chat --data org/name --split train --column content",
        "outliermerge measure merge.yaml --data chats.jsonl --data maths.jsonl",
    ),
    overview="outliermerge measure models/chat --data chats.jsonl -o statistics/chat",
    add_arguments=add_arguments,
    run=run,
    goes_on=True,
    explanation="""\
Each line of the data is a JSON object: {"text": "…"}, or {"prompt": "…", "completion": "…"}, whose
prompt's tokens are not predicted; a classifier's text has a "label"; "images": [FILE, …] are given
to the model's processor. A spec takes the folder as `statistics: DIR` of a model.
""",
)
