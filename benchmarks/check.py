"""Tells whether a new report has become worse than a committed one, by ratios alone.

    python benchmarks/check.py NEW.json [OLD.json] [--tolerance 0.25]

Seconds are not compared: they say what the machine was doing. Exit status 1 if anything is worse.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from report import Report, all_ratios

COMMITTED = Path(__file__).parent / "results" / "speed.json"


def worse(new: Report, old: Report, tolerance: float) -> tuple[list[str], int]:
    """Return what is worse by more than the tolerance, and how many ratios both reports have."""
    before, now = dict(all_ratios(old)), dict(all_ratios(new))
    common = [name for name in before if name in now]
    found = [
        f"{name}: {before[name]:.3g} became {now[name]:.3g} ({now[name] / before[name] - 1:+.0%})"
        for name in common
        if now[name] > before[name] * (1 + tolerance)
    ]
    return found, len(common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path, nargs="?", default=COMMITTED)
    parser.add_argument("--tolerance", type=float, default=0.25, help="share (default 0.25)")
    options = parser.parse_args()
    found, num_compared = worse(
        Report.load(options.new), Report.load(options.old), options.tolerance
    )
    if not num_compared:
        raise SystemExit(f"{options.new}: has no case in common with {options.old}")
    print(f"{num_compared} ratios compared, {len(found)} worse by over {options.tolerance:.0%}")
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
