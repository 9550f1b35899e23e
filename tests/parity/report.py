"""Merges random specs by outliermerge and by mergekit, and writes what differs as a table."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

sys.path.insert(0, str(Path(__file__).parents[1]))
from parity.both import ROUNDING, Comparison, compare
from parity.specs import PARAMETERS, specs

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs" / "studies" / "parity.md"
BEGIN, END = "<!-- parity -->", "<!-- /parity -->"


@dataclass
class Found:
    """What the specs of one method came to.

    Attributes:
        failures: each spec with outputs that differ, and what differs.
    """

    num_specs: int = 0
    num_elements: int = 0
    largest: float = 0.0
    placed_otherwise: int = 0
    failures: list[tuple[dict[str, Any], Comparison]] = field(default_factory=list)


def compare_all(
    method: str, num_specs: int, models: Path, on_spec: Callable[[], None] = lambda: None
) -> Found:
    """Compare specs of a method: always the same ones."""
    found = Found()

    @settings(
        max_examples=num_specs,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(specs(method))
    def compare_one(spec: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            result = compare(spec, models, Path(folder))
        found.num_specs += 1
        found.num_elements += result.num_elements
        found.largest = max(found.largest, result.largest)
        found.placed_otherwise += sum(result.placed_otherwise.values())
        if result.problems or result.differing:
            found.failures.append((spec, result))
        on_spec()

    compare_one()
    return found


def table(rows: dict[str, Found]) -> str:
    """Return what was measured as a table for the report."""
    lines = [
        f"mergekit {version('mergekit')}, outliermerge {version('outliermerge')}:",
        "",
        "| method | specs | elements | largest difference | elements beyond the limit |",
        "|---|--:|--:|--:|--:|",
    ]
    for method, found in rows.items():
        num_differing = sum(sum(result.differing.values()) for _, result in found.failures)
        lines.append(
            f"| `{method}` | {found.num_specs} | {found.num_elements:,} | "
            f"{found.largest / ROUNDING:.1f} ε | {num_differing} |"
        )
    placed = sum(found.placed_otherwise for found in rows.values())
    return "\n".join([*lines, "", f"Elements of Qwen2-VL's projector that differ: {placed:,}."])


def main() -> int:
    """Print what differs and write the report; return 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--specs", type=int, default=25, help="for each method [25]")
    parser.add_argument("--method", action="append", choices=PARAMETERS, help="only these methods")
    arguments = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.method or PARAMETERS:
            rows[method] = compare_all(
                method, arguments.specs, Path(folder), lambda: print(".", end="", flush=True)
            )
            print(f" {method}: {len(rows[method].failures)} of {rows[method].num_specs} differ")
            for spec, result in rows[method].failures:
                print(spec, result)
    if not arguments.method:
        before, _, rest = REPORT.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        REPORT.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")
        print(f"wrote {REPORT.relative_to(ROOT)}")
    return int(any(found.failures for found in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
