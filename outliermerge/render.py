"""Tables and progress for people at a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from outliermerge.errors import MAX_NOTE, printable, readable, shown
from outliermerge.jobs import Input, Options, Plan
from outliermerge.method import MergeMethod
from outliermerge.runs import RunResult

_MAX_CELL = 600  # characters of one cell of a table


class _Console(Console):
    """Prints names that others wrote as a terminal shows them."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*map(_readable, objects), **options)

    def on_broken_pipe(self) -> None:
        """Leave it to the caller, instead of ending the program with exit code 1."""
        raise BrokenPipeError


class _Table(Table):
    """A table whose cells may hold names that others wrote."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_readable_cell, cells), **options)


def _readable(value: Any) -> Any:
    """Return what is printed without what would control a terminal."""
    if isinstance(value, Text) and not _is_readable(value.plain):
        return Text(printable(value.plain), style=value.style)
    return printable(value) if isinstance(value, str) else value


def _readable_cell(value: Any) -> Any:
    if isinstance(value, Text):
        short = shown(value.plain, _MAX_CELL)
        return value if short == value.plain else Text(short, style=value.style)
    return shown(value, _MAX_CELL) if isinstance(value, str) else value


def _is_readable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def progress_bar(description: str) -> Progress:
    """Return a bar with bytes per second and the time left; nothing unless at a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def reading_bar(description: str = "reading") -> Iterator[dict[str, Any]]:
    """Show a bar while weights are read; give what tells it of bytes to be read, and of those read.

    Yields:
        `on_total` and `on_progress`, as the functions that look at weights take them.
    """
    with progress_bar(description) as bar:
        task, total = bar.add_task(description, total=None), 0

        def add(num_bytes: int) -> None:
            nonlocal total
            total += num_bytes
            bar.update(task, total=total)

        yield {"on_total": add, "on_progress": lambda num_bytes: bar.advance(task, num_bytes)}


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show what is waited for; nothing unless at a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def human_bytes(num_bytes: float) -> str:
    """Return a size in decimal units, as the hub and --shard-size use them.

    >>> human_bytes(1_020_000_000)
    '1.02 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def open_console(*, soft_wrap: bool = False) -> Console:
    """Return where tables are printed; with soft_wrap, long lines stay whole."""
    return _Console(highlight=False, soft_wrap=soft_wrap)


def plain_table(*columns: str, title: str | None = None) -> Table:
    """Return a table without lines."""
    table = _Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left", overflow="fold")
    return table


def print_plan(
    plan: Plan,
    *,
    output: Path | None,
    options: Options,
    free_bytes: int,
    loads_in: Sequence[str] = (),
) -> None:
    """Print a plan as tables that a person reads in a minute."""
    console = open_console()
    method = plan.spec.method
    console.print(Text(f"{method.name}: {method.summary}", style="bold"))
    models = plain_table("model", "role", "tensors", "size", "dtypes loaded", "from")
    for entry in plan.inputs:
        metas = entry.stored
        models.add_row(
            Text(entry.reference),
            _role(plan, entry),
            str(len(entry.checkpoint.tensors)),
            human_bytes(sum(meta.num_bytes for meta in metas)),
            _counts(meta.dtype.name for meta in metas),
            Text(_format(entry)),
        )
    console.print(models)
    console.print()
    _print_pairing(console, plan)
    actions = plain_table("what happens", "tensors", "parameters", "loaded", "computed", "stored")
    groups: dict[str, list[Any]] = {}
    for job in plan.jobs:
        what = {"merge": f"merged by {method.name}", "copy": "copied", "equal": "copied if equal"}
        reason = f" ({job.reason})" if job.reason else ""
        groups.setdefault(what[job.action] + reason, []).append(job)
    for what_happens, jobs in groups.items():
        merged = jobs[0].action == "merge"
        actions.add_row(
            Text(what_happens),
            str(len(jobs)),
            f"{sum(job.num_elements for job in jobs):,}",
            ", ".join(
                sorted({m.dtype.name for job in jobs for _, s in job.sources for m in s.stored})
            ),
            ", ".join(sorted({job.compute_dtype for job in jobs})) if merged else "–",
            ", ".join(sorted({job.output.dtype.name for job in jobs})),
        )
    console.print(actions)
    console.print()
    _print_parameters(console, plan)
    peak = human_bytes(plan.peak_memory_bytes(options))
    facts = plain_table("", "")
    facts.show_header = False
    facts.add_row("reads", human_bytes(plan.num_read_bytes))
    facts.add_row(
        "writes",
        f"{human_bytes(plan.num_written_bytes)} in {len(plan.shards)} file(s), "
        f"{human_bytes(free_bytes)} free on the disk",
    )
    facts.add_row("parameters", Text(_proof(plan)))
    if loads_in:
        facts.add_row("loads in", Text("; ".join(loads_in)))
    facts.add_row("peak memory", f"{peak} on {options.threads} threads, device {options.device}")
    facts.add_row("output", Text(str(output) if output else "not named yet: give --output"))
    facts.add_row(
        "files carried over", Text(", ".join(shown(file.name) for file in plan.sidecars) or "none")
    )
    console.print(facts)
    for note in plan.notes:
        console.print(Text(readable(f"note: {note}", MAX_NOTE)))


def _print_pairing(console: Console, plan: Plan) -> None:
    """Print how names are changed, where they are."""
    table = plain_table("renamed in", "rule", "tensors", "for example", "becomes")
    for entry in plan.inputs:
        for rule, (count, before, after) in entry.renamed.items():
            table.add_row(Text(entry.reference), Text(rule), str(count), Text(before), Text(after))
    if table.row_count:
        console.print(table)
        console.print()


def _proof(plan: Plan) -> str:
    """Return in words how the output's tensors compare with the reference's."""
    proof, reference = plan.proof, plan.inputs[0].reference
    parts = [
        f"{what} {len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (
            ("added", proof.added), ("left out", proof.removed), ("other rows in", proof.resized)
        )
        if names
    ]  # fmt: skip
    same = f"the tensors of {reference}" + (": " + "; ".join(parts) if parts else ", all of them")
    difference = plan.num_parameters - proof.num_reference_parameters
    change = f" ({difference:+,})" if difference else ""
    return f"{plan.num_parameters:,}{change} in {len(plan.jobs)} tensors: {same}"


def _role(plan: Plan, entry: Input) -> str:
    merged = any(model.reference == entry.reference for model in plan.spec.models)
    return "base, model" if entry.role == "base" and merged else entry.role


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ×{count}" for name, count in Counter(names).most_common())


def _format(entry: Input) -> str:
    files = entry.checkpoint.weight_files
    return f"{len(files)} × {files[0].path.suffix.lstrip('.')}, {entry.checkpoint.root}"


def _print_parameters(console: Console, plan: Plan) -> None:
    merged = [job for job in plan.jobs if job.action == "merge"]
    if not merged:
        return
    table = plain_table("parameter", "where", "values", title="parameters as resolved")
    for name in merged[0].parameters:
        stacks = plan.gradients.get(name, {})
        for stack, values in stacks.items():
            table.add_row(name, Text(f"{stack}0–{len(values) - 1}"), Text(_short(values)))
        counts = Counter(
            job.parameters[name]
            for job in merged
            if not any(job.name.startswith(stack) for stack in stacks)
        )
        for value, count in counts.most_common(6):
            where = "every tensor" if count == len(merged) else f"{count} tensors"
            table.add_row(name, where, Text(_value(value)))
    console.print(table)
    console.print()


def _short(values: list[Any]) -> str:
    texts = [_value(value) for value in values]
    if len(texts) > 16:
        texts = [*texts[:8], "…", *texts[-7:]]
    return "  ".join(texts)


def _value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_value(item) for item in value) + ")"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_result(result: RunResult) -> None:
    """Print what a merge did, in a few lines."""
    console = open_console(soft_wrap=True)
    worked = result.input_bytes + result.written_bytes
    speed = human_bytes(worked / result.work_seconds) if result.work_seconds else "–"
    from_disk = "" if not result.disk_bytes else f", {human_bytes(result.disk_bytes)} from disk"
    console.print(
        f"wrote {result.output}: {len(result.manifest['tensors'])} tensors, "
        f"{result.manifest['num_parameters']:,} parameters, "
        f"{result.seconds:.1f} s, {speed}/s{from_disk}",
        markup=False,
    )
    for by in result.load_check.by if result.load_check else ():
        console.print(f"loads in {by}", markup=False)
    if result.num_resumed:
        console.print(f"{result.num_resumed} tensors were there from an earlier run")
    if result.left_behind:
        console.print(
            f"files that were put into the old output meanwhile are in {result.left_behind}",
            markup=False,
        )
    for name, places in result.non_finite.items():
        where = ", ".join(map(shown, places))
        console.print(f"infinite or NaN values in {shown(name)}: {where}", markup=False)


def print_methods(methods: Iterable[MergeMethod]) -> None:
    """Print every method with its parameters."""
    console = open_console(soft_wrap=True)
    for method in methods:
        console.print(Text.assemble((method.name, "bold"), f"  {method.summary}"))
        if method.paper:
            console.print(Text(f"  {method.paper}", style="dim"))
        console.print(Padding(_parameter_table(method), (0, 0, 1, 2)))
    console.print("One of them with its formula: outliermerge methods NAME")


def _parameter_table(method: MergeMethod) -> Table:
    table = plain_table("parameter", "default", "range", "of")
    for parameter in method.parameters.values():
        table.add_row(
            parameter.name,
            _value(parameter.default),
            parameter.range or parameter.type.__name__,
            "each model" if parameter.per_model else "the merge",
        )
    return table


def print_method(method: MergeMethod) -> None:
    """Print a method's documentation."""
    console = open_console(soft_wrap=True)
    console.print(Text(method.name, style="bold"))
    console.print(Text(method.documentation))
    console.print()
    console.print(_parameter_table(method))
    if method.paper:
        console.print(Text(method.paper))
