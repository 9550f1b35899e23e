"""A plan as tables that a person reads in a minute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.cli.lines import human_bytes
from outliermerge.cli.plan_facts import (
    Took,
    ids_in_words,
    loads_in_words,
    memory_in_words,
    proof_in_words,
    time_in_words,
)
from outliermerge.cli.tables import (
    NamedTable,
    letters_of,
    print_facts,
    print_words,
    short_references,
)
from outliermerge.cli.terminal import open_console, text
from outliermerge.errors import as_path, shown
from outliermerge.storage.addresses import is_address

if TYPE_CHECKING:
    from rich.console import Console

    from outliermerge.output.estimate import Estimate
    from outliermerge.output.load_check import Verdict
    from outliermerge.output.names import Final
    from outliermerge.planning.plan import Input, LayersOf, Options, Plan
    from outliermerge.spec.check import MergeSpec

_MAX_LAYER_ROWS = 60
_BESIDE_NAMES = 55  # the width of a row of layers without the name of their model


def print_plan(
    plan: Plan,
    *,
    output: Final | None,
    options: Options,
    estimate: Estimate,
    took: Took,
    free_bytes: int,
    verdict: Verdict | None = None,
    with_tensors: bool = False,
    further: Sequence[tuple[str, str]] = (),
) -> None:
    """Print a plan as tables that a person reads in a minute."""
    console = open_console()
    print_words(console, f"{plan.spec.title}: {plan.spec.summary}", "bold")
    _print_models(console, plan)
    _print_modules(console, plan)
    _print_pairing(console, plan)
    _print_layers(console, plan)
    _print_actions(console, plan)
    _print_parameters(console, plan)
    _print_rows(console, plan)
    facts = [
        ("output", str(output) if output else "not named yet: give --output"),
        (
            "disk",
            f"reads {human_bytes(plan.num_read_bytes)}, writes "
            f"{human_bytes(plan.num_written_bytes)} in {len(plan.shards)} file(s)"
            + ("" if isinstance(output, str) else f"; {human_bytes(free_bytes)} free"),
        ),
        ("time", time_in_words(estimate, took)),
        ("peak memory", memory_in_words(estimate, options)),
        ("parameters", proof_in_words(plan)),
        *([("tokenizer", plan.tokenizer.in_words())] if plan.tokenizer else []),
        *([("ids", ids_in_words(plan))] if plan.ids else []),
        *([("chat template", plan.chat_template.in_words())] if plan.chat_template else []),
        *([("loads in", loads_in_words(verdict, took))] if verdict and verdict.by else []),
        ("files carried over", ", ".join(shown(file.name) for file in plan.sidecars) or "none"),
    ]
    print_facts(console, [*facts, *further])
    if with_tensors:
        console.print()
        _print_tensors(console, plan)


def _print_models(console: Console, plan: Plan) -> None:
    table = NamedTable("model", "role", "tensors", "size", "dtypes loaded", "from", justify="left")
    places = []
    rows = [(entry, _role(plan, entry)) for entry in plan.inputs]
    opened = set[str]()
    for entry, role in rows:
        metas, root = entry.stored, entry.checkpoint.root
        made = "modules" if plan.modules and entry is plan.inputs[0] else "a stage"
        table.add_row(
            entry.reference,
            role,
            str(len(entry.checkpoint.tensors)),
            "–" if entry.made_of else human_bytes(sum(meta.num_bytes for meta in metas)),
            "computed" if entry.made_of else _counts(meta.dtype.name for meta in metas),
            made if entry.made_of else _format(entry),
        )
        for beside in entry.beside:
            table.add_row(
                beside.reference,
                f"its {beside.kind}",
                str(len(beside.stored)),
                human_bytes(sum(meta.num_bytes for meta in beside.stored)),
                _counts(meta.dtype.name for meta in beside.stored),
                _files({meta.path for meta in beside.stored}),
            )
        if entry.reference not in opened:
            rows += [(model, f"in {entry.reference}") for model in entry.made_of]
            opened.add(entry.reference)
        if entry.made_of:
            continue
        if not as_path(entry.reference).exists():
            places.append((entry.reference, root))
    table.print(console)
    for name, stage in plan.spec.all_stages.items():
        print_words(
            console, f"stage {shown(name)}: {stage.in_a_line}{_given(stage)}{_modified(stage)}"
        )
    for reference, root in places:
        small = " (config, tokenizer and headers)" if is_address(reference) else ""
        console.print(text(f"{shown(reference)} is in {shown(str(root))}{small}"), soft_wrap=True)
    console.print()


def _print_modules(console: Console, plan: Plan) -> None:
    """Print which parts of the output are merged of which models, if the spec has modules."""
    if not plan.modules:
        return
    table = NamedTable("module", "tensors", "merged by", "of", "the base's", justify="left")
    for module in plan.modules:
        table.add_row(
            module.name,
            str(len(module.names)),
            module.method + _modified(plan.spec.modules[module.name].merge),
            ", ".join(module.models),
            f"{len(module.kept)} kept" if module.kept else "none",
        )
    table.print(console)
    console.print()


def _given(stage: MergeSpec) -> str:
    """Return the parameters of a stage as its spec gives them, shared ones first."""
    document = stage.document
    own = [("", document.parameters), *((m.model, m.parameters) for m in document.models)]
    parts = [
        f"{f'{shown(model)}: ' if model else ''}"
        + ", ".join(f"{key} {shown(value)}" for key, value in parameters.items())
        for model, parameters in own
        if parameters
    ]
    return f" ({'; '.join(parts)})" if parts else ""


def _print_pairing(console: Console, plan: Plan) -> None:
    """Print how names are changed, if they are."""
    for entry in plan.models:
        for rule, (count, before, after) in entry.renamed.items():
            words = f"{shown(rule)} renames {count} tensors of {shown(entry.reference)}, such as"
            print_words(console, f"{words}\n  {shown(before)}\n  to {shown(after)}\n")


def _print_layers(console: Console, plan: Plan) -> None:
    """Print which layers of which models the output's layers are from, and those of its parts."""
    rows = plan.layer_map
    if not rows:
        return
    _print_strips(console, rows)
    table = NamedTable(
        "layers of", "stack", "layers", "merged by", "from", "layers there", justify="left"
    )
    before: tuple[str, str] | None = None
    models = [model for row in rows for model, _, _ in row.sources]
    short = {model: model for model in models}
    if max(map(len, models), default=0) > console.width - _BESIDE_NAMES:
        short = short_references(models)
    for row in rows[:_MAX_LAYER_ROWS]:
        cells = [row.merge, row.stack] if (row.merge, row.stack) != before else ["", ""]
        before = row.merge, row.stack
        cells += [_layers(row.start, row.stop), row.method or "copied"]
        for model, start, stop in row.sources:
            table.add_row(*cells, short[model], _layers(start, stop))
            cells = [""] * len(cells)
    table.print(console)
    if len(rows) > _MAX_LAYER_ROWS:
        print_words(console, f"and {len(rows) - _MAX_LAYER_ROWS} more rows, which --json has")
    console.print()


def _print_strips(console: Console, rows: Sequence[LayersOf]) -> None:
    """Print a letter for each layer, where not all layers of a merge are from the same models."""
    strips: dict[tuple[str, str], list[LayersOf]] = {}
    for row in rows:
        strips.setdefault((row.merge, row.stack), []).append(row)
    drawn = {key: own for key, own in strips.items() if len({_models(r) for r in own}) > 1}
    known = list(dict.fromkeys(_models(row) for own in drawn.values() for row in own))
    letters = dict(zip(known, letters_of(len(known)), strict=True))
    if not drawn or len(max(letters.values(), key=len)) > 1:
        return
    for (merge, stack), own in drawn.items():
        strip = [" "] * max(row.stop for row in own)
        for row in own:
            strip[row.start : row.stop] = letters[_models(row)] * (row.stop - row.start)
        print_words(console, f"{merge}, {stack}, layer by layer:")
        room = max(10, console.width - 8) // 10 * 10
        for start in range(0, len(strip), room):
            line = "".join(strip[start : start + room])
            console.print(text(f"{start:>5}  {line}"), soft_wrap=True)
    for models, letter in letters.items():
        print_words(console, f"    {letter}  {', '.join(models)}")
    console.print()


def _models(row: LayersOf) -> tuple[str, ...]:
    return tuple(shown(model) for model, _, _ in row.sources)


def _layers(start: int, stop: int) -> str:
    return f"{start}–{stop - 1}" if stop - start > 1 else str(start)


def _print_actions(console: Console, plan: Plan) -> None:
    table = NamedTable(
        "what happens", "tensors", "parameters", "loaded", "computed", "stored", justify="left"
    )
    groups: dict[str, list[Any]] = {}
    written = {id(job): writes.output.dtype.name for job, writes in plan.weight_jobs}
    for job, _ in plan.weight_jobs:
        by = plan.merged_by(job)
        what = (
            f"merged by {by[0]}" if by else "copied" if job.action == "copy" else "copied if equal"
        )
        reason = f" ({job.reason})" if job.reason else ""
        groups.setdefault(what + reason, []).append(job)
    for what_happens, jobs in groups.items():
        computed = {by[1] for job in jobs if (by := plan.merged_by(job))}
        stored = {m.dtype.name for job in jobs for _, s in job.sources for m in s.stored}
        table.add_row(
            what_happens,
            str(len(jobs)),
            f"{sum(job.num_elements for job in jobs):,}",
            ", ".join(sorted(stored)),
            ", ".join(sorted(computed)) or "not",
            ", ".join(sorted({written[id(job)] for job in jobs})),
        )
    table.print(console)
    console.print()


def _print_parameters(console: Console, plan: Plan) -> None:
    """Print a row for each parameter, model and filter."""
    from outliermerge.planning.settings_used import used_settings

    if not any(job.action == "merge" for job, _ in plan.weight_jobs):
        return
    table = NamedTable("parameter", "value", "tensors", "model", "filter", justify="left")
    short = short_references([model.reference for model in plan.spec.models])
    filtered = set()
    for setting in used_settings(plan):
        own = setting.parameter, setting.models
        otherwise = "all others" if own in filtered else "none"
        if setting.filter is not None:
            filtered.add(own)
        models = ", ".join(short[reference] for reference in setting.models)
        table.add_row(
            setting.parameter,
            setting.text + (" over the layers" if len(setting.values) > 1 else ""),
            str(setting.num_tensors),
            "every model" if len(setting.models) == len(short) > 1 else models or "whole merge",
            otherwise if setting.filter is None else setting.filter,
        )
    table.print(console)
    if plan.spec.modifiers:
        print_words(console, _modified(plan.spec).removeprefix(", "))
    console.print()


def _modified(spec: MergeSpec) -> str:
    """Return by what the merged task vector is modified, with parameters, in order."""
    said = []
    for name, own in spec.modifiers:
        values = ", ".join(f"{key} {shown(value)}" for key, value in own.items())
        said.append(f"{shown(name)} ({values})" if values else shown(name))
    return f", modified by {', then '.join(said)}" if said else ""


def _print_rows(console: Console, plan: Plan) -> None:
    """Print what becomes of each model's rows, if they go by the tokens of the output."""
    if plan.tokenizer is None:
        return
    table = NamedTable("vocabulary of", "rows", "rows of the output", justify="left")
    for model in plan.tokenizer.models:
        follows = f" (by the tokens of {model.follows})" if model.follows else ""
        table.add_row(model.reference, f"{model.num_rows:,}", model.in_words() + follows)
    table.print(console)
    console.print()


def _print_tensors(console: Console, plan: Plan) -> None:
    table = NamedTable("tensor", "what", "dtype", "shape", "file", justify="left")
    for job in plan.jobs:
        shape = "×".join(map(str, job.output.shape)) or "scalar"
        table.add_row(job.name, job.action, job.output.dtype.name, shape, job.output.file)
    table.print(console)


def _role(plan: Plan, entry: Input) -> str:
    merged = any(model.reference == entry.reference for model in plan.spec.models)
    return "base, model" if entry.role == "base" and merged else entry.role


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ×{count}" for name, count in Counter(names).most_common())


def _format(entry: Input) -> str:
    return _files({stamp.path for stamp in entry.checkpoint.weight_files})


def _files(paths: Collection[Path]) -> str:
    return f"{len(paths)} × {min(paths).suffix.lstrip('.')}"
