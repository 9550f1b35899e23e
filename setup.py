"""Compiles the kernels, and packs specs and suites; all else is in pyproject.toml.

Where there is no C compiler the package installs without them and computes with torch. With
SOURCE_DATE_EPOCH, two builds give the same bytes, in any folder.
"""

import gzip
import os
import platform
import re
import shutil
import tarfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

# No contraction and no reassociation: every processor gives the same bits. No debugging
# information: it holds the path of the folder that was built in.
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-g0"]
LEVELS = {"_kernels": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["_kernels_v3"] = ["-march=x86-64-v3"]
    LEVELS["_kernels_v4"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
FOLDER = Path("outliermerge/engines/native")

# Files of the clone that the package ships, for `outliermerge configs`. What needs models or data
# that only the clone can make stays out.
SHIPPED = {"merge_configs": "specs", "evals": "suites"}
PATTERNS = ("merge_configs/*.yaml", "evals/*.yaml", "evals/tasks/*/*", "evals/data/README.md")


class BuildPy(build_py):
    """Copies the specs and suites into the package; a clone has them where they are."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for source in sorted(path for pattern in PATTERNS for path in Path().glob(pattern)):
            folder, *below = source.parts
            if source.is_file() and not re.search("tiny|minilm", str(source)):
                target = Path(self.build_lib, "outliermerge", "shipped", SHIPPED[folder], *below)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


class BuildExt(build_ext):
    """Compiles the kernels; where that fails, the last line of the output says so."""

    def build_extensions(self):
        # Python's own flags may name the folder of its library, which kernels do not link to.
        command = getattr(self.compiler, "linker_so", None)
        if command:
            self.compiler.linker_so = [word for word in command if "-rpath" not in word]
        super().build_extensions()

    def run(self):
        super().run()
        if not Path(self.get_ext_fullpath("outliermerge.engines._kernels")).exists():
            print(
                "\nWARNING: outliermerge is built without its C kernels: no C compiler works here. "
                "Merges will be computed by torch, which takes several times as long. To have the "
                "kernels, install a compiler (Debian, Ubuntu: apt install gcc libc6-dev) and "
                "Python's headers (python3-dev), and install outliermerge again.\n",
                flush=True,
            )


class Sdist(sdist):
    """Packs the sources in the order of their names, with the time of SOURCE_DATE_EPOCH."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        if "SOURCE_DATE_EPOCH" not in os.environ or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        seconds = int(os.environ["SOURCE_DATE_EPOCH"])

        def plain(entry):
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime, entry.mode = seconds, 0o755 if entry.isdir() else 0o644
            return entry

        path = f"{base_name}.tar.gz"
        with (
            Path(path).open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=seconds) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=plain)  # sorted
        return path


setup(
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "sdist": Sdist},
    ext_modules=[
        Extension(
            f"outliermerge.engines.{name}",
            [f"{FOLDER}/kernels.c"],
            depends=sorted(map(str, FOLDER.glob("*.h"))),
            define_macros=[("MODULE", name)],
            extra_compile_args=[*FLAGS, "-Wno-psabi", *more],
            optional=True,
        )
        for name, more in LEVELS.items()
    ],
)
