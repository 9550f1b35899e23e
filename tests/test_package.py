"""The package as others get it: its sdist, the wheel of that, and both without this clone."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from email.message import Message
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from compiling import quick_compiler
from waiting import LIMIT_SECONDS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "release"))
import contents  # noqa: E402
import facts  # noqa: E402
import licences  # noqa: E402

BESIDE = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "SECURITY.md",
          "pyproject.toml", "setup.py")  # fmt: skip
_HOOK = "import sys, setuptools.build_meta as made; getattr(made, sys.argv[1])(sys.argv[2])"


def clone(folder: Path) -> list[str]:
    """Copy what a clone has of the package, without what was built in it; return the files."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("outliermerge", "merge_configs", "evals", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    shutil.rmtree(folder / "evals" / "data")
    (folder / "evals" / "data").mkdir()
    for name in (*BESIDE, "evals/data/README.md"):
        shutil.copy(ROOT / name, folder / name)
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def build(folder: Path, kind: str, target: Path, **environment: str) -> str:
    """Build a wheel or an sdist; return what was printed."""
    done = subprocess.run(
        [sys.executable, "-c", _HOOK, f"build_{kind}", str(target)],
        cwd=folder,
        env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"} | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Path]:
    """A clone, the names of its files, and its sdist."""
    folder = tmp_path_factory.mktemp("source")
    names = clone(folder / "clone")
    build(folder / "clone", "sdist", folder)
    (sdist,) = folder.glob("*.tar.gz")
    return folder / "clone", names, sdist


@pytest.fixture(scope="module")
def wheel(source: tuple[Path, list[str], Path], request: pytest.FixtureRequest) -> Path:
    """The wheel of the sdist; kept between runs of the tests, as compiling takes seconds."""
    sdist = source[2]
    key = hashlib.sha256(sdist.read_bytes() + sys.version.encode() + version("setuptools").encode())
    kept = Path(request.config.cache.mkdir("wheel")) / key.hexdigest()
    if not kept.is_dir():
        shutil.rmtree(kept.parent)
        with tarfile.open(sdist) as archive:
            archive.extractall(sdist.parent / "unpacked", filter="data")
        (unpacked,) = (sdist.parent / "unpacked").iterdir()
        build(unpacked, "wheel", sdist.parent, CC=quick_compiler(sdist.parent))
        (built,) = sdist.parent.glob("*.whl")
        kept.mkdir(parents=True)
        shutil.copy(built, kept)
    (found,) = kept.glob("*.whl")
    return found


def test_the_sdist_has_all_that_is_needed_and_nothing_else(source):
    _, names, sdist = source
    assert contents.wrong_sdist(contents.read_members(sdist), names) == []


def test_the_wheel_has_all_that_is_needed_and_nothing_else(source, wheel):
    members = contents.read_members(wheel)
    assert contents.wrong_wheel(members, source[1], kernels=contents.KERNELS) == []


def test_no_file_names_a_folder_of_this_machine(source, wheel):
    paths = {str(Path.home()), str(ROOT), sys.base_prefix, str(source[0].parent)}
    for package in (wheel, source[2]):
        assert contents.foreign_paths(contents.read_members(package), paths) == []


def test_an_sdist_has_the_same_bytes_in_another_folder(source, tmp_path):
    clone(tmp_path / "elsewhere")
    build(tmp_path / "elsewhere", "sdist", tmp_path)
    assert (tmp_path / source[2].name).read_bytes() == source[2].read_bytes()


def test_the_wheel_works_without_the_clone_and_without_torch(wheel, tmp_path):
    target = tmp_path / "installed"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", "--target"]
    subprocess.run([sys.executable, *install, str(target), str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "release" / "smoke.py"), "--without-torch"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("works\n") and str(target) in done.stdout
    script = subprocess.run(
        [target / "bin" / "outliermerge", "--version"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert script.stdout == f"outliermerge {facts.version_of(ROOT)}\n"


def test_without_a_compiler_a_wheel_is_built_and_the_log_says_what_it_lacks(source, tmp_path):
    clone(tmp_path / "clone")
    absent = str(tmp_path / "no-compiler")
    said = build(tmp_path / "clone", "wheel", tmp_path, CC=absent, LDSHARED=absent)
    (built,) = tmp_path.glob("*.whl")
    assert "WARNING: outliermerge is built without its C kernels" in said
    assert contents.wrong_wheel(contents.read_members(built), source[1], kernels=()) == []


def test_version_changelog_and_citation_agree():
    assert facts.wrong_facts(ROOT, final=False) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (
            "CHANGELOG.md",
            "## 0.1.0",
            "## 0.2.0",
            "begins with '0.2.0 (unreleased)', expected 0.1.0",
        ),
        ("CHANGELOG.md", "## 0.1.0", "## 0.1.0", "has no date"),
        ("CITATION.cff", "version: 0.1.0", "version: 0.2.0", "CITATION.cff says 0.2.0"),
        ("pyproject.toml", '"0.1.0"', '"soon"', "no version: 'soon'"),
    ],
)
def test_what_disagrees_about_the_version_is_told(tmp_path, file, old, new, said):
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.1.0 (unreleased)\n")
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.1.0\n")
    changed = (tmp_path / file).read_text().replace(old, new)
    (tmp_path / file).write_text(changed)
    assert any(said in problem for problem in facts.wrong_facts(tmp_path, final=True))


def test_what_a_wheel_lacks_and_what_does_not_belong_is_told():
    tracked = ["outliermerge/a.py", "outliermerge/native/a.c", "evals/data/README.md"]
    suite = "outliermerge/shipped/suites/data/README.md"
    good = ["outliermerge/a.py", suite, "outliermerge-1.0.dist-info/METADATA"]
    kernel = "outliermerge/engines/_kernels.cpython-311-x86_64-linux-gnu.so"
    assert contents.wrong_wheel([*good, kernel], tracked, kernels=["_kernels"]) == []
    assert contents.wrong_wheel(good[1:], tracked, kernels=["_kernels"]) == [
        "the wheel lacks outliermerge/a.py",
        "the wheel lacks outliermerge/engines/_kernels.so",
    ]
    extra = ["outliermerge/native/a.c", "tests/test_a.py", "outliermerge/__pycache__/a.pyc"]
    assert contents.wrong_wheel([*good, *extra], tracked, kernels=[]) == [
        f"the wheel has {name}, which does not belong there" for name in sorted(extra)
    ]


class Package:
    """Metadata of a package that is not there."""

    def __init__(self, requires: Iterable[str] = (), licence: str = "MIT") -> None:
        self.requires, self.version = list(requires), "1"
        self.metadata = Message()
        if licence:
            self.metadata["License-Expression"] = licence


def test_licences_are_told_of_all_that_is_required_and_of_extras():
    found = {
        "mine": Package(["a>=1", "b; extra == 'more'", "absent", "old; python_version < '3'"]),
        "a": Package(["C_c[fast]"]),
        "c-c": Package(["d; extra == 'fast'"], "MPL-2.0 AND MIT"),
        "d": Package([], "GPL-3.0-only"),
        "b": Package([], ""),
    }

    def find(name: str) -> Any:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    rows = licences.table("mine", ["more"], find)
    assert [(row.name, row.kind, row.extra) for row in rows] == [
        ("a", "permissive", ""),
        ("c-c", "weak", ""),
        ("d", "copyleft", ""),
        ("b", "unknown", "more"),
    ]
    assert licences.wrong_licences(rows) == [
        "d 1 is required, and its licence is copyleft: GPL-3.0-only"
    ]


@pytest.mark.parametrize(
    ("licence", "kind"),
    [
        ("MIT OR GPL-3.0-only", "permissive"),
        ("MPL-2.0 AND MIT", "weak"),
        ("GNU Lesser General Public License v3 (LGPLv3)", "copyleft"),
        ("BSD License and GNU General Public License (GPL)", "copyleft"),
        ("Apache Software License", "permissive"),
        ("Other/Proprietary License", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_kind_of_a_licence(licence, kind):
    assert licences.kind_of(licence) == kind
