"""What a spec says of a quantised output."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from outliermerge.spec.settings import SettingError

AS_BASE = "as-base"
Q8 = "q8_0"
OF_GGUF = "q8_0, with `format: gguf`: leave it out, and llama.cpp's llama-quantize makes others"
_PER = {"fp8": ("channel", "tensor", "block"), "int8": ("channel",)}
_METHODS = {
    "fp8": ("compressed-tensors", "fp8"),
    "int8": ("compressed-tensors",),
    "mxfp4": ("compressed-tensors",),
}
_WORDS = ("fp8", "int8", "mxfp4", AS_BASE, Q8)


class QuantizeEntry(BaseModel):
    """The output's weights are quantised."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    to: Literal["fp8", "int8", "mxfp4", "as-base", "q8_0"] = Field(
        description="`fp8` (E4M3), `int8`, `mxfp4` (4 bits, a scale for 32), or `as-base`: the "
        "format in which the base model is stored. With `format: gguf` it is `q8_0`."
    )
    per: Literal["channel", "tensor", "block"] | None = Field(
        default=None,
        description="What has a scale: `channel` (a row of a weight, the default), `tensor`, or "
        "`block` (128 × 128). int8 has `channel` only.",
    )
    quant_method: Literal["compressed-tensors", "fp8"] | None = Field(
        default=None,
        description="Whose names and config the output has: `compressed-tensors` (default), or "
        "`fp8`: those of DeepSeek-V3, with `weight_scale_inv`, for `fp8` per block.",
    )
    ignore: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="Parts of the names of further tensors that are not quantised. Embeddings, "
        "heads, norms, routers, vision towers and projectors never are.",
    )

    @property
    def scale_of(self) -> str:
        """What has a scale."""
        return self.per or ("block" if self.quant_method == "fp8" else "channel")


class _WordOrEntry:
    """The JSON schema of a value that may be only what weights are quantised to."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Any:
        return {"anyOf": [{"enum": [*_WORDS]}, handler(core)]}


QuantizeField = Annotated[
    QuantizeEntry,
    _WordOrEntry(),
    BeforeValidator(lambda value: {"to": value} if isinstance(value, str) else value),
    PlainSerializer(lambda entry: _as_word(entry.model_dump(exclude_defaults=True))),
]


def _as_word(entry: dict[str, Any]) -> Any:
    return entry if entry.keys() - {"to"} else entry["to"]


def check_quantize(entry: QuantizeEntry | None, format_: str) -> None:
    """Refuse keys that do not go together.

    Args:
        format_: of the output's files.

    Raises:
        SettingError: there are such keys.
    """
    if entry is None:
        return
    if (entry.to == Q8) != (format_ == "gguf"):
        expected = OF_GGUF if format_ == "gguf" else "`format: gguf` with it"
        raise SettingError(("quantize",), f"found '{entry.to}', expected {expected}")
    for key, choices in {"per": _PER, "quant_method": _METHODS}.items():
        value, valid = getattr(entry, key), choices.get(entry.to, ())
        if value is not None and value not in valid:
            expected = " or ".join(valid) if valid else "nothing"
            said = f"found '{value}', expected {expected}, for `to: {entry.to}`"
            raise SettingError(("quantize", key), said)
    if entry.to in (AS_BASE, Q8) and entry.ignore:
        raise SettingError(
            ("quantize", "ignore"), f"`to: {entry.to}` leaves no choice: leave this out"
        )
    if entry.quant_method == "fp8" and entry.scale_of != "block":
        raise SettingError(
            ("quantize", "per"),
            f"found '{entry.per}', expected block, which `quant_method: fp8` needs",
        )
