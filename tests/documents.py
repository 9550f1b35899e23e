"""The README and the pages of `docs/`: what is in them, and a folder in which it can be run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
# Commands that need the network, an account or hours; the tests of `make` try the first.
NOT_RUN = ("make ", "pip ", "pipx ", "git ", "hf ", ". .venv/", "python3 -m ", "export ")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name of the file that it is, by its first line, such as `# merge.yaml`."""
        found = re.match(r"# ([\w.]+\.(?:yaml|py))\n", self.text)
        return found[1] if found else None


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return a page's blocks in some languages."""
    found = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", page.read_text(), re.S | re.M)
    return [Block(language, text) for language, text in found if language in languages]


def commands(page: Path) -> list[str]:
    """Return a page's command lines, without comments."""
    lines = [line for block in blocks(page, "sh") for line in block.text.splitlines()]
    return list(filter(None, (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)))


def link_the_project(folder: Path) -> None:
    """Make a folder in which the project's commands run, but for `make`."""
    if (folder / "evals").exists():
        return
    for name in ("merge_configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "evals" / "data").mkdir(parents=True)
    for path in (ROOT / "evals").iterdir():
        if path.name != "data":
            (folder / "evals" / path.name).symlink_to(path)
    command = [sys.executable, str(ROOT / "evals" / "family" / "data.py"), "evals/data"]
    subprocess.run(command, cwd=folder, check=True)


def make_place(folder: Path, python: Path) -> Path:
    """Make a folder with the models and files that the pages name, the models small.

    Args:
        folder: where.
        python: what runs the programs.

    Returns:
        A folder with the programs `outliermerge` and `outliermerge-mergekit`.
    """
    import llava_replicas
    import torch
    import vlm_replicas
    from checkpoints import fine_tune, load_folder, save_lora, save_model
    from moe_models import save_words
    from quantizing import quantise
    from stacks import make
    from vocabularies import save_model as save_with_tokenizer

    link_the_project(folder)
    llava_replicas.save_all(folder)
    models = folder / "models"
    save_model("llama", models / "base", dtype=torch.float32)
    save_words(models / "base")
    for seed, name in enumerate(("chat", "maths"), start=1):
        fine_tune(models / "base", models / name, seed=seed)
    for seed, name in enumerate(("plain", "talks", "tells")):
        added = [[], ["<|im_start|>", "<|im_end|>"], ["<|im_end|>", "<x>"]][seed]
        save_with_tokenizer(models / name, "WordPiece", added=added, seed=seed)
    save_with_tokenizer(models / "bytes", "byte-level BPE", seed=3)
    quantise(models / "chat", models / "chat-nf4", "nf4")
    changed = "model.layers.0.self_attn.q_proj"
    rows, columns = load_folder(models / "base")[f"{changed}.weight"].shape
    save_lora(
        models / "adapter",
        {
            f"{changed}.lora_A.weight": torch.ones(1, columns),
            f"{changed}.lora_B.weight": torch.ones(rows, 1),
        },
        target_modules=["q_proj"],
    )
    for seed, name in enumerate(("t5", "t5-news", "t5-code")):
        make("t5-decoder", layers=range(2), seed=seed).save_pretrained(models / name)
    vlm_replicas.save_vlm(models / "vlm")
    vlm_replicas.save_llm(models / "maths-llm")
    for page in PAGES:
        for block in blocks(page, "yaml", "python"):
            if block.file:
                (folder / block.file).write_text(block.text)
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, module in (
        ("outliermerge", "outliermerge"),
        ("outliermerge-mergekit", "outliermerge.interop.mergekit_yaml"),
    ):
        program = bin_folder / name
        program.write_text(
            f"#!/bin/sh\nexport PYTHONPATH={json.dumps(str(ROOT))}:$PYTHONPATH\n"
            f'exec {json.dumps(str(python))} -m {module} "$@"\n'
        )
        program.chmod(0o755)
    return bin_folder
