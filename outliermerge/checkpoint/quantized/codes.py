"""Finds tensors of quantisation codes, which a companion tensor turns into weights.

It looks at the structure, not at names: a tensor of float8 or integers, and in the same module (or
under the tensor's own name) a tensor whose shape fits a scale, a zero point or a lookup table.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping

from outliermerge.checkpoint.sources import EXPONENTS, TensorMeta
from outliermerge.errors import OutlierMergeError, listing

# Names of companions. They count with any shape, because scales can be swizzled.
_NAMED = re.compile(
    r"scales?(?![a-z])|absmax|amax|quant|qdata|codebook|centroid|exponent|factor"
    r"|(^|[._])(scb|luts?|zp|q?zeros?|zero_?points?)([._]|$)",
    re.IGNORECASE,
)
# A module that is only cast to float8 may keep its bias or norm in another dtype, and a float16
# bias (R,) next to a float8 weight (R, C) has the shape of a scale per row. So tensors with these
# names, which ordinary modules have besides a matrix, are not companions. Any other tensor that
# fits by shape is one.
_PLAIN = re.compile(
    r"bias(?!es)|gamma|beta|running|norm|embed|token|mask|freq|position|lora|hada|lokr|sinks?$"
    r"|proj_weight$|weight_[ih]h_|weight_[gv]$|original[01]$|^A_log$|^D$"
)
# Parameters of ordinary models that have "scale" in their names.
_OWN_SCALES = re.compile(r"(logit|layer|skip|embed|norm)_?scale|scale_(shift|mul)")
# Integer tensors of ordinary modules: positions, counts, masks, and states and files as bytes.
_BUFFERS = re.compile(
    r"(_ids|_index|_indices|_tracked|_extra_state|_offsets?|_model)$|(^|_)bias$|mask"
)
_LOOKUPS = (4, 8, 16, 256)
# How many codes one stored integer may hold.
_PACKED = (1, 2, 4, 8, 16, 32)
_WRITERS = (
    (r"weight_scale_2$|_blocks$|_global_scale$", "nvfp4 or mxfp4"),
    (r"W_q$", "hqq"),
    (r"qdata$", "torchao"),
    (r"weight_scales$", "eetq"),
    (r"codebook", "aqlm"),
    (r"centroid", "vptq"),
    (r"Qidxs$|SU$|SV$", "quip"),
    (r"wscales$|smooth_factor$|proj_down$", "svdquant"),
    (r"biases$", "mlx"),
    (r"_quantizer\.", "modelopt"),
    (r"qweight$|qzeros$", "gptq or awq"),
)


def refuse_codes(tensors: Mapping[str, TensorMeta], read: Mapping[str, object]) -> None:
    """Refuse codes that a merge would average as if they were weights.

    Args:
        tensors: the stored tensors of a component, by name.
        read: tensors that a known layout has read; further companions of a weight are refused.

    Raises:
        OutlierMergeError: there are codes; the message names the tensor, its companion, and what it
            looks like.
    """
    unread = {name: meta for name, meta in tensors.items() if name not in read}
    for name, meta in unread.items():
        if meta.dtype == EXPONENTS:
            raise OutlierMergeError(
                f"{meta.path}: tensor {name!r} ({EXPONENTS.code}) holds exponents, the scales of "
                "quantised weights, but no layout that can be read has it. Name the model that it "
                "was quantised from instead."
            )
    codes = {
        name: meta
        for name, meta in tensors.items()
        if read.get(name, meta) is not None and _are_codes(meta) and meta.num_elements > 1
    }
    if not codes:
        return
    wanted = {place for name in codes for place in (name, name.rpartition(".")[0])}
    by_place = _by_place(unread, wanted)
    found: list[tuple[str, str, str]] = []
    for name, meta in codes.items():
        for other, part in _beside(name, by_place):
            if kind := _kind(name, meta, tensors[other], part):
                found.append((name, other, kind))
                break
    if found:
        name, other, kind = max(found, key=lambda entry: tensors[entry[0]].num_elements)
        every = [other for entry in found for other in entry[:2]]
        writer = next((w for end, w in _WRITERS if any(re.search(end, n) for n in every)), None)
        what = (
            "is read as codes and their scale, but beside it is also"
            if name in read
            else "looks like codes, not like a weight: beside it is"
        )
        more = f" All such:\n{listing(entry[0] for entry in found)}" if len(found) > 1 else ""
        raise OutlierMergeError(
            f"{tensors[name].path}: tensor {name!r} ({_described(tensors[name])}) {what} {other!r} "
            f"({_described(tensors[other])}), {kind}. No layout that can be read has these names"
            f"{f' (they are like those of {writer})' if writer else ''}, and a merge of codes "
            "would be wrong. Name the model that it was quantised from instead, or dequantise it "
            f"to bfloat16 or float16 with the tool that wrote it.{more}"
        )


def are_plain(tensors: Mapping[str, TensorMeta]) -> bool:
    """Tell whether a component has only plain tensors: no codes and no companions.

    Plain tensors are floats of two bytes or more, and buffers, without names of companions.
    """
    for name, meta in tensors.items():
        leaf = name.rpartition(".")[2]
        is_buffer = meta.dtype.name in ("bool", "int32", "int64") and _BUFFERS.search(leaf)
        if meta.dtype.is_float:
            is_named = _NAMED.search(leaf) and not (_OWN_SCALES.search(leaf) or "norm" in name)
            if meta.dtype.num_bytes == 1 or is_named:
                return False
        elif meta.num_elements > 1 and not is_buffer:
            return False
    return True


def _are_codes(meta: TensorMeta) -> bool:
    if meta.dtype.is_float:
        return meta.dtype.num_bytes == 1
    # Wider integers are codes only if they are packed into a matrix.
    return meta.dtype.name in ("int8", "uint8") or (
        "int" in meta.dtype.name and len(meta.shape) > 1
    )


def _by_place(tensors: Iterable[str], wanted: Container[str]) -> Mapping[str, list[str]]:
    """Return names by those of their possible places that are wanted.

    The places of scales.a.b_c.d are a.b_c.d, scales.a.b_c and others.

    These places are the module, its parent, beginnings of the name, and the name after a word for
    scales.
    """
    places: dict[str, list[str]] = defaultdict(list)
    cuts_of: dict[str, list[int]] = {}  # names have few ends and heads
    is_word: dict[str, bool] = {}
    for name in tensors:
        module = name.rpartition(".")[0]
        head, _, tail = name.partition(".")
        end = name[len(module) :]
        if end not in cuts_of:
            cuts_of[end] = [cut.start() for cut in re.finditer("[._:/]", end) if cut.start()]
        if head not in is_word:
            is_word[head] = _NAMED.search(head) is not None
        owners = [module, module.rpartition(".")[0]]
        owners += [name[: len(module) + cut] for cut in cuts_of[end]]
        if is_word[head]:
            owners.append(tail)
        for owner in owners:
            if owner in wanted:
                places[owner].append(name)
    return places


def _beside(name: str, by_place: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Yield possible names of a tensor's companions, each with the part that tells its use."""
    module, _, leaf = name.rpartition(".")
    if name not in by_place and module not in by_place:
        return
    for other in dict.fromkeys((*by_place.get(name, ()), *by_place.get(module, ()))):
        if other == name:
            continue
        if other.startswith(name) and other[len(name)] in "._:/":
            yield other, other[len(name) :]
        elif not other.startswith(module):
            yield other, other.partition(".")[0]
        else:
            part = other[len(module) :].removeprefix(".")
            is_far = not module and re.split("[._:/]", part)[0] != re.split("[._:/]", leaf)[0]
            # A tensor in a submodule belongs to this tensor only if it is named as a companion.
            if not is_far and ("." not in part or _NAMED.search(part)):
                yield other, part


def _kind(name: str, codes: TensorMeta, companion: TensorMeta, part: str) -> str | None:
    """Return what a tensor next to codes looks like, by the part of its name that differs, or None.

    >>> from pathlib import Path
    >>> from outliermerge.checkpoint.sources import DTYPES
    >>> codes = TensorMeta("a.weight", DTYPES["int8"], (8, 6), Path("file"), 0)
    >>> other = TensorMeta("a.s", DTYPES["float32"], (8, 1), Path("file"), 48)
    >>> _kind("a.weight", codes, other, "s")
    'of the shape of a scale for each row'
    """
    leaf = name.rpartition(".")[2]
    is_own = part[0] in "._:/" or leaf in part
    if companion.dtype.name == "bool" or not companion.num_elements or _OWN_SCALES.search(part):
        return None
    if not codes.dtype.is_float and _BUFFERS.search(leaf) and not is_own:
        return None
    # A model cast to float8 as a whole has all of its parameters in that dtype.
    if codes.dtype.is_float and companion.dtype == codes.dtype and not is_own:
        return None
    if _NAMED.search(part):
        return "a scale, zero point or lookup table by its name"
    is_eight_bits = codes.dtype.name in ("int8", "uint8")
    if _PLAIN.search(part) or (part in ("weight", "kernel") and not is_eight_bits):
        return None
    if codes.dtype.is_float and len(codes.shape) < 2:
        return None
    return _fit(codes, companion)


def _fit(codes: TensorMeta, companion: TensorMeta) -> str | None:
    shape, other = codes.shape, companion.shape
    num = companion.num_elements
    if num == 1:
        return "of the shape of the tensor's scale"
    sizes = [size for size in other if size != 1]
    is_table = sizes[-1] in _LOOKUPS and companion.dtype.is_float and not codes.dtype.is_float
    if is_table and sizes != [shape[0]]:
        return "of the shape of a lookup table"
    if 2 * num > codes.num_elements:
        return None
    packed = (1,) if codes.dtype.is_float else _PACKED
    if len(sizes) == 1:
        for size, what in ((shape[0], "row"), (shape[-1], "column")):
            if any(sizes[0] == size * pack for pack in packed):
                return f"of the shape of a scale for each {what}"
    stacked = other[:-1] if len(other) == len(shape) + 1 and other[-1] == 1 else other
    if stacked == shape[:-1]:
        return "of the shape of a scale for each row"
    if len(stacked) == len(shape) and all(
        any(_is_grid(size * pack, count) for pack in packed)
        for size, count in zip(shape, stacked, strict=True)
    ):
        return "of the shape of a scale for each block"
    if len(sizes) == 1 and any(codes.num_elements * pack % sizes[0] == 0 for pack in packed):
        return "of the shape of a scale for each block"
    return None


def _is_grid(size: int, count: int) -> bool:
    return 0 < count <= size and -(-size // -(-size // count)) == count


def _described(meta: TensorMeta) -> str:
    return f"{meta.dtype.name} {list(meta.shape)}"
