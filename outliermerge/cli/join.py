"""`join`: finish an output whose parts are written."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from outliermerge.cli.in_parts import add_keep, command_of_part
from outliermerge.cli.parts import (
    EXIT_DONE,
    EXIT_FAILED,
    Command,
    add_lenient,
    add_planning,
    print_json,
    print_notes,
    run_options,
    say,
)
from outliermerge.cli.specs import named_output, read_any_spec
from outliermerge.cli.terminal import print_loading, print_remarks, status
from outliermerge.errors import listing, shown

if TYPE_CHECKING:
    from outliermerge.output.part_states import NotWholeError
    from outliermerge.planning.plan import Plan

_MOST_COMMANDS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the merge whose parts are joined."""
    add_planning(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing output, as the parts did"
    )
    parser.add_argument(
        "--allow-non-finite", action="store_true", help="go on over infinite or NaN values"
    )
    add_keep(parser)
    add_lenient(parser)


def run(options: argparse.Namespace) -> int:
    """Finish an output; return 1, and say what is left to do, if parts of it are not done."""
    from outliermerge.api import plans_of
    from outliermerge.output.part_states import NotWholeError
    from outliermerge.output.parts import join_all

    planned = _planned(options)
    plans = plans_of(planned, named_output(options), options.keep)
    try:
        in_store = isinstance(plans[0][1], str)
        doing = "looking at all weight files" if in_store else "reading all tensors back"
        with status(doing, quiet=options.quiet):
            result, *kept = join_all(plans, run_options(options))
    except NotWholeError as error:
        _print_left(error, planned, str(plans[0][1]), options)
        return EXIT_FAILED
    checked = result.load_check.notes if result.load_check else ()
    notes = [*planned.notes, *checked]
    if options.json:
        stages = {"kept": [each.as_dict() for each in kept]} if kept else {}
        print_json({"whole": True} | result.as_dict() | {"notes": notes} | stages)
    elif not options.quiet:
        for each in (result, *kept):
            proved = (
                "each weight file of the size and ETag that its part noted"
                if in_store
                else "each read back and as written"
            )
            say(
                f"joined {shown(each.output)}: {len(each.manifest['tensors'])} tensors, "
                f"{each.manifest['num_parameters']:,} parameters, {proved}, "
                f"{each.seconds:.1f} s"
            )
            print_loading(each)
            print_remarks(replace(each, num_resumed=0))  # all were there, as they should
    print_notes(notes, options)
    return EXIT_DONE


def _planned(options: argparse.Namespace) -> Plan:
    """Return the plan of the merge, or of the mixture, that a spec is for.

    The routers of a mixture are not computed: the parts have written them.
    """
    from outliermerge import api
    from outliermerge.spec.moe import MoeSpec

    spec = read_any_spec(options)
    if isinstance(spec, MoeSpec):
        return api.plan_moe(spec, shard_size=options.shard_size).plan
    return api.plan(spec, shard_size=options.shard_size)


def _print_left(
    error: NotWholeError, planned: Plan, output: str, options: argparse.Namespace
) -> None:
    """Print which parts are not done, and the commands that do them."""
    commands = {
        state.number: command_of_part(
            options, planned.spec.command, output, f"{state.number}/{state.num_parts}"
        )
        for state in error.unfinished
        if not state.holder
    }
    if options.json:
        parts: list[dict[str, Any]] = [
            state.as_dict() | {"command": commands.get(state.number)} for state in error.states
        ]
        print_json({"output": output, "whole": False, "parts": parts})
    left = error.unfinished
    number = f"{len(left)} of {len(error.states)} parts"
    said = f"{shown(error.final)}: is not whole, {number} are not done:"
    lines = [f"error: {said}", listing((state.in_words for state in left), limit=_MOST_COMMANDS)]
    if commands:
        lines.append("Run them, then join again:")
        lines += [f"  {command}" for command in list(commands.values())[:_MOST_COMMANDS]]
        if len(commands) > _MOST_COMMANDS:
            lines.append(f"  … and {len(commands) - _MOST_COMMANDS} more, which --json lists")
    else:
        lines.append("Wait until they are done, then join again.")
    for line in lines:
        say(line, file=sys.stderr)


COMMAND = Command(
    summary="finish an output whose parts are written: prove every tensor, and name it",
    examples=(
        "outliermerge join merge.yaml merged",
        "outliermerge join merge.yaml --output merged --json",
    ),
    overview="outliermerge join merge.yaml merged",
    add_arguments=add_arguments,
    run=run,
    goes_on=True,
    explanation="""\
Each part is written by `outliermerge run SPEC DIR --part K/N` (of a mixture of experts: `moe`);
join is given the same spec and flags. It merges nothing. It reads every tensor back and compares
its checksum with the one that its part has noted; in a store it compares the sizes and ETags of
the weight files, and `verify` reads them back. If parts lack tensors or are still being
written, it names them with the commands that write them, and its exit code is 1.
""",
)
