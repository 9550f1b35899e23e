"""Compiles the kernels, and packs specs and suites; all else is in pyproject.toml.

Where there is no C compiler the package installs without them and computes with torch.
"""

import platform
import re
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

# No contraction and no reassociation: every processor gives the same bits.
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
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


setup(
    cmdclass={"build_py": BuildPy},
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
