"""The files beside the weights (manifest, model card, configuration), and their verification."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from outliermerge.checkpoint.checksum import (
    PIECE_ELEMENTS,
    checksum_in_file,
    file_checksum,
    header_checksum,
)
from outliermerge.checkpoint.folders.beside import CARD_NAME, MANIFEST_NAME
from outliermerge.checkpoint.folders.remote import RECORDS
from outliermerge.checkpoint.formats.safetensors_file import read_header
from outliermerge.checkpoint.layout import OutputTensor, make_indexes
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import DTYPES, TensorMeta
from outliermerge.errors import OutlierMergeError
from outliermerge.execution.jobs import JobResult
from outliermerge.optional import installed_version
from outliermerge.output.card import model_card
from outliermerge.output.drift import measure_drift
from outliermerge.output.folder import OutputFolder, finish_interrupted
from outliermerge.output.llama_cpp import convert
from outliermerge.output.manifest_file import MANIFEST_FORMAT, read_manifest
from outliermerge.output.mergekit_config import MERGEKIT_NAME, mergekit_text
from outliermerge.output.names import real_output, shard_path
from outliermerge.output.opened import Output
from outliermerge.output.recipe import RECIPE_NAME, command, recipe_of, recipe_text
from outliermerge.planning.gguf import FILE
from outliermerge.planning.plan import Options, Plan
from outliermerge.planning.repeated import check_inputs, relative_to
from outliermerge.planning.sidecars import sidecar_contents
from outliermerge.storage.failures import naming
from outliermerge.storage.stand_ins import elsewhere, with_addresses

if TYPE_CHECKING:
    from outliermerge.output.load_check import Verdict

# Names that git, the hub's client, desktops and killed runs leave; no loader reads them.
_LEAVINGS = {".git", ".gitattributes", ".gitignore", ".gitmodules", ".huggingface", ".locks",
             ".DS_Store", RECORDS.rstrip("/")}  # fmt: skip


def identity(plan: Plan, options: Options) -> dict[str, Any]:
    """Return the facts that must be equal for a killed run to be continued, in user's words."""
    layout = xxhash.xxh3_128_hexdigest(b"".join(shard.header for shard in plan.shards))
    pairing = xxhash.xxh3_128()
    for job in (*plan.jobs, *plan.checks):
        spelt = repr((job.name, job.action, job.sources))
        pairing.update(spelt.encode("utf-8", "surrogatepass"))
    return {
        "the outliermerge version": version("outliermerge"),
        "the torch version": installed_version("torch"),
        "the device": options.device.partition(":")[0],
        "what computes (kernels or torch)": "kernels" if options.kernels else "torch",
        "the spec": plan.spec.as_dict(),
        "the layout of the output (the size of its files, tensors)": layout,
        "how the models' tensors are paired and computed (configs, adapters, tokenizers)": (
            pairing.hexdigest()
        ),
        **{
            f"the files of {entry.reference}": [
                [str(stamp.path), stamp.num_bytes, stamp.mtime_ns]
                for stamp in entry.checkpoint.weight_files
            ]
            for entry in plan.inputs
        },
        **{
            f"the auxiliary tensors of {path}": [stamp.num_bytes, stamp.mtime_ns]
            for path, stamp in plan.auxiliary_files.items()
            if stamp is not None
        },
    }


def write_sidecars(
    plan: Plan,
    folder: Output,
    options: Options,
    *,
    load_check: Verdict | None = None,
) -> dict[str, Any]:
    """Write everything but the weights into an output, the manifest last; return the manifest.

    Raises:
        OutlierMergeError: a file cannot be written, or the merge is to repeat an earlier one and
            has read other values.
    """
    inputs = _inputs(plan, folder.done)
    check_inputs(plan, inputs, folder.unfinished)
    drift = measure_drift(plan, folder.done, folder.writer)
    contents = sidecar_contents(plan)
    indexes = make_indexes((job.output for job in plan.jobs), plan.components)
    if plan.conversion is None:
        contents |= {name: text.encode() for name, text in indexes.items()}
    if not plan.is_one_file:
        contents[RECIPE_NAME] = recipe_text(plan, options, folder.done).encode()
        if (text := mergekit_text(plan)) is not None:
            contents[MERGEKIT_NAME] = text.encode()
        again = command(plan, options, folder.done)
        contents[CARD_NAME] = model_card(plan, contents, drift, again).encode()
    folder.write_files(contents)
    names, made = sorted(contents), dict[str, Any]()
    if plan.conversion is not None:
        assert isinstance(folder, OutputFolder)
        made = {"conversion": convert(plan.conversion, folder, names)}
        names += plan.conversion.files
    manifest = _manifest(plan, folder.done, folder.path, names, options) | made
    manifest |= {"inputs": inputs, **({"drift": drift} if drift else {})}
    if load_check is not None:
        manifest["load_check"] = load_check.as_dict()
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    folder.write_files({MANIFEST_NAME: text.encode()})
    return manifest


def _manifest(
    plan: Plan,
    results: Mapping[str, JobResult],
    folder: Path,
    names: list[str],
    options: Options,
) -> dict[str, Any]:
    return {
        "format": MANIFEST_FORMAT,
        "versions": {
            "outliermerge": version("outliermerge"),
            "torch": installed_version("torch"),
            "python": platform.python_version(),
        },
        "device": options.device.partition(":")[0],
        "kernels": bool(options.kernels) and options.device == "cpu",
        "spec": plan.spec.as_dict(),
        "recipe": recipe_of(plan),
        **({"layer_map": [row.as_dict() for row in plan.layer_map]} if plan.layer_map else {}),
        **({"shard_bytes": plan.shard_bytes} if plan.shard_bytes is not None else {}),
        **({"transplant": plan.transplant} if plan.transplant is not None else {}),
        "checksum": "tensors: xxh3_128 of the xxh3_128 digests of pieces of "
        f"{PIECE_ELEMENTS} elements; "
        "files: sha256; shards: xxh3_128 of the header; "
        "inputs: xxh3_128 of the lines 'tensor checksum' of what was read",
        "shards": {
            shard.file: {
                "num_bytes": shard.num_bytes,
                "header": _checksum(header_checksum, folder / shard.file),
            }
            for shard in (plan.shards if plan.conversion is None else ())
        },
        "input_bytes": plan.num_read_bytes,
        "read_bytes": sum(results[job.name].read_bytes for job in plan.jobs),
        "num_parameters": plan.num_parameters,
        "files": {
            name: {
                "num_bytes": (folder / name).stat().st_size,
                "sha256": _checksum(file_checksum, folder / name),
            }
            for name in names
        },
        "tensors": {
            job.name: _plain(
                {
                    "file": job.output.file if plan.conversion is None else FILE,
                    "dtype": job.output.dtype.name,
                    "shape": list(job.output.shape),
                    **({"offset": job.output.offset} if job.output.file == FILE else {}),
                    "checksum": results[job.name].checksum,
                    "action": job.of.action if job.of else results[job.name].action,
                    "sources": [
                        plan.inputs[number].reference for number, _ in (job.of or job).sources
                    ],
                    "parameters": dict((job.of or job).parameters),
                    "statistics": results[job.name].statistics,
                    "non_finite": results[job.name].non_finite,
                }
            )
            for job in plan.jobs
        },
    }


def _inputs(plan: Plan, results: Mapping[str, JobResult]) -> list[dict[str, Any]]:
    """Return what was read of each model."""
    read: dict[int, list[str]] = {number: [] for number in range(len(plan.inputs))}
    for job in plan.jobs:
        for number, checksum in results[job.name].read.items():
            read[number].append(f"{job.name} {checksum}\n")
    return [
        {
            "model": entry.reference,
            "role": entry.role,
            **({"made_of": [m.reference for m in entry.made_of]} if entry.made_of else {}),
            **_where(entry.checkpoint.root),
            "files": {
                relative_to(stamp.path, entry.checkpoint.root): stamp.num_bytes
                for stamp in entry.checkpoint.weight_files
            },
            "checksum": xxhash.xxh3_128_hexdigest("".join(read[number]).encode()),
        }
        for number, entry in enumerate(plan.inputs)
    ]


def _where(root: Path) -> dict[str, Any]:
    """Return the path of a model, or its address and version if it is elsewhere."""
    there = elsewhere(root)
    if there is None:
        return {"path": str(root)}
    versions = {name: found.version for name, found in there.files.items()}
    return {"path": there.address, "version": there.version or versions}


def _checksum(checksum: Callable[[Path], str], path: Path) -> str:
    """Return the checksum of a file, or raise an error that names it."""
    with naming(path, "read"):
        return checksum(path)


def _plain(value: Any) -> Any:
    """Return JSON values: infinite and NaN numbers become texts, empty entries are left out."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v not in ({}, []) or k == "shape"}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def verify_folder(
    folder: Path,
    *,
    threads: int,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> list[str]:
    """Recompute every checksum of an output and return what differs from its manifest.

    Raises:
        OutlierMergeError: the folder has no manifest.
    """
    folder = real_output(folder)
    finish_interrupted(folder)
    manifest = read_manifest(folder)
    differences: list[str] = []
    changed_headers: set[str] = set()
    stored: dict[str, OutputTensor] = {}
    for file, shard in manifest["shards"].items():
        path = shard_path(folder, file)
        component = file.rpartition("/")[0]
        try:
            metas = _placed(path, file, manifest) if file == FILE else read_header(path)
        except OutlierMergeError as error:
            differences.append(with_addresses(str(error)))
            continue
        if _checksum(header_checksum, path) != shard["header"]:
            changed_headers.add(file)
        for meta in metas:
            assert meta.offset is not None
            name = f"{component}/{meta.name}" if component else meta.name
            if name in stored:
                differences.append(f"tensor {name!r}: is in {stored[name].file} and in {file}")
            stored[name] = OutputTensor(name, meta.dtype, meta.shape, file, meta.offset)
    readable = {tensor.file for tensor in stored.values()}
    to_read = []
    for name, entry in manifest["tensors"].items():
        tensor = stored.pop(name, None)
        if tensor is None:
            changed_headers.discard(entry["file"])
            if entry["file"] in readable:
                differences.append(f"tensor {name!r}: is not in {entry['file']}")
            continue
        found = (tensor.file, tensor.dtype.name, list(tensor.shape))
        if found != (entry["file"], entry["dtype"], entry["shape"]):
            changed_headers -= {tensor.file, entry["file"]}
            differences.append(
                f"tensor {name!r}: found {found[1]} {found[2]} in {found[0]}, expected "
                f"{entry['dtype']} {entry['shape']} in {entry['file']}"
            )
        else:
            to_read.append(tensor)
    differences += [f"tensor {name!r}: is not in the manifest" for name in stored]
    changed_headers -= {tensor.file for tensor in stored.values()}
    differences += [f"file {file}: its header changed" for file in sorted(changed_headers)]
    differences += _differing_tensors(folder, to_read, manifest, threads, on_progress)
    differences += _differing_files(folder, manifest)
    return differences


def _placed(path: Path, file: str, manifest: Mapping[str, Any]) -> list[TensorMeta]:
    """Return the tensors of a GGUF file, as the manifest says: its header has a checksum.

    Raises:
        OutlierMergeError: there is no such file.
    """
    with naming(path, "read"):
        path.stat()
    tensors = {n: e for n, e in manifest["tensors"].items() if e["file"] == file}
    return [
        TensorMeta(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), path, entry["offset"])
        for name, entry in tensors.items()
    ]


def _differing_tensors(
    folder: Path,
    tensors: Iterable[OutputTensor],
    manifest: Mapping[str, Any],
    threads: int,
    on_progress: Callable[[int], None],
) -> list[str]:
    tensors = list(tensors)

    def difference(tensor: OutputTensor) -> str | None:
        path = shard_path(folder, tensor.file)
        with naming(path, "read"):
            checksum = checksum_in_file(partial(reader.read, path), tensor)
        on_progress(tensor.num_bytes)
        wanted = manifest["tensors"][tensor.name]["checksum"]
        if checksum == wanted:
            return None
        return (
            f"tensor {tensor.name!r} in {tensor.file}: found checksum {checksum}, expected {wanted}"
        )

    with Reader() as reader, ThreadPoolExecutor(threads) as pool:
        reader.read_ahead_of(
            (shard_path(folder, tensor.file), tensor.offset, tensor.num_bytes) for tensor in tensors
        )
        return [text for text in pool.map(difference, tensors) if text]


def card_notes(folder: Path) -> list[str]:
    """Return a note if a folder's model card has changed since it was written.

    People edit the card, and no loader reads it: this does not count as a difference.
    """
    entry = read_manifest(folder)["files"].get(CARD_NAME)
    path = folder / CARD_NAME
    if entry is None or (path.is_file() and _checksum(file_checksum, path) == entry["sha256"]):
        return []
    return [f"{CARD_NAME} is {'another' if path.is_file() else 'missing'}; no loader reads it"]


def _differing_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    differences = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if name == CARD_NAME:
            continue
        if not path.is_file():
            differences.append(f"file {name}: is missing")
        elif _checksum(file_checksum, path) != entry["sha256"]:
            differences.append(f"file {name}: its contents changed")
    known = {*manifest["shards"], *manifest["files"], MANIFEST_NAME, CARD_NAME}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        parts = path.relative_to(folder).parts
        if parts[0] in _LEAVINGS or parts[:2] == (".cache", "huggingface"):
            continue
        name = "/".join(parts)
        if path.is_file() and name not in known:
            differences.append(f"file {name}: is not in the manifest")
    return differences
