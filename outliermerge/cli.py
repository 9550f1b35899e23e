"""The commands: parse, call, print; nothing else."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.cli_scores import add_commands, run_compare, run_eval
from outliermerge.errors import OutlierMergeError, SpecError

if TYPE_CHECKING:
    from outliermerge.method import MergeMethod

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

_EXAMPLES = """\
examples:
  outliermerge run merge_configs/minilm_min_sigma.yaml --output merged
  outliermerge plan merge_configs/minilm_ties.yaml --json
  outliermerge sweep merge_configs/minilm_min_sigma.yaml --set t=2,2.5,3 --output merged/sweep
  outliermerge verify merged
  outliermerge eval merged --suite evals/paper.yaml --output scores
  outliermerge compare scores --paper
  outliermerge methods min_sigma
  outliermerge schema > outliermerge.spec.schema.json

exit codes: 0 done, 1 failed (a model, a folder, a value), 2 wrong usage or spec
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="outliermerge",
        description="Merge model checkpoints as a YAML spec says, and score them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, text: str, *examples: str) -> argparse.ArgumentParser:
        lines = "\n".join(f"  {example}" for example in examples)
        return commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"examples:\n{lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    run = add(
        "run",
        "merge models into a new folder; a killed run goes on when started again",
        "outliermerge run merge_configs/minilm_min_sigma.yaml",
        "outliermerge run merge_configs/llava_math.yaml --output merged/llava_math",
        "outliermerge run merge_configs/minilm_ties.yaml --output merged --overwrite --memory 2GiB",
    )
    plan = add(
        "plan",
        "show what a run would do, from the models' headers alone",
        "outliermerge plan merge_configs/minilm_ties.yaml",
        "outliermerge plan merge_configs/minilm_ties.yaml --json",
    )
    sweep = add(
        "sweep",
        "merge with several values of settings, from one reading of the models",
        "outliermerge sweep merge_configs/minilm_min_sigma.yaml --set t=2,2.5,3 --output merged/t",
        "outliermerge sweep spec.yaml --set merge_method=linear,task_arithmetic --output merged",
        "outliermerge sweep spec.yaml --set models.1.weight=0.3,0.5 --set lambda=0.8,1 --output m",
    )
    sweep.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="values of merge_method, dtype, out_dtype, a parameter, or models.N.PARAMETER; "
        "several --set are combined",
    )
    for command in (run, plan, sweep):
        command.add_argument("spec", metavar="SPEC", help="a YAML file")
        command.add_argument("--output", metavar="DIR", help="what to write (or `output:`)")
        command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N, or auto")
        command.add_argument(
            "--memory", default="1GiB", metavar="SIZE", help="budget for blocks (default 1GiB)"
        )
        command.add_argument(
            "--threads", type=_count, default=0, metavar="N", help="default: one a processor"
        )
        command.add_argument(
            "--no-kernels", action="store_true", help="compute by torch, as methods are defined"
        )
        command.add_argument("--shard-size", metavar="SIZE", help="largest file (default 5GB)")
        command.add_argument("--json", action="store_true", help="print JSON for scripts")
    for command in (run, sweep):
        command.add_argument(
            "--overwrite", action="store_true", help="replace an existing output when done"
        )
        command.add_argument(
            "--fresh", action="store_true", help="start over instead of going on with a killed run"
        )
        command.add_argument(
            "--allow-non-finite", action="store_true", help="go on over infinite or NaN values"
        )
    verify = add(
        "verify",
        "recompute every checksum of an output",
        "outliermerge verify merged",
    )
    verify.add_argument("folder", metavar="OUT", help="what `run` wrote")
    verify.add_argument(
        "--threads", type=_count, default=0, metavar="N", help="default: one a processor"
    )
    verify.add_argument("--json", action="store_true", help="print JSON for scripts")
    add_commands(add, _count)
    methods = add(
        "methods",
        "list merge methods and their parameters",
        "outliermerge methods",
        "outliermerge methods min_sigma",
        "outliermerge methods --json",
    )
    methods.add_argument("name", metavar="NAME", nargs="?", help="show one, with its formula")
    methods.add_argument("--json", action="store_true", help="print JSON for scripts")
    add("schema", "print the JSON schema of a spec", "outliermerge schema > spec.schema.json")
    return parser


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        code = _main(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    # It has a handler of its own, so its warnings would be printed twice.
    logging.getLogger("huggingface_hub").propagate = False
    if options.version:
        from importlib.metadata import version

        print(f"outliermerge {version('outliermerge')}")
        return EXIT_DONE
    if options.command is None:
        parser.print_help()
        return EXIT_USAGE
    try:
        return _COMMANDS[options.command](options)
    except SpecError as error:
        return _fail(error, EXIT_USAGE)
    except OutlierMergeError as error:
        return _fail(error, EXIT_FAILED)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", EXIT_FAILED)
    except MemoryError:
        return _fail("out of memory: give a smaller --memory or fewer --threads", EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted: the same command goes on from here", EXIT_INTERRUPTED)


def _fail(message: object, code: int) -> int:
    shown = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in str(message)
    )
    print(f"error: {shown}", file=sys.stderr)
    return code


def _run(options: argparse.Namespace) -> int:
    from outliermerge import merge, render

    planned = merge.plan(options.spec, shard_size=options.shard_size)
    _print_notes(planned.notes, options)
    with render.progress_bar("merging") as bar:
        task = bar.add_task("merging", total=planned.work_bytes)
        result = merge.run(
            planned,
            on_progress=lambda num_bytes: bar.advance(task, num_bytes),
            **_run_options(options),
        )
        bar.update(task, completed=planned.work_bytes)
    if options.json:
        _print_json(result.as_dict() | {"notes": list(planned.notes)})
    else:
        render.print_result(result)
    return EXIT_DONE


def _sweep(options: argparse.Namespace) -> int:
    from outliermerge import render, sweeps

    settings = {}
    for option in options.set:
        key, values = sweeps.parse_values(option)
        if key in settings:
            raise SpecError(f"--set {key}: is given twice: write {key}=VALUE,VALUE,…")
        settings[key] = values
    variants = sweeps.plan_sweep(options.spec, settings, shard_size=options.shard_size)
    notes = list(dict.fromkeys(note for variant in variants for note in variant.plan.notes))
    _print_notes(notes, options)
    total = sweeps.work_bytes(variants)
    with render.progress_bar("merging") as bar:
        task = bar.add_task("merging", total=total)
        results = sweeps.sweep(
            variants,
            on_progress=lambda num_bytes: bar.advance(task, num_bytes),
            **_run_options(options),
        )
        bar.update(task, completed=total)
    if options.json:
        pairs = zip(variants, results, strict=True)
        outputs = [{"settings": dict(v.settings)} | result.as_dict() for v, result in pairs]
        _print_json({"outputs": outputs, "notes": notes})
    else:
        for result in results:
            render.print_result(result)
    return EXIT_DONE


def _print_notes(notes: Sequence[str], options: argparse.Namespace) -> None:
    if not options.json:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)


def _run_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "output": options.output,
        "device": options.device,
        "memory": options.memory,
        "threads": options.threads,
        "overwrite": options.overwrite,
        "fresh": options.fresh,
        "kernels": not options.no_kernels,
        "allow_non_finite": options.allow_non_finite,
    }


def _plan(options: argparse.Namespace) -> int:
    from outliermerge import merge, render
    from outliermerge.execute import choose_options
    from outliermerge.output import free_disk_bytes
    from outliermerge.runs import output_path

    planned = merge.plan(options.spec, shard_size=options.shard_size)
    chosen = choose_options(
        planned,
        device=options.device,
        memory=options.memory,
        threads=options.threads,
        kernels=not options.no_kernels,
    )
    named = options.output or planned.spec.document.output
    output = output_path(planned, named) if named else None
    free = free_disk_bytes(output or Path.cwd())
    peak = planned.peak_memory_bytes(chosen)
    if options.json:
        _print_json(
            planned.as_dict()
            | {
                "output": named,
                "threads": chosen.threads,
                "device": chosen.device,
                "kernels": chosen.kernels,
                "peak_memory_bytes": peak,
                "free_disk_bytes": free,
            }
        )
    else:
        render.print_plan(
            planned,
            output=output,
            options=chosen,
            free_bytes=free,
        )
    if planned.num_written_bytes > free:
        print(
            f"warning: the disk has {free:,} bytes free, the output needs "
            f"{planned.num_written_bytes:,}",
            file=sys.stderr,
        )
    return EXIT_DONE


def _verify(options: argparse.Namespace) -> int:
    from outliermerge import manifest, render
    from outliermerge.machine import num_threads

    folder = Path(options.folder)
    shards = folder.rglob("*.safetensors") if folder.is_dir() else [folder]
    total = sum(path.stat().st_size for path in shards if path.exists())
    with render.progress_bar("verifying") as bar:
        task = bar.add_task("verifying", total=total)
        differences = manifest.verify_folder(
            folder,
            threads=num_threads(options.threads),
            on_progress=lambda num_bytes: bar.advance(task, num_bytes),
        )
    if options.json:
        _print_json({"folder": str(folder), "ok": not differences, "differences": differences})
    elif differences:
        print(f"{folder}: {len(differences)} difference(s) from its manifest")
        for difference in differences:
            print(f"  {difference}")
    else:
        print(f"{folder}: every tensor and file is as its manifest says")
    return EXIT_FAILED if differences else EXIT_DONE


def _methods(options: argparse.Namespace) -> int:
    from outliermerge.methods import METHODS, find_method

    chosen = [find_method(options.name)] if options.name else list(METHODS.values())
    if options.json:
        _print_json([_describe(method) for method in chosen])
        return EXIT_DONE
    from outliermerge import render

    if options.name:
        render.print_method(chosen[0])
    else:
        render.print_methods(chosen)
    return EXIT_DONE


def _describe(method: MergeMethod) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "documentation": method.documentation,
        "paper": method.paper,
        "space": method.space,
        "cut": method.cut,
        "parameters": [
            {
                "name": parameter.name,
                "type": parameter.type.__name__,
                "default": parameter.default,
                "per_model": parameter.per_model,
                "range": parameter.range,
            }
            for parameter in method.parameters.values()
        ],
    }


def _schema(options: argparse.Namespace) -> int:
    from outliermerge.spec.schema import json_schema

    _print_json(json_schema())
    return EXIT_DONE


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


_COMMANDS = {
    "run": _run,
    "plan": _plan,
    "sweep": _sweep,
    "verify": _verify,
    "eval": run_eval,
    "compare": run_compare,
    "methods": _methods,
    "schema": _schema,
}
