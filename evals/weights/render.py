"""Turns the measured figures into Markdown tables beside the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import NormalDist
from typing import Any

from evals.weights.paper import PAPER_1, PAPER_5, PAPER_6, PAPER_7

Cells = Sequence[Sequence[str]]


def gaussian_kurtosis(small: float) -> float:
    """Return the kurtosis of a Gaussian's elements with small < |x| < 3, in units of its σ."""
    normal = NormalDist()
    # By parts, the integral of x² is that of 1 less [x pdf(x)], and of x⁴ three times that of x²
    # less [x³ pdf(x)].
    zeroth = normal.cdf(3) - normal.cdf(small)
    second = zeroth - (3 * normal.pdf(3) - small * normal.pdf(small))
    fourth = 3 * second - (27 * normal.pdf(3) - small**3 * normal.pdf(small))
    return fourth * zeroth / second**2


def correlations(pairs: Iterable[tuple[float, float]]) -> dict[str, float]:
    """Return Spearman's and Pearson's correlation."""
    xs, ys = zip(*pairs, strict=True)
    return {
        "spearman": statistics.correlation(_ranks(xs), _ranks(ys)),
        "pearson": statistics.correlation(xs, ys),
    }


def _ranks(values: Sequence[float]) -> list[float]:
    """Return ranks, the mean of them where values are equal."""
    return [
        sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values
    ]


def table(head: str, rows: Cells) -> str:
    """Return Markdown; `head` has the titles of the columns, the first one's cells are words."""
    titles = head.split("|")
    rule = [":--", *["--:"] * (len(titles) - 1)]
    lines = [[title.strip() for title in titles], rule, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(found: Mapping[str, Any], column: str) -> str:
    return f"{found[f'{column}_mean']:.2f} ± {found[f'{column}_std']:.2f}"


def measured(title: str, found: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row of Table 1."""
    labels = found["labels"]
    return [
        title,
        str(found["num_tensors"]),
        f"{100 * found['kept_ratio_mean']:.2f}",
        spread(found, "skewness"),
        spread(found, "kurtosis"),
        f"{found['kurtosis_median']:.2f}",
        f"{labels.get('Gaussian', 0)} of {sum(labels.values())}",
    ]


def cited(title: str, ratio: str, kurtosis: float, std: float) -> list[str]:
    return [title, "–", ratio, "0.00 ± 0.00", f"{kurtosis:.2f} ± {std:.2f}", "–", "–"]


COLUMNS = "{} | matrices | kept by 3σ, % | skewness | kurtosis | its median | labelled Gaussian"
GAUSSIAN = ["*exact Gaussian*", "–", "99.73", "0.00", "2.83", "2.83", "–"]


def table_1(results: Mapping[str, Any]) -> str:
    ours = [measured(title, found) for title, found in results["weights"].items()]
    paper = [cited(title, f"{ratio:.2f}", *rest) for title, (ratio, *rest) in PAPER_1.items()]
    return (
        table(COLUMNS.format("measured here"), [*ours, GAUSSIAN])
        + "\n"
        + table(COLUMNS.format("cited from the paper"), paper)
    )


def table_5(results: Mapping[str, Any]) -> str:
    rows = [
        _spikes(model, found, results["weights"][model]["num_tensors"])
        for model, found in results["spikes"].items()
    ]
    before, after = PAPER_5
    rows.append(["ConvNeXt-xlarge (the paper)", "36", "–", "–", _range(before), _range(after), "–"])
    vectors = [
        [
            title,
            f"{found['std_mean']:.1e}",
            f"{100 * found['small_ratio_mean']:.1f}",
            f"{found['kurtosis_median']:.2f}",
            f"{found['kurtosis_without_small_mean']:.2f}",
        ]
        for title, found in results["deltas"].items()
    ]
    head = (
        "sharp, inverted T, line | matrices | σ | below 1e-3, % | kurtosis by 3σ "
        "| without \\|x\\| < 1e-3 | a Gaussian so cut"
    ).replace("\\|", "\0")
    vector_head = (
        "task vectors, all matrices | mean σ | below 1e-3, % | median kurtosis by 3σ "
        "| mean without small"
    )
    return table(head, rows).replace("\0", "\\|") + "\n" + table(vector_head, vectors)


def _spikes(model: str, found: Sequence[Mapping[str, Any]], num_matrices: int) -> list[str]:
    stds = [each["std"] for each in found]
    return [
        model,
        f"{len(found)} of {num_matrices}",
        f"{min(stds):.2g}–{max(stds):.2g}",
        f"{100 * statistics.fmean(each['small_ratio'] for each in found):.2f}",
        _range([each["kurtosis"] for each in found]),
        _range([each["kurtosis_without_small"] for each in found]),
        f"{statistics.fmean(gaussian_kurtosis(1e-3 / std) for std in stds):.2f}",
    ]


def _range(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def table_6(results: Mapping[str, Any]) -> str:
    head = COLUMNS.format("measured here") + " | ‖ΔW‖ / ‖W‖"
    ours = [
        [*measured(title, found), f"{found['relative_norm']:.3f}"]
        for title, found in results["deltas"].items()
    ]
    noise = [[*measured(title, found), "–"] for title, found in results["noise"].items()]
    paper = [cited(title, f"{ratio:.1f}", *rest) for title, (ratio, *rest) in PAPER_6.items()]
    return (
        table(head, [*ours, *noise, [*GAUSSIAN, "–"]])
        + "\n"
        + table(COLUMNS.format("cited from the paper"), paper)
        + "\n"
        + _by_rank(results)
    )


def _by_rank(results: Mapping[str, Any]) -> str:
    def kurtosis(kind: str, title: str) -> str:
        return f"{results[kind][title]['kurtosis_mean']:.2f}"

    rows = [
        [
            str(rank),
            kurtosis("deltas", f"LoRA, r={rank}"),
            f"{dash[1]:.2f}",
            kurtosis("deltas", f"DoRA, r={rank}"),
            f"{dora[1]:.2f}",
            kurtosis("noise", f"noise B·A, r={rank}"),
        ]
        for rank, dash, dora in zip(
            PAPER_7,
            (row for title, row in PAPER_6.items() if "Dash" in title),
            (row for title, row in PAPER_6.items() if "DoRA" in title),
            strict=True,
        )
    ]
    return table(
        "kurtosis by rank | LoRA | paper: LoRA-Dash | DoRA | paper: DoRA | noise B·A", rows
    )


def std_difference(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Return the mean of |σ_a - σ_b| over matrices."""
    return statistics.fmean(abs(std - b[name]) for name, std in a.items())


def table_7(results: Mapping[str, Any]) -> str:
    adapters = results["adapters"]
    rows = []
    for rank, (dash, dora, difference) in PAPER_7.items():
        a, b = (adapters[f"{method}, r={rank}"] for method in ("LoRA", "DoRA"))
        ours = [each["score"]["correlation"] for each in (a, b)]
        rows.append(
            [
                str(rank),
                *(f"{value:.2f}" for value in ours),
                f"{ours[1] - ours[0]:+.2f}",
                f"{1e4 * std_difference(a['stds'], b['stds']):.2f}",
                f"{1e4 * statistics.fmean(a['stds'].values()):.1f}",
                *(f"{value:.1f}" for value in (dash, dora)),
                f"{dora - dash:+.1f}",
                str(difference),
            ]
        )
    difference = "mean ∣σ₁ - σ₂∣, 1e-4"
    head = f"rank | LoRA | DoRA | gap | {difference} | mean σ of LoRA, 1e-4 "
    head += f"| paper: LoRA-Dash | DoRA | gap | {difference}"
    return table(head, rows) + "\n" + _figure_5(adapters)


def _figure_5(adapters: Mapping[str, Any]) -> str:
    def points(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
        return [
            (
                std_difference(a["stds"], b["stds"]),
                abs(a["score"]["correlation"] - b["score"]["correlation"]),
            )
            for a, b in pairs
        ]

    ranked = {
        method: [adapters[f"{method}, r={rank}"] for rank in PAPER_7] for method in ("LoRA", "DoRA")
    }
    every = [*ranked["LoRA"], *ranked["DoRA"]]
    paper = [(float(difference), abs(a - b)) for a, b, difference in PAPER_7.values()]
    found = {"same rank, LoRA and DoRA": points(zip(*ranked.values(), strict=True))}
    for method, runs in ranked.items():
        best = runs[list(PAPER_7).index(32)]
        others = [(best, each) for each in every if each is not best]
        found[f"{method} r=32 and each other"] = points(others)
    found["all pairs of the ten"] = points(combinations(every, 2))
    found["the paper's Table 7, same rank"] = paper
    found["the same without r=4, as in its Fig. 5"] = paper[1:]
    rows = [
        [title, str(len(each)), *(f"{value:+.2f}" for value in correlations(each).values())]
        for title, each in found.items()
    ]
    again = [
        [f"{method} r=32, seeds 1 and 2", f"{gap:.2f}", f"{1e4 * difference:.2f}"]
        for method, runs in ranked.items()
        for difference, gap in points(
            [(runs[list(PAPER_7).index(32)], adapters[f"{method}, r=32, seed 2"])]
        )
    ]
    return (
        table("mean ∣σ₁ - σ₂∣ with gap of scores | points | Spearman | Pearson", rows)
        + "\n"
        + table("by the seed alone | gap | mean ∣σ₁ - σ₂∣, 1e-4", again)
    )


DEPTH = {
    "MiniLM, 6 layers": (
        ("weights", "all-MiniLM-L6-v2"),
        ("deltas", "sre-embedding-model - MiniLM"),
        ("deltas", "LoRA, r=32"),
        ("deltas", "DoRA, r=32"),
    ),
    "SevenNet, 5 layers": (
        ("weights", "SevenNet-0, 11 July 2024"),
        ("weights", "SevenNet-MF-0"),
        ("weights", "SevenNet-l3i5"),
    ),
}


def figure_6(results: Mapping[str, Any]) -> str:
    parts = []
    for family, subjects in DEPTH.items():
        found = [results["depth"][kind][title] for kind, title in subjects]
        rows = [
            [module.split("*.")[-1], *(_trend(each[module]) for each in found)]
            for module in found[-1]
        ]
        means = [statistics.fmean(row["spearman"] for row in each.values()) for each in found]
        rows.append(["*mean of ρ*", *(f"{mean:+.2f}" for mean in means)])
        grow = [sum(row["spearman"] > 0 for row in each.values()) for each in found]
        counts = [f"{num} of {len(each)}" for num, each in zip(grow, found, strict=True)]
        rows.append(["*ρ above 0*", *counts])
        titles = [f"{'W' if kind == 'weights' else 'ΔW'} of {title}" for kind, title in subjects]
        parts.append(table(" | ".join([family, *titles]), rows))
    return "\n".join(parts)


def _trend(row: Mapping[str, float]) -> str:
    return f"{row['first']:.3g} → {row['last']:.3g}, ρ {row['spearman']:+.2f}"


TABLES = {"1": table_1, "5": table_5, "6": table_6, "7": table_7, "depth": figure_6}


def fill(text: str, results: Mapping[str, Any]) -> str:
    """Return a text with each table between its marks, `<!-- table 1 -->` and `<!-- end -->`."""
    for name, make in TABLES.items():
        mark = f"<!-- table {name} -->\n"
        start, found, rest = text.partition(mark)
        assert found, mark
        text = start + mark + make(results) + "<!-- end -->" + rest.partition("<!-- end -->")[2]
    return text
