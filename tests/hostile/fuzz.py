"""Runs each fuzzer of tests/test_fuzz.py with new random inputs until its seconds are over."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

FUZZERS = {
    "specs": "spec or schema or parameter or size",
    "files": "header or library or metadata or layout or index or weight_map",
    "pickles": "pickle",
}
EXAMPLES = 300


def main() -> int:
    """Print how many inputs were tried; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="for each fuzzer")
    seconds = parser.parse_args().seconds
    tests = Path(__file__).parents[1] / "test_fuzz.py"
    environment = os.environ | {"OUTLIERMERGE_FUZZ_EXAMPLES": str(EXAMPLES)}
    for fuzzer, chosen in FUZZERS.items():
        end, num_rounds = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            seed = random.randrange(2**32)
            command = [sys.executable, "-m", "pytest", "-q", "-x", str(tests), "-k", chosen]
            found = subprocess.run(
                [*command, f"--hypothesis-seed={seed}"],
                env=environment,
                check=False,
                capture_output=True,
                text=True,
            )
            if found.returncode:
                print(found.stdout[-20_000:])
                print(f"{fuzzer}: failed with --hypothesis-seed={seed}")
                return 1
            num_rounds += 1
        print(f"{fuzzer}: {num_rounds} rounds of {EXAMPLES} inputs a test, no failure", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
