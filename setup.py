"""Compiles the kernels, for several generations of processors; all else is in pyproject.toml.

Where there is no C compiler the package installs without them and computes with torch.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup

# No contraction and no reassociation: every processor gives the same bits.
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
LEVELS = {"_kernels": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["_kernels_v3"] = ["-march=x86-64-v3"]
    LEVELS["_kernels_v4"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
FOLDER = Path("outliermerge/engines/native")

setup(
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
    ]
)
