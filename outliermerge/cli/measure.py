"""`measure`: run a model over data, and write statistics that merge methods take."""

from __future__ import annotations

import argparse
import sys

from outliermerge.cli.parts import Command, add_json, count, print_json, say
from outliermerge.cli.tables import NamedTable
from outliermerge.cli.terminal import counting, open_console


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
        "-o",
        "--output",
        metavar="DIR",
        help="the folder to write (default: NAME-statistics here, NAME that of the model's folder)",
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
        "--by-layer",
        action="store_true",
        help="have one layer in memory at a time, and all samples between two layers; for gram and "
        "mean; so is a model measured that does not fit in memory",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over instead of going on with a killed run"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Measure, and print what was written."""
    from outliermerge.calibration.library import measure

    with counting("loading the model", "samples of all passes", quiet=options.quiet) as on_progress:
        written = measure(
            options.model,
            options.data,
            output=options.output,
            statistics=options.statistics,
            fisher=options.fisher,
            samples=options.samples,
            max_tokens=options.max_tokens,
            column=options.column,
            split=options.split,
            memory=options.memory,
            save_every=options.save_every,
            seed=options.seed,
            device=options.device,
            by_layer=options.by_layer,
            fresh=options.fresh,
            on_progress=on_progress,
        )
    if options.json:
        print_json(
            [{"output": str(output)} | dict(manifest) for output, manifest in written.items()]
        )
        return 0
    for output, manifest in written.items():
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
