"""Reproduce Table 4 of arXiv 2501.10661: merge, evaluate parents and merges, print both tables.

    python evals/paper.py [--limit QUESTIONS]

Needs a CUDA device of 24 GB or more, the hub (or its cache), and 300 GB of disk.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

BASE = "llava-hf/llava-1.5-13b-hf"
INSTRUCT = "llava-hf/llava-v1.6-vicuna-13b-hf"
# Math-LLaVA is published in LLaVA's original layout, which lmms-eval's llava_hf does not load.
MATHS = "llava_math_parent"
MERGES = {
    "average": "llava_math_average",
    "task arithmetic": "llava_math_task_arithmetic",
    "TIES": "llava_math_ties",
    "min-σ, t=3": "llava_math_t3",
    "min-σ, t=2": "llava_math",
}
OUTPUT = "scores/paper"


def lacking() -> list[str]:
    """Return what this machine lacks, in words."""
    import torch
    from huggingface_hub import HfApi, constants

    found = []
    if not torch.cuda.is_available():
        found.append("a CUDA device (torch finds none)")
    try:
        HfApi().model_info(BASE, timeout=10)
    except Exception as error:  # of several network libraries
        reason = str(error).strip().partition("\n")[0]
        found.append(f"the hub at {constants.ENDPOINT} ({reason or type(error).__name__})")
    return found


def command(*arguments: str) -> None:
    print("$ " + " ".join(arguments), flush=True)
    done = subprocess.run(arguments, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", help="questions of each task (default: all)")
    options = parser.parse_args()
    if missing := lacking():
        print(f"error: this machine lacks {' and '.join(missing)}", file=sys.stderr)
        raise SystemExit(1)
    for spec in (MATHS, *MERGES.values()):
        command("outliermerge", "run", f"merge_configs/{spec}.yaml", "--overwrite")
    models = [f"LLaVA-v1.5-13B={BASE}", f"LLaVA-1.6-13B={INSTRUCT}", f"Math-LLaVA=merged/{MATHS}"]
    models += [f"{name}=merged/{spec}" for name, spec in MERGES.items()]
    limit = ["--limit", options.limit] if options.limit else []
    command(
        "outliermerge", "eval", *models, "--suite", "evals/paper.yaml", "--output", OUTPUT, *limit
    )
    command("outliermerge", "compare", OUTPUT, "--paper")


if __name__ == "__main__":
    main()
