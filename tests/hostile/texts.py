"""Hostile tokenizers, chat templates, and prompts of mixtures of experts."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kinds import WORDS, tokenizer_json

from hostile.cases import MEGABYTE, NAMES, PLAN, RUN, WAYS, case
from hostile.merges import CONFIGS, DRY, HERE, MOE, cases, document, spec, with_config, written

FORWARD = [*MOE, "--no-routing"]
MERGED = [*RUN, "--quiet"]  # of rows by token, which takes torch


def needs_torch(arguments: Sequence[str]) -> bool:
    """Tell whether a command of a case takes torch, or transformers."""
    return arguments[0] == "moe" or [*arguments] == MERGED


# What a spec says of the tokenizer.


def asked(**tokenizer: Any) -> Callable[[], Any]:
    return document("tokenizer", tokenizer=tokenizer)


def row(source: Any, token: str = "<new>") -> Callable[[], Any]:
    return asked(source="union", tokens={token: {"source": source}})


MULTIPLES: dict[str, Any] = {
    "10^6": 10**6,
    "10^9": 10**9,
    "10^12": 10**12,
    "2^63": 2**63,
    "10^400": 10**400,
    "thousands of digits": 10**4000,
    "0": 0,
    "negative": -64,
    "fraction": 1.5,
    "truth": True,
    "text": "\x1b[2J",
}
cases("tokenizer: pad_to_multiple_of", {
    name: asked(source="union", pad_to_multiple_of=number) for name, number in MULTIPLES.items()
})  # fmt: skip
cases("tokenizer: rows", {
    "20,000 tokens": asked(
        source="union", tokens={f"t{i}": {"source": {"kind": "zero"}} for i in range(20_000)}
    ),
    "20,000 tokens that no model has": asked(
        source="union", tokens={f"t{i}": {} for i in range(20_000)}
    ),
    "20,000 unknown models": asked(
        source="union", tokens={f"t{i}": {"source": f"m{i}"} for i in range(20_000)}
    ),
    "a token of 2 MB": row({"kind": "zero"}, "t" * (2 * MEGABYTE - 3000)),
    "an empty token": row({"kind": "zero"}, ""),
    "a far row": row({"kind": "model_token", "model": "told", "token_id": 10**30}),
    "a negative row": row({"kind": "model_token", "model": "told", "token_id": -1}),
    "a kind": row({"kind": ["\x1b[2J"]}),
    "nested": row({"kind": {"kind": {"kind": "zero"}}}),
    "a list": row(["told"]),
    "a source": asked(source="\x1b[2J"),
    "a source of a megabyte": asked(source="x" * MEGABYTE),
    "a list of sources": asked(source=["told"] * 10_000),
})  # fmt: skip
for name, text in NAMES.items():
    cases(f"tokenizer: {name}", {
        "token": row({"kind": "zero"}, text),
        "other token": row({"kind": "model_token", "model": "told", "token": text}),
        "model": row(text),
        "source": asked(source=text),
        "key": row({"kind": "zero", text: 1}),
    })  # fmt: skip


# Files of tokenizers. They are put beside the model that has another vocabulary, or the base.


def model_of(kind: str, vocabulary: Any, **more: Any) -> Any:
    return tokenizer_json(model={"type": kind, "vocab": vocabulary, **more})


def words(number: int) -> dict[str, int]:
    return {word: id_ for id_, word in enumerate([*WORDS, *(f"w{i}" for i in range(number))])}


def normalized(*normalizers: Any, added: str = "<x>", **changes: Any) -> Any:
    found = tokenizer_json([(len(WORDS), added)], **changes)
    found["normalizer"] = {"type": "Sequence", "normalizers": [*normalizers]}
    found["added_tokens"][0] |= {"special": False, "normalized": True}
    return found


def replace(pattern: Any, content: str) -> Any:
    pattern = pattern if isinstance(pattern, dict) else {"String": pattern}
    return {"type": "Replace", "pattern": pattern, "content": content}


def nested(depth: int) -> Any:
    found: Any = {"type": "NFC"}
    for _ in range(depth):
        found = {"type": "Sequence", "normalizers": [found]}
    return found


def added(*entries: Any, **changes: Any) -> Any:
    return tokenizer_json(**changes) | {"added_tokens": [*entries]}


def token(content: Any, id_: Any = 8, **flags: Any) -> Any:
    usual = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": id_, "content": content} | usual | flags


EVIL = r"(a+)+$"
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "far ids": lambda: model_of("WordLevel", words(0) | {"far": 2**32 - 1}, unk_token="<unk>"),
    "ids far apart": lambda: model_of(
        "WordLevel", {f"w{i}": i * 10**7 for i in range(400)}, unk_token="w0"
    ),
    "ids of two billion": lambda: model_of("BPE", words(0) | {"far": 2**31}, merges=[]),
    "an id of a million": lambda: model_of("WordLevel", words(0) | {"far": 10**6}),
    "negative ids": lambda: model_of("WordLevel", words(0) | {"far": -1}),
    "an id twice": lambda: model_of("WordLevel", words(0) | {"one": 5, "two": 5}),
    "ids too far": lambda: model_of("WordLevel", words(0) | {"far": 2**64}),
    "300,000 words": lambda: model_of("WordLevel", words(300_000), unk_token="<unk>"),
    "200,000 words": lambda: model_of("WordLevel", words(200_000), unk_token="<unk>"),
    "300,000 pieces": lambda: model_of("BPE", words(300_000), merges=[]),
    "merges": lambda: model_of(
        "BPE", words(1000) | {f"w{i}w{i}": 2000 + i for i in range(900)},
        merges=[f"w{i} w{i}" for i in range(900)] * 200,
    ),
    "a merge of one": lambda: model_of("BPE", words(0), merges=["code"]),
    "a merge of three": lambda: model_of("BPE", words(0), merges=[["code", "math", "sum"]]),
    "a merge of numbers": lambda: model_of("BPE", words(0), merges=[[1, 2]]),
    "a merge of nothing": lambda: model_of("BPE", words(0) | {"": 8}, merges=[["", "code"]]),
    "merges as map": lambda: model_of("BPE", words(0), merges={"a": 1}),
    "scores": lambda: model_of("Unigram", [[f"p{i}", -1e308] for i in range(3000)], unk_id=0),
    "scores of text": lambda: model_of("Unigram", [["a", "x"]], unk_id=0),
    "no pieces": lambda: model_of("Unigram", [], unk_id=5),
    "a far unknown": lambda: model_of("Unigram", [["a", -1.0]], unk_id=2**63),
    "a prefix": lambda: model_of(
        "WordPiece", words(3), continuing_subword_prefix="\x1b[2J" * 1000,
        max_input_chars_per_word=2**62, unk_token="<unk>",
    ),
    "no such kind": lambda: model_of("\x1b[2J" * 10_000, words(0)),
    "no model": lambda: tokenizer_json(model=None),
    "a model as list": lambda: tokenizer_json(model=[1]),
    "no vocabulary": lambda: tokenizer_json(model={"type": "BPE"}),
    "a vocabulary as text": lambda: model_of("WordLevel", "\x1b[2J" * 10_000),
    "control signs": lambda: model_of(
        "WordLevel", words(0) | {text: 8 + i for i, text in enumerate(NAMES.values())},
        unk_token="<unk>",
    ),
    "a word of 10 MB": lambda: model_of("WordLevel", words(0) | {"\x1b" * 3 * MEGABYTE: 8}),
    "doubling": lambda: normalized(*[replace("a", "aa")] * 45, added="a"),
    "a long replacement": lambda: normalized(
        *[replace("a", "a" * MEGABYTE)] * 4, added="a" * 1000
    ),
    "an endless expression": lambda: normalized(
        *[replace({"Regex": EVIL}, "x")] * 20, added="a" * 5000 + "!"
    ),
    "an endless split": lambda: normalized(
        added="a" * 40 + "!",
        pre_tokenizer={"type": "Split", "pattern": {"Regex": EVIL}, "behavior": "Isolated",
                       "invert": False},
    ),
    "no expression": lambda: normalized(replace({"Regex": "(" * 1000}, "x")),
    "a far count": lambda: normalized(replace({"Regex": "(a{1,99999}){1,99999}"}, "x")),
    "prefixes": lambda: normalized(*[{"type": "Prepend", "prepend": "x" * MEGABYTE}] * 12),
    "a short map": lambda: normalized(
        {"type": "Precompiled",
         "precompiled_charsmap": base64.b64encode(struct.pack("<I", 2**31)).decode()},
    ),
    "deep normalizers": lambda: tokenizer_json(normalizer=nested(40)),
    "deeper normalizers": lambda: json.dumps(tokenizer_json(normalizer="X")).replace(
        '"X"', '{"type":"Sequence","normalizers":[' * 5000 + "]}" * 5000
    ),
    "100,000 normalizers": lambda: normalized(*[{"type": "NFC"}] * 100_000),
    "a template": lambda: tokenizer_json(post_processor={
        "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 50_000,
        "pair": [], "special_tokens": {},
    }),
    "a padding": lambda: tokenizer_json(padding={
        "strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": 2**40,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>",
    }),
    "a truncation": lambda: tokenizer_json(truncation={
        "max_length": 0, "stride": 2**40, "strategy": "LongestFirst", "direction": "Right",
    }),
    "100,000 added tokens": lambda: added(*(token(f"<{i}>", 8 + i) for i in range(100_000))),
    "an added token of 10 MB": lambda: added(token("\x1b" * 3 * MEGABYTE)),
    "added control signs": lambda: added(
        *(token(text, 8 + i) for i, text in enumerate(NAMES.values()))
    ),
    "an added id": lambda: added(token("<x>", 2**32 - 1)),
    "added ids far apart": lambda: added(*(token(f"<{i}>", i * 10**7) for i in range(400))),
    "an empty added token": lambda: added(token("")),
    "added numbers": lambda: added(1, None, [2]),
    "an added list": lambda: added(token(["x"])),
    "added surrogates": lambda: '{"added_tokens": [{"id": 8, "content": "\\ud800"}]}',
    "no added tokens": lambda: tokenizer_json() | {"added_tokens": None},
    "added as map": lambda: tokenizer_json() | {"added_tokens": {"<x>": 8}},
    "strange flags": lambda: added(token("<x>", lstrip="\x1b[2J", content_="x", **{"\x1b[2J": 1})),
    "strange keys": lambda: added(token("<x>") | {"self": 1, "cls": 2, "flags": {"a": 1}}),
    "nothing": lambda: {},
    "a version": lambda: tokenizer_json(version="\x1b[2J" * 10_000),
}  # fmt: skip
DECODERS: dict[str, Any] = {
    "far": {str(2**40): token("<x>")},
    "digits": {"9" * 5000: token("<x>")},
    "negative": {"-1": token("<x>")},
    "no number": {"\x1b[2J": token("<x>")},
    "numbers": {"8": 1, "9": None},
    "100,000": {str(i): token(f"<{i}>") for i in range(100_000)},
    "control signs": {str(8 + i): token(text) for i, text in enumerate(NAMES.values())},
    "strange flags": {"8": token("<x>") | {"content_": 1, "self": 2, "\x1b[2J": 3}},
    "no content": {"8": {"special": True}},
    "a list": [token("<x>")],
    "beyond": {"10000000": token("<x>")},
}
SPECIAL: dict[str, Any] = {
    "numbers": {"bos_token": 1, "eos_token": [2], "pad_token": {"content": 3}},
    "control signs": {"bos_token": "\x1b[2J", "additional_special_tokens": [*NAMES.values()]},
    "100,000": {"additional_special_tokens": [f"<{i}>" for i in range(100_000)]},
    "a token of 10 MB": {"bos_token": "x" * 10 * MEGABYTE},
    "nested": {"extra_special_tokens": {"a": {"b": {"c": "x"}}}},
    "a class": {"tokenizer_class": "os.system\x1b[2J", "auto_map": {"AutoTokenizer": ["x.Y", 1]}},
    "lengths": {"model_max_length": 10**400},
    "templates": {"chat_template": [{"name": "default", "template": ["x"]}, 1, None]},
    "a template as number": {"chat_template": 1},
    "many templates": {
        "chat_template": [{"name": f"n{i}", "template": "x"} for i in range(50_000)]
    },
}


def varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def piece(text: bytes) -> bytes:
    inner = b"\x0a" + varint(len(text)) + text
    return b"\x0a" + varint(len(inner)) + inner


PIECES: dict[str, Callable[[], bytes]] = {
    "zeros": lambda: bytes(15 * MEGABYTE),
    "a long number": lambda: b"\xff" * MEGABYTE,
    "a long field": lambda: b"\x0a" + varint(2**62),
    "empty pieces": lambda: piece(b"") * 300_000,
    "300,000 pieces": lambda: b"".join(piece(b"p%d" % i) for i in range(300_000)),
    "not UTF-8": lambda: piece(b"\xff\xfe") * 10,
    "control signs": lambda: b"".join(piece(text.encode()) for text in NAMES.values()),
    "one piece of 10 MB": lambda: piece(b"\x1b" * 10 * MEGABYTE),
    "small numbers": lambda: b"\x08\x01" * 5_000_000,
    "groups": lambda: b"\x0b" * 1000,
    "pieces without text": lambda: b"\x0a\x02\x10\x01" * 100_000,
}


def with_file(
    make: Callable[[], Any], model: str, file: str, source: str, command: Sequence[str],
    folder: Path,
) -> list[str]:  # fmt: skip
    """Write the models and a merge with a tokenizer, of which a file of a model is hostile."""
    kind = "moe" if command[0] == "moe" else "tokenizer"
    changes = {"gate_mode": "cheap_embed"} if kind == "moe" else {"tokenizer": {"source": source}}
    written(document(kind, **changes), command, folder)
    content = make()
    if file == "tokenizer.model":
        (folder / model / "tokenizer.json").unlink()
    if file == "tokenizer_config.json":
        content = json.loads((folder / model / file).read_text()) | content
    data = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (folder / model / file).write_bytes(data if isinstance(data, bytes) else data.encode())
    return [*command]


FILES: tuple[tuple[str, dict[str, Callable[[], Any]]], ...] = (
    ("tokenizer.json", TOKENIZERS),
    (
        "tokenizer_config.json",
        {
            f"decoder: {name}": lambda v=value: {"added_tokens_decoder": v}
            for name, value in DECODERS.items()
        }
        | {f"special: {name}": lambda v=value: v for name, value in SPECIAL.items()},
    ),
    ("tokenizer.model", PIECES),
)
for file, ways in FILES:
    for number, (name, make) in enumerate(ways.items()):
        for model, source, command in (
            ("told", "union", PLAN),
            (
                "base",
                ("union", "base")[number % 2],
                MERGED,
            ),
            ("base", "", FORWARD),
        ):
            of = "experts'" if command is FORWARD else source
            case(f"{of} {model}/{file}: {name}",
                 partial(with_file, make, model, file, source, command))  # fmt: skip


# Chat templates: of a spec, and of a model.
MESSAGE = "{% for m in messages %}{{ m.content }}{% endfor %}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}"
TEMPLATES: dict[str, Callable[[], str]] = {
    "loops": lambda: LOOP + "{{ i }}{% endfor %}{% endfor %}" + MESSAGE,
    "loops without a word": lambda: LOOP + "{% endfor %}{% endfor %}" + MESSAGE,
    "a far range": lambda: "{% for i in range(10**12) %}x{% endfor %}",
    "a text of 10 GB": lambda: "{{ 'x' * 10**10 }}" + MESSAGE,
    "a list of billions": lambda: "{{ ([0] * 10**10)|length }}" + MESSAGE,
    "wide": lambda: "{{ 'x'|center(10**10) }}" + MESSAGE,
    "indented": lambda: "{{ messages|tojson(indent=10**10) }}" + MESSAGE,
    "formatted": lambda: "{{ '%10000000000d'|format(1) }}" + MESSAGE,
    "formatted by braces": lambda: "{{ '{:>10000000000}'.format(1) }}" + MESSAGE,
    "powers": lambda: "{{ 9**9**9**9 }}" + MESSAGE,
    "a product": lambda: "{{ (10**100000 * 10**100000)|string }}" + MESSAGE,
    "doubling": lambda: (
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}" + MESSAGE
    ),
    "lists": lambda: (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}" + MESSAGE
    ),
    "itself": lambda: "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "itself twice": lambda: (
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(90) }}"
    ),
    "deep": lambda: "{% if true %}" * 20_000 + "{% endif %}" * 20_000,
    "deep brackets": lambda: "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep lists": lambda: "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "signs": lambda: "{{ " + "not " * 100_000 + "1 }}",
    "minus": lambda: "{{ " + "-" * 100_000 + "1 }}",
    "a sum": lambda: "{{ " + "1+" * 100_000 + "1 }}",
    "filters": lambda: "{{ 1" + "|string" * 50_000 + " }}",
    "classes": lambda: "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attributes": lambda: "{{ ''|attr('__class__') }}{{ cycler.__init__.__globals__.os }}",
    "a call of the system": lambda: "{{ namespace.__init__.__globals__.os.system('touch pwned') }}",
    "a file": lambda: "{% include '/etc/passwd' %}{% import '../x' as y %}",
    "extends": lambda: "{% extends '/etc/passwd' %}",
    "refuses": lambda: "{{ raise_exception('\x1b[2J' * 100000) }}",
    "refuses a system turn": lambda: (
        MESSAGE
        + "{% if messages[0].role == 'system' %}{{ raise_exception('\x1b[2J' * 9999) }}{% endif %}"
    ),
    "a time": lambda: "{{ strftime_now('%' * 1000000) }}{{ strftime_now('\ud800') }}" + MESSAGE,
    "no Jinja": lambda: "{% for \x1b[2J %}",
    "no Jinja of a megabyte": lambda: "{% " + "x\x1b" * (MEGABYTE // 2),
    "an unknown block": lambda: "{% \x1b[2J" + "y" * 100_000 + " %}",
    "markers": lambda: MESSAGE + "".join(f"<|t{i}|>" for i in range(50_000)),
    "control signs": lambda: MESSAGE + "".join(NAMES.values()),
    "two megabytes": lambda: MESSAGE + "x" * (2 * MEGABYTE - 4000),
    "nothing": lambda: "",
    "null signs": lambda: MESSAGE + "\0" * 1000,
    "breaks": lambda: "{% break %}{% continue %}" + MESSAGE,
    "an endless expression": lambda: (
        "{{ ('a' * 90000)|replace('', 'b' * 90000)|length }}" + MESSAGE
    ),
    "words": lambda: "{{ ('a ' * 9000000)|wordwrap(1)|length }}" + MESSAGE,
    "urls": lambda: "{{ ('a.' * 900000 + '!')|urlize|length }}" + MESSAGE,
    "tags": lambda: "{{ ('<' * 9000000)|striptags|length }}" + MESSAGE,
    "batches": lambda: "{{ range(99999)|batch(1, 'x')|list|length }}" + MESSAGE,
    "slices": lambda: "{{ range(9)|slice(10**10)|list|length }}" + MESSAGE,
    "roles": lambda: "{% for m in messages %}{{ m.update({'content': 'x' * 10**9}) }}{% endfor %}",
}


def with_template(make: Callable[[], str], place: str, folder: Path) -> list[str]:
    changes: dict[str, Any] = {"chat_template": make() if place == "spec" else "auto"}
    if place == "spec":
        return written(document("tokenizer", **changes), PLAN, folder)
    written(document("tokenizer", **changes), PLAN, folder)
    for model in ("base", "told"):
        if place == "chat_template.jinja":
            (folder / model / place).write_bytes(make().encode("utf-8", "replace"))
        else:
            path = folder / model / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": make()}))
    return [*PLAN]


for number, (name, make) in enumerate(TEMPLATES.items()):
    file = ("chat_template.jinja", "tokenizer_config.json")[number % 2]
    for place in ("spec", file):
        case(f"chat template: {name}: {place}", partial(with_template, make, place))

# Mixtures of experts.


def mixed(**changes: Any) -> Callable[[], Any]:
    return document("moe", **changes)


def expert(**more: Any) -> Callable[[], Any]:
    return lambda: (
        spec("moe", HERE)
        | {"experts": [spec("moe", HERE)["experts"][0] | more, *spec("moe", HERE)["experts"][1:]]}
    )


PROMPTS: dict[str, Callable[[], Any]] = {
    "of a megabyte": lambda: ["code math " * (MEGABYTE // 10)],
    "of one word of a megabyte": lambda: ["x" * MEGABYTE],
    "of thousands of words": lambda: ["code math " * 10_000],
    "50,000": lambda: ["code"] * 50_000,
    "50,000 different": lambda: [f"code {i}" for i in range(50_000)],
    "a long one and many short": lambda: ["code " * 100_000, *(f"math {i}" for i in range(20_000))],
    "empty": lambda: [""],
    "blank": lambda: [" \n\t"],
    "control signs": lambda: [*NAMES.values()],
    "surrogates": lambda: ["\ud800"],
    "numbers": lambda: [1, 2.5, None],
    "a text": lambda: "code",
    "nested": lambda: [["code"]],
    "none": lambda: [],
    "special tokens": lambda: ["<s>" * 100_000],
}
for words_ in (DRY, FORWARD, MOE):
    shown = "dry run" if words_ is DRY else "routing" if words_ is MOE else "run"
    for mode in ("hidden", "cheap_embed"):
        cases(f"moe: prompts: {shown}, {mode}", {
            name: lambda m=make, g=mode: expert(positive_prompts=m())() | {"gate_mode": g}
            for name, make in PROMPTS.items()
        }, words_)  # fmt: skip
for name, changes in CONFIGS.items():
    case(
        f"moe: forward: config: {name}",
        partial(with_config, "moe", FORWARD, changes, gate_mode="hidden"),
    )
VALUES: dict[str, Any] = {
    "huge": 1e308,
    "infinite": float("inf"),
    "no number": float("nan"),
    "thousands of digits": 10**4000,
    "negative": -1,
    "text": "\x1b[2J",
    "list": [1] * 10_000,
    "truth": True,
}
for key in ("noise_scale", "residual_scale"):
    cases(f"moe: {key}", {
        name: expert(**{key: value}) for name, value in VALUES.items()
    }, MOE)  # fmt: skip
for key in ("seed", "experts_per_token", "architecture", "gate_mode", "dtype", "shared_experts"):
    cases(f"moe: {key}", {
        name: mixed(**{key: value}) for name, value in VALUES.items()
    }, MOE)  # fmt: skip
cases("moe", {
    "10,000 experts": lambda: mixed()() | {"experts": [{"source_model": "one"}] * 10_000},
    "10,000 models": lambda: mixed()() | {
        "experts": [{"source_model": f"m{i}"} for i in range(10_000)]
    },
    "500 experts with noise": lambda: mixed()() | {
        "experts": [{"source_model": "one", "noise_scale": 0.1}] * 500
    },
    "no experts": mixed(experts=[]),
    "experts as texts": mixed(experts=["\x1b[2J"] * 10_000),
    "itself": lambda: "base_model: base\nexperts: &e [*e]\n",
    "a merge": lambda: "merge_method: linear\nmodels: [{model: one}]\n",
    "unknown keys": lambda: mixed()() | {f"\x1b[2J{i}": 1 for i in range(10_000)},
    "adapters": expert(source_model="+".join(["one"] * 5000)),
}, DRY)  # fmt: skip
for name, text in NAMES.items():
    cases(f"moe: {name}", {
        "base": mixed(base_model=text),
        "expert": expert(source_model=text),
        "key": mixed(**{text: 1}),
        "architecture": mixed(architecture=text),
    }, DRY)  # fmt: skip
for way in WAYS:

    def hostile_file(way: str, folder: Path) -> list[str]:
        written(mixed(), DRY, folder)
        WAYS[way](folder / "spec.yaml")
        return [*DRY]

    case(f"moe: spec: {way}", partial(hostile_file, way))
