"""`completion`: print what lets a shell complete command lines."""

from __future__ import annotations

import argparse

from outliermerge.cli.parser import COMMANDS, load, make_parser
from outliermerge.cli.parts import EXIT_DONE, Command
from outliermerge.errors import OutlierMergeError

SHELLS = ("bash", "zsh", "fish")
_FOLDERS = ("DIR", "OUT")
_FILES = ("SPEC", "FILE", "YAML", "MODEL", "BASE", "SCORES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the shell."""
    parser.add_argument(
        "shell", metavar="SHELL", choices=SHELLS, help=f"{', '.join(SHELLS[:-1])} or {SHELLS[-1]}"
    )


def run(options: argparse.Namespace) -> int:
    """Print the completion of a shell."""
    try:
        import shtab
    except ImportError as error:
        raise OutlierMergeError(
            "completion is made by shtab, which is not installed: pip install shtab"
        ) from error
    parser = make_parser(load())
    for command in COMMANDS:
        for action in parser.of(command)._actions:
            if action.metavar in _FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.metavar in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=options.shell))
    return EXIT_DONE


COMMAND = Command(
    summary="print what lets a shell complete command lines",
    examples=(
        "outliermerge completion bash > ~/.local/share/bash-completion/completions/outliermerge",
        "outliermerge completion zsh > ~/.zfunc/_outliermerge",
        "outliermerge completion fish > ~/.config/fish/completions/outliermerge.fish",
    ),
    add_arguments=add_arguments,
    run=run,
)
