"""The report page in a real browser."""

from .report_runs import HACKED, STEP_ROWS, benchmark, gap_of, page_of, problem, selection, write


HOSTILE = (
    "</style><script>window.hacked=1</script><img src=x onerror=window.hacked=1>'\"&lt; <svg onload=window.hacked=1>"
)


def test_the_first_screen_answers(show, folders):
    browser = show(page_of(folders))
    assert browser.texts("h1") == ["Is my reward model being hacked?"]
    assert browser.texts(".card .chip") == ["hacked", "no sign of hacking"]
    bottom = "Math.max(...[...document.querySelectorAll('.first')].map(e => e.getBoundingClientRect().bottom))"
    assert browser.evaluate(bottom) <= 900
    drawn = "[...document.images].filter(image => image.complete && image.naturalWidth > 500).length"
    assert browser.evaluate(drawn) == browser.evaluate("document.images.length") == 7


def test_hostile_text_is_inert(show, tmp_path):
    """Results may come from anyone, so their texts must be shown and never executed."""
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
    browser = show(page_of([write(tmp_path / name, values), judged, other]))
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate("document.querySelectorAll('script, svg, iframe, img:not(figure img)').length") == 0
    assert browser.texts(".card h2")[0].startswith(name)
