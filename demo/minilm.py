"""Merge a real model and its real fine-tune, verify the outputs, and show what changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fetch import fetch

SPECS = ("minilm_min_sigma", "minilm_task_arithmetic", "minilm_ties")
PAIRS = (
    ("the pod keeps restarting", "CrashLoopBackOff"),
    ("latency is above the SLO", "requests are too slow"),
    ("the disk is full", "no space left on device"),
    ("the disk is full", "the cat sleeps on the sofa"),
    ("roll back the deployment", "revert to the previous release"),
    ("a man plays the guitar", "someone makes music"),
)


def _command(*arguments: str) -> None:
    print("$ " + " ".join(arguments), flush=True)
    done = subprocess.run(arguments, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def _similarities(folder: Path) -> list[float]:
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).float().eval()
    texts = [text for pair in PAIRS for text in pair]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similarities: list[float] = (vectors[0::2] * vectors[1::2]).sum(-1).tolist()
    return similarities


def _same_tensors(left: Path, right: Path) -> tuple[int, int]:
    import torch
    from safetensors.torch import load_file

    a, b = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    shared = a.keys() & b.keys()
    same = sum(
        torch.equal(a[n].flatten().view(torch.uint8), b[n].flatten().view(torch.uint8))
        for n in shared
    )
    return same, len(shared)


def main() -> None:
    models = fetch(Path("models"))
    for spec in SPECS:
        _command("outliermerge", "run", f"merge_configs/{spec}.yaml", "--overwrite")
        _command("outliermerge", "verify", f"merged/{spec}")
    folders = {"base": models["all-MiniLM-L6-v2"], "fine-tune": models["sre-embedding-model"]}
    folders |= {name.removeprefix("minilm_"): Path("merged") / name for name in SPECS}
    columns = {name: _similarities(folder) for name, folder in folders.items()}
    print("\ncosine similarity of sentence pairs, by model")
    widths = {name: len(name) + 2 for name in columns}
    print(f"{'':56}" + "".join(f"{name:>{widths[name]}}" for name in columns))
    for row, (left, right) in enumerate(PAIRS):
        cells = "".join(f"{values[row]:{widths[name]}.3f}" for name, values in columns.items())
        print(f"{left + ' / ' + right:56}" + cells)
    same, total = _same_tensors(Path("merged/minilm_min_sigma"), models["sre-embedding-model"])
    print(f"\nmin-σ of one task model: {same} of {total} tensors equal the fine-tune bit for bit")
    if same != total:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
