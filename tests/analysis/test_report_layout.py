"""How a report's page is laid out: in windows that change, on paper, folded, in slow browsers."""

from __future__ import annotations

import re

import pytest
from report_pages import go_to, wait_for

import outliermerge
from outliermerge.analysis.report.build import build_report

pytest_plugins = ("report_fixtures",)


@pytest.fixture(scope="module")
def sum_page(made, tmp_path_factory):
    """The page of a merge that is not by min-σ."""
    folder = tmp_path_factory.mktemp("sum")
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in made.names]
    spec = {"merge_method": "task_arithmetic", "base_model": str(made.base), "models": models}
    output = outliermerge.run(spec, output=folder / "sum", threads=1).output
    return build_report([str(output)], output=folder / "sum.html", threads=1)


def wait_for_all(page):
    for section in page.locator("section:visible").all():
        wait_for(page, section.get_attribute("id"))


@pytest.mark.parametrize("plot", ["drift-plot", "heat-plot"])
@pytest.mark.sampled(2)
def test_a_heat_map_is_as_wide_as_before_when_a_window_is_wide_again(made, visit, plot):
    room = ("(({ _fullLayout }) => [_fullLayout._size.w, _fullLayout._size.h, _fullLayout.width])"
            f"(document.getElementById('{plot}'))")  # fmt: skip
    with visit(made.merge) as page:
        wait_for_all(page)
        before = page.evaluate(room)
        assert before[0] > 0.7 * before[2]
        for width in (700, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            # Plotly looks at a window's size a tenth of a second after its change.
            page.wait_for_timeout(400)
            wait_for_all(page)
            now = page.evaluate(room)
            assert now[0] > 0.6 * now[2] and now[1] > 100, (width, now)
        assert now == before


def test_a_module_has_one_look_in_all_plots_against_depth(made, visit):
    with visit(made.merge) as page:
        go_to(page, "depth")
        named = page.evaluate(
            "[...document.querySelectorAll('#depth-plots .plot')].map("
            "plot => plot.data.map(each => each.name))"
        )
    assert len(named) == 2 and named[0] == named[1] == sorted(named[0])


def test_lines_on_one_another_can_all_be_seen(made, visit):
    with visit(made.merge) as page:
        go_to(page, "depth")
        lines = page.evaluate(
            "document.querySelector('#depth-plots .plot').data.map("
            "each => [each.line.dash, each.marker.symbol])"
        )
    assert len(lines) == 7
    assert len({dash for dash, _ in lines}) == 7
    assert lines[0][0] == "solid" and all(symbol.endswith("-open") for _, symbol in lines[1:])


def test_numbers_are_explained_in_words_and_their_formulas_unfold(made, sum_page, visit):
    for path in (made.merge, made.pair, sum_page):
        with visit(path) as page:
            assert not re.search("[‖⟨]", page.inner_text("main")), path.name
            assert not re.search("[‖⟨]", " ".join(page.locator("option").all_text_contents()))
            page.locator("#numbers summary").first.click()
            assert "‖" in page.inner_text("#numbers")
            assert "W₀" in page.locator("#numbers details").first.get_attribute("title")


def test_what_belongs_to_min_sigma_is_folded_where_the_merge_is_by_another_method(
    made, sum_page, visit
):
    drawn = "#threshold-plot svg.main-svg, #statistics tbody tr"
    for path in (made.merge, made.pair):
        with visit(path) as page:
            go_to(page, "tables")
            assert page.locator("details.fold[open]").count() == 2
            assert page.locator("#table option").first.inner_text() == "Models, as in the paper"
    with visit(sum_page) as page:
        wait_for_all(page)
        assert page.locator("details.fold[open]").count() == page.locator(drawn).count() == 0
        assert page.locator("#table option").first.text_content() == "Models"
        # A heading opens it, as does a link to it.
        page.locator("#tables-title").click()
        page.locator("#statistics tbody tr").first.wait_for()
        page.locator("nav a[href='#minsigma']").click()
        page.locator("#threshold-plot svg.main-svg").first.wait_for()
        assert page.locator("#threshold-plot svg.main-svg").first.bounding_box()["width"] < 600
        # What it shows follows a change that came while it was closed.
        page.locator("#tables-title").click()
        page.evaluate("update({ table: 'tensors' })")
        page.locator("#tables-title").click()
        page.locator("#statistics tbody tr >> nth=20").wait_for()


def test_the_first_screen_reaches_the_drift(sum_page, visit):
    with visit(sum_page) as page:
        assert page.locator("#recipe").is_hidden()
        assert page.locator("#drift-title").bounding_box()["y"] < 720
        page.locator("summary", has_text="Recipe").click()
        assert "task_arithmetic" in page.inner_text("#recipe")


def test_nothing_is_cut_on_a_phone(made, visit):
    with visit(made.merge, width=390) as page:
        wait_for_all(page)
        for link in page.locator("nav a:visible").all():
            box = link.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390
        assert page.evaluate("document.querySelector('nav').scrollWidth <= innerWidth")
        cut = page.evaluate(
            """[...document.querySelectorAll('select')].filter(each => {
              if (!each.offsetWidth) return false;
              const free = each.cloneNode(true);
              free.removeAttribute('id');
              free.style.cssText = 'position: absolute; max-width: none; flex: none';
              each.parentElement.append(free);
              const width = free.offsetWidth;
              free.remove();
              return each.offsetWidth < width;
            }).map(each => each.id)"""
        )
        assert cut == []


def test_on_paper_headings_stay_with_what_follows_and_numbers_in_one_line(made, sum_page, visit):
    style = "(each, name) => getComputedStyle(each)[name]"
    with visit(made.merge) as page:
        wait_for_all(page)
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        assert "min_sigma" in page.inner_text("#recipe")
        for above in ("h2", "#drift-text", "#distribution > p", "#tensor-name", ".controls"):
            assert page.locator(above).first.evaluate(style, "breakAfter") == "avoid", above
        for whole in ("#gallery-grid", "p", ".plot", ".scroll"):
            assert page.locator(whole).first.evaluate(style, "breakInside") == "avoid", whole
        box = page.locator("#statistics").bounding_box()
        assert box["x"] + box["width"] <= 700
        cells = page.locator("#statistics td", has_text="±").all()
        assert cells and all(
            cell.evaluate(
                "each => { const range = document.createRange(); range.selectNodeContents(each);"
                " return range.getClientRects().length; }"
            ) == 1
            for cell in cells
        )  # fmt: skip
        page.emulate_media(media="screen")
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("#recipe").is_hidden()
    with visit(sum_page) as page:
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        assert page.locator("#minsigma, #tables").locator("visible=true").count() == 0
        page.emulate_media(media="screen")
        page.evaluate("dispatchEvent(new Event('afterprint'))")


def test_a_page_is_drawn_where_the_browser_never_says_what_is_in_sight(made, tab):
    page = tab.context.browser.new_page()
    page.set_default_timeout(60_000)
    page.add_init_script("window.IntersectionObserver = class { observe() {} unobserve() {}"
                         " disconnect() {} };")  # fmt: skip
    page.goto(made.pair.as_uri())
    wait_for_all(page)
    page.close()


def test_a_section_that_cannot_be_drawn_holds_up_no_other(made, visit):
    with visit(made.pair) as page:
        wait_for_all(page)
        page.evaluate(
            "() => { SECTIONS.gallery[0] = () => { throw new Error('broken'); };"
            " try { redrawAll(); } catch {} }"
        )
        wait_for_all(page)
        page.wait_for_timeout(200)
        assert any("broken" in each for each in page.heard)
        page.heard[:] = [each for each in page.heard if "broken" not in each]
