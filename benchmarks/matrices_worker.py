"""One merge of matrices.py or randomized.py: by FOLDER/NAME.json, into FOLDER/NAME.

    python benchmarks/matrices_worker.py NAME FOLDER

By FusionBench if that is the name, else by this package.

Prints what reading, merging and writing took, without the imports.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


def ours(output: Path, spec: dict[str, Any]) -> Callable[[], None]:
    """Return the merge by this package, as its command does it."""
    from outliermerge import run as merge

    def run() -> None:
        merge(spec, output=output, threads=torch.get_num_threads(), memory="8GiB")

    return run


def theirs(output: Path, spec: dict[str, Any]) -> Callable[[], None]:
    """Return the merge by FusionBench's functions, which take all models in memory."""
    warnings.simplefilter("ignore")
    method, parameters = spec["merge_method"], spec["parameters"]
    merge = _wudi(parameters["iterations"]) if method == "wudi" else FUSION_BENCH[method]()

    def run() -> None:
        models = [load_file(Path(one["model"]) / "model.safetensors") for one in spec["models"]]
        more = [
            load_file(Path(path) / "model.safetensors")
            for one in spec["models"]
            for path in one.get("auxiliary", {}).values()
        ]
        base = load_file(output.with_name("base") / "model.safetensors")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            merged = merge(base, models, more)
        output.mkdir()
        whole = {name: tensor.detach().contiguous() for name, tensor in merged.items()}
        save_file(whole, output / "model.safetensors", {"format": "pt"})

    return run


def _of_deltas(merge: Callable[[list[State], list[str]], State]) -> Callable[..., State]:
    """Return the merge of a base and models by what merges task vectors.

    It is told which tensors are of two dimensions and yet no matrices to us: those of tokens.
    """
    from fusion_bench.utils.state_dict_arithmetic import state_dict_add, state_dict_sub

    def merged(base: State, models: list[State], more: list[State]) -> State:
        of_tokens = [name for name in base if "embed_tokens" in name]
        deltas = [state_dict_sub(model, base) for model in models]
        return state_dict_add(base, merge(deltas, of_tokens))

    return merged


def _iso_c() -> Callable[..., State]:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c

    return _of_deltas(lambda deltas, apart: iso_c(deltas, accelerator="cpu", exclude_keys=apart))


def _iso_cts() -> Callable[..., State]:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_cts

    return _of_deltas(
        lambda deltas, apart: iso_cts(deltas, 0.8, accelerator="cpu", exclude_keys=apart)
    )


def _tsv_m() -> Callable[..., State]:
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import (
        compute_and_sum_svd_mem_reduction,
    )

    return _of_deltas(
        lambda deltas, apart: compute_and_sum_svd_mem_reduction(deltas, apart, accelerator="cpu")
    )


def _wudi(iterations: int) -> Callable[..., State]:
    from fusion_bench.method.wudi import wudi_merging

    return _of_deltas(lambda deltas, apart: wudi_merging(deltas, "cpu", iterations, apart))


def _task_arithmetic() -> Callable[..., State]:
    from fusion_bench.utils.state_dict_arithmetic import state_dict_add

    def summed(deltas: list[State], apart: list[str]) -> State:
        total = deltas[0]
        for delta in deltas[1:]:
            total = state_dict_add(total, delta)
        return total

    return _of_deltas(summed)


def _ties() -> Callable[..., State]:
    from fusion_bench.method.ties_merging.ties_merging_utils import (
        state_dict_to_vector,
        ties_merging,
        vector_to_state_dict,
    )

    def merged(base: State, models: list[State], more: list[State]) -> State:
        flat = state_dict_to_vector(base)
        deltas = torch.vstack([state_dict_to_vector(model) for model in models]) - flat
        found = flat + ties_merging(deltas, reset_thresh=0.2, merge_func="mean")
        return dict(vector_to_state_dict(found, base))

    return merged


def _by_name(models: list[State]) -> dict[str, list[Tensor]]:
    return {name: [model[name] for model in models] for name in models[0]}


def _regmean() -> Callable[..., State]:
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    def merged(base: State, models: list[State], more: list[State]) -> State:
        grams = [{name.removesuffix(".weight"): one for name, one in own.items()} for own in more]
        return dict(merging_with_regmean_weights(_by_name(models), grams, 0.9))

    return merged


def _fisher() -> Callable[..., State]:
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    def merged(base: State, models: list[State], more: list[State]) -> State:
        equal = torch.ones(len(models)) / len(models)
        return dict(merging_with_fisher_weights(_by_name(models), more, equal, False, 1e-6))

    return merged


FUSION_BENCH: dict[str, Callable[[], Callable[..., State]]] = {
    "iso_c": _iso_c,
    "iso_cts": _iso_cts,
    "tsv_m": _tsv_m,
    "regmean": _regmean,
    "fisher": _fisher,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
}


def main() -> None:
    tool, folder = sys.argv[1], Path(sys.argv[2])
    spec = json.loads((folder / f"{tool}.json").read_text())
    shutil.rmtree(folder / tool, ignore_errors=True)
    run = (theirs if tool == "FusionBench" else ours)(folder / tool, spec)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    took = {
        "work_seconds": time.perf_counter() - wall,
        "work_cpu_seconds": time.process_time() - cpu,
    }
    print(json.dumps(took))


if __name__ == "__main__":
    main()
