"""`extract`: make an adapter of what a model and its base differ by."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from outliermerge.cli.lines import human_bytes
from outliermerge.cli.parts import (
    LOAD_CHECK_VARIABLE,
    Command,
    add_json,
    add_machine,
    count,
    print_json,
    print_notes,
)
from outliermerge.cli.tables import NamedTable, print_words
from outliermerge.cli.terminal import open_console, reading_bar
from outliermerge.cli.weights import add_rename
from outliermerge.errors import shown

if TYPE_CHECKING:
    from outliermerge.extraction.report import Extracted, Extraction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the models, and how much of their difference is kept."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model: a folder, a file, a hub id, an adapter, or BASE+ADAPTER; or a merge, of "
        "adapters for example: a YAML file",
    )
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="the model that it was made of; of a merge it is the spec's base_model",
    )
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="the adapter's folder")
    parser.add_argument(
        "--rank", type=count, metavar="N", help="the rank of each matrix; with --energy the most"
    )
    parser.add_argument(
        "--energy",
        type=float,
        metavar="E",
        help="keep at least this share of the squared norm of each matrix's change, such as 0.95",
    )
    parser.add_argument(
        "--error",
        type=float,
        metavar="X",
        help="lose at most this share of the norm of each matrix's change, such as 0.1",
    )
    parser.add_argument(
        "--factor-embeddings",
        action="store_true",
        help="factor embeddings and heads, too, instead of saving them whole",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="leave out changed tensors that no adapter can hold, and list them; else refuse",
    )
    parser.add_argument(
        "--randomized",
        action="store_true",
        help="find singular vectors from a random start: faster, and a little less is kept",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of --randomized (default 0)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        metavar="DTYPE",
        help="of the factors: float32 (default), bfloat16 or float16",
    )
    parser.add_argument(
        "--core",
        action="store_true",
        help="of a merge of LoRAs: merge small matrices between bases of all (Core Space)",
    )
    for name, what in (("include", "only"), ("exclude", "no")):
        parser.add_argument(
            f"--{name}",
            metavar="PART",
            action="append",
            default=[],
            help=f"{what} tensors with this part in their name; may be given several times",
        )
    parser.add_argument(
        "--by",
        choices=("module", "tensor"),
        default="module",
        help="what the table has a row for (default: module, a type of module over all layers)",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="most memory for what is computed at once, besides the program's own (default 4GiB, "
        "and what a matrix needs if that is more and is free)",
    )
    parser.add_argument(
        "--load-check",
        action=argparse.BooleanOptionalAction,
        default=os.environ.get(LOAD_CHECK_VARIABLE) != "0",
        help="ask transformers, where installed, of which kinds the modules are, and refuse what "
        f"peft would not load (default, unless {LOAD_CHECK_VARIABLE}=0)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over instead of going on with a killed run"
    )
    add_rename(parser)
    add_machine(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Write the adapter, and print what was kept of each tensor."""
    from outliermerge.extraction.extract import extract

    with reading_bar("extracting", quiet=options.quiet) as callbacks:
        made = extract(
            options.model,
            base=options.base,
            output=options.output,
            rank=options.rank,
            energy=options.energy,
            error=options.error,
            factor_embeddings=options.factor_embeddings,
            partial=options.partial,
            randomized=options.randomized,
            seed=options.seed,
            dtype=options.dtype,
            core=options.core,
            include=options.include,
            exclude=options.exclude,
            fresh=options.fresh,
            rename=options.rename,
            device=options.device,
            threads=options.threads,
            memory=options.memory,
            load_check=options.load_check,
            **callbacks,
        )
    left = (f"left out: {shown(name)}: {why}" for name, why in made.left_out.items())
    notes = [*left, *made.notes]
    if options.json:
        print_json(made.as_dict() | {"output": str(made.output)})
    elif not options.quiet:
        _print(made, by=options.by)
    print_notes(notes, options)
    return 0


def _print(made: Extraction, *, by: str) -> None:
    console = open_console()
    table = NamedTable(by, "of", "as", "rank", "norm", "error", "bytes").left("as")
    for name, tensors in _groups(made, by):
        ranks = [tensor.rank for tensor in tensors if tensor.rank]
        held = sorted({"factors" if tensor.rank else tensor.how for tensor in tensors})
        table.add_row(
            name,
            str(len(tensors)),
            " and ".join(held),
            _range([str(min(ranks)), str(max(ranks))]) if ranks else "–",
            f"{max(tensor.norm for tensor in tensors):.3g}",
            f"{max(tensor.error for tensor in tensors):.2g}",
            human_bytes(sum(tensor.num_bytes for tensor in tensors)),
        )
    table.print(console)
    print_words(
        console,
        f"wrote {made.output}: {human_bytes(made.num_bytes)}, {made.seconds:.1f} s; "
        f"{len(made.tensors)} tensors differ, {made.num_unchanged} do not"
        + (f", {made.num_excluded} were not chosen" if made.num_excluded else ""),
        "bold",
    )
    print_words(
        console,
        f"Of all changes, {made.error:.2g} is lost. norm, error: the largest of the row's. error: "
        "‖W' − W − BA‖ / ‖W' − W‖, measured of the factors as they are written.",
        "dim",
    )


def _groups(made: Extraction, by: str) -> Iterator[tuple[str, list[Extracted]]]:
    """Yield the rows of the table: tensors, or types of module over all layers."""
    from outliermerge.analysis.places import find_places, short_names

    if by == "tensor":
        yield from ((tensor.name, [tensor]) for tensor in made.tensors)
        return
    places = find_places([tensor.name for tensor in made.tensors])
    groups: dict[str, list[Extracted]] = {}
    for tensor in made.tensors:
        groups.setdefault(places[tensor.name].module, []).append(tensor)
    names = short_names(groups)
    for module, tensors in groups.items():
        yield names.get(module, module), tensors


def _range(ends: list[str]) -> str:
    return "–".join(dict.fromkeys(ends))


COMMAND = Command(
    summary="make an adapter (LoRA) of what a model, or a merge, and its base differ by",
    goes_on=True,
    examples=(
        "outliermerge extract models/tuned --base models/minilm -o adapter --rank 16",
        "outliermerge extract org/tuned --base org/base -o adapter --energy 0.95 --rank 64",
        "outliermerge extract adapters.yaml -o merged-adapter",
        "outliermerge extract adapters.yaml -o merged-adapter --core --rank 16",
        "outliermerge extract models/tuned --base models/base -o moved --rank 8 --include experts",
        "outliermerge extract models/tuned --base models/base -o adapter --error 0.1 \\\n"
        "      --factor-embeddings --dtype bfloat16 --json",
    ),
    overview="outliermerge extract models/tuned --base models/base -o adapter --rank 16",
    add_arguments=add_arguments,
    run=run,
    explanation="""\
The adapter loads in peft. Its extraction.json has the rank, norm and error of each tensor. Singular
values are those of the Gram matrix of the shorter side, in float64; a matrix of S × T, S ≤ T, takes
2 S² T operations and about 10 S³ more, with --randomized 12 (N + 10) S T. Needs torch.
""",
)
