"""The commands: parse, call, print; nothing else."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from outliermerge.cli_parts import print_json, say
from outliermerge.cli_runs import add_runs, run_plan, run_run, run_sweep
from outliermerge.cli_scores import add_commands, run_compare, run_eval
from outliermerge.cli_weights import (
    add_weights,
    run_compare_weights,
    run_layers,
    run_report,
    run_simulate,
    run_stats,
)
from outliermerge.errors import OutlierMergeError, SpecError, listing, quoted, readable, shown
from outliermerge.failures import failure
from outliermerge.streams import guard_streams

if TYPE_CHECKING:
    from outliermerge.method import MergeMethod

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

_EXAMPLES = """\
examples:
  outliermerge run merge_configs/minilm_min_sigma.yaml --output merged
  outliermerge plan merge_configs/minilm_ties.yaml --json
  outliermerge sweep merge_configs/minilm_min_sigma.yaml --set t=2,2.5,3 --output merged/sweep
  outliermerge verify merged
  outliermerge eval merged --suite evals/paper.yaml --output scores
  outliermerge compare scores --paper
  outliermerge stats merged
  outliermerge compare-weights models/a models/b --base models/base
  outliermerge report merged -o merged.html
  outliermerge methods min_sigma
  outliermerge schema > outliermerge.spec.schema.json

exit codes: 0 done, 1 failed (a model, a folder, a value), 2 wrong usage or spec, 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(readable(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="outliermerge",
        description="Merge model checkpoints as a YAML spec says, and score them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, text: str, *examples: str) -> argparse.ArgumentParser:
        lines = "\n".join(f"  {example}" for example in examples)
        return commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"examples:\n{lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    add_runs(add, _count)
    verify = add(
        "verify",
        "recompute every checksum of an output",
        "outliermerge verify merged",
        "outliermerge verify merged --load",
    )
    verify.add_argument("folder", metavar="OUT", help="what `run` wrote")
    verify.add_argument(
        "--load",
        action="store_true",
        help="prove too that transformers or diffusers loads it, without taking its memory, and "
        "that its tokens have rows",
    )
    verify.add_argument(
        "--threads", type=_count, default=0, metavar="N", help="default: processors + 2"
    )
    verify.add_argument("--json", action="store_true", help="print JSON for scripts")
    add_commands(add, _count)
    add_weights(add, _count)
    methods = add(
        "methods",
        "list merge methods and their parameters",
        "outliermerge methods",
        "outliermerge methods min_sigma",
        "outliermerge methods --json",
    )
    methods.add_argument("name", metavar="NAME", nargs="?", help="show one, with its formula")
    methods.add_argument("--json", action="store_true", help="print JSON for scripts")
    add("schema", "print the JSON schema of a spec", "outliermerge schema > spec.schema.json")
    return parser


class _Formatter(logging.Formatter):
    """Logs what others wrote as a terminal shows it."""

    def format(self, record: logging.LogRecord) -> str:
        return readable(super().format(record))


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number of at least 1")
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        guard_streams()
        code = _main(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except OutlierMergeError as error:  # of printing
        return _fail(error, EXIT_FAILED)
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # It has a handler of its own, so its warnings would be printed twice.
    logging.getLogger("huggingface_hub").propagate = False
    if options.version:
        from importlib.metadata import version

        print(f"outliermerge {version('outliermerge')}")
        return EXIT_DONE
    if options.command is None:
        parser.print_help()
        return EXIT_USAGE
    try:
        Path.cwd()
    except OSError as error:
        here = f"the present folder cannot be used: {error.strerror}. Change to another (cd)."
        return _fail(here, EXIT_FAILED)
    try:
        return _COMMANDS[options.command](options)
    except SpecError as error:
        return _fail(error, EXIT_USAGE)
    except OutlierMergeError as error:
        return _fail(error, EXIT_FAILED)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None or error.errno is None:
            return _fail(error.strerror or error, EXIT_FAILED)
        return _fail(failure(Path(str(error.filename)), "used", error), EXIT_FAILED)
    except MemoryError:
        return _fail("out of memory: give a smaller --memory or fewer --threads", EXIT_FAILED)
    except RuntimeError as error:  # of the device: torch has several kinds, none its own
        if not type(error).__module__.startswith("torch") and "CUDA" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        return _fail(f"the device failed: {reason}. Give a smaller --memory", EXIT_FAILED)
    except KeyboardInterrupt:
        goes_on = options.command in ("run", "sweep", "eval")
        later = ": the same command goes on from here" if goes_on else ""
        return _fail(f"interrupted{later}", EXIT_INTERRUPTED)


def _fail(message: object, code: int) -> int:
    say(f"error: {message}", file=sys.stderr)
    return code


def _verify(options: argparse.Namespace) -> int:
    from outliermerge import manifest, render
    from outliermerge.machine import num_threads

    folder = Path(options.folder)
    shards = folder.rglob("*.safetensors") if folder.is_dir() else [folder]
    total = sum(path.stat().st_size for path in shards if path.exists())
    with render.progress_bar("verifying") as bar:
        task = bar.add_task("verifying", total=total)
        differences = manifest.verify_folder(
            folder,
            threads=num_threads(options.threads),
            on_progress=lambda num_bytes: bar.advance(task, num_bytes),
        )
    notes = manifest.card_notes(folder)
    verdict = None
    if options.load:
        from outliermerge.verify_load import check_folder

        with render.status("checking that it loads"):
            verdict = check_folder(folder)
        differences += verdict.problems
        notes += verdict.notes
    if options.json:
        found = {"ok": not differences, "differences": differences, "notes": notes}
        load = {"load_check": verdict.as_dict()} if verdict else {}
        print_json({"folder": str(folder)} | found | load)
    elif differences:
        what = "difference(s) from its manifest" + (" or its config" if options.load else "")
        say(f"{shown(folder)}: {len(differences)} {what}\n{listing(differences)}")
    else:
        say(f"{shown(folder)}: every tensor and file is as its manifest says")
    if not options.json:
        for by in verdict.by if verdict else ():
            say(f"checked by {by}")
        for note in notes:
            say(f"note: {note}")
    return EXIT_FAILED if differences else EXIT_DONE


def _methods(options: argparse.Namespace) -> int:
    from outliermerge.methods import METHODS, find_method

    chosen = [find_method(options.name)] if options.name else list(METHODS.values())
    if options.json:
        print_json([_describe(method) for method in chosen])
        return EXIT_DONE
    from outliermerge import render

    if options.name:
        render.print_method(chosen[0])
    else:
        render.print_methods(chosen)
    return EXIT_DONE


def _describe(method: MergeMethod) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "documentation": method.documentation,
        "paper": method.paper,
        "space": method.space,
        "cut": method.cut,
        "parameters": [
            {
                "name": parameter.name,
                "type": parameter.type.__name__,
                "default": parameter.default,
                "per_model": parameter.per_model,
                "range": parameter.range,
            }
            for parameter in method.parameters.values()
        ],
    }


def _schema(options: argparse.Namespace) -> int:
    from outliermerge.spec.schema import json_schema

    print_json(json_schema())
    return EXIT_DONE


_COMMANDS = {
    "run": run_run,
    "plan": run_plan,
    "sweep": run_sweep,
    "verify": _verify,
    "eval": run_eval,
    "compare": run_compare,
    "stats": run_stats,
    "compare-weights": run_compare_weights,
    "layers": run_layers,
    "report": run_report,
    "simulate": run_simulate,
    "methods": _methods,
    "schema": _schema,
}
