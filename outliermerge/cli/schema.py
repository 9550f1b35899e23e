"""`schema`: print the JSON schema of a spec."""

from __future__ import annotations

import argparse

from outliermerge.cli.parts import EXIT_DONE, Command, print_json


def run(options: argparse.Namespace) -> int:
    """Print it."""
    from outliermerge.spec.schema import json_schema

    print_json(json_schema())
    return EXIT_DONE


COMMAND = Command(
    summary="print the JSON schema of a spec",
    examples=("outliermerge schema > spec.schema.json",),
    overview="outliermerge schema > outliermerge.spec.schema.json",
    run=run,
)
