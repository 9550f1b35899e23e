"""`layers`: show the spectra of layers, and fingerprints of models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from outliermerge.cli.parts import Command, add_machine, count, print_notes
from outliermerge.cli.tables import NamedTable, letters_of, print_words
from outliermerge.cli.terminal import open_console, reading_bar
from outliermerge.cli.weights import (
    WIDE,
    add_base,
    add_json_file,
    add_rename,
    check_files,
    number_text,
    write_files,
)

if TYPE_CHECKING:
    from outliermerge.analysis.spectra import LayerSpectra
    from outliermerge.analysis.spectra_fit import PowerLawFit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the models and the number of singular values."""
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="models: folders, files, hub ids, adapters"
    )
    parser.add_argument(
        "--values",
        type=count,
        default=16,
        metavar="K",
        help="how many singular values of each matrix (default 16)",
    )
    add_base(parser)
    add_rename(parser)
    add_machine(parser)
    add_json_file(parser)


def run(options: argparse.Namespace) -> int:
    """Print the spectra of models' layers, and the distances of their fingerprints."""
    from outliermerge.analysis.spectra import layer_spectra
    from outliermerge.analysis.spectra_fingerprint import fingerprint_distance

    check_files(options)
    with reading_bar(quiet=options.quiet) as callbacks:
        found = [
            layer_spectra(
                model,
                num_values=options.values,
                base=options.base,
                rename=options.rename,
                device=options.device,
                threads=options.threads,
                **callbacks,
            )
            for model in options.models
        ]
    distances = [[fingerprint_distance(a.fingerprint, b.fingerprint) for b in found] for a in found]
    table = {
        "models": [each.as_dict() for each in found],
        "fingerprint_distances": distances,
    }
    if write_files(options, table, []):
        print_layers(found, distances)
    print_notes([note for spectra in found for note in spectra.notes], options)
    return 0


def print_layers(found: Sequence[LayerSpectra], distances: Sequence[Sequence[float]]) -> None:
    """Print the distances between layers, and the distances of models' fingerprints."""
    console = open_console()
    for number, spectra in enumerate(found):
        if number:
            console.print()
        what = spectra.model if spectra.base is None else f"{spectra.model} − {spectra.base}"
        largest = f"the {spectra.num_values} largest singular values of each matrix"
        print_words(console, f"{what}: {largest}, from layer to layer", "bold")
        is_wide = console.width >= WIDE
        against = ("against exponential", "against log-normal") if is_wide else ()
        table = NamedTable("module", "layers", "distance", "alpha", *against, "verdict")
        names = spectra.short_names
        for module in spectra.modules:
            table.add_row(
                names[module.module],
                str(len(module.layers)),
                *_fit_cells(module.distances, module.fit, is_wide),
            )
        together = [distance for module in spectra.modules for distance in module.distances]
        table.add_row("all types together", "", *_fit_cells(together, spectra.fit, is_wide))
        table.print(console)
    print_words(
        console,
        "distance: how differently the singular values of two layers fall off, from 0 for the same "
        "curve to 1; the median over all pairs of layers. alpha: how steep a power law fits these "
        "distances. verdict: which curve describes them best, a power law, an exponential or a "
        "log-normal; undecided if none is clearly better, no fit if there are too few distances or "
        "all are alike. Pairs share layers, so that a verdict looks surer than it is. We read the "
        "abstract of arXiv 2509.00046 so; the paper itself was not at hand.",
        "dim",
    )
    if len(found) > 1:
        letters = letters_of(len(found))
        print_words(
            console,
            "\ndistance between the models' σ over their layers, 0 for the same curve",
            "bold",
        )
        for letter, spectra in zip(letters, found, strict=True):
            print_words(console, f"  {letter}  {spectra.model}")
        table = NamedTable("", *letters, justify="left")
        for letter, row in zip(letters, distances, strict=True):
            table.add_row(letter, *(number_text(value, "{:.4f}") for value in row))
        table.print(console)


def _fit_cells(distances: Sequence[float], fit: PowerLawFit | None, is_wide: bool) -> list[str]:
    from statistics import median

    middle = f"{median(distances):.2g}"
    if fit is None:
        return [middle, "–", *(["–", "–"] if is_wide else []), "no fit"]
    others = (fit.exponential, fit.lognormal) if is_wide else ()
    against = [f"{each.ratio:.1f}, p={each.p:.2g}" for each in others]
    return [middle, f"{fit.alpha:.2f}±{fit.standard_error:.2f}", *against, fit.verdict]


COMMAND = Command(
    summary="show layers' leading singular values, their distances, and models' σ fingerprints",
    examples=(
        "outliermerge layers models/minilm",
        "outliermerge layers models/a models/b models/c --values 32 --json layers.json",
    ),
    add_arguments=add_arguments,
    run=run,
)
