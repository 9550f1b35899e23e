"""`search`: find the settings of a merge that score best."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from outliermerge.cli.in_parts import add_address, check_ray
from outliermerge.cli.parts import Command, add_json, add_machine, count, print_json, say
from outliermerge.cli.search_helpers import Helpers, gpus_of
from outliermerge.cli.shipped import find_file
from outliermerge.cli.specs import STANDARD_INPUT, read_spec
from outliermerge.errors import ArgumentError, argument, printable

if TYPE_CHECKING:
    from outliermerge.search.scorer import Scorer

_SAMPLERS = ("tpe", "cmaes", "nsga2", "grid", "random")
_STRATEGIES = ("sampler", "greedy-soup", "prune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the merge, what varies, and what scores it."""
    parser.add_argument("spec", metavar="SPEC", help="a YAML file, or the name of a shipped spec")
    parser.add_argument(
        "--space",
        metavar="YAML",
        help="what is searched: by key, named as in `sweep`, a range such as {low: 1, high: 4} or "
        "a list of choices",
    )
    parser.add_argument(
        "--suite",
        action="append",
        required=True,
        metavar="SUITE",
        help="what scores a merge: a suite of `eval`, or a function package.module:function that "
        "returns a number for each question, or entropy:FILE or agreement:FILE of unlabelled "
        "texts; several --suite count alike",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="the folder for best.yaml, the table and the trials; a search that is there goes on",
    )
    parser.add_argument(
        "--trials", type=count, default=30, metavar="N", help="merges that are tried (default 30)"
    )
    parser.add_argument(
        "--sampler",
        choices=_SAMPLERS,
        default="tpe",
        help="what chooses their settings (default tpe); with nsga2 each task, or each of several "
        "suites, is an objective",
    )
    parser.add_argument(
        "--strategy",
        choices=_STRATEGIES,
        default="sampler",
        help="in place of a sampler and a space: greedy-soup adds models, best first, while that "
        "does no harm; prune leaves out layers of task vectors where that does none",
    )
    parser.add_argument(
        "--questions",
        type=count,
        default=100,
        metavar="N",
        help="questions of each task that a trial is asked (default 100)",
    )
    parser.add_argument(
        "--limit",
        type=count,
        metavar="N",
        help="search with only N questions of each task of a suite, held-out ones included",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the sampler, and of which questions are asked (default 0)",
    )
    parser.add_argument(
        "--trial-seconds",
        type=count,
        metavar="N",
        help="stop a trial that takes longer, and count it as failed (default: no limit)",
    )
    parser.add_argument(
        "--jobs",
        type=count,
        metavar="N",
        help="trials at the same time: processes here, each with a GPU of its own where GPUs are "
        "used (default 1), or tasks on a Ray cluster (default: as many as fit)",
    )
    parser.add_argument(
        "--executor",
        dest="executor_name",
        choices=("processes", "ray"),
        default="processes",
        help="where trials are merged and scored: processes of this machine (default), or ray: "
        "tasks on a Ray cluster, whose machines share the disk of the models",
    )
    add_address(parser)
    add_machine(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Search, and print the table."""
    from outliermerge.optional import require_search

    require_search()
    from outliermerge.cli.search_progress import SearchProgress
    from outliermerge.output.names import as_local
    from outliermerge.output.options import RunOptions
    from outliermerge.search.on_ray import Cluster
    from outliermerge.search.search import Wanted, search
    from outliermerge.search.space import load_space

    check_ray(options)
    jobs, on_ray = options.jobs or 1, options.executor_name == "ray"
    if jobs > 1 and options.strategy != "sampler":
        raise ArgumentError(f"{argument('jobs')}: {options.strategy} is for one process")
    if jobs > 1 and not on_ray and options.spec == STANDARD_INPUT:
        raise ArgumentError(f"{argument('jobs')}: the standard input is for one process")
    output = as_local(options.output, "a search is written to a folder")
    spec = read_spec(options)
    space = None if options.space is None else load_space(options.space)
    wanted = Wanted(
        trials=options.trials,
        sampler=options.sampler,
        seed=options.seed,
        questions=options.questions,
        strategy=options.strategy,
        trial_seconds=options.trial_seconds,
    )
    names = [name if ":" in name else find_file(name, "suite") for name in options.suite]
    make = partial(_scorer, names, options.device, options.limit)
    scorer = make(output / "work")
    gpus = [] if on_ray else gpus_of(jobs, (options.device, scorer.device))
    with (
        Helpers(options, 1 if on_ray else jobs, gpus, partial(say, file=sys.stderr)) as helpers,
        SearchProgress(quiet=options.quiet, on_begun=helpers.start) as progress,
    ):
        found = search(
            spec,
            space,
            scorer,
            output=output,
            wanted=wanted,
            options=RunOptions(
                device="cuda:0" if gpus and options.device != "cpu" else options.device,
                threads=options.threads,
            ),
            listener=progress,
            cluster=Cluster(make, options.address, options.jobs) if on_ray else None,
        )
    if options.json:
        print_json(found.as_dict())
    else:
        print(printable(found.as_markdown()))
        say(f"wrote {output}: best.yaml, search.md, result.json", file=sys.stderr)
    return 0


def _scorer(names: Sequence[str], device: str, limit: int | None, folder: Path) -> Scorer:
    """Make what scores, on any machine; `folder` is for its files."""
    from outliermerge.search.scorers import find_scorer

    return find_scorer(names, device=device, folder=folder, limit=limit)


COMMAND = Command(
    summary="find the settings of a merge that score best; says how much of the gain is luck",
    examples=(
        "outliermerge search merge.yaml --space space.yaml --suite paper -o search",
        "outliermerge search merge.yaml --space space.yaml --suite mine.scores:score -o search \\\n"
        "      --trials 60 --sampler cmaes",
        "outliermerge search merge.yaml --strategy greedy-soup --suite mine.scores:score -o soup",
        "outliermerge search merge.yaml --space space.yaml --suite a.yaml --suite b.yaml \\\n"
        "      -o found --sampler nsga2",
        "outliermerge search merge.yaml --space space.yaml --suite paper -o found --executor ray",
    ),
    overview="outliermerge search merge.yaml --space space.yaml --suite paper -o search",
    add_arguments=add_arguments,
    run=run,
    goes_on=True,
)
