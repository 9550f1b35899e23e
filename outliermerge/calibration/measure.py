"""Measures statistics of a model on data, and writes them so that merges can take them.

The model is whole in memory. Sums that do not fit beside it are made in several passes over the
data, each for some of the modules. Every few samples the sums are saved: the same command goes on
from there, and gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
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
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.storage.files import load_json, write_whole

_STATE = "sums.safetensors"
_IDENTITY = "measures.json"
DEFINITIONS = {
    "gram": "mean over the tokens of xxᵀ, x the inputs of a linear layer; float32 of sums in "
    "float64 of each sample's product in float32",
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
    if output.exists():
        raise OutlierMergeError(f"{output}: is there already. Name another folder, or remove it.")
    units = units_of(loaded, wanted.statistics)
    if not units:
        raise OutlierMergeError(
            f"{shown(loaded.reference)}: has nothing to measure: no linear layers that are tensors "
            "of its files"
        )
    groups = in_groups(units, wanted.statistics, memory_bytes)
    measured = sorted({name for unit in units for name in _names(unit)})
    with Reader() as reader:
        tensors = {n: source_checksum(loaded.checkpoint.tensors[n], reader) for n in measured}
    facts = _facts(loaded, samples, wanted, data, tensors)
    partial = output.with_name(output.name + ".partial")
    _begin(partial, facts | {"num_groups": len(groups)})
    with_images = any(sample.images for sample in samples)
    feeder = Feeder(loaded, with_images=with_images, max_tokens=wanted.max_tokens)
    progress, total = 0, len(groups) * len(samples)
    squares: dict[str, list[float]] = {}
    num_tokens = 0
    for number, group in enumerate(groups, start=1):
        record = partial / f"group-{number}.json"
        if not record.exists():
            sums = _restored(partial, number, loaded.device)
            summing = Summing(
                loaded, feeder, group, wanted.statistics,
                fisher=wanted.fisher, seed=wanted.seed, sums=sums,
            )  # fmt: skip
            with summing.hooked():
                for place in range(sums.num_samples, len(samples)):
                    on_progress(progress + place, total)
                    summing.add(samples[place], place)
                    if sums.num_samples % save_every == 0:
                        _save(partial, number, sums)
            _write_group(partial, number, len(groups), group, sums, wanted.statistics)
        progress += len(samples)
        on_progress(progress, total)
        done = load_json(record)
        num_tokens = done["num_tokens"]
        for kind, norm in done["norms"].items():
            squares.setdefault(kind, []).append(norm)
    manifest = _manifest(partial, facts, wanted, squares, num_tokens, loaded)
    (partial / _STATE).unlink(missing_ok=True)
    for path in (partial / _IDENTITY, *partial.glob("group-*.json")):
        path.unlink()
    partial.rename(output)
    return manifest


def _names(unit: Unit) -> set[str]:
    return {*unit.parameters, *([unit.inputs] if unit.inputs else [])}


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
    if path.exists():
        known = load_json(path)
        others = [key for key, value in identity.items() if known.get(key) != value]
        if others:
            raise OutlierMergeError(
                f"{partial}: holds part of other statistics (another {', '.join(others)}). Remove "
                "it to begin anew."
            )
        return
    partial.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(identity).encode())


def _save(partial: Path, number: int, sums: Sums) -> None:
    """Save the sums so far, and of how many samples they are, in one file."""
    from safetensors.torch import save

    facts = {"group": number, "num_samples": sums.num_samples, "num_tokens": sums.num_tokens}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in sums.tensors.items()}
    write_whole(partial / _STATE, save(tensors, {key: str(value) for key, value in facts.items()}))


def _restored(partial: Path, number: int, device: str) -> Sums:
    """Return the sums that were saved for a group; new ones where there are none."""
    from safetensors import safe_open

    path = partial / _STATE
    if not path.exists():
        return Sums()
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        if int(facts["group"]) != number:
            return Sums()
        tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}
    return Sums(tensors, int(facts["num_samples"]), int(facts["num_tokens"]))


def _write_group(
    partial: Path,
    number: int,
    num_groups: int,
    group: Sequence[Unit],
    sums: Sums,
    kinds: Sequence[str],
) -> None:
    """Write the statistics of a group: a file for each kind, then the record that it is done."""
    from safetensors.torch import save_file

    norms = {}
    for kind in kinds:
        tensors = {
            name: tensor
            for unit in group
            for (own, name), tensor in sums.means(unit, [kind]).items()
            if own == kind
        }
        if not tensors:
            continue
        (partial / kind).mkdir(exist_ok=True)
        file = f"model-{number:05d}-of-{num_groups:05d}.safetensors"
        save_file(tensors, partial / kind / file)
        names = {name: file for name in tensors}
        norms[kind] = norm_of(tensors)
        write_whole(partial / kind / f"{file}.json", json.dumps(names).encode())
    record = {"num_tokens": sums.num_tokens, "norms": norms}
    write_whole(partial / f"group-{number}.json", json.dumps(record).encode())


def _manifest(
    partial: Path,
    facts: Mapping[str, Any],
    wanted: Wanted,
    norms: Mapping[str, Sequence[float]],
    num_tokens: int,
    loaded: Loaded,
) -> dict[str, Any]:
    """Write the indexes of the files and the manifest."""
    kinds: dict[str, Any] = {}
    for kind in wanted.statistics:
        weight_map: dict[str, str] = {}
        for path in sorted((partial / kind).glob("*.json")):
            weight_map |= load_json(path)
            path.unlink()
        if not weight_map:
            continue
        index = {"metadata": {}, "weight_map": weight_map}
        write_whole(
            partial / kind / "model.safetensors.index.json", json.dumps(index, indent=1).encode()
        )
        said = f"fisher {wanted.fisher}" if kind == "fisher" else kind
        norm = sum(one * one for one in norms.get(kind, ())) ** 0.5
        kinds[kind] = {
            "definition": DEFINITIONS[said],
            "num_tensors": len(weight_map),
            "norm": norm,
        }
    manifest: dict[str, Any] = {"format": STATISTICS_FORMAT, "statistics": kinds, **facts}
    manifest["data"] = {**facts["data"], "num_tokens": num_tokens}
    if loaded.unknown:
        manifest["not_measured"] = list(loaded.unknown)
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    write_whole(partial / STATISTICS_NAME, text.encode())
    return manifest


def remove_unfinished(output: Path) -> None:
    """Remove what an interrupted measurement has left."""
    partial = output.with_name(output.name + ".partial")
    if (partial / _IDENTITY).exists():
        shutil.rmtree(partial)
