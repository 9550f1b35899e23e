"""A model type for lmms-eval: `llava_hf` loaded in 8 bit, as arXiv 2501.10661 evaluated.

lmms-eval finds it by the entry point group `lmms_eval.models`, because its own `llava_hf` takes no
quantisation settings. LLM.int8() of bitsandbytes (arXiv 2208.07339) stores linear layers in 8 bit,
except those that transformers excludes by itself (the head).
"""

from __future__ import annotations

from typing import Any

MODEL_TYPE = "llava_hf_8bit"


def manifest() -> Any:
    """Return the entry point's payload."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL_TYPE, chat_class_path=f"{__name__}.LlavaHf8Bit")


def __getattr__(name: str) -> Any:
    # The class is made when lmms-eval asks for it, so that only lmms-eval's process imports
    # lmms-eval.
    if name == "LlavaHf8Bit":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _model_class() -> type:
    from lmms_eval.models.chat import llava_hf
    from lmms_eval.models.simple import llava_hf as simple
    from transformers import BitsAndBytesConfig

    class LlavaHf8Bit(llava_hf.LlavaHf):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            quantization = BitsAndBytesConfig(load_in_8bit=True)
            plain = dict(simple.model_map)
            simple.model_map.update(
                (name, _Quantized(model, quantization)) for name, model in plain.items()
            )
            try:
                super().__init__(**arguments)
            finally:
                simple.model_map.update(plain)

    return LlavaHf8Bit


class _Quantized:
    """Stands for a model class: loads it with quantisation settings."""

    def __init__(self, model: Any, quantization: Any) -> None:
        self._model, self._quantization = model, quantization

    def from_pretrained(self, path: str, **arguments: Any) -> Any:
        """Load the model in 8 bit, onto its device at once."""
        return self._model.from_pretrained(
            path, quantization_config=self._quantization, **arguments
        )
