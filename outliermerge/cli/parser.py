"""The table of commands, and the parser that is made of what they say of themselves."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from outliermerge.cli.parts import EXIT_USAGE, Command
from outliermerge.errors import nearest, quoted, readable

COMMANDS = {
    "run": "run",
    "plan": "plan",
    "moe": "moe",
    "tokenizer": "tokenizer",
    "sweep": "sweep",
    "search": "search",
    "measure": "measure",
    "fit": "fit",
    "join": "join",
    "verify": "verify",
    "push": "push",
    "extract": "extract",
    "eval": "evaluate",
    "compare": "compare",
    "stats": "stats",
    "compare-weights": "compare_weights",
    "layers": "layers",
    "report": "report",
    "simulate": "simulate",
    "methods": "methods",
    "schema": "schema",
    "configs": "configs",
    "convert-config": "convert_config",
    "completion": "completion",
}
"""The commands in the order of the help, each with its module in this folder."""

_EXIT_CODES = """
exit codes: 0 done, 1 failed (a model, a folder, a value), 2 wrong usage or spec, 130 interrupted
"""

COMMON_FLAGS = ("-q", "--quiet", "-v", "-vv", "--verbose")
"""The flags of every command that may stand before it."""


class Parser(argparse.ArgumentParser):
    """A parser with a usage of one line; its commands are found by their names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )
        self._commands: Mapping[str, Parser] = {}

    def of(self, command: str) -> Parser:
        """Return the parser of a command."""
        return self._commands[command]

    def add_commands(self, commands: Mapping[str, Command]) -> None:
        """Add the parsers of commands."""
        subparsers = self.add_subparsers(
            dest="command", metavar="COMMAND", prog=self.prog, parser_class=Parser
        )
        for name, command in commands.items():
            parser = subparsers.add_parser(
                name,
                help=command.summary,
                description=command.summary[0].upper() + command.summary[1:] + ".",
                epilog=_examples(command.examples)
                + (f"\n{command.explanation}\n" if command.explanation else ""),
            )
            command.add_arguments(parser)
            _add_common(parser)
            parser.usage = usage_of(parser).removeprefix("usage: ").replace("%", "%%")
        self._commands = subparsers.choices

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Print the usage, and what was given that the command does not take."""
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if not flags:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        # Without the dashes: as all flags have them, they would make any two short ones alike.
        near = nearest(flags[0].lstrip("-"), (flag.lstrip("-") for flag in known))
        near = f"--{near}" if near else None
        if "--device" in known and flags[0] in ("--cuda", "--gpu"):  # `run` takes mergekit's flags
            near = "--device cuda"
        meant = f"Did you mean {near}?" if near else f"{self.prog} --help lists all."
        self.error(f"no option {quoted(flags[0])}. {meant}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a word that is none of an argument's choices, with the one that was meant."""
        if action.choices is not None and value not in action.choices:
            choices = [*map(str, action.choices)]
            near = nearest(str(value), choices)
            meant = f". Did you mean {quoted(near)}?" if near else ""
            expected = " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
            said = f"found {quoted(value)}, expected {expected}{meant}"
            raise argparse.ArgumentError(action, said)

    def error(self, message: str) -> NoReturn:
        """Print the usage of the command that was meant, and the error."""
        self.exit(EXIT_USAGE, f"{usage_of(self)}\nerror: {readable(message)}\n")


class _Version(argparse.Action):
    """Prints the version; it is looked up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *given: object) -> None:
        from importlib.metadata import version

        print(f"outliermerge {version('outliermerge')}")
        parser.exit()


def load(names: Iterable[str] = COMMANDS) -> dict[str, Command]:
    """Import commands; each module has one, `COMMAND`."""
    return {
        name: importlib.import_module(f"outliermerge.cli.{COMMANDS[name]}").COMMAND
        for name in names
    }


def make_parser(commands: Mapping[str, Command]) -> Parser:
    """Return the parser of the program with the commands that are given."""
    overview = [command.overview for command in commands.values() if command.overview]
    parser = Parser(
        prog="outliermerge",
        description="Merge model checkpoints as a YAML spec says, and score them.",
        epilog=_examples(overview) + _EXIT_CODES,
        usage="outliermerge [option …] COMMAND …\n       outliermerge SPEC DIR  (as mergekit-yaml)",
    )
    _add_common(parser)
    parser.add_commands(commands)
    return parser


def usage_of(parser: argparse.ArgumentParser) -> str:
    """Return the usage of a command in one line: what it must be given, and that it has options."""
    if parser.usage:
        return f"usage: {parser.usage}"
    words = [parser.prog, "[option …]"]
    for action in parser._actions:
        name = str(action.metavar or action.dest)
        if action.option_strings:
            words += [f"{action.option_strings[-1]} {name}"] if action.required else []
        else:
            name += " …" if action.nargs == "+" else ""
            words.append(f"[{name}]" if action.nargs == "?" else name)
    return f"usage: {' '.join(words)}"


def overview_of(name: str, command: Command) -> str:
    """Return the help of a command that another word must follow: these words, and examples."""
    lines = [f"  {part}  {summary}" for part, summary in command.parts.items()]
    return "\n".join(
        [
            f"usage: outliermerge {name} COMMAND …\n\ncommands:",
            *lines,
            f"\noutliermerge {name} COMMAND --help says what each takes.\n",
            _examples(command.examples),
        ]
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes; -q and -v may also stand before it."""
    parser.add_argument(
        "-q", "--quiet", action="store_true",
        help="print no progress, notes or warnings; of a merge only errors",
    )  # fmt: skip
    parser.add_argument(
        "-v", "--verbose", action="count", default=0,
        help="also print what libraries report, and what a merge is about to do; -vv everything",
    )  # fmt: skip
    parser.add_argument("--version", action=_Version, help="print the version and exit")


def _examples(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in ("examples:", *(f"  {line}" for line in lines)))
