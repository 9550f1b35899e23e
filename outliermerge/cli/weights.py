"""The commands that look at weights: parse, call, print; nothing else."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.cli.parts import AddCommand, add_machine, plain_json, say
from outliermerge.errors import OutlierMergeError, SpecError, as_path


def add_weights(add: AddCommand, count: Callable[[str], int]) -> None:
    """Add the parsers of `stats`, `compare-weights`, `report`, `simulate` and `layers`."""
    stats = add(
        "stats",
        "show how a model's weights, or its task vectors, are distributed",
        "outliermerge stats models/minilm",
        "outliermerge stats models/tuned --base models/minilm --by layer",
        "outliermerge stats models/minilm --by tensor --json stats.json --csv stats.csv",
    )
    stats.add_argument("model", metavar="MODEL", help="a folder, file, hub id or adapter")
    stats.add_argument(
        "--small", type=float, default=1e-3, metavar="X", help="small: |x| < X (default 0.001)"
    )
    stats.add_argument(
        "--by",
        choices=("module", "layer", "tensor"),
        default="module",
        help="rows of the table (default: types of module)",
    )
    stats.add_argument(
        "--no-kernels", action="store_true", help="compute by torch instead of kernels"
    )
    compare = add(
        "compare-weights",
        "show how alike models or their task vectors are, and what conflicts in a merge",
        "outliermerge compare-weights models/a models/b",
        "outliermerge compare-weights models/a models/b models/c --base models/base --by module",
        "outliermerge compare-weights models/a models/b --base models/base --csv pairs.csv",
    )
    compare.add_argument(
        "models", metavar="MODEL", nargs="+", help="two or more folders, files, hub ids, adapters"
    )
    compare.add_argument(
        "--t", type=float, default=2.0, metavar="T", help="outliers are beyond Tσ (default 2)"
    )
    compare.add_argument(
        "--by",
        choices=("model", "module", "layer", "tensor"),
        default="model",
        help="rows of the table (default: pairs of models)",
    )
    layers = add(
        "layers",
        "show layers' leading singular values, their distances, and models' σ fingerprints",
        "outliermerge layers models/minilm",
        "outliermerge layers models/a models/b models/c --values 32 --json layers.json",
    )
    layers.add_argument(
        "models", metavar="MODEL", nargs="+", help="folders, files, hub ids, adapters"
    )
    layers.add_argument(
        "--values",
        type=count,
        default=16,
        metavar="K",
        help="singular values of each matrix (default 16)",
    )
    report = add(
        "report",
        "write a page that shows the distributions of weights, or of a merge and its drift",
        "outliermerge report models/minilm -o report.html",
        "outliermerge report models/a models/b --base models/base -o report.html --png figures",
        "outliermerge report merged -o merged.html",
    )
    report.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="models; a single output of `run` is shown with its manifest and its drift",
    )
    report.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="the page: one file, no network"
    )
    report.add_argument("--png", metavar="DIR", help="also draw figures for papers, at 300 dpi")
    report.add_argument(
        "--t", type=float, default=2.0, metavar="T", help="min-σ's threshold at first (default 2)"
    )
    simulate = add(
        "simulate",
        "simulate weights as the paper does (arXiv 2501.10661, sections B.2 and C.6)",
        "outliermerge simulate --png fig7.png",
        "outliermerge simulate --points 1000000 --seed 7 --json -",
    )
    simulate.add_argument(
        "--points", type=count, default=10_000_000, metavar="N", help="default 10,000,000"
    )
    simulate.add_argument("--seed", type=int, default=42, metavar="S", help="default 42")
    simulate.add_argument("--png", metavar="FILE", help="draw the paper's Fig. 7")
    for command in (stats, report):
        command.add_argument(
            "--filter", type=float, default=3.0, metavar="F", help="keep within Fσ (default 3)"
        )
    for command in (stats, compare, layers, report):
        command.add_argument("--base", metavar="BASE", help="look at task vectors against it")
    for command in (stats, compare, layers):
        command.add_argument(
            "--rename", metavar="MAP", help="from the models' names to the base's, as in specs"
        )
    for command in (stats, compare, layers, report):
        add_machine(command, count)
    for command in (stats, compare, layers, simulate):
        command.add_argument("--json", metavar="FILE", help="write JSON (- for the terminal)")
    for command in (stats, compare):
        command.add_argument("--csv", metavar="FILE", help="write a row for each tensor")
        command.add_argument("--parquet", metavar="FILE", help="the same as Parquet")


def run_stats(options: argparse.Namespace) -> int:
    """Measure and print the distribution of a model's weights."""
    from outliermerge.analysis.models import open_subject
    from outliermerge.analysis.stats import weight_stats
    from outliermerge.cli import render, render_weights

    _check_files(options)
    subject = open_subject(options.model, options.base, rename=options.rename)
    started = time.perf_counter()
    with render.reading_bar() as callbacks:
        stats = weight_stats(
            subject,
            filter=options.filter,
            small=options.small,
            device=options.device,
            threads=options.threads,
            kernels=not options.no_kernels,
            **callbacks,
        )
    seconds = time.perf_counter() - started
    rows = [tensor.as_dict() for tensor in stats.tensors]
    if _write(options, stats.as_dict() | {"seconds": round(seconds, 4)}, rows):
        render_weights.print_stats(stats, by=options.by)
        read = render.human_bytes(subject.num_bytes)
        print(f"{read} in {seconds:.2f} s")
    return 0


def run_compare_weights(options: argparse.Namespace) -> int:
    """Compare models or their task vectors, and print what conflicts."""
    from outliermerge.analysis.compare import compare_weights
    from outliermerge.cli import render, render_weights

    _check_files(options)
    with render.reading_bar() as callbacks:
        found = compare_weights(
            options.models,
            base=options.base,
            t=options.t,
            rename=options.rename,
            device=options.device,
            threads=options.threads,
            **callbacks,
        )
    if _write(options, found.as_dict(), [pair.as_dict() for pair in found.tensors]):
        render_weights.print_comparison(found, by=options.by)
    return 0


def run_layers(options: argparse.Namespace) -> int:
    """Print the spectra of models' layers, and how far their fingerprints are apart."""
    from outliermerge.analysis.spectra import layer_spectra
    from outliermerge.analysis.spectra_fingerprint import fingerprint_distance
    from outliermerge.cli import render, render_weights

    _check_files(options)
    with render.reading_bar() as callbacks:
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
    if _write(options, table, []):
        render_weights.print_layers(found, distances)
    return 0


def run_report(options: argparse.Namespace) -> int:
    """Write the page, and figures where they are asked for."""
    from outliermerge.analysis.report.build import build_report
    from outliermerge.cli import render

    with render.reading_bar() as callbacks:
        page = build_report(
            options.models,
            base=options.base,
            output=Path(options.output),
            png=Path(options.png) if options.png else None,
            t=options.t,
            filter=options.filter,
            device=options.device,
            threads=options.threads,
            **callbacks,
        )
    say(f"wrote {page}" + (f" and {options.png}" if options.png else ""))
    return 0


def run_simulate(options: argparse.Namespace) -> int:
    """Simulate weights, and print their statistics and shapes."""
    from outliermerge.analysis.simulate import draw, simulate
    from outliermerge.cli import render, render_weights

    _check_files(options)
    with render.reading_bar("simulating") as callbacks:
        found = simulate(seed=options.seed, num_points=options.points, **callbacks)
    if options.png:
        draw(found, Path(options.png))
        say(f"wrote {options.png}", file=sys.stderr)
    if _write(options, found.as_dict(), []):
        render_weights.print_simulation(found)
    return 0


def _check_files(options: argparse.Namespace) -> None:
    """Refuse files that could not be written before anything is read."""
    from outliermerge.analysis.extras import require

    kinds = ("json", "csv", "parquet", "png")
    given = ((kind, getattr(options, kind, None)) for kind in kinds)
    named = {kind: file for kind, file in given if file is not None}
    for kind, file in named.items():
        if file == "-" and kind == "json":
            continue
        if file in ("", "-") or list(named.values()).count(file) > 1:
            raise SpecError(f"--{kind}: found {file!r}, expected a file of its own")
        path = as_path(file)
        if path.is_dir() or not path.parent.is_dir():
            what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise OutlierMergeError(f"{path}: cannot be written: {what}")
    if "parquet" in named:
        require("pyarrow", "--parquet")
    if "png" in named:
        require("matplotlib.figure", "a figure")


def _write(
    options: argparse.Namespace, table: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> bool:
    """Write the files that were asked for; tell whether the terminal is free for tables."""
    from outliermerge.analysis import export

    for name, write in (("csv", export.write_csv), ("parquet", export.write_parquet)):
        if file := getattr(options, name, None):
            write(Path(file), rows)
    if options.json == "-":
        print(plain_json(export.to_json(table)))
        return False
    if options.json:
        export.write_json(Path(options.json), table)
    written = [
        file for name in ("json", "csv", "parquet") if (file := getattr(options, name, None))
    ]
    if written:
        say(f"wrote {', '.join(written)}", file=sys.stderr)
    return True
