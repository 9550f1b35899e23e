"""Statistics of a small model by `outliermerge measure`, with the names of its module's tensors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import outliermerge
from evals.evidence.training import Statistics
from outliermerge.calibration.model import load


def write_samples(place: Path, samples: Sequence[Mapping[str, Any]]) -> Path:
    """Write samples, whose images are PNG bytes, into a new folder; return the list of them."""
    place.mkdir()
    lines = []
    for number, sample in enumerate(samples):
        (place / f"{number}.png").write_bytes(sample["image"])
        own = {key: value for key, value in sample.items() if key != "image"}
        lines.append(json.dumps(own | {"images": [f"{number}.png"]}) + "\n")
    (place / "samples.jsonl").write_text("".join(lines))
    return place / "samples.jsonl"


def measured(
    folder: Path, samples: Sequence[Mapping[str, Any]], statistics: Sequence[str]
) -> Statistics:
    """Return the statistics of a model in a folder over samples, whose images are PNG bytes."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "statistics"
        file = write_samples(Path(name) / "samples", samples)
        outliermerge.measure(folder, file, output=output, statistics=statistics)
        stored = {
            kind: {
                k: v
                for file in (output / kind).glob("*.safetensors")
                for k, v in load_file(file).items()
            }
            for kind in statistics
        }
    names = load(str(folder), device="cpu", what="the table of methods").names
    return {
        kind: {own: found[stored_as] for own, stored_as in names.items() if stored_as in found}
        for kind, found in stored.items()
    }
