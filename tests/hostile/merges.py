"""Hostile specs and models for slices, stages, modules, tokenizers and mixtures of experts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kinds import KINDS, STAGE, save_models, spec

from hostile.cases import NAMES, PLAN, case, weights

Document = dict[str, Any]
KEPT = ["run", "spec.yaml", "--output", "out", "--no-load-check", "--keep"]
DRY = ["moe", "spec.yaml", "--dry-run", "--no-load-check"]
MOE = ["moe", "spec.yaml", "--output", "out", "--no-load-check"]
HERE = Path()


def written(make: Callable[[], Any], words: Sequence[str], folder: Path) -> list[str]:
    """Write the models and a spec."""
    save_models(folder / "models")
    for model in (folder / "models").iterdir():
        model.rename(folder / model.name)
    (folder / "models").rmdir()
    text = make()
    (folder / "spec.yaml").write_text(text if isinstance(text, str) else json.dumps(text))
    return [*words]


def document(kind: str, **changes: Any) -> Callable[[], Document]:
    return lambda: spec(kind, HERE) | changes


def cases(title: str, made: Mapping[str, Callable[[], Any]], words: Sequence[str] = PLAN) -> None:
    for name, make in made.items():
        case(f"{title}: {name}", partial(written, make, words))


# Slices.


def sliced(*ranges: Any, model: str = "one", **more: Any) -> Callable[[], Document]:
    return lambda: spec("slices", HERE) | {
        "slices": [{"sources": [{"model": model, "layer_range": each}]} for each in ranges], **more
    }  # fmt: skip


RANGES: dict[str, Any] = {
    "far": [0, 10**18],
    "farther": [10**30, 10**30 + 1],
    "of thousands of digits": [0, 10**4000],
    "all beyond": [2**63, 2**63 + 2],
    "negative": [-(10**30), 2],
    "reversed": [2, 0],
    "fractions": [0, 1.5],
    "exponent": [0, 1e300],
    "truth": [False, True],
    "texts": ["0", "\x1b[2J"],
    "one": [0],
    "none": [],
    "many": [0] * 50_000,
    "nested": [[0, 1], [1, 2]],
    "text": "0-2\x1b[2J",
    "nothing": None,
    "map": {"0": 1},
}
cases("slices: range", {name: sliced(each) for name, each in RANGES.items()})
cases("slices: a module's range", {
    name: document("modules", modules={"default": {"slices": sliced(each)()["slices"]}})
    for name, each in RANGES.items()
})  # fmt: skip
SOURCE = {"model": "one", "layer_range": [0, 1]}
cases("slices", {
    "thousands": sliced(*[[0, 1]] * 8000),
    "hundreds": sliced(*[[0, 2]] * 500),
    "thousands of sources": document(
        "slices", slices=[{"sources": [SOURCE] * 12_000}]
    ),
    "without sources": document("slices", slices=[{"sources": []}] * 10_000),
    "nothing": document("slices", slices=[]),
    "empty": document("slices", slices=[{}] * 20_000),
    "texts": document("slices", slices=["\x1b[2J"] * 20_000),
    "itself": lambda: "merge_method: passthrough\nslices: &s [{sources: *s}]\n",
    "unknown keys": document("slices", slices=[{"sources": [SOURCE], "\x1b[2J\n": 1}] * 3000),
    "gradients": document(
        "slices", slices=[{"sources": [SOURCE | {"parameters": {"weight": [0.5] * 900}}]}] * 80
    ),
    "filters": document(
        "slices",
        slices=[{"sources": [SOURCE], "parameters": {"weight": [{"filter": "a", "value": 1}] * 50
                                                     + [{"value": 1}]}}] * 200,
    ),
    "models": document("slices", slices=[
        {"sources": [{"model": f"m{i}", "layer_range": [0, 1]}]} for i in range(8000)
    ]),
    "bases": document("slices", base_model=None, slices=[
        {"sources": [SOURCE], "base_model": f"m{i}"} for i in range(8000)
    ]),
    "beside models": document("slices", models=[{"model": "one"}]),
})  # fmt: skip
for name, text in NAMES.items():
    cases(f"slices: {name}", {
        "stack": sliced([0, 1], stack=text),
        "model": sliced([0, 1], model=text),
        "base": document("slices", base_model=text),
        "key": document("slices", slices=[{"sources": [SOURCE | {text: 1}]}]),
    })  # fmt: skip

# Names and configs of models with layers. Each is tried in all kinds.


def with_config(
    kind: str, words: Sequence[str], changes: Document, folder: Path, **more: Any
) -> list[str]:
    written(document(kind, **more), words, folder)
    for model in ("base", "one", "told"):
        path = folder / model / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(config))
    return [*words]


def with_tensors(kind: str, words: Sequence[str], names: Callable[[], list[str]], folder: Path
                 ) -> list[str]:  # fmt: skip
    written(document(kind), words, folder)
    for model in ("base", "one", "told"):
        (folder / model / "model.safetensors").write_bytes(weights(dict.fromkeys(names(), 2)))
    return [*words]


CONFIGS: dict[str, Document] = {
    "many layers": {"num_hidden_layers": 10**18},
    "layers of thousands of digits": {"num_hidden_layers": 10**4000},
    "negative layers": {"num_hidden_layers": -5},
    "layers as text": {"num_hidden_layers": "\x1b[2J"},
    "half a layer": {"num_hidden_layers": 1.5},
    "kinds of 90,000 layers": {"layer_types": ["full_attention"] * 90_000},
    "kinds of layers as texts": {"layer_types": "full_attention\x1b[2J"},
    "kinds of layers as maps": {"layer_types": [{"a": [1]}, None]},
    "lists of layers": {"mlp_only_layers": [10**30, -1, "x", None, [1]], "max_window_layers": "x"},
    "periods": {"attn_layer_period": 0, "attn_layer_offset": 10**30, "decoder_sparse_step": 0},
    "further layers": {"num_nextn_predict_layers": 10**30},
    "far tokens": {"bos_token_id": 10**30, "eos_token_id": [2**63] * 1000, "pad_token_id": -1},
    "tokens as texts": {"bos_token_id": "\x1b[2J", "eos_token_id": {"a": 1}},
    "many tokens": {"eos_token_id": list(range(90_000)), "suppress_tokens": list(range(90_000))},
    "a far image token": {"image_token_index": 10**30, "image_token_id": 3},
    "a vocabulary": {"vocab_size": 10**30},
    "a vocabulary as text": {"vocab_size": "\x1b[2J"},
    "no width": {"hidden_size": 0, "num_attention_heads": 0, "num_key_value_heads": 0},
    "a far width": {"hidden_size": 10**12, "head_dim": 10**12},
    "far heads": {"num_attention_heads": 10**9, "num_key_value_heads": 10**9, "head_dim": 1},
    "a kind": {"model_type": "\x1b[2J\n" * 1000, "architectures": ["\x1b[2J"]},
    "kinds": {"architectures": [[1], None, {"a": 1}], "model_type": ["llama"]},
    "parts": {"text_config": {"text_config": {"hidden_size": []}}, "vision_config": [1]},
    "code": {"auto_map": {"AutoConfig": "x.Y", "AutoModelForCausalLM": "../../x.Y"}},
    "rope": {"rope_scaling": {"type": "\x1b[2J", "factor": "x"}, "rope_theta": "x"},
    "activation": {"hidden_act": "\x1b[2J"},
    "quantised": {"quantization_config": {"quant_method": "\x1b[2J" * 1000}},
    "positions": {"max_position_embeddings": 10**15},
}
LAYERS: dict[str, Callable[[], list[str]]] = {
    "a far layer": lambda: [f"model.layers.{10**18}.mlp.up_proj.weight", "a.weight"],
    "a layer of hundreds of digits": lambda: [f"model.layers.{'9' * 900}.mlp.w.weight", "a.weight"],
    "layers and a far one": lambda: [
        f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1, 2**40)
    ],
    "other digits": lambda: ["model.layers.\u0661.mlp.up_proj.weight", "model.layers.00.a.weight"],
    "stacks": lambda: [f"s{i}.layers.0.mlp.up_proj.weight" for i in range(3000)],
    "nested stacks": lambda: [".".join(f"layers.{i}" for i in range(n)) + ".w" for n in range(90)],
    "many layers": lambda: [f"model.layers.{i}.mlp.up_proj.weight" for i in range(20_000)],
    "encoders": lambda: ["encoder." * 120 + "0.a.weight", "decoder." * 120 + "0.a.weight"],
    "dots": lambda: ["." * 900, ".0.a.", "..0..a"],
    "control signs": lambda: ["\x1b[2J.layers.0.mlp.up_proj.weight", "\x1b[2J.layers.1.mlp.w\n.w"],
    "parts of control signs": lambda: ["encoder\x1b.layers.0.a.w", "decoder\x1b.layers.0.a.w"],
    "empty": lambda: [],
}  # fmt: skip
for kind in KINDS:
    words = DRY if kind == "moe" else PLAN
    for name, changes in CONFIGS.items():
        case(f"{kind}: config: {name}", partial(with_config, kind, words, changes))
    for name, names in LAYERS.items():
        case(f"{kind}: tensors: {name}", partial(with_tensors, kind, words, names))

# Stages.


def chain(number: int, base: str = "base") -> Callable[[], Document]:
    """Return a merge of a stage, which is a merge of a stage, and so on."""

    def make() -> Document:
        stages = [
            {"name": f"s{i}", "merge_method": "linear",
             "models": [{"model": f"s{i - 1}" if i else base}, {"model": "one"}]}
            for i in range(number)
        ]  # fmt: skip
        last = [{"model": f"s{number - 1}"}, {"model": "one"}]
        return {"stages": stages, "merge_method": "linear", "models": last}

    return make


def doubled(number: int) -> Callable[[], Document]:
    """Return stages of which each uses both before it, so that the work doubles with each."""

    def make() -> Document:
        stages = []
        for i in range(number):
            before = [f"a{i - 1}", f"b{i - 1}"] if i else ["base", "one"]
            stages += [
                {"name": f"{kind}{i}", "merge_method": "linear",
                 "parameters": {"weight": 0.5},
                 "models": [{"model": m, "parameters": {"weight": w}} for m, w in
                            zip(before, weights_, strict=True)]}
                for kind, weights_ in (("a", (0.3, 0.7)), ("b", (0.6, 0.4)))
            ]  # fmt: skip
        last = [{"model": f"{kind}{number - 1}"} for kind in "ab"]
        return {"stages": stages, "merge_method": "linear", "models": last}

    return make


def staged(name: Any = STAGE, **more: Any) -> Callable[[], Document]:
    inner = {"name": name, "merge_method": "linear", "models": [{"model": "base"}]} | more
    models = [{"model": name}, {"model": "one"}]
    return lambda: {"stages": [inner], "merge_method": "linear", "models": models}


CHAINS = {
    "a chain of 50": chain(50),
    "a chain of 200": chain(200),
    "a chain of 1,000": chain(1000),
    "a chain of 8,000": chain(8000),
    "doubled 12 times": doubled(12),
    "doubled 40 times": doubled(40),
    "doubled 1,000 times": doubled(1000),
    "a circle": chain(2, base="s1"),
    "a circle of 3,000": chain(3000, base="s2999"),
    "itself": staged(models=[{"model": STAGE}]),
    "itself as base": staged(base_model=STAGE),
    "stages of a stage": staged(stages=[{"name": "x"}]),
    "no stages": lambda: {"stages": []},
    "texts": lambda: {"stages": ["\x1b[2J"] * 20_000},
    "all the same name": lambda: {"stages": [{"name": "a"}] * 20_000},
    "not used": lambda: {
        "stages": [{"name": f"s{i}", "merge_method": "linear", "models": [{"model": "one"}]}
                   for i in range(8000)],
        "merge_method": "linear", "models": [{"model": "base"}],
    },
    "documents without names": lambda: "---\nmerge_method: linear\nmodels: []\n" * 8000,
    "documents": lambda: "---\nname: a\nmerge_method: linear\nmodels: [{model: a}]\n" * 5000,
    "adapters": lambda: staged()() | {
        "models": [{"model": "+".join([STAGE] * 5000)}, {"model": "one"}]
    },
    "adapters of names": lambda: staged()() | {
        "models": [{"model": STAGE + "+a/b" * 900}, {"model": "one"}]
    },
    "a name as list": staged(name=[STAGE]),
    "a number as name": staged(name=10**4000),
}  # fmt: skip
for words in (PLAN, [*KEPT, STAGE]):
    cases(f"stages: {words[0]}", CHAINS, words)
PATHS = {"above": "../evil", "root": "/evil", "a folder": "a/b", "nothing": "", "here": ".",
         "model": "base", "home": "~/evil", "options": "--overwrite"}  # fmt: skip
for name, text in {**NAMES, **PATHS}.items():
    cases("stages: named", {name: staged(text)})
    if "\0" not in text:
        cases("stages: kept", {name: staged(text)}, [*KEPT, text])

# Modules.


def module(**more: Any) -> Document:
    return {"merge_method": "linear", "models": [{"model": "base"}, {"model": "one"}]} | more


def parts(made: Callable[[], Any]) -> Callable[[], Document]:
    return lambda: {"base_model": "base", "modules": made()}


cases("modules", {
    "thousands": parts(lambda: {f"model.layers.{i}": module() for i in range(6000)}),
    "one for each tensor": parts(lambda: {
        f"model.layers.{i}.mlp.{part}_proj": module() for i in (0, 1) for part in ("up", "gate")
    }),
    "within one another": parts(lambda: {
        start: module() for start in ("model", "model.layers", "model.layers.0")
    }),
    "nothing": parts(lambda: {}),
    "a list": parts(lambda: [module()] * 1000),
    "texts": parts(lambda: {f"m{i}": "\x1b[2J" for i in range(20_000)}),
    "no name": parts(lambda: {"": module()}),
    "a dot": parts(lambda: {".": module()}),
    "modules of modules": parts(lambda: {"default": {"modules": {"default": module()}}}),
    "a stage in a module": parts(lambda: {"default": module(stages=[{"name": "x"}])}),
    "kept": parts(lambda: {"default": module(keep=[f"k{i}" for i in range(40_000)])}),
    "kept all": parts(lambda: {"default": module(keep=[""])}),
    "kept patterns": parts(lambda: {"default": module(keep=["(a+)+$", "\x1b[2J", "x" * 100_000])}),
    "gradients": parts(lambda: {"default": module(parameters={"weight": [0.5] * 90_000})}),
    "renames": parts(lambda: {"default": module(models=[
        {"model": "base"}, {"model": "one", "rename": [{"from": "(a+)+$", "to": "x"}]}
    ])}),
    "vocabulary": parts(lambda: {"default": module(vocabulary="\x1b[2J")}),
    "unlike": parts(lambda: {"model.layers.0": module(models=[
        {"model": "base"}, {"model": "told"}
    ])}),
})  # fmt: skip
for name, text in NAMES.items():
    cases(f"modules: {name}", {
        "name": parts(lambda t=text: {t: module()}),
        "model": parts(lambda t=text: {"default": module(models=[{"model": t}])}),
        "base": parts(lambda t=text: {"default": module(base_model=t)}),
        "keep": parts(lambda t=text: {"default": module(keep=[t])}),
        "key": parts(lambda t=text: {"default": module(**{t: 1})}),
    })  # fmt: skip
