"""Real data from Debian's packages and PyPI, kept in the user's cache."""

from __future__ import annotations

import os
import subprocess
import tarfile
import tempfile
from pathlib import Path


def cache() -> Path:
    """Return the folder of what the evidence downloads and trains."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "outliermerge" / "evidence"


def debian(name: str) -> Path:
    """Return the folder of an unpacked Debian package, fetched where the cache lacks it."""
    target = cache() / "debian" / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        folder = Path(made)
        folder.chmod(0o755)
        command = ["apt-get", "download", "-qq", name]
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
        files = list(folder.glob("*.deb"))
        if done.returncode or not files:
            raise SystemExit(f"Debian's package {name} could not be fetched: {done.stderr.strip()}")
        subprocess.run(["dpkg-deb", "-x", files[0], folder / "content"], check=True)
        version = subprocess.run(
            ["dpkg-deb", "-f", files[0], "Version"], check=True, capture_output=True, text=True
        ).stdout.strip()
        (folder / "content" / "VERSION").write_text(version + "\n")
        if not target.is_dir():  # another process may have been faster
            (folder / "content").rename(target)
    return target


def versions() -> dict[str, str]:
    """Return the versions of the Debian packages in the cache."""
    found = sorted((cache() / "debian").glob("*/VERSION"))
    return {path.parent.name: path.read_text().strip() for path in found}


def npm(name: str, number: str) -> Path:
    """Return the folder of an unpacked npm package, fetched where the cache lacks it."""
    target = cache() / "npm" / f"{name}-{number}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        command = ["npm", "pack", "--silent", f"{name}@{number}"]
        done = subprocess.run(command, cwd=made, check=False, capture_output=True, text=True)
        files = list(Path(made).glob("*.tgz"))
        if done.returncode or not files:
            raise SystemExit(f"npm's package {name} could not be fetched: {done.stderr.strip()}")
        with tarfile.open(files[0]) as archive:
            archive.extractall(made, filter="data")
        if not target.is_dir():
            Path(made, "package").rename(target)
    return target
