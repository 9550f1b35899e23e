"""What a CUDA device makes of merges: of tensors that it holds, and from disk to disk.

On the device, merge_state_dicts is set against the device's own copy bandwidth. From disk, whole
processes with `--device cuda` are set against the same on the CPU, against mergekit with --cuda,
and against the slower of PCIe and storage, as measured here. Models have the shapes of Llama 2, in
bfloat16, with two task models. Writes results/gpu.json after every case; what it built is removed.

    python benchmarks/gpu.py [--small] [--runs 5] [--sizes 7B 13B] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measure import alternate, progress, script, surroundings

import outliermerge

RESULT = Path(__file__).parent / "results" / "gpu.json"
FILE = "model.safetensors"
# Hidden size, inner size of the MLP, layers, vocabulary (the models' config.json).
SIZES = {
    "small": (256, 688, 2, 1000),
    "7B": (4096, 11008, 32, 32000),
    "13B": (5120, 13824, 40, 32000),
}
NUM_MODELS = 2
# Parameters, and how often a merge moves a tensor's bytes: it reads base and models, for
# statistics and for the merge, and writes the result.
METHODS: dict[str, tuple[dict[str, float], int]] = {
    "min_sigma": ({}, 2 * (1 + NUM_MODELS) + 1),
    "ties": ({"weight": 0.5, "density": 0.2}, 2 * (1 + NUM_MODELS) + 1),
    "task_arithmetic": ({"weight": 0.5}, (1 + NUM_MODELS) + 1),
}
PIECE_BYTES = 1 << 23
NOTE = (
    "GB/s count every byte read or written: on the device those of each pass, from disk those of "
    "inputs read once and of the output; files are evicted from the page cache before each run; "
    "a limit is what the same bytes take at the measured bandwidth"
)


def llama_shapes(size: str, *, num_layers: int | None = None) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model by name."""
    hidden, inner, layers, vocabulary = SIZES[size]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers if num_layers is None else num_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {prefix + f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        tensors |= {
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    return tensors | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def num_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return 2 * sum(map(math.prod, shapes.values()))


def family(shape: tuple[int, ...], device: str) -> Iterator[torch.Tensor]:
    """Yield a tensor of the base and of each model."""
    base = 0.02 * torch.randn(shape, device=device)
    yield base.bfloat16()
    for _ in range(NUM_MODELS):
        yield torch.randn(shape, device=device).mul_(0.002).add_(base).bfloat16()


# Bandwidths


def seconds(work: Callable[[], object], device: str, num_runs: int) -> list[float]:
    """Return what each run takes until the device has done it, after one to warm up."""
    taken = []
    for _ in range(num_runs + 1):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return taken[1:]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def copy_rates(device: str, num_runs: int, num_bytes: int = 1 << 32) -> dict[str, float]:
    """Return GB/s of copies on the device (read and written) and to and from pinned memory."""
    on_cuda = device.startswith("cuda")
    here = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    host = torch.empty(num_bytes // 4, dtype=torch.uint8, pin_memory=on_cuda)
    part = here[: len(host)]
    works: dict[str, tuple[Callable[[], object], int]] = {
        "device_copy": (lambda: there.copy_(here), 2 * num_bytes),
        "host_to_device": (lambda: part.copy_(host, non_blocking=True), len(host)),
        "device_to_host": (lambda: host.copy_(part, non_blocking=True), len(host)),
    }
    return {
        name: round(size / statistics.median(seconds(work, device, num_runs)) / 1e9, 2)
        for name, (work, size) in works.items()
    }


def storage_rates(path: Path) -> dict[str, float]:
    """Return GB/s of reading a file that is not cached, and of writing it to the disk."""
    target = path.with_name("rate")
    size = path.stat().st_size
    starts = range(0, size, PIECE_BYTES)
    source, out = os.open(path, os.O_RDONLY), os.open(target, os.O_RDWR | os.O_CREAT)
    try:
        evict([path])
        with ThreadPoolExecutor(8) as pool:
            started = time.perf_counter()
            for _ in pool.map(lambda start: os.pread(source, PIECE_BYTES, start), starts):
                pass
            read = time.perf_counter() - started
            os.posix_fallocate(out, 0, size)
            piece = os.urandom(PIECE_BYTES)
            started = time.perf_counter()
            for _ in pool.map(lambda start: os.pwrite(out, piece, start), starts):
                pass
            os.fsync(out)
            written = time.perf_counter() - started
    finally:
        os.close(source)
        os.close(out)
        target.unlink()
    return {
        "storage_read": round(size / read / 1e9, 2),
        "storage_write": round(size / written / 1e9, 2),
    }


def evict(paths: Sequence[Path]) -> None:
    """Take files out of the page cache."""
    os.sync()
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


# On the device


def on_device(size: str, device: str, num_runs: int, copy_rate: float) -> list[dict[str, Any]]:
    """Measure merge_state_dicts, of as many layers as there is memory for."""
    layers = SIZES[size][2]
    if device.startswith("cuda"):
        whole = num_bytes(llama_shapes(size)) * (2 + NUM_MODELS)
        fits = 0.9 * torch.cuda.mem_get_info()[0] / whole
        layers = max(1, min(layers, int(layers * fits) - 1 if fits < 1 else layers))
    shapes = llama_shapes(size, num_layers=layers)
    states: list[dict[str, torch.Tensor]] = [{} for _ in range(1 + NUM_MODELS)]
    for name, shape in shapes.items():
        for state, tensor in zip(states, family(shape, device), strict=True):
            state[name] = tensor
    base, *models = states
    cases = []
    for method, (parameters, num_moves) in METHODS.items():

        def merge(method: str = method, parameters: dict[str, float] = parameters) -> None:
            outliermerge.merge_state_dicts(models, base=base, method=method, **parameters)

        taken = seconds(merge, device, num_runs)
        rate = num_moves * num_bytes(shapes) / statistics.median(taken) / 1e9
        cases.append(
            {
                "name": f"{method}-{size}-on-device",
                "layers": layers,
                "seconds": [round(each, 5) for each in taken],
                "gigabytes_per_second": round(rate, 1),
                "share_of_device_copy": round(rate / copy_rate, 3),
            }
        )
        progress(json.dumps(cases[-1]))
    return cases


# From disk to disk


def build(size: str, folder: Path, device: str) -> list[Path]:
    """Write a base model and its task models, and return their folders."""
    shapes = llama_shapes(size)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in shapes.items():
        end = place + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folders = [folder / name for name in ("base", *(f"task{i}" for i in range(NUM_MODELS)))]
    files = []
    for path in folders:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(_config(size), indent=2))
        files.append((path / FILE).open("wb"))
        files[-1].write(len(text).to_bytes(8, "little") + text)
    for shape in shapes.values():
        for file, tensor in zip(files, family(shape, device), strict=True):
            file.write(tensor.cpu().view(torch.uint8).numpy().data)
    for file in files:
        file.close()
    return folders


def _config(size: str) -> dict[str, Any]:
    hidden, inner, layers, vocabulary = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def from_disk(
    size: str, folder: Path, models: Sequence[Path], num_runs: int, rates: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Measure whole processes, each tool in turn."""
    files = [model / FILE for model in models]
    out = folder / "out"
    read = sum(file.stat().st_size for file in files)
    written = files[0].stat().st_size
    limits = {
        "pcie_seconds": max(
            read / rates["host_to_device"] / 1e9, written / rates["device_to_host"] / 1e9
        ),
        "storage_seconds": read / rates["storage_read"] / 1e9
        + written / rates["storage_write"] / 1e9,
    }

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)
        evict(files)

    for method, (parameters, _) in METHODS.items():
        spec = folder / "spec.yaml"
        entries = [{"model": str(model), "parameters": parameters} for model in models[1:]]
        content = {"merge_method": method, "base_model": str(models[0]), "models": entries}
        spec.write_text(json.dumps(content | {"dtype": "bfloat16"}))
        ours = [script("outliermerge"), "run", str(spec), "--output", str(out), "--no-load-check"]
        commands = {"cuda": [*ours, "--device", "cuda"], "cpu": [*ours, "--device", "cpu"]}
        if method != "min_sigma":  # mergekit does not have it
            theirs = [script("mergekit-yaml"), str(spec), str(out), "--no-copy-tokenizer"]
            commands["mergekit --cuda"] = [*theirs, "--cuda"]
        name = f"{method}-{size}-from-disk"
        runs, failed = alternate(commands, num_runs, before=clear, label=name)
        walls = {
            tool: statistics.median(run["wall_seconds"] for run in done)
            for tool, done in runs.items()
        }
        clear()
        yield {
            "name": name,
            "runs": runs,
            "gigabytes_per_second": {
                tool: round((read + written) / wall / 1e9, 2) for tool, wall in walls.items()
            },
            "limits": {key: round(value, 2) for key, value in limits.items()},
            "share_of_limit": {
                tool: round(max(limits.values()) / wall, 3) for tool, wall in walls.items()
            },
        } | ({"failed": failed} if failed else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=5, help="runs of each merge (default 5)")
    parser.add_argument(
        "--sizes", nargs="+", choices=[size for size in SIZES if size != "small"],
        default=["7B", "13B"], help="of the models (default both)",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="a small model only, to try it out")
    parser.add_argument("--results", type=Path, default=RESULT, help="the JSON file to write")
    parser.add_argument("--folder", type=Path, help="where to build (default: TMPDIR)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"error: no CUDA device is here for torch {torch.__version__} to measure")
    sizes = ["small"] if options.small else options.sizes
    folder = Path(tempfile.mkdtemp(prefix="outliermerge-gpu-", dir=options.folder))
    try:
        most = max(num_bytes(llama_shapes(size)) for size in sizes) * (2 + NUM_MODELS)
        if shutil.disk_usage(folder).free < 1.05 * most:
            raise SystemExit(f"error: {folder}: needs {most / 1e9:.0f} GB; give another --folder")
        report = surroundings(options.runs, also=("mergekit", "triton")) | {"note": NOTE}
        report["hardware"] += f", {torch.cuda.get_device_name()} × {torch.cuda.device_count()}"
        report["versions"]["cuda"] = torch.version.cuda
        report["rates"] = copy_rates("cuda", options.runs, 1 << 24 if options.small else 1 << 32)
        report["cases"] = []

        def save(case: dict[str, Any]) -> None:
            report["cases"].append(case)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(report, indent=1) + "\n")

        for size in sizes:
            for case in on_device(size, "cuda", options.runs, report["rates"]["device_copy"]):
                save(case)
            torch.cuda.empty_cache()
            models = build(size, folder / size, "cuda")
            report["rates"] |= storage_rates(models[0] / FILE)
            for case in from_disk(size, folder, models, options.runs, report["rates"]):
                save(case)
            shutil.rmtree(folder / size)
        progress(f"wrote {options.results}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
