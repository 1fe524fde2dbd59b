"""Check in a real browser that every page works offline, fits its window, has a dark mode and is readable."""

import re

import pytest

from trl_hrm.demo.report import render_report
from trl_hrm.demo.report_pictures import make_pictures
from trl_hrm.search.inspection import render_tree

from ..demo.report_data import example
from ..evaluation.report_runs import STEP_ROWS, benchmark, page_of, selection, write
from ..search.trees import full_tree, inspection_of


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Return every kind of page, with the longest names that fit into a path."""
    folder = tmp_path_factory.mktemp("runs")
    long = "x" * 100
    runs = [
        write(folder / f"bon-{long}", selection()),
        write(folder / "other", selection(reward_model={"model": "y" * 400})),
    ]
    runs.append(write(folder / f"judged-{long}", benchmark(), STEP_ROWS, "scores.jsonl"))
    data = example()
    return {
        "results": page_of(runs),
        "demo": render_report(data, make_pictures(data)),
        "tree": render_tree(inspection_of(full_tree(3, 3), run=long)),
    }


@pytest.mark.parametrize("name", ["results", "demo", "tree"])
class TestEveryPage:
    def test_the_policy_forbids_requests(self, browser, pages, name, tmp_path):
        """A missing or broken security policy would go unnoticed, because the page itself requests nothing."""
        file = tmp_path / "page.html"
        file.write_text(pages[name], encoding="utf-8")
        browser.open(file)
        assert browser.evaluate("fetch('data:text/plain,x').then(() => 'sent', () => 'refused')") == "refused"

    @pytest.mark.parametrize("width, dark", [(320, False), (390, True), (820, False), (1920, True)])
    def test_no_horizontal_overflow(self, show, pages, name, width, dark):
        """Only tables and wide pictures may scroll horizontally."""
        browser = show(pages[name], width, dark=dark)
        browser.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        browser.settle()
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        stray = browser.evaluate(
            "[...document.querySelectorAll('body *')].filter(e => !e.closest('table, .wide picture, #rows') && "
            "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert stray == []

    @pytest.mark.parametrize("dark", [False, True])
    def test_colours(self, show, pages, name, dark):
        """Small text needs a contrast of 4.5 in both schemes. A white picture would dominate a dark page."""
        browser = show(pages[name], dark=dark)
        colors = browser.evaluate(
            """[...document.querySelectorAll('.chip, .quiet, .lead, .vote, td, th, a, li, figcaption, dt, dd, .badge')].map(e => {
            let back = e; while (back && getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
            return [getComputedStyle(e).color, getComputedStyle(back).backgroundColor]})"""
        )

        def luminance(color: str) -> float:
            parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
            linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        for pair in {tuple(pair) for pair in colors if all(color.startswith("rgb") for color in pair)}:
            low, high = sorted(map(luminance, pair))
            assert (high + 0.05) / (low + 0.05) >= 4.5, pair
        page = luminance(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        corners = browser.evaluate(
            "[...document.images].map(image => {const canvas = document.createElement('canvas');"
            "canvas.width = canvas.height = 9; const context = canvas.getContext('2d');"
            "context.drawImage(image, 0, 0); return `rgb(${[...context.getImageData(1, 1, 1, 1).data].slice(0, 3)})`})"
        )
        for shade in (page, *map(luminance, corners)):
            assert shade < 0.05 if dark else shade > 0.8
