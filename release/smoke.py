"""Try an installed outliermerge on tiny models: every command that needs nothing but the package.

    python release/smoke.py [--without-torch]

It runs with the interpreter that it is started with, in an empty folder, so that no clone is found.
The merges are computed by each of the kernels' levels that this processor has; all must give the
same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

LIMIT_SECONDS = 300
METHODS = ("min_sigma", "linear", "task_arithmetic", "ties")
LEVELS = ("_kernels", "_kernels_v3", "_kernels_v4")
TORCH = ("torch", "torchvision", "transformers", "diffusers")
# Modules that are named in the first argument cannot be imported, as if they were not installed.
_START = """
import sys
class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name in refused or name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
refused = sys.argv.pop(1).split(",")
sys.meta_path.insert(0, Refusal())
from outliermerge.cli.main import main
sys.exit(main())
"""


def save_model(folder: Path, change: float) -> None:
    """Write a model of four tensors: bfloat16, float16, float32 and integers."""
    folder.mkdir(parents=True)
    values = [((7 * i) % 64 - 32) / 8 + (change if i % 3 else -change) for i in range(64)]
    bfloat16 = b"".join(struct.pack("<f", value)[2:] for value in values)
    tensors = {
        "layers.0.a.weight": ("BF16", [8, 8], bfloat16),
        "layers.0.b.weight": ("F16", [64], struct.pack("<64e", *values)),
        "layers.1.a.weight": ("F32", [8, 8], struct.pack("<64f", *values)),
        "position_ids": ("I64", [4], struct.pack("<4q", *range(4))),
    }
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(data for _, _, data in tensors.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8}))


def save_all(folder: Path) -> None:
    """Write a base, two models and a spec for each method."""
    for name, change in (("base", 0.0), ("a", 0.25), ("b", 1.5)):
        save_model(folder / "models" / name, change)
    for method in METHODS:
        base = {} if method == "linear" else {"base_model": "models/base"}
        models = [{"model": "models/a"}, {"model": "models/b"}]
        spec = {"merge_method": method, "models": models, **base}
        (folder / f"{method}.json").write_text(json.dumps(spec))


def call(
    folder: Path, *arguments: str, refused: Iterable[str] = (), code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder without some modules; anything but the exit code is an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _START, ",".join(refused), *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OUTLIERMERGE_PROGRESS_SECONDS": "0"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    if done.returncode != code or "Traceback" in done.stderr:
        raise SystemExit(
            f"outliermerge {' '.join(arguments)}: exit code {done.returncode}, expected {code}\n"
            f"{done.stdout}{done.stderr}"
        )
    return done


def best_kernels(folder: Path) -> Path:
    """Return the file of the kernels that are used on this processor."""
    text = "from outliermerge.engines.kernels import find_kernels as f; print(f().__file__)"
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, check=True
    )
    return Path(done.stdout.strip())


def levels(best_level: str) -> list[tuple[str, ...]]:
    """Return for the best level of the kernels and each below, the modules to refuse for it."""
    best = LEVELS.index(best_level)
    names = [f"outliermerge.engines.{level}" for level in LEVELS]
    return [tuple(names[number + 1 :]) for number in range(best, -1, -1)]


def checksums(folder: Path) -> dict[str, str]:
    """Return the checksums of an output's tensors."""
    manifest = json.loads((folder / "outliermerge.json").read_text())
    return {name: entry["checksum"] for name, entry in manifest["tensors"].items()}


def check(folder: Path, refused: Sequence[str]) -> str:
    """Try all commands in an empty folder; return what was found, in a line."""
    save_all(folder)
    version = call(folder, "--version", refused=refused).stdout.strip()
    for words in ("methods --json", "configs --json", "schema", "completion bash"):
        assert call(folder, *words.split(), refused=refused).stdout.strip(), words
    call(folder, "plan", "ties.json", refused=refused)
    call(folder, "convert-config", "ties.json", refused=refused)
    kernels = best_kernels(folder)
    found = levels(kernels.name.partition(".")[0])
    for method in METHODS:
        spec, outputs = f"{method}.json", []
        for number, others in enumerate(found):
            output = f"merged/{method}-{number}"
            call(folder, "run", spec, output, refused=(*refused, *others))
            manifest = json.loads((folder / output / "outliermerge.json").read_text())
            assert manifest["kernels"], "torch computed, and not the kernels"
            outputs.append(checksums(folder / output))
        assert all(output == outputs[0] for output in outputs), f"{method}: levels differ"
        call(folder, "verify", f"merged/{method}-0", "--load", refused=refused)
    mean = struct.unpack("<64f", tensor_bytes(folder / "merged/linear-0", "layers.1.a.weight"))
    models = [tensor_bytes(folder / "models" / name, "layers.1.a.weight") for name in "ab"]
    pairs = zip(*(struct.unpack("<64f", data) for data in models), strict=True)
    assert mean == tuple((a + b) / 2 for a, b in pairs), "the mean is wrong"
    call(folder, "sweep", "min_sigma.json", "--set", "t=2,3", "-o", "swept", refused=refused)
    call(folder, "stats", "merged/ties-0", "--base", "models/base", "--json", "-", refused=refused)
    if "torch" in refused or find_spec("torch") is None:
        done = call(folder, "compare-weights", "models/a", "models/b", refused=refused, code=1)
        assert "needs torch" in done.stderr, done.stderr
    package, python = kernels.parents[2], sys.version.split()[0]
    return f"{version} in {package}, Python {python}, {len(found)} levels of kernels: works"


def tensor_bytes(folder: Path, name: str) -> bytes:
    """Return the bytes of a tensor of a model."""
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return data[8 + length + start : 8 + length + stop]


def main() -> None:
    """Read the arguments, and try all in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--without-torch", action="store_true", help="as if torch were not installed, if it is"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(check(Path(folder), TORCH if options.without_torch else ()))


if __name__ == "__main__":
    main()
