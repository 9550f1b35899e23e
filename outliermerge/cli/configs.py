"""`configs`: list the specs and suites that ship, or print one."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from outliermerge.cli.parts import EXIT_DONE, Command, add_json, print_json
from outliermerge.cli.shipped import Kind, shipped, summary
from outliermerge.cli.terminal import open_console, plain_table, text
from outliermerge.errors import SpecError, quoted, suggest

_IN_A_CLONE = ("models/", "evals/")
_KINDS: tuple[Kind, ...] = ("spec", "suite")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument for one of them."""
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="print this one, to start your own from it"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """List what ships, or print one file."""
    found = [(kind, name, path) for kind in _KINDS for name, path in shipped(kind).items()]
    if options.name is not None:
        found = [entry for entry in found if entry[1] == options.name]
        if not found:
            known = [name for kind in _KINDS for name in shipped(kind)]
            raise SpecError(
                f"no spec and no suite {quoted(options.name)} ships. {suggest(options.name, known)}"
            )
        if not options.json:
            sys.stdout.write(found[0][2].read_text(encoding="utf-8"))
            return EXIT_DONE
    if options.json:
        print_json(
            [
                {"name": name, "kind": kind, "summary": summary(path), "file": str(path)}
                | ({"models": _models(path)} if kind == "spec" else {})
                for kind, name, path in found
            ]
        )
        return EXIT_DONE
    console = open_console()
    specs = plain_table("spec", "what it does")
    suites = plain_table("suite", "what it asks")
    for kind, name, path in found:
        (specs if kind == "spec" else suites).add_row(text(name), text(summary(path)))
    for table in (specs, suites):
        console.print(table)
        console.print()
    of_a_clone = [
        name
        for kind, name, path in found
        if kind == "spec" and any(model.startswith(_IN_A_CLONE) for model in _models(path))
    ]
    console.print(
        f"{', '.join(of_a_clone)} merge models of a clone: run them in its folder, the minilm_… "
        "after `make demo-minilm`. The other specs fetch theirs from the hub."
    )
    console.print("`outliermerge run NAME` and `eval --suite NAME` take them from any folder;")
    console.print("`outliermerge configs NAME > merge.yaml` makes a copy of one to change.")
    return EXIT_DONE


def _models(path: Any) -> list[str]:
    """Return the models of a spec: hub ids, or folders that have to be there."""
    import yaml

    from outliermerge.spec.document import references

    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    merges = (spec, *spec.get("modules", {}).values())
    named = (name for merge in merges for name in (merge.get("base_model"), *references(merge)))
    return list(dict.fromkeys(name for name in named if name))


COMMAND = Command(
    summary="list the specs and suites that ship with the package, or print one",
    examples=("outliermerge configs", "outliermerge configs llava_math > merge.yaml"),
    overview="outliermerge configs",
    add_arguments=add_arguments,
    run=run,
)
