"""The harnesses, and their model types that evaluate a checkpoint from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from typing import Any, Literal

from outliermerge.errors import OutlierMergeError

HarnessName = Literal["lmms_eval", "lm_eval"]


@dataclass(frozen=True)
class ModelType:
    """The arguments of a harness's model type.

    Attributes:
        path_argument: the name of the argument for the checkpoint.
        takes_dtype: whether it has an argument `dtype`.
        device_arguments: the names of its arguments for the device.
        one_at_a_time: whether it refuses batches.
        own_batches: whether it makes batches by itself.
        model_8bit: the model type that loads it in 8 bit, if there is one.
        packages: the packages that it imports besides transformers.
        architectures: the `model_type` of the configs that it loads; empty if it loads all.
        own_code: whether it runs the Python files of the checkpoint.
        ignores: generation settings that it does not read, of those that others read.
    """

    path_argument: str = "pretrained"
    takes_dtype: bool = True
    # Without a device map, llava_hf puts the weights on any accelerator that it finds.
    device_arguments: tuple[str, ...] = ("device", "device_map")
    one_at_a_time: bool = False
    own_batches: bool = False
    model_8bit: str | None = None
    packages: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    own_code: bool = False
    ignores: tuple[str, ...] = ()


_QWEN = ("qwen_vl_utils", "torchvision", "decord")

# Those of lmms-eval 0.7.3. internvl2 always computes in bfloat16 on a GPU.
MODEL_TYPES = {
    "llava_hf": ModelType(
        one_at_a_time=True,
        model_8bit="llava_hf_8bit",
        packages=("decord",),
        architectures=("llava", "llava_next", "llava_onevision"),
    ),
    "internvl2": ModelType(
        takes_dtype=False,
        one_at_a_time=True,
        packages=("torchvision", "decord", "timm", "einops"),
        architectures=("internvl_chat",),
        own_code=True,
        ignores=("temperature", "top_p", "until"),
    ),
    "qwen2_vl": ModelType(takes_dtype=False, packages=_QWEN, architectures=("qwen2_vl",)),
    "qwen2_5_vl": ModelType(
        takes_dtype=False, packages=("qwen_vl_utils", "torchvision"), architectures=("qwen2_5_vl",)
    ),
    "qwen3_vl": ModelType(
        takes_dtype=False,
        packages=_QWEN,
        architectures=("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    ),
    "vllm": ModelType("model", device_arguments=(), packages=("vllm",)),
}
# Those of lm-eval 0.4.13.
_TEXT_MODEL_TYPES = {
    "hf": ModelType(device_arguments=("device",), model_8bit="hf_8bit", packages=("accelerate",)),
    "vllm": ModelType(device_arguments=(), own_batches=True, packages=("vllm",)),
}


@dataclass(frozen=True)
class Harness:
    """A program that asks models the questions of benchmarks.

    Attributes:
        title: its name in messages.
        package: its name for `pip`.
        extra: the extra of this package that installs it.
        worker: the module that runs it.
        model_types: its model types by their names, the default one first.
        generation: the generation settings that its model types read; they pass over all others.
    """

    title: str
    package: str
    extra: str
    worker: str
    model_types: Mapping[str, ModelType]
    generation: tuple[str, ...]


HARNESSES: dict[str, Harness] = {
    "lmms_eval": Harness(
        title="lmms-eval",
        package="lmms-eval",
        extra="eval",
        worker="outliermerge.evaluation.lmms_worker",
        model_types=MODEL_TYPES,
        generation=("do_sample", "max_new_tokens", "num_beams", "temperature", "top_p", "until"),
    ),
    "lm_eval": Harness(
        title="lm-eval",
        package="lm_eval",
        extra="eval-text",
        worker="outliermerge.evaluation.text_worker",
        model_types=_TEXT_MODEL_TYPES,
        # Of several names for the number of tokens, it obeys `max_gen_toks`, which tasks use.
        generation=("do_sample", "max_gen_toks", "num_beams", "temperature", "top_k", "top_p",
                    "until"),
    ),
}  # fmt: skip


def check_packages(
    model_type: str, *, load_in_8bit: bool, harness: HarnessName = "lmms_eval"
) -> None:
    """Refuse a model type whose packages are not installed.

    Raises:
        OutlierMergeError: packages are missing; the message names them.
    """
    kind = HARNESSES[harness].model_types[model_type]
    wanted = (*kind.packages, *(["bitsandbytes"] if load_in_8bit else []))
    if absent := [name for name in wanted if util.find_spec(name) is None]:
        names = " ".join(name.replace("_", "-") for name in absent)
        raise OutlierMergeError(
            f"{model_type}{' in 8 bit' if load_in_8bit else ''} needs packages that are not "
            f"installed here: pip install {names}"
        )


def model_arguments(
    model_type: str,
    *,
    path: str,
    device: str,
    dtype: str,
    load_in_8bit: bool,
    extra: dict[str, Any],
    harness: HarnessName = "lmms_eval",
) -> tuple[str, dict[str, Any]]:
    """Return the model type to ask a harness for, and its arguments.

    >>> model_arguments("llava_hf", path="m", device="cpu", dtype="float32", load_in_8bit=False,
    ...                 extra={})
    ('llava_hf', {'pretrained': 'm', 'device': 'cpu', 'device_map': 'cpu', 'dtype': 'float32'})
    """
    kind = HARNESSES[harness].model_types[model_type]
    arguments: dict[str, Any] = {kind.path_argument: path}
    arguments |= dict.fromkeys(kind.device_arguments, device)
    if kind.takes_dtype:
        arguments["dtype"] = dtype
    name = kind.model_8bit if load_in_8bit and kind.model_8bit else model_type
    return name, arguments | extra
