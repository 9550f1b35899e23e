"""Writes the part of docs/evidence.md that results.json decides, and the figure.

python evals/evidence/page.py
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from evals.evidence import from_files
from evals.evidence.facts import FACTS
from evals.evidence.methods import SPACES, VARIANTS
from evals.evidence.results import AVERAGE, RESULTS
from evals.evidence.run import SPACES_OF
from evals.evidence.significance import holm, mean_and_error, p_value, rank_correlation

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
FIGURE = Path(__file__).with_name("gains.png")
MARKS = ("<!-- evidence -->\n", "<!-- end of evidence -->\n")
LEVEL = 0.05
OURS = "min_sigma"
DRAWN = ("min_sigma", "task_arithmetic", "ties", "dare_ties", "breadcrumbs", "model_stock")
UNITS = {"language": "bits per byte", "vision": "points", "encoder": "points"}
DIGITS = {"language": 3, "vision": 1, "encoder": 1}
NAMES = {
    "kurtosis": "kurtosis",
    "outliers": "kept whole by min-σ",
    "cosine": "cosine",
    "sign_conflicts": "opposite signs",
    "outlier_conflicts": "opposite outliers",
    "distance": "‖ΔW‖ / ‖W‖",
}

Family = Mapping[str, Any]


def cells(family: Family) -> list[str]:
    """Return the distances and numbers of models of a family: `near/2` and so on."""
    (first, *_) = family["seeds"].values()
    return list(first["merges"])


def row_of(family: Family, seed: Mapping[str, Any], cell: str, name: str) -> Any:
    """Return a row: of a merge, or of the base, the best task model or the joint training."""
    distance, _, size = cell.partition("/")
    count = int(size)
    if name == "base" or name == "joint":
        found = seed["models"].get("base" if name == "base" else f"joint-{size}")
        return found and {"scores": found["scores"][:count]}
    if name == "task model":
        own = [seed["models"][f"{distance}/{t}"]["scores"][:count] for t in family["tasks"][:count]]
        best = min if family["lower_is_better"] else max
        return {"scores": best(own, key=statistics.fmean)}
    rows = seed["merges"][cell]["rows"]
    method, _, kind = name.rpartition("-")
    if kind == "chosen" and not SPACES_OF[method]:  # what has nothing to choose is as by default
        kind = "default"
    return rows.get(f"{method}-{kind}")


def gains(family: Family, cell: str, name: str, over: str = AVERAGE) -> list[float]:
    """Return by how much the mean over tasks is better than another row's, for each seed."""
    sign = -1 if family["lower_is_better"] else 1
    found = []
    for seed in family["seeds"].values():
        one, other = (row_of(family, seed, cell, each) for each in (name, over))
        if one and other:
            difference = statistics.fmean(one["scores"]) - statistics.fmean(other["scores"])
            found.append(sign * family["factor"] * difference)
    return found


def _within(family: Family, cell: str, name: str) -> float:
    """Return the error over examples of the gain over the average, of one seed."""
    (seed,) = family["seeds"].values()
    errors = (row_of(family, seed, cell, name) or {}).get("errors")
    if not errors:
        return math.nan
    return float(family["factor"] * math.hypot(*errors) / len(errors))


def _cell(title: str, family: Family, cell: str, name: str) -> str:
    values = gains(family, cell, name)
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    if math.isnan(error) and len(family["seeds"]) == 1:
        error = _within(family, cell, name)
    return _shown(mean, error, DIGITS[title])


def _shown(mean: float, error: float, digits: int) -> str:
    text = f"{mean:+.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"


def written(method: str) -> str:
    """Return a method, or min-σ with one of its options, as it is written in a spec."""
    options = [f"`{name}: {value}`" for name, value in VARIANTS.get(method, {}).items()]
    return ", ".join([f"`{OURS if options else method}`", *options])


def table(title: str, family: Family, kind: str) -> str:
    """Return the gains over the average as Markdown; kind is `default` or `chosen`."""
    columns = cells(family)
    heads = [f"{cell.partition('/')[2]} models, {cell.partition('/')[0]}" for cell in columns]
    lines = ["| over the average | " + " | ".join(heads) + " |", "|:--|" + "--:|" * len(columns)]
    controls = ["base", "task model", "joint"] if kind == "default" else []
    shown = [(name, name) for name in controls]
    shown += [(written(name), f"{name}-{kind}") for name in SPACES_OF if name != "linear"]
    num = len(family["seeds"])
    best = {
        cell: max(
            (row for _, row in shown[len(controls) :] if len(gains(family, cell, row)) == num),
            key=lambda row: statistics.fmean(gains(family, cell, row)),
        )
        for cell in columns
    }
    for label, row in shown:
        texts = [_cell(title, family, cell, row) for cell in columns]
        if set(texts) != {"–"}:
            own = max(len(gains(family, cell, row)) for cell in columns)
            label += f" ({own} of {num} seeds)" * (own < num)
            marked = [
                f"**{text}**" if best[cell] == row else text
                for cell, text in zip(columns, texts, strict=True)
            ]
            lines.append(f"| {label} | " + " | ".join(marked) + " |")
    return "\n".join(lines)


def duels(families: Mapping[str, Family], kind: str) -> str:
    """Return as Markdown by how much min-σ is better than each method, over all settings."""
    ours = f"{OURS}-{kind}"
    # [method, family][setting][seed]
    found: dict[tuple[str, str], list[list[float]]] = {}
    for method in SPACES:
        for title, family in families.items():
            each = [gains(family, cell, ours, f"{method}-{kind}") for cell in cells(family)]
            if method != OURS and any(each):
                found[method, title] = [values for values in each if values]
    by_seed = {key: [statistics.fmean(v) for v in zip(*f, strict=True)] for key, f in found.items()}
    corrected = holm([p_value(values) for values in by_seed.values()])
    sure = {key for key, p in zip(by_seed, corrected, strict=True) if p < LEVEL}
    lines = [
        "| min-σ over | " + " | ".join(families) + " |",
        "|:--|" + "--:|" * len(families),
    ]
    for method in dict.fromkeys(method for method, _ in found):
        texts = []
        for title in families:
            key = (method, title)
            if key not in found:
                texts.append("–")
                continue
            means = [statistics.fmean(values) for values in found[key]]
            better, worse = (sum(sign * mean > 0 for mean in means) for sign in (1, -1))
            shown = _shown(*mean_and_error(by_seed[key]), DIGITS[title])
            texts.append(f"**{shown}**" if key in sure else shown)
            texts[-1] += f" ({better} : {worse})"
        name = "average" if method == "linear" else written(method)
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def facts_of(family: Family, cell: str) -> dict[str, float]:
    """Return what was measured of the task vectors of a setting, the mean over seeds."""
    each = [seed["merges"][cell]["facts"] for seed in family["seeds"].values()]
    return {fact: statistics.fmean(one[fact] for one in each) for fact in FACTS}


def facts_table(families: Mapping[str, Family]) -> str:
    """Return the facts of every setting as Markdown."""
    lines = [
        "| family | models | " + " | ".join(NAMES[fact] for fact in FACTS) + " |",
        "|:--|:--|" + "--:|" * len(FACTS),
    ]
    for title, family in families.items():
        for cell in cells(family):
            distance, _, size = cell.partition("/")
            found = facts_of(family, cell)
            texts = [
                f"{found['kurtosis']:.2f}",
                f"{found['outliers']:.1%}",
                f"{found['cosine']:+.3f}",
                f"{found['sign_conflicts']:.1%}",
                f"{found['outlier_conflicts']:.2%}",
                f"{found['distance']:.1%}",
            ]
            lines.append(f"| {title} | {size}, {distance} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def predictors(families: Mapping[str, Family]) -> str:
    """Return as Markdown how facts go with min-σ's gains, over all settings of all families."""
    settings = [(family, cell) for family in families.values() for cell in cells(family)]
    # Gains of families are in different units: a gain is divided by the family's largest.
    rivals = {"the average": AVERAGE, "task arithmetic": "task_arithmetic-chosen"}
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for rival, row in rivals.items():
        scaled = []
        for family in families.values():
            own = [statistics.fmean(gains(family, c, f"{OURS}-chosen", row)) for c in cells(family)]
            scaled += [value / (max(map(abs, own)) or 1.0) for value in own]
        for fact in FACTS:
            values = [facts_of(family, cell)[fact] for family, cell in settings]
            found[fact, rival] = rank_correlation(values, scaled)
    corrected = dict(zip(found, holm([p for _, p in found.values()]), strict=True))
    lines = [
        "| rank correlation with min-σ's gain over | " + " | ".join(rivals) + " |",
        "|:--|" + "--:|" * len(rivals),
    ]
    for fact in FACTS:
        texts = [
            f"{found[fact, rival][0]:+.2f} (p = {corrected[fact, rival]:.2g})" for rival in rivals
        ]
        lines.append(f"| {NAMES[fact]} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def chosen_parameters(family: Family) -> str:
    """Return as Markdown what was chosen on validation data for the common methods."""
    columns = cells(family)
    heads = [f"{cell.partition('/')[2]}, {cell.partition('/')[0]}" for cell in columns]
    lines = ["| chosen, medians | " + " | ".join(heads) + " |", "|:--|" + "--:|" * len(columns)]
    for method, names in (("min_sigma", "t lambda"), ("task_arithmetic", "lambda"),
                          ("ties", "density lambda")):  # fmt: skip
        for name in names.split():
            texts = []
            for cell in columns:
                values = [
                    row_of(family, seed, cell, f"{method}-chosen")["parameters"].get(name)
                    for seed in family["seeds"].values()
                ]
                default = {"t": 2.0, "lambda": 1.0, "density": 1.0}[name]
                median = statistics.median(default if v is None else v for v in values)
                texts.append(f"{median:.2f}")
            lines.append(f"| `{method}` `{name}` | " + " | ".join(texts) + " |")
    return "\n".join(lines)


INTRODUCTION = """\
## Three families, all methods

A language model on bytes whose fine-tunes learn other languages, a vision transformer, and the
upper layers of all-MiniLM-L6-v2: 2, 4 and 6 task models of each, near to the base and farther from
it, merged by every method of the package, and by modifiers after two of them. What is trained on
what, what is scored, and how parameters are chosen: [evals/evidence](../evals/evidence/README.md).
`make evidence` trains and scores all of it; `python evals/evidence/page.py` writes what follows,
and the figure, from [the committed results](../evals/evidence/results.json)."""


def report(results: Mapping[str, Any]) -> str:
    """Return the generated part of the page: nothing, unless there are results."""
    parts = list(_parts(results))
    return "\n\n".join(parts) + "\n" if parts else ""


def _parts(results: Mapping[str, Any]) -> Iterator[str]:
    families = {name: family for name, family in results["families"].items() if family["seeds"]}
    if not families:
        return
    yield INTRODUCTION
    yield (
        f"Seeds that are complete on {results['date']}: "
        + "; ".join(
            f"{name}: {', '.join(family['seeds']) or 'none'}"
            for name, family in results["families"].items()
        )
        + "."
    )
    for title, family in families.items():
        num = len(family["seeds"])
        errors = (
            "± one standard error over examples, of one seed"
            if num == 1
            else f"± one standard error over {num} seeds"
        )
        yield f"### {title.capitalize()}: defaults"
        yield table(title, family, "default")
        yield f"{UNITS[title].capitalize()} better than the average, mean over tasks, {errors}."
        yield f"### {title.capitalize()}: parameters chosen on validation data"
        yield table(title, family, "chosen")
        yield chosen_parameters(family)
    yield "![gains over the average, by the number of task models](../evals/evidence/gains.png)"
    yield "### min-σ against each method"
    for kind in ("default", "chosen"):
        yield {"default": "With the defaults:", "chosen": "With chosen parameters:"}[kind]
        yield duels(families, kind)
    yield (
        "Mean over settings, ± one standard error over seeds; in brackets the number of settings "
        "in which min-σ's mean is better : worse. Bold where Student's t over the seeds tells the "
        f"difference from 0 at {LEVEL}, after Holm's correction for all comparisons of a table. "
        f"{', '.join(f'`{name}`' for name in from_files.SPACES)} were scored later: they are not "
        "compared with min-σ here, so that the correction is for the same comparisons as before."
    )
    yield "### What the task vectors are like"
    yield facts_table(families)
    if sum(len(cells(family)) for family in families.values()) > 2:
        yield predictors(families)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the gains of common methods, with chosen parameters, by the number of models."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families = {name: family for name, family in results["families"].items() if family["seeds"]}
    figure, axes = plt.subplots(
        len(families), 2, figsize=(9, 3 * len(families)), squeeze=False, layout="constrained"
    )
    for axis_row, (title, family) in zip(axes, families.items(), strict=True):
        for axis, distance in zip(axis_row, family["steps"], strict=True):
            own = [cell for cell in cells(family) if cell.startswith(distance)]
            sizes = [int(cell.partition("/")[2]) for cell in own]
            for method in DRAWN:
                if not gains(family, own[0], f"{method}-chosen"):
                    continue
                found = [mean_and_error(gains(family, cell, f"{method}-chosen")) for cell in own]
                means, errors = zip(*found, strict=True)
                shown = [0 if math.isnan(error) else error for error in errors]
                axis.errorbar(sizes, means, shown, label=method, capsize=2, marker="o", ms=3)
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_title(f"{title}, {distance}")
            axis.set_xticks(sizes)
            axis.set_xlabel("task models")
            axis.set_ylabel(f"{UNITS[title]} over the average")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    results = json.loads(RESULTS.read_text())
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(before + MARKS[0] + report(results) + MARKS[1] + rest.partition(MARKS[1])[2])
    if any(family["seeds"] for family in results["families"].values()):
        draw(results, FIGURE)


if __name__ == "__main__":
    main()
