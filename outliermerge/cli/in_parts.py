"""Parts of a merge on the command line: `run --part 3/16` and `moe --part 3/16`."""

from __future__ import annotations

import argparse
import re
import shlex
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outliermerge.cli.lines import human_bytes
from outliermerge.cli.parts import count, print_json, print_notes, run_options, say
from outliermerge.cli.plan_facts import duration
from outliermerge.cli.tables import NamedTable, print_words
from outliermerge.cli.terminal import MergeBar, open_console
from outliermerge.errors import ArgumentError, argument, quoted

if TYPE_CHECKING:
    from outliermerge.output.division import PartCost
    from outliermerge.output.names import Final
    from outliermerge.output.options import RunOptions
    from outliermerge.output.run import RunResult
    from outliermerge.planning.plan import Options, Plan

_NO_FILE = (
    ": there are fewer tensors than parts or, in a store, fewer weight files. A smaller "
    "--shard-size, the same for all parts and join, makes more files."
)


def add_part(parser: argparse.ArgumentParser) -> None:
    """Add --part."""
    parser.add_argument(
        "--part",
        type=_part,
        metavar="K/N",
        help="write only part K of N, in this process; `outliermerge join` finishes the output "
        "when all are written. Parts may run at the same time, on machines that share its disk or "
        "bucket",
    )


def _part(text: str) -> tuple[int, int]:
    """Return a part's number and how many there are.

    >>> _part("3/16")
    (3, 16)
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found and 1 <= int(found[1]) <= int(found[2]):
        return int(found[1]), int(found[2])
    raise argparse.ArgumentTypeError(
        f"found {quoted(text)}, expected K/N, such as 3/16: part K of N, with K from 1 to N"
    )


def add_keep(parser: argparse.ArgumentParser) -> None:
    """Add --keep."""
    parser.add_argument(
        "--keep",
        metavar="NAME",
        action="append",
        default=[],
        help="also write this stage of the merge, beside the output as OUTPUT-NAME; repeatable",
    )


def add_ray(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a merge on a Ray cluster."""
    parser.add_argument(
        "--executor",
        dest="executor_name",
        choices=("threads", "ray"),
        default="threads",
        help="what carries the merge out: threads of this process (default), or ray: a Ray "
        "cluster, in parts, whose machines share the disks of the models and of the output, or its "
        "bucket",
    )
    add_address(parser)
    parser.add_argument(
        "--parts",
        type=count,
        metavar="N",
        help="parts of each output on the Ray cluster (default: as many as run at the same time)",
    )


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add the flag of which Ray cluster."""
    parser.add_argument(
        "--address",
        metavar="A",
        help="address of the Ray cluster (default: one that runs on this machine, else a new one)",
    )


def check_ray(options: argparse.Namespace) -> None:
    """Refuse flags that are for a Ray cluster alone, or not for one.

    Raises:
        ArgumentError: there is one.
    """
    if options.executor_name == "ray":
        if getattr(options, "part", None):
            raise ArgumentError(f"{argument('part')}: not with {argument('executor', 'ray')}")
        return
    for name in ("address", "parts"):
        if getattr(options, name, None) is not None:
            raise ArgumentError(f"{argument(name)}: only with {argument('executor', 'ray')}")


def resolved(options: argparse.Namespace, *plans: Plan) -> Options:
    """Return the options of plans that are carried out here, or else on a Ray cluster.

    Raises:
        ArgumentError: one is wrong, or what it names is not on this machine and must be, or the
            memory is too little.
    """
    chosen = run_options(options)
    in_parts = options.executor_name == "ray"
    return chosen.in_parts(*plans) if in_parts else chosen.on_this_machine(*plans)


def carried_out(
    plans: Sequence[tuple[Plan, Final]], chosen: RunOptions, options: argparse.Namespace
) -> list[RunResult]:
    """Carry out plans by what --executor names."""
    if options.executor_name == "ray":
        from outliermerge.output.ray import run_on_ray

        return run_on_ray(plans, chosen, address=options.address, num_parts=options.parts)
    from outliermerge.output.run import run_plans

    return run_plans(plans, chosen)


def run_one_part(
    plans: Sequence[tuple[Plan, Final]], options: argparse.Namespace, *, notes: Sequence[str]
) -> int:
    """Write a part of each plan, and print what was done.

    Raises:
        ArgumentError: a flag is given that is for whole outputs.
    """
    from outliermerge.output.bucket_folder import to_start_over_in_store
    from outliermerge.output.division import part_of, part_work_bytes
    from outliermerge.output.folder import to_start_over
    from outliermerge.output.parts import run_part

    number, num_parts = options.part
    if options.fresh:
        _, first = plans[0]
        over = to_start_over_in_store(first) if isinstance(first, str) else to_start_over(first)
        raise ArgumentError(
            f"{argument('fresh', True)}: a part does not start over what other parts have "
            f"written. {over}"
        )
    jobs = [
        (plan, part_of(plan, number, num_parts, whole_files=isinstance(output, str)))
        for plan, output in plans
    ]
    began = time.monotonic()
    # What is not here, or does not fit in memory, is said before a bar is drawn.
    run_options(options).on_this_machine(*(plan for plan, _ in plans))
    work_bytes = sum(part_work_bytes(plan, own) for plan, own in jobs)
    with MergeBar(work_bytes, len(plans), quiet=options.quiet) as bar:
        chosen = run_options(options, on_progress=bar.advance)
        num_written = sum(
            run_part(plan, output, number, num_parts, chosen) for plan, output in plans
        )
        bar.done()
    num_tensors = sum(len(own) for _, own in jobs)
    (planned, final), *kept = plans
    done: dict[str, Any] = {
        "output": str(final),
        **({"kept": [str(output) for _, output in kept]} if kept else {}),
        "part": number,
        "num_parts": num_parts,
        "num_tensors": num_tensors,
        "num_written": num_written,
        "seconds": round(time.monotonic() - began, 3),
    }
    notes = [*notes, *planned.notes]
    if options.json:
        print_json(done | {"notes": notes})
    elif not options.quiet:
        before = num_tensors - num_written
        say(
            f"part {number}/{num_parts} of {' and '.join(str(path) for _, path in plans)} is done: "
            f"{num_written} of {num_tensors} tensors written in {done['seconds']:.1f} s"
            + ("" if num_tensors else _NO_FILE)
            + (f", {before} were there from an earlier run" if before else "")
        )
    print_notes(notes, options)
    return 0


def print_parts(costs: Sequence[PartCost]) -> None:
    """Print a row for each part of a plan."""
    if not costs:
        return
    table = NamedTable("part", "tensors", "reads", "writes", "all passes", "memory", "time")
    for cost in costs:
        table.add_row(
            f"{cost.number}/{len(costs)}",
            str(cost.num_tensors),
            *map(human_bytes, (cost.read_bytes, cost.written_bytes, cost.work_bytes)),
            "not known" if cost.memory_bytes is None else human_bytes(cost.memory_bytes),
            "not known" if cost.seconds is None else duration(cost.seconds),
        )
    console = open_console()
    console.print()
    table.print(console)
    if not all(cost.num_tensors for cost in costs):
        print_words(console, f"Some parts have no tensors{_NO_FILE}")


def command_of_part(options: argparse.Namespace, command: str, output: str, part: str) -> str:
    """Return the command line that writes a part, with the flags that this one has."""
    words = ["outliermerge", command, options.spec, "-o", output, "--part", part]
    if options.shard_size is not None:
        words += ["--shard-size", options.shard_size]
    if options.device != "cpu":
        words += ["--device", options.device]
    words += [word for name in options.keep for word in ("--keep", name)]
    words += ["--no-kernels"] * options.no_kernels
    words += ["--lenient"] * options.lenient
    words += ["--overwrite"] * options.overwrite
    words += ["--allow-non-finite"] * options.allow_non_finite
    return shlex.join(words)
