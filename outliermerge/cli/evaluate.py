"""`eval`: score models on a suite of benchmarks."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Any

from outliermerge.cli.parts import Command, add_baseline, add_json, count, print_json, say
from outliermerge.cli.shipped import find_file
from outliermerge.errors import SpecError, as_path, printable, suggest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the models, the suite, and settings that override the suite."""
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="a folder or a hub id; NAME=PATH names its row"
    )
    parser.add_argument(
        "--suite",
        required=True,
        metavar="YAML",
        help="the benchmarks: a YAML file, or the name of a suite that `configs` lists",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="the folder for scores.json, the table, the chart and the answers",
    )
    parser.add_argument(
        "--limit", type=count, metavar="N", help="ask only N questions of each task"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:N, or auto (default: the suite's)")
    parser.add_argument("--dtype", help="auto, float16, bfloat16 or float32 (default: the suite's)")
    parser.add_argument(
        "--model-type",
        metavar="TYPE",
        help="the harness's class for models, such as llava_hf or hf (default: the suite's)",
    )
    parser.add_argument(
        "--load-in-8bit",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="quantise with bitsandbytes while loading (default: the suite's)",
    )
    parser.add_argument(
        "--batch-size", type=count, metavar="N", help="questions per batch (default: the suite's)"
    )
    parser.add_argument(
        "--generation",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="how answers are generated, such as max_new_tokens=32; repeatable",
    )
    parser.add_argument(
        "--num-fewshot",
        type=partial(count, least=0),
        metavar="N",
        help="show N answered questions before each (lm_eval; default: the suite's)",
    )
    parser.add_argument(
        "--apply-chat-template",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="ask in the model's chat format (lm_eval; default: the suite's)",
    )
    parser.add_argument(
        "--data", metavar="DIR", help="look for data sets in this folder before the hub"
    )
    parser.add_argument(
        "--jobs", type=count, default=1, metavar="N", help="evaluate N models at once (default 1)"
    )
    parser.add_argument(
        "--threads",
        type=count,
        default=1,
        metavar="N",
        help="threads per model on a CPU (default 1)",
    )
    add_baseline(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate; return 1 if a task has no score."""
    from outliermerge.cli.evaluation_progress import EvaluationProgress
    from outliermerge.evaluation.chart import draw
    from outliermerge.evaluation.evaluate import CHART_NAME, TABLE_NAME, evaluate
    from outliermerge.evaluation.models import split_name
    from outliermerge.evaluation.suite import load_suite
    from outliermerge.evaluation.table import make_table
    from outliermerge.storage.files import write_whole

    overrides = {
        key: getattr(options, key)
        for key in (
            "limit",
            "device",
            "dtype",
            "model_type",
            "load_in_8bit",
            "batch_size",
            "data",
            "num_fewshot",
            "apply_chat_template",
        )
    }
    suite = load_suite(
        find_file(options.suite, "suite"),
        **overrides,
        generation=_generation(options.generation) or None,
    )
    names = [split_name(model)[0] for model in options.models]
    if options.baseline is not None and options.baseline not in names:
        raise SpecError(
            f"--baseline {options.baseline}: no such model. {suggest(options.baseline, names)}"
        )
    tasks, harness = suite.document.tasks, suite.harness.title
    with EvaluationProgress(
        tasks, options.models, harness=harness, quiet=options.quiet
    ) as progress:
        scores = evaluate(
            options.models,
            suite,
            output=options.output,
            jobs=options.jobs,
            threads=options.threads,
            listener=progress,
        )
    table = make_table([scores], baseline=options.baseline)
    folder = as_path(options.output)
    write_whole(folder / TABLE_NAME, (table.as_markdown() + "\n").encode())
    draw(table, folder / CHART_NAME)
    if options.json:
        print_json(scores.as_dict())
    else:
        print(printable(table.as_markdown()))
        say(f"wrote {folder}: scores.json, {TABLE_NAME}, {CHART_NAME}", file=sys.stderr)
    return 1 if scores.failures else 0


def _generation(settings: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise SpecError(f"--generation {setting}: expected KEY=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


COMMAND = Command(
    summary="score models on a suite of benchmarks by lmms-eval or lm-eval; what is scored is kept",
    examples=(
        "outliermerge eval merged/llava_math --suite paper --output scores",
        "outliermerge eval base=org/base merged/average merged/min_sigma \\\n"
        "      --suite paper --output scores --limit 100",
    ),
    overview="outliermerge eval merged --suite paper --output scores",
    add_arguments=add_arguments,
    run=run,
    goes_on=True,
)
