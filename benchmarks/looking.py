"""How fast `outliermerge stats` is: whole processes against one reading of the same files.

Rounds of alternating runs on checkpoints of random weights (about 13 GB of disk, removed at the
end): bfloat16 and float32 weights, and task vectors; in warm caches.

    python benchmarks/looking.py [--runs 5] [--sizes 0.5B 1.5B]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from build_checkpoints import FILE, SHAPES, build
from measure import alternate, medians, progress, script, surroundings
from safetensors import safe_open
from safetensors.torch import save_file

RESULT = Path(__file__).parent / "results" / "looking.json"
READ = Path(__file__).with_name("read_files.py")


def as_float32(source: Path, folder: Path) -> Path:
    folder.mkdir()
    with safe_open(source / FILE, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    save_file(tensors, folder / FILE)
    return folder


def case(
    name: str, models: Sequence[Path], arguments: Sequence[str], num_runs: int
) -> dict[str, Any]:
    files = [str(model / FILE) for model in models]
    stats = [script("outliermerge"), "stats", str(models[0]), *arguments, "--json", "-"]
    commands = {"reading": [sys.executable, str(READ), *files], "stats": stats}
    alternate(commands, 1, label=f"{name}, warming up")
    runs, failed = alternate(commands, num_runs, label=name)
    if failed:
        raise SystemExit("\n".join(failed.values()))
    ratios = [
        ours["seconds"] / theirs["seconds"]
        for ours, theirs in zip(runs["stats"], runs["reading"], strict=True)
    ]
    return {
        "name": name,
        "read_gigabytes": round(sum(Path(file).stat().st_size for file in files) / 1e9, 3),
        "reading": medians(runs["reading"]),
        "stats": medians(runs["stats"]),
        "over_reading": round(statistics.median(ratios), 2),
        "over_reading_range": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=5, help="rounds of each case (default 5)")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["0.5B", "1.5B"])
    parser.add_argument("--results", type=Path, default=RESULT, help="the JSON file to write")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="outliermerge-bench-"))
    cases = []
    try:
        for size in options.sizes:
            base, tuned, other = build(size, folder / size)
            shutil.rmtree(other)
            against = ["--base", str(base)]
            cases.append(case(f"{size}, bfloat16", [tuned], [], options.runs))
            cases.append(
                case(f"{size}, bfloat16, task vectors", [tuned, base], against, options.runs)
            )
            shutil.rmtree(base)
            wide = as_float32(tuned, folder / "float32")
            shutil.rmtree(tuned)
            cases.append(case(f"{size}, float32", [wide], [], options.runs))
            shutil.rmtree(wide)
        report = surroundings(options.runs) | {
            "note": "seconds: from the first byte read to the last result; medians; ratios are "
            "of runs in the same round; reading: a thread a processor, reused buffers",
            "cases": cases,
        }
        options.results.write_text(json.dumps(report, indent=1) + "\n")
        progress(f"wrote {options.results}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
