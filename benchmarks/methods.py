"""Every merge method once at one size: beside a copy past the page cache, and beside mergekit.

Writes results/methods.json after every method; the table of methods in the documents is made of it.
mergekit is run in the first round only: of some methods it takes minutes. With --resume methods are
measured that the file lacks at any size: those on whole matrices at 0.5B and those with data at
0.1B, since they take longest.

    python benchmarks/methods.py [--runs 3] [--size 0.5B] [--only della] [--resume]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from build_checkpoints import SHAPES, build, build_statistics, num_parameters
from measure import alternate, measure, progress, surroundings
from report import ALONE
from suite import OTHERS, PARAMETERS, WITH_DATA, WITHOUT_PEER, Case, commands, opened, save

RESULT = Path(__file__).parent / "results" / "methods.json"
NOTE = (
    "whole processes, page cache warm, bfloat16, a base and two task models (slerp, nearswap and "
    "arcee_fusion: one); medians of alternating runs, of mergekit a single run; parameters as in "
    "each case, wudi, mats and mats_fisher with 10 steps, lines and svc behind task_arithmetic"
)
TOOLS = ("direct copy", "outliermerge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=3, help="runs of ours and of the copy")
    parser.add_argument("--size", default="0.5B", choices=SHAPES, help="default 0.5B")
    parser.add_argument("--only", action="append", default=[], metavar="METHOD")
    parser.add_argument("--resume", action="store_true", help="measure only what is lacking")
    parser.add_argument("--without-peer", action="store_true", help="leave mergekit out")
    parser.add_argument("--results", type=Path, default=RESULT, help="the JSON file to write")
    parser.add_argument("--folder", type=Path, help="where to build (default: TMPDIR)")
    options = parser.parse_args()
    now = surroundings(options.runs, also=("mergekit", "transformers"))
    report = opened(options.results, now, go_on=options.resume or bool(options.only))
    sizes = report.get("num_parameters", {}) | {options.size: num_parameters(options.size)}
    report |= {"note": NOTE, "num_parameters": sizes}
    done = {case["method"] for case in report["cases"] if options.resume}
    chosen = [
        method
        for method in PARAMETERS | OTHERS
        if method not in done and (not options.only or method in options.only)
    ]
    folder = Path(tempfile.mkdtemp(prefix="outliermerge-bench-", dir=options.folder))

    def clear() -> None:
        for path in folder.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.sync()

    try:
        models = build(options.size, folder / options.size)
        for method in chosen:
            peer = () if options.without_peer or method in WITHOUT_PEER else ("mergekit",)
            case = Case(method, options.size, 1 if method in ALONE else 2, TOOLS + peer)
            todo = commands(case, folder, models[: 1 + case.num_models])
            if method in WITH_DATA:
                build_statistics(WITH_DATA[method], options.size, models[1:])
            clear()
            measure(todo["direct copy"])
            runs, failed = alternate(
                {tool: todo[tool] for tool in TOOLS}, options.runs, before=clear, label=case.name
            )
            if peer:
                more, of_peer = alternate(
                    {"mergekit": todo["mergekit"]}, 1, before=clear, label=case.name
                )
                runs, failed = runs | more, failed | of_peer
            about = {"name": case.name, "method": method, "size": options.size, "runs": runs}
            about |= {"parameters": (PARAMETERS | OTHERS)[method]}
            about |= {key: now[key] for key in ("date", "load_before")}
            save(report, about | ({"failed": failed} if failed else {}), options.results)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    progress(f"wrote {options.results}")


if __name__ == "__main__":
    main()
