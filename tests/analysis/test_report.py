"""The page of `outliermerge report`, built from real merges and driven in headless Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load_folder, save_tensors
from report_pages import choose, column, facts, go_to, number, plotted

import outliermerge
from outliermerge.analysis.report import build as report_module
from outliermerge.analysis.report.build import build_report
from outliermerge.analysis.report.data import Shown, payload
from outliermerge.analysis.report.page import embedded_json, render_page
from outliermerge.analysis.stats import stats_of_tensor
from outliermerge.analysis.table import WeightStats
from outliermerge.errors import ArgumentError, OutlierMergeError

pytest_plugins = ("report_fixtures",)

VISION = "vision_tower.encoder.layers.*"
HOSTILE = "model.layers.0.</script><b id='evil'>ü</b>.weight"


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("which", ["pair", "merge"])
@pytest.mark.sampled(2)
def test_all_sections_are_drawn_without_errors_requests_or_sideways_scrolling(
    made, visit, which, width
):
    with visit(getattr(made, which), width=width) as page:
        sections = [each.get_attribute("id") for each in page.locator("section:visible").all()]
        for section in sections:
            go_to(page, section)
            for plot in page.locator(f"#{section} .plot:visible").all():
                assert plot.locator("svg.main-svg").count() > 0
        assert ("drift" in sections) == ("merge" in sections) == (which == "merge")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("which", ["pair", "merge"])
def test_a_page_that_nobody_scrolls_becomes_complete(made, visit, which):
    with visit(getattr(made, which)) as page:
        page.locator("#tables[aria-busy=false]").wait_for()
        page.locator("#gallery-grid button:last-child svg.main-svg").first.wait_for()
        assert page.evaluate("scrollY") == 0
        assert page.locator("section[aria-busy=true]:visible").count() == 0
        for plot in page.locator(".plot:visible, #gallery-grid .small").all():
            assert plot.locator("svg.main-svg").count() > 0


def test_what_is_in_sight_is_drawn_before_the_rest(made, visit):
    with visit(made.pair) as page:
        # In one turn of the browser, in which nothing can be idle.
        busy = page.evaluate(
            "(() => { redrawAll(); return ['distribution', 'tables'].map(name =>"
            " document.getElementById(name).getAttribute('aria-busy')); })()"
        )
        assert busy == ["false", "true"]


# Each value once; `make faults` tries the rest.
PRINTED = [("pair", 375, "light"), ("merge", 1280, "dark")]


@pytest.mark.parametrize(
    ("which", "width", "scheme"),
    [
        pytest.param(*case, marks=() if case in PRINTED else pytest.mark.faults)
        for case in product(("pair", "merge"), (1280, 375), ("light", "dark"))
    ],
)
def test_a_page_is_printed_whole_in_light_colours_and_as_wide_as_paper(
    made, visit, which, width, scheme
):
    paper = "getComputedStyle(document.body).backgroundColor"
    with visit(getattr(made, which), width=width, scheme=scheme) as page:
        before = page.evaluate(paper)
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        assert page.locator("section[aria-busy=true]:visible").count() == 0
        for plot in page.locator(".plot:visible, #gallery-grid .small:visible").all():
            assert plot.locator("svg.main-svg").count() > 0
            box = plot.locator("svg.main-svg").first.bounding_box()
            assert box["x"] + box["width"] <= 701
        assert page.evaluate(paper) == "rgb(252, 252, 250)"
        assert page.locator("nav:visible, #theme:visible, .modebar:visible").count() == 0
        page.emulate_media(media="screen")
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate(paper) == before
        go_to(page, "heat")
        page.locator("#heat-plot svg.main-svg").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_page_that_is_loaded_can_be_printed(made, visit):
    """So that `chromium --headless --print-to-pdf`, which waits for no more, prints its figures."""
    with visit(made.pair) as first:
        page = first.context.browser.new_page()
        page.add_init_script(
            "addEventListener('load', () => { dispatchEvent(new Event('beforeprint'));"
            " window.pictures = document.querySelectorAll('.plot svg.main-svg').length; })"
        )
        page.goto(first.url)
        assert page.evaluate("window.pictures") > 6
        assert page.locator("iframe").count() == 0


def test_the_browser_tells_the_page_of_its_printing(made, visit):
    with visit(made.pair) as page:
        page.evaluate(
            "() => addEventListener('beforeprint', () => { window.pictures ="
            " document.querySelectorAll('.printed .plot svg.main-svg').length; })"
        )
        assert page.pdf().startswith(b"%PDF")
        assert page.evaluate("window.pictures") > 6
        page.locator("html:not(.printed)").wait_for()


def test_theme_follows_the_system_and_the_toggle(made, visit):
    def looks(page):
        return page.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " document.querySelector('#density-plot .xtitle').style.fill]"
        )

    with visit(made.pair, scheme="light") as page:
        light = looks(page)
        page.click("#theme")
        dark = looks(page)
    with visit(made.pair, scheme="dark") as page:
        assert looks(page) == dark
        page.click("#theme")
        assert looks(page) == light
    assert all(one != other for one, other in zip(light, dark, strict=True))


def test_distribution_shows_the_numbers_of_the_tensor_that_is_chosen(made, visit):
    chosen = "language_model.model.layers.2.mlp.up_proj.weight"
    with visit(made.pair) as page:
        for subject, stats in enumerate(made.stats(n, base=b) for n in (0, 1) for b in (0, 1)):
            page.select_option("#subject", str(subject))
            page.select_option("#layer", "2")
            page.select_option("#module", "mlp.up_proj")
            (tensor,) = [each for each in stats.tensors if each.name == chosen]
            shown = facts(page)
            assert page.inner_text("#tensor-name") == chosen
            assert shown["shape"] == "48 × 32"
            for name, value in {
                "elements": tensor.num_elements,
                "mean": tensor.mean,
                "σ": tensor.std,
                "inside 3σ": 100 * tensor.kept_ratio,
                "beyond 2σ": 100 * tensor.outside_2_ratio,
                "skewness, inside 3σ": tensor.skewness,
                "kurtosis, inside 3σ": tensor.kurtosis,
                "kurtosis of all": tensor.kurtosis_before,
            }.items():
                assert number(shown[name]) == pytest.approx(value, rel=1e-3, abs=5e-3), name


def test_density_is_that_of_the_elements_and_log_is_chosen(made, visit):
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    values = load_folder(made.models[0])[name].double().numpy().ravel()
    with visit(made.pair) as page:
        page.select_option("#subject", "0")
        page.evaluate("name => select(name)", name)
        (middles, fitted_at), (density, fitted) = (plotted(page, "density-plot", k) for k in "xy")
        width = middles[1] - middles[0]
        floor = min(density)  # stands for nothing, which a log axis cannot show
        for middle, value in zip(middles, density, strict=True):
            share = np.mean(np.abs(values - middle) < width / 2)
            assert value == pytest.approx(share / width if share else floor, rel=0.02)
        sigma, mean = values.std(), values.mean()
        bell = np.exp(-((np.array(fitted_at) - mean) ** 2) / (2 * sigma**2))
        assert fitted == pytest.approx(bell / (sigma * np.sqrt(2 * np.pi)), rel=1e-6)
        lines = page.evaluate(
            "document.getElementById('density-plot').layout.shapes.map(s => s.x0)"
        )
        assert lines == pytest.approx([mean + k * sigma for k in (-3, -2, 2, 3)])
        ranges = []
        for scale in ("linear", "log"):
            page.check(f"input[name=scale][value={scale}]")
            axis = "document.getElementById('density-plot')._fullLayout.yaxis"
            assert page.evaluate(f"{axis}.type") == scale
            ranges.append(page.evaluate(f"{axis}.range"))
        assert ranges[0][0] == 0 and 10 ** ranges[1][1] > max(density)


def test_quantiles_are_those_of_the_elements(made, visit):
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    values = np.sort(load_folder(made.models[0])[name].double().numpy().ravel())
    scaled = (values - values.mean()) / values.std()
    with visit(made.pair) as page:
        page.select_option("#subject", "0")
        page.evaluate("name => select(name)", name)
        (_, gaussian), (_, own) = (plotted(page, "qq-plot", key) for key in "xy")
    ranks = torch.special.ndtr(torch.tensor(gaussian).double()).numpy() * len(scaled)
    # The element of that rank is in the bin that was interpolated in.
    expected = scaled[np.ceil(ranks).astype(int) - 1]
    assert len(own) > 30
    assert own == pytest.approx(expected, abs=1 / 32)


def test_gallery_shows_a_layer_or_a_module_and_opens_what_is_chosen(made, visit):
    with visit(made.pair) as page:
        page.select_option("#subject", "0")
        go_to(page, "gallery")
        names = page.locator("#gallery-grid .small").evaluate_all(
            "all => all.map(a => a.dataset.name)"
        )
        layer = "language_model.model.layers.0."
        assert sorted(names) == sorted(
            t.name for t in made.stats(0, base=False).matrices if t.name.startswith(layer)
        )
        page.check("input[name=gallery][value=module]")
        go_to(page, "gallery")
        assert page.locator("#gallery-grid button").count() == 3
        page.check("input[name=picture][value=qq]")
        go_to(page, "gallery")
        page.locator("#gallery-grid button").nth(2).click()
        assert page.input_value("#layer") == "2"


def test_depth_shows_sigma_of_weights_and_of_task_vectors(made, visit):
    with visit(made.pair) as page:
        go_to(page, "depth")
        choose(page, "depth", "depth-module", "self_attn.v_proj")
        for plot, base in enumerate((False, True)):
            lines = page.evaluate(
                "plot => document.querySelectorAll('#depth-plots .plot')[plot].data"
                ".map(trace => [trace.name, trace.y])",
                plot,
            )
            expected = [
                [f"task{number}", [tensor.std for tensor in made.stats(number, base=base).tensors
                                   if re.search(r"language.*v_proj", tensor.name)]]
                for number in (0, 1)
            ]  # fmt: skip
            for (name, sigmas), (wanted, values) in zip(lines, expected, strict=True):
                assert name == wanted and sigmas == pytest.approx(values, rel=1e-6)


def test_heat_map_shows_any_statistic_and_opens_a_cell(made, visit):
    stats = {tensor.name: tensor for tensor in made.stats(0, base=False).tensors}
    with visit(made.pair) as page:
        page.select_option("#subject", "0")
        go_to(page, "heat")
        for key, scale in (("std", 1), ("kurtosis", 1), ("outside_3_ratio", 100)):
            choose(page, "heat", "statistic", key)
            names, values = (plotted(page, "heat-plot", k)[0] for k in ("customdata", "z"))
            assert len(names) == 7 and {len(row) for row in names} == {3}
            for row, own in zip(names, values, strict=True):
                assert own == pytest.approx([scale * getattr(stats[n], key) for n in row], rel=1e-6)
        box = page.locator("#heat-plot .nsewdrag").bounding_box()
        corner = {"x": box["width"] * 0.9, "y": 8}
        page.locator("#heat-plot .nsewdrag").hover(position=corner)
        page.locator("#heat-plot .hovertext").wait_for()
        page.locator("#heat-plot .nsewdrag").click(position=corner)
        page.locator("#tensor-name", has_text=names[0][2]).wait_for()
        assert page.inner_text("#tensor-name") == names[0][2]


def test_biases_and_norms_and_other_parts_can_be_chosen(made, visit):
    with visit(made.pair) as page:
        assert page.locator("#module option").count() == 7
        page.check("#vectors")
        assert page.locator("#module option").count() == 9
        page.select_option("#part", "")
        assert page.input_value("#layer") == "" and "layers" not in page.inner_text("#tensor-name")
        page.select_option("#part", VISION)
        assert "vision_tower" in page.inner_text("#tensor-name")


@pytest.mark.parametrize("t", [1.0, 2.0, 3.0])
def test_min_sigma_view_gives_what_the_rule_does_to_the_elements(made, visit, t):
    deltas = [made.deltas(folder) for folder in made.models]
    kept, total = np.zeros(3), np.zeros(3)
    for name, delta in deltas[0].items():
        limit = t * min(each[name].std() for each in deltas)
        for mask, sums in ((np.abs(delta) > limit, kept), (np.isfinite(delta), total)):
            sums += [mask.sum(), np.abs(delta[mask]).sum(), (delta[mask] ** 2).sum()]
    whole = kept / total
    left = (1 - whole) / [1, 2, 4]
    with visit(made.pair) as page:
        go_to(page, "minsigma")
        page.locator("#t").fill(str(t))
        go_to(page, "minsigma")
        assert page.inner_text("#t-value") == f"{t:.1f}"
        assert [number(each) for each in column(page, "shares", 2)] == pytest.approx(
            100 * whole, abs=0.5
        )
        assert [number(each) for each in column(page, "shares", 3)] == pytest.approx(
            100 * left, abs=0.5
        )
        away = [number(each) for each in column(page, "shares", 4)[1:]]
        assert away == pytest.approx(100 * (1 - whole - left)[1:], abs=0.5)


def test_tables_have_the_numbers_and_sort_and_filter(made, visit):
    stats = made.stats(0, base=False)
    with visit(made.pair) as page:
        page.select_option("#subject", "0")
        go_to(page, "tables")
        whole = stats.whole.spreads
        row = page.locator("#statistics tbody tr").first.locator("td").all_inner_texts()
        assert (
            row[3] == f"{100 * whole['kept_ratio'].mean:.2f} ± {100 * whole['kept_ratio'].std:.2f}"
        )
        assert row[5] == f"{whole['kurtosis'].mean:.2f} ± {whole['kurtosis'].std:.2f}"
        choose(page, "tables", "table", "modules")
        assert column(page, "statistics", 1) == [group.name for group in stats.modules]
        choose(page, "tables", "table", "tensors")
        assert column(page, "statistics", 1) == [tensor.name for tensor in stats.tensors]
        sigmas = sorted(tensor.std for tensor in stats.tensors)
        header = page.locator("#statistics th").nth(4)
        assert header.inner_text().strip() == "σ"
        header.locator("button").focus()
        page.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == "descending"
        shown = [number(text) for text in column(page, "statistics", 5)]
        assert shown == pytest.approx(sigmas[::-1], rel=1e-3)
        page.keyboard.press("Enter")
        shown = [number(text) for text in column(page, "statistics", 5)]
        assert header.get_attribute("aria-sort") == "ascending"
        assert shown == pytest.approx(sigmas, rel=1e-3)
        page.fill("#filter", "LAYERS.1.MLP")
        go_to(page, "tables")
        names = {tensor.name for tensor in stats.tensors if "layers.1.mlp" in tensor.name}
        assert len(names) > 2 and set(column(page, "statistics", 1)) == names
        assert page.inner_text("#num-rows") == f"{len(names)} rows"
        choose(page, "tables", "table", "model")
        page.fill("#filter", "δw of TASK1")
        go_to(page, "tables")
        assert column(page, "statistics", 1) == ["ΔW of task1"]


def test_merge_shows_its_manifest_and_its_drift(made, visit):
    manifest = json.loads((made.output / "outliermerge.json").read_text())
    name = "language_model.model.layers.{}.mlp.up_proj.weight"
    base, output = load_folder(made.base), made.deltas(made.output)
    norm = {key: tensor.double().norm().item() for key, tensor in base.items()}
    with visit(made.merge) as page:
        go_to(page, "merge")
        choose(page, "merge", "merge-module", "mlp.up_proj")
        sigmas = [manifest["tensors"][name.format(n)]["statistics"]["sigma"] for n in range(3)]
        assert plotted(page, "merge-plot", "y") == [
            pytest.approx(list(model), rel=1e-6) for model in zip(*sigmas, strict=True)
        ]
        assert "merge_method: min_sigma" in page.text_content("#recipe")
        go_to(page, "drift")
        rows = page.locator("#drift-table tbody tr")
        for number_, folder in enumerate(made.models):
            task = made.deltas(folder)

            def length(vectors):
                return np.sqrt(sum((vector**2).sum() for vector in vectors.values()))

            product = sum((output[key] * task[key]).sum() for key in base)
            shown = rows.nth(number_).locator("th, td").all_inner_texts()
            assert shown[0] == folder.name
            assert [number(text) for text in shown[1:]] == pytest.approx(
                [
                    product / length(task) ** 2,
                    length({key: output[key] - task[key] for key in base}) / length(task),
                    product / length(output) / length(task),
                    length(output) / length(task),
                    length(output) / np.sqrt(sum(value**2 for value in norm.values())),
                ],
                rel=1e-3,
            )
        choose(page, "drift", "drift-measure", "cosine")
        choose(page, "drift", "drift-model", "1")
        names, values = (plotted(page, "drift-plot", k)[0] for k in ("customdata", "z"))
        place = [row[1] for row in names].index(name.format(1))
        ours, theirs = output[name.format(1)].ravel(), made.deltas(made.models[1])[names[place][1]]
        cosine = ours @ theirs.ravel() / np.linalg.norm(ours) / np.linalg.norm(theirs)
        assert values[place][1] == pytest.approx(cosine, rel=1e-6)
        choose(page, "tables", "table", "merge")
        assert len(column(page, "statistics", 1)) == len(manifest["tensors"])


def test_names_with_html_in_them_are_inert(visit, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(
        stats_of_tensor(torch.randn(16, 16, generator=generator), name=name)
        for name in (HOSTILE, "model.layers.1.up.weight")
    )
    stats = WeightStats("<img src=x>", None, 3.0, 1e-3, tensors, ("<i>note</i>",))
    subject = Shown("<img src=x>", "model", stats)
    page_path = tmp_path / "page.html"
    page_path.write_bytes(render_page("<img src=x> & {{DATA}}", payload([subject], t=2.0)))
    with visit(page_path) as page:
        page.evaluate("name => select(name)", HOSTILE)
        for section in ("gallery", "depth", "heat", "minsigma", "tables"):
            go_to(page, section)
        choose(page, "tables", "table", "tensors")
        assert HOSTILE in column(page, "statistics", 1)
        assert page.inner_text("#tensor-name") == HOSTILE
        assert page.inner_text("h1") == "Weights of <img src=x> & {{DATA}}"
        assert page.inner_text("#notes") == "<i>note</i>"
        assert page.locator("#evil, body img, #notes i").count() == 0


def test_many_experts_are_chosen_one_by_one_averaged_and_listed_in_pieces(visit, tmp_path):
    one = stats_of_tensor(torch.randn(16, 16, generator=torch.Generator().manual_seed(2)))
    tensors = tuple(
        replace(
            one,
            name=f"model.layers.0.experts.{number_}.up.weight",
            layer="model.layers.0",
            module="model.layers.*.experts.*.up",
            kurtosis=float(number_),
        )
        for number_ in range(310)
    )
    stats = WeightStats("m", None, 3.0, 1e-3, tensors)
    page_path = tmp_path / "page.html"
    page_path.write_bytes(render_page("m", payload([Shown("m", "model", stats)], t=2.0)))
    with visit(page_path) as page:
        assert page.locator("#member option").count() == 310
        page.select_option("#member", tensors[7].name)
        assert number(facts(page)["kurtosis, inside 3σ"]) == 7
        choose(page, "heat", "statistic", "kurtosis")
        assert plotted(page, "heat-plot", "z") == [[[pytest.approx(154.5)]]]
        choose(page, "minsigma", "count", "4")
        whole, left, away = (number(column(page, "shares", place)[1]) for place in (2, 3, 4))
        assert left == pytest.approx((100 - whole) / 4, abs=0.02)
        assert away == pytest.approx(3 * left, abs=0.02)
        choose(page, "tables", "table", "tensors")
        assert page.inner_text("#num-rows") == "300 of 310 rows"
        page.click("#all-rows")
        assert len(column(page, "statistics", 1)) == 310 and page.is_hidden("#all-rows")


def test_page_runs_no_script_but_its_own(visit, made):
    with pytest.raises(AssertionError, match="Content Security Policy"), visit(made.pair) as page:
        page.evaluate(
            "() => { const added = document.createElement('script');"
            " added.textContent = 'window.ran = true'; document.body.append(added); }"
        )
        assert page.evaluate("window.ran === undefined")


def test_payload_is_json_that_no_parser_of_html_ends():
    constant = stats_of_tensor(torch.full((4, 4), 2.0), name=HOSTILE)
    stats = WeightStats("m", None, 3.0, 1e-3, (constant,))
    found = payload([Shown("m", "model", stats)], t=2.0)
    text = embedded_json(found)
    assert "<" not in text and text.isascii()
    columns = json.loads(text)["subjects"][0]["columns"]
    assert columns["name"] == [HOSTILE]
    assert columns["kurtosis"] == [None] and columns["histogram"] == [None]
    assert columns["mean"] == [2.0]


def test_payload_keeps_every_element_of_a_histogram():
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    values[0, 0] = 50.0
    tensor = stats_of_tensor(values, name="w")
    stats = WeightStats("m", None, 3.0, 1e-3, (tensor,))
    columns = payload([Shown("m", "model", stats)], t=2.0)["subjects"][0]["columns"]
    (histogram,) = columns["histogram"]
    assert (histogram["below"], histogram["above"]) == (0, 1)
    assert sum(histogram["counts"]) == 64 * 64 - 1
    first, counts = histogram["first"], histogram["counts"]
    assert tuple(counts) == tensor.histogram.counts[first : first + len(counts)]
    assert set(tensor.histogram.counts[:first]) == {0} and counts[0] > 0


def move_away(made, tmp_path, lost):
    """Return an output whose manifest names inputs of which some are no longer there."""
    output = tmp_path / "output"
    shutil.copytree(made.output, output)
    path = output / "outliermerge.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["inputs"]:
        if Path(entry["path"]).name in lost:
            entry["path"] = entry["model"] = str(tmp_path / "gone" / Path(entry["path"]).name)
    path.write_text(json.dumps(manifest))
    return output


@pytest.mark.parametrize(
    ("lost", "notes", "roles", "has_drift"),
    [
        (["task1"], ["task1 is not shown"], ["output", "output", "task"], True),
        (["base"], ["without task vectors"], ["output", "task", "task"], True),
        (["base", "task0", "task1"], ["without task vectors", "task0", "task1"], ["output"], False),
    ],
)
def test_lost_inputs_are_told_of_and_the_rest_is_drawn(
    made, tmp_path, lost, notes, roles, has_drift
):
    page = build_report(
        [str(move_away(made, tmp_path, lost))], output=tmp_path / "page.html", threads=1
    )
    data = json.loads(re.search('id="data">(.*?)</script>', page.read_text())[1])
    assert [subject["role"] for subject in data["subjects"]] == roles
    assert all(
        note in text and "no such file or folder" in text
        for note, text in zip(notes, data["notes"], strict=True)
    )
    assert len(data["merge"]["tensors"]) > 50
    assert ("drift" in data and data["drift"] is not None) == has_drift


def test_inputs_that_changed_since_the_merge_are_told_of(made, tmp_path):
    output = move_away(made, tmp_path, [])
    manifest = output / "outliermerge.json"
    os.utime(manifest, (1, 1))  # as if the models were written later
    page = build_report([str(output)], output=tmp_path / "page.html", threads=1)
    data = json.loads(re.search('id="data">(.*?)</script>', page.read_text())[1])
    assert [text.split(" have changed")[0] for text in data["notes"]] == [
        "Files of base", "Files of task0", "Files of task1"
    ]  # fmt: skip


def test_page_without_base_and_task_models_says_so(made, visit, tmp_path):
    output = move_away(made, tmp_path, ["base", "task0", "task1"])
    with visit(build_report([str(output)], output=tmp_path / "p.html", threads=1)) as page:
        assert page.locator("#notes li").count() == 3
        assert "without task vectors" in page.inner_text("#notes")
        go_to(page, "merge")
        assert page.locator("#merge-plot svg.main-svg").count() > 0
        for absent in ("drift", "minsigma"):
            assert page.is_hidden(f"#{absent}") and page.is_hidden(f"nav a[href='#{absent}']")


def test_merge_of_weights_has_no_numbers_and_its_drift_is_that_of_weights(made, visit, tmp_path):
    spec = {"merge_method": "linear", "models": [{"model": name} for name in made.names]}
    output = outliermerge.run(spec, output=tmp_path / "mean", threads=1).output
    first, second = (load_folder(folder) for folder in made.models)
    change = sum((first[key].double() - second[key].double()).square().sum() for key in first)
    norm = sum(tensor.double().square().sum() for tensor in first.values())
    page_path = build_report([str(output)], output=tmp_path / "page.html", threads=1)
    with visit(page_path) as page:
        assert page.is_hidden("#recorded") and page.is_hidden("#minsigma")
        go_to(page, "drift")
        row = page.locator("#drift-table tbody tr").first.locator("th, td").all_inner_texts()
        assert row[0] == "task0" and len(row) == 4
        half = (change / norm).sqrt().item() / 2
        assert number(row[1]) == pytest.approx(half, rel=1e-3)


def test_model_without_layers_has_a_page(visit, tmp_path):
    model = save_tensors(tmp_path / "flat", {"a": torch.randn(8, 8), "b": torch.randn(3)})
    with visit(build_report([str(model)], output=tmp_path / "page.html", threads=1)) as page:
        for section in ("gallery", "heat", "minsigma"):
            go_to(page, section)
        assert page.is_hidden("#depth") and page.is_hidden("nav a[href='#depth']")
        assert page.inner_text("#tensor-name") == "a"


def test_figures_for_papers_come_with_the_page(tmp_path):
    model = save_tensors(tmp_path / "small", {"layers.0.up.weight": torch.randn(8, 8)})
    build_report([str(model)], output=tmp_path / "page.html", png=tmp_path / "png", threads=1)
    assert "sigma_by_depth_W_small_layers.png" in {p.name for p in (tmp_path / "png").iterdir()}


@pytest.mark.parametrize("step", ["reading", "writing"])
def test_failure_leaves_the_page_that_was_there(made, tmp_path, monkeypatch, step):
    output = tmp_path / "report.html"
    before = made.pair.read_bytes()
    output.write_bytes(before)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    models = made.names[:1]
    if step == "reading":
        models = [*models, str(tmp_path / "absent")]
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((OutlierMergeError, OSError), match=r"absent|No space left on device"):
        build_report(models, output=output, threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": []}, "no model"),
        ({"t": 0.5}, "t: found 0.5"),
        ({"output": "absent/report.html"}, "cannot be written"),
        ({"output": "."}, "cannot be written"),
    ],
)
def test_mistakes_are_refused_before_anything_is_read(made, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(report_module, "weight_stats", None)
    arguments = {"models": made.names, "output": "report.html", "t": 2.0} | change
    arguments["output"] = tmp_path / arguments["output"]
    with pytest.raises(OutlierMergeError, match=message):
        build_report(arguments.pop("models"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_missing_plotly_is_named(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(OutlierMergeError, match=r"pip install plotly"):
        build_report(made.names, output=tmp_path / "report.html")


def test_error_of_an_option_is_one_of_usage(made, tmp_path):
    with pytest.raises(ArgumentError):
        build_report(made.names, output=tmp_path / "report.html", t=9.0)
