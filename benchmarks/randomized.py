"""Methods on whole matrices with singular vectors from a random start, beside their own defaults.

Each run is a process that reads eight models, merges and writes on the CPU; what it imports is not
timed. Runs alternate. Tensors of tokens are left out, since these methods only average them.

    python benchmarks/randomized.py [--size 1.5B --layers 1 --models 8 --runs 3 --only tsv_m]

Writes results/randomized.json after every case. A case that is there is measured anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from matrices import LAYERS, WORKER, build, described, distance, shapes, spec
from measure import alternate, progress, surroundings
from suite import opened, save

RESULT = Path(__file__).parent / "results" / "randomized.json"
METHODS = ("tsv_m", "iso_cts", "resmerge")
TOOLS = {"exact": {}, "randomized": {"randomized": True}}
NOTE = (
    "float32 models of this shape without tensors of tokens, changes of rank 64 and noise beside "
    "them; reading, merging and writing in a process that has imported the tool, on the CPU"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--size", choices=LAYERS, default="1.5B")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", action="append", default=[], choices=METHODS, metavar="METHOD")
    parser.add_argument("--results", type=Path, default=RESULT, help="the JSON file to write")
    parser.add_argument("--folder", type=Path, help="where to build (default: TMPDIR)")
    options = parser.parse_args()
    now = surroundings(options.runs, also=("torch",))
    now["hardware"] += f", {torch.get_num_threads()} thread(s) used"
    report = opened(options.results, now, go_on=True) | {"note": NOTE}
    folder = Path(tempfile.mkdtemp(prefix="outliermerge-bench-", dir=options.folder))
    try:
        every = shapes(options.size, options.layers)
        every = {name: shape for name, shape in every.items() if "embed_tokens" not in name}
        build(every, options.models, folder, set())
        for method in options.only or METHODS:
            case = described(method, options.size, options.layers, options.models, now)
            for tool, parameters in TOOLS.items():
                own = spec(method, folder, options.models) | {"parameters": parameters}
                (folder / f"{tool}.json").write_text(json.dumps(own))
            runs, failed = alternate(
                {tool: [sys.executable, str(WORKER), tool, str(folder)] for tool in TOOLS},
                options.runs,
                label=case["name"],
            )
            case |= {"runs": runs} | ({"failed": failed} if failed else {})
            case["relative_distance"] = distance(folder, "randomized", "exact")
            save(report, case, options.results)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    progress(f"wrote {options.results}")


if __name__ == "__main__":
    main()
