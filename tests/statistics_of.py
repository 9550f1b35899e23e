"""Statistics of models, written as `measure` does, of tensors that a test has drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from checkpoints import save_tensors
from torch import Tensor

from outliermerge.checkpoint.checksum import source_checksum
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.measured import STATISTICS_FORMAT, STATISTICS_NAME
from outliermerge.checkpoint.reader import Reader


def save_statistics(folder: Path, model: Path, **kinds: Mapping[str, Tensor]) -> Path:
    """Write statistics of a model: by kind, tensors with the model's names."""
    tensors = open_checkpoint(model).tensors
    for kind, values in kinds.items():
        save_tensors(folder / kind, dict(values))
    with Reader() as reader:
        checksums = {name: source_checksum(one, reader) for name, one in tensors.items()}
    content = {
        "format": STATISTICS_FORMAT,
        "statistics": {kind: {} for kind in kinds},
        "tensors": checksums,
    }
    (folder / STATISTICS_NAME).write_text(json.dumps(content))
    return folder
