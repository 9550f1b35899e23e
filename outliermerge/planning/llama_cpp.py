"""llama.cpp's own converter: where it is, which one it is, and whether it knows a model."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError, shown

VARIABLE = "LLAMA_CPP"
"""The environment variable that names llama.cpp's folder."""
PROGRAM = "convert_hf_to_gguf.py"
_ADVICE = (
    "llama.cpp's converter knows more and would be used, but it is not here. Get it (git clone "
    "https://github.com/ggml-org/llama.cpp), install torch, transformers and sentencepiece, and "
    f"set {VARIABLE} to its folder, or have {PROGRAM} on the PATH"
)


@dataclass(frozen=True)
class Conversion:
    """What llama.cpp's converter makes of a merge.

    Attributes:
        program: the converter.
        is_program: whether it is run as a program; else by the Python that runs this.
        name: of the model, for its metadata.
        outtype: its name of the type of the weights.
        files: the names of the files that it makes: the model, and a vision or audio tower.
        num_bytes: about how many bytes these have.
    """

    program: Path
    is_program: bool
    name: str
    outtype: str
    files: tuple[str, ...]
    num_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return which converter it is and what it makes, as JSON values."""
        digest = hashlib.sha256()
        for path in _sources(self.program):
            digest.update(path.read_bytes())
        return {
            "by": str(self.program),
            "sha256": digest.hexdigest(),
            "version": _version(self.program.parent),
            "outtype": self.outtype,
            "files": [*self.files],
        }


def find_converter() -> tuple[Path, bool]:
    """Return the path of the converter, and whether it is a program by itself.

    Raises:
        OutlierMergeError: it is not found.
    """
    if folder := os.environ.get(VARIABLE):
        path = Path(folder, PROGRAM)
        if not path.is_file():
            raise OutlierMergeError(
                f"{VARIABLE} is {shown(folder)}, and {PROGRAM} is not in this folder: set it to a "
                "clone of llama.cpp"
            )
        return path.resolve(), False
    if found := shutil.which(PROGRAM):
        return Path(found).resolve(), True
    raise OutlierMergeError(_ADVICE)


def check_known(program: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model whose class the converter does not name, before it is merged.

    A program that names no class at all starts another, which is not known here.

    Raises:
        OutlierMergeError: it does not, or a file of it cannot be read.
    """
    parts = (config, *(config.get(key) or {} for key in ("text_config", "llm_config")))
    names = [str(name) for part in parts for name in part.get("architectures") or ()]
    try:
        texts = [path.read_text("utf-8", "replace") for path in _sources(program)]
    except OSError as error:
        raise OutlierMergeError(f"{error.filename}: cannot be read: {error.strerror}") from error
    names_any = any("ForCausalLM" in text for text in texts)
    if names_any and not any(f'"{name}"' in text for name in names for text in texts):
        what = shown(", ".join(names)) or "a config without architectures"
        raise OutlierMergeError(
            f"{program} does not know {what}: take a newer llama.cpp, or write safetensors"
        )


def _sources(program: Path) -> Iterator[Path]:
    """Yield the converter's Python files."""
    yield program
    for folder in ("conversion", "gguf-py/gguf"):
        yield from sorted(program.parent.joinpath(folder).glob("*.py"))


def _version(folder: Path) -> str | None:
    """Return what git says of a clone; None where there is none, or no git."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--tags", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
