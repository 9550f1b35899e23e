"""`verify`: recompute every checksum of an output."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from outliermerge.cli.parts import (
    EXIT_DONE,
    EXIT_FAILED,
    Command,
    add_json,
    add_threads,
    print_json,
    print_notes,
    say,
)
from outliermerge.cli.terminal import progress_bar, status
from outliermerge.errors import listing, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the folder and for the checks."""
    parser.add_argument(
        "folder",
        metavar="OUT",
        help="an output of outliermerge: its folder, or its .safetensors file, or its address "
        "(s3://, gs://, az://, https://, hf://)",
    )
    parser.add_argument(
        "--load",
        action="store_true",
        help="also prove that transformers or diffusers loads it, without the memory for that, and "
        "that the embeddings have a row for each of its tokens",
    )
    add_threads(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Verify an output; return 1 if it differs."""
    from outliermerge.output.manifest import card_notes
    from outliermerge.output.names import manifest_path, output_here
    from outliermerge.storage.addresses import is_address

    folder = output_here(options.folder)
    named = options.folder if is_address(options.folder) else str(folder)
    differences = differences_of(folder, options)
    notes = card_notes(folder)
    verdict = None
    if options.load:
        from outliermerge.output.verify_load import check_folder

        with status("checking that it loads", quiet=options.quiet):
            verdict = check_folder(folder)
        differences += verdict.problems
        notes += verdict.notes
    if options.json:
        found = {"ok": not differences, "differences": differences, "notes": notes}
        load = {"load_check": verdict.as_dict()} if verdict else {}
        print_json({"folder": named} | found | load)
    elif differences:
        what = "difference(s) from its manifest" + (" or its config" if options.load else "")
        say(f"{shown(named)}: {len(differences)} {what}\n{listing(differences)}")
        say(f"`outliermerge run {shown(manifest_path(folder))} NEW` repeats the merge.")
    elif not options.quiet:
        say(f"{shown(named)}: every tensor and file is as its manifest says")
    if not options.json and not options.quiet:
        for by in verdict.by if verdict else ():
            say(f"checked by {by}")
    print_notes(notes, options)
    return EXIT_FAILED if differences else EXIT_DONE


def differences_of(folder: Path, options: argparse.Namespace) -> list[str]:
    """Return what of an output differs from its manifest; a bar counts what is read."""
    from outliermerge.checkpoint.formats.table import SUFFIXES
    from outliermerge.output.manifest import verify_folder
    from outliermerge.storage.machine import num_threads
    from outliermerge.storage.stamps import FileStamp

    paths = folder.rglob("*") if folder.is_dir() else [folder]
    shards = (path for path in paths if path.suffix in SUFFIXES and path.exists())
    total = sum(FileStamp.of(path).num_bytes for path in shards)
    with progress_bar("verifying", quiet=options.quiet) as bar:
        task: Any = bar.add_task("verifying", total=total)
        return verify_folder(
            folder,
            threads=num_threads(options.threads),
            on_progress=lambda num_bytes: bar.advance(task, num_bytes),
        )


COMMAND = Command(
    summary="recompute every checksum of an output",
    examples=("outliermerge verify merged", "outliermerge verify merged --load"),
    overview="outliermerge verify merged",
    add_arguments=add_arguments,
    run=run,
)
