"""What commands share: what one is, printing, and the flags that several have."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from outliermerge.errors import MAX_NOTE, noted, quoted, readable

if TYPE_CHECKING:
    from outliermerge.output.options import RunOptions

EXIT_DONE, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
LOAD_CHECK_VARIABLE = "OUTLIERMERGE_LOAD_CHECK"
BAR_EXPLAINED = """\
The progress counts the bytes of all passes: a tensor is read once to merge it, and once more for
each pass that its method first measures it in; and it is written once. Without a terminal it is a
line every 5 seconds; OUTLIERMERGE_PROGRESS_SECONDS sets another interval, and 0 none.
"""
_FOLDER = (
    "the folder to write, or its address (s3://, gs://, az://), or a .safetensors file where the "
    "models are such files"
)
_SPEC = (
    "a YAML file; the outliermerge.json of an output, to repeat its merge; the name of a spec that "
    "`configs` lists; or - for the standard input"
)
_MAX_NOTES = 50


@dataclass(frozen=True)
class Command:
    """A command, as the program needs it; its module imports nothing heavy before it runs."""

    summary: str
    """What it does, for the help."""
    examples: tuple[str, ...]
    """Command lines for its own help."""
    run: Callable[[argparse.Namespace], int]
    """Calls the library, prints, and returns the exit code."""
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    overview: str = ""
    """A command line for the help of the whole program."""
    goes_on: bool = False
    """Whether it goes on from where it was interrupted."""
    explanation: str = ""
    """What its help says besides, at the end."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """The words that may follow it, and what each does."""


def print_json(value: object) -> None:
    """Print a value for scripts."""
    print(plain_json(json.dumps(value, indent=2, ensure_ascii=False)))


def plain_json(text: str) -> str:
    r"""Return JSON with what could control a terminal escaped; only texts in it can hold such.

    >>> plain_json('["\x7f\u202e é"]')
    '["\\u007f\\u202e é"]'
    """
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print a message, which may quote what others wrote, as a person can read it."""
    print(readable(text), file=file)


def print_notes(notes: Sequence[str], options: argparse.Namespace) -> None:
    """Print notes after the output, each once; JSON on the standard output has them in it."""
    if options.json not in (True, "-") and not options.quiet:
        sys.stdout.flush()  # where both go to one file, the notes stand below
        said = list(dict.fromkeys(notes))
        for note in said[:_MAX_NOTES]:
            print(readable(noted(note), MAX_NOTE), file=sys.stderr)
        if len(said) > _MAX_NOTES:
            say(f"note: {len(said) - _MAX_NOTES} more notes, with --json", file=sys.stderr)


def count(text: str, least: int = 1) -> int:
    """Return a number of at least 1; the type of arguments."""
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number of at least {least}")
    return number


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON, for scripts")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add --threads, of the library's own threads."""
    parser.add_argument(
        "--threads",
        type=partial(count, least=0),
        default=0,
        metavar="N",
        help="worker threads (default 0: processors + 2)",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what computes."""
    parser.add_argument(
        "--device",
        default="cpu",
        help="what computes: cpu (default), cuda (all GPUs), cuda:N, or auto (GPUs if there are "
        "any)",
    )
    add_threads(parser)


def add_baseline(parser: argparse.ArgumentParser) -> None:
    """Add the flag of the row that a table of scores compares with."""
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="the row of the table that gains are over (default: the average)",
    )


def add_planning(
    parser: argparse.ArgumentParser, *, spec: str = _SPEC, folder: str = _FOLDER
) -> None:
    """Add the flags of a merge that its plan needs.

    Args:
        spec: what the spec can be, in words.
        folder: what can be written, in words.
    """
    parser.add_argument("spec", metavar="SPEC", help=spec)
    parser.add_argument(
        "folder",
        metavar="DIR",
        nargs="?",
        help=f"{folder}; else --output or the `output:` of the spec names it",
    )
    _add_planning(parser)


def _add_planning(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="DIR", help="the same as DIR")
    add_machine(parser)
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="most memory for what is computed at once, besides the program's own (default 1GiB, "
        "or what all threads need for the largest tensor, up to 3/4 of the free memory); fewer "
        "threads run where it is too little for all",
    )
    parser.add_argument(
        "--no-kernels",
        action="store_true",
        help="compute by torch instead of the C kernels: slower, the same but for rounding",
    )
    parser.add_argument(
        "--shard-size",
        metavar="SIZE",
        help="most bytes of a weight file, such as 2GB (default 5GB)",
    )
    parser.add_argument(
        "--load-check",
        action=argparse.BooleanOptionalAction,
        default=os.environ.get(LOAD_CHECK_VARIABLE) != "0",
        help="prove that transformers or diffusers, where installed, loads the output "
        f"(default, unless {LOAD_CHECK_VARIABLE}=0)",
    )
    add_json(parser)


def add_lenient(parser: argparse.ArgumentParser) -> None:
    """Add --lenient."""
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="go on without what mergekit passes over in silence (unknown keys, filters that match "
        "nothing), and warn of it; so does a command line of only FILE and DIR",
    )


def add_running(
    parser: argparse.ArgumentParser,
    *,
    has_spec: bool = True,
    spec: str = _SPEC,
    folder: str = _FOLDER,
) -> None:
    """Add the flags of a merge that is carried out.

    Args:
        has_spec: add the arguments for a spec and what to write, too.
        spec: what the spec can be, in words.
        folder: what can be written, in words.
    """
    if has_spec:
        add_planning(parser, spec=spec, folder=folder)
    else:
        _add_planning(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an output that is there, when the new one is done",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over instead of going on with a killed run"
    )
    parser.add_argument(
        "--allow-non-finite",
        action="store_true",
        help="go on where values are infinite or NaN, and list the tensors",
    )
    parser.add_argument(
        "--stream",
        action="store_const",
        const="all",
        default="",
        help="read models of the hub by ranges instead of downloading them, as hf://org/name does",
    )
    parser.add_argument(
        "--cache-size",
        default="8GiB",
        metavar="SIZE",
        help="most disk for what is read again of models elsewhere (default 8GiB)",
    )


def run_options(options: argparse.Namespace, **more: Any) -> RunOptions:
    """Return how a merge is carried out, from the flags of `add_running`, or `add_planning`.

    Args:
        **more: fields that no flag gives, such as `on_progress`.
    """
    from dataclasses import fields

    from outliermerge.output.options import RunOptions

    given = vars(options) | {"kernels": not options.no_kernels} | more
    return RunOptions(**{f.name: given[f.name] for f in fields(RunOptions) if f.name in given})


_FLAGS = {"settings": "--set", "num_points": "--points", "num_values": "--values"}


def flag(argument: str, value: str | None) -> str:
    """Return an argument of the library as the command line writes it.

    >>> flag("shard_size", None), flag("fresh", "True"), flag("kernels", "False")
    ('--shard-size', '--fresh', '--no-kernels')
    """
    name = _FLAGS.get(argument, "--" + argument.replace("_", "-"))
    if value in (None, "True"):
        return name
    return f"--no-{name[2:]}" if value == "False" else f"{name} {value}"
