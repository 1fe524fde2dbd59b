"""The page of the report in a real browser."""

import pytest

from ..browser import Browser
from .report_runs import HACKED, STEP_ROWS, benchmark, gap_of, page_of, problem, selection, write


HOSTILE = (
    "</style><script>window.hacked=1</script><img src=x onerror=window.hacked=1>'\"&lt; <svg onload=window.hacked=1>"
)


@pytest.fixture
def show(browser, tmp_path):
    """Open the page of a report, and at the end of the test make sure that it asked for nothing and reported no error."""
    file = tmp_path / "report.html"

    def show(folders, width=1280, height=900, dark=False) -> Browser:
        file.write_text(page_of(folders), encoding="utf-8")
        browser.show(width, height, dark)
        browser.open(file)
        return browser

    yield show
    asked = [address for address in browser.requests if not address.startswith("data:")]
    assert asked == [file.absolute().as_uri()]
    assert browser.errors == []


class TestBrowser:
    def test_the_first_screen_answers(self, show, folders):
        browser = show(folders)
        assert browser.texts("h1") == ["Is my reward model being hacked?"]
        assert browser.texts(".card .chip") == ["hacked", "no sign"]
        bottom = "Math.max(...[...document.querySelectorAll('.first')].map(e => e.getBoundingClientRect().bottom))"
        assert browser.evaluate(bottom) <= 900
        drawn = "[...document.images].filter(image => image.complete && image.naturalWidth > 500).length"
        assert browser.evaluate(drawn) == browser.evaluate("document.images.length") == 7

    @pytest.mark.parametrize(
        "width, height, dark",
        [(320, 640, False), (390, 844, True), (820, 1180, False), (1920, 1080, True)],
    )
    def test_sizes(self, show, wide, width, height, dark):
        """Nothing may stand beyond the right edge, but in tables that scroll."""
        browser = show(wide, width, height, dark)
        browser.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        browser.settle()
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        stray = browser.evaluate(
            "[...document.querySelectorAll('body *')].filter(e => !e.closest('table') && "
            "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert stray == []

    def test_dark_and_light(self, show, folders):
        """Page and pictures must change together: a white picture in a dark page is what is seen first."""

        def shades(dark):
            browser = show(folders, dark=dark)
            found = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            page = sum(map(int, found[4:-1].split(","))) / 765
            corner = (
                "(() => {const image = document.images[0], canvas = document.createElement('canvas');"
                "canvas.width = canvas.height = 9; const context = canvas.getContext('2d');"
                "context.drawImage(image, 0, 0); return [...context.getImageData(1, 1, 1, 1).data]})()"
            )
            return page, sum(browser.evaluate(corner)[:3]) / 765

        assert all(shade > 0.9 for shade in shades(False))
        assert all(shade < 0.15 for shade in shades(True))

    def test_hostile_text_is_inert(self, show, tmp_path):
        """Results may come from anyone: their texts must be read, never run."""
        name = HOSTILE.replace("/", "|")
        values = selection(
            strategy=HOSTILE,
            reward_model={HOSTILE: HOSTILE},
            settings={HOSTILE: [HOSTILE], "aggregate": "min"},
            counts={HOSTILE: 1},
            versions={HOSTILE: HOSTILE},
        )
        values["curves"][f"{HOSTILE}/{HOSTILE}"] = HACKED
        values["hacking_gap"][f"{HOSTILE}/{HOSTILE}"] = gap_of(HACKED, 0.1, 0.2)
        suites = {
            HOSTILE: benchmark()["suites"]["processbench"] | {"subsets": {HOSTILE: {"f1": 0.1, "low": 0, "high": 1}}}
        }
        judged = write(
            tmp_path / f"b{name}", benchmark(suites=suites), [STEP_ROWS[0] | {"suite": HOSTILE}], "scores.jsonl"
        )
        other = write(tmp_path / "other", values, [problem(HOSTILE)])
        browser = show([write(tmp_path / name, values), judged, other])
        assert browser.evaluate("window.hacked") is None
        assert browser.evaluate("document.querySelectorAll('script, svg, iframe, img:not(figure img)').length") == 0
        assert browser.texts(".card h2")[0].startswith(name)

    def test_the_policy_forbids_requests(self, browser, folders, tmp_path):
        """Were the policy absent or damaged, nobody would notice: the page itself asks for nothing."""
        file = tmp_path / "page.html"
        file.write_text(page_of(folders), encoding="utf-8")
        browser.open(file)
        assert browser.evaluate("fetch('data:text/plain,x').then(() => 'sent', () => 'refused')") == "refused"
