"""The commands on scores, eval and compare: parse, call, print; nothing else."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.cli.parts import AddCommand, print_json, say
from outliermerge.errors import SpecError, printable, suggest

if TYPE_CHECKING:
    from outliermerge.evaluation.table import Table


def add_commands(add: AddCommand, count: Callable[[str], int]) -> None:
    """Add the parsers of `eval` and `compare`."""
    evaluate = add(
        "eval",
        "score models by lmms-eval on a suite of benchmarks; what is scored is not run again",
        "outliermerge eval merged/llava_math --suite evals/paper.yaml --output scores",
        "outliermerge eval base=org/base merged/average merged/min_sigma \\\n"
        "      --suite evals/paper.yaml --output scores --limit 100",
    )
    evaluate.add_argument(
        "models", metavar="MODEL", nargs="+", help="a folder or hub id, or NAME=one"
    )
    evaluate.add_argument("--suite", required=True, metavar="YAML", help="one of evals/, or yours")
    evaluate.add_argument(
        "--output", required=True, metavar="DIR", help="for scores.json, table, chart, answers"
    )
    evaluate.add_argument("--limit", type=count, metavar="N", help="questions of each task")
    evaluate.add_argument("--device", help="cpu, cuda, cuda:N, or auto (default: the suite's)")
    evaluate.add_argument(
        "--dtype", help="auto, float16, bfloat16 or float32 (default: the suite's)"
    )
    evaluate.add_argument(
        "--model-type", metavar="TYPE", help="llava_hf, qwen2_5_vl or vllm (default: the suite's)"
    )
    evaluate.add_argument(
        "--load-in-8bit",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="quantise with bitsandbytes while loading (default: the suite's)",
    )
    evaluate.add_argument("--batch-size", type=count, metavar="N", help="questions at once")
    evaluate.add_argument(
        "--generation",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="such as max_new_tokens=32; may be repeated",
    )
    evaluate.add_argument("--data", metavar="DIR", help="data sets here win over the hub's")
    evaluate.add_argument(
        "--jobs", type=count, default=1, metavar="N", help="models at once (default 1)"
    )
    evaluate.add_argument(
        "--threads", type=count, default=1, metavar="N", help="of each on a CPU (default 1)"
    )
    compare = add(
        "compare",
        "make the table of finished evaluations",
        "outliermerge compare scores/scores.json --paper",
        "outliermerge compare scores other/scores.json --chart both.png --json",
    )
    compare.add_argument("scores", metavar="SCORES", nargs="+", help="scores.json, or its folder")
    compare.add_argument("--paper", action="store_true", help="put the paper's Table 4 below")
    compare.add_argument("--markdown", metavar="FILE", help="write the table")
    compare.add_argument("--chart", metavar="FILE", help="draw a bar chart (PNG)")
    for command in (evaluate, compare):
        command.add_argument(
            "--baseline", metavar="NAME", help="gains are over this row (default: the average)"
        )
        command.add_argument("--json", action="store_true", help="print JSON for scripts")


def run_eval(options: argparse.Namespace) -> int:
    """Evaluate; return 1 where a task has no score."""
    from outliermerge.cli.render_scores import EvaluationProgress
    from outliermerge.evaluation.chart import draw
    from outliermerge.evaluation.evaluate import CHART_NAME, TABLE_NAME, evaluate
    from outliermerge.evaluation.models import split_name
    from outliermerge.evaluation.suite import load_suite
    from outliermerge.evaluation.table import make_table
    from outliermerge.storage.files import write_whole

    overrides = {
        key: getattr(options, key)
        for key in ("limit", "device", "dtype", "model_type", "load_in_8bit", "batch_size", "data")
    }
    suite = load_suite(
        options.suite, **overrides, generation=_generation(options.generation) or None
    )
    names = [split_name(model)[0] for model in options.models]
    if options.baseline is not None and options.baseline not in names:
        raise SpecError(
            f"--baseline {options.baseline}: no such model. {suggest(options.baseline, names)}"
        )
    with EvaluationProgress(suite.document.tasks, options.models) as progress:
        scores = evaluate(
            options.models,
            suite,
            output=options.output,
            jobs=options.jobs,
            threads=options.threads,
            listener=progress,
        )
    table = make_table([scores], baseline=options.baseline)
    folder = Path(options.output).expanduser()
    write_whole(folder / TABLE_NAME, (table.as_markdown() + "\n").encode())
    draw(table, folder / CHART_NAME)
    if options.json:
        print_json(scores.as_dict())
    else:
        print(printable(table.as_markdown()))
        say(f"wrote {folder}: scores.json, {TABLE_NAME}, {CHART_NAME}", file=sys.stderr)
    return 1 if scores.failures else 0


def run_compare(options: argparse.Namespace) -> int:
    """Put finished evaluations into one table."""
    from outliermerge.evaluation.chart import draw
    from outliermerge.evaluation.paper import with_paper
    from outliermerge.evaluation.scores import load_scores
    from outliermerge.evaluation.table import make_table
    from outliermerge.storage.files import write_whole

    table: Table = make_table([load_scores(path) for path in options.scores],
                              baseline=options.baseline)  # fmt: skip
    if options.paper:
        table = with_paper(table)
    if options.markdown:
        write_whole(Path(options.markdown), (table.as_markdown() + "\n").encode())
    if options.chart:
        draw(table, Path(options.chart))
    if options.json:
        print_json(table.as_dict())
    else:
        print(printable(table.as_markdown()))
    return 0


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
