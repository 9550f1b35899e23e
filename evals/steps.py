"""What the demo and the paper's evaluation do: merge, then score parents and merges."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Mapping


def command(*arguments: str) -> None:
    """Show a command and run it; end with its exit code if it fails."""
    print("$ " + " ".join(arguments), flush=True)
    done = subprocess.run(arguments, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def options(text: str, *, jobs: int) -> argparse.Namespace:
    """Return --limit and --jobs from the command line."""
    parser = argparse.ArgumentParser(description=text.partition("\n")[0])
    parser.add_argument("--limit", help="questions of each task (default: all)")
    parser.add_argument(
        "--jobs", default=str(jobs), help=f"models evaluated at once (default {jobs})"
    )
    return parser.parse_args()


def merge(specs: list[str]) -> None:
    """Merge by specs of merge_configs."""
    for spec in specs:
        command("outliermerge", "run", f"merge_configs/{spec}.yaml", "--overwrite")


def score(models: Mapping[str, str], suite: str, output: str, chosen: argparse.Namespace) -> None:
    """Score models, given by their names in the table."""
    named = [f"{name}={path}" for name, path in models.items()]
    limit = ["--limit", chosen.limit] if chosen.limit else []
    command(
        *("outliermerge", "eval", *named, "--suite", suite, "--output", output),
        *("--jobs", chosen.jobs, *limit),
    )
