"""The program: its parser, exit codes and errors; each command has its own file."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from outliermerge.cli.parser import COMMANDS, COMMON_FLAGS, load, make_parser, overview_of, usage_of
from outliermerge.cli.parts import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, Command, flag, say
from outliermerge.cli.streams import guard_streams
from outliermerge.errors import ArgumentError, OutlierMergeError, SpecError, quoted
from outliermerge.optional import INSTALL_TORCH
from outliermerge.storage.addresses import without_secrets
from outliermerge.storage.failures import failure
from outliermerge.storage.stand_ins import with_addresses

EXIT_INTERRUPTED = 130

_SURE = 0.7  # a word so like a command is one, misspelt
_SPEC_ENDINGS = (".yaml", ".yml", ".json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        guard_streams()
        if arguments is None:
            _end_as_interrupted()
        words = sys.argv[1:] if arguments is None else arguments
        code = _main([without_secrets(word) for word in words])
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


def _end_as_interrupted() -> None:
    """Let what asks a program to end do what Ctrl-C does: uploads are aborted, folders removed."""
    for name in ("SIGTERM", "SIGHUP"):  # of a scheduler; of a terminal that is closed
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # not: nohup
            signal.signal(number, signal.default_int_handler)


def _main(arguments: list[str]) -> int:
    arguments = command_first(arguments)
    word = arguments[0] if arguments else "--help"
    if word not in COMMANDS and not word.startswith("-"):
        return _no_command(word)
    commands = load(_needed(arguments))
    rest = arguments[1:]
    if word in commands and (parts := commands[word].parts) and not parts.keys() & {*rest}:
        if not rest or {"-h", "--help"} & {*rest}:
            print(overview_of(word, commands[word]), end="")
            return EXIT_DONE if rest else EXIT_USAGE
    parser = make_parser(commands)
    try:
        if word in commands:  # options may stand between positional arguments
            options, unknown = parser.of(word).parse_known_intermixed_args(arguments[1:])
            if unknown:
                parser.of(word).refuse(unknown)
        else:
            options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed help, the version or an error
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    if word not in commands:
        parser.print_help()
        return EXIT_USAGE
    from outliermerge.cli.logs import show_warnings  # `logging` is for commands, not for help

    show_warnings(quiet=options.quiet, verbose=options.verbose)
    try:
        Path.cwd()
    except OSError as error:
        here = f"the present folder cannot be used: {error.strerror}. Change to another (cd)."
        return _fail(here, EXIT_FAILED)
    return _exit_code(commands[word], options)


def command_first(arguments: list[str]) -> list[str]:
    """Return a command line with its command first: `run --lenient` where it is `FILE DIR`.

    So mergekit-yaml is called, and read; and -q and -v may stand before the command.
    """
    num_common = 0
    while num_common < len(arguments) and arguments[num_common] in COMMON_FLAGS:
        num_common += 1
    common, rest = arguments[:num_common], arguments[num_common:]
    if rest and rest[0] in COMMANDS:
        return [rest[0], *common, *rest[1:]]
    return ["run", "--lenient", *arguments] if _is_merge(rest) else arguments


def _is_merge(words: Sequence[str]) -> bool:
    """Tell whether words without a command are a spec to merge, with options perhaps."""
    if words and (words[0] == "-" or not words[0].startswith("-")):
        return words[0] == "-" or _is_spec(words[0])
    return not any(word in COMMANDS for word in words) and any(map(_is_spec, words))


def _is_spec(word: str) -> bool:
    return word.endswith(_SPEC_ENDINGS) or (not word.startswith("-") and os.path.isfile(word))  # noqa: PTH113


def _no_command(word: str) -> int:
    """Say that a word is no command, with the usage of the one that was meant."""
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    parser = make_parser(load(near))
    said = [f"Did you mean {near[0]!r}?"] if near else []
    if not difflib.get_close_matches(word, near, cutoff=_SURE):
        said.append(f"Commands: {', '.join(COMMANDS)}")
    say(usage_of(parser.of(near[0]) if near else parser), file=sys.stderr)
    return _fail(f"no command and no file {quoted(word)}. {' '.join(said)}", EXIT_USAGE)


def _needed(arguments: list[str]) -> Iterable[str]:
    """Return the commands that a command line needs; not importing others starts faster."""
    if arguments[:1] and arguments[0] in COMMANDS:
        return arguments[:1]
    return () if arguments == ["--version"] else COMMANDS


def _exit_code(command: Command, options: argparse.Namespace) -> int:
    """Run a command; print one message if an error stops it."""
    try:
        if not getattr(options, "stream", ""):
            return command.run(options)
        from outliermerge.checkpoint.folders.remote import streaming

        with streaming(options.stream):
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
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return _fail(f"this needs torch, which is not installed. {INSTALL_TORCH}", EXIT_FAILED)
    except RuntimeError as error:  # errors of the device: torch has no single class for them
        if not type(error).__module__.startswith("torch") and "CUDA" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        return _fail(f"the device failed: {reason}. Give a smaller --memory", EXIT_FAILED)
    except KeyboardInterrupt:
        later = ": the same command goes on from here" if command.goes_on else ""
        return _fail(f"interrupted{later}", EXIT_INTERRUPTED)


def _fail(message: object, code: int) -> int:
    text = message.text(flag) if isinstance(message, OutlierMergeError) else str(message)
    say(f"error: {with_addresses(text)}", file=sys.stderr)
    return code
