"""Measures statistics of a model on data, and writes them so that merges can take them.

The model is whole in memory. Sums that do not fit beside it are made in several passes over the
data, each for some of the modules. Every few samples the sums are saved: the same command goes on
from there, and gives the same bytes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from outliermerge.arguments import nothing
from outliermerge.calibration.data import Sample, samples_hash
from outliermerge.calibration.model import Feeder, Loaded
from outliermerge.calibration.sums import Fisher, Summing, Sums, Unit, in_groups, norm_of, units_of
from outliermerge.checkpoint.checksum import source_checksum
from outliermerge.checkpoint.measured import KINDS, STATISTICS_FORMAT, STATISTICS_NAME
from outliermerge.checkpoint.reader import Reader
from outliermerge.errors import OutlierMergeError, argument, shown
from outliermerge.output.folder import differing
from outliermerge.output.journal import Journal, process
from outliermerge.output.names import partial_folder
from outliermerge.storage.failures import naming
from outliermerge.storage.files import load_json, write_whole

_STATE = "sums.safetensors"
_IDENTITY = "measures.json"
_MADE = {"what is made": "statistics"}  # of the journal, whose lock keeps others away
_TO_START_OVER = f"use {argument('fresh', True)} to start over"
DEFINITIONS = {
    "gram": "mean over the tokens of xxᵀ, x the inputs of a linear layer, or over those that are "
    "routed to an expert; float32 of sums in float64 of each sample's product in float32",
    "mean": "mean over the tokens of x; float32 of sums in float64",
    "fisher empirical": "mean over the samples of the squared gradient of the log-likelihood of "
    "the data's own labels, summed over a sample's tokens; float32 of sums in float64",
    "fisher sampled": "mean over the samples of the squared gradient of the log-likelihood of "
    "labels that the model draws, summed over a sample's tokens; float32 of sums in float64",
}


@dataclass(frozen=True)
class Wanted:
    """What is measured, and how.

    Attributes:
        statistics: `gram`, `fisher`, `mean`.
        fisher: whose labels Fisher information is of: the data's (`empirical`), or `sampled`.
        max_tokens: of a sample; the rest is left out.
        seed: of sampled labels.
    """

    statistics: tuple[str, ...] = KINDS
    fisher: Fisher = "empirical"
    max_tokens: int = 512
    seed: int = 0


def measure(
    loaded: Loaded,
    samples: Sequence[Sample],
    *,
    output: Path,
    wanted: Wanted,
    data: str = "",
    memory_bytes: int = 4 << 30,
    save_every: int = 50,
    on_progress: Callable[[int, int], None] = nothing,
) -> Mapping[str, Any]:
    """Run a model over samples, and write its statistics into a new folder.

    Args:
        loaded: the model.
        samples: the data.
        output: the folder.
        wanted: what is measured.
        data: what the data are called.
        memory_bytes: most memory for sums at a time.
        save_every: how many samples are lost at most if it is killed.
        on_progress: called with the samples done, of all passes, and how many there are.

    Returns:
        What the manifest says.

    Raises:
        OutlierMergeError: the folder is there, or holds part of something else; the model fails.
    """
    units = units_of(loaded, wanted.statistics)
    groups = in_groups(units, wanted.statistics, memory_bytes)
    partial = Partial(loaded, samples, output, wanted, data=data, groups=groups)
    with_images = any(sample.images for sample in samples)
    feeder = Feeder(loaded, with_images=with_images, max_tokens=wanted.max_tokens)
    progress, total = 0, len(groups) * len(samples)
    for number, group in enumerate(groups, start=1):
        if not partial.has(number):
            sums = partial.restored(number)
            summing = Summing(
                loaded, feeder, group, wanted.statistics,
                fisher=wanted.fisher, seed=wanted.seed, sums=sums,
            )  # fmt: skip
            with summing.hooked():
                for place in range(sums.num_samples, len(samples)):
                    on_progress(progress + place, total)
                    summing.add(samples[place], place)
                    if sums.num_samples % save_every == 0:
                        partial.save(number, sums)
            partial.write_group(number, group, sums)
        progress += len(samples)
        on_progress(progress, total)
    return partial.finish()


class Partial:
    """Statistics in the making: a folder with the groups of modules that are done, and sums.

    Args:
        loaded: the model.
        samples: the data.
        output: the folder that it becomes.
        wanted: what is measured.
        data: what the data are called.
        groups: the modules, divided into groups.
        more: what the statistics depend on besides, as JSON values.

    Raises:
        OutlierMergeError: the folder is there, or there is part of other statistics; there is
            nothing to measure.
    """

    def __init__(
        self,
        loaded: Loaded,
        samples: Sequence[Sample],
        output: Path,
        wanted: Wanted,
        *,
        data: str,
        groups: Sequence[Sequence[Unit]],
        more: Mapping[str, Any] | None = None,
    ) -> None:
        _refuse_taken(output)
        units = [unit for group in groups for unit in group]
        if not units:
            raise OutlierMergeError(
                f"{shown(loaded.reference)}: has nothing to measure: no linear layers that are "
                "tensors of its files"
            )
        self._output, self._folder = output, partial_folder(output)
        self._loaded, self._wanted, self._num_groups = loaded, wanted, len(groups)
        measured = sorted({name for unit in units for name in _names(unit)})
        tensors = {}
        with Reader() as reader:
            for name in measured:
                tensors[name] = source_checksum(loaded.checkpoint.tensors[name], reader)
                reader.release([(0, loaded.checkpoint.tensors[name])])
        self._facts = _facts(loaded, samples, wanted, data, tensors)
        self._facts["settings"] |= more or {}
        # Sums that were saved, and groups that are done, are of just these modules.
        division = [sorted(name for unit in group for name in _names(unit)) for group in groups]
        _begin(self._folder, self._facts | {"division into passes": division})

    def has(self, number: int) -> bool:
        """Tell whether a group is done."""
        return self._record(number).exists()

    def tensors(self, number: int, kind: str) -> dict[str, Any]:
        """Return the statistics of a group that is done, as they are written."""
        from safetensors.torch import load_file

        path = self._folder / kind / self._file(number)
        return load_file(path) if path.exists() else {}

    def save(self, number: int, sums: Sums) -> None:
        """Save the sums so far, and of how many samples they are, in one file."""
        from safetensors.torch import save

        facts = {"group": number, "num_samples": sums.num_samples, "num_tokens": sums.num_tokens}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in sums.tensors.items()}
        content = save(tensors, {key: str(value) for key, value in facts.items()})
        write_whole(self._folder / _STATE, content)

    def restored(self, number: int) -> Sums:
        """Return the sums that were saved for a group; new ones where there are none."""
        from safetensors import SafetensorError, safe_open

        path = self._folder / _STATE
        if not path.exists():
            return Sums()
        try:
            with safe_open(path, "pt") as file:
                facts = {key: int(value) for key, value in file.metadata().items()}
                if facts["group"] != number:
                    return Sums()
                names = list(file.keys())
                tensors = {name: file.get_tensor(name).to(self._loaded.device) for name in names}
                sums = Sums(tensors, facts["num_samples"], facts["num_tokens"])
        except (SafetensorError, AttributeError, KeyError, ValueError) as error:
            raise OutlierMergeError(
                f"{path}: is damaged: {shown(error)}. To go on, {_TO_START_OVER}."
            ) from error
        return sums

    def write_group(self, number: int, group: Sequence[Unit], sums: Sums) -> None:
        """Write the statistics of a group, then the record that it is done."""
        from safetensors.torch import save_file

        norms, names = {}, {}
        for kind in self._wanted.statistics:
            tensors = {
                name: tensor
                for unit in group
                for (_, name), tensor in sums.means(unit, [kind]).items()
            }
            for name, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise OutlierMergeError(
                        f"{shown(self._loaded.reference)}: {kind} of {shown(name)} is infinite or "
                        "NaN: the model has such weights, or computes such values of these data"
                    )
            if tensors:
                (self._folder / kind).mkdir(exist_ok=True)
                save_file(tensors, self._folder / kind / self._file(number))
                norms[kind], names[kind] = norm_of(tensors), list(tensors)
        record = {"num_tokens": sums.num_tokens, "norms": norms, "names": names}
        record |= _of_inputs(group, sums)
        write_whole(self._record(number), json.dumps(record).encode())

    def finish(self) -> dict[str, Any]:
        """Write the indexes and the manifest, give the folder its name, and return the manifest."""
        records = [load_json(self._record(n)) for n in range(1, self._num_groups + 1)]
        kinds: dict[str, Any] = {}
        for kind in self._wanted.statistics:
            files = {
                name: self._file(number)
                for number, record in enumerate(records, start=1)
                for name in record["names"].get(kind, ())
            }
            if not files:
                continue
            index = json.dumps({"metadata": {}, "weight_map": files}, indent=1)
            write_whole(self._folder / kind / "model.safetensors.index.json", index.encode())
            said = f"fisher {self._wanted.fisher}" if kind == "fisher" else kind
            kinds[kind] = {
                "definition": DEFINITIONS[said],
                "num_tensors": len(files),
                "norm": math.hypot(*(record["norms"].get(kind, 0) for record in records)),
            }
        manifest = {"format": STATISTICS_FORMAT, "statistics": kinds, **self._facts}
        manifest["data"] |= {"num_tokens": records[-1]["num_tokens"]}
        unseen = [name for record in records for name in record["unseen"]]
        more = {
            "turned": [name for record in records for name in record["turned"]],
            "no_tokens": {n: own for record in records for n, own in record["no_tokens"].items()},
            "not_measured": [*self._loaded.unknown, *unseen],
        }
        manifest |= {key: value for key, value in more.items() if value}
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        write_whole(self._folder / STATISTICS_NAME, text.encode())
        (self._folder / _STATE).unlink(missing_ok=True)
        for path in (self._folder / _IDENTITY, *self._folder.glob("group-*.json")):
            path.unlink()
        self._folder.rename(self._output)
        return manifest

    def turned(self, number: int) -> list[str]:
        """Return the tensors of a group that is done that are stored as (inputs, outputs)."""
        return list(load_json(self._record(number))["turned"])

    def _file(self, number: int) -> str:
        return f"model-{number:05d}-of-{self._num_groups:05d}.safetensors"

    def _record(self, number: int) -> Path:
        return self._folder / f"group-{number}.json"


def _names(unit: Unit) -> set[str]:
    return {*unit.parameters, *([unit.inputs] if unit.inputs else [])}


def _of_inputs(group: Sequence[Unit], sums: Sums) -> dict[str, Any]:
    """Return which tensors are turned, which had no tokens, and whose inputs were not seen."""
    with_inputs = {unit.inputs: unit for unit in group if unit.inputs}
    no_tokens = {name: sums.without_tokens(unit) for name, unit in with_inputs.items()}
    unseen = [n for n, unit in with_inputs.items() if unit.packed and no_tokens[n] == ["all"]]
    return {
        "turned": [name for name, unit in with_inputs.items() if sums.turned(unit)],
        "no_tokens": {n: own for n, own in no_tokens.items() if own and n not in unseen},
        "unseen": unseen,
    }


def _facts(
    loaded: Loaded,
    samples: Sequence[Sample],
    wanted: Wanted,
    data: str,
    tensors: Mapping[str, str],
) -> dict[str, Any]:
    """Return what statistics depend on; they go on only if all of it is the same."""
    lines = "".join(f"{name} {checksum}\n" for name, checksum in tensors.items())
    return {
        "model": {
            "reference": loaded.reference,
            "path": str(loaded.checkpoint.root),
            "checksum": xxhash.xxh3_128_hexdigest(lines.encode()),
        },
        "data": {
            "name": data,
            "checksum": samples_hash(samples),
            "num_samples": len(samples),
        },
        "settings": json.loads(json.dumps(asdict(wanted))),
        "device": loaded.device.partition(":")[0],
        "versions": {name: version(name) for name in ("outliermerge", "torch", "transformers")},
        "tensors": dict(tensors),
    }


def _begin(partial: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder in which the statistics are made, or see that it holds part of the same."""
    path = partial / _IDENTITY
    if path.exists() and _is_begun(partial):
        known = load_json(path)
        if changed := _changed(known if isinstance(known, dict) else {}, identity):
            raise OutlierMergeError(
                f"{partial}: was begun by another measurement: {', '.join(changed)} changed since. "
                f"Measure the same to go on, or {_TO_START_OVER}."
            )
        return
    if (partial / STATISTICS_NAME).exists():  # killed just before it got its name
        with naming(partial, "removed"):
            shutil.rmtree(partial)
    with naming(partial, "made"):
        partial.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(identity).encode())


def _is_begun(partial: Path) -> bool:
    """Tell whether there is anything to go on from."""
    return (partial / _STATE).exists() or any(partial.glob("group-*.json"))


def _changed(known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs from what was begun; of other settings, not what follows from them."""
    settings, old = now["settings"], known.get("settings")
    return differing(old if isinstance(old, dict) else {}, settings) or differing(known, now)


def _refuse_taken(output: Path) -> None:
    if output.exists():
        raise OutlierMergeError(f"{output}: is there already. Name another folder, or remove it.")


@contextmanager
def held(output: Path, *, fresh: bool) -> Iterator[None]:
    """Let no other process write statistics, a merge or an adapter to the same folder.

    What an error leaves without any sums is removed.

    Args:
        output: the folder.
        fresh: remove what an interrupted measurement has left there.

    Raises:
        BusyError: another process writes it.
        OutlierMergeError: it is there, or was begun by something else.
    """
    _refuse_taken(output)
    journal, partial = Journal(output), partial_folder(output)
    try:
        if journal.identity not in (None, _MADE):
            raise OutlierMergeError(
                f"{partial}: was begun by a merge or an extraction, which goes on by its own "
                f"command. Choose another output, or remove it and {journal.path}."
            )
        journal.begin(_MADE, process=process())
        try:
            if fresh and (partial / _IDENTITY).exists():
                shutil.rmtree(partial)
            yield
        finally:
            if (partial / _IDENTITY).exists() and not _is_begun(partial):
                shutil.rmtree(partial)
            journal.clear()  # so that its file goes with it
    finally:
        journal.close()
