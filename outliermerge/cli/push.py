"""`push`: send an output to the hub."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from outliermerge.cli.parts import (
    EXIT_DONE,
    Command,
    add_json,
    add_threads,
    print_json,
    print_notes,
    say,
)
from outliermerge.cli.terminal import progress_bar, status
from outliermerge.cli.verify import differences_of
from outliermerge.display import human_bytes
from outliermerge.errors import OutlierMergeError, listing, shown

if TYPE_CHECKING:
    from outliermerge.output.push import Push


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the output and for the repository."""
    parser.add_argument(
        "folder",
        metavar="OUT",
        help="an output of outliermerge: its folder, or its .safetensors file",
    )
    parser.add_argument(
        "repository",
        metavar="ORG/NAME",
        help="the repository; a new one is made if it is not there",
    )
    parser.add_argument(
        "--private", action="store_true", help="make a new repository that only you and org see"
    )
    parser.add_argument(
        "--revision",
        metavar="BRANCH",
        help="the branch (default main); a new one is made if it is not there",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what is there, and remove what the output does not have, in the same commit",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="look at what is there, list what would be sent, and send nothing",
    )
    add_threads(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Send an output to the hub, after it was proved."""
    from outliermerge.output.push import Push

    push = Push(
        options.folder,
        options.repository,
        revision=options.revision,
        private=options.private,
        overwrite=options.overwrite,
    )
    with status("asking the hub what is there", quiet=options.quiet):
        push.look()
    if options.dry_run:
        return _print(push, "", options)
    if differences := differences_of(push.output, options):
        raise OutlierMergeError(
            f"{options.folder}: is not as its manifest says, and is not pushed:\n"
            f"{listing(differences)}"
        )
    return _print(push, "" if push.is_there else _send(push, options), options)


def _send(push: Push, options: argparse.Namespace) -> str:
    """Send the files, with a bar; return the address of the commit."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    # At a terminal the hub's own bars count the bytes of a file; elsewhere, lines count the files.
    at_terminal = sys.stderr.isatty() and not options.quiet
    if not at_terminal:
        disable_progress_bars()
    with progress_bar("sending", quiet=options.quiet or at_terminal) as bar:
        task: Any = bar.add_task("sending", total=push.num_bytes)
        return push.send(lambda name, num_bytes: bar.advance(task, num_bytes))


def _print(push: Push, commit: str, options: argparse.Namespace) -> int:
    """Print what was done, or would be."""
    sizes, notes = push.sizes(), push.notes()
    where = shown(push.where)
    if options.json:
        found = {"is_there": push.is_there, "sent": bool(commit), "commit": commit or None}
        of = {"repository": push.repo_id, "revision": push.revision, "is_new": push.is_new}
        files = {"num_bytes": push.num_bytes, "files": sizes, "removed": push.removed}
        print_json(of | found | files | {"notes": notes})
    elif not options.quiet or options.dry_run:
        what = f"{len(sizes)} files, {human_bytes(push.num_bytes)}"
        if push.is_there:
            say(f"{where}: has all of it already: {what}")
        elif commit:
            say(f"sent to {where}: {what}\n{commit}")
        else:
            new = ", a new repository" if push.is_new else ""
            say(f"would send to {where}{new}: {what}")
            for name, num_bytes in sizes.items():
                say(f"  {human_bytes(num_bytes):>8}  {shown(name)}")
            for name in push.removed:
                say(f"   removed  {shown(name)}")
    print_notes(notes, options)
    return EXIT_DONE


COMMAND = Command(
    summary="send an output to the hub, after it was proved, in one commit",
    examples=(
        "outliermerge push merged org/merged --private",
        "outliermerge push merged org/merged --revision sigma-2 --dry-run",
    ),
    overview="outliermerge push merged org/merged --private",
    add_arguments=add_arguments,
    run=run,
    goes_on=True,
    explanation="""\
It sends the files of the manifest, and that. The token is that of `hf auth login` or HF_TOKEN.
Weights that have arrived are kept: after an interruption the same command sends the others.
Nothing is seen in the repository before all is there. An edited README.md is sent as it is.
""",
)
