"""The table of methods and that of kernels: what the code says, and what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from outliermerge.methods.table import EVERY, METHODS, MODIFIERS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import matrices_table  # noqa: E402
import methods_table  # noqa: E402
import suite  # noqa: E402
import tables  # noqa: E402
from build_checkpoints import build, build_statistics  # noqa: E402

ABOUT = {
    "date": "2026-01-02", "hardware": "2 cores", "load_before": 0.5, "note": "as said",
    "num_parameters": {"0.1B": 1},
}  # fmt: skip


def measured(method: str, wall: float, theirs: float) -> dict:
    ours = {"wall_seconds": wall, "work_seconds": wall, "cpu_seconds": wall}
    peer = {"wall_seconds": theirs, "cpu_seconds": 2 * theirs}
    return {
        "name": f"{method}-0.1B-2", "method": method, "size": "0.1B", "parameters": {},
        "runs": {
            "direct copy": [ours | {"work_seconds": wall / 2}],
            "outliermerge": [ours | {"peak_anonymous_megabytes": 33.3}],
            "mergekit": [peer],
        },
    }  # fmt: skip


def test_every_method_has_a_row_and_a_word_on_mergekit():
    text = methods_table.methods(ABOUT | {"cases": [measured("linear", 2, 30)]})
    rows = [line for line in text.splitlines() if line.startswith("| [`")]
    every = EVERY | MODIFIERS
    assert len(rows) == len(every) == len(methods_table.AGREES)
    assert set(every) == set(methods_table.AGREES) == set(suite.PARAMETERS | suite.OTHERS)
    cells = next(row for row in rows if "`linear`" in row).strip("| ").split(" | ")
    assert cells[3:] == ["1", "2.0", "2.0", "33", "15", "30", "yes"]
    unmeasured = next(row for row in rows if "`ties`" in row)
    assert unmeasured.count(" – ") == 5
    assert text.endswith("as said.")


def test_what_was_measured_at_another_size_is_said():
    small = measured("iso_c", 3, 0) | {"size": "tiny", "date": "2026-01-03", "load_before": 0.7}
    sizes = {"num_parameters": {"0.1B": 1, "tiny": 1}}
    text = methods_table.methods(ABOUT | sizes | {"cases": [measured("linear", 2, 30), small]})
    assert text.endswith("as said. At tiny on 2026-01-03, load before 0.7: `iso_c`.")


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("linear", {}, 1),
        ("slerp", {}, 2),
        ("ties", {"density": 0.2}, 2),
        ("ties", {"density": 1.0}, 1),
        ("ties", {"density": 0.2, "rescale": True}, 3),
        ("dare_ties", {"density": 0.5}, 1),
        ("dare_ties", {"density": 0.5, "rescale_by": "l1"}, 2),
        ("sce", {"select_topk": 0.1}, 2),
        ("nearswap", {}, 1),
    ],
)
def test_readings_are_those_of_statistics_and_of_the_merge(name, given, wanted):
    assert methods_table.num_readings(METHODS[name], given) == wanted


def test_links_of_the_table_are_headings_of_the_page():
    page = (ROOT / "docs" / "reference" / "methods.md").read_text()
    for name in EVERY:
        assert f"## `{name}`" in page


def test_specs_of_every_measured_method_can_be_planned(tmp_path):
    import outliermerge

    models = build("tiny", tmp_path / "models")
    for kind in set(suite.WITH_DATA.values()):
        build_statistics(kind, "tiny", models[1:])
    for method in suite.PARAMETERS | suite.OTHERS:
        case = suite.Case(method, "tiny", 1 if method in suite.ALONE else 2, ("outliermerge",))
        suite.commands(case, tmp_path, models[: 1 + case.num_models])
        spec = json.loads((tmp_path / "spec.yaml").read_text())
        assert outliermerge.plan(spec).jobs, method


def test_kernels_without_an_earlier_measurement_have_no_figure_before():
    case = {"nanoseconds": 0.5, "nanoseconds before": 1.25}
    text = tables.kernels({"cases": {"both": case, "now": {"nanoseconds": 0.125}}})
    assert text.splitlines()[2:] == ["| both | 0.50 | 1.25 |", "| now | 0.12 | – |"]


def test_the_table_beside_fusion_bench_has_ratios_of_one_round():
    def run(seconds: float, megabytes: float) -> dict:
        return {
            "work_seconds": seconds, "work_cpu_seconds": 2 * seconds,
            "peak_anonymous_megabytes": megabytes,
        }  # fmt: skip

    case = {
        "name": "iso_c-ViT-B/32-2-8", "method": "iso_c", "size": "ViT-B/32", "layers": 2,
        "of_layers": 12, "models": 8, "load_before": 0.5, "relative_distance": 1.2e-6,
        "runs": {
            "outliermerge": [run(1, 30), run(2, 32), run(4, 31)],
            "FusionBench": [run(8, 900), run(6, 901), run(20, 902)],
        },
    }  # fmt: skip
    about = ABOUT | {"runs": 3, "versions": {"fusion-bench": "0.2"}, "cases": [case]}
    row = matrices_table.matrices(about).splitlines()[2]
    assert row == (
        "| `iso_c`, ViT-B/32, 2 of 12 layers | 8 | 2.0 | 5.0 (3.0–8.0) | 5.0 (3.0–8.0) | 31 | 901 "
        "| 1e-06 |"
    )
