"""The model card of an output: what it is, how it is used, and how it was made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.folders.folder import MANIFEST_NAME
from outliermerge.errors import shown
from outliermerge.output.licences import hub_ids, licence_lines, licence_note, licences_of
from outliermerge.output.recipe import RECIPE_NAME, from_here, renamed
from outliermerge.planning.llama_cpp import Conversion
from outliermerge.planning.plan import Input, Plan, Stacked
from outliermerge.spec.text import as_yaml

HERE = '"path/to/this/folder"'
"""Where a card's reader has the output, as Python writes it."""
_PROMPT = '"The capital of France is"'
_QUESTION = "What is the capital of France?"
_TEXT = "A sentence."
_MOST_ROWS = 40
_OF_GGUF = (
    "from transformers import AutoModelForCausalLM\n\n"
    f'model = AutoModelForCausalLM.from_pretrained({HERE}, gguf_file="model.gguf")'
)


def model_card(
    plan: Plan, contents: Mapping[str, bytes | Path], drift: Mapping[str, Any], command: str
) -> str:
    """Return the output's README: the front matter that the hub reads, and the recipe.

    Args:
        contents: the files beside the weights.
        drift: what `measure_drift` returned.
        command: makes the output again.
    """
    sidecars = {sidecar.name for sidecar in plan.sidecars}
    models = [*{model.reference: model for model in plan.models}.values()]
    on_hub = dict.fromkeys(name for entry in models for name in hub_ids(entry))
    front = ["---"]
    if on_hub:
        front += ["base_model:", *(f"- {json.dumps(name)}" for name in on_hub)]
        front += ["base_model_relation: merge"]
    if "model_index.json" in sidecars:
        front += ["library_name: diffusers"]
    elif "modules.json" in sidecars:
        front += ["library_name: sentence-transformers"]
    elif "config.json" in sidecars:
        front += ["library_name: transformers"]
    front += [*licence_lines(models), "tags:", "- merge", "- outliermerge", "---"]
    method = plan.spec.method
    paper = f" ({method.paper})" if method.paper and not plan.modules else ""
    parts = [
        "\n".join(front),
        "# Merged model",
        f"Made by outliermerge {version('outliermerge')} with {as_code(plan.spec.title)}{paper}: "
        f"{plan.spec.summary}",
    ]
    is_gguf = plan.spec.document.format == "gguf"
    if plan.conversion is not None:
        parts += ["## Use", f"```sh\n{_by_llama_cpp(plan.conversion)}\n```"]
    elif snippet := _OF_GGUF if is_gguf else usage(contents, sidecars):
        parts += ["## Use", f"```python\n{snippet}\n```"]
    parts += ["## Models", "\n".join(parent_line(entry) for entry in models)]
    parts += filter(None, [licence_note(models)])
    if plan.stacked is not None:
        parts += ["## Layers", _layers(plan, plan.stacked)]
    if plan.spec.all_stages:
        parts += ["## Stages", _stages(plan)]
    if plan.transplant is not None:
        parts += ["## Rows of the tokens", _rows(plan.transplant)]
    if drift:
        parts += ["## Drift from the base", _drift(drift)]
    elif plan.modules or method.uses_base:
        parts += ["## Drift from the base", f"Not measured: {_why_not_measured(plan)}."]
    return (
        "\n\n".join(parts)
        + f"\n\n## Recipe\n\n{fenced(as_yaml(renamed(plan.spec.as_dict(), from_here)))}\n\n"
        + f"`{RECIPE_NAME}` is the same with models that any folder finds. It gives this folder "
        + f"again:\n\n```sh\n{command}\n```\n\n"
        + f"`{MANIFEST_NAME}` lists every tensor with its parameters, statistics and checksum; "
        + "`outliermerge verify` proves this folder against it.\n"
    )


def _by_llama_cpp(conversion: Conversion) -> str:
    """Return the command that runs a GGUF file: not all that llama.cpp has, transformers reads."""
    path = HERE.strip('"')
    model, *towers = conversion.files
    if not towers:
        return f"llama-cli --model {path}/{model}"
    return f"llama-mtmd-cli --model {path}/{model} --mmproj {path}/{towers[0]}"


def _layers(plan: Plan, stacked: Stacked) -> str:
    """Return a list of which layers are from where."""
    rows = []
    for one in stacked.slices:
        models = " and ".join(
            f"{_range(*layers)} of {as_code(from_here(plan.inputs[number].reference))}"
            for number, layers in one.ranges.items()
        )
        rows.append(f"- {_range(one.start, one.stop)}: {models}")
    if len(rows) > _MOST_ROWS:
        rows[_MOST_ROWS:] = [f"- … and {len(rows) - _MOST_ROWS} more slices, in the recipe"]
    what = "layers as they are" if plan.spec.method.name == "passthrough" else "merged layers"
    return f"A stack of {stacked.num_layers} {what}:\n\n" + "\n".join(rows)


def _range(start: int, stop: int) -> str:
    return f"layer {start}" if stop - start == 1 else f"layers {start} to {stop - 1}"


def _stages(plan: Plan) -> str:
    """Return a list of the merges that this one is made of."""
    rows = []
    for name, stage in plan.spec.all_stages.items():
        models = [*([stage.base] if stage.base else []), *stage.models]
        named = ", ".join(dict.fromkeys(as_code(from_here(each.reference)) for each in models))
        rows.append(f"- {as_code(name)}: {as_code(stage.title)} of {named}")
    return "\n".join(rows)


def _why_not_measured(plan: Plan) -> str:
    if any(entry.made_of for entry in plan.inputs):
        what = "modules" if plan.modules else "stages"
        return f"the merges of {what} that this one uses are not stored"
    if plan.stacked is not None:
        return "its layers are of several places in the models"
    return "too little of it can be read in parts, or a model is the base itself"


def usage(contents: Mapping[str, bytes | Path], sidecars: set[str]) -> str:
    """Return Python code that loads a model of the output's kind; empty if that is not known."""
    if "model_index.json" in sidecars:
        return _loading("diffusers", "DiffusionPipeline", "pipeline")
    if "modules.json" in sidecars:
        return (
            "from sentence_transformers import SentenceTransformer\n\n"
            f"model = SentenceTransformer({HERE})\nprint(model.encode([{_quote(_TEXT)}]).shape)"
        )
    if "adapter_config.json" in sidecars and "config.json" not in sidecars:
        return _loading("peft", "AutoPeftModel")
    config = _json(contents, "config.json")
    component = config.get("_class_name")
    if isinstance(component, str) and component.isidentifier():
        return _loading("diffusers", component)
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    if not isinstance(first, str) or not (config.get("model_type") or first):
        return ""
    has_tokenizer = any(name.startswith(("tokenizer", "vocab", "spiece")) for name in sidecars)
    own_code = ", trust_remote_code=True" if "auto_map" in config else ""
    if has_tokenizer and _has_chat_template(contents) and _is_text_model(config, first):
        return _chat_model(own_code)
    return _of_transformers(config, first, sidecars, has_tokenizer, own_code)


def _has_chat_template(contents: Mapping[str, bytes | Path]) -> bool:
    return "chat_template.jinja" in contents or bool(
        _json(contents, "tokenizer_config.json").get("chat_template")
    )


def _is_text_model(config: Mapping[str, Any], architecture: str) -> bool:
    is_vision = "vision_config" in config or "vision_tower" in config
    return architecture.endswith(("ForCausalLM", "LMHeadModel")) and not is_vision


def _of_transformers(
    config: Mapping[str, Any], architecture: str, sidecars: set[str], has_tokenizer: bool, code: str
) -> str:
    head = re.search(r"For([A-Z]\w+)$", architecture)
    kind = head[1] if head else ""
    is_vision = "vision_config" in config or "vision_tower" in config
    if _is_text_model(config, architecture):
        return _text_model("AutoModelForCausalLM", _PROMPT, has_tokenizer, code)
    if is_vision and kind in ("ConditionalGeneration", "CausalLM"):
        loaded = _loading("transformers", "AutoModelForImageTextToText", code=code)
        if not sidecars & {"processor_config.json", "preprocessor_config.json"}:
            return loaded
        first, _, rest = loaded.partition("\n")
        processor = f"processor = AutoProcessor.from_pretrained({HERE}{code})"
        return f"{first}, AutoProcessor\n{rest}\n{processor}"
    if kind == "ConditionalGeneration":
        if config.get("model_type") in ("whisper", "speech_to_text", "moonshine"):
            return _loading("transformers", "AutoModelForSpeechSeq2Seq", code=code)
        return _text_model("AutoModelForSeq2SeqLM", _quote(_TEXT), has_tokenizer, code)
    if kind in ("SequenceClassification", "TokenClassification", "MaskedLM", "QuestionAnswering"):
        return _encoder(f"AutoModelFor{kind}", "logits", has_tokenizer, code)
    if kind == "ImageClassification":
        return _loading("transformers", "AutoModelForImageClassification", code=code)
    return _encoder("AutoModel", "last_hidden_state", has_tokenizer and not is_vision, code)


def _loading(library: str, name: str, variable: str = "model", *, code: str = "") -> str:
    return f"from {library} import {name}\n\n{variable} = {name}.from_pretrained({HERE}{code})"


def _text_model(name: str, prompt: str, has_tokenizer: bool, code: str) -> str:
    if not has_tokenizer:
        return _loading("transformers", name, code=code)
    return (
        f"from transformers import {name}, AutoTokenizer\n\n"
        f"model = {name}.from_pretrained({HERE}{code})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({HERE}{code})\n"
        f'tokens = tokenizer({prompt}, return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=20)[0]))"
    )


def _chat_model(code: str) -> str:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({HERE}{code})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({HERE}{code})\n"
        f'chat = [{{"role": "user", "content": {_quote(_QUESTION)}}}]\n'
        "tokens = tokenizer.apply_chat_template(\n"
        '    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
        ")\n"
        "answer = model.generate(**tokens, max_new_tokens=100)[0, tokens.input_ids.shape[1] :]\n"
        "print(tokenizer.decode(answer, skip_special_tokens=True))"
    )


def _encoder(name: str, result: str, has_tokenizer: bool, code: str) -> str:
    if not has_tokenizer:
        return _loading("transformers", name, code=code)
    return (
        f"from transformers import {name}, AutoTokenizer\n\n"
        f"model = {name}.from_pretrained({HERE}{code})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({HERE}{code})\n"
        f'print(model(**tokenizer({_quote(_TEXT)}, return_tensors="pt")).{result}.shape)'
    )


def _json(contents: Mapping[str, bytes | Path], name: str) -> dict[str, Any]:
    data = contents.get(name)
    try:
        config = json.loads(data) if isinstance(data, bytes) else {}
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _drift(drift: Mapping[str, Any]) -> str:
    errors = drift["standard_errors"]
    cosines = ", ".join(
        f"{with_error(value, errors['cosines'][name])} with {as_code(from_here(name))}"
        for name, value in drift["cosines"].items()
    )
    size = with_error(100 * drift["relative_size"], 100 * errors["relative_size"])
    lines = [
        f"- size: the change is {size}% of the base, in L2 norm",
        f"- direction: cosine {cosines}",
    ]
    if kept := drift.get("outliers_kept"):
        shares = ", ".join(
            f"{value:.2%} of {as_code(from_here(name))}" for name, value in kept.items()
        )
        lines.append(f"- outliers kept whole: {shares}")
    else:
        lines.append(
            f"- length: {with_error(drift['length'], errors['length'])} times the mean length of "
            "the models' own changes"
        )
    share = (
        "all"
        if drift["num_sampled"] >= drift["num_elements"]
        else f"a sample of {drift['num_sampled']:,} of the {drift['num_elements']:,}"
    )
    note = f"Size, direction and length are measured on {share} merged elements."
    if drift["num_sampled"] < drift["num_elements"]:
        note += " ± is the standard error of the sample."
    return "\n".join(lines) + f"\n\n{note}"


def _rows(report: Mapping[str, Any]) -> str:
    """Return what became of the tokens of a transplant, and how good its rows are."""
    lines = [
        f"{report['num_tokens']:,} tokens: {report['num_copied']:,} have the model's rows, "
        f"{report['num_approximated']:,} are approximated.\n"
    ]
    for name, of in report["tensors"].items():
        said = []
        if (error := of["reconstruction"]) is not None:
            said.append(
                f"the donor's rows are missed by {error['median']:.2f} of their length (median; "
                f"90%: {error['p90']:.2f})"
            )
        if (held := of["held_out"]) is not None:
            said.append(
                f"{held['num_tokens']} of the model's own rows that were held out, by "
                f"{held['error']['median']:.2f} of theirs, cosine {held['cosine']['median']:.2f}; "
                f"the mean of all rows misses them by {held['error_of_mean']['median']:.2f}"
            )
        if of["num_without_basis"]:
            said.append(f"{of['num_without_basis']:,} are the mean of all rows")
        lines.append(f"- {as_code(name)}: {'; '.join(said) or 'not measured'}")
    return "\n".join(lines)


def with_error(value: float, error: float) -> str:
    """Return a measured value with the digits that its standard error leaves, at most three.

    >>> with_error(0.4137, 0.023), with_error(12.34, 0.0012), with_error(0.4137, 0.0)
    ('0.41 ± 0.02', '12.3', '0.414')
    """
    most = 2 - (math.floor(math.log10(abs(value))) if value else 0)
    digits = most
    if error > 0:
        digits = -math.floor(math.log10(error))
        if round(error * 10**digits) == 1:  # of 1.4 a digit alone would leave too little
            digits += 1
    digits = max(0, min(digits, most))
    doubt = f"{error:.{digits}f}"
    return f"{value:.{digits}f}" + (f" ± {doubt}" if float(doubt) else "")


def parent_line(entry: Input) -> str:
    """Return a model as a row of a card's list, with its role and licences."""
    name, ids = as_code(from_here(entry.reference)), hub_ids(entry)
    if len(ids) == 1:
        name = f"[{name}](https://huggingface.co/{ids[0]})"
    role = " (base)" if entry.role == "base" else ""
    licences = " and ".join(map(str, licences_of(entry)))
    return f"- {name}{role}" + (f", licence {as_code(licences)}" if licences else "")


def _quote(text: str) -> str:
    return json.dumps(text)


def as_code(text: str) -> str:
    """Return a foreign name as Markdown code, escaped so that it stays inside the code."""
    text = shown(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def fenced(yaml: str) -> str:
    """Return YAML as a code block of Markdown, even if it contains backticks."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("^ *(`+)", yaml, re.MULTILINE)), default=0))
    return f"{fence}yaml\n{yaml}{fence}"
