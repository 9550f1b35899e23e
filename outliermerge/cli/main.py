"""The program: its parser, exit codes and errors; each command has its own file."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from outliermerge.cli.parts import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, Command, flag, say
from outliermerge.cli.streams import guard_streams
from outliermerge.errors import ArgumentError, OutlierMergeError, SpecError, readable
from outliermerge.storage.failures import failure

EXIT_INTERRUPTED = 130

COMMANDS = {
    "run": "run",
    "plan": "plan",
    "sweep": "sweep",
    "verify": "verify",
    "eval": "evaluate",
    "compare": "compare",
    "stats": "stats",
    "compare-weights": "compare_weights",
    "layers": "layers",
    "report": "report",
    "simulate": "simulate",
    "methods": "methods",
    "schema": "schema",
}
"""The commands in the order of the help, each with its module in this folder."""

_EXIT_CODES = """
exit codes: 0 done, 1 failed (a model, a folder, a value), 2 wrong usage or spec, 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(readable(message))


def load(names: Iterable[str] = COMMANDS) -> dict[str, Command]:
    """Import commands; each module has one, `COMMAND`."""
    return {
        name: importlib.import_module(f"outliermerge.cli.{COMMANDS[name]}").COMMAND
        for name in names
    }


def make_parser(commands: dict[str, Command]) -> argparse.ArgumentParser:
    """Return the parser of the program with the commands that are given."""
    overview = [command.overview for command in commands.values() if command.overview]
    parser = _Parser(
        prog="outliermerge",
        description="Merge model checkpoints as a YAML spec says, and score them.",
        epilog=_examples(overview) + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in commands.items():
        command.add_arguments(
            subparsers.add_parser(
                name,
                help=command.summary,
                description=command.summary[0].upper() + command.summary[1:] + ".",
                epilog=_examples(command.examples),
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
        )
    return parser


def _examples(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in ("examples:", *(f"  {line}" for line in lines)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        guard_streams()
        code = _main(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except OutlierMergeError as error:  # of printing
        return _fail(error, EXIT_FAILED)
    except BrokenPipeError:  # the reader, such as `head`, has ended
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        return EXIT_DONE


def _main(arguments: list[str]) -> int:
    commands = load(_needed(arguments))
    parser = make_parser(commands)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed help or an error
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    if options.version:
        from importlib.metadata import version

        print(f"outliermerge {version('outliermerge')}")
        return EXIT_DONE
    if options.command is None:
        parser.print_help()
        return EXIT_USAGE
    from outliermerge.cli.logs import show_warnings  # `logging` is for commands, not for help

    show_warnings()
    try:
        Path.cwd()
    except OSError as error:
        here = f"the present folder cannot be used: {error.strerror}. Change to another (cd)."
        return _fail(here, EXIT_FAILED)
    return _exit_code(commands[options.command], options)


def _needed(arguments: list[str]) -> Iterable[str]:
    """Return the commands that a command line needs; not importing others starts faster."""
    if arguments[:1] and arguments[0] in COMMANDS:
        return arguments[:1]
    return () if arguments == ["--version"] else COMMANDS


def _exit_code(command: Command, options: argparse.Namespace) -> int:
    """Run a command; print one message if an error stops it."""
    try:
        return command.run(options)
    except (ArgumentError, SpecError) as error:
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
    except RuntimeError as error:  # errors of the device: torch has no single class for them
        if not type(error).__module__.startswith("torch") and "CUDA" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        return _fail(f"the device failed: {reason}. Give a smaller --memory", EXIT_FAILED)
    except KeyboardInterrupt:
        later = ": the same command goes on from here" if command.goes_on else ""
        return _fail(f"interrupted{later}", EXIT_INTERRUPTED)


def _fail(message: object, code: int) -> int:
    text = message.text(flag) if isinstance(message, OutlierMergeError) else message
    say(f"error: {text}", file=sys.stderr)
    return code
