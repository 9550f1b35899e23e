"""What the CPU kernels cost: nanoseconds of one core for each element of the output.

A base and two task models in bfloat16, in pieces that fit in a core's L2 cache, so that reading and
writing files is left out. Writes results/kernels.json.

    python benchmarks/kernels.py [--against KERNELS.so] [--only ties]
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import progress, surroundings

from outliermerge.engines.kernels import find_kernels
from outliermerge.methods.context import Context
from outliermerge.methods.kernel_call import SPARE_BYTES, packed, packed_keys

RESULT = Path(__file__).parent / "results" / "kernels.json"
COLUMNS = 896  # of a row, for DELLA; as in a model of 0.5B
NUM = 146 * COLUMNS
NUM_RUNS = 40
NOTE = "the least of 40 runs in turn, in time of one core; two task models and a base, bfloat16"


def sources() -> list[Any]:
    """Draw weights and changes as build_checkpoints.py does, as bits of bfloat16."""
    generator = np.random.default_rng(0)
    base = generator.standard_normal(NUM) * 0.02
    models = [base, *(base + generator.standard_normal((2, NUM)) * 0.002)]
    bits = [model.astype(np.float32).view(np.uint32) for model in models]
    return [((b + 0x7FFF + (b >> 16 & 1)) >> 16).astype(np.uint16) for b in bits]


def calls(kernels: Any, raws: list[Any]) -> dict[str, Callable[[], Any]]:
    """Return what is measured, by name."""
    weights, *others = [(raw.astype(np.uint32) << 16).view(np.float32) for raw in raws]
    sizes = [np.abs(other - weights) for other in others]
    spread = ((others[0] - others[1]) / 2) ** 2

    def at(share: float) -> list[float]:
        return [float(np.quantile(size, share)) for size in sizes]

    def low(value: float) -> int:
        return int((int(np.float32(value).view(np.uint32)) >> 16 << 16) - (1 << 16))

    context = Context("w", (NUM // COLUMNS, COLUMNS))
    keys, rows = packed_keys([context.keys(model) for model in range(2)]), (COLUMNS, COLUMNS)
    deltas, plain = (b"bbb", tuple(raws), NUM, True), (b"bb", tuple(raws[:2]), NUM, False)
    out, half = np.zeros(NUM, np.uint16), [0.5, 0.5]
    narrow = [np.zeros((3 << 16) + 1, np.uint64) for _ in range(4)]
    wide = tuple(np.zeros((1 << 15) + 1, np.uint64) for _ in range(2))
    kept_bits = (
        (bytearray(2 * (NUM // 8 + SPARE_BYTES)),) if "[, kept]" in kernels.drawn.__doc__ else ()
    )
    della = [1, 1, 1, 1, 0], half + half + [0.15, 0.15] + half
    kept, least, most, varied = at(0.8), at(0.1), at(0.99), float(np.quantile(spread, 0.9))

    def merge(name: str, scalars: list[float], vectors: list[float], block: Any = deltas,
              more: tuple[int, ...] = ()) -> Callable[[], Any]:  # fmt: skip
        variant = (name, packed(scalars), packed(vectors), "b", out, keys, 0, *more)
        return lambda: kernels.merge(block, (variant,))

    return {
        "copy of one model": lambda: kernels.copy("b", raws[0], NUM, out),
        "linear, slerp: merge": merge("weighted_sum", [], half, plain),
        "task_arithmetic, model_stock: merge": merge("weighted_sum", [], half),
        "slerp: inner products": lambda: kernels.gram(plain, False),
        "model_stock: inner products": lambda: kernels.gram(deltas, False),
        "ties: count in a sample": lambda: kernels.histogram(deltas, (0, 0), 16, wide),
        "ties: count in a window": lambda: kernels.histogram(
            deltas, tuple(map(low, kept)), 0, tuple(narrow[:2])
        ),
        "ties: merge": merge("ties", [1, 1], half + kept + half),
        "ties, weights 0.4: merge": merge("ties", [1, 1], [0.4, 0.4, *kept, *half]),
        "breadcrumbs: count in two windows": lambda: kernels.histogram(
            deltas, tuple(map(low, least + most)), 0, tuple(narrow)
        ),
        "breadcrumbs: merge": merge("breadcrumbs", [1, 0, 0, 1], half + least + most + half),
        "dare_linear: merge": merge("dare", [1, 0, 0, 1], half + half + [2, 2] + half),
        "dare_ties: merge": merge("dare", [1, 0, 1, 1], half + half + [2, 2] + half),
        "della: norms": lambda: kernels.drawn(
            deltas, 0, packed(half), packed([0.15, 0.15]), keys, *rows, *kept_bits
        ),
        "della: merge": merge("della", *della, more=(*rows, *kept_bits)),
        "della: merge, ranking once more": merge("della", *della, more=rows),
        "sce: count in a window, and add up squares": lambda: kernels.variances(
            deltas, low(varied), 0, narrow[0]
        ),
        "sce: sums of squares": lambda: kernels.squares(deltas, varied),
        "sce: merge": merge("sce", [varied, 0], half),
        "nuslerp by rows: merge": merge("nuslerp_rows", [], half, more=rows),
        "model_stock by rows: merge": merge("model_stock_rows", [0], [], more=rows),
        "arcee_fusion: count": lambda: kernels.importance(plain, 0, COLUMNS, (0,), 16, (wide[0],)),
        "arcee_fusion: merge": merge("arcee_fusion", [1e-6], [], plain, more=rows),
    }


def loaded(path: Path) -> Any:
    """Load other kernels beside those of the package; their name is that of the file."""
    name = path.name.partition(".")[0]
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def measured(call: Callable[[], Any]) -> float:
    started = time.thread_time()
    call()
    return (time.thread_time() - started) / NUM * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument("--against", type=Path, help="other kernels, measured in turn with these")
    parser.add_argument("--only", default="", metavar="TEXT", help="calls with it in their name")
    parser.add_argument("--results", type=Path, default=RESULT, help="the JSON file to write")
    options = parser.parse_args()
    raws, modules = sources(), {"nanoseconds": find_kernels()}
    if options.against:
        modules["nanoseconds before"] = loaded(options.against)
    by_module = {key: calls(module, raws) for key, module in modules.items()}
    cases = {}
    for name in by_module["nanoseconds"]:
        if options.only not in name:
            continue
        runs = [{key: measured(own[name]) for key, own in by_module.items()}
                for _ in range(NUM_RUNS)]  # fmt: skip
        cases[name] = {key: round(min(run[key] for run in runs), 3) for key in by_module}
        progress(f"{name}: {cases[name]}")
    report = surroundings(NUM_RUNS) | {"note": NOTE, "cases": cases}
    options.results.write_text(json.dumps(report, indent=1) + "\n")
    progress(f"wrote {options.results}")


if __name__ == "__main__":
    main()
