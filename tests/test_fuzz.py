"""Arbitrary input: a spec or a file is taken, or refused with our error and with no other."""

from __future__ import annotations

import copy
import json
import math
import os
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import jsonschema
import pytest
import safetensors
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from outliermerge import ArgumentError, OutlierMergeError, SpecError
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.formats.safetensors_file import make_header, read_header
from outliermerge.checkpoint.layout import parse_bytes, plan_layout
from outliermerge.checkpoint.reader import Reader
from outliermerge.checkpoint.sources import DTYPES, DTYPES_BY_CODE
from outliermerge.methods.table import METHODS
from outliermerge.spec.check import MergeSpec, load_spec, parse_spec
from outliermerge.spec.schema import json_schema

settings.register_profile(
    "fuzz",
    # `make fuzz` asks for more of them, and other ones each time.
    max_examples=int(os.environ.get("OUTLIERMERGE_FUZZ_EXAMPLES", "200")),
    derandomize="OUTLIERMERGE_FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
FUZZ = settings.get_profile("fuzz")


@contextmanager
def _file(raw: bytes, name: str = "model.safetensors") -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(raw)
        yield path


# Specs.

GOOD = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "a", "parameters": {"weight": 0.5, "density": [0.1, 0.9]}},
        {"model": "b"},
    ],
    "parameters": {
        "lambda": 0.3,
        "normalize": True,
        "density": [{"filter": "mlp", "value": [0.2, 0.4]}, {"value": 1}],
    },
    "dtype": "float32",
    "missing": "base",
}

SLICED = {key: value for key, value in GOOD.items() if key not in ("models", "missing")} | {
    "slices": [
        {
            "sources": [
                {"model": "a", "layer_range": [0, 4], "parameters": {"weight": [0.5, 1]}},
                {"model": "base", "layer_range": [2, 6]},
            ],
            "parameters": {"density": 0.5},
        },
        {"sources": [{"model": "b", "layer_range": [1, 3]}]},
    ],
    "stack": "text",
}

_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**320)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["ties", "linear", "base", "a", "1e-3", "float32", "*", "~x", "torch.", ":"])
    | st.dates()
    | st.binary(max_size=4)
)
_words = st.sampled_from(
    [
        *GOOD,
        *SLICED,
        "model",
        "weight",
        "density",
        "t",
        "filter",
        "value",
        "sources",
        "layer_range",
        "out_dtype",
        "output",
    ]
)
_keys = _words | st.text(max_size=4) | st.integers() | st.booleans() | st.none()
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=12,
)


def _check(spec: MergeSpec) -> None:
    """Assert that what was taken is complete and can be written down again."""
    method = METHODS[spec.document.merge_method]
    assert spec.models
    for models in [one.models for one in spec.slices] or [spec.models]:
        assert models
        assert method.max_models is None or len(models) <= method.max_models
    for one in spec.slices:
        assert {stop - start for start, stop in one.ranges.values()} == {one.num_layers}
        assert all(0 <= start < stop for start, stop in one.ranges.values())
    assert method.space == "weight" or spec.document.base_model
    parts = [(one.settings, *(m.settings for m in one.models)) for one in spec.slices]
    parts.append((spec.settings, *(model.settings for model in spec.models)))
    for level in (level for levels in parts for level in levels):
        for name, setting in level.items():
            assert setting.entries
            for entry in setting.entries:
                for position in (0.0, 0.3, 1.0):
                    method.parameters[name].check(entry.at(position))
    again = parse_spec(spec.as_yaml())
    assert again.as_dict() == spec.as_dict()
    assert json.loads(json.dumps(spec.as_dict())) == spec.as_dict()


def _takes(raw: object) -> bool:
    try:
        _check(load_spec(raw))
    except SpecError as error:
        assert str(error).startswith("spec: ")
        return False
    return True


def _takes_text(text: str) -> bool:
    try:
        _check(parse_spec(text))
    except SpecError as error:
        assert str(error).startswith("spec:")
        return False
    return True


@FUZZ
@given(st.text())
def test_any_text_is_a_spec_or_refused(text):
    _takes_text(text)


_snippets = st.sampled_from(
    ["merge_method", "ties", "models", "model", "parameters", "weight", ": ", ":", "- ", "\n",
     "\n  ", "{", "}", "[", "]", "&a ", "*a", "<<: ", "!!int ", "!!python/name:os", "? ", "'", '"',
     "|", ">", "---\n", "...\n", "%YAML 1.1\n", "#", "\t", "1e3", "~", "yes", ".nan", "0x1f",
     "2024-02-30", "1:60", "!!timestamp x", "!!float x", "!!binary x", "!!set ", "!!omap ",
     "!!pairs ", "\\", "\ud7ff", "\u2028", "\x85", ","]
)  # fmt: skip


@FUZZ
@given(st.lists(_snippets, max_size=25).map("".join))
def test_any_pieces_of_yaml_are_a_spec_or_refused(text):
    _takes_text(text)


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_are_a_spec_or_refused(raw):
    with _file(raw, "spec.yaml") as path:
        try:
            load_spec(path)
        except SpecError as error:
            assert str(error).startswith(str(path))


@FUZZ
@given(st.dictionaries(_keys, _values, max_size=6))
def test_any_dict_is_a_spec_or_refused(raw):
    _takes(raw)


@FUZZ
@given(_values)
def test_any_yaml_value_is_a_spec_or_refused(value):
    _takes_text(yaml.safe_dump(value, allow_unicode=True))


# Values that are right in some place and wrong in others.
_plausible = (
    st.floats(-0.5, 1.5)
    | st.sampled_from([0, 1, True, False, "1e-3", "0.5", "bfloat16", "torch.float16", "copy",
                       "drop", "base", "error", "c", "task_arithmetic", "min_sigma"])
    | st.lists(st.floats(0, 1) | st.sampled_from(["1e-3", 0, 1, True]), max_size=3)
    | st.fixed_dictionaries(
        {"value": st.floats(0, 1.1) | st.booleans()}, optional={"filter": st.text(max_size=2)}
    )
    | st.lists(st.fixed_dictionaries({"value": st.floats(0, 1)}), max_size=2)
)  # fmt: skip


def _places(value: object, path: tuple = ()) -> list[tuple]:
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += _places(inner, (*path, index))
    return found


PLACES = [(good, [path for path in _places(good) if path]) for good in (GOOD, SLICED)]


@st.composite
def _mutated(draw):
    """Return a good spec with one or two values replaced, added or taken away."""
    good, places = draw(st.sampled_from(PLACES))
    raw = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places))
        holder = raw
        try:
            for part in path[:-1]:
                holder = holder[part]
            _ = holder[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue
        if not isinstance(holder, (dict, list)):
            continue
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            holder[path[-1]] = draw(_plausible | _values)
        elif action == "remove":
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[draw(_keys)] = draw(_plausible | _values)
        else:
            holder.insert(draw(st.integers(0, len(holder))), draw(_plausible | _values))
    return raw


def test_the_specs_that_are_mutated_are_good():
    assert _takes(GOOD)
    assert _takes(SLICED)


@FUZZ
@given(_mutated())
def test_a_mutated_spec_is_taken_or_refused_alike_as_dict_and_as_yaml(raw):
    text = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
    # Two texts in Python can be one in YAML's eyes only if it cannot write them.
    assume(yaml.safe_load(text) == raw)

    assert _takes(raw) == _takes_text(text)


SCHEMA = jsonschema.Draft202012Validator(json_schema())


@FUZZ
@given(_mutated())
def test_what_is_taken_is_valid_by_the_schema(raw):
    if _takes(raw):
        SCHEMA.validate(raw)


@FUZZ
@given(_plausible | _values)
@pytest.mark.parametrize("name", ["weight", "density", "normalize", "lambda"])
def test_any_value_of_a_parameter_is_taken_only_if_every_number_in_it_is_in_range(name, value):
    raw = copy.deepcopy(GOOD)
    raw["parameters"] = {name: value}
    taken = _takes(raw)

    def leaves(item):
        if isinstance(item, list):
            return [leaf for inner in item for leaf in leaves(inner)]
        if isinstance(item, dict):
            return leaves(item["value"])
        return [item]

    if taken:
        for leaf in leaves(value):
            if name == "normalize":
                assert isinstance(leaf, (bool, int, float))
                assert leaf in (0, 1)
            else:
                assert not isinstance(leaf, bool)
                assert math.isfinite(float(leaf))
                assert name != "density" or 0 <= float(leaf) <= 1


@FUZZ
@given(st.text(max_size=12) | st.from_regex(r"\s*[0-9.]{1,400}\s*[kKMGTi]{0,2}B?\s*"))
def test_any_text_is_a_size_of_at_least_a_byte_or_refused(text):
    try:
        size = parse_bytes(text, "memory")
    except ArgumentError as error:
        assert str(error).startswith("memory: ")
    else:
        assert isinstance(size, int)
        assert size >= 1


# safetensors files.


def _by_library(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """Return what the safetensors library reads of a file, or None where it refuses it."""
    try:
        with safetensors.safe_open(path, "np") as file:
            return {
                name: (file.get_slice(name).get_dtype(), list(file.get_slice(name).get_shape()))
                for name in file.keys()
            }
    except (safetensors.SafetensorError, OSError):
        return None


def _assert_agrees(raw: bytes) -> bool:
    """Assert that we read a file as the library does; return whether we take it."""
    with _file(raw) as path:
        theirs = _by_library(path)
        try:
            metas = read_header(path)
        except OutlierMergeError as error:
            assert str(error).startswith(f"{path}: ")
            # We refuse what it refuses, and dtypes that nothing here can merge.
            assert theirs is None or any(code not in DTYPES_BY_CODE for code, _ in theirs.values())
            return False
        assert theirs == {meta.name: (meta.dtype.code, list(meta.shape)) for meta in metas}
        for meta in metas:
            assert 0 <= meta.offset <= meta.offset + meta.num_bytes <= len(raw)
    return True


def _assemble(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@FUZZ
@given(st.binary(max_size=300))
def test_any_bytes_are_read_as_the_safetensors_library_reads_them(raw):
    _assert_agrees(raw)


@FUZZ
@given(st.binary(max_size=100), st.binary(max_size=20))
def test_any_bytes_as_a_header_are_read_as_the_library_reads_them(header, data):
    _assert_agrees(_assemble(header, data))


_names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(
    lambda name: name != "__metadata__"
)
_tensors = st.lists(
    st.tuples(
        _names,
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda tensor: tensor[0],
)


_wrong = (
    st.integers(-2, 30)
    | st.integers(2**62, 2**65)
    | st.lists(st.integers(-1, 12), max_size=3)
    | st.sampled_from([*DTYPES_BY_CODE, "F8_E8M0", "F4", "FOO", "f32", None, True, 2.0, [2.0],
                       [True], {}, "", [0, 2**63, 2**63], [0, 2**64]])
)  # fmt: skip


@st.composite
def _headers(draw):
    """Return a good header with up to two of its entries changed, and its data."""
    position, header = 0, {}
    for name, dtype, shape in draw(_tensors.filter(bool)):
        end = position + math.prod(shape) * dtype.num_bytes
        header[name] = {"dtype": dtype.code, "shape": shape, "data_offsets": [position, end]}
        position = end
    names = st.sampled_from(list(header))
    for name in draw(st.lists(names, max_size=2)):
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "other", "swap", "lose"]))
        if field == "swap":
            other = draw(names)
            header[name], header[other] = header[other], header[name]
        elif field == "lose":
            header[name].pop("shape", None)
        else:
            header[name][field] = draw(_wrong)
    return header, bytes(max(0, position + draw(st.sampled_from([0, 0, 0, 0, -1, 1]))))


@FUZZ
@given(_headers())
def test_any_header_entries_are_read_as_the_library_reads_them(parts):
    header, data = parts
    _assert_agrees(_assemble(json.dumps(header).encode(), data))


@pytest.mark.parametrize("metadata", [{"a": "b"}, {}, None, 5, [], {"a": 1}, {"a": None}, "x"])
def test_any_metadata_are_taken_as_the_library_takes_them(metadata):
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    _assert_agrees(_assemble(json.dumps({"__metadata__": metadata, "w": entry}).encode(), b"x"))


def _contents(tensors: list) -> tuple[bytes, int]:
    header, _ = make_header(tensors)
    num_bytes = sum(math.prod(shape) * dtype.num_bytes for _, dtype, shape in tensors)
    return header + bytes(num_bytes), len(header)


# Changes that can leave a header valid.
_MILD = [(b"F32", b"I32"), (b"BF16", b"F16"), (b"F16", b"U16"), (b"U8", b"BOOL"), (b"I64", b"F64"),
         (b"[", b"[ "), (b",", b"\n,"), (b"}", b'}  '), (b':"', b':\t"'), (b"pt", b"np"),
         (b"dtype", b"dtyp\\u0065"), (b"shape", b"Shape"), (b":[0,", b":[00,"), (b"1]", b"1,1]"),
         (b"1]", b"1.0]"), (b"]", b",1]"), (b"[]", b"[1]"), (b"4", b"4e0"),
         (b'{"format":"pt"}', b"{}"), (b'{"format":"pt"}', b"null")]  # fmt: skip


@st.composite
def _mutated_files(draw):
    """Return a good file with a few bytes of its header changed, removed or added."""
    raw, num_header_bytes = _contents(draw(_tensors.filter(bool)))
    header = bytearray(raw[8:num_header_bytes])
    for old, new in draw(st.lists(st.sampled_from(_MILD), max_size=3)):
        header = header.replace(old, new, draw(st.sampled_from([1, -1])))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        position = draw(st.integers(0, len(header) - 1))
        byte = draw(st.integers(0, 255) | st.sampled_from(list(b'01248-.e ,"[]{}:\\FUI')))
        action = draw(st.sampled_from(["change", "add", "remove"]))
        if action == "add":
            header.insert(position, byte)
        elif action == "change" or len(header) == 1:
            header[position] = byte
        else:
            del header[position]
    length = len(header) + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 2**40]))
    return struct.pack("<Q", length) + bytes(header) + raw[num_header_bytes:]


@FUZZ
@given(_mutated_files())
def test_a_mutated_file_is_read_as_the_library_reads_it(raw):
    assume(b"-0" not in raw)  # an integer to Python, a float to the library: no harm
    _assert_agrees(raw)


@FUZZ
@given(_tensors)
def test_a_header_that_is_written_is_read_back_by_us_and_by_the_library(tensors):
    header, offsets = make_header(tensors)
    raw, num_header_bytes = _contents(tensors)
    assert raw.startswith(header)
    assert num_header_bytes % 8 == 0
    assert _assert_agrees(raw)

    with _file(raw) as path:
        found = {m.name: (m.dtype, m.shape, m.offset) for m in read_header(path)}
    assert found == {
        name: (dtype, shape, offset)
        for (name, dtype, shape), offset in zip(tensors, offsets, strict=True)
    }


def _are_gathered(tensors) -> bool:
    """Tell whether none looks like what ZeRO-3 leaves of a weight, which is refused."""
    return not any(dtype.is_float and shape == (0,) for _, dtype, shape in tensors)


@FUZZ
@given(_tensors.filter(lambda tensors: tensors and _are_gathered(tensors)), st.integers(1, 200))
def test_a_planned_layout_is_a_checkpoint_that_opens(tensors, shard_bytes):
    shards, placed = plan_layout(tensors, shard_bytes=shard_bytes, components={"": "model"})

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for shard in shards:
            raw = shard.header + bytes(shard.num_bytes - len(shard.header))
            (root / shard.file).write_bytes(raw)
            assert _assert_agrees(raw)
            sizes = [t.num_bytes for t in placed.values() if t.file == shard.file]
            assert sum(sizes) <= shard_bytes or sum(size > 0 for size in sizes) == 1
        found = open_checkpoint(root).tensors
    assert {n: (m.dtype, m.shape) for n, m in found.items()} == {
        name: (dtype, shape) for name, dtype, shape in tensors
    }
    for name, meta in found.items():
        assert (meta.path.name, meta.offset) == (placed[name].file, placed[name].offset)
        assert meta.offset % meta.dtype.num_bytes == 0


@FUZZ
@given(st.binary(max_size=60) | _values.map(lambda v: json.dumps(v, default=str).encode()))
def test_any_index_is_refused_or_names_files_of_the_folder(raw):
    with _file(_contents([("w", DTYPES["uint8"], (1,))])[0], "a.safetensors") as path:
        (path.parent / "model.safetensors.index.json").write_bytes(raw)
        with pytest.raises(OutlierMergeError):  # nothing drawn names a.safetensors
            open_checkpoint(path.parent)


@FUZZ
@given(st.dictionaries(st.sampled_from(["w", "v"]), st.text(max_size=8) | _scalars, max_size=2))
def test_any_weight_map_is_refused_or_right(weight_map):
    raw = json.dumps({"weight_map": weight_map}, default=str).encode()
    with _file(_contents([("w", DTYPES["uint8"], (1,))])[0], "a.safetensors") as path:
        (path.parent / "model.safetensors.index.json").write_bytes(raw)
        try:
            found = open_checkpoint(path.parent)
        except OutlierMergeError:
            return
        assert set(found.tensors) == {"w"}
        assert set(weight_map) == {"w"}


# Indexes.


@contextmanager
def _two_shards(index: bytes, name: str = "model.safetensors.index.json") -> Iterator[Path]:
    """Make a folder of two shards, a file that no index names, and an index."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "model"
        root.mkdir()
        for file, tensor in (("a", "v"), ("b", "w"), ("c", "v")):
            contents, _ = _contents([(tensor, DTYPES["uint8"], (2,))])
            (root / f"{file}.safetensors").write_bytes(contents)
        (root.parent / "outside.safetensors").write_bytes(contents)
        (root / name).write_bytes(index)
        yield root


WEIGHT_MAP = {"v": "a.safetensors", "w": "b.safetensors"}


def _opens_as_the_library_reads(root: Path) -> bool:
    """Assert that what opens is what the library reads of its files; return whether it opens."""
    try:
        checkpoint = open_checkpoint(root)
    except OutlierMergeError as error:
        assert str(error).startswith(str(root))
        return False
    theirs: dict[str, tuple[str, list[int]]] = {}
    for stamp in checkpoint.weight_files:
        assert stamp.path.parent == root
        theirs |= _by_library(stamp.path)
    assert theirs == {
        name: (source.dtype.code, list(source.shape)) for name, source in checkpoint.tensors.items()
    }
    return True


def _open_files(root: Path) -> dict[str, str]:
    return {name: meta.path.name for name, meta in open_checkpoint(root).tensors.items()}


def _assert_opens(weight_map: dict[str, str], opened: dict[str, str]) -> None:
    """Assert that what an index lists is opened from where it says, or is in no shard at all."""
    assert all(opened.get(name, file) == file for name, file in weight_map.items())
    assert set(opened.values()) <= set(weight_map.values())


@st.composite
def _mutated_indexes(draw):
    """Return a good index with a few of its bytes changed, removed or added."""
    raw = bytearray(json.dumps({"metadata": {"total_size": 4}, "weight_map": WEIGHT_MAP}).encode())
    for _ in range(draw(st.integers(0, 3))):
        position = draw(st.integers(0, len(raw) - 1))
        byte = draw(st.integers(0, 255) | st.sampled_from(list(b'abcvw. /\\,"[]{}:')))
        action = draw(st.sampled_from(["change", "add", "remove"]))
        if action == "add":
            raw.insert(position, byte)
        elif action == "change":
            raw[position] = byte
        else:
            del raw[position]
    return bytes(raw)


@FUZZ
@given(_mutated_indexes())
def test_a_mutated_index_opens_what_it_names_or_is_refused(raw):
    with _two_shards(raw) as root:
        if _opens_as_the_library_reads(root):
            _assert_opens(json.loads(raw)["weight_map"], _open_files(root))


_files = st.sampled_from(
    ["a.safetensors", "b.safetensors", "./a.safetensors", "c.safetensors", "../outside.safetensors",
     "..", ".", "/", "", "x", "a.safetensors/", "a.safetensors/..", "~", "\0", "\ud800", "x" * 300,
     "model.safetensors.index.json", "//a.safetensors", "..\\outside.safetensors"]
)  # fmt: skip


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["v", "w", "", "x"]), _files | st.text(max_size=4) | _values, max_size=3
    )
)
def test_any_weight_map_opens_what_it_names_or_is_refused(weight_map):
    raw = json.dumps({"weight_map": weight_map}, default=str, skipkeys=True).encode()
    with _two_shards(raw) as root:
        if _opens_as_the_library_reads(root):
            files = {name: PurePosixPath(file).name for name, file in weight_map.items()}
            _assert_opens(files, _open_files(root))


def test_the_index_that_is_mutated_is_good():
    with _two_shards(json.dumps({"weight_map": WEIGHT_MAP}).encode()) as root:
        assert _opens_as_the_library_reads(root)
        assert _open_files(root) == WEIGHT_MAP


_components = st.sampled_from(["unet", "..", ".", "", "/", "../model", "\0", "x" * 300, "vae"])


@FUZZ
@given(
    st.binary(max_size=40).map(lambda raw: (raw, False))
    | _values.map(lambda value: (json.dumps(value, default=str, skipkeys=True).encode(), False))
    | st.dictionaries(
        _components | st.text(max_size=3),
        _values | st.just(["diffusers", "Model"]) | st.just([None, None]),
        max_size=3,
    ).map(lambda value: (json.dumps(value, default=str).encode(), value.get("unet")))
)
def test_any_index_of_a_pipeline_opens_the_components_it_names_or_is_refused(drawn):
    raw, unet = drawn
    with _two_shards(raw, "model_index.json") as root:
        (root / "unet").mkdir()
        contents, _ = _contents([("v", DTYPES["uint8"], (2,))])
        (root / "unet" / "model.safetensors").write_bytes(contents)
        try:
            found = open_checkpoint(root)
        except OutlierMergeError as error:
            assert str(error).startswith(str(root))
        else:
            assert list(found.tensors) == ["unet/v"]
            assert unet


# Pickles.

_pickled = st.recursive(
    st.integers(0, 3).map(lambda size: torch.full((size,), float(size))) | st.integers(0, 3),
    lambda inner: (
        st.dictionaries(
            st.sampled_from(["state_dict", "model", "params", "optimizer", "w", "module.v", 0]),
            inner,
            max_size=3,
        )
        | st.lists(inner, max_size=2)
    ),
    max_leaves=6,
)


def _state_dicts(value: object) -> list[dict[str, torch.Tensor]]:
    """Return every dict of tensors alone, wherever it is."""
    if not isinstance(value, dict):
        return []
    here = [value] if value and all(isinstance(t, torch.Tensor) for t in value.values()) else []
    return here + [found for inner in value.values() for found in _state_dicts(inner)]


@FUZZ
@given(_pickled)
def test_any_nested_pickle_is_one_of_its_state_dicts_or_refused(value):
    with _file(b"", "m.pt") as path:
        torch.save(value, path)
        try:
            found = open_checkpoint(path)
        except OutlierMergeError as error:
            assert str(error).startswith(f"{path}: ")
            return
        [state] = [  # of the same tensors; another one would have been as good
            state
            for state in _state_dicts(value)
            if {name: tuple(tensor.shape) for name, tensor in state.items()}
            == {source.name: source.shape for source in found.tensors.values()}
        ][:1]
        with Reader() as reader:
            for source in found.tensors.values():
                values = reader.values(source, 0, source.num_elements)
                assert torch.equal(values, state[source.name])


@settings(FUZZ, max_examples=FUZZ.max_examples // 2)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_pickle_with_changed_bytes_is_read_or_refused(changes):
    with _file(b"", "m.pt") as path:
        torch.save({"state_dict": {"w": torch.ones(3), "v": torch.zeros(2)}, "epoch": 3}, path)
        with zipfile.ZipFile(path) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in records:
                changed = bytearray(data)
                if name.endswith("/data.pkl"):
                    for position, byte in changes:
                        changed[position % len(changed)] = byte
                archive.writestr(name, bytes(changed))
        try:
            found = open_checkpoint(path)
        except OutlierMergeError as error:
            assert str(error).startswith(f"{path}: ")
            return
        with Reader() as reader:
            for source in found.tensors.values():
                reader.values(source, 0, source.num_elements)
