"""Which tensors of a merge's output can be compared with those of the same name in its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from outliermerge.analysis.report.data import short_titles
from outliermerge.spec.document import references


def stages_of(spec: Mapping[str, Any]) -> set[str]:
    """Return the names of a merge's stages, which are stored nowhere."""
    return {stage["name"] for stage in spec.get("stages", ())}


def modules_text(spec: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Return which modules are merges of what; empty for a merge of whole models."""
    parts = []
    for name, module in spec.get("modules", {}).items():
        method = module.get("merge_method", spec.get("merge_method"))
        models = ", ".join(titles.get(each, each) for each in references(module))
        parts.append(f"{name} is a merge by {method} of {models}")
    return "; ".join(parts)


def mixture_text(spec: Mapping[str, Any]) -> str:
    """Return which models a mixture of experts is from; empty for other merges.

    >>> mixture_text({"base_model": "a", "experts": [{"source_model": "b"}]})
    'A mixture of 1 expert from b. All but the experts and the routers is from a.'
    """
    if "experts" not in spec:
        return ""
    parts = []
    for key, name in (("experts", "expert"), ("shared_experts", "shared expert")):
        if models := [expert["source_model"] for expert in spec.get(key) or ()]:
            number = f"{len(models)} {name}{'s' if len(models) > 1 else ''}"
            parts.append(f"{number} from {', '.join(dict.fromkeys(models))}")
    rest = f"All but the experts and the routers is from {spec['base_model']}."
    return f"A mixture of {' and '.join(parts)}. {rest}"


def map_payload(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return where the layers of a merge and of its stages are from, with titles of the models.

    Args:
        rows: the manifest's `layer_map`.
    """
    models = dict.fromkeys(source["model"] for row in rows for source in row["sources"])
    titles = dict(zip(models, short_titles([*models]), strict=True)) if models else {}
    return [
        {
            **row,
            "sources": [{**source, "model": titles[source["model"]]} for source in row["sources"]],
        }
        for row in rows
    ]
