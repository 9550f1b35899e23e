"""The table of methods: what the code says of each, what was measured, and whether mergekit agrees.

python benchmarks/tables.py --write    # puts it into docs/reference/methods.md
"""

from __future__ import annotations

import re
from typing import Any

from report import Report, median, ratio

from outliermerge.methods.contract import MergeMethod
from outliermerge.methods.table import EVERY, MODIFIERS

EQUAL = "yes"
NOT_THERE = "not in mergekit"
TIES_KEPT = "yes, but elements tied at a limit are all kept"
BY_PROBABILITY = "yes with `rescale_by: l1`; by default what is kept is divided by its probability"
# What `make parity` compares, and why a method gives other values; see docs/studies/parity.md.
AGREES = {
    "min_sigma": NOT_THERE,
    "linear": EQUAL,
    "task_arithmetic": EQUAL,
    "ties": TIES_KEPT,
    "dare_linear": BY_PROBABILITY,
    "dare_ties": BY_PROBABILITY,
    "breadcrumbs": TIES_KEPT,
    "breadcrumbs_ties": TIES_KEPT,
    "della": "yes, but equal magnitudes rank by place",
    "della_linear": "yes, but equal magnitudes rank by place",
    "sce": "with `compat: mergekit`, which weighs models alike where changes are small",
    "ram": EQUAL,
    "ramplus_tl": EQUAL,
    "slerp": EQUAL,
    "nuslerp": "yes; angles are not rounded to float32",
    "multislerp": "yes, without a last step that is a rounding error; models that cancel out merge",
    "karcher": EQUAL,
    "model_stock": "with `compat: mergekit`, which draws short vectors to the base at any angle",
    "nearswap": EQUAL,
    "arcee_fusion": "with `compat: mergekit`; by default in float64, with exact quartiles",
    "iso_c": NOT_THERE,
    "iso_cts": NOT_THERE,
    "tsv_m": NOT_THERE,
    "wudi": NOT_THERE,
    "swudi": NOT_THERE,
    "aswudi": NOT_THERE,
    "resmerge": NOT_THERE,
    "pcb": NOT_THERE,
    "consensus_ta": NOT_THERE,
    "metagpt": NOT_THERE,
    "passthrough": EQUAL,
    "regmean": NOT_THERE,
    "fisher": NOT_THERE,
    "mats": NOT_THERE,
    "mats_fisher": NOT_THERE,
    "lines": NOT_THERE,
    "svc": NOT_THERE,
}
PEAK = "peak_anonymous_megabytes"
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def num_readings(method: MergeMethod, given: dict[str, Any]) -> int:
    """Return how often a tensor is read, the merge itself included."""
    parameters = method.resolve(max(2, method.min_models) if method.max_models != 1 else 1, given)
    return 1 + max((need.num_passes(parameters) for need in method.needs.values()), default=0)


def _source(paper: str | None) -> str:
    if not paper:
        return "–"
    if paper.startswith("https://"):
        return f"[{paper.split('/')[2]}]({paper})"
    return _ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", paper)


def _figure(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits if value < 9.95 else 0}f}"


def methods(content: dict[str, Any]) -> str:
    """One row a method or modifier, from their tables and the JSON that methods.py writes."""
    report = Report(content)
    by_method = {case["method"]: case for case in report.content["cases"]}
    header = [
        "method", "from", "parameters", "readings", "time, s", "work over a copy", "memory, MB",
        "times as fast as mergekit", "CPU time less", "equal to mergekit's",
    ]  # fmt: skip
    lines = [header, ["---"] * 3 + ["--:"] * 6 + ["---"]]
    for name, method in (EVERY | MODIFIERS).items():
        case = by_method.get(name)
        given = case["parameters"] if case else {}
        lines.append(
            [
                f"[`{name}`](#{name})",
                _source(method.paper),
                ", ".join(f"`{parameter}`" for parameter in method.parameters) or "–",
                str(num_readings(method, given)),
                _figure(median(case, "outliermerge", "wall_seconds")),
                _figure(ratio(case, "outliermerge", "direct copy", "work_seconds")),
                _figure(median(case, "outliermerge", PEAK), 0),
                _figure(ratio(case, "mergekit", "outliermerge", "wall_seconds")),
                _figure(ratio(case, "mergekit", "outliermerge", "cpu_seconds")),
                AGREES[name],
            ]
        )
    size, *others = content["num_parameters"]
    dates = {content["date"]}
    dates |= {case.get("date", "") for case in content["cases"] if case["size"] == size} - {""}
    about = (
        f"Measured at {size} on {' and '.join(sorted(dates))}, {content['hardware']}, load before "
        f"{content['load_before']}: {content['note']}."
    )
    for other in others:
        cases = [case for case in content["cases"] if case["size"] == other]
        names = ", ".join(f"`{case['method']}`" for case in cases)
        loads = [case["load_before"] for case in cases]
        days = " and ".join(dict.fromkeys(case["date"] for case in cases))
        if cases:
            load = " to ".join(map(str, dict.fromkeys([min(loads), max(loads)])))
            about += f" At {other} on {days}, load before {load}: {names}."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{about}"
