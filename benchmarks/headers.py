"""Plans a merge of models as large as DeepSeek-V3 from headers alone, and says what it would take.

The files have the names and shapes of the real ones, in FP8 with scales, and are sparse: a server
on the loopback has no more to give than the headers. The plan is the real one: of local files,
and from the server. A run of local files is ended when it would read its first tensor.

    python benchmarks/headers.py [--runs 3] [--latency 30] [--line 1] [--work 10]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from measure import medians, progress, surroundings

from outliermerge.checkpoint.formats.safetensors_file import make_header
from outliermerge.checkpoint.sources import DTYPES

RESULT = Path(__file__).parent / "results" / "headers.json"
MACHINES = (1, 4, 16, 64)
SHARD_BYTES = 4_300_000_000
HIDDEN, VOCABULARY, LAYERS, DENSE_LAYERS, EXPERTS = 7168, 129280, 61, 3, 256
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": HIDDEN,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "first_k_dense_replace": DENSE_LAYERS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_attention_heads": 128,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
Tensor = tuple[str, Any, tuple[int, ...]]


def _codes(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    yield f"{name}.weight", DTYPES["float8_e4m3fn"], (rows, columns)
    yield f"{name}.weight_scale_inv", DTYPES["float32"], (-(-rows // 128), -(-columns // 128))


def _mlp(name: str, inner: int) -> Iterator[Tensor]:
    for part in ("gate_proj", "up_proj"):
        yield from _codes(f"{name}.{part}", inner, HIDDEN)
    yield from _codes(f"{name}.down_proj", HIDDEN, inner)


def tensors() -> Iterator[Tensor]:
    """Yield the names, dtypes and shapes of DeepSeek-V3, the layer that foretells tokens, too."""
    short = DTYPES["bfloat16"]
    vocabulary = short, (VOCABULARY, HIDDEN)
    yield "model.embed_tokens.weight", *vocabulary
    for number in range(LAYERS + 1):
        at = f"model.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{norm}.weight", short, (HIDDEN,)
        yield from _codes(f"{at}.self_attn.q_a_proj", 1536, HIDDEN)
        yield f"{at}.self_attn.q_a_layernorm.weight", short, (1536,)
        yield from _codes(f"{at}.self_attn.q_b_proj", 128 * 192, 1536)
        yield from _codes(f"{at}.self_attn.kv_a_proj_with_mqa", 576, HIDDEN)
        yield f"{at}.self_attn.kv_a_layernorm.weight", short, (512,)
        yield from _codes(f"{at}.self_attn.kv_b_proj", 128 * 256, 512)
        yield from _codes(f"{at}.self_attn.o_proj", HIDDEN, 128 * 128)
        if number < DENSE_LAYERS:
            yield from _mlp(f"{at}.mlp", 18432)
            continue
        yield f"{at}.mlp.gate.weight", short, (EXPERTS, HIDDEN)
        yield f"{at}.mlp.gate.e_score_correction_bias", DTYPES["float32"], (EXPERTS,)
        for expert in range(EXPERTS):
            yield from _mlp(f"{at}.mlp.experts.{expert}", 2048)
        yield from _mlp(f"{at}.mlp.shared_experts", 2048)
    at = f"model.layers.{LAYERS}"
    yield f"{at}.embed_tokens.weight", *vocabulary
    yield f"{at}.enorm.weight", short, (HIDDEN,)
    yield f"{at}.hnorm.weight", short, (HIDDEN,)
    yield f"{at}.eh_proj.weight", short, (HIDDEN, 2 * HIDDEN)
    yield f"{at}.shared_head.norm.weight", short, (HIDDEN,)
    yield f"{at}.shared_head.head.weight", *vocabulary
    yield "model.norm.weight", short, (HIDDEN,)
    yield "lm_head.weight", *vocabulary


def save_headers(folder: Path) -> int:
    """Save a model whose tensors are holes in sparse files; return the bytes that it pretends."""
    folder.mkdir(parents=True)
    shards: list[list[Tensor]] = [[]]
    sizes = [0]
    for name, dtype, shape in tensors():
        num_bytes = math.prod(shape) * dtype.num_bytes
        if sizes[-1] + num_bytes > SHARD_BYTES:
            shards.append([])
            sizes.append(0)
        shards[-1].append((name, dtype, shape))
        sizes[-1] += num_bytes
    weight_map = {}
    for number, (shard, num_bytes) in enumerate(zip(shards, sizes, strict=True), 1):
        file = f"model-{number:05}-of-{len(shards):06}.safetensors"
        header, _ = make_header(shard)
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + num_bytes)
        weight_map |= {name: file for name, _, _ in shard}
    total = sum(sizes)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return total


def planned(spec: dict[str, Any]) -> tuple[dict[str, float], Any]:
    """Return what a plan takes in this process, which has done nothing before, and the plan."""
    import outliermerge

    outliermerge.plan  # noqa: B018 - its modules are loaded before
    cpu, wall = time.process_time(), time.perf_counter()
    plan = outliermerge.plan(spec)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall_seconds": wall, "cpu_seconds": cpu, "megabytes": _peak_megabytes()}, plan


class _FirstTensorError(Exception):
    """Ends a run when it would read its first tensor."""


def started(spec: dict[str, Any], output: Path) -> dict[str, float]:
    """Return what a run takes in this process until it would read its first tensor.

    The output's files are holes, as no disk is at hand that has room for them.
    """
    import outliermerge
    from outliermerge.execution import threads
    from outliermerge.output import folder, writer

    def run_all(*arguments: Any, **options: Any) -> None:
        raise _FirstTensorError

    folder.free_disk_bytes = lambda path: 2**60
    writer.reserve = os.ftruncate
    threads.run_all = run_all
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        outliermerge.run(spec, output=output)
    except _FirstTensorError:
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall_seconds": wall, "cpu_seconds": cpu, "megabytes": _peak_megabytes()}


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a new process, so that nothing else is measured."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def spec_of(models: str) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic",
        "base_model": f"{models}/base",
        "models": [{"model": f"{models}/{name}"} for name in ("one", "two")],
        "dtype": "bfloat16",
    }


def plan_locally(folder: Path) -> dict[str, float]:
    return planned(spec_of(f"{folder}/bucket"))[0]


def start_locally(folder: Path) -> dict[str, float]:
    return started(spec_of(f"{folder}/bucket"), folder / "out")


def plan_from_bucket(environment: dict[str, str]) -> dict[str, float]:
    os.environ |= environment
    return planned(spec_of("s3://bucket"))[0]


def foretold(environment: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Return what the merge would take from a bucket, on some numbers of machines."""
    from outliermerge.output.cost import Machine, cost_of

    os.environ |= environment
    plan = planned(spec_of("s3://bucket"))[1]
    machine = Machine(
        line_bytes=options.line * 1e9,
        disk_bytes=options.line * 1e9,
        latency_seconds=options.latency / 1000,
        work_bytes=options.work * 1e9,
    )
    return {
        "num_tensors": len(plan.jobs),
        "num_parameters": plan.num_parameters,
        "read_gigabytes": round(plan.num_read_bytes / 1e9, 1),
        "written_gigabytes": round(plan.num_written_bytes / 1e9, 1),
        "costs": [cost_of(plan, number, machine).as_dict() for number in MACHINES],
    }


def measured(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from range_server import RangeServer

    around = surroundings(options.runs, also=["obstore"])
    num_bytes = save_headers(folder / "bucket/base")
    for name in ("one", "two"):
        shutil.copytree(folder / "bucket/base", folder / "bucket" / name, copy_function=os.link)
    runs: dict[str, list[dict[str, float]]] = {"local": [], "start": [], "bucket": []}
    with RangeServer(folder, latency_seconds=options.latency / 1000) as server:
        environment = server.s3() | {"XDG_CACHE_HOME": str(folder / "cache")}
        for _ in range(options.runs):
            runs["local"].append(in_process(plan_locally, folder))
            runs["start"].append(in_process(start_locally, folder))
            shutil.rmtree(folder / "cache", ignore_errors=True)
            server.ranges.clear()
            runs["bucket"].append(in_process(plan_from_bucket, environment))
            for path in folder.glob("out.partial*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            progress(
                ", ".join(f"{name} {each[-1]['wall_seconds']:.1f} s" for name, each in runs.items())
            )
        asked = len(server.ranges)
        costs = in_process(foretold, environment, options)
    return {
        **around,
        "model_gigabytes": round(num_bytes / 1e9, 1),
        **{name: medians(each) for name, each in runs.items()},
        "plan_requests": asked,
        "line_gigabytes_per_second": options.line,
        "latency_milliseconds": options.latency,
        "work_gigabytes_per_second": options.work,
        **costs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=3, help="of each (default 3)")
    parser.add_argument("--latency", type=float, default=30, help="milliseconds (default 30)")
    parser.add_argument(
        "--line", type=float, default=1, help="gigabytes a second of a machine (default 1)"
    )
    parser.add_argument(
        "--work", type=float, default=10, help="gigabytes that it computes a second (default 10)"
    )
    parser.add_argument("--results", type=Path, default=RESULT, help="the JSON file to write")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="outliermerge-bench-"))
    try:
        result = measured(folder, options)
    finally:
        shutil.rmtree(folder)
    options.results.write_text(json.dumps(result, indent=1) + "\n")
    progress(f"wrote {options.results}")


if __name__ == "__main__":
    main()
