"""Plans a merge of models as large as DeepSeek-V3 from headers alone, and says what it would take.

The files have the names and shapes of the real ones, in FP8 with scales, and are sparse: a server
on the loopback has no more to give than the headers. The plan is the real one.

    python benchmarks/headers.py [--latency 30] [--line 1] [--work 10]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import progress, surroundings

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


def measured(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from range_server import RangeServer

    import outliermerge
    from outliermerge.output.cost import Machine, cost_of

    names = ("base", "one", "two")
    num_bytes = save_headers(folder / "bucket" / names[0])
    for name in names[1:]:
        shutil.copytree(
            folder / "bucket" / names[0], folder / "bucket" / name, copy_function=os.link
        )
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    with RangeServer(folder, latency_seconds=options.latency / 1000) as server:
        os.environ |= server.s3()
        spec = {
            "merge_method": "task_arithmetic",
            "base_model": "s3://bucket/base",
            "models": [{"model": f"s3://bucket/{name}"} for name in names[1:]],
            "dtype": "bfloat16",
        }
        before, began = time.process_time(), time.perf_counter()
        plan = outliermerge.plan(spec)
        wall, cpu = time.perf_counter() - began, time.process_time() - before
        asked = len(server.ranges)
    machine = Machine(
        line_bytes=options.line * 1e9,
        disk_bytes=options.line * 1e9,
        latency_seconds=options.latency / 1000,
        work_bytes=options.work * 1e9,
    )
    costs = [cost_of(plan, number, machine) for number in MACHINES]
    return {
        **surroundings(1, also=["obstore"]),
        "model_gigabytes": round(num_bytes / 1e9, 1),
        "num_tensors": len(plan.jobs),
        "num_parameters": plan.num_parameters,
        "read_gigabytes": round(plan.num_read_bytes / 1e9, 1),
        "written_gigabytes": round(plan.num_written_bytes / 1e9, 1),
        "plan_wall_seconds": round(wall, 1),
        "plan_cpu_seconds": round(cpu, 1),  # the server's are among them
        "plan_requests": asked,
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
        "line_gigabytes_per_second": options.line,
        "latency_milliseconds": options.latency,
        "work_gigabytes_per_second": options.work,
        "costs": [cost.as_dict() for cost in costs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
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
