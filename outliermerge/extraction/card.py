"""The model card of an adapter: what it changes, how it is loaded, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version

from outliermerge.checkpoint.config import read_json
from outliermerge.extraction.pair import Pairs
from outliermerge.extraction.report import REPORT_NAME, Extraction, Settings
from outliermerge.output.card import HERE, as_code, fenced, parent_line
from outliermerge.output.licences import hub_ids, licence_lines, licence_note
from outliermerge.output.recipe import from_here
from outliermerge.planning.plan import Input


def adapter_card(pairs: Pairs, made: Extraction) -> str:
    """Return the adapter's README: the front matter that the hub and peft read, and its making."""
    base, models = pairs.base, list(_models(pairs))
    on_hub = hub_ids(base)
    front = ["---"]
    if on_hub:
        front += ["base_model:", *(f"- {json.dumps(name)}" for name in on_hub)]
        front += ["base_model_relation: adapter"]
    front += ["library_name: peft", *licence_lines([base, *models]), "tags:"]
    front += [f"- {json.dumps(f'base_model:adapter:{name}')}" for name in on_hub]
    front += ["- lora", *(["- merge"] if pairs.recipe else []), "- outliermerge", "---"]
    what = "a merge" if pairs.recipe else as_code(from_here(made.model))
    parts = [
        "\n".join(front),
        "# Adapter",
        f"What {what} and {as_code(from_here(made.base))} differ by, as an adapter of peft. Made "
        f"by outliermerge {version('outliermerge')}.",
    ]
    if snippet := _usage(pairs):
        parts += ["## Use", f"```python\n{snippet}\n```"]
    parts += ["## Models", "\n".join(map(parent_line, [base, *models]))]
    parts += filter(None, [licence_note([base, *models])])
    if pairs.recipe:
        parts += ["## Recipe", fenced(pairs.recipe)]
    parts += ["## Extraction", "\n".join(f"- {fact}" for fact in _facts(made))]
    parts += [f"`{REPORT_NAME}` has the rank, the norm and the error of each tensor."]
    return "\n\n".join(parts) + "\n"


def _models(pairs: Pairs) -> Iterator[Input]:
    """Yield what the adapter is made of besides its base, each model once."""
    pending, seen = [pairs.model], {pairs.base.reference}
    while pending:
        entry = pending.pop(0)
        pending += entry.made_of
        if not entry.made_of and entry.reference not in seen:
            seen.add(entry.reference)
            yield entry


def _usage(pairs: Pairs) -> str:
    """Return Python code that loads the base with the adapter; empty if its class is not known."""
    name = pairs.architectures[0] if pairs.architectures else ""
    has_own_code = "auto_map" in read_json(pairs.base.home / "config.json")
    if not name.isidentifier() or has_own_code:
        return ""
    return (
        f"from peft import PeftModel\nfrom transformers import {name}\n\n"
        f"base = {name}.from_pretrained({json.dumps(from_here(pairs.base.reference))})\n"
        f"model = PeftModel.from_pretrained(base, {HERE})"
    )


def _facts(made: Extraction) -> Iterator[str]:
    """Yield what was asked that is not the default, and what came of it."""
    usual = asdict(Settings())
    for name, value in asdict(made.settings).items():
        if value != usual[name]:
            yield f"{name}: {as_code(json.dumps(value))}"
    ranks = [tensor.rank for tensor in made.tensors if tensor.rank]
    if ranks:
        ends = " to ".join(dict.fromkeys([str(min(ranks)), str(max(ranks))]))
        yield f"{len(ranks)} tensors are factored, at rank {ends}"
    if num_whole := len(made.tensors) - len(ranks):
        yield f"{num_whole} tensors are saved whole"
    yield f"of all changes, {made.error:.2g} is lost: ‖W' − W − BA‖ / ‖W' − W‖"
    if made.left_out:
        yield f"left out, as no adapter can hold them: {len(made.left_out)} tensors"
    yield from made.notes
