"""Reproduce Table 4 of arXiv 2501.10661: merge, score parents and merges, print both tables.

    python evals/paper.py [--limit QUESTIONS] [--jobs MODELS_AT_ONCE]

Needs a CUDA device of 24 GB or more, the hub, and 300 GB of disk.
"""

from __future__ import annotations

import sys

from steps import command, merge, options, score

BASE = "llava-hf/llava-1.5-13b-hf"
# Math-LLaVA is published in LLaVA's original layout, which lmms-eval's llava_hf does not load.
MATHS = "llava_math_parent"
PARENTS = {
    "LLaVA-v1.5-13B": BASE,
    "LLaVA-1.6-13B": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "Math-LLaVA": f"merged/{MATHS}",
}
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


def main() -> None:
    chosen = options(__doc__ or "", jobs=1)
    if missing := lacking():
        print(f"error: this machine lacks {' and '.join(missing)}", file=sys.stderr)
        raise SystemExit(1)
    merge([MATHS, *MERGES.values()])
    models = PARENTS | {name: f"merged/{spec}" for name, spec in MERGES.items()}
    score(models, "evals/paper.yaml", OUTPUT, chosen)
    command("outliermerge", "compare", OUTPUT, "--paper")


if __name__ == "__main__":
    main()
