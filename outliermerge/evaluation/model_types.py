"""The model types of lmms-eval that evaluate a checkpoint from a folder, and their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import util
from typing import Any

from outliermerge.errors import OutlierMergeError


@dataclass(frozen=True)
class ModelType:
    """The arguments of a model type of lmms-eval 0.7.3.

    Attributes:
        path_argument: the name of the argument for the checkpoint.
        takes_dtype: whether it has an argument `dtype`.
        takes_device: whether it has the arguments `device` and `device_map`.
        one_at_a_time: whether it refuses batches.
        model_8bit: the model type that loads it in 8 bit, if there is one.
        packages: the packages that it imports besides transformers.
        architectures: the `model_type` of the configs that it loads; empty if it loads all.
    """

    path_argument: str
    takes_dtype: bool = True
    takes_device: bool = True
    one_at_a_time: bool = False
    model_8bit: str | None = None
    packages: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()


MODEL_TYPES = {
    "llava_hf": ModelType(
        "pretrained",
        one_at_a_time=True,
        model_8bit="llava_hf_8bit",
        packages=("decord",),
        architectures=("llava", "llava_next", "llava_onevision"),
    ),
    "qwen2_5_vl": ModelType(
        "pretrained",
        takes_dtype=False,
        packages=("qwen_vl_utils", "torchvision"),
        architectures=("qwen2_5_vl",),
    ),
    "vllm": ModelType("model", takes_device=False, packages=("vllm",)),
}


def check_packages(model_type: str, *, load_in_8bit: bool) -> None:
    """Refuse a model type whose packages are not installed.

    Raises:
        OutlierMergeError: packages are missing; the message names them.
    """
    wanted = (*MODEL_TYPES[model_type].packages, *(["bitsandbytes"] if load_in_8bit else []))
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
) -> tuple[str, dict[str, Any]]:
    """Return the model type to ask lmms-eval for, and its arguments.

    >>> model_arguments("llava_hf", path="m", device="cpu", dtype="float32", load_in_8bit=False,
    ...                 extra={})
    ('llava_hf', {'pretrained': 'm', 'device': 'cpu', 'device_map': 'cpu', 'dtype': 'float32'})
    """
    kind = MODEL_TYPES[model_type]
    arguments: dict[str, Any] = {kind.path_argument: path}
    if kind.takes_device:
        # Without a device map, llava_hf puts the weights on any accelerator that it finds.
        arguments |= {"device": device, "device_map": device}
    if kind.takes_dtype:
        arguments["dtype"] = dtype
    name = kind.model_8bit if load_in_8bit and kind.model_8bit else model_type
    return name, arguments | extra
