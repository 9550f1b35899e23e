"""Merges from folder to folder: by modifiers, RegMean++ and AdaMerging."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import outliermerge

# Where their parameters are searched, as in evals/evidence/methods.py.
SPACES: dict[str, dict[str, Any]] = {
    "task_arithmetic+lines": {"lambda": (0.1, 1.2), "alpha": (0.0, 1.0), "beta": (0.0, 1.0)},
    "task_arithmetic+svc": {"lambda": (0.1, 1.2), "alpha": (0.1, 1.0)},
    "regmean++": {"reduce": (0.0, 1.0)},
    "adamerging": {},
}
START = 0.3  # the weights that AdaMerging starts from, as in its paper


@dataclass(frozen=True)
class Files:
    """Folders of models, and for each task model a file of samples of its task."""

    base: Path
    models: list[Path]
    data: list[Path]


def merged(method: str, files: Files, parameters: Mapping[str, Any], place: Path) -> Path:
    """Merge task models as a spec says, and return the folder of the merge, in `place`."""
    work = Path(tempfile.mkdtemp(dir=place))
    models: list[dict[str, Any]] = [{"model": str(folder)} for folder in files.models]
    if method == "regmean++":
        for number, model in enumerate(models):
            model["statistics"] = str(work / f"statistics-{number}")
        spec: dict[str, Any] = {
            "merge_method": "regmean", "models": models, "parameters": dict(parameters),
        }  # fmt: skip
        outliermerge.measure(spec, files.data)
    elif method == "adamerging":
        weights = {"weight": START, **parameters}
        spec = _task_arithmetic(files, models, weights)
        spec = dict(outliermerge.fit(spec, files.data).document)
    else:
        own = dict(parameters)
        weights = {"lambda": own.pop("lambda")} if "lambda" in own else {}
        spec = _task_arithmetic(files, models, weights)
        modifier = method.rpartition("+")[2]
        spec["modifiers"] = [{"modifier": modifier, **({"parameters": own} if own else {})}]
    outliermerge.run(spec, output=work / "merged")
    return work / "merged"


def _task_arithmetic(
    files: Files, models: list[dict[str, Any]], parameters: dict[str, Any]
) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic", "base_model": str(files.base), "models": models,
        **({"parameters": parameters} if parameters else {}),
    }  # fmt: skip
