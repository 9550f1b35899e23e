"""The kinds of a model's modules, by the class that its config names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.model_types import has_transformers
from outliermerge.errors import OutlierMergeError, argument, listing, shown
from outliermerge.output.load_check import ENVIRONMENT, TIMEOUT_SECONDS, find_parts
from outliermerge.planning.plan import Input

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from outliermerge.extraction.class_worker import main; main()"
)


@dataclass(frozen=True)
class Classes:
    """What a model's class says of its modules.

    Attributes:
        name: of the class; empty if it could not be asked.
        kinds: by name of a module its kind.
        orders: by name of a module with packed experts its parameters.
        why_not: why it could not be asked.
    """

    name: str = ""
    kinds: Mapping[str, str] = field(default_factory=dict)
    orders: Mapping[str, list[str]] = field(default_factory=dict)
    why_not: str = ""

    def may_have(self, module: str) -> bool:
        """Tell whether the class has a module, as far as it is known."""
        return not self.name or module in self.kinds

    def refuse_unknown(self, modules: Iterable[str]) -> None:
        """Refuse modules that the class does not have by these names.

        Raises:
            OutlierMergeError: there are some.
        """
        unknown = [module for module in modules if not self.may_have(module)]
        if unknown:
            raise OutlierMergeError(
                f"{self.name} has no modules of these names, as its files have other names "
                f"than its class, so that peft would not load all of the adapter:\n"
                f"{listing(map(shown, unknown), limit=5)}\n`layout: transformers` in a spec brings "
                f"models into the class's layout. Without this check "
                f"({argument('load_check', False)}) the adapter has the files' names."
            )


def classes_of(model: Input) -> Classes:
    """Ask transformers, in another process, for the modules of a model's class."""
    tensors = model.checkpoint.tensors
    shapes = {name: source.shape for name, source in tensors.items()}
    parts, notes = find_parts(shapes, [""], lambda name: read_json(model.home / name))
    if not parts or not has_transformers():
        why = notes[0].rpartition(": ")[2] if notes else "transformers is not installed"
        return Classes(why_not=why)
    part = parts[""]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _START, json.dumps([path for path in sys.path if path])],
            input=json.dumps(part.request()).encode(),
            capture_output=True,
            env={**os.environ, **ENVIRONMENT},
            timeout=TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Classes(why_not=f"the process that asks transformers failed: {error}"[:300])
    found = json.loads(done.stdout)
    if "unknown" in found:
        return Classes(why_not=found["unknown"])
    return Classes(part.class_name, found["kinds"], found["orders"])
