"""`sweep`: merge with several values of settings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.cli.in_parts import add_ray, carried_out, check_ray, resolved
from outliermerge.cli.parts import (
    BAR_EXPLAINED,
    Command,
    add_running,
    print_json,
    print_notes,
    run_options,
)
from outliermerge.cli.specs import named_output, read_spec
from outliermerge.cli.tables import NamedTable, print_words, short_references
from outliermerge.cli.terminal import (
    MergeBar,
    open_console,
    print_loading,
    print_remarks,
    work_in_words,
)
from outliermerge.errors import SpecError, shown

if TYPE_CHECKING:
    from outliermerge.output.names import Final
    from outliermerge.output.run import RunResult

_KEPT = " kept: outliers kept whole."
_NOT_MEASURED = (
    "How far each moved is not measured: that takes a method with a base model, and a base and "
    "models that are read as they are stored, not stages, adapters, quantised or rearranged ones."
)
_EXPLAINED = (
    "change: of the base's weights, in L2 norm. cosine: of the merged change with a model's own. "
    "length: of the merged change, over the mean of the models' own."
)
_MOST_COSINES = 4  # columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the values, and the flags of a merge."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="values to merge with, such as t=2,2.5,3. KEY is merge_method, dtype, out_dtype, a "
        "parameter, or models.N.PARAMETER of the N-th model, from 1; with stages.NAME., "
        "modules.NAME. or slices.N. before it, of that part. Several --set are combined",
    )
    add_running(
        parser, folder="the folder in which each output gets one of its own, or its address"
    )
    add_ray(parser)


def run(options: argparse.Namespace) -> int:
    """Merge with several settings, and print what was done."""
    from outliermerge.search import sweeps

    settings = {}
    for option in options.set:
        key, values = sweeps.parse_values(option)
        if key in settings:
            raise SpecError(f"--set {shown(key)}: is given twice: write {key}=VALUE,VALUE,…")
        settings[key] = values
    output = named_output(options)
    spec = read_spec(options)
    if output is None and spec.document.output is None:
        raise SpecError(f"{spec.source.file}: no output: give --output or `output:` in the spec")
    variants = sweeps.plan_sweep(spec, settings, shard_size=options.shard_size)
    check_ray(options)
    plans = [(each.plan, sweeps.output_of(each, output)) for each in variants]
    on_ray, in_store = options.executor_name == "ray", isinstance(plans[0][1], str)
    total = sweeps.work_bytes(variants, read_once=not (on_ray or in_store))
    # What is not here, or does not fit in memory, is said before a bar is drawn.
    resolved(options, *(each for each, _ in plans))
    with MergeBar(
        total,
        len(variants),
        quiet=options.quiet,
        on_ray=on_ray,
        is_converted=any(each.plan.conversion for each in variants),
    ) as bar:
        chosen = run_options(options, on_progress=bar.advance, on_waiting=bar.wait)
        results = carried_out(plans, chosen, options)
        bar.done()
    said = [note for variant in variants for note in variant.plan.notes]
    said += [note for result in results if result.load_check for note in result.load_check.notes]
    notes = list(dict.fromkeys(said))
    if options.json:
        pairs = zip(variants, results, strict=True)
        outputs = [{"settings": dict(v.settings)} | result.as_dict() for v, result in pairs]
        print_json({"outputs": outputs, "notes": notes})
    elif not options.quiet:
        print_outputs(results)
    print_notes(notes, options)
    return 0


def print_outputs(results: Sequence[RunResult]) -> None:
    """Print a row for each output: where it is, and how far it is from the base."""
    drifts = [result.manifest.get("drift") or {} for result in results]
    columns = _columns(drifts)
    folders, names = zip(*(_folder_and_name(result.output) for result in results), strict=True)
    print_words(open_console(), f"in {folders[0]}:")
    table = NamedTable("output", *columns)
    for name, drift in zip(names, drifts, strict=True):
        table.add_row(name, *_cells(drift, columns))
    table.print(open_console())
    if columns:
        kept = _KEPT if any("kept" in title for title in columns) else ""
        print_words(open_console(), _EXPLAINED + kept, "dim")
    else:
        print_words(open_console(), _NOT_MEASURED, "dim")
    first = results[0]  # all were worked on together, and read together but for a store
    read = results if isinstance(first.output, str) else results[:1]
    worked = sum(each.written_bytes for each in results) + sum(each.input_bytes for each in read)
    print_words(open_console(), f"wrote {len(results)} outputs: {work_in_words(first, worked)}")
    checked = {result.load_check.by: result for result in results if result.load_check}
    for result in checked.values():
        print_loading(result)
    for result in results:
        print_remarks(result)


def _folder_and_name(output: Final) -> tuple[str, str]:
    if isinstance(output, Path):
        return str(output.parent), output.name
    folder, _, name = output.rpartition("/")
    return folder, name


def _columns(drifts: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return the titles of columns, each with the keys of what it shows."""
    models = list(dict.fromkeys(name for drift in drifts for name in drift.get("cosines", ())))
    short = short_references(models)
    found = {"change %": ("relative_size", "")} if models else {}
    if len(models) <= _MOST_COSINES:
        found |= {f"cosine {short[model]}": ("cosines", model) for model in models}
    found |= {"length": ("length", "")} if models else {}
    kept = dict.fromkeys(name for drift in drifts for name in drift.get("outliers_kept", ()))
    if len(kept) <= _MOST_COSINES:
        found |= {f"kept % {short[model]}": ("outliers_kept", model) for model in kept}
    return found


def _cells(drift: Mapping[str, Any], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    cells = []
    for title, (key, model) in columns.items():
        value = drift.get(key, {}).get(model) if model else drift.get(key)
        if value is None:
            cells.append("–")
        else:
            cells.append(f"{100 * value:.3g}" if "%" in title else f"{value:.3g}")
    return cells


COMMAND = Command(
    summary="merge with several values of settings, from one reading of the models",
    examples=(
        "outliermerge sweep merge.yaml --set t=2,2.5,3 --output merged/t",
        "outliermerge sweep merge.yaml --set merge_method=linear,task_arithmetic --output merged",
        "outliermerge sweep merge.yaml --set t=2,2.5,3 --output merged --executor ray",
        "outliermerge sweep merge.yaml --set models.1.weight=0.3,0.5 --set lambda=0.8,1 --output m",
    ),
    overview="outliermerge sweep merge.yaml --set t=2,2.5,3 --output merged/sweep",
    add_arguments=add_arguments,
    run=run,
    goes_on=True,
    explanation=BAR_EXPLAINED,
)
