"""`fit`: fit the weights of a merge to data without labels, and write the spec."""

from __future__ import annotations

import argparse
import sys

from outliermerge.cli.parts import Command, add_json, count, print_json, say
from outliermerge.cli.terminal import counting
from outliermerge.errors import OutlierMergeError, as_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the spec, the data, and how weights are fitted."""
    parser.add_argument(
        "spec",
        metavar="SPEC",
        help="a YAML file of a merge by task_arithmetic; its weights are the start (0.3 is usual)",
    )
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="FILE",
        help="samples as for `measure`, without labels; given again for another task",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="YAML", help="the spec to write, for `run`"
    )
    parser.add_argument(
        "--by",
        choices=("model", "layer", "tensor"),
        default="layer",
        help="fit a weight for each model, for each of its layers (default), or for each tensor",
    )
    parser.add_argument(
        "--steps", type=count, default=100, metavar="N", help="steps of Adam (default 100)"
    )
    parser.add_argument(
        "--rate", type=float, default=1e-3, metavar="X", help="its learning rate (default 0.001)"
    )
    parser.add_argument(
        "--batch",
        type=count,
        default=4,
        metavar="N",
        help="samples of each --data in a step (default 4)",
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
        "--device", default="cpu", help="what runs the model: cpu (default), cuda or cuda:N"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Fit weights, write the spec, and print the entropy before and after."""
    from outliermerge.calibration.library import fit
    from outliermerge.spec.text import as_yaml
    from outliermerge.storage.files import write_whole

    output = as_path(options.output)
    if not output.absolute().parent.is_dir():
        raise OutlierMergeError(f"{output}: cannot be written: there is no folder {output.parent}")
    if output.is_dir():
        raise OutlierMergeError(f"{output}: is a folder, expected a YAML file to write")
    if output.exists() and output.samefile(as_path(options.spec)):
        raise OutlierMergeError(f"{output}: is the spec that is read. Name another file.")
    with counting("loading the models", "steps", quiet=options.quiet) as on_progress:
        found = fit(
            options.spec,
            options.data,
            by=options.by,
            steps=options.steps,
            rate=options.rate,
            batch=options.batch,
            samples=options.samples,
            max_tokens=options.max_tokens,
            device=options.device,
            on_progress=on_progress,
        )
    write_whole(output, as_yaml(found.document).encode())
    if options.json:
        entropy = {"before": found.before, "after": found.after}
        print_json({"output": str(output), "entropy": entropy, "spec": found.document})
    else:
        print(f"entropy in nats: {found.before:.4f} before, {found.after:.4f} after")
        say(f"wrote {output}: outliermerge run {output} DIR", file=sys.stderr)
    return 0


COMMAND = Command(
    summary="fit the weights of task vectors to data without labels (AdaMerging)",
    examples=(
        "outliermerge fit merge.yaml --data chats.jsonl --data maths.jsonl -o fitted.yaml",
        "outliermerge fit merge.yaml --data chats.jsonl -o fitted.yaml --by model --steps 300",
    ),
    add_arguments=add_arguments,
    run=run,
    explanation="""\
The weights are moved so that the merged model is surer of what it predicts for the samples: its
entropy becomes less (arXiv 2310.02575). Surer is not better: score the merge, too.
""",
)
