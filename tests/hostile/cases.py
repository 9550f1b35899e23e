"""Inputs that others could send: for each a name, and what makes it and returns the command."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Make = Callable[[Path], list[str]]
CASES: dict[str, Make] = {}
MEGABYTE = 1 << 20
LINEAR = "merge_method: linear\nmodels:\n- model: good\n- model: bad\n"
TASK = "merge_method: task_arithmetic\nbase_model: good\nmodels:\n- model: bad\n"
PLAN = ["plan", "spec.yaml", "--no-load-check"]
RUN = ["run", "spec.yaml", "--output", "out", "--no-load-check"]
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2}

# Names that control a terminal, inject lines or markup, or are long.
NAMES = {
    "escape": "a\x1b[2J\x1b]0;owned\x07.weight",
    "lines": "a\n# Injected\n\n[x](http://e.vil).weight",
    "carriage": "good\rerror: all is well.weight",
    "c1": "a\x9b31m\x85.weight",
    "bidi": "a\u202egpj.\u2066weight",
    "separators": "a\u2028b\u2029c.weight",
    "markdown": "`a` **b** <script>alert(1)</script>.weight",
    "rich": "[bold red]a[/] [link=http://e.vil]b[/link].weight",
    "backspaces": "a" + "\b" * 40 + "b.weight",
    "long": "x" * 900 + ".weight",
    "formats": "%s%n{0}{x!r}.weight",
    "null": "a\0b.weight",
}


def case(name: str, make: Make) -> None:
    assert name not in CASES, name
    CASES[name] = make


def header(header_bytes: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header_bytes) if length is None else length) + header_bytes + data


def weights(tensors: dict[str, int], **metadata: str) -> bytes:
    """Return a file of float32 tensors with so many elements each."""
    position, entries = 0, {}
    for name, size in tensors.items():
        entries[name] = {
            "dtype": "F32",
            "shape": [size],
            "data_offsets": [position, position + 4 * size],
        }
        position += 4 * size
    top = {"__metadata__": metadata} if metadata else {}
    return header(json.dumps({**top, **entries}).encode(), bytes(position))


def good(folder: Path, name: str = "good", tensors: dict[str, int] | None = None) -> Path:
    model = folder / name
    model.mkdir()
    (model / "model.safetensors").write_bytes(weights(tensors or {"a.weight": 4, "b.weight": 3}))
    (model / "config.json").write_text(json.dumps(CONFIG))
    return model


def pair(folder: Path, spec: str = LINEAR, **options: Any) -> Path:
    """Write two good models and a spec that merges them; return the second."""
    good(folder, **options)
    (folder / "spec.yaml").write_text(spec)
    return good(folder, "bad", **options)


# Ways in which a small file can be hostile.


def sparse(path: Path, num_bytes: int = 8 << 30) -> None:
    with path.open("wb") as file:
        file.truncate(num_bytes)


def replaced(path: Path, put: Callable[[], None]) -> None:
    path.unlink(missing_ok=True)
    put()


def as_bytes(data: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: replaced(path, lambda: path.write_bytes(data()) and None)


WAYS: dict[str, Callable[[Path], None]] = {
    "sparse": sparse,
    "sparse within the limit": lambda path: sparse(path, 15 * MEGABYTE),
    "pipe": lambda path: replaced(path, lambda: os.mkfifo(path)),
    "link to zeros": lambda path: replaced(path, lambda: path.symlink_to("/dev/zero")),
    "link to proc": lambda path: replaced(path, lambda: path.symlink_to("/proc/self/environ")),
    "link to itself": lambda path: replaced(path, lambda: path.symlink_to(path.name)),
    "folder": lambda path: replaced(path, path.mkdir),
    "deep list": as_bytes(lambda: b"[" * 100_000 + b"]" * 100_000),
    "deep object": as_bytes(lambda: b'{"a":' * 900 + b"1" + b"}" * 900),
    "very deep object": as_bytes(lambda: b'{"text_config":' * 200_000 + b"1" + b"}" * 200_000),
    "many values": as_bytes(lambda: b"[" + b"[]," * 5_000_000 + b"1]"),
    "many keys": as_bytes(
        lambda: b"{" + b",".join(b'"k%d":%d' % (i, i) for i in range(300_000)) + b"}"
    ),
    "many keys twice": as_bytes(
        lambda: b"{" + b",".join(b'"k%d":1' % (i % 99_000) for i in range(100_000)) + b"}"
    ),
    "long key": as_bytes(lambda: b'{"' + b"k\\u001b[2J" * 400_000 + b'":1}'),
    "long key twice": as_bytes(
        lambda: b'{"' + b"k" * MEGABYTE + b'":1,"' + b"k" * MEGABYTE + b'":1}'
    ),
    "long number": as_bytes(lambda: b'{"hidden_size":' + b"9" * MEGABYTE + b"}"),
    "long text": as_bytes(lambda: json.dumps({"model_type": "\x1b[2J" * 100_000}).encode()),
    "list": as_bytes(lambda: b"[1, 2]"),
    "not UTF-8": as_bytes(lambda: b'{"a": "\xff\xfe"}'),
    "UTF-16": as_bytes(lambda: '{"a": 1}'.encode("utf-16")),
    "cut": as_bytes(lambda: b'{"a": "' + b"x" * 1000),
    "empty": as_bytes(bytes),
    "NaN": as_bytes(lambda: b'{"hidden_size": NaN, "rope": Infinity}'),
    "surrogates": as_bytes(lambda: b'{"model_type": "\\ud800\\udfff"}'),
}
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "modeling_x.py",
    "modules.json",
    "model_index.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "LICENSE",
)


def small_file(file: str, way: str, where: str, command: list[str], folder: Path) -> list[str]:
    bad = pair(folder)
    if (
        file.startswith("special")
        or file.startswith("added")
        or file.startswith("tokenizer_config")
    ):
        for name in ("good", "bad"):
            (folder / name / "vocab.json").write_text('{"a": 0, "b": 1}')
    WAYS[way]((folder / where if where else bad) / file)
    return command


for number, (file, way) in enumerate(itertools.product(SMALL_FILES, WAYS)):
    # Of the first model, whose files are carried over, or of the second, whose are compared.
    where = ("good", "bad")[number % 2]
    command = (PLAN, RUN, PLAN, ["stats", where])[number % 4]
    case(f"{where}/{file}: {way}: {command[0]}", partial(small_file, file, way, where, command))


# Headers.


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(tensor: object, name: str = "a.weight") -> bytes:
    return header(json.dumps({name: tensor}).encode(), bytes(8))


HEADERS: dict[str, Callable[[], bytes]] = {
    "nothing": bytes,
    "length of nothing": lambda: header(b""),
    "length beyond": lambda: header(b"{}", length=2**64 - 1),
    "length of 99 MB": lambda: header(b"{}", length=99_000_000),
    "length negative": lambda: header(b"{}", length=2**63),
    "deep": lambda: header(b"[" * 50_000),
    "deep metadata": lambda: header(b'{"__metadata__":' + b'{"a":' * 900 + b"1" + b"}" * 901),
    "values": lambda: header(b'{"a":[' + b"[]," * 20_000_000 + b"1]}"),
    "tensors": lambda: header(
        b"{"
        + b",".join(
            b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(60_000)
        )
        + b"}"
    ),
    "name of 20 MB": lambda: one(entry(), "n\x1b" * 10 * MEGABYTE),
    "name of 20 MB without a shape": lambda: one({}, "n\n" * 10 * MEGABYTE),
    "name twice of 5 MB": lambda: header(
        b'{"' + b"n" * 5 * MEGABYTE + b'":1,"' + b"n" * 5 * MEGABYTE + b'":1}'
    ),
    "dtype of 20 MB": lambda: one(entry(dtype="F\x1b" * 10 * MEGABYTE)),
    "dtype list": lambda: one(entry(dtype=["F32"])),
    "dtype F8 of control signs": lambda: one(entry(dtype="F8\x1b[2J")),
    "shape of a million": lambda: one(entry(shape=[1] * 1_000_000)),
    "shape of 65 axes": lambda: one(entry(shape=[1] * 64 + [2])),
    "shape of texts": lambda: one(entry(shape=["\x1b[2J" * 10_000])),
    "shape huge": lambda: one(entry(shape=[2**63 - 1, 2**63 - 1])),
    "shape of huge numbers": lambda: one(entry(shape=[10**4000])),
    "shape beyond digits": lambda: header(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'
    ),
    "shape negative": lambda: one(entry(shape=[-2])),
    "shape of floats": lambda: one(entry(shape=[2.0])),
    "shape of booleans": lambda: one(entry(shape=[True, 2])),
    "shape nested": lambda: one(entry(shape=[[2]])),
    "shape null": lambda: one(entry(shape=None)),
    "offsets of text": lambda: one(entry(offsets="\x1b" * MEGABYTE)),
    "offsets of a million": lambda: one(entry(offsets=[0] * 1_000_000)),
    "offsets backwards": lambda: one(entry(offsets=[8, 0])),
    "offsets huge": lambda: one(entry(offsets=[2**62, 2**62 + 8])),
    "hole": lambda: one(entry(offsets=[4, 12])),
    "too short": lambda: one(entry(shape=[1000], offsets=[0, 4000])),
    "entry list": lambda: one([1, 2]),
    "entry null": lambda: one(None),
    "array": lambda: header(b"[]"),
    "text": lambda: header(b'"x"'),
    "metadata list": lambda: header(b'{"__metadata__":[1]}'),
    "metadata of numbers": lambda: header(b'{"__metadata__":{"a":1}}'),
    "metadata of 30 MB": lambda: weights({"a.weight": 4, "b.weight": 3}, x="y\x1b" * 10 * MEGABYTE),
    "quantization metadata": lambda: weights(
        {"a.weight": 4, "b.weight": 3}, _quantization_metadata="[" * 100_000
    ),
    "UTF-16": lambda: header('{"a":1}'.encode("utf-16")),
    "surrogate name": lambda: header(
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "empty name": lambda: one(entry(), ""),
    "zip": lambda: b"PK\x03\x04" + bytes(100),
    "pickle": lambda: pickle.dumps({"a": 1}),
    "pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64,
}


def broken_header(name: str, command: list[str], folder: Path) -> list[str]:
    bad = pair(folder)
    (bad / "model.safetensors").write_bytes(HEADERS[name]())
    return command


for number, name in enumerate(HEADERS):
    for command in (PLAN, (RUN, ["stats", "bad"], ["compare-weights", "good", "bad"])[number % 3]):
        case(f"header: {name}: {command[0]}", partial(broken_header, name, command))


# Names: of tensors, of models, of files.


def odd_tensor(name: str, kind: str, folder: Path) -> list[str]:
    both = {"a.weight": 4, NAMES[name]: 3}
    if kind == "merged":
        pair(folder, tensors=both)
        return RUN
    if kind == "listed":
        pair(folder, tensors=both)
        return [*PLAN, "--json"]
    if kind == "verified":
        out = pair(folder, tensors=both)
        entry = {"file": "model.safetensors", "dtype": "float32", "shape": [3], "checksum": "0"}
        manifest = {"format": 1, "tensors": {NAMES[name]: entry, f"{NAMES[name]}2": entry},
                    "shards": {"model.safetensors": {"num_bytes": 1, "header": "x"}},
                    "files": {NAMES[name]: {"num_bytes": 1, "sha256": "x"}}}  # fmt: skip
        (out / "outliermerge.json").write_text(json.dumps(manifest))
        return ["verify", "bad"]
    if kind == "in one":
        bad = pair(folder)
        (bad / "model.safetensors").write_bytes(
            weights({"a.weight": 4, "b.weight": 3, NAMES[name]: 2})
        )
        return PLAN
    if kind == "misshapen":
        pair(folder, tensors=both)
        (folder / "bad/model.safetensors").write_bytes(weights({"a.weight": 4, NAMES[name]: 5}))
        return PLAN
    pair(folder, tensors=both)
    if kind == "stats":
        return ["stats", "bad", "--by", "tensor"]
    if kind == "json":
        return ["stats", "bad", "--json", "-"]
    if kind == "layers":
        return ["layers", "bad"]
    return ["compare-weights", "good", "bad", "--by", "tensor"]


for name in NAMES:
    for kind in (
        "merged",
        "listed",
        "verified",
        "in one",
        "misshapen",
        "stats",
        "json",
        "layers",
        "compared",
    ):
        case(f"tensor's name: {name}: {kind}", partial(odd_tensor, name, kind))


def odd_model(name: str, kind: str, folder: Path) -> list[str]:
    pair(folder)
    text = NAMES[name]
    if kind == "folder" and "\0" not in text and "/" not in text and len(text) < 250:
        (folder / "bad").rename(folder / text)
    document: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": "good"}, {"model": text}],
    }
    if kind == "key":
        document[text] = 1
    if kind == "method":
        document["merge_method"] = text
    if kind == "parameter":
        document["parameters"] = {text: 1}
    if kind == "source":
        document |= {"models": [{"model": "good"}, {"model": "bad"}], "tokenizer_source": text}
    (folder / "spec.yaml").write_text(json.dumps(document))
    return RUN if kind == "folder" else PLAN


for name in NAMES:
    for kind in ("folder", "absent", "key", "method", "parameter", "source"):
        case(f"model's name: {name}: {kind}", partial(odd_model, name, kind))


def odd_file(name: str, end: str, folder: Path) -> list[str]:
    bad = pair(folder)
    text = NAMES[name].replace("/", "_").replace("\0", "")[:200]
    for model in (folder / "good", bad):
        if end == "index":
            (model / "model.safetensors").unlink()
            index = {"weight_map": {"a.weight": text + ".safetensors"}}
            (model / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            (model / (text + end)).write_bytes(b"{}" if end == ".json" else weights({"z": 1}))
    return PLAN if end == "index" else RUN


for name in NAMES:
    for end in (".json", ".safetensors", ".jinja", "index"):
        case(f"file's name: {name}: {end}", partial(odd_file, name, end))


# Indexes.
INDEXES: dict[str, Any] = {
    "not a map": {"weight_map": ["\x1b[2J"] * 1000},
    "numbers": {"weight_map": {"a.weight": 1}},
    "traversal": {"weight_map": {"a.weight": "../../../../etc/passwd"}},
    "absolute": {"weight_map": {"a.weight": "/etc/passwd"}},
    "device": {"weight_map": {"a.weight": "/dev/zero"}},
    "null sign": {"weight_map": {"a.weight": "a\0b.safetensors"}},
    "long file": {"weight_map": {"a.weight": "x" * 100_000}},
    "many files": {"weight_map": {f"t{i}": f"f{i}.safetensors" for i in range(50_000)}},
    "many tensors": {"weight_map": {f"t{i}\x1b": "model.safetensors" for i in range(50_000)}},
    "itself": {"weight_map": {"a.weight": "model.safetensors.index.json"}},
    "surrogate": {"weight_map": {"a.weight": "\ud800.safetensors"}},
    "empty": {"weight_map": {}},
    "nested": {"weight_map": {"a": {"b": {"c": "x"}}}},
    "name of a megabyte": {"weight_map": {"n\n" * 500_000: "model.safetensors"}},
}


def broken_index(name: str, command: list[str], folder: Path) -> list[str]:
    bad = pair(folder)
    (bad / "model.safetensors.index.json").write_text(json.dumps(INDEXES[name]))
    return command


for name in INDEXES:
    for command in (PLAN, ["stats", "bad"]):
        case(f"index: {name}: {command[0]}", partial(broken_index, name, command))


# Specs.
LAUGHS = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 12))
MERGES = "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 12))
WEIGHT = LINEAR + "parameters:\n  weight: "
SPECS: dict[str, Callable[[], str]] = {
    "laughs": lambda: "l0: &l0 [lol]\n" + LAUGHS + LINEAR,
    "laughs used": lambda: "l0: &l0 [lol]\n" + LAUGHS + WEIGHT + "*l11\n",
    "merge keys": lambda: "m0: &m0 {a: 1}\n" + MERGES + LINEAR,
    "merge keys of many": lambda: (
        "m: &m {"
        + ", ".join(f"k{i}: 1" for i in range(5000))
        + "}\nx: ["
        + "{<<: *m}, " * 5000
        + "]\n"
    ),
    "itself": lambda: LINEAR + "parameters: &p {weight: *p}\n",
    "itself in a list": lambda: "merge_method: linear\nmodels: &m [*m, *m]\n",
    "itself merged": lambda: LINEAR + "parameters: &p {<<: *p}\n",
    "aliases": lambda: "a: &a 1\nb: [" + "*a, " * 150_000 + "]\n",
    "deep flow": lambda: "a: " + "[" * 100_000,
    "deep flow closed": lambda: "a: " + "[" * 3000 + "]" * 3000,
    "deep maps": lambda: "{a: " * 5000,
    "deep blocks": lambda: "\n".join(" " * i + "a:" for i in range(1000)),
    "deep lists": lambda: "- " * 100_000 + "1",
    "keys": lambda: "".join(f"key{i}: {i}\n" for i in range(150_000)),
    "unknown keys": lambda: LINEAR + "".join(f"key{i}: {i}\n" for i in range(20_000)),
    "keys of 2 MB": lambda: LINEAR + "k" * (2 * MEGABYTE - 200) + ": 1\n",
    "a gradient of 100,000": lambda: WEIGHT + "[" + "0.5, " * 100_000 + "1]\n",
    "a gradient of 40,000": lambda: WEIGHT + "[" + "0.5, " * 40_000 + "1]\n",
    "filters": lambda: WEIGHT + "[" + "{filter: a, value: 1}, " * 15_000 + "{value: 1}]\n",
    "models": lambda: "merge_method: linear\nmodels: [" + "{model: good}, " * 30_000 + "]\n",
    "absent models": lambda: (
        "merge_method: linear\nmodels: ["
        + ", ".join(f"{{model: m{i}}}" for i in range(20_000))
        + "]\n"
    ),
    "rules": lambda: LINEAR + "rename: [" + "{from: a, to: a}, " * 15_000 + "]\n",
    "sixties": lambda: WEIGHT + "1" + ":59" * 500_000 + "\n",
    "sixties with a point": lambda: WEIGHT + "1" + ":59" * 2000 + ":1.5\n",
    "a long integer": lambda: WEIGHT + "9" * MEGABYTE + "\n",
    "a long hexadecimal": lambda: WEIGHT + "0x" + "f" * MEGABYTE + "\n",
    "a long float": lambda: WEIGHT + "1." + "9" * MEGABYTE + "\n",
    "underscores": lambda: WEIGHT + "1" + "_" * MEGABYTE + "\n",
    "a date": lambda: WEIGHT + "2024-13-45\n",
    "a tag": lambda: WEIGHT + "!!python/object/apply:os.system ['true']\n",
    "a long tag": lambda: WEIGHT + "!" + "x" * MEGABYTE + " 1\n",
    "binary": lambda: WEIGHT + "!!binary " + "A" * MEGABYTE + "\n",
    "a set": lambda: "merge_method: !!set {linear}\nmodels: []\n",
    "an ordered map": lambda: "!!omap [a: 1]\n",
    "anchors": lambda: "".join(f"- &a{i} 1\n" for i in range(60_000)),
    "documents": lambda: "---\na: 1\n" * 50_000,
    "comments": lambda: "# x\n" * 400_000 + LINEAR,
    "blanks": lambda: "\n" * (MEGABYTE) + LINEAR,
    "spaces": lambda: "a:" + " " * MEGABYTE + "1\n",
    "quotes": lambda: 'a: "' + "\\x1b" * 400_000,
    "quotes of lines": lambda: 'a: "' + "x\n\n" * 300_000 + '"\n',
    "plain lines": lambda: "a: " + "x\n " * 300_000 + "\n",
    "a block": lambda: LINEAR + "x: |\n" + "  y\n" * 300_000,
    "an escape": lambda: LINEAR + "\x1b[2J: 1\n",
    "an escaped escape": lambda: LINEAR + '"\\e[2J\\r": 1\n',
    "a directive": lambda: "%YAML 9.9\n---\n" + LINEAR,
    "directives": lambda: "%TAG !e! tag:e:\n" * 2000 + "---\n" + LINEAR,
    "brackets": lambda: "[" * 50 + "a, " * 100_000,
    "question marks": lambda: "? " * 50_000,
    "a long reference": lambda: (
        "merge_method: linear\nmodels: [{model: good}, {model: " + "a+" * 200_000 + "}]\n"
    ),
    "a name with ids": lambda: (
        "merge_method: linear\nmodels: [{model: good}, {model: " + "a/b+" * 900 + "a/b}]\n"
    ),
    "an output": lambda: LINEAR + "output: " + "../" * 100 + "\x7f\n",
    "nothing": str,
    "null signs": lambda: "\0" * 1000,
    "a list": lambda: "[1, 2]",
    "a text": lambda: "x" * MEGABYTE,
    "a text of escapes": lambda: '"' + "\\x1b" * 10_000 + '"',
}
SPEC_FILES = (
    "sparse",
    "pipe",
    "link to zeros",
    "link to proc",
    "link to itself",
    "folder",
    "not UTF-8",
)


def hostile_spec(text: Callable[[], str], folder: Path) -> list[str]:
    pair(folder, spec=text())
    return PLAN


def hostile_spec_file(way: str, command: list[str], folder: Path) -> list[str]:
    pair(folder)
    WAYS[way](folder / "spec.yaml")
    return command


for name, text in SPECS.items():
    case(f"spec: {name}", partial(hostile_spec, text))
SUITE = ["eval", "good", "--suite", "spec.yaml", "--output", "scores"]
for way in SPEC_FILES:
    for command in (
        PLAN,
        RUN,
        ["sweep", "spec.yaml", "--set", "weight=1", "--output", "out"],
        SUITE,
    ):
        case(f"spec: {way}: {command[0]}", partial(hostile_spec_file, way, command))


def hostile_suite(text: Callable[[], str], folder: Path) -> list[str]:
    pair(folder, spec=text())
    return SUITE


for name in (
    "laughs",
    "merge keys",
    "itself",
    "deep flow",
    "keys",
    "unknown keys",
    "sixties",
    "an escape",
    "a text",
    "anchors",
):
    case(f"suite: {name}", partial(hostile_suite, SPECS[name]))

# Options.
OPTIONS: dict[str, list[str]] = {
    "sweep of 100,000": ["--set", "weight=" + ",".join(map(str, range(100_000)))],
    "sweep of 20,000": ["--set", "weight=" + ",".join(map(str, range(20_000)))],
    "sweep of products": [
        o
        for i in range(1, 3)
        for o in ("--set", f"models.{i}.weight=" + ",".join(map(str, range(100))))
    ],
    "sweep laughs": ["--set", "weight=" + "[" * 5000],
    "sweep aliases": ["--set", "weight=&a [1], " + "*a, " * 10_000],
    "sweep sixties": ["--set", "weight=1" + ":59" * 30_000],
    "sweep key": ["--set", "\x1b[2J\n=1"],
    "sweep long key": ["--set", "k" * 100_000 + "=1"],
    "sweep long value": ["--set", "weight=" + "x" * 100_000],
    "sweep far model": ["--set", "models." + "9" * 5000 + ".weight=1"],
    "sweep control": ["--set", "weight=\x1b[2J,\x07"],
}


def hostile_sweep(options: list[str], folder: Path) -> list[str]:
    pair(folder)
    return ["sweep", "spec.yaml", "--output", "out", "--no-load-check", *options]


for name, options in OPTIONS.items():
    case(f"option: {name}", partial(hostile_sweep, options))
for name, text in NAMES.items():
    if "\0" not in text:
        case(
            f"option: --shard-size {name}", lambda f, t=text: pair(f) and [*PLAN, "--shard-size", t]
        )
        case(
            f"option: --rename {name}",
            lambda f, t=text: pair(f) and ["stats", "bad", "--base", "good", "--rename", t],
        )
        case(f"option: unknown {name}", lambda f, t=text: pair(f) and [*PLAN, t])
        case(f"option: --device {name}", lambda f, t=text: pair(f) and [*RUN, "--device", t])
        case(f"command: verify {name}", lambda f, t=text: ["verify", t])
        case(f"command: stats {name}", lambda f, t=text: ["stats", t])
        case(f"command: compare {name}", lambda f, t=text: ["compare", t])
        case(
            f"command: report {name}",
            lambda f, t=text: pair(f) and ["report", "bad", "-o", t + "/x.html"],
        )

# Renames and the patterns of adapters.
EXPRESSIONS = {
    "nested": r"(a+)+$",
    "nested words": r"^(([a-z])+.)+[A-Z]([a-z])+$",
    "alternatives": r"(a|a)*$",
    "overlap": r"(a|aa)+$",
    "dots": r"(.*)*x",
    "stars": r".*.*.*.*.*.*.*.*.*.*=",
    "options": "a?" * 60 + "a" * 60,
    "branches": "(?:a|a)" * 40 + "b",
    "reference": r"(a*)\1*\1*\1*\1*b",
    "look ahead": r"(?=(a+)+$)b",
    "not ahead": r"(?!.*(a+)+b)c",
    "behind": r"(?<=a)(a+)+$",
    "lazy": r"(a+?)+?$",
    "counted": r"(a{1,30}){1,30}$",
    "counted far": r"((a{1,65000}){1,65000}){1,65000}$",
    "condition": r"(a)?(?(1)(a+)+|b)$",
    "empty loops": r"(a*)*(b*)*$",
    "words": r"(\w+\s?)+!",
    "deep groups": "(" * 3000 + ")" * 3000,
    "many groups": "(a*)" * 900,
    "long": "a" * 100_000,
    "flags": r"(?i)(a+)+$",
    "not an expression": "(" * 100,
    "control": "(\x1b[2J\n",
    "far count": "a{99999999999999999999}",
    "classes": "[" + "a-z" * 3000 + "]+(a+)+$",
}
LONG_NAME = "a" * 60 + "!"


def hostile_rename(expression: str, to: str, folder: Path) -> list[str]:
    rule = [{"from": expression, "to": to}]
    document = {
        "merge_method": "linear",
        "models": [{"model": "good", "rename": rule}, {"model": "bad"}],
    }
    pair(folder, spec=json.dumps(document), tensors={LONG_NAME: 4, LONG_NAME + "b": 3})
    return PLAN


for name, expression in EXPRESSIONS.items():
    case(f"rename: {name}", partial(hostile_rename, expression, "x"))
for name, to in {
    "long": "x" * 100_000,
    "growing": r"\g<0>" * 900,
    "unknown group": r"\9",
    "control": "\x1b[2J\n",
    "empty": "",
    "bad escape": "\\q",
    "surrogate": "\ud800",
}.items():
    case(f"rename to: {name}", partial(hostile_rename, "a", to))


def adapter(folder: Path, module: str = LONG_NAME, **changes: Any) -> list[str]:
    pair(folder, spec=TASK, tensors={f"{module}.weight": 4, "b.weight": 3})
    for name in ("good", "bad"):
        entry = {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}
        raw = json.dumps({f"{module}.weight": entry}).encode()
        (folder / name / "model.safetensors").write_bytes(header(raw, bytes(32)))
    bad = folder / "bad"
    for path in bad.iterdir():
        path.unlink()
    prefix = f"base_model.model.{module}"
    a = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}
    b = {"dtype": "F32", "shape": [4, 1], "data_offsets": [8, 24]}
    raw = json.dumps({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}).encode()
    (bad / "adapter_model.safetensors").write_bytes(header(raw, bytes(24)))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module]} | changes
    (bad / "adapter_config.json").write_text(json.dumps(config))
    return PLAN


for name, expression in EXPRESSIONS.items():
    for key, value in (("rank_pattern", 1), ("alpha_pattern", 2)):
        changes = {key: {expression: value}}
        case(f"adapter: {key}: {name}", lambda f, c=changes: adapter(f, **c))
    changes = {
        "target_modules": expression,
        "exclude_modules": expression,
        "layers_pattern": expression,
    }
    case(f"adapter: target_modules: {name}", lambda f, c=changes: adapter(f, **c))
    changes = {"trainable_token_indices": {expression: [0]}}
    case(f"adapter: trainable_token_indices: {name}", lambda f, c=changes: adapter(f, **c))
WRONG = (
    None,
    True,
    7,
    -1,
    1.5,
    10**400,
    "\x1b[2J",
    [1],
    [["a"]],
    {"a": [1]},
    {"a": {"b": 1}},
    {"": None},
)
KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save",
        "trainable_token_indices", "peft_type", "init_lora_weights", "base_model_name_or_path",
        "use_rslora", "bias", "layers_to_transform")  # fmt: skip
for key in KEYS:
    for number, value in enumerate(WRONG):
        changes = {key: value}
        case(f"adapter: {key} of a wrong type {number}", lambda f, c=changes: adapter(f, **c))
for name, text in NAMES.items():
    case(f"adapter: module {name}", lambda f, t=text: adapter(f, t, rank_pattern={"z": 2}))
    case(f"adapter: base {name}", lambda f, t=text: adapter(f, base_model_name_or_path=t))
    case(f"adapter: setting {name}", lambda f, t=text: adapter(f, **{t: [t] * 1000}))
    case(f"adapter: type {name}", lambda f, t=text: adapter(f, peft_type=t))
case(
    "adapter: many patterns",
    lambda f: adapter(f, rank_pattern={f"m{i}.*x": 1 for i in range(50_000)}),
)

# Adapters in one file, and what is trained beside an adapter.


def lora_file(folder: Path, shapes: dict[str, list[int]], **metadata: str) -> list[str]:
    pair(folder, spec=TASK, tensors={"a.b.weight": 8})
    for path in (folder / "bad").iterdir():
        path.unlink()
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, shape in shapes.items():
        end = position + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    data = header(json.dumps(entries).encode(), bytes(position))
    (folder / "bad/lora.safetensors").write_bytes(data)
    return PLAN


UP_AND_DOWN = {"lora_up.weight": [8, 1], "lora_down.weight": [1, 1]}
for name, text in NAMES.items():
    shapes = {f"lora_unet_{text}.{part}": shape for part, shape in UP_AND_DOWN.items()}
    case(f"LoRA file: layer {name}", lambda f, s=shapes: lora_file(f, s))
for number, (first, second) in enumerate(
    itertools.product(([], [0], [1], [8, 0], [0, 8], [8, 1, 1, 1, 1, 1], [8, 3]), repeat=2)
):
    for up, down in (
        ("lora_up.weight", "lora_down.weight"),
        ("hada_w1_a", "hada_w1_b"),
        ("lokr_w1", "lokr_w2"),
        ("weight", "on_input"),
        ("diff", "dora_scale"),
    ):
        shapes = {f"lora_unet_a_b.{up}": first, f"lora_unet_a_b.{down}": second}
        case(f"LoRA file: {up} of shapes {number}", lambda f, s=shapes: lora_file(f, s))
for name, said in {
    "deep": "[" * 100_000,
    "list": "[1]",
    "wrong types": '{"unet.r": "x", "unet.lora_alpha": []}',
    "slow pattern": '{"unet.r": 1, "unet.lora_alpha": 1, "unet.rank_pattern": {"(a+)+$": 1}}',
    "kind": '{"unet.peft_type": {"a": 1}}',
    "no text": "\u0000",
}.items():
    shapes = {f"unet.a.b.lora_{x}.weight": [8, 1] if x == "B" else [1, 1] for x in "AB"}
    case(f"LoRA file: config {name}",
         lambda f, s=shapes, m=said: lora_file(f, s, lora_adapter_metadata=m))  # fmt: skip
for name, expression in EXPRESSIONS.items():
    changes = {"peft_type": "IA3", "feedforward_modules": expression}
    case(f"adapter: feedforward_modules: {name}", lambda f, c=changes: adapter(f, **c))
for key in ("target_parameters", "feedforward_modules", "alpha", "peft_version"):
    for number, value in enumerate(WRONG):
        for kind in ("LORA", "LOHA", "IA3"):
            changes = {"peft_type": kind, key: value}
            case(f"adapter: {kind}, {key} of a wrong type {number}",
                 lambda f, c=changes: adapter(f, **c))  # fmt: skip

# Manifests.


def manifest_way(way: str, command: list[str], folder: Path) -> list[str]:
    pair(folder)
    WAYS[way](folder / "bad/outliermerge.json")
    return command


for way in WAYS:
    case(f"manifest: {way}: verify", partial(manifest_way, way, ["verify", "bad"]))
    case(
        f"manifest: {way}: report", partial(manifest_way, way, ["report", "bad", "-o", "out.html"])
    )
MANIFESTS: dict[str, Any] = {
    "nothing": {},
    "another format": {"format": "\x1b[2J" * 10_000},
    "shards of traversal": {
        "shards": {"../good/model.safetensors": {"num_bytes": 1, "header": "x"}}
    },
    "shards of devices": {"shards": {"/dev/zero": {"num_bytes": 1, "header": "x"}}},
    "files of traversal": {"files": {"../../../etc/passwd": {"num_bytes": 1, "sha256": "x"}}},
    "files of devices": {"files": {"/dev/null": {"num_bytes": 1, "sha256": "x"}}},
    "many files": {"files": {f"f{i}\x1b": {"num_bytes": 1, "sha256": "x"} for i in range(50_000)}},
    "long file": {"files": {"x" * 100_000: {"num_bytes": 1, "sha256": "x"}}},
    "null sign": {"files": {"a\0b": {"num_bytes": 1, "sha256": "x"}}},
    "wrong entries": {"files": {"a": [1]}, "tensors": {"a": 1}},
    "wrong values": {
        "tensors": {"a.weight": {"file": 1, "dtype": [], "shape": {}, "checksum": None}}
    },
    "many tensors": {
        "tensors": {
            f"t{i}\n": {"file": "model.safetensors", "dtype": "x", "shape": [], "checksum": ""}
            for i in range(50_000)
        }
    },
}


def hostile_manifest(name: str, command: list[str], folder: Path) -> list[str]:
    bad = pair(folder)
    whole = {"format": 1, "tensors": {}, "shards": {}, "files": {}} | MANIFESTS[name]
    (bad / "outliermerge.json").write_text(json.dumps(whole))
    return command


for name in MANIFESTS:
    for command in (["verify", "bad"], ["verify", "bad", "--json"]):
        case(f"manifest: {name}: {command[-1]}", partial(hostile_manifest, name, command))


# Pickles.


class Calls:
    """Reduces to a call of a function with arguments, as a hostile pickle does."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def zipped(data: bytes, *, is_compressed: bool = False, **more: bytes) -> bytes:
    """Return an archive as torch writes it; others are refused before they are unpickled."""
    buffer = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if is_compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
        for name, content in more.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


PICKLES: dict[str, Callable[[], bytes]] = {
    "system": lambda: zipped(pickle.dumps(Calls(os.system, "touch pwned"))),
    "system without a zip": lambda: pickle.dumps(Calls(os.system, "touch pwned")),
    "eval": lambda: zipped(pickle.dumps(Calls(eval, "open('pwned', 'w')"))),
    "open": lambda: zipped(pickle.dumps(Calls(open, "pwned", "w"))),
    "bytes of gigabytes": lambda: zipped(pickle.dumps(Calls(bytearray, 1 << 40))),
    "a bomb": lambda: zipped(b"\x80\x02" + b"]" * 64 * MEGABYTE),
    "a bomb within the limit": lambda: zipped(b"\x80\x02" + b"]" * (3 * MEGABYTE - 2)),
    "a bomb behind a long text": lambda: zipped(
        b"\x80\x02X" + struct.pack("<I", 2000) + b"c" * 2000 + b"]" * (3 * MEGABYTE - 2007)
    ),
    "a bomb of zeros": lambda: zipped(bytes(64 * MEGABYTE)),
    "a compressed bomb": lambda: zipped(b"\x80\x02" + b"]" * 64 * MEGABYTE, is_compressed=True),
    "deep": lambda: zipped(b"\x80\x02" + b"(" * 100_000 + b"."),
    "memo": lambda: zipped(b"\x80\x02" + b"]q\x00" * 100_000 + b"."),
    "a long length": lambda: zipped(b"\x80\x02\x8b\xff\xff\xff\x7f."),
    "a long text": lambda: zipped(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"."),
    "a far memo": lambda: zipped(b"\x80\x02]r\xff\xff\xff\x7f."),
    "nothing": lambda: zipped(b""),
    "cut": lambda: zipped(pickle.dumps({"a": list(range(1000))})[:-500]),
    "no records": lambda: b"PK\x05\x06" + bytes(18),
    "half a zip": lambda: zipped(pickle.dumps({}))[:60],
    "control signs": lambda: zipped(b"cos\x1b[2J\nsystem\n."),
    "a long global": lambda: zipped(b"c" + b"o" * MEGABYTE + b"\nx\n."),
    "numbers": lambda: zipped(pickle.dumps({"a": 1})),
    "a list": lambda: zipped(pickle.dumps([1, 2, 3])),
    "text": lambda: b"hello",
}


def hostile_pickle(name: str, file: str, folder: Path) -> list[str]:
    bad = pair(folder)
    (bad / "model.safetensors").unlink()
    (bad / file).write_bytes(PICKLES[name]())
    return PLAN


for name in PICKLES:
    for file in ("pytorch_model.bin", "model.pt"):
        case(f"pickle: {name}: {file}", partial(hostile_pickle, name, file))

# Many files.


def many_files(end: str, command: list[str], folder: Path) -> list[str]:
    bad = pair(folder)
    for number in range(20_000):
        (bad / f"f{number}{end}").write_bytes(b"{}")
    return command


for end in (".json", ".txt", ".py", ".bin", ""):
    case(f"20,000 files: {end}: plan", partial(many_files, end, PLAN))
case("20,000 files: .json: run", partial(many_files, ".json", RUN))

# Journals and scores.


def hostile_scores(way: str, folder: Path) -> list[str]:
    (folder / "scores").mkdir()
    WAYS[way](folder / "scores/scores.json")
    return ["compare", "scores"]


for way in WAYS:
    case(f"scores: {way}", partial(hostile_scores, way))
