"""Opens statistics that `measure` has written: a folder of tensors for each kind.

The tensors have the names of the model's. A manifest beside the folders holds the checksums of what
was measured, so that a merge can refuse statistics of another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.sources import OfSource, Reading, Source
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.storage.files import load_json

STATISTICS_NAME = "statistics.json"
STATISTICS_FORMAT = 1
KINDS = ("gram", "fisher", "mean")


@dataclass(frozen=True)
class MeasuredTensor(OfSource):
    """A statistic of a tensor. A Source.

    Attributes:
        source: the tensor that holds the statistic.
        folder: where the statistics are, for messages.
        of_checksum: the checksum of the model's tensor that was measured.
        turned: the model's tensor is stored as (inputs, outputs).
        no_tokens: the tensor's experts that were given none; "all" for a layer.
    """

    source: Source
    folder: str
    of_checksum: str
    turned: bool = False
    no_tokens: tuple[int | str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def read(self, reader: Reading, start: int, stop: int, out: memoryview) -> None:
        """Fill `out` with elements start to stop, in `dtype`."""
        self.source.read(reader, start, stop, out)


class Statistics:
    """The statistics of a model.

    Args:
        folder: what `measure` has written.

    Raises:
        OutlierMergeError: it has not, or not completely.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.manifest = read_statistics(folder)

    def tensors(self, kind: str) -> dict[str, Source]:
        """Return the statistics of one kind by the names of the model's tensors.

        Raises:
            OutlierMergeError: this kind was not measured, or its files are broken.
        """
        kinds = self.manifest["statistics"]
        if kind not in kinds:
            raise OutlierMergeError(
                f"{self._folder}: holds no {kind}, only {', '.join(map(shown, kinds))}: measure "
                f"the model again, with {kind} among the statistics"
            )
        checksums = self.manifest["tensors"]
        found = open_checkpoint(self._folder / kind).tensors
        if unknown := next((name for name in found if name not in checksums), None):
            raise OutlierMergeError(
                f"{self._folder}: {shown(unknown)} is in {kind}, but not among the tensors of "
                f"{STATISTICS_NAME}. Measure the model again."
            )
        is_of_inputs = kind != "fisher"
        turned = self.manifest.get("turned", ()) if is_of_inputs else ()
        no_tokens = self.manifest.get("no_tokens", {}) if is_of_inputs else {}
        return {
            name: MeasuredTensor(
                *(source, str(self._folder), checksums[name], name in turned),
                tuple(no_tokens.get(name, ())),
            )
            for name, source in found.items()
        }


def _are(kinds: type | tuple[type, ...], values: object) -> bool:
    return isinstance(values, list) and all(isinstance(one, kinds) for one in values)


def read_statistics(folder: Path) -> Mapping[str, Any]:
    """Return the manifest of statistics.

    Raises:
        OutlierMergeError: there is none, or `measure` did not write it.
    """
    path = folder / STATISTICS_NAME
    if not path.is_file():
        what = "no such folder" if not folder.is_dir() else f"no {STATISTICS_NAME} in it"
        raise OutlierMergeError(
            f"{folder}: {what}, expected statistics that `outliermerge measure` has finished"
        )
    found = load_json(path)
    is_valid = (
        isinstance(found, dict)
        and found.get("format") == STATISTICS_FORMAT
        and isinstance(found.get("statistics"), dict)
        and isinstance(found.get("tensors"), dict)
        and all(isinstance(one, str) for one in found["tensors"].values())
        and _are(str, found.get("turned", []))
        and isinstance(no_tokens := found.get("no_tokens", {}), dict)
        and all(_are((int, str), experts) for experts in no_tokens.values())
    )
    if not is_valid:
        raise OutlierMergeError(f"{path}: not statistics of format {STATISTICS_FORMAT}")
    return dict(found)
